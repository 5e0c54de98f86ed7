"""MMaDA's published transformer (LLaDA with a longer vocabulary); the tokenizer of its pictures is that of Show-o,
beside it or a part of its own. Golden cases are in `mmada_cases`.

Whether a checkpoint was trained with its pads in sight is not said there: `variant` says it, "released" for those of
the authors. What their config leaves to the code (ids, the longest prompt) an export states in `_extra`.
"""
import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from diptych.adapters.keys import Rule, expand
from diptych.adapters.published import Checkpoint, Layout, Written, build, has_type, others
from diptych.adapters.show_o import (
    CONSTANT,
    PLACE,
    PREFIX,
    WHAT,
    codec_rules,
    find_tokenizer,
    tokenizer_config,
    tokenizer_values,
)
from diptych.adapters.tensors import Tensors, need_weights, read_json
from diptych.adapters.vila_u import below
from diptych.objectives.masked_token import Variant
from diptych.parts.blocks import BlockConfig
from diptych.parts.vq import VQTokenizerConfig
from diptych.systems.mmada import TURNS, Mmada, MmadaConfig, Specials

FIXED = {"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True, "alibi": False,
         "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False, "include_bias": False,
         "include_qkv_bias": False, "weight_tying": False, "block_group_size": 1, "num_new_special_tokens": 0}
NAMES = {"image_start": "<|soi|>", "image_end": "<|eoi|>", "draw": "<|t2i|>", "read": "<|mmu|>", "reason": "<|r2i|>",
         "pad": "[iPAD]"}


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


def config_of(values: Mapping[str, Any], codec: VQTokenizerConfig) -> MmadaConfig:
    """From `config.json`; what it does not say is that of the released checkpoints."""
    for key, only in FIXED.items():
        if values.get(key, only) != only:
            raise ValueError(f"expected {key} of MMaDA to be {only!r}, got {values[key]!r}")
    text, codes = values["llm_vocab_size"], values["codebook_size"]
    if values["new_vocab_size"] != text + codes or values.get("embedding_size", text + codes) != text + codes:
        raise ValueError(f"expected {text} tokens of texts, then {codes} codes, got {values['new_vocab_size']}")
    if (found := 2**tokenizer_values(codec)["codebook_dim"]) != codes:
        raise ValueError(f"expected a picture tokenizer of {codes} codes, got {found}; "
                         "fix: pass the one it was trained on")
    paper, width, heads = Mmada.paper(), values["d_model"], values["n_heads"]
    own: dict[str, Any] = {}
    if extra := values.get("_extra"):
        ids = {name: extra["special_ids"][theirs] for name, theirs in NAMES.items()}
        own = {"specials": Specials(mask=values["mask_token_id"], **ids), "ends": (extra["bos"], extra["eos"]),
               "prompt": extra["max_text_len"] + 1, "variant": extra.get("variant", paper.variant),
               "slots": extra.get("max_answer_len", paper.slots), "turns": TURNS if extra.get("chat", True) else None,
               "mark_names": tuple(extra.get("mark_names", paper.mark_names))}
    elif paper.specials.mask != values["mask_token_id"]:
        raise ValueError(f"expected [MASK] to be {paper.specials.mask}, got {values['mask_token_id']}")
    block = BlockConfig(width=width, heads=heads, kv_heads=values.get("n_kv_heads") or heads, head_dim=width // heads,
                        hidden=values["mlp_hidden_size"], qkv_bias=False, norm_eps=values["rms_norm_eps"])
    side = math.isqrt(values["num_vq_tokens"]) * codec.downsample
    return dataclasses.replace(paper, block=block, depth=values["n_layers"], rope_theta=float(values["rope_theta"]),
                               text_size=text, codec=codec, picture=(side, side), **own)


def published_config(model: Mmada) -> dict[str, Any]:
    """The `config.json` of a system."""
    c, b, about, codes = model.config, model.config.block, tokenizer_values(model.config.codec), model.values
    fits = {"turns": c.turns in (None, TURNS), "picture": c.picture[0] == c.picture[1]}
    if wrong := [name for name, fine in fits.items() if not fine]:
        raise ValueError(f"expected a config that the published layout can state, got another {', '.join(wrong)}; "
                         "fix: save it with save_system")
    size, m = c.text_size + codes, model.marks
    return FIXED | {
        "model_type": "mmada", "architectures": ["MMadaModelLM"], "d_model": b.width, "n_heads": b.heads,
        "n_kv_heads": b.kv_heads, "n_layers": c.depth, "mlp_hidden_size": b.hidden, "rope_theta": c.rope_theta,
        "rms_norm_eps": b.norm_eps, "vocab_size": size, "embedding_size": size, "eos_token_id": m.end,
        "pad_token_id": m.end, "mask_token_id": c.specials.mask, "llm_vocab_size": c.text_size, "codebook_size": codes,
        "num_vq_tokens": (c.picture[0] // model.stride)**2, "new_vocab_size": size, "tie_word_embeddings": False,
        PLACE: about,
        "_extra": {"special_ids": {theirs: getattr(c.specials, name) for name, theirs in NAMES.items()},
                   "bos": m.start, "eos": m.end, "max_text_len": c.prompt - 1, "max_answer_len": c.slots,
                   "variant": c.variant, "chat": c.turns is not None, "mark_names": list(c.mark_names)}}


# -- folders ----------------------------------------------------------------------------------------------------------

def load(folder: str | Path, tokenizer: str | Path | None = None, variant: Variant | None = None) -> Mmada:
    """A published folder as a system; the picture tokenizer lies there too, or in `tokenizer`. `variant` in place of
    the one that was read."""
    folder = Path(folder)
    found = read(folder, {} if tokenizer is None else {"tokenizer": Path(tokenizer)})
    if variant is not None:
        found = dataclasses.replace(found, config=dataclasses.replace(found.config, variant=variant))
    return cast(Mmada, build(found, folder, dtype=torch.float32)[0])


def load_transformer(folder: Path, codec: VQTokenizerConfig) -> Mmada:
    """The transformer of a folder around an untrained picture tokenizer, for use on codes alone."""
    c = config_of(read_json(folder / "config.json"), codec)
    found = Checkpoint(cls=Mmada, config=c, tensors=Tensors({"": need_weights(folder)}), rules=rules(c))
    model, report = build(found, folder, allow=("missing",), dtype=torch.float32)
    if lacking := [name for name in report.missing if not name.startswith("(ours) codec.")]:
        raise ValueError(f"expected the published layout of MMaDA in {folder}, got {len(lacking)} missing "
                         f"({lacking[0]})")
    return cast(Mmada, model)


def read(folder: Path, parts: Mapping[str, Path]) -> Checkpoint:
    values = read_json(folder / "config.json")
    codec, about, apart = find_tokenizer(folder, parts, values)
    tensors = Tensors({"": need_weights(folder), PREFIX: codec})
    config = tokenizer_config(about, below(tensors.meta(), PREFIX))
    c = config_of(values, config)
    return Checkpoint(cls=Mmada, config=c, tensors=tensors, rules=[*rules(c), *codec_rules(config)],
                      ignore=tuple(PREFIX + name for name in CONSTANT), configs=others(folder, apart), apart=apart)


def write(model: Mmada) -> Written:
    return Written(configs={"config.json": published_config(model)},
                   rules=[*rules(model.config), *codec_rules(model.config.codec)],
                   files={"model.safetensors": "", f"{PLACE}.safetensors": PREFIX})


LAYOUTS = {"original": Layout(about="config.json of model_type mmada and its weights", finds=partial(has_type, "mmada"),
                              read=read, write=write, parts={"tokenizer": WHAT})}
