"""MetaQuery as its trainer saves it: `model.mllm_backbone.*` (Qwen2.5-VL without an output matrix),
`model.connector.*`, `model.transformer.*` (SANA), `vae.*` (DC-AE). No official weights exist.

A folder holds `config.json` (`metaquery`, `qwen2_5_vl`, `transformer`, `vae`, `noise_scheduler`, `scheduler`) and
`weights.safetensors`. Published times count noise and velocities point to it: the output layer is negated. Queries are
rows of the vocabulary there: opening, end, then the queries; what the end says is seen by nothing and left out.
"""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from diptych.adapters import qwen_vl
from diptych.adapters.keys import Rule, expand, to_ours
from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.deep_codec import DeepCodecConfig
from diptych.parts.dit import DitConfig
from diptych.parts.serial import ConnectorConfig
from diptych.systems.bagel import Sides
from diptych.systems.base import Sampling
from diptych.systems.metaquery import MetaQuery
from diptych.systems.serial import SerialConfig

BACKBONE, EMBEDDING = "model.mllm_backbone.", "model.mllm_backbone.model.embed_tokens.weight"
# what would change the network or the sampler, with the one value that is built here
FIXED = {"metaquery": {"loss_type": "flow"},
         "transformer": {"attention_bias": False, "interpolation_scale": None, "norm_elementwise_affine": False},
         "vae": {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "in_channels": 3},
         "noise_scheduler": {"shift": 1.0},
         "scheduler": {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
                       "prediction_type": "flow_prediction", "use_flow_sigmas": True, "final_sigmas_type": "zero",
                       "lower_order_final": True}}
BOTH = ("weight", "bias")


def codec_config(values: Mapping[str, Any]) -> DeepCodecConfig:
    """From the config of a diffusers `AutoencoderDC`."""
    def scales(side: str) -> tuple[tuple[int, ...] | None, ...]:
        kinds, sizes = values[f"{side}_block_types"], values[f"{side}_qkv_multiscales"]
        kinds = [kinds] * len(sizes) if isinstance(kinds, str) else kinds
        return tuple(tuple(s) if k == "EfficientViTBlock" else None for k, s in zip(kinds, sizes, strict=True))

    if values["encoder_block_out_channels"] != values["decoder_block_out_channels"]:
        raise ValueError("expected the same channels in encoder and decoder, got others; fix: choose another codec")
    return DeepCodecConfig(
        channels=tuple(values["encoder_block_out_channels"]), latent_channels=values["latent_channels"],
        encoder_blocks=tuple(values["encoder_layers_per_block"]), encoder_scales=scales("encoder"),
        decoder_blocks=tuple(values["decoder_layers_per_block"]), decoder_scales=scales("decoder"),
        head_dim=values["attention_head_dim"], scale=values["scaling_factor"],
        rearrange_down=values["downsample_block_type"] == "pixel_unshuffle",
        rearrange_up=values["upsample_block_type"] == "pixel_shuffle")


def generator_config(values: Mapping[str, Any]) -> DitConfig:
    """From the config of a diffusers `SanaTransformer2DModel`."""
    width = values["num_attention_heads"] * values["attention_head_dim"]
    if values["cross_attention_dim"] != width or values["in_channels"] != values["out_channels"]:
        raise ValueError(f"expected cross_attention_dim {width} and as many channels out as in, got "
                         f"{values['cross_attention_dim']} and {values['in_channels']}, {values['out_channels']}")
    return DitConfig(token_width=values["in_channels"] * values["patch_size"] ** 2, width=width,
                     layers=values["num_layers"], heads=values["num_attention_heads"],
                     hidden=int(values["mlp_ratio"] * width), condition_width=values["caption_channels"],
                     cross_heads=values["num_cross_attention_heads"], norm_eps=values["norm_eps"])


def config_of(values: Mapping[str, Any]) -> SerialConfig:
    """From the contents of `config.json`."""
    for group, fixed in FIXED.items():
        for key, only in fixed.items():
            if values[group].get(key, only) != only:
                raise ValueError(f"expected {group}.{key} to be {only!r}, got {values[group][key]!r}")
    own, scheduler, codec = values["metaquery"], values["scheduler"], codec_config(values["vae"])
    side = own["input_size"] * codec.downsample
    language = {**qwen_vl.config_of(values["qwen2_5_vl"]), "tie_embeddings": True}  # no output matrix is saved
    steps = values["noise_scheduler"]["num_train_timesteps"]
    return SerialConfig(
        **language, positions="spatial", queries=own["num_metaqueries"],
        connector=ConnectorConfig(layers=own["connector_num_hidden_layers"],
                                  head_dim=own.get("connector_head_dim", 64)),
        generator=generator_config(values["transformer"]), codec=codec,
        latent_patch=values["transformer"]["patch_size"],
        latent_sides=Sides(shortest=side, longest=side), picture=(side, side), drop_text=0.1, drop_feature=0.1,
        noise_steps=steps, whole_steps=True,
        sampling=Sampling(evaluations=30, shift=scheduler["flow_shift"], solver="multistep",
                          start=1 / scheduler["num_train_timesteps"],
                          guidance=Guidance(branches=(Branch(context="no_text", scale=3.0),))))


