"""Embedding prediction: every query says one vector of a target at once, without noise and without order.

    loss      w_2 |e - e'|^2 / d + w_cos (1 - cos(e, e'))          (Nexus-Gen, arXiv 2504.21356; BLIP3-o's MSE arm)
    sampler   one forward pass: the queries are prefilled, since what stands in their place never depends on what was
              said; nothing is drawn
    log-prob  of N(e', std^2 I) around the prediction, for those who explore: with std 0 there is no density

Prefilled autoregression (Nexus-Gen, section 3.2): in training and sampling alike the places of the embeddings hold
learnt queries, so errors cannot add up along the sequence, as they do where predictions are fed back. The expectation
is all that squared error can say: where several pictures fit a text, their mean is drawn. Shape letters: d width of an
embedding, w of a query.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Of the two terms of the loss; cosine distance sees directions only."""

    squared: float = 1.0
    cosine: float = 0.0

    def __post_init__(self) -> None:
        if min(self.squared, self.cosine) < 0 or self.squared + self.cosine == 0:
            raise ValueError(f"expected weights of at least 0, not both 0, got {self.squared} and {self.cosine}")


def losses(prediction: Tensor, target: Tensor, weights: Weights = Weights()) -> Tensor:
    """(..., d), (..., d) -> (...): the weighted sum of both terms per vector, float32. Gradients reach the prediction
    only."""
    if prediction.shape != target.shape:
        raise ValueError(f"expected a prediction of the target's shape {tuple(target.shape)}, "
                         f"got {tuple(prediction.shape)}")
    own, wanted = prediction.float(), target.detach().float()
    error = weights.squared * (own - wanted).square().mean(-1)
    if weights.cosine:
        error = error + weights.cosine * (1 - F.cosine_similarity(own, wanted, dim=-1))
    return error


def prefill(queries: Tensor, embeddings: int) -> Tensor:
    """What stands in the places of so many embeddings, (embeddings, w): queries (m, w) one after the other, again and
    again where there are fewer of them (a single one is a mask token)."""
    if embeddings < 1 or queries.ndim != 2:
        raise ValueError(f"expected queries (m, w) and at least 1 embedding, got {tuple(queries.shape)} and "
                         f"{embeddings}")
    return queries.repeat(-(-embeddings // len(queries)), 1)[:embeddings]


@dataclass(frozen=True)
class Prediction:
    """p(e): a Gaussian around what was said. With std 0 it is deterministic and has no density."""

    mean: Tensor
    std: float = 0.0

    def sample(self, generator: torch.Generator) -> Tensor:
        if self.std == 0:
            return self.mean
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        return self.mean + self.std * noise.to(self.mean)

    def log_prob(self, embedding: Tensor) -> Tensor:
        """(..., d) -> (...) float32 log-density, summed over the d dimensions."""
        if self.std <= 0:
            raise ValueError("expected a stochastic prediction (std > 0) to have a log-prob; fix: sample with std > 0")
        z = (embedding.float() - self.mean.float()) / self.std
        return (-0.5 * z.square() - math.log(self.std) - 0.5 * math.log(2 * math.pi)).sum(-1)


def sample(predict: Callable[[Tensor], Tensor], queries: Tensor, embeddings: int, generator: torch.Generator,
           std: float = 0.0) -> Tensor:
    """Embeddings (embeddings, d) from one forward pass: `predict` maps prefilled places (embeddings, w) to them."""
    return Prediction(predict(prefill(queries, embeddings)), std).sample(generator)
