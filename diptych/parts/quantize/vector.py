"""Every cell of a map replaced once by its nearest code vector (VQ, arXiv 1711.00937; LFQ, arXiv 2310.05737).

    losses: codebook  w mean (q - sg z)^2      moves the code vectors
            commitment  w mean (sg q - z)^2    moves the features
            entropy  w (mean entropy of the assignment - entropy of the mean assignment)

z is the vector as distances see it (normalised where the codebook normalises); sg stops the gradient.
"""
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.quantize.codebook import AnyCodebookConfig, CodebookConfig
from diptych.parts.quantize.codes import CodeLayout, Grid, Quantized


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """A weight of zero leaves the term out: nothing is computed for it."""

    codebook: float = 1.0
    commitment: float = 0.25  # LlamaGen
    entropy: float = 0.0


@dataclass(frozen=True, kw_only=True)
class VectorConfig:
    codebook: AnyCodebookConfig = field(default_factory=CodebookConfig)
    weights: LossWeights = field(default_factory=LossWeights)

    @property
    def width(self) -> int:
        return self.codebook.width

    def build(self) -> "VectorQuantizer":
        return VectorQuantizer(self)


def straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """`value`, whose gradient goes to `gradient` unchanged."""
    return gradient + (value - gradient).detach()


def distance_losses(vectors: Tensor, target: Tensor, weights: LossWeights) -> dict[str, Tensor]:
    """The codebook and commitment terms: mean squares over all elements."""
    losses: dict[str, Tensor] = {}
    if weights.codebook:
        losses["codebook"] = weights.codebook * F.mse_loss(vectors, target.detach())
    if weights.commitment:
        losses["commitment"] = weights.commitment * F.mse_loss(target, vectors.detach())
    return losses


class VectorQuantizer(nn.Module):
    """(b, c, h, w) -> codes (b, h, w), or (b, h, w, bits) of an unpacked sign codebook."""

    def __init__(self, config: VectorConfig):
        super().__init__()
        self.config = config
        self.codebook: Any = config.codebook.build()

    def forward(self, z: Tensor) -> Quantized:
        return self._quantize(z, None)

    def follow(self, z: Tensor, generator: torch.Generator) -> Quantized:
        """The same, and a codebook of moving averages follows."""
        return self._quantize(z, generator)

    def _quantize(self, z: Tensor, generator: torch.Generator | None) -> Quantized:
        x = self.codebook.space(z.movedim(1, -1))
        codes = self.codebook.nearest(x)
        vectors = self.codebook.vectors(codes)
        if generator is not None:
            self.codebook.follow(x, codes, generator)
        losses = distance_losses(vectors, x, self.config.weights)
        if self.config.weights.entropy:
            losses["entropy"] = self.config.weights.entropy * self.codebook.entropy(x)
        return Quantized(codes, straight_through(vectors, x).movedim(-1, 1).to(z.dtype), losses)

    def vectors(self, codes: Tensor) -> Tensor:
        """Codes of any shape -> their vectors (..., c) float32."""
        return self.codebook.vectors(codes)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes of a grid -> (b, c, h, w) float32."""
        return self.codebook.vectors(codes).movedim(-1, 1)

    def layout(self, grid: Grid) -> CodeLayout:
        return CodeLayout(values=self.codebook.values, grids=(grid,), depth=self.codebook.depth)
