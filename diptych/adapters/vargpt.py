"""VARGPT-v1.1's published layout: a Qwen2-VL (`model`, `visual`, `lm_head`), Infinity's transformer (`vargpt_gen`) and
tokenizer (`vae_local`), and what connects them. Golden cases are in `vargpt_cases`.

Published but never used, and left out here: the norms `ln_q` in front of both projectors, the text projection of the
transformer, and all rows of `sos_embedding` but the one of the token that opens a picture.
"""
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from diptych.adapters import infinity, qwen, scales
from diptych.adapters.keys import Rule, expand
from diptych.adapters.published import Checkpoint, Layout, Written, build, has_type, others
from diptych.adapters.tensors import Tensors, need_weights, read_json
from diptych.adapters.vila_u import below
from diptych.parts.blocks import BlockConfig
from diptych.parts.interleave import Marks
from diptych.parts.language import LanguageConfig
from diptych.parts.vq import VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.parts.windows import WindowConfig
from diptych.systems.vargpt import Vargpt, VargptConfig

CODEC, DECODER = "vae_local.", "vargpt_gen."
UNUSED = ("image_gen_projector.ln_q.", "image_gen_projector_out.ln_q.", f"{DECODER}text_proj_for_ca.",
          *(CODEC + name for name in infinity.CONSTANT))
SOS, TYPE = "sos_embedding.weight", "vargpt_qwen2_vl"
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
    assert c.drawing is not None
    return [*out, Rule((SOS,), "start", row=c.drawing[0])]


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


def load(folder: str | Path) -> Vargpt:
    """A published folder as a system; any tensor that finds no home is an error."""
    folder = Path(folder)
    return cast(Vargpt, build(read(folder, {}), folder, dtype=torch.float32)[0])


def read(folder: Path, parts: Mapping[str, Path]) -> Checkpoint:
    values, tensors = read_json(folder / "config.json"), Tensors({"": need_weights(folder)})
    values = values if "llm" in values else released(values, tensors)
    meta = tensors.meta()
    decoder = below(meta, DECODER)
    pool = decoder["text_proj_for_sos.ca.mat_q"]
    c = config_of(values, infinity.tokenizer_config(values, below(meta, CODEC)), len(decoder["lvl_embed.weight"]),
                  pool.shape[1])
    return Checkpoint(cls=Vargpt, config=c, tensors=tensors, rules=rules(c, infinity.block_names(decoder)),
                      ignore=(*UNUSED, *scales.constants(tensors)), configs=others(folder))


def released(values: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The config of a release in sections, with what its code states instead."""
    paper, shapes = Vargpt.paper(), {name: value.shape for name, value in tensors.meta().items()}
    width = shapes[f"{DECODER}pos_start"][-1]
    hidden = next(shape[0] for name, shape in shapes.items() if name.startswith(DECODER) and "ffn.fc1.weight" in name)
    depth = sum(name.startswith(DECODER) and name.endswith("ffn.fc1.weight") for name in shapes)
    gen = {"embed_dim": width, "depth": depth, "num_heads": paper.decoder.heads, "mlp_ratio": hidden / width,
           "shared_aln": f"{DECODER}shared_ada_lin.1.weight" in shapes, "pad_to_multiplier": paper.slot_multiple,
           "text_maxlen": shapes[f"{DECODER}cfg_uncond"][0]}
    encoder = paper.codec.encoder
    assert isinstance(encoder, PyramidConfig)
    return {"llm": values, "vae": {"codebook_dim": paper.codec.quantizer.width, "base_ch": encoder.channels},
            "vargpt_gen": gen, "schedule": [[1, *grid] for grid in paper.decoder.scales],
            "lambda_bits": paper.image_weight}


def write(model: Vargpt) -> Written:
    c = model.config
    b, v, d, encoder = c.block, c.vision, c.decoder, c.codec.encoder
    fits = {"vision": isinstance(v, WindowConfig) and v.norm == "layer" and v.mlp == "quick", "drawing": c.drawing,
            "decoder": d.positions == "rotary" and d.memory and d.rotary_scales, "features": c.features == "causal",
            "codec": isinstance(encoder, PyramidConfig) and not c.codec.in_kernel and c.codec.patch == 1}
    if wrong := [name for name, fine in fits.items() if not fine]:
        raise ValueError(f"expected a config that the published layout can state, got another {', '.join(wrong)}; "
                         "fix: save it with save_system")
    assert isinstance(v, WindowConfig) and isinstance(encoder, PyramidConfig) and c.drawing is not None
    vision = {"depth": v.layers, "embed_dim": v.width, "hidden_size": v.out_width, "hidden_act": "quick_gelu",
              "mlp_ratio": v.hidden / v.width, "num_heads": v.heads, "in_channels": 3, "patch_size": v.patch,
              "spatial_merge_size": v.merge, "temporal_patch_size": v.frames}
    llm = {"vocab_size": c.vocabulary_size, "hidden_size": b.width, "intermediate_size": b.hidden,
           "num_hidden_layers": c.depth, "num_attention_heads": b.heads, "num_key_value_heads": b.kv_heads,
           "rms_norm_eps": b.norm_eps, "rope_theta": c.rope_theta, "tie_word_embeddings": c.tie_embeddings,
           "rope_scaling": {"type": "mrope", "mrope_section": list(c.rope_sections or ())}, "vision_config": vision,
           "vision_start_token_id": model.marks.image_start, "vision_end_token_id": model.marks.image_end,
           "special_tokens": {TOKENS[0]: c.drawing[0], TOKENS[1]: c.drawing[1]}}
    gen = {"embed_dim": d.width, "depth": d.layers, "num_heads": d.heads, "mlp_ratio": d.hidden / d.width,
           "shared_aln": d.shared, "pad_to_multiplier": c.slot_multiple, "text_maxlen": c.null_rows,
           "norm_eps": d.norm_eps, "block_chunks": 1}
    values = {"model_type": TYPE, "llm": llm, "vargpt_gen": gen, "lambda_bits": c.image_weight,
              "vae": {"codebook_dim": c.codec.quantizer.width, "base_ch": encoder.channels},
              "schedule": [[1, *grid] for grid in d.scales]}
    blocks = [f"block_chunks.0.module.{i}." for i in range(d.layers)]
    return Written(configs={"config.json": values}, rules=rules(c, blocks), files={"model.safetensors": ""})


def _finds(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and (has_type(TYPE, folder) or "vargpt_gen" in read_json(path))


LAYOUTS = {"original": Layout(about=f"config.json of model_type {TYPE}, and its weights", finds=_finds, read=read,
                              write=write)}
