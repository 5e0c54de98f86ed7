"""Deep-compression autoencoder: pictures to few, wide cells and back, without sampling (DC-AE, arXiv 2410.10733).

    level    residual blocks, or linear attention at several scales followed by a convolved feed-forward network
    between  a convolution that halves (doubles) the sides, beside the same numbers rearranged: a shortcut without
             parameters, from which the convolution only has to learn the difference
    latent = scale * E(x)     x' = D(latent / scale)

Shape letters: b batch, c channels, h and w pixels or cells, z latent channels.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.linear import ConvolvedMlp, linear_attention
from diptych.parts.vae import LatentCodec

Scales = tuple[int, ...]  # kernel sides of the further scales of an attention block


@dataclass(frozen=True, kw_only=True)
class DeepCodecConfig:
    """Per level, finest first: `channels`, numbers of blocks, and what blocks they are: `None` residual ones, otherwise
    attention with these further scales. `rearrange`: learnt halving and doubling by rearranging pixels, instead of a
    strided convolution and nearest neighbours."""

    channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)  # dc-ae-f32c32-sana-1.0, and all numbers below
    encoder_blocks: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_scales: tuple[Scales | None, ...] = (None, None, None, (5,), (5,), (5,))
    decoder_scales: tuple[Scales | None, ...] = (None, None, None, (5,), (5,), (5,))
    latent_channels: int = 32
    head_dim: int = 32
    rearrange_down: bool = False
    rearrange_up: bool = False
    norm_eps: float = 1e-5
    scale: float = 0.41407

    def __post_init__(self) -> None:
        for name in ("channels", "encoder_blocks", "decoder_blocks", "encoder_scales", "decoder_scales"):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in getattr(self, name))  # from JSON and YAML
            object.__setattr__(self, name, value)
            if len(value) != len(self.channels):
                raise ValueError(f"expected {name} for {len(self.channels)} levels, got {len(value)}")
        if min(*self.encoder_blocks, *self.decoder_blocks) < 1:
            raise ValueError("expected at least one block on every level, got none on some")
        if self.channels[-1] % self.latent_channels:
            raise ValueError(f"expected the last of channels to be a multiple of latent_channels="
                             f"{self.latent_channels}, got {self.channels[-1]}")

    @property
    def downsample(self) -> int:
        """Pixels per latent cell, along one side."""
        return 2 ** (len(self.channels) - 1)

    def build(self) -> "DeepCodec":
        return DeepCodec(self)


class ChannelNorm(nn.Module):
    """x / rms(x) * weight + bias over the channels of (b, c, h, w), statistics in float32."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + self.eps)
        return (y * self.weight.float()[:, None, None] + self.bias.float()[:, None, None]).to(x.dtype)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = ChannelNorm(channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


class AttentionBlock(nn.Module):
    """Every scale is a depthwise convolution of queries, keys and values followed by one within heads; all scales are
    further heads of one attention."""

    def __init__(self, channels: int, head_dim: int, scales: Scales, eps: float) -> None:
        super().__init__()
        heads = channels // head_dim
        inner, self.head_dim = heads * head_dim, head_dim
        self.qkv = nn.Linear(channels, 3 * inner, bias=False)
        self.scales = nn.ModuleList(nn.Sequential(
            nn.Conv2d(3 * inner, 3 * inner, side, padding=side // 2, groups=3 * inner, bias=False),
            nn.Conv2d(3 * inner, 3 * inner, 1, groups=3 * heads, bias=False)) for side in scales)
        self.out = nn.Linear(inner * (1 + len(scales)), channels, bias=False)
        self.norm = ChannelNorm(channels, eps)
        self.mlp, self.mlp_norm = ConvolvedMlp(channels, 4 * channels), ChannelNorm(channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x.movedim(1, -1)).movedim(-1, 1)
        every = torch.cat([qkv, *(scale(qkv) for scale in self.scales)], 1)
        # heads are consecutive channels of what was joined, not of each projection: as published
        q, k, v = every.flatten(2).unflatten(1, (-1, 3 * self.head_dim)).transpose(2, 3).chunk(3, -1)
        mixed = linear_attention(q, k, v).transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        x = x + self.norm(self.out(mixed.movedim(1, -1)).movedim(-1, 1))
        return x + self.mlp_norm(self.mlp(x))


class Down(nn.Module):
    """(b, c, h, w) -> (b, out, h / 2, w / 2)."""

    def __init__(self, channels: int, out: int, rearrange: bool) -> None:
        super().__init__()
        self.rearrange, self.group = rearrange, 4 * channels // out
        self.conv = nn.Conv2d(channels, out // 4 if rearrange else out, 3, 1 if rearrange else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_unshuffle(self.conv(x), 2) if self.rearrange else self.conv(x)
        return y + F.pixel_unshuffle(x, 2).unflatten(1, (-1, self.group)).mean(2)


class Up(nn.Module):
    """(b, c, h, w) -> (b, out, 2 h, 2 w)."""

    def __init__(self, channels: int, out: int, rearrange: bool) -> None:
        super().__init__()
        self.rearrange, self.repeats = rearrange, 4 * out // channels
        self.conv = nn.Conv2d(channels, 4 * out if rearrange else out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.rearrange:
            y = F.pixel_shuffle(self.conv(x), 2)
        else:
            y = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return y + F.pixel_shuffle(x.repeat_interleave(self.repeats, 1), 2)


Side = Literal["encoder", "decoder"]


def _level(c: DeepCodecConfig, i: int, side: Side) -> list[nn.Module]:
    """The blocks of level i."""
    scales: Scales | None = getattr(c, f"{side}_scales")[i]
    count: int = getattr(c, f"{side}_blocks")[i]
    if scales is None:
        return [ResidualBlock(c.channels[i], c.norm_eps) for _ in range(count)]
    return [AttentionBlock(c.channels[i], c.head_dim, scales, c.norm_eps) for _ in range(count)]


class Encoder(nn.Module):
    def __init__(self, c: DeepCodecConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, c.channels[0], 3, padding=1)
        levels = [_level(c, i, "encoder") for i in range(len(c.channels))]
        for i, blocks in enumerate(levels[:-1]):
            blocks.append(Down(c.channels[i], c.channels[i + 1], c.rearrange_down))
        self.levels = nn.ModuleList(nn.Sequential(*blocks) for blocks in levels)
        self.conv_out = nn.Conv2d(c.channels[-1], c.latent_channels, 3, padding=1)
        self.group = c.channels[-1] // c.latent_channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(x) + x.unflatten(1, (-1, self.group)).mean(2)


class Decoder(nn.Module):
    """`levels[i]` is level i, so they are passed backwards."""

    def __init__(self, c: DeepCodecConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(c.latent_channels, c.channels[-1], 3, padding=1)
        self.repeats = c.channels[-1] // c.latent_channels
        levels = [_level(c, i, "decoder") for i in range(len(c.channels))]
        for i, blocks in enumerate(levels[:-1]):
            blocks.insert(0, Up(c.channels[i + 1], c.channels[i], c.rearrange_up))
        self.levels = nn.ModuleList(nn.Sequential(*blocks) for blocks in levels)
        self.norm_out = ChannelNorm(c.channels[0], c.norm_eps)
        self.conv_out = nn.Conv2d(c.channels[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z) + z.repeat_interleave(self.repeats, 1)
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(F.relu(self.norm_out(x)))


class DeepCodec(LatentCodec):
    """Pictures (b, 3, h, w) in [-1, 1] <-> latents (b, z, h / downsample, w / downsample)."""

    def __init__(self, config: DeepCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def latent(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latent; there is nothing to draw."""
        side = self.config.downsample
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % side or images.shape[3] % side:
            raise ValueError(f"expected images of shape (b, 3, h, w) with h, w multiples of {side}, "
                             f"got {tuple(images.shape)}; fix: resize or pad the pictures")
        return self.encoder(images) * self.config.scale

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures from scaled latents; values are not clipped."""
        if latent.ndim != 4 or latent.shape[1] != self.config.latent_channels:
            raise ValueError(f"expected latents of shape (b, {self.config.latent_channels}, h, w), "
                             f"got {tuple(latent.shape)}")
        return self.decoder(latent / self.config.scale)
