"""Qwen3-VL checkpoints as parts of other systems: the language model of Qwen3 (`adapters.qwen`) whose rotations mix the
axes, and a tower with a table of positions that feeds the first layers too.

    model.language_model.*, lm_head.*     the language model        model.visual.*     the tower
"""
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diptych.adapters import qwen
from diptych.adapters.keys import Rule, expand
from diptych.parts.blocks import BlockConfig
from diptych.parts.interleave import Marks
from diptych.parts.language import LanguageConfig
from diptych.parts.windows import WindowConfig
from diptych.systems.vlm import VlmConfig

# what would change the network, with the one value that is built here
FIXED = {"hidden_act": "silu", "attention_bias": False}
FIXED_VISION = {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3}
BOTH, HALF = ("weight", "bias"), (0.5, 0.5, 0.5)


def config_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `VlmConfig` from the contents of `config.json`, which does not state the ids of text marks."""
    text, vision = values["text_config"], values["vision_config"]
    rope = text["rope_scaling"]
    for group, fixed in ((text, FIXED), (vision, FIXED_VISION), (rope, {"rope_type": "default"})):
        for key, only in fixed.items():
            if group.get(key, only) != only:
                raise ValueError(f"expected {key} to be {only!r}, got {group[key]!r}")
    side = round(vision["num_position_embeddings"] ** 0.5)
    return {
        "block": BlockConfig(width=text["hidden_size"], heads=text["num_attention_heads"],
                             kv_heads=text["num_key_value_heads"], head_dim=text["head_dim"],
                             hidden=text["intermediate_size"], qkv_bias=False, qk_norm=True,
                             norm_eps=text["rms_norm_eps"]),
        "depth": text["num_hidden_layers"], "vocabulary_size": text["vocab_size"],
        "rope_theta": float(text["rope_theta"]), "rope_sections": tuple(rope["mrope_section"]),
        "rope_interleaved": bool(rope.get("mrope_interleaved", True)), "tokenizer": "", "features": "causal",
        "positions": "spatial", "tie_embeddings": bool(text.get("tie_word_embeddings", False)),
        "marks": Marks(-1, -1, values["vision_start_token_id"], values["vision_end_token_id"]),
        "vision": WindowConfig(
            width=vision["hidden_size"], hidden=vision["intermediate_size"], layers=vision["depth"],
            heads=vision["num_heads"], patch=vision["patch_size"], frames=vision["temporal_patch_size"],
            merge=vision["spatial_merge_size"], window=vision["patch_size"] * vision["spatial_merge_size"],
            full=tuple(range(vision["depth"])), out_width=vision["out_hidden_size"], mean=HALF, std=HALF,
            norm="layer", mlp="tanh", patch_bias=True, table=side, deep=tuple(vision["deepstack_visual_indexes"]))}


def rules(c: VlmConfig, prefix: str) -> list[Rule]:
    """`prefix` stands in front of the published names."""
    own = LanguageConfig(block=c.block, depth=c.depth, vocabulary_size=c.vocabulary_size,
                         tie_embeddings=c.tie_embeddings)
    out = [replace(r, theirs=tuple(_within(t, prefix) for t in r.theirs)) for r in qwen.rules(own)]
    return [*out, *tower_rules(c, f"{prefix}model.visual.")]


def _within(name: str, prefix: str) -> str:
    """The name of a plain Qwen3 where it is a part."""
    return prefix + (name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name)


def tower_rules(c: VlmConfig, theirs: str) -> list[Rule]:
    v, ours = c.vision, "vision."
    assert isinstance(v, WindowConfig)
    out = [Rule((f"{theirs}patch_embed.proj.weight",), f"{ours}patch_embedding.weight",
                shape=(v.width, 3, v.frames, v.patch, v.patch)),
           Rule((f"{theirs}patch_embed.proj.bias",), f"{ours}patch_embedding.bias"),
           Rule((f"{theirs}pos_embed.weight",), f"{ours}table", shape=(v.table**2, v.width))]
    names = {"merger.norm": "norm", "merger.linear_fc1": "merger.0", "merger.linear_fc2": "merger.2"}
    for k in range(len(v.deep)):
        for n, part in enumerate(("norm", "linear_fc1", "linear_fc2")):
            names[f"deepstack_merger_list.{k}.{part}"] = f"deep.{k}.{(0, 1, 3)[n]}"
    out += [Rule((f"{theirs}{t}.{w}",), f"{ours}{o}.{w}") for t, o in names.items() for w in BOTH]
    block, layer = f"{theirs}blocks.{{i}}.", f"{ours}layers.{{i}}."
    inner = {"norm1": "norm1", "norm2": "norm2", "attn.qkv": "qkv", "attn.proj": "out", "mlp.linear_fc1": "mlp.fc1",
             "mlp.linear_fc2": "mlp.fc2"}
    per_layer = [Rule((f"{block}{t}.{w}",), f"{layer}{o}.{w}") for t, o in inner.items() for w in BOTH]
    return out + [r for rule in per_layer for r in expand(rule, i=range(v.layers))]
