"""What every system offers: three verbs, a config with three sizes, and a folder on disk.

    loss(batch, generator) -> Losses        named terms, each with its own token count
    generate(documents, recipe) -> documents with their targets filled in
    score(documents) -> StepLogProbs        log-prob of every decision

Everything above systems (trainer, engine, alignment, benchmarks, server) uses only these.
"""
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diptych.document import Document


@dataclass
class Losses:
    """Sums over tokens with their counts, so that means stay exact when packed, accumulated or sharded.

    total = sum_k weights[k] * sums[k] / counts[k]. Sums and counts are scalar float32 tensors.
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    weights: dict[str, float]

    def mean(self) -> dict[str, Tensor]:
        return {k: s / self.counts[k].clamp_min(1) for k, s in self.sums.items()}

    def total(self, counts: Mapping[str, Tensor] | None = None) -> Tensor:
        """The scalar to minimise. Pass the counts of the whole (accumulated, sharded) step for exact reduction."""
        counts = self.counts if counts is None else counts
        terms = [self.weights[k] * s / counts[k].clamp_min(1) for k, s in self.sums.items()]
        return torch.stack(terms).sum()


@dataclass
class StepLogProbs:
    """Log-probs (float32) of the decisions of each document, in order, with what kind of decision each was."""

    values: list[Tensor]
    kinds: list[list[str]] = field(default_factory=list)


class System(nn.Module):
    """One paper. Subclasses set `Config` and implement the verbs."""

    Config: ClassVar[type]
    config: Any

    def collate(self, documents: Sequence[Document]) -> Any:
        """Documents -> batch (CPU tensors, picklable, has `.to(device)`). Runs in data workers."""
        raise TypeError(f"{type(self).__name__} does not train on documents")

    def loss(self, batch: Any, generator: torch.Generator) -> Losses:
        raise TypeError(f"{type(self).__name__} has no loss")

    def generate(self, documents: Sequence[Document], recipe: Any = None, **kwargs: Any) -> list[Document]:
        raise TypeError(f"{type(self).__name__} does not generate documents")

    def score(self, documents: Sequence[Document], **kwargs: Any) -> StepLogProbs:
        raise TypeError(f"{type(self).__name__} has no decisions to score")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def num_parameters(self, *, trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    def describe(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "config": dataclasses.asdict(self.config)}
