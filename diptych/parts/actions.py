"""Actions of a robot as tokens of a language model: numbers in bins, bins as the last ids of the vocabulary, and the
range of a data set that these numbers are fractions of (RT-2, arXiv 2307.15818; OpenVLA, 2406.09246).

Shape letters: d dimensions of an action.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ActionTokenizer:
    """Numbers in [low, high] between `bins` edges, the first and the last at the ends: bin 1 is the id before
    `vocabulary_size`, later bins are lower ids. What lies outside counts as the end; the upper end has a bin of its
    own, which decodes to the centre of the one before it."""

    vocabulary_size: int  # 32000 in OpenVLA, without padding of the embedding
    bins: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= self.vocabulary_size or self.low >= self.high:
            raise ValueError(f"expected 2 <= bins <= vocabulary_size and low < high, got {self}")

    @property
    def ids(self) -> range:
        """All ids that are actions: what sampling is restricted to."""
        return range(self.vocabulary_size - self.bins, self.vocabulary_size)

    def _edges(self) -> np.ndarray:
        return np.linspace(self.low, self.high, self.bins)

    def encode(self, actions: Tensor) -> Tensor:
        """(..., d) -> ids (..., d)."""
        edges = torch.from_numpy(self._edges()).to(actions.device)
        clipped = actions.double().clamp(self.low, self.high)
        return self.vocabulary_size - torch.bucketize(clipped.contiguous(), edges, right=True)

    def decode(self, ids: Tensor) -> Tensor:
        """Ids (..., d) -> centres of their bins (..., d), float64."""
        edges = self._edges()
        centres = torch.from_numpy((edges[:-1] + edges[1:]) / 2).to(ids.device)
        return centres[(self.vocabulary_size - ids - 1).clamp(0, self.bins - 2)]


@dataclass(frozen=True)
class ActionRange:
    """The range `low` to `high` of every dimension in a data set (its 1st and 99th percentile), which becomes [-1, 1];
    dimensions that `scaled` leaves out stay as they are (a gripper)."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    scaled: tuple[bool, ...]

    @classmethod
    def from_published(cls, values: Mapping[str, Sequence[Any]]) -> Self:
        """From `q01`, `q99` and, if given, `mask` of a checkpoint's statistics."""
        return cls(tuple(values["q01"]), tuple(values["q99"]), tuple(values.get("mask", [True] * len(values["q01"]))))

    def __post_init__(self) -> None:
        if not len(self.low) == len(self.high) == len(self.scaled) or any(
                a >= b for a, b, s in zip(self.low, self.high, self.scaled, strict=True) if s):
            raise ValueError(f"expected low < high of as many dimensions each, got {self}")

    def restore(self, fractions: Tensor) -> Tensor:
        """(..., d) in [-1, 1] -> actions (..., d), float64."""
        low, high, scaled = self._tensors(fractions)
        return torch.where(scaled, 0.5 * (fractions.double() + 1) * (high - low) + low, fractions.double())

    def fractions(self, actions: Tensor) -> Tensor:
        """The way back; beyond the range they leave [-1, 1]."""
        low, high, scaled = self._tensors(actions)
        return torch.where(scaled, 2 * (actions.double() - low) / (high - low) - 1, actions.double())

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if like.shape[-1] != len(self.low):
            raise ValueError(f"expected actions of {len(self.low)} dimensions, got {like.shape[-1]}")
        low, high = (torch.tensor(v, dtype=torch.float64, device=like.device) for v in (self.low, self.high))
        return low, high, torch.tensor(self.scaled, device=like.device)
