"""The published UniPic2-Metaquery: a diffusers folder with `transformer/` (Stable Diffusion 3.5), `vae/`, `scheduler/`
and `conditioner/` (queries and connector), beside which Qwen2.5-VL is loaded by itself: here it stands in
`qwen2_5_vl/`, or is a part of that name.

Each subfolder holds `config.json` (`scheduler_config.json`) and safetensors; a flat folder with one `config.json` of
all parts and PART.safetensors loads too. Published times count noise and velocities point to it: the output layer is
negated. The table of places is a stored tensor.
"""
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from diptych.adapters import autoencoder_kl, qwen_vl
from diptych.adapters.keys import Rule, expand
from diptych.adapters.published import Checkpoint, Layout, Written, build, need, others
from diptych.adapters.tensors import Tensors, need_weights, read_json
from diptych.parts.dit_joint import JointDitConfig
from diptych.parts.serial import PooledConnectorConfig
from diptych.parts.vae import AutoEncoderConfig
from diptych.systems.bagel import Sides
from diptych.systems.serial import SerialConfig
from diptych.systems.unipic2 import UniPic2, sampling

LANGUAGE, SCHEDULER = "qwen2_5_vl", "scheduler"
FILES = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "conditioner": "model",
         LANGUAGE: "model"}  # weights by their folder
WHAT = "Qwen2.5-VL (Qwen/Qwen2.5-VL-7B-Instruct)"
# ids that stand for the features of a picture and of a film, which systems here do without
FEATURES = {"image_token_id": 151655, "video_token_id": 151656}
LONGEST, CELL = 512, 32  # pixels of the longer side; one token of the language model stands for so many of a side
# what would change the network or the sampler, with the one value that is built here
FIXED = {"transformer": {"qk_norm": "rms_norm"},
         "scheduler": {"use_dynamic_shifting": False, "invert_sigmas": False, "use_karras_sigmas": False}}
BOTH = ("weight", "bias")


def generator_config(values: Mapping[str, Any]) -> JointDitConfig:
    """From the config of a diffusers `SD3Transformer2DModel`."""
    heads, patch = values["num_attention_heads"], values["patch_size"]
    width, channels = heads * values["attention_head_dim"], values["in_channels"]
    outside = values["caption_projection_dim"], values.get("out_channels") or channels
    if outside != (width, channels):
        raise ValueError(f"expected caption_projection_dim {width} and out_channels {channels}, got {outside[0]} and "
                         f"{outside[1]}")
    return JointDitConfig(
        token_width=channels * patch**2, width=width, layers=values["num_layers"], heads=heads, hidden=4 * width,
        condition_width=values["joint_attention_dim"], pooled_width=values["pooled_projection_dim"],
        dual=tuple(values["dual_attention_layers"]), side=values["pos_embed_max_size"],
        span=values["sample_size"] // patch)


def connector_config(values: Mapping[str, Any], width: int, generator: JointDitConfig) -> PooledConnectorConfig:
    own = values["connector_config"]
    said = values["llm_hidden_size"], values["joint_attention_dim"], values["pooled_projection_dim"]
    wanted = width, generator.condition_width, generator.pooled_width
    if said != wanted or own.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise ValueError(f"expected a conditioner of widths {wanted} and hidden_act gelu_pytorch_tanh, got {said} "
                         f"and {own.get('hidden_act')!r}")
    return PooledConnectorConfig(layers=own["num_hidden_layers"], width=own["hidden_size"],
                                 heads=own["num_attention_heads"], hidden=own["intermediate_size"],
                                 pooled_width=values["pooled_projection_dim"])


def config_of(values: Mapping[str, Any]) -> SerialConfig:
    """From the configs of all parts, by their names."""
    for group, fixed in FIXED.items():
        for key, only in fixed.items():
            if values[group].get(key, only) != only:
                raise ValueError(f"expected {group}.{key} to be {only!r}, got {values[group][key]!r}")
    language, scheduler = qwen_vl.config_of(values[LANGUAGE]), values[SCHEDULER]
    generator = generator_config(values["transformer"])
    return SerialConfig(
        **language, positions="spread", side=LONGEST * language["vision"].stride // CELL, row=1024,
        queries=values["conditioner"]["num_queries"], opening="none", references=1, noise_steps=0,
        connector=connector_config(values["conditioner"], language["block"].width, generator),
        generator=generator, codec=autoencoder_kl.config_of(values["vae"]),
        latent_patch=values["transformer"]["patch_size"], latent_sides=Sides(shortest=LONGEST, longest=LONGEST),
        picture=(LONGEST, LONGEST), drop_text=0.1,
        sampling=sampling(scheduler["shift"], scheduler["num_train_timesteps"]))


def published_configs(c: SerialConfig) -> dict[str, dict[str, Any]]:
    """The way back."""
    g, k, patch = c.generator, c.connector, c.latent_patch
    if not isinstance(g, JointDitConfig) or not isinstance(k, PooledConnectorConfig) or not isinstance(
            c.codec, AutoEncoderConfig) or g.hidden != 4 * g.width or c.opening != "none":
        raise ValueError("expected a generator in two streams whose network is four times as wide, a pooled connector, "
                         "an autoencoder and queries without an opening, got another; fix: save it with save_system")
    channels = g.token_width // patch**2
    transformer = {
        "_class_name": "SD3Transformer2DKontextModel", "sample_size": g.span * patch, "patch_size": patch,
        "in_channels": channels, "out_channels": channels, "num_layers": g.layers, "num_attention_heads": g.heads,
        "attention_head_dim": g.width // g.heads, "joint_attention_dim": g.condition_width,
        "caption_projection_dim": g.width, "pooled_projection_dim": g.pooled_width, "pos_embed_max_size": g.side,
        "dual_attention_layers": list(g.dual), "qk_norm": "rms_norm"}
    conditioner = {
        "_class_name": "StableDiffusion3Conditioner", "num_queries": c.queries, "llm_hidden_size": c.block.width,
        "pooled_projection_dim": k.pooled_width, "joint_attention_dim": g.condition_width,
        "connector_config": {"hidden_size": k.width, "intermediate_size": k.hidden, "num_hidden_layers": k.layers,
                             "num_attention_heads": k.heads}}
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": c.sampling.shift,
                 "num_train_timesteps": levels_of(c)}
    return {"transformer": transformer, "vae": autoencoder_kl.published_config(c.codec), "conditioner": conditioner,
            LANGUAGE: qwen_vl.published_config(c) | FEATURES, SCHEDULER: scheduler}


