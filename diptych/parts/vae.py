"""KL autoencoder of the latent-diffusion lineage: pictures to a small grid of continuous latents and back.

    q(z|x) = N(mean(x), exp(logvar(x)))     latent = (z - shift) * scale     x' = D(latent / scale + shift)

Network and key layout are those of the published FLUX autoencoder (`ae.safetensors`, Apache-2.0), so that its weights
load without renaming. One extension: with `patch > 1` the network works on space-to-depth pixels, which removes every
full-resolution convolution and makes the network cheap enough for a CPU; `patch = 1` is the published network.

Shape letters: b batch, c channels, h and w pixels or latent cells, z latent channels.
"""
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class AutoEncoderConfig:
    """`channels * channel_mult[i]` features at level i; every level but the last halves the resolution.

    `shift` and `scale` turn a posterior sample into the latent a system sees: one number, or one per latent channel.
    """

    channels: int = 128  # FLUX ae: ch
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # FLUX ae: ch_mult
    num_res_blocks: int = 2
    latent_channels: int = 16  # FLUX ae: z_channels
    image_channels: int = 3
    patch: int = 1
    norm_groups: int = 32
    norm_eps: float = 1e-6
    shift: float | tuple[float, ...] = 0.1159  # FLUX ae: shift_factor
    scale: float | tuple[float, ...] = 0.3611  # FLUX ae: scale_factor

    def __post_init__(self) -> None:
        for name in ("channel_mult", "shift", "scale"):  # lists come from JSON and YAML
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("shift", "scale"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.latent_channels:
                raise ValueError(f"expected {name} to be one number or {self.latent_channels} numbers, "
                                 f"got {len(value)}")
        if any((self.channels * mult) % self.norm_groups for mult in self.channel_mult):
            raise ValueError(f"expected channels * channel_mult to be multiples of norm_groups={self.norm_groups}, "
                             f"got {[self.channels * m for m in self.channel_mult]}; fix: lower norm_groups")

    @property
    def downsample(self) -> int:
        """Pixels per latent cell, along one side."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    @classmethod
    def paper(cls) -> "AutoEncoderConfig":
        """The FLUX autoencoder."""
        return cls()

    @classmethod
    def from_published(cls, values: Mapping[str, Any]) -> "AutoEncoderConfig":
        """From the published names (`ch`, `ch_mult`, `num_res_blocks`, `z_channels`, `scale_factor`, ...)."""
        names = {"ch": "channels", "ch_mult": "channel_mult", "num_res_blocks": "num_res_blocks",
                 "z_channels": "latent_channels", "in_channels": "image_channels", "scale_factor": "scale",
                 "shift_factor": "shift"}
        implied = {"resolution", "downsample", "out_ch"}  # follow from the others; the network is convolutional
        unknown = sorted(set(values) - set(names) - implied)
        if unknown:
            raise ValueError(f"expected autoencoder keys {', '.join(sorted({*names, *implied}))}, "
                             f"got unknown {', '.join(unknown)}")
        known: dict[str, Any] = {names[k]: v for k, v in values.items() if k in names}
        config = cls(**known)
        for key, have in (("out_ch", config.image_channels), ("downsample", config.downsample)):
            if values.get(key, have) != have:
                raise ValueError(f"expected {key} to be {have} as the other keys imply, got {values[key]}")
        return config


class Posterior(NamedTuple):
    """Diagonal Gaussian over latents, before shift and scale; both (b, z, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """One draw, or the mean when no generator is given."""
        if generator is None:
            return self.mean
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device, dtype=torch.float32)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL to the standard normal in nats, (b, z, h, w), float32."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (b, c, h, w); a 1x1 convolution on the skip if channels change."""

    def __init__(self, c: AutoEncoderConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(c.norm_groups, in_channels, c.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(c.norm_groups, out_channels, c.norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class AttentionBlock(nn.Module):
    """Single-head attention over all cells of a picture, with 1x1 convolutions as projections."""

    def __init__(self, c: AutoEncoderConfig, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(c.norm_groups, channels, c.norm_eps)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        y = self.norm(x)
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


class Stage(nn.Module):
    """The residual blocks of one resolution, then, if there is one, the change (`downsample` or `upsample`)."""

    def __init__(self, blocks: list[nn.Module], **resize: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        for name, module in resize.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name, module in self.named_children():
            if name != "block":
                x = module(x)
        return x


def _mid(c: AutoEncoderConfig, channels: int) -> nn.ModuleDict:
    return nn.ModuleDict({"block_1": ResBlock(c, channels, channels), "attn_1": AttentionBlock(c, channels),
                          "block_2": ResBlock(c, channels, channels)})


class Encoder(nn.Module):
    def __init__(self, c: AutoEncoderConfig):
        super().__init__()
        current = c.channels
        self.conv_in = nn.Conv2d(c.image_channels * c.patch**2, current, 3, padding=1)
        self.down = nn.ModuleList()
        for level, mult in enumerate(c.channel_mult):
            blocks: list[nn.Module] = []
            for _ in range(c.num_res_blocks):
                blocks.append(ResBlock(c, current, c.channels * mult))
                current = c.channels * mult
            last = level == len(c.channel_mult) - 1
            self.down.append(Stage(blocks) if last else Stage(blocks, downsample=Downsample(current)))
        self.mid = _mid(c, current)
        self.norm_out = nn.GroupNorm(c.norm_groups, current, c.norm_eps)
        self.conv_out = nn.Conv2d(current, 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
        for block in self.mid.values():
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, c: AutoEncoderConfig):
        super().__init__()
        current = c.channels * c.channel_mult[-1]
        self.conv_in = nn.Conv2d(c.latent_channels, current, 3, padding=1)
        self.mid = _mid(c, current)
        stages: list[nn.Module] = []
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            blocks: list[nn.Module] = []
            for _ in range(c.num_res_blocks + 1):
                blocks.append(ResBlock(c, current, c.channels * mult))
                current = c.channels * mult
            stages.append(Stage(blocks, upsample=Upsample(current)) if level else Stage(blocks))
        self.up = nn.ModuleList(reversed(stages))  # `up.i` is level i: published order is by resolution, not by use
        self.norm_out = nn.GroupNorm(c.norm_groups, current, c.norm_eps)
        self.conv_out = nn.Conv2d(current, c.image_channels * c.patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in self.mid.values():
            x = block(x)
        for stage in list(self.up)[::-1]:
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Pictures (b, 3, h, w) in [-1, 1] <-> latents (b, z, h / downsample, w / downsample)."""

    shift: Tensor
    scale: Tensor

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        # Statistics belong to the config: buffers stay out of the state dict, whose layout is the published one.
        for name in ("shift", "scale"):
            value = torch.tensor(getattr(config, name), dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def encode(self, images: Tensor) -> Posterior:
        """Posterior of pictures; sides must be multiples of `config.downsample`."""
        side, channels = self.config.downsample, self.config.image_channels
        if images.ndim != 4 or images.shape[1] != channels or images.shape[2] % side or images.shape[3] % side:
            raise ValueError(f"expected images of shape (b, {channels}, h, w) with h, w multiples of {side}, "
                             f"got {tuple(images.shape)}; fix: resize or pad the pictures")
        x = F.pixel_unshuffle(images, self.config.patch) if self.config.patch > 1 else images
        return Posterior(*self.encoder(x).chunk(2, 1))

    def latent(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latent: a posterior sample drawn from `generator`, or the posterior mean without one."""
        return (self.encode(images).sample(generator) - self.shift) * self.scale

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures from scaled latents; values are not clipped."""
        if latent.ndim != 4 or latent.shape[1] != self.config.latent_channels:
            raise ValueError(f"expected latents of shape (b, {self.config.latent_channels}, h, w), "
                             f"got {tuple(latent.shape)}")
        x = self.decoder(latent / self.scale + self.shift)
        return F.pixel_shuffle(x, self.config.patch) if self.config.patch > 1 else x

    def with_statistics(self, shift: tuple[float, ...], scale: tuple[float, ...]) -> "AutoEncoder":
        """The same weights (shared) under other latent statistics."""
        other = AutoEncoder(dataclasses.replace(self.config, shift=shift, scale=scale))
        other.load_state_dict(self.state_dict(), assign=True)
        return other.train(self.training)
