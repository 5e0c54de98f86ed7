"""KL autoencoder of the latent-diffusion lineage: pictures to a small grid of continuous latents and back.

    q(z|x) = N(mean(x), exp(logvar(x)))     latent = (z - shift) * scale     x' = D(latent / scale + shift)

Network and key layout are those of the published FLUX autoencoder (`ae.safetensors`, Apache-2.0), so that its weights
load without renaming. One extension: with `patch > 1` the network works on space-to-depth pixels, which removes every
full-resolution convolution and makes the network cheap enough for a CPU; `patch = 1` is the published network.

Shape letters: b batch, c channels, h and w pixels or latent cells, z latent channels.
"""
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.pictures import stack_by_size
from diptych.parts.vision import Grid, patchify, unpatchify
from diptych.parts.vqgan import Decoder, Encoder, PyramidConfig


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
    encoder_attention: tuple[int, ...] = ()  # levels; beside that of the middle
    quant_conv: bool = False  # 1x1 convolutions around the posterior (latent-diffusion's first autoencoders, MAR's)
    patch: int = 1
    norm_groups: int = 32
    norm_eps: float = 1e-6
    shift: float | tuple[float, ...] = 0.1159  # FLUX ae: shift_factor
    scale: float | tuple[float, ...] = 0.3611  # FLUX ae: scale_factor

    def __post_init__(self) -> None:
        for name in ("channel_mult", "encoder_attention", "shift", "scale"):  # lists come from JSON and YAML
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("shift", "scale"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.latent_channels:
                raise ValueError(f"expected {name} to be one number or {self.latent_channels} numbers, "
                                 f"got {len(value)}")
        self.pyramid(self.num_res_blocks, self.encoder_attention)  # says what is wrong with the sizes

    def pyramid(self, blocks: int, attention: tuple[int, ...] = ()) -> PyramidConfig:
        """The network of one side, with so many residual blocks per level; attention in the middle, and at levels."""
        return PyramidConfig(channels=self.channels, channel_mult=self.channel_mult,
                             blocks=(blocks,) * len(self.channel_mult), attention=attention,
                             norm_groups=self.norm_groups, norm_eps=self.norm_eps)

    @property
    def downsample(self) -> int:
        """Pixels per latent cell, along one side."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    def build(self) -> "AutoEncoder":
        return AutoEncoder(self)

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


class LatentCodec(nn.Module):
    """What turns pictures (b, 3, h, w) into latents (b, z, h', w') and back: one of several networks."""

    def latent(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents of pictures; where the network draws, from `generator`, without one the mean."""
        raise TypeError("abstract")

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures from scaled latents; values are not clipped."""
        raise TypeError("abstract")

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean of the scaled latents of pictures, and their standard deviation where the network draws."""
        return self.latent(images), None

    @torch.no_grad()
    def tokens(self, pictures: list[Tensor], patch: int, noises: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Pictures (3, h, w) of any sizes -> latent tokens (n_i, d) of each: patches of the scaled mean, float32, in
        (row, column, channel) order inside a token. With standard normal `noises` (n_i, d) those of a draw, where the
        network draws."""
        out: dict[int, Tensor] = {}
        for numbers, batch in stack_by_size(pictures):
            mean, std = self.moments(batch)
            x = patchify(mean.float(), patch)
            if noises is not None and std is not None:
                x = x + patchify(std.float(), patch) * torch.stack([noises[i] for i in numbers])
            out |= zip(numbers, x, strict=True)
        return [out[i] for i in range(len(pictures))]

    @torch.no_grad()
    def from_tokens(self, x: Tensor, patch: int, grid: Grid) -> Tensor:
        """Latent tokens (b, n, d) of one grid -> pixels (b, 3, h, w), float32, clamped to [-1, 1]."""
        return self.decode(unpatchify(x, patch, grid)).float().clamp(-1, 1)


class AutoEncoder(LatentCodec):
    """Pictures (b, 3, h, w) in [-1, 1] <-> latents (b, z, h / downsample, w / downsample)."""

    shift: Tensor
    scale: Tensor

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        colours = config.image_channels * config.patch**2
        latent = config.latent_channels
        self.encoder = Encoder(config.pyramid(config.num_res_blocks, config.encoder_attention), colours, 2 * latent)
        # the published decoder has one block more per level
        self.decoder = Decoder(config.pyramid(config.num_res_blocks + 1), latent, colours)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.quant_conv else nn.Identity()
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
        return Posterior(*self.quant_conv(self.encoder(x)).chunk(2, 1))

    def latent(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latent: a posterior sample drawn from `generator`, or the posterior mean without one."""
        return (self.encode(images).sample(generator) - self.shift) * self.scale

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the scaled posterior."""
        mean, logvar = self.encode(images)
        return (mean - self.shift) * self.scale, torch.exp(0.5 * logvar) * self.scale

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures from scaled latents; values are not clipped."""
        if latent.ndim != 4 or latent.shape[1] != self.config.latent_channels:
            raise ValueError(f"expected latents of shape (b, {self.config.latent_channels}, h, w), "
                             f"got {tuple(latent.shape)}")
        x = self.decoder(self.post_quant_conv(latent / self.scale + self.shift))
        return F.pixel_shuffle(x, self.config.patch) if self.config.patch > 1 else x

    def with_statistics(self, shift: tuple[float, ...], scale: tuple[float, ...]) -> "AutoEncoder":
        """The same weights (shared) under other latent statistics."""
        other = AutoEncoder(dataclasses.replace(self.config, shift=shift, scale=scale))
        other.load_state_dict(self.state_dict(), assign=True)
        return other.train(self.training)
