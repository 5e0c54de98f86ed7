"""Features of a vision tower in the place of a codec's latents: what is drawn are a few semantic vectors, and a decoder
of their own turns them into pixels (BLIP3-o, arXiv 2505.09568, section 2).

    latent = scale * pool(tower(x))     x' = D(latent / scale)

The tower is frozen. D learns from true features by itself; features are used raw unless `scale` says otherwise.
Shape letters: b batch, d width of the tower, h and w pixels.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.parts.towers import AnyTowerConfig, build_tower, features_of
from diptych.parts.vae import LatentCodec
from diptych.parts.vqgan import Decoder, PyramidConfig


@dataclass(frozen=True, kw_only=True)
class FeatureCodecConfig:
    """`pool` x `pool` neighbours become one vector, their mean. `mean` and `std` of pixels in [0, 1], as the tower
    wants them. Without a `decoder` features can be drawn but not shown."""

    tower: AnyTowerConfig
    pool: int = 4
    decoder: PyramidConfig | None = None
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # lists come from JSON and YAML
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.decoder is not None and self.downsample % self.decoder.downsample:
            raise ValueError(f"expected a decoder that enlarges by a divisor of {self.downsample}, got "
                             f"{self.decoder.downsample}; fix: change channel_mult of the decoder")

    @property
    def latent_channels(self) -> int:
        return self.tower.width

    @property
    def downsample(self) -> int:
        """Pixels per vector, along one side."""
        return self.tower.patch * self.pool

    def build(self) -> "FeatureCodec":
        return FeatureCodec(self)


class FeatureCodec(LatentCodec):
    """Pictures (b, 3, h, w) in [-1, 1] -> features (b, d, h / downsample, w / downsample) -> pictures."""

    def __init__(self, config: FeatureCodecConfig) -> None:
        super().__init__()
        c = self.config = config
        self.tower = build_tower(c.tower)
        if c.decoder is not None:  # rearranged pixels make up for what the decoder does not enlarge
            self.decoder = Decoder(c.decoder, c.latent_channels, 3 * (c.downsample // c.decoder.downsample) ** 2)

    def features(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, d, rows, columns), before pooling."""
        c = self.config
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % c.downsample or images.shape[3] % c.downsample:
            raise ValueError(f"expected images of shape (b, 3, h, w) with h, w multiples of {c.downsample}, "
                             f"got {tuple(images.shape)}; fix: resize the pictures")
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (c.mean, c.std))
        x = (((images.float() + 1) / 2 - mean) / std).to(next(self.tower.parameters()).dtype)
        return features_of(self.tower, x)

    def latent(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pooled features; there is nothing to draw."""
        return F.avg_pool2d(self.features(images), self.config.pool) * self.config.scale

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures from pooled features; values are not clipped."""
        c = self.config
        if c.decoder is None:
            raise ValueError("expected a codec with a decoder to show features, got none; fix: set codec.decoder and "
                             "train it")
        return F.pixel_shuffle(self.decoder(latent / c.scale), c.downsample // c.decoder.downsample)
