"""MMaDA's published transformer (`config.json` and `*.safetensors` of LLaDA with a longer vocabulary); the tokenizer of
its pictures is that of Show-o, in a folder of its own. Golden cases are in `mmada_cases`.

Whether a checkpoint was trained with its pads in sight is not said there: `variant` says it, "released" for those of
the authors.
"""
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from diptych.adapters.keys import Rule, expand, to_ours, to_theirs
from diptych.adapters.show_o import load_tokenizer
from diptych.objectives.masked_token import Variant
from diptych.parts.blocks import BlockConfig
from diptych.parts.vq import VQTokenizer
from diptych.systems.mmada import Mmada, MmadaConfig, Specials

FIXED = {"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True, "alibi": False,
         "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False, "include_bias": False,
         "include_qkv_bias": False, "weight_tying": False, "block_group_size": 1, "num_new_special_tokens": 0}
NAMES = {"image_start": "<|soi|>", "image_end": "<|eoi|>", "draw": "<|t2i|>", "read": "<|mmu|>", "reason": "<|r2i|>",
         "pad": "[iPAD]"}
TENSORS = "*.safetensors"


def rules(c: MmadaConfig) -> list[Rule]:
    """How every tensor of the transformer is called here."""
    layer, ours, b = "model.transformer.blocks.{i}.", "trunk.layers.{i}.", c.block
    single = {"attn_norm": "attention_norm.0", "attn_out": "attention.0.out", "ff_norm": "mlp_norm.0",
              "ff_out": "mlp.0.down"}
    per_layer = [Rule((f"{layer}{theirs}.weight",), f"{ours}{own}.weight") for theirs, own in single.items()]
    per_layer.append(Rule(tuple(f"{layer}{p}_proj.weight" for p in "qkv"), f"{ours}attention.0.qkv.weight",
                          tuple(n * b.head_dim for n in (b.heads, b.kv_heads, b.kv_heads))))
    per_layer.append(Rule(tuple(f"{layer}{p}_proj.weight" for p in ("ff", "up")), f"{ours}mlp.0.gate_up.weight",
                          (b.hidden, b.hidden)))
    return [r for rule in per_layer for r in expand(rule, i=range(c.depth))] + [
        Rule((f"model.transformer.{theirs}.weight",), f"{own}.weight")
        for theirs, own in (("wte", "embed"), ("ln_f", "trunk.norm.0"), ("ff_out", "head"))]


def config_of(values: Mapping[str, Any], codec: VQTokenizer, variant: Variant = "released") -> MmadaConfig:
    """From `config.json`; its `_extra`, if there, states ids and the length of prompts."""
    for key, only in FIXED.items():
        if values.get(key, only) != only:
            raise ValueError(f"expected {key} of MMaDA to be {only!r}, got {values[key]!r}")
    text, codes, extra = values["llm_vocab_size"], values["codebook_size"], values.get("_extra")
    if values["new_vocab_size"] != text + codes or values.get("embedding_size", text + codes) != text + codes:
        raise ValueError(f"expected {text} tokens of texts, then {codes} codes, got {values['new_vocab_size']}")
    paper, width, heads = Mmada.paper(), values["d_model"], values["n_heads"]
    specials, ends, prompt = paper.specials, paper.ends, paper.prompt
    if extra is not None:
        ids = {own: extra["special_ids"][theirs] for own, theirs in NAMES.items()}
        specials = Specials(mask=values["mask_token_id"], **ids)
        ends, prompt = (extra["bos"], extra["eos"]), extra["max_text_len"] + 1
    if specials.mask != values["mask_token_id"]:
        raise ValueError(f"expected [MASK] to be {specials.mask}, got {values['mask_token_id']}")
    stride = codec.config.downsample
    found = codec.layout(stride, stride).values
    if found != codes:
        raise ValueError(f"expected a picture tokenizer of {codes} codes, got {found}; "
                         "fix: pass the one it was trained on")
    block = BlockConfig(width=width, heads=heads, kv_heads=values.get("n_kv_heads") or heads, head_dim=width // heads,
                        hidden=values["mlp_hidden_size"], qkv_bias=False, norm_eps=values["rms_norm_eps"])
    side = math.isqrt(values["num_vq_tokens"]) * stride
    return MmadaConfig(block=block, depth=values["n_layers"], rope_theta=float(values["rope_theta"]), text_size=text,
                       specials=specials, mark_names=paper.mark_names, ends=ends, turns=paper.turns,
                       codec=codec.config, picture=(side, side), slots=paper.slots, prompt=prompt, variant=variant,
                       sampling=paper.sampling)


def assemble(folder: str | Path, codec: VQTokenizer, variant: Variant = "released") -> Mmada:
    """The transformer of a folder around a picture tokenizer."""
    folder = Path(folder)
    model = Mmada.from_folder(config_of(json.loads((folder / "config.json").read_text()), codec, variant), folder)
    theirs = {k: v for path in sorted(folder.glob(TENSORS)) for k, v in load_file(path).items()
              if path.stem not in ("golden", "magvitv2")}
    own = rules(model.config)
    placed = {r.ours for r in own}
    state, report = to_ours(theirs, own, {k: v.shape for k, v in model.state_dict().items() if k in placed})
    if report:
        raise ValueError(f"expected the published layout of MMaDA in {folder}, got {report}")
    model.load_state_dict(state | {f"codec.{k}": v for k, v in codec.state_dict().items()})
    return model.eval()


def load(folder: str | Path, tokenizer: str | Path | None = None, variant: Variant = "released") -> Mmada:
    """The folder of the transformer; the picture tokenizer lies there too, or in `tokenizer`, as Show-o's adapter
    reads it."""
    return assemble(folder, load_tokenizer(tokenizer or folder), variant)


def export(model: Mmada, folder: str | Path) -> None:
    """Write `model.safetensors`, without a config and without the picture tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors"
    save_file(to_theirs(model.state_dict(), rules(model.config)), temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors makes files that only their owner may read
    temporary.replace(folder / "model.safetensors")