def codec_rules(c: DeepCodecConfig, prefix: str) -> list[Rule]:
    out = expand(Rule((prefix + "{s}.conv_{n}.{w}",), "codec.{s}.conv_{n}.{w}"), s=("encoder", "decoder"),
                 n=("in", "out"), w=BOTH)
    out += expand(Rule((prefix + "decoder.norm_out.{w}",), "codec.decoder.norm_out.{w}"), w=BOTH)
    for side, blocks, scales, name in (("encoder", c.encoder_blocks, c.encoder_scales, "down_blocks"),
                                       ("decoder", c.decoder_blocks, c.decoder_scales, "up_blocks")):
        last = len(c.channels) - 1
        for i, (count, kernel) in enumerate(zip(blocks, scales, strict=True)):
            first = int(side == "decoder" and i < last)  # the decoder begins a level by doubling its sides
            resize = 0 if side == "decoder" else count
            theirs, ours = f"{prefix}{side}.{name}.{i}.", f"codec.{side}.levels.{i}."
            if i < last:
                out += expand(Rule((f"{theirs}{resize}.conv.{{w}}",), f"{ours}{resize}.conv.{{w}}"), w=BOTH)
            for j in range(first, first + count):
                out += _block_rules(c, f"{theirs}{j}.", f"{ours}{j}.", c.channels[i], kernel)
    return out


def _block_rules(c: DeepCodecConfig, theirs: str, ours: str, channels: int, kernel: tuple[int, ...] | None
                 ) -> list[Rule]:
    if kernel is None:
        return [Rule((f"{theirs}conv2.weight",), f"{ours}conv2.weight"),
                *expand(Rule((theirs + "{n}.{w}",), ours + "{n}.{w}"), n=("conv1", "norm"), w=BOTH)]
    inner = channels // c.head_dim * c.head_dim
    out = [Rule(tuple(f"{theirs}attn.to_{p}.weight" for p in "qkv"), f"{ours}qkv.weight", (inner,) * 3),
           Rule((f"{theirs}attn.to_out.weight",), f"{ours}out.weight")]
    for k, part in enumerate(("proj_in", "proj_out")):
        out += expand(Rule((f"{theirs}attn.to_qkv_multiscale.{{i}}.{part}.weight",), f"{ours}scales.{{i}}.{k}.weight"),
                      i=range(len(kernel)))
    names = {"attn.norm_out": "norm", "conv_out.norm": "mlp_norm", "conv_out.conv_inverted": "mlp.widen",
             "conv_out.conv_depth": "mlp.depthwise"}
    out += [Rule((f"{theirs}{t}.{w}",), f"{ours}{o}.{w}") for t, o in names.items() for w in BOTH]
    return [*out, Rule((f"{theirs}conv_out.conv_point.weight",), f"{ours}mlp.narrow.weight")]


def generator_rules(c: DitConfig, patch: int, prefix: str) -> list[Rule]:
    ours, channels = "generator.", c.token_width // patch**2
    out = [Rule((f"{prefix}patch_embed.proj.weight",), f"{ours}input.weight", op="patches",
                shape=(c.width, channels, patch, patch)),
           Rule((f"{prefix}patch_embed.proj.bias",), f"{ours}input.bias"),
           Rule((f"{prefix}scale_shift_table",), f"{ours}table"),
           Rule((f"{prefix}caption_norm.weight",), f"{ours}condition_norm.weight")]
    names = {"time_embed.emb.timestep_embedder.linear_1": "time.mlp.0",
             "time_embed.emb.timestep_embedder.linear_2": "time.mlp.2", "time_embed.linear": "modulation",
             "caption_projection.linear_1": "condition.0", "caption_projection.linear_2": "condition.2"}
    for w in BOTH:
        out += [Rule((f"{prefix}{t}.{w}",), f"{ours}{o}.{w}") for t, o in names.items()]
        out.append(Rule((f"{prefix}proj_out.{w}",), f"{ours}output.{w}", op="negate"))
    theirs, block, width = f"{prefix}transformer_blocks.{{i}}.", f"{ours}blocks.{{i}}.", c.width
    per_block = [Rule((f"{theirs}scale_shift_table",), f"{block}table"),
                 Rule(tuple(f"{theirs}attn1.to_{p}.weight" for p in "qkv"), f"{block}attention.qkv.weight",
                      (width,) * 3),
                 Rule((f"{theirs}ff.conv_point.weight",), f"{block}mlp.narrow.weight")]
    inner = {"attn1.to_out.0": "attention.out", "attn2.to_q": "cross.q", "attn2.to_out.0": "cross.out",
             "ff.conv_inverted": "mlp.widen", "ff.conv_depth": "mlp.depthwise"}
    for w in BOTH:
        per_block += [Rule((f"{theirs}{t}.{w}",), f"{block}{o}.{w}") for t, o in inner.items()]
        per_block.append(Rule(tuple(f"{theirs}attn2.to_{p}.{w}" for p in "kv"), f"{block}cross.kv.{w}", (width,) * 2))
    return out + [r for rule in per_block for r in expand(rule, i=range(c.layers))]


