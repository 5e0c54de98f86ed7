"""The published BLIP3-o: Qwen2.5-VL (`model.*`, `visual.*`, `lm_head.weight`), `model.latent_queries`,
`model.dit.model.*` (Lumina-Next) and EVA-CLIP (`model.gen_vision_tower.*`, in the release a file of its own).

A folder holds `config.json` and `weights.safetensors`. Published times count noise and velocities point to it: the
output layer is negated. The decoder of the release is that of SDXL and no part of this: features can be drawn only.
"""
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from diptych.adapters import qwen_vl
from diptych.adapters.keys import Rule, expand
from diptych.adapters.published import Checkpoint, Layout, Written, build, has_type, others
from diptych.adapters.tensors import Tensors, need_weights, read_json
from diptych.parts.dit_gated import GatedDitConfig
from diptych.parts.feature_codec import FeatureCodecConfig
from diptych.parts.towers import TowerConfig
from diptych.parts.windows import WindowConfig
from diptych.systems.bagel import Sides
from diptych.systems.blip3_o import CLIP_MEAN, CLIP_STD, NOTHING, Blip3o
from diptych.systems.serial import SerialConfig

# what would change the network, with the one value that is built here
FIXED = {"dit": {"patch_size": 1, "learn_sigma": False, "qk_norm": True},
         "gen_vision_cfg": {"qkv_bias": True, "postnorm": True}, "noise_scheduler": {"shift": 1.0}}
BOTH = ("weight", "bias")
DIT = "model.dit.model."
TOWER = "model.gen_vision_tower.vision_tower.model."
TIME_LIMIT = 1024  # the widest time embedding


