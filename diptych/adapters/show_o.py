"""Show-o's published files, two folders or one: the transformer (`showo.*`, Phi with norms of queries and keys) and the
tokenizer (`magvitv2.safetensors`, MAGVIT-v2 with codes by sign). Golden cases are in `show_o_cases`."""
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diptych.adapters.keys import Rule, expand
from diptych.adapters.published import Checkpoint, Layout, Written, build, need, others
from diptych.adapters.tensors import STEMS, Tensors, need_weights, read_json
from diptych.adapters.tokenizers import named, pyramid, tensor_names
from diptych.adapters.vila_u import below
from diptych.parts.blocks import BlockConfig
from diptych.parts.quantize import LossWeights, SignConfig, VectorConfig
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.show_o import SPECIALS, ShowO, ShowOConfig

# Phi-1.5, which the published config names only
PHI = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
       "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "layer_norm_eps": 1e-5, "qk_layernorm": True}
FIXED = {"hidden_act": "gelu_new", "tie_word_embeddings": False}
PLACE = "magvitv2"  # the tokenizer's file and its section of a config
PREFIX = f"{PLACE}."  # in front of its tensors
# of the released tokenizer, whose config does not say it
MAGVIT = {"encoder": {"ch": 128, "z_channels": 13}, "decoder": {"ch": 128}, "codebook_dim": 13, "beta": 0.25,
          "entropy_multiplier": 0.1, "commit_loss_multiplier": 0.1}
WHAT = "MAGVIT-v2 (showlab/magvitv2)"
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


def codec_rules(config: VQTokenizerConfig) -> list[Rule]:
    """Those of the tokenizer as part of a system."""
    return [replace(r, theirs=tuple(PREFIX + t for t in r.theirs), ours=f"codec.{r.ours}")
            for r in tokenizer_rules(config)]


def tokenizer_values(c: VQTokenizerConfig) -> dict[str, Any]:
    """The way back: the `magvitv2` section of a config."""
    book = getattr(c.quantizer, "codebook", None)
    if not isinstance(c.encoder, PyramidConfig) or not isinstance(book, SignConfig) or c.patch != 1:
        raise ValueError("expected a config that the published layout can state, got another codec (a pyramid on "
                         "pixels whose codes are signs); fix: save it with save_system")
    assert isinstance(c.decoder, PyramidConfig) and isinstance(c.quantizer, VectorConfig)
    weights = c.quantizer.weights
    return {"encoder": {"ch": c.encoder.channels, "z_channels": c.latent_channels},
            "decoder": {"ch": c.decoder.channels}, "codebook_dim": book.width,
            "beta": weights.codebook / weights.commitment, "commit_loss_multiplier": weights.commitment,
            "entropy_multiplier": weights.entropy}


def find_tokenizer(folder: Path, parts: Mapping[str, Path], values: Mapping[str, Any]
                   ) -> tuple[list[Path], dict[str, Any], dict[str, Path]]:
    """The tokenizer's weights, beside the transformer's or in a folder of their own; its section of that folder's
    config (`values` is the transformer's); and the place of that folder in an export."""
    beside = folder / f"{PLACE}.safetensors"
    if beside.is_file():
        return [beside], values.get(PLACE, MAGVIT), {}
    home = need(folder, parts, "tokenizer", WHAT)
    about = read_json(home / "config.json") if (home / "config.json").is_file() else {}
    return need_weights(home, (PLACE, *STEMS)), about.get(PLACE, MAGVIT), {"tokenizer": home}


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
    """A published folder as a system; the tokenizer of pictures lies there too, or in `tokenizer`."""
    folder = Path(folder)
    parts = {} if tokenizer is None else {"tokenizer": Path(tokenizer)}
    return cast(ShowO, build(read(folder, parts), folder, dtype=torch.float32)[0])


def read(folder: Path, parts: Mapping[str, Path]) -> Checkpoint:
    values = read_json(folder / "config.json")
    values = values if "showo" in values else {"showo": values}
    files, about, apart = find_tokenizer(folder, parts, values)
    tensors = Tensors({"": need_weights(folder, ("showo", *STEMS)), PREFIX: files})
    config = tokenizer_config(about, below(tensors.meta(), PREFIX))
    c = config_of(values, config)
    return Checkpoint(cls=ShowO, config=c, tensors=tensors, rules=[*rules(c), *codec_rules(config)],
                      ignore=tuple(PREFIX + name for name in CONSTANT), configs=others(folder, apart), apart=apart)


def write(model: ShowO) -> Written:
    c, b, q = model.config, model.config.block, model.config.codec
    codec, codes = tokenizer_values(q), model.values
    if c.picture[0] != c.picture[1]:
        raise ValueError("expected a config that the published layout can state, got another picture (square ones); "
                         "fix: save it with save_system")
    ids = {name: c.text_size + i for i, name in enumerate(SPECIALS)}
    ids |= {"<|sot|>": model.marks.start, "<|eot|>": model.marks.end}
    values = {
        "showo": {"vocab_size": c.text_size + len(SPECIALS) + codes + 1, "llm_vocab_size": c.text_size,
                  "codebook_size": codes, "num_vq_tokens": (c.picture[0] // q.downsample)**2, "w_clip_vit": False},
        "phi": {"hidden_size": b.width, "intermediate_size": b.hidden, "num_hidden_layers": c.depth,
                "num_attention_heads": b.heads, "num_key_value_heads": b.kv_heads, "partial_rotary_factor": c.rotary,
                "rope_theta": c.rope_theta, "layer_norm_eps": b.norm_eps, "qk_layernorm": b.qk_norm,
                "hidden_act": "gelu_new", "tie_word_embeddings": False},
        PLACE: codec,
        "ids": {{"[PAD]": "<|pad|>"}.get(name, name): number for name, number in ids.items()}}
    return Written(configs={"config.json": values}, rules=[*rules(c), *codec_rules(q)],
                   files={"showo.safetensors": "", f"{PLACE}.safetensors": PREFIX})


def _finds(folder: Path) -> bool:
    path = folder / "config.json"
    values = read_json(path) if path.is_file() else {}
    own = values.get("_class_name", "Showo") == "Showo" and "model_type" not in values  # as that of MMaDA has
    return own and "llm_vocab_size" in values.get("showo", values)


LAYOUTS = {"original": Layout(about="config.json of Show-o (num_vq_tokens, llm_vocab_size) and its weights",
                              finds=_finds, read=read, write=write,
                              parts={"tokenizer": WHAT})}