def levels_of(c: SerialConfig) -> int:
    """How many noise levels the last time of sampling stands for."""
    if c.sampling.end is None:
        raise ValueError("expected sampling with an end, which tells the number of noise levels, got none")
    return round(c.sampling.shift / (1 - c.sampling.end) - c.sampling.shift + 1)


# -- key rules --------------------------------------------------------------------------------------------------------

def generator_rules(c: JointDitConfig, patch: int, prefix: str) -> list[Rule]:
    ours, channels = "generator.", c.token_width // patch**2
    out = [Rule((f"{prefix}pos_embed.proj.weight",), f"{ours}input.weight", op="patches",
                shape=(c.width, channels, patch, patch)),
           Rule((f"{prefix}pos_embed.proj.bias",), f"{ours}input.bias"),
           Rule((f"{prefix}pos_embed.pos_embed",), f"{ours}positions", shape=(1, c.side**2, c.width))]
    names = {"context_embedder": "condition", "norm_out.linear": "modulation"}
    for theirs, own in (("timestep_embedder", "time.mlp"), ("text_embedder", "pooled")):
        names |= {f"time_text_embed.{theirs}.linear_{n}": f"{own}.{k}" for n, k in ((1, 0), (2, 2))}
    for w in BOTH:
        out += [Rule((f"{prefix}{t}.{w}",), f"{ours}{o}.{w}") for t, o in names.items()]
        out.append(Rule((f"{prefix}proj_out.{w}",), f"{ours}output.{w}", op="negate"))
    for i in range(c.layers):
        out += _block_rules(f"{prefix}transformer_blocks.{i}.", f"{ours}blocks.{i}.", c.width, i in c.dual,
                            i == c.layers - 1)
    return out