def feed_forward_width(values: Mapping[str, Any]) -> int:
    """Of the published network up to diffusers 0.32, which takes two thirds of four times the width."""
    multiple, factor = values["multiple_of"], values.get("ffn_dim_multiplier")
    inner = int(2 / 3 * 4 * values["dim"])
    inner = int(factor * inner) if factor else inner
    return multiple * -(-inner // multiple)


def config_of(values: Mapping[str, Any]) -> SerialConfig:
    """From the contents of `config.json`."""
    for group, fixed in FIXED.items():
        for key, only in fixed.items():
            if values[group].get(key, only) != only:
                raise ValueError(f"expected {group}.{key} to be {only!r}, got {values[group][key]!r}")
    dit, tower = values["dit"], values["gen_vision_cfg"]
    if dit["n_kv_heads"] not in (None, dit["n_heads"]):
        raise ValueError(f"expected as many key heads as the {dit['n_heads']} query heads, got {dit['n_kv_heads']}")
    stride = int(str(values["gen_pooling"]).rpartition("_")[2])
    side = tower["image_size"]
    return SerialConfig(
        **qwen_vl.config_of(values), positions="spread", queries=values["n_query"],
        opening=int(values["image_start_token_id"]), connector=NOTHING,
        generator=GatedDitConfig(
            token_width=dit["in_channels"], width=dit["dim"], layers=dit["n_layers"], heads=dit["n_heads"],
            hidden=values.get("dit_ffn_inner") or feed_forward_width(dit),
            condition_width=dit["latent_embedding_size"], time_width=min(dit["dim"], TIME_LIMIT),
            norm_eps=dit["norm_eps"]),
        codec=FeatureCodecConfig(
            tower=TowerConfig(width=tower["width"], mlp_width=int(tower["width"] * tower["mlp_ratio"]),
                              layers=tower["layers"], heads=tower["width"] // tower["head_width"],
                              patch=tower["patch_size"], side=side // tower["patch_size"], gelu="exact",
                              class_token=True, norm_behind=True),
            pool=stride, mean=CLIP_MEAN, std=CLIP_STD),
        latent_sides=Sides(shortest=side, longest=side), picture=(side, side), null="zeros", drop_condition=0.1,
        noise_steps=values["noise_scheduler"]["num_train_timesteps"], whole_steps=True,
        sampling=Blip3o.paper().sampling)


def generator_rules(c: GatedDitConfig, prefix: str) -> list[Rule]:
    embed, ours = f"{prefix}time_caption_embed.", "generator."
    names = {f"{prefix}patch_embedder.proj": "input", f"{prefix}caption_projection.linear_1": "condition.0",
             f"{prefix}caption_projection.linear_2": "condition.2", f"{embed}timestep_embedder.linear_1": "time.mlp.0",
             f"{embed}timestep_embedder.linear_2": "time.mlp.2", f"{embed}caption_embedder.0": "mean.0",
             f"{embed}caption_embedder.1": "mean.1", f"{prefix}norm_out.linear_1": "scale"}
    out = [Rule((f"{t}.{w}",), f"{ours}{o}.{w}") for t, o in names.items() for w in BOTH]
    out += [Rule((f"{prefix}norm_out.linear_2.{w}",), f"{ours}output.{w}", op="negate") for w in BOTH]
    theirs, block = f"{prefix}layers.{{i}}.", f"{ours}blocks.{{i}}."
    single = {"norm1.norm": "norm1", "norm2": "norm2", "ffn_norm1": "mlp_norm1", "ffn_norm2": "mlp_norm2",
              "norm1_context": "condition_norm", "attn2.to_out.0": "out", "feed_forward.linear_2": "mlp.down"}
    single |= {f"{a}.to_{p}": f"{o}.{p}" for a, o in (("attn1", "own"), ("attn2", "cross")) for p in "qkv"}
    double = {"norm1.linear": "modulation"}
    double |= {f"{a}.norm_{p}": f"{o}.{p}_norm" for a, o in (("attn1", "own"), ("attn2", "cross")) for p in "qk"}
    per_block = [Rule((f"{theirs}{t}.weight",), f"{block}{o}.weight") for t, o in single.items()]
    per_block += [Rule((f"{theirs}{t}.{w}",), f"{block}{o}.{w}") for t, o in double.items() for w in BOTH]
    per_block += [Rule((f"{theirs}gate",), f"{block}gate"),
                  Rule(tuple(f"{theirs}feed_forward.linear_{n}.weight" for n in (1, 3)), f"{block}mlp.gate_up.weight",
                       (c.hidden,) * 2)]
    return out + [r for rule in per_block for r in expand(rule, i=range(c.layers))]


def tower_rules(c: TowerConfig, prefix: str) -> list[Rule]:
    ours, rows = "codec.tower.", c.side**2 + 1
    out = [Rule((f"{prefix}patch_embed.proj.{w}",), f"{ours}patch_embedding.{w}") for w in BOTH]
    out += [Rule((f"{prefix}cls_token",), f"{ours}class_token", shape=(1, 1, c.width)),
            Rule((f"{prefix}pos_embed",), f"{ours}positions", shape=(1, rows, c.width))]
    block, layer = f"{prefix}blocks.{{i}}.", f"{ours}layers.{{i}}."
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1",
             "mlp.fc2": "mlp.fc2"}
    per_layer = [Rule((f"{block}{t}.{w}",), f"{layer}{o}.{w}") for t, o in names.items() for w in BOTH]
    per_layer += [Rule((f"{block}attn.qkv.{w}",), f"{layer}self_attn.{p}_proj.{w}", part=(k, 3))
                  for w in BOTH for k, p in enumerate("qkv")]
    return out + [r for rule in per_layer for r in expand(rule, i=range(c.layers))]


def rules(c: SerialConfig) -> list[Rule]:
    """How every tensor of the file is called here."""
    assert isinstance(c.codec, FeatureCodecConfig) and isinstance(c.codec.tower, TowerConfig)
    assert isinstance(c.generator, GatedDitConfig)
    queries = Rule(("model.latent_queries",), "queries", shape=(1, c.queries, c.block.width))
    return [*qwen_vl.rules(c, "", ""), queries, *generator_rules(c.generator, DIT),
            *tower_rules(c.codec.tower, TOWER)]


def load(folder: str | Path) -> Blip3o:
    """A published folder as a system; any tensor that finds no home is an error."""
    folder = Path(folder)
    return cast(Blip3o, build(read(folder, {}), folder, dtype=torch.float32)[0])


