"""Qwen2.5-VL checkpoints as parts of other systems: a language model (`adapters.qwen`) with its tower of windows.

    model.*, lm_head.*     the language model        visual.*     the tower, which merges patches itself
"""
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from diptych.adapters import qwen
from diptych.adapters.keys import Rule, expand
from diptych.parts.blocks import BlockConfig
from diptych.parts.interleave import Marks, Writer
from diptych.parts.language import LanguageConfig
from diptych.parts.windows import WindowConfig
from diptych.systems.serial import SerialConfig
from diptych.systems.vlm import Vlm, VlmConfig
from diptych.systems.works import Reader

# what would change the network, with the one value that is built here
FIXED = {"hidden_act": "silu", "use_sliding_window": False}
FIXED_VISION = {"hidden_act": "silu", "in_channels": 3}


def config_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `VlmConfig` from the contents of `config.json`, which does not state the ids of text marks."""
    vision, rope = values["vision_config"], values["rope_scaling"]
    for group, fixed in ((values, FIXED), (vision, FIXED_VISION)):
        for key, only in fixed.items():
            if group.get(key, only) != only:
                raise ValueError(f"expected {key} to be {only!r}, got {group[key]!r}")
    heads = values["num_attention_heads"]
    return {
        "block": BlockConfig(width=values["hidden_size"], heads=heads, kv_heads=values["num_key_value_heads"],
                             head_dim=values["hidden_size"] // heads, hidden=values["intermediate_size"],
                             norm_eps=values["rms_norm_eps"]),
        "depth": values["num_hidden_layers"], "vocabulary_size": values["vocab_size"],
        "rope_theta": float(values["rope_theta"]), "rope_sections": tuple(rope["mrope_section"]), "tokenizer": "",
        "tie_embeddings": values["tie_word_embeddings"], "features": "causal",
        "marks": Marks(-1, -1, values["vision_start_token_id"], values["vision_end_token_id"]),
        "vision": WindowConfig(
            width=vision["hidden_size"], hidden=vision["intermediate_size"], layers=vision["depth"],
            heads=vision["num_heads"], patch=vision["patch_size"], frames=vision["temporal_patch_size"],
            merge=vision["spatial_merge_size"], window=vision["window_size"],
            full=tuple(vision["fullatt_block_indexes"]), out_width=vision["out_hidden_size"])}


def published_config(c: VlmConfig) -> dict[str, Any]:
    """The way back, but for the ids that stand for the features of pictures, which systems here do without."""
    b, v, marks = c.block, c.vision, c.marks
    own = isinstance(v, WindowConfig) and (v.norm, v.mlp, v.patch_bias, v.table, v.deep) == ("rms", "swiglu", False,
                                                                                         0, ())
    if not own or not b.llama_like or not b.qkv_bias or b.qk_norm or b.heads * b.head_dim != b.width or marks is None:
        raise ValueError("expected the block and the tower of a Qwen2.5-VL with its marks, got another; "
                         "fix: save it with save_system")
    assert isinstance(v, WindowConfig)
    return {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "vocab_size": c.vocabulary_size, "hidden_size": b.width, "intermediate_size": b.hidden,
            "num_hidden_layers": c.depth, "num_attention_heads": b.heads, "num_key_value_heads": b.kv_heads,
            "rms_norm_eps": b.norm_eps, "rope_theta": c.rope_theta, "tie_word_embeddings": c.tie_embeddings,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": list(c.rope_sections or ())},
            "vision_start_token_id": marks.image_start, "vision_end_token_id": marks.image_end, **FIXED,
            "vision_config": {"depth": v.layers, "hidden_size": v.width, "intermediate_size": v.hidden,
                              "num_heads": v.heads, "patch_size": v.patch, "temporal_patch_size": v.frames,
                              "spatial_merge_size": v.merge, "window_size": v.window,
                              "fullatt_block_indexes": list(v.full), "out_hidden_size": v.out_width, **FIXED_VISION}}


def rules(c: SerialConfig, language: str, visual: str) -> list[Rule]:
    """`language` and `visual` stand in front of the published names."""
    v = c.vision
    assert isinstance(v, WindowConfig)
    own = LanguageConfig(block=c.block, depth=c.depth, vocabulary_size=c.vocabulary_size,
                         tie_embeddings=c.tie_embeddings)
    out = [replace(r, theirs=tuple(language + t for t in r.theirs)) for r in qwen.rules(own)]
    theirs, ours, both = f"{visual}visual.", "vision.", ("weight", "bias")
    patch = (v.width, 3, v.frames, v.patch, v.patch)
    out.append(Rule((f"{theirs}patch_embed.proj.weight",), f"{ours}patch_embedding.weight", shape=patch))
    out.append(Rule((f"{theirs}merger.ln_q.weight",), f"{ours}norm.weight"))
    out += expand(Rule((f"{theirs}merger.mlp.{{n}}.{{w}}",), f"{ours}merger.{{n}}.{{w}}"), n=(0, 2), w=both)
    block, layer = f"{theirs}blocks.{{i}}.", f"{ours}layers.{{i}}."
    per_layer = [*(Rule((f"{block}norm{n}.weight",), f"{layer}norm{n}.weight") for n in (1, 2))]
    for w in both:
        per_layer += [Rule((f"{block}attn.qkv.{w}",), f"{layer}qkv.{w}"),
                      Rule((f"{block}attn.proj.{w}",), f"{layer}out.{w}"),
                      Rule(tuple(f"{block}mlp.{n}_proj.{w}" for n in ("gate", "up")), f"{layer}mlp.gate_up.{w}",
                           (v.hidden,) * 2),
                      Rule((f"{block}mlp.down_proj.{w}",), f"{layer}mlp.down.{w}")]
    return out + [r for rule in per_layer for r in expand(rule, i=range(v.layers))]


def count_pictures(model: Vlm, ids: Sequence[int], picture: int) -> int:
    """How many pictures stand among published ids."""
    return sum(a == model.marks.image_start and b == picture for a, b in pairwise(ids))


def write(model: Vlm, ids: Sequence[int], picture: int, grids: Sequence[tuple[int, int]]) -> Writer:
    """A published sequence of ids as the system writes it: texts, and between the image marks the features of pictures
    with these grids of patches, in order. Ids `picture` stand for features."""
    w, marks = model.writer(Reader()), model.marks
    assert isinstance(model.config.vision, WindowConfig)
    merge, left, text, place = model.config.vision.merge, list(grids), list[int](), 0
    while place < len(ids):
        if ids[place] != marks.image_start or ids[place + 1] != picture:
            text.append(ids[place])
            place += 1
            continue
        rows, columns = (n // merge for n in left.pop(0))
        w.text(text, open=False, close=False)
        w.feature(0, rows * columns, grid=(rows, columns))
        text, place = [], place + rows * columns + 2  # the marks are written with the picture
    w.text(text, open=False, close=False)
    if left:
        raise ValueError(f"expected a picture in the ids for each of {len(grids)} grids, got {len(left)} without")
    return w