def connector_rules(c: ConnectorConfig, width: int, prefix: str) -> list[Rule]:
    ours, theirs = "connector_out.", f"{prefix}0.layers.{{i}}."
    out = [Rule((f"{prefix}4.weight",), f"{ours}norm.weight")]
    for published, own in ((1, 0), (3, 2)):
        out += [Rule((f"{prefix}{published}.{w}",), f"{ours}project.{own}.{w}") for w in BOTH]
    layer, hidden = f"{ours}encoder.layers.{{i}}.", int(width * c.hidden_ratio)
    per_layer = [Rule((f"{theirs}input_layernorm.weight",), f"{layer}attention_norm.weight"),
                 Rule((f"{theirs}post_attention_layernorm.weight",), f"{layer}mlp_norm.weight"),
                 Rule((f"{theirs}self_attn.o_proj.weight",), f"{layer}out.weight"),
                 Rule(tuple(f"{theirs}mlp.{n}_proj.weight" for n in ("gate", "up")), f"{layer}mlp.gate_up.weight",
                      (hidden,) * 2),
                 Rule((f"{theirs}mlp.down_proj.weight",), f"{layer}mlp.down.weight")]
    per_layer += [Rule((f"{theirs}self_attn.{p}_norm.gamma",), f"{layer}{p}_norm.gain") for p in "qk"]
    per_layer += [Rule(tuple(f"{theirs}self_attn.{p}_proj.{w}" for p in "qkv"), f"{layer}qkv.{w}", (width,) * 3)
                  for w in BOTH]
    return out + [r for rule in per_layer for r in expand(rule, i=range(c.layers))]


def rules(c: SerialConfig) -> list[Rule]:
    """How every tensor of the file is called here (`queries` marks the rows cut out of the vocabulary)."""
    assert isinstance(c.codec, DeepCodecConfig) and isinstance(c.generator, DitConfig)
    assert isinstance(c.connector, ConnectorConfig)
    return [*qwen_vl.rules(c, BACKBONE, BACKBONE), Rule(("queries",), "queries"),
            *connector_rules(c.connector, c.block.width, "model.connector."),
            *generator_rules(c.generator, c.latent_patch, "model.transformer."), *codec_rules(c.codec, "vae.")]


def query_rows(values: Mapping[str, Any]) -> list[int]:
    """The rows of the vocabulary that are parameters of their own here: the opening, then the queries."""
    own = values["metaquery"]
    first = own["first_query_token_id"]
    return [own["boi_token_id"], *range(first, first + own["num_metaqueries"])]


def load(folder: str | Path) -> MetaQuery:
    """A published folder as a system; any tensor that finds no home is an error."""
    folder = Path(folder)
    values = json.loads((folder / "config.json").read_text())
    c, theirs = config_of(values), load_file(folder / "weights.safetensors")
    if EMBEDDING in theirs:
        theirs["queries"] = theirs[EMBEDDING][query_rows(values)]
    model = MetaQuery.from_folder(c, folder)
    shapes = {k: v.shape for k, v in model.state_dict().items() if k != "head.weight"}
    state, report = to_ours(theirs, rules(c), shapes)
    if report:
        raise ValueError(f"expected the published MetaQuery layout in {folder}, got {report}")
    model.load_state_dict(state, strict=False)  # the output matrix is the embedding
    return model.eval()


def guidance(text: float, image: float) -> Guidance:
    """The release's v0 + s_i (v1 - v0) + s_t (v2 - v1) as a chain: v1 stands for `no_text`, v0 for `no_image`."""
    if image <= 1:
        return Guidance(branches=(Branch(context="no_text", scale=text),))
    return Guidance(branches=(Branch(context="no_text", scale=text / image),
                              Branch(context="no_image", scale=image)))
