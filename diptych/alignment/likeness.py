"""Likeness as a loss (UAE, arXiv 2509.09666, its first stage): what a model expects to draw shall look, to a frozen
encoder, like the picture that it is taught.

    L = L_own + w mean (1 - cos(f(x), f(x')))        over noised copies
    x' = D(x_t + (1 - t) v(x_t, t))                  one step to the end of the flow, decoded

The gradient passes the encoder f and the decoder D, which stay as they are. Asked of documents with a full caption and
the picture drawn after it it begins what reinforcement goes on with. That x' is taken in one step is how a training
step can know it; the paper does not say how it is made there.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diptych import config
from diptych.benchmarks.reconstruction import similarities
from diptych.parts.vae import unpatchify
from diptych.systems.base import Losses, System
from diptych.systems.batch import Batch
from diptych.systems.interleaved import Expected, Interleaved
from diptych.training.objectives import Own

TERM = "likeness"


@dataclass(frozen=True, kw_only=True)
class LikenessLoss(Own):
    """`weight` of the term; only copies at a time of `since` or later count: an expectation out of pure noise is a mean
    of everything that the prompt allows."""

    weight: float = 1.0
    since: float = 0.0

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and 0 <= self.since < 1):
            raise ValueError(f"expected weight >= 0 and 0 <= since < 1, got {self.weight} and {self.since}")

    def __call__(self, system: System, batch: Batch, generator: torch.Generator) -> Losses:
        drawing = flowing(system)
        with drawing.expect() as expected:
            losses = drawing.loss(batch, generator)
        known = [e for e in expected if e.time >= self.since]
        if known:
            errors = [self._errors(drawing, batch, [e for e in known if e.grid == grid])
                      for grid in dict.fromkeys(e.grid for e in known)]
            losses.sums[TERM] = torch.cat(errors).sum().to(drawing.device)
            losses.counts[TERM] = torch.tensor(float(len(known)), device=drawing.device)
            losses.weights[TERM] = self.weight
        return losses

    @staticmethod
    def _errors(system: Interleaved, batch: Batch, known: Sequence[Expected]) -> Tensor:
        """(n,) of copies of one grid."""
        latents = unpatchify(torch.stack([e.latents for e in known]).float(), system.latent_patch, known[0].grid)
        made = system.codec.decode(latents).float().clamp(-1, 1)
        true = torch.stack([batch.pictures[e.picture] for e in known])
        return 1 - similarities(true.float(), made)

    def counts(self, system: System, batch: Batch) -> dict[str, float] | None:
        """Of all terms; which copies are late enough only the forward pass knows."""
        if self.since or (found := batch.counts) is None:
            return None
        copies = sum(noised for _, noised in batch.latents)
        return found | ({TERM: float(copies)} if copies else {})


def prepare(system: System, options: Mapping[str, Any]) -> LikenessLoss:
    """As a recipe asks for it (`training.objectives`)."""
    loss = config.from_dict(LikenessLoss, options, where="options of the objective likeness")
    flowing(system)
    return loss


def flowing(system: System) -> Interleaved:
    if not isinstance(system, Interleaved):
        raise ValueError("expected a system that draws latents by flow inside its sequence, got "
                         f"{type(system).__name__}; fix: bagel and its like, or no objective likeness")
    return system
