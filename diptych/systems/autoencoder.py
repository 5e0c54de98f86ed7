"""A KL autoencoder trained on the pictures of documents: the codec of a data set. A tool for systems, not a paper.

    L = w_1 |x' - x| + w_2 (x' - x)^2 + w_e |d x' - d x| + w_kl KL(q(z|x) || N(0, I)),   x' = D(z), z ~ q(z|x)

- Every term is a mean over its own numbers: pixels, differences d of neighbouring pixels (edges), latents.
- Mean and variance of every latent channel are measured while training, and `config` states them as the codec's shift
  and scale. A saved system therefore holds a codec with latents of zero mean and unit variance, and a recipe takes
  weights and statistics together: `init: {codec: runs/NAME/model#codec}`.
- Pictures are turned and mirrored at random, and a share of them gets mixed colour channels.
"""
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from diptych.document import Document, Image
from diptych.parts.pictures import stack_by_size
from diptych.parts.vae import AutoEncoder, AutoEncoderConfig
from diptych.systems.base import Losses, System


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """How pictures are varied, and what errors of their pixels weigh."""

    l1_weight: float = 1.0
    mse_weight: float = 3.0
    edge_weight: float = 0.5
    symmetries: bool = True
    tint: float = 0.1  # share of pictures with mixed channels


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(PicturesConfig):
    codec: AutoEncoderConfig
    kl_weight: float = 3e-4
    logvar: float = -8.0  # of a fresh posterior: nearly no noise, which the KL term then adds as the decoder allows
    memory: int = 100  # batches over which the statistics of latents average


@dataclass
class Batch:
    """Pictures (b, 3, h, w) in [-1, 1], stacked by size; `counts` are those of the loss terms."""

    groups: list[Tensor]
    counts: dict[str, float]
    num_tokens: int  # latent cells

    def to(self, device: torch.device | str) -> "Batch":
        return dataclasses.replace(self, groups=[g.to(device) for g in self.groups])