def read(folder: Path, parts: Mapping[str, Path]) -> Checkpoint:
    values, tensors = read_json(folder / "config.json"), Tensors({"": need_weights(folder)})
    c = config_of(values if "dit" in values else released(values, tensors))
    return Checkpoint(cls=Blip3o, config=c, tensors=tensors, rules=rules(c),
                      ignore=("lm_head.",) if c.tie_embeddings else (), configs=others(folder))


def released(values: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The config of a release with what its code states instead: the generator, as its tensors have it, and EVA-CLIP,
    which the config only names."""
    paper, shapes = Blip3o.paper(), {name: value.shape for name, value in tensors.meta().items()}
    tower, generator = getattr(paper.codec, "tower", None), paper.generator
    assert isinstance(tower, TowerConfig) and isinstance(generator, GatedDitConfig)
    width, channels = shapes[f"{DIT}patch_embedder.proj.weight"]
    start = f"{DIT}layers."
    layers = {name.removeprefix(start).split(".")[0] for name in shapes if name.startswith(start)}
    dit = {"patch_size": 1, "in_channels": channels, "dim": width, "n_layers": len(layers), "n_heads": generator.heads,
           "n_kv_heads": None, "norm_eps": generator.norm_eps,
           "latent_embedding_size": shapes[f"{DIT}caption_projection.linear_1.weight"][1]}
    eva = {"image_size": tower.side * tower.patch, "layers": tower.layers, "width": tower.width,
           "head_width": tower.width // tower.heads, "mlp_ratio": tower.mlp_width / tower.width,
           "patch_size": tower.patch, "qkv_bias": True, "postnorm": True}
    return {"image_start_token_id": paper.opening, "noise_scheduler": {"num_train_timesteps": 1000}, **values,
            "dit": dit, "gen_vision_cfg": eva,
            "dit_ffn_inner": shapes[f"{DIT}layers.0.feed_forward.linear_1.weight"][0]}


def write(model: Blip3o) -> Written:
    c, d, codec = model.config, model.config.generator, model.config.codec
    tower = getattr(codec, "tower", None)
    fits = {"generator": isinstance(d, GatedDitConfig) and not d.side, "objective": c.objective == "flow",
            "codec": isinstance(tower, TowerConfig) and tower.class_token and tower.norm_behind,
            "vision": isinstance(c.vision, WindowConfig), "opening": isinstance(c.opening, int),
            "connector": c.connector == NOTHING}
    if wrong := [name for name, fine in fits.items() if not fine]:
        raise ValueError(f"expected a config that the published layout can state, got another {', '.join(wrong)}; "
                         "fix: save it with save_system")
    assert isinstance(d, GatedDitConfig) and isinstance(codec, FeatureCodecConfig) and isinstance(tower, TowerConfig)
    values = qwen_vl.published_config(c) | {
        "model_type": "blip3o_qwen", "n_query": c.queries, "gen_pooling": f"early_pool2d_{codec.pool}",
        "image_start_token_id": c.opening, "noise_scheduler": {"num_train_timesteps": c.noise_steps, "shift": 1.0},
        "dit": {"patch_size": 1, "in_channels": d.token_width, "dim": d.width, "n_layers": d.layers, "n_heads": d.heads,
                "n_kv_heads": None, "norm_eps": d.norm_eps, "latent_embedding_size": d.condition_width,
                "learn_sigma": False, "qk_norm": True},
        "dit_ffn_inner": d.hidden,
        "gen_vision_cfg": {"image_size": tower.side * tower.patch, "layers": tower.layers, "width": tower.width,
                           "head_width": tower.width // tower.heads, "mlp_ratio": tower.mlp_width / tower.width,
                           "patch_size": tower.patch, "qkv_bias": True, "postnorm": True}}
    return Written(configs={"config.json": values}, rules=rules(c), files={"model.safetensors": ""})


LAYOUTS = {"original": Layout(about="config.json of model_type blip3o_qwen, and its weights with those of EVA-CLIP",
                              finds=partial(has_type, "blip3o_qwen"), read=read, write=write)}
