"""VARGPT-v1.1's published layout: a Qwen2-VL (`model`, `visual`, `lm_head`), Infinity's transformer (`vargpt_gen`) and
tokenizer (`vae_local`), and what connects them. Golden cases are in `vargpt_cases`.

Published but never used, and left out here: the norms `ln_q` in front of both projectors, the text projection of the
transformer, and all rows of `sos_embedding` but the one of the token that opens a picture.
"""
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters import infinity, qwen, scales
from diptych.adapters.keys import Rule, expand
from diptych.adapters.tokenizers import place
from diptych.adapters.vila_u import below
from diptych.parts.blocks import BlockConfig
from diptych.parts.interleave import Marks
from diptych.parts.language import LanguageConfig
from diptych.parts.vq import VQTokenizerConfig
from diptych.parts.windows import WindowConfig
from diptych.systems.vargpt import Vargpt, VargptConfig

CODEC, DECODER = "vae_local.", "vargpt_gen."
UNUSED = ("image_gen_projector.ln_q.", "image_gen_projector_out.ln_q.", f"{DECODER}text_proj_for_ca.",
          *(CODEC + name for name in infinity.CONSTANT))
SOS = "sos_embedding.weight"
# what would change the language model, with the one value that is built here
FIXED = {"hidden_act": "silu", "use_sliding_window": False}
FIXED_VISION = {"hidden_act": "quick_gelu", "in_channels": 3}
TOKENS = ("image_gen_start_token_id", "image_gen_end_token_id", "image_gen_pad_token_id")


def tower_config(values: Mapping[str, Any]) -> WindowConfig:
    """From the `vision_config` of a Qwen2-VL: every layer sees the whole picture."""
    for key, only in FIXED_VISION.items():
        if values.get(key, only) != only:
            raise ValueError(f"expected {key} of the tower to be {only!r}, got {values[key]!r}")
    stride = values["patch_size"] * values["spatial_merge_size"]
    return WindowConfig(width=values["embed_dim"], hidden=int(values["embed_dim"] * values["mlp_ratio"]),
                        layers=values["depth"], heads=values["num_heads"], patch=values["patch_size"],
                        frames=values["temporal_patch_size"], merge=values["spatial_merge_size"], window=stride,
                        full=tuple(range(values["depth"])), out_width=values["hidden_size"], norm="layer", mlp="quick")


def config_of(values: Mapping[str, Any], codec: VQTokenizerConfig, levels: int, pool_heads: int) -> VargptConfig:
    """From `config.json` (sections `llm`, `vargpt_gen` and `schedule`). The number of levels and the heads of the pool
    are those of the tensors."""
    llm, gen = values["llm"], values["vargpt_gen"]
    for key, only in FIXED.items():
        if llm.get(key, only) != only:
            raise ValueError(f"expected {key} to be {only!r}, got {llm[key]!r}")
    heads, ids = llm["num_attention_heads"], llm["special_tokens"]
    decoder = infinity.decoder_config({"infinity": gen, "schedule": values["schedule"]}, codec, levels)
    paper, finest = Vargpt.paper(), decoder.scales[-1]
    return replace(
        paper, block=BlockConfig(width=llm["hidden_size"], heads=heads, kv_heads=llm["num_key_value_heads"],
                                 head_dim=llm["hidden_size"] // heads, hidden=llm["intermediate_size"],
                                 norm_eps=llm["rms_norm_eps"]),
        depth=llm["num_hidden_layers"], vocabulary_size=llm["vocab_size"], rope_theta=float(llm["rope_theta"]),
        rope_sections=tuple(llm["rope_scaling"]["mrope_section"]), tie_embeddings=llm["tie_word_embeddings"],
        marks=Marks(-1, -1, llm["vision_start_token_id"], llm["vision_end_token_id"]),
        vision=tower_config(llm["vision_config"]), decoder=decoder, codec=codec,
        picture=(finest[0] * codec.downsample, finest[1] * codec.downsample), drawing=(ids[TOKENS[0]], ids[TOKENS[1]]),
        slot_multiple=gen["pad_to_multiplier"] or 1, pool_heads=pool_heads, null_rows=gen["text_maxlen"],
        image_weight=values["lambda_bits"])


def rules(c: VargptConfig, blocks: Sequence[str]) -> list[Rule]:
    """`blocks`: the published names of the transformer's blocks."""
    both = scales.BOTH
    out = qwen.rules(LanguageConfig(block=c.block, depth=c.depth, vocabulary_size=c.vocabulary_size,
                                    tie_embeddings=c.tie_embeddings))
    out += _tower_rules(c)
    out += [replace(r, theirs=tuple(CODEC + t for t in r.theirs), ours="codec." + r.ours)
            for r in infinity.tokenizer_rules(c.codec)]
    out += infinity.condition_rules(c.decoder.width, c.pool_heads, prefix=DECODER, ours="told.", project=False)
    out += scales.decoder_rules(c.decoder, blocks, "sa", prefix=DECODER)
    for theirs, ours in (("image_gen_projector", "to_language"), ("image_gen_projector_out", "from_language")):
        out += expand(Rule((f"{theirs}.mlp.{{n}}.{{w}}",), f"{ours}.{{n}}.{{w}}"), n=(0, 2), w=both)
    return [*out, Rule((SOS,), "start")]


def _tower_rules(c: VargptConfig) -> list[Rule]:
    v, both = c.vision, scales.BOTH
    assert isinstance(v, WindowConfig)
    homes = {"norm1": "norm1", "norm2": "norm2", "attn.qkv": "qkv", "attn.proj": "out", "mlp.fc1": "mlp.fc1",
             "mlp.fc2": "mlp.fc2"}
    out = [Rule(("visual.patch_embed.proj.weight",), "vision.patch_embedding.weight",
                shape=(v.width, 3, v.frames, v.patch, v.patch))]
    for theirs, ours in (("ln_q", "norm"), ("mlp.0", "merger.0"), ("mlp.2", "merger.2")):
        out += expand(Rule((f"visual.merger.{theirs}.{{w}}",), f"vision.{ours}.{{w}}"), w=both)
    per_layer = [Rule((f"visual.blocks.{{i}}.{theirs}.{{w}}",), f"vision.layers.{{i}}.{ours}.{{w}}")
                 for theirs, ours in homes.items()]
    return out + [r for rule in per_layer for r in expand(rule, i=range(v.layers), w=both)]


def in_our_order(theirs: Mapping[str, Tensor], c: VargptConfig) -> dict[str, Tensor]:
    """Published tensors with the channels of the transformer's heads as ours, and the one row of `sos_embedding`."""
    out = scales.halves(theirs, c.decoder.heads, "sa")
    if SOS in out:
        assert c.drawing is not None
        out[SOS] = out[SOS][c.drawing[0]]
    return out


def load(folder: str | Path) -> Vargpt:
    """A folder with `config.json` and `weights.safetensors`."""
    folder = Path(folder)
    values, theirs = json.loads((folder / "config.json").read_text()), load_file(folder / "weights.safetensors")
    codec = infinity.tokenizer_config(values, below(theirs, CODEC))
    pool = theirs[f"{DECODER}text_proj_for_sos.ca.mat_q"]
    c = config_of(values, codec, len(theirs[f"{DECODER}lvl_embed.weight"]), pool.shape[1])
    with torch.device("meta"):
        model = Vargpt(c)
    model.to_empty(device="cpu")
    place(model, in_our_order(theirs, c), rules(c, infinity.block_names(below(theirs, DECODER))), folder,
          (*UNUSED, *scales.constants(theirs)))
    return model.eval()