class Pictured(System):
    """What codecs share that learn on the pictures of documents: batches, variations, and errors of pixels."""

    built: Any  # the config as built, a `PicturesConfig` with a codec

    def collate(self, documents: Sequence[Document]) -> Batch:
        """Every picture with pixels, given or target, in any piece."""
        stride = self.built.codec.downsample
        pictures: list[Tensor] = []
        for document in documents:
            found = [p.pixels for p in document if isinstance(p, Image) and p.pixels is not None]
            if not found:
                raise ValueError(f"expected a picture in every document, got none in one of task {document.task!r}; "
                                 "fix: train on sources that have pictures")
            for pixels in found:
                height, width = pixels.shape[1:]
                if height % stride or width % stride:
                    raise ValueError(f"expected pictures with sides that are multiples of {stride}, got "
                                     f"{height} x {width}; fix: give the data source a size")
                pictures.append(torch.from_numpy(pixels))
        groups = [group for _, group in stack_by_size(pictures)]
        pixels = sum(g.numel() for g in groups)
        edges = sum(2 * g.numel() - g[..., 0].numel() - g[..., 0, :].numel() for g in groups)
        cells = sum(g[:, 0].numel() for g in groups) // stride**2
        return Batch(groups, {"l1": float(pixels), "mse": float(pixels), "edge": float(edges)}, cells)

    def varied(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        """One symmetry of the square for all; the first pictures get random mixtures of their channels: how many."""
        c, device = self.built, generator.device
        if c.symmetries:
            turn = (torch.rand(3, generator=generator, device=device) < 0.5).tolist()
            images = images.flip(-1) if turn[0] else images
            images = images.flip(-2) if turn[1] else images
            images = images.transpose(-1, -2) if turn[2] else images
        count = int(len(images) * c.tint)
        if count:
            mix = torch.rand(count, 3, 3, generator=generator, device=device).to(images)
            mixed = torch.einsum("bij,bjhw->bihw", mix / mix.sum(-1, keepdim=True), images[:count])
            images = torch.cat([mixed, images[count:]])
        return images.contiguous(), count

    def losses(self, parts: dict[str, list[Tensor]], batch: Batch, weights: dict[str, float]) -> Losses:
        """Sums of every term over the groups of a batch, with the weights of those that are no errors of pixels."""
        c = self.built
        counts = {k: torch.tensor(v, device=self.device) for k, v in batch.counts.items()}
        weights = {"l1": c.l1_weight, "mse": c.mse_weight, "edge": c.edge_weight, **weights}
        return Losses({k: torch.stack(v).sum() for k, v in parts.items()}, counts, weights)


def pixel_errors(error: Tensor) -> dict[str, Tensor]:
    """Sums over the differences (b, 3, h, w) of two pictures, and of their neighbours."""
    return {"l1": error.abs().sum(), "mse": error.square().sum(),
            "edge": error.diff(dim=-1).abs().sum() + error.diff(dim=-2).abs().sum()}


class Autoencoder(Pictured):
    Config = AutoencoderConfig
    built: AutoencoderConfig
    latent_mean: Tensor
    latent_square: Tensor
    latent_batches: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.built = config
        self.codec = AutoEncoder(config.codec)
        channels, head = config.codec.latent_channels, self.codec.encoder.conv_out
        assert head.bias is not None
        with torch.no_grad():
            head.bias[channels:] = config.logvar
            head.weight[channels:] *= 0.1
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_square", torch.ones(channels))
        self.register_buffer("latent_batches", torch.zeros(()))

    @property
    def config(self) -> AutoencoderConfig:  # type: ignore[override]  # what the base class keeps as an attribute
        """As built, with the statistics of the latents once there are any."""
        if self.latent_batches.is_meta or not bool(self.latent_batches):
            return self.built
        shift = self.latent_mean
        scale = (self.latent_square - shift.square()).clamp_min(1e-10).rsqrt()
        codec = dataclasses.replace(self.built.codec, shift=tuple(shift.tolist()), scale=tuple(scale.tolist()))
        return dataclasses.replace(self.built, codec=codec)

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> AutoencoderConfig:
        """For tests: seconds on a CPU."""
        return AutoencoderConfig(codec=AutoEncoderConfig(
            channels=16, channel_mult=(1, 1), num_res_blocks=1, latent_channels=6, patch=4, norm_groups=4, shift=0.0,
            scale=1.0))

    @classmethod
    def small(cls) -> AutoencoderConfig:
        """The zoo's codec: 64 px to 8 x 8 cells, 1.2M parameters, minutes on a CPU."""
        return AutoencoderConfig(codec=AutoEncoderConfig(
            channels=64, channel_mult=(1, 1), num_res_blocks=2, latent_channels=6, patch=4, norm_groups=16, shift=0.0,
            scale=1.0))

    @classmethod
    def paper(cls) -> AutoencoderConfig:
        """The network of the FLUX codec. Its published weights were also trained adversarially, which this is not."""
        return AutoencoderConfig(codec=AutoEncoderConfig.paper())

    # -- training -----------------------------------------------------------------------------------------------------

    def collate(self, documents: Sequence[Document]) -> Batch:
        batch, c = super().collate(documents), self.built.codec
        return dataclasses.replace(batch, counts=batch.counts | {"kl": float(batch.num_tokens * c.latent_channels)})

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """A forward pass with gradients also takes the statistics of its latents along."""
        parts: dict[str, list[Tensor]] = {k: [] for k in batch.counts}
        means: list[Tensor] = []
        for images in batch.groups:
            images, tinted = self.varied(images, generator)
            posterior = self.codec.encode(images)
            error = self.codec.decode(posterior.sample(generator)).float() - images
            for name, value in pixel_errors(error).items():
                parts[name].append(value)
            parts["kl"].append(posterior.kl().sum())
            means.append(posterior.mean.detach().float()[tinted:].transpose(0, 1).flatten(1))
        if torch.is_grad_enabled():
            self._remember(torch.cat(means, 1))
        return self.losses(parts, batch, {"kl": self.built.kl_weight})

    @torch.no_grad()
    def _remember(self, latents: Tensor) -> None:
        """Posterior means (z, cells) of a batch: a plain average at first, then an exponential one. A batch that is not
        finite leaves no trace, as its training step leaves none."""
        fine = torch.isfinite(latents).all() & (latents.shape[1] > 0)
        share = torch.where(fine, 1 / (self.latent_batches + 1).clamp(max=self.built.memory), 0.0)
        for old, new in ((self.latent_mean, latents.mean(1)), (self.latent_square, latents.square().mean(1))):
            old.copy_(torch.where(fine, old + share * (new - old), old))
        self.latent_batches += fine

    # -- use ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, images: Tensor, batch: int = 64) -> Tensor:
        """Pictures (b, 3, h, w) in [-1, 1] through the posterior mean and back, clamped."""
        parts = [self.codec.decode(self.codec.latent(p.to(self.device))) for p in images.split(batch)]
        return torch.cat(parts).float().clamp(-1, 1)


@runtime_checkable
class Reconstructs(Protocol):
    """A system whose batches have `groups`, pictures stacked by size, and that can show what is left of them."""

    def collate(self, documents: Sequence[Document]) -> Any: ...
    def reconstruct(self, images: Tensor) -> Tensor: ...


def sheet(system: System, documents: Sequence[Document], step: int, folder: Path) -> None:
    """A sampler for recipes: `step-N.png` with pictures of held documents above what the codec makes of them."""
    from PIL import Image as Pil

    if not isinstance(system, Reconstructs):
        raise TypeError(f"expected a system that reconstructs pictures, got {type(system).__name__}; "
                        "fix: use another sampler")
    columns = []
    for group in system.collate(documents).groups:
        for pair in zip(group, system.reconstruct(group).cpu(), strict=True):
            columns.append(np.concatenate([Image(pixels=x.numpy()).to_uint8() for x in pair]))
    height = max(c.shape[0] for c in columns)
    columns = [np.pad(c, ((0, height - c.shape[0]), (0, 0), (0, 0)), constant_values=255) for c in columns]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.png"
    temporary = path.with_name("." + path.name)
    Pil.fromarray(np.concatenate(columns, 1)).save(temporary, "PNG")
    temporary.replace(path)
