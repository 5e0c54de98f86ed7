"""The convolutional pyramid of picture codecs, continuous or discrete: residual blocks, resizing, attention.

    encoder: conv_in, levels 0..n-1 (each level but the last ends by halving the side), middle, norm, silu, conv_out
    decoder: conv_in, middle, levels n-1..0 (each level but 0 ends by doubling the side), norm, silu, conv_out

One network serves the KL autoencoder of latent diffusion, VQGAN, LlamaGen's VQ-16, VAR, MAGVIT-v2 and Infinity: they
differ in the numbers of `PyramidConfig` only. Key layout is that of latent diffusion (`down.0.block.0`, `mid.attn_1`).
A decoder may have a guide, a map by which every norm scales and shifts what it gives (MoVQ, arXiv 2209.09002).

Shape letters: b batch, c channels, g channels of the guide, h and w cells of the level at hand.
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """`channels * channel_mult[i]` features and `blocks[i]` residual blocks at level i; level 0 has the pixels' side.

    `attention` names the levels where every block is followed by attention over all cells.
    """

    channels: int = 128  # LlamaGen VQ-16, and all numbers below
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: tuple[int, ...] = (2, 2, 2, 2, 2)
    attention: tuple[int, ...] = (4,)
    mid_attention: bool = True
    norm_groups: int = 32
    norm_eps: float = 1e-6
    guide: int = 0  # channels of a decoder's guide; 0: it has none

    def __post_init__(self) -> None:
        for name in ("channel_mult", "blocks", "attention"):  # lists come from JSON and YAML
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.blocks) != len(self.channel_mult):
            raise ValueError(f"expected blocks for each of {len(self.channel_mult)} levels, got {len(self.blocks)}; "
                             "fix: one number per entry of channel_mult")
        if any((self.channels * mult) % self.norm_groups for mult in self.channel_mult):
            raise ValueError(f"expected channels * channel_mult to be multiples of norm_groups={self.norm_groups}, "
                             f"got {[self.channels * m for m in self.channel_mult]}; fix: lower norm_groups")
        if not set(self.attention) <= set(range(len(self.blocks))):
            raise ValueError(f"expected attention at levels 0 to {len(self.blocks) - 1}, got {self.attention}")

    @property
    def downsample(self) -> int:
        """Cells of level 0 per cell of the last level, along one side."""
        return 2 ** (len(self.channel_mult) - 1)

    def make_encoder(self, in_channels: int, out_channels: int) -> "Encoder":
        if self.guide:
            raise ValueError(f"expected an encoder without a guide, got one of {self.guide} channels; fix: set guide=0")
        return Encoder(self, in_channels, out_channels)

    def make_norm(self, channels: int) -> nn.Module:
        return GuidedNorm(self, channels) if self.guide else nn.GroupNorm(self.norm_groups, channels, self.norm_eps)


class GuidedNorm(nn.Module):
    """norm(x) scale(guide) + shift(guide), for x (b, c, h, w) and a guide (b, g, h', w') that is resized to it."""

    def __init__(self, c: PyramidConfig, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(c.norm_groups, channels, c.norm_eps)
        self.scale, self.shift = (nn.Conv2d(c.guide, channels, 1) for _ in range(2))

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        # 1x1 convolutions and nearest neighbours commute: this order computes fewer cells
        scale, shift = (F.interpolate(conv(guide), x.shape[2:], mode="nearest") for conv in (self.scale, self.shift))
        return self.norm(x) * scale + shift


def _normed(norm: nn.Module, x: Tensor, guide: Tensor | None) -> Tensor:
    return norm(x) if guide is None else norm(x, guide)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (b, c, h, w); a 1x1 convolution on the skip if channels change."""

    def __init__(self, c: PyramidConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = c.make_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = c.make_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        y = self.conv1(F.silu(_normed(self.norm1, x, guide)))
        y = self.conv2(F.silu(_normed(self.norm2, y, guide)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class AttentionBlock(nn.Module):
    """Single-head attention over all cells of a picture, with 1x1 convolutions as projections."""

    def __init__(self, c: PyramidConfig, channels: int):
        super().__init__()
        self.norm = c.make_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        y = _normed(self.norm, x, guide)
        q, k, v = (layer(y).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj_out(y)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # pads right and bottom only, as the published weights expect


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, attention behind each if asked for, then the change of resolution."""

    def __init__(self, c: PyramidConfig, level: int, in_channels: int, resize: type[Downsample | Upsample] | None):
        super().__init__()
        channels = c.channels * c.channel_mult[level]
        self.block = nn.ModuleList(ResBlock(c, in_channels if i == 0 else channels, channels)
                                   for i in range(c.blocks[level]))
        if level in c.attention:
            self.attn = nn.ModuleList(AttentionBlock(c, channels) for _ in self.block)
        self.resize = resize.__name__.lower() if resize else None  # also its name in the key layout
        if resize:
            self.add_module(resize.__name__.lower(), resize(channels))

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x, guide)
            if hasattr(self, "attn"):
                x = self.attn[i](x, guide)
        return x if self.resize is None else self.get_submodule(self.resize)(x)


def _middle(c: PyramidConfig, channels: int) -> nn.ModuleDict:
    parts: dict[str, nn.Module] = {"block_1": ResBlock(c, channels, channels)}
    if c.mid_attention:
        parts["attn_1"] = AttentionBlock(c, channels)
    return nn.ModuleDict({**parts, "block_2": ResBlock(c, channels, channels)})


class Encoder(nn.Module):
    """(b, in_channels, h, w) -> (b, out_channels, h / downsample, w / downsample)."""

    def __init__(self, c: PyramidConfig, in_channels: int, out_channels: int):
        super().__init__()
        current, last = c.channels, len(c.channel_mult) - 1
        self.conv_in = nn.Conv2d(in_channels, current, 3, padding=1)
        self.down = nn.ModuleList()
        for level, mult in enumerate(c.channel_mult):
            self.down.append(Level(c, level, current, None if level == last else Downsample))
            current = c.channels * mult
        self.mid = _middle(c, current)
        self.norm_out = c.make_norm(current)
        self.conv_out = nn.Conv2d(current, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.to(self.conv_in.weight.dtype))
        for level in self.down:
            x = level(x)
        for block in self.mid.values():
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(b, in_channels, h, w) -> (b, out_channels, h * downsample, w * downsample), with a guide (b, g, h, w) if the
    config has one."""

    def __init__(self, c: PyramidConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.guide = c.guide
        current = c.channels * c.channel_mult[-1]
        self.conv_in = nn.Conv2d(in_channels, current, 3, padding=1)
        self.mid = _middle(c, current)
        levels: list[nn.Module] = []
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            levels.append(Level(c, level, current, Upsample if level else None))
            current = c.channels * mult
        self.up = nn.ModuleList(reversed(levels))  # `up.i` is level i: published order is by resolution, not by use
        self.norm_out = c.make_norm(current)
        self.conv_out = nn.Conv2d(current, out_channels, 3, padding=1)

    def forward(self, z: Tensor, guide: Tensor | None = None) -> Tensor:
        if (0 if guide is None else guide.shape[1]) != self.guide:
            raise ValueError(f"expected a guide of {self.guide} channels (0: none) for this decoder, got "
                             f"{None if guide is None else tuple(guide.shape)}")
        x = self.conv_in(z.to(self.conv_in.weight.dtype))
        for part in (*self.mid.values(), *list(self.up)[::-1]):
            x = part(x, guide)
        return self.conv_out(F.silu(_normed(self.norm_out, x, guide)))