def _block_rules(theirs: str, ours: str, width: int, dual: bool, last: bool) -> list[Rule]:
    names = {"norm1.linear": "modulation", "norm1_context.linear": "words_modulation", "attn.to_out.0": "attention.out",
             "ff.net.0.proj": "mlp.up", "ff.net.2": "mlp.down"}
    heads = [("attn.to_{}", "attention"), ("attn.add_{}_proj", "words_attention")]
    norms = [("attn.norm_{}", "attention"), ("attn.norm_added_{}", "words_attention")]
    if dual:
        names["attn2.to_out.0"] = "dual.out"
        heads.append(("attn2.to_{}", "dual"))
        norms.append(("attn2.norm_{}", "dual"))
    if not last:
        names |= {"attn.to_add_out": "words_attention.out", "ff_context.net.0.proj": "words_mlp.up",
                  "ff_context.net.2": "words_mlp.down"}
    out = [Rule((f"{theirs}{t}.{w}",), f"{ours}{o}.{w}") for t, o in names.items() for w in BOTH]
    out += [Rule(tuple(f"{theirs}{t.format(p)}.{w}" for p in "qkv"), f"{ours}{o}.qkv.{w}", (width,) * 3)
            for t, o in heads for w in BOTH]
    return out + [Rule((f"{theirs}{t.format(p)}.weight",), f"{ours}{o}.{p}_norm.weight")
                  for t, o in norms for p in "qk"]


def connector_rules(c: PooledConnectorConfig, prefix: str) -> list[Rule]:
    ours, layer = "connector_out.", "layers.{i}."
    names = {"projector_1": "input", "projector_2": "whole", "projector_3": "output"}
    out = [Rule((f"{prefix}{t}.{w}",), f"{ours}{o}.{w}") for t, o in names.items() for w in BOTH]
    inner = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")]
    return out + expand(Rule((f"{prefix}connector.{layer}{{n}}.{{w}}",), f"{ours}{layer}{{n}}.{{w}}"),
                        i=range(c.layers), n=("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *inner), w=BOTH)


def rules(c: SerialConfig) -> list[Rule]:
    """How every tensor of the parts is called here; theirs are named PART.NAME."""
    assert isinstance(c.generator, JointDitConfig) and isinstance(c.connector, PooledConnectorConfig)
    assert isinstance(c.codec, AutoEncoderConfig)
    return [*qwen_vl.rules(c, f"{LANGUAGE}.", f"{LANGUAGE}."), Rule(("conditioner.meta_queries",), "queries"),
            *connector_rules(c.connector, "conditioner."),
            *generator_rules(c.generator, c.latent_patch, "transformer."), *autoencoder_kl.rules(c.codec, "vae.")]


# -- folders ----------------------------------------------------------------------------------------------------------

def load(folder: str | Path, language: str | Path | None = None) -> UniPic2:
    """A published folder as a system; Qwen2.5-VL lies there too, or in `language`."""
    folder = Path(folder)
    parts = {} if language is None else {LANGUAGE: Path(language)}
    return cast(UniPic2, build(read(folder, parts), folder, dtype=torch.float32)[0])


def read(folder: Path, parts: Mapping[str, Path]) -> Checkpoint:
    if (folder / "config.json").is_file():
        values, homes = read_json(folder / "config.json"), dict[str, Path]()
        files = {part: need_weights(folder, (part,)) for part in FILES}
    else:
        homes = {part: folder / part for part in (*FILES, SCHEDULER)}
        homes[LANGUAGE] = need(folder, parts, LANGUAGE, WHAT)
        values = {part: _config(home / _config_name(part)) for part, home in homes.items()}
        files = {part: need_weights(homes[part]) for part in FILES}
    c = config_of(values)
    return Checkpoint(cls=UniPic2, config=c, tensors=Tensors({f"{part}.": paths for part, paths in files.items()}),
                      rules=rules(c), ignore=(f"{LANGUAGE}.lm_head.",) if c.tie_embeddings else (),
                      configs=others(folder, homes), apart=homes, own=homes.get(LANGUAGE))


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}, got no such file; fix: download the folders of the release whole")
    return read_json(path)


def _config_name(part: str) -> str:
    return "scheduler_config.json" if part == SCHEDULER else "config.json"


def write(model: UniPic2) -> Written:
    configs = {f"{part}/{_config_name(part)}": values for part, values in published_configs(model.config).items()}
    return Written(configs=configs, rules=rules(model.config), own=LANGUAGE,
                   files={f"{part}/{name}.safetensors": f"{part}." for part, name in FILES.items()})


def _finds(folder: Path) -> bool:
    whole, parts = folder / "config.json", ("transformer", "conditioner")
    if whole.is_file():
        return {*parts, SCHEDULER} <= read_json(whole).keys()
    return all((folder / part / "config.json").is_file() for part in parts)


LAYOUTS = {"original": Layout(about="the folders transformer, vae, conditioner and scheduler", finds=_finds, read=read,
                              write=write, parts={LANGUAGE: WHAT})}
