"""The KL autoencoder as diffusers saves it (`AutoencoderKL`): the network of `parts.vae` under other names."""
from collections.abc import Mapping
from typing import Any

from diptych.adapters.keys import Rule, expand
from diptych.parts.vae import AutoEncoderConfig

# what would change the network, with the one value that is built here
FIXED = {"act_fn": "silu", "mid_block_add_attention": True}
KINDS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
BOTH = ("weight", "bias")


def config_of(values: Mapping[str, Any]) -> AutoEncoderConfig:
    """From the contents of its `config.json`."""
    for key, only in FIXED.items():
        if values.get(key, only) != only:
            raise ValueError(f"expected {key} of the autoencoder to be {only!r}, got {values[key]!r}")
    for key, only in KINDS.items():
        if set(values[key]) != {only}:
            raise ValueError(f"expected {key} of the autoencoder to be {only} throughout, got {values[key]}")
    channels, first = values["block_out_channels"], values["block_out_channels"][0]
    quant = {bool(values.get(key, True)) for key in ("use_quant_conv", "use_post_quant_conv")}
    if any(n % first for n in channels) or len(quant) != 1 or values["in_channels"] != values["out_channels"]:
        raise ValueError(f"expected multiples of {first} channels, both quant convolutions or none and as many colours "
                         f"out as in, got {channels}, {quant} and {values['in_channels']}, {values['out_channels']}")
    return AutoEncoderConfig(channels=first, channel_mult=tuple(n // first for n in channels),
                             num_res_blocks=values["layers_per_block"], latent_channels=values["latent_channels"],
                             image_channels=values["in_channels"], quant_conv=quant.pop(),
                             norm_groups=values["norm_num_groups"], shift=values.get("shift_factor") or 0.0,
                             scale=values["scaling_factor"])


def published_config(c: AutoEncoderConfig) -> dict[str, Any]:
    """The way back: the contents of its `config.json`."""
    if c.patch != 1 or c.encoder_attention or isinstance(c.shift, tuple) or isinstance(c.scale, tuple):
        raise ValueError("expected an autoencoder on pixels with attention in the middle alone and one shift and one "
                         f"scale, got patch {c.patch}, encoder_attention {c.encoder_attention}, shift {c.shift} and "
                         f"scale {c.scale}; fix: save it with save_system")
    levels = len(c.channel_mult)
    return {"_class_name": "AutoencoderKL", "in_channels": c.image_channels, "out_channels": c.image_channels,
            **{key: [kind] * levels for key, kind in KINDS.items()}, **FIXED,
            "block_out_channels": [c.channels * n for n in c.channel_mult], "layers_per_block": c.num_res_blocks,
            "latent_channels": c.latent_channels, "norm_num_groups": c.norm_groups, "scaling_factor": c.scale,
            "shift_factor": c.shift, "use_quant_conv": c.quant_conv, "use_post_quant_conv": c.quant_conv}


def rules(c: AutoEncoderConfig, prefix: str, own: str = "codec.") -> list[Rule]:
    """`prefix` stands in front of the published names, `own` of ours."""
    out: list[Rule] = []
    last = len(c.channel_mult) - 1
    for side, levels, resize, blocks in (("encoder", "down", "downsample", c.num_res_blocks),
                                         ("decoder", "up", "upsample", c.num_res_blocks + 1)):
        theirs, ours = f"{prefix}{side}.", f"{own}{side}."
        for name, mine in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            out += expand(Rule((f"{theirs}{name}.{{w}}",), f"{ours}{mine}.{{w}}"), w=BOTH)
        for k in (0, 1):
            out += _block(f"{theirs}mid_block.resnets.{k}.", f"{ours}mid.block_{k + 1}.", False)
        out += _attention(f"{theirs}mid_block.attentions.0.", f"{ours}mid.attn_1.", c.channels * c.channel_mult[-1])
        current = c.channels * (c.channel_mult[-1] if side == "decoder" else 1)
        for n in range(last + 1):
            level = last - n if side == "decoder" else n  # published in the order of use
            width = c.channels * c.channel_mult[level]
            for j in range(blocks):
                out += _block(f"{theirs}{levels}_blocks.{n}.resnets.{j}.", f"{ours}{levels}.{level}.block.{j}.",
                              j == 0 and width != current)
            if n < last:
                out += expand(Rule((f"{theirs}{levels}_blocks.{n}.{resize}rs.0.conv.{{w}}",),
                                   f"{ours}{levels}.{level}.{resize}.conv.{{w}}"), w=BOTH)
            current = width
    if c.quant_conv:
        out += expand(Rule((prefix + "{n}.{w}",), own + "{n}.{w}"), n=("quant_conv", "post_quant_conv"), w=BOTH)
    return out


def _block(theirs: str, ours: str, shortcut: bool) -> list[Rule]:
    names = {n: n for n in ("norm1", "conv1", "norm2", "conv2")}
    names |= {"conv_shortcut": "nin_shortcut"} if shortcut else {}
    return [Rule((f"{theirs}{t}.{w}",), f"{ours}{o}.{w}") for t, o in names.items() for w in BOTH]


def _attention(theirs: str, ours: str, width: int) -> list[Rule]:
    """Matrices there, convolutions over one cell here."""
    out = [Rule((f"{theirs}group_norm.{w}",), f"{ours}norm.{w}") for w in BOTH]
    for t, o in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        out += [Rule((f"{theirs}{t}.weight",), f"{ours}{o}.weight", shape=(width, width)),
                Rule((f"{theirs}{t}.bias",), f"{ours}{o}.bias")]
    return out
