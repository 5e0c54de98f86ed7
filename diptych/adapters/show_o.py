"""Show-o's published files, two folders or one: the transformer (`showo.*`, Phi with norms of queries and keys) and the
tokenizer (`magvitv2.safetensors`, MAGVIT-v2 with codes by sign). Golden cases are in `show_o_cases`."""
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.adapters.keys import Rule, expand, to_ours, to_theirs
from diptych.adapters.tokenizers import named, place, pyramid, tensor_names
from diptych.parts.blocks import BlockConfig
from diptych.parts.quantize import LossWeights, SignConfig, VectorConfig
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.systems.show_o import SPECIALS, ShowO, ShowOConfig

# Phi-1.5, which the published config names only
PHI = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
       "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "layer_norm_eps": 1e-5, "qk_layernorm": True}
FIXED = {"hidden_act": "gelu_new", "tie_word_embeddings": False}
CONSTANT = ("quantize.embedding", "quantize.power_vals")  # the corners of the cube and the powers of two


def tokenizer_config(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VQTokenizerConfig:
    """From the `magvitv2` section of the config and the tensors."""
    commitment, beta = values["commit_loss_multiplier"], values["beta"]
    # theirs weighs what moves the features by 1 and what would move the corners, which are fixed, by beta
    weights = LossWeights(codebook=commitment * beta, commitment=commitment, entropy=values["entropy_multiplier"])
    encoder, decoder = (pyramid(tensors, f"{side}.", values[side]["ch"]) for side in ("encoder", "decoder"))
    return VQTokenizerConfig(encoder=encoder, decoder=decoder, latent_channels=values["encoder"]["z_channels"],
                             quantizer=VectorConfig(codebook=SignConfig(width=values["codebook_dim"]), weights=weights))


def tokenizer_rules(config: VQTokenizerConfig) -> list[Rule]:
    homes = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    return named(tensor_names(lambda: VQTokenizer(config)),
                 lambda ours: ".".join([homes.get(ours.split(".")[0], ours.split(".")[0]), *ours.split(".")[1:]]))


def load_tokenizer(folder: str | Path) -> VQTokenizer:
    """The tokenizer of a folder with `config.json` (section `magvitv2`) and `magvitv2.safetensors`."""
    folder = Path(folder)
    theirs = load_file(folder / "magvitv2.safetensors")
    config = tokenizer_config(json.loads((folder / "config.json").read_text())["magvitv2"], theirs)
    model = VQTokenizer(config)
    place(model, theirs, tokenizer_rules(config), folder, CONSTANT)
    return model.eval()


# -- the transformer --------------------------------------------------------------------------------------------------

def rules(c: ShowOConfig) -> list[Rule]:
    """How every tensor of the transformer is called here."""
    both, layer, ours = ("weight", "bias"), "showo.model.layers.{i}.", "trunk.layers.{i}."
    heads = {"self_attn.dense": "attention.0.out", "self_attn.q_layernorm": "attention.0.q_norm",
             "self_attn.k_layernorm": "attention.0.k_norm", "mlp.fc1": "mlp.0.up", "mlp.fc2": "mlp.0.down",
             "input_layernorm": "attention_norm.0"}
    b = c.block
    per_layer = [Rule((f"{layer}{theirs}.{{w}}",), f"{ours}{own}.{{w}}") for theirs, own in heads.items()]
    per_layer.append(Rule(tuple(f"{layer}self_attn.{p}_proj.{{w}}" for p in "qkv"), f"{ours}attention.0.qkv.{{w}}",
                          tuple(n * b.head_dim for n in (b.heads, b.kv_heads, b.kv_heads))))
    out = [r for rule in per_layer for r in expand(rule, i=range(c.depth), w=both)]
    out.append(Rule(("showo.model.embed_tokens.weight",), "embed.weight"))
    return out + [r for theirs, own in (("model.final_layernorm", "trunk.norm.0"), ("lm_head", "head"))
                  for r in expand(Rule((f"showo.{theirs}.{{w}}",), f"{own}.{{w}}"), w=both)]


def config_of(values: Mapping[str, Any], codec: VQTokenizerConfig) -> ShowOConfig:
    """From `config.json`: the sections `showo` and `phi` (without it: Phi-1.5), and `ids`, if there."""
    about, phi, ids = values["showo"], values.get("phi", PHI), values.get("ids", {})
    if about.get("w_clip_vit"):
        raise ValueError("expected a Show-o that reads pictures through codes, got w_clip_vit; "
                         "fix: take the checkpoint without CLIP")
    for key, only in FIXED.items():
        if phi.get(key, only) != only:
            raise ValueError(f"expected {key} of Phi to be {only!r}, got {phi[key]!r}")
    width, heads = phi["hidden_size"], phi["num_attention_heads"]
    block = BlockConfig(width=width, heads=heads, kv_heads=phi.get("num_key_value_heads") or heads,
                        head_dim=width // heads, hidden=phi["intermediate_size"], qkv_bias=True, norm="layer",
                        qk_norm=phi["qk_layernorm"], norm_eps=phi["layer_norm_eps"], mlp="gelu", bias=True,
                        parallel=True)
    paper = ShowO.paper()
    side = math.isqrt(about["num_vq_tokens"]) * codec.downsample
    c = ShowOConfig(block=block, depth=phi["num_hidden_layers"], rope_theta=float(phi["rope_theta"]),
                    rotary=phi["partial_rotary_factor"], text_size=about["llm_vocab_size"], codec=codec,
                    ends=(ids["<|sot|>"], ids["<|eot|>"]) if ids else paper.ends, picture=(side, side),
                    sampling=paper.sampling)
    # the text tokens, the special ones, codes, the mask
    size = c.text_size + len(SPECIALS) + about["codebook_size"] + 1
    names = {"[PAD]": "<|pad|>"}
    wrong = [n for i, n in enumerate(SPECIALS) if ids.get(names.get(n, n), c.text_size + i) != c.text_size + i]
    if about["vocab_size"] != size or wrong:
        raise ValueError(f"expected {len(SPECIALS)} special tokens behind {c.text_size} of text, then "
                         f"{about['codebook_size']} codes and the mask, got {about['vocab_size']} tokens and other ids "
                         f"of {', '.join(wrong) or 'none'}")
    return c


def load(folder: str | Path, tokenizer: str | Path | None = None) -> ShowO:
    """A folder with `config.json` and `showo.safetensors`; the picture tokenizer lies there too, or in `tokenizer`."""
    folder = Path(folder)
    codec = load_tokenizer(tokenizer or folder)
    model = ShowO(config_of(json.loads((folder / "config.json").read_text()), codec.config))
    own = rules(model.config)
    placed = {r.ours for r in own}
    shapes = {k: v.shape for k, v in model.state_dict().items() if k in placed}
    state, report = to_ours(load_file(folder / "showo.safetensors"), own, shapes)
    if report:
        raise ValueError(f"expected the published layout of Show-o in {folder}, got {report}")
    model.load_state_dict(state | {f"codec.{k}": v for k, v in codec.state_dict().items()})
    return model.eval()


def export(model: ShowO, folder: str | Path) -> None:
    """Write `showo.safetensors` and `magvitv2.safetensors`, without configs."""
    folder, codec = Path(folder), model.codec
    folder.mkdir(parents=True, exist_ok=True)
    for name, module, own in (("showo", model, rules(model.config)),
                              ("magvitv2", codec, tokenizer_rules(codec.config))):
        temporary = folder / f".{name}.safetensors"
        save_file(to_theirs(module.state_dict(), own), temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes files that only their owner may read
        temporary.replace(folder / f"{name}.safetensors")
