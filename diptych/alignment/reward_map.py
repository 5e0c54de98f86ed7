"""Reward-weighted flow matching of SRUM (arXiv 2510.12784): scores of regions become a map over the picture, the map
weights over its latent tokens, and those weigh the squared errors of a velocity.

    paper_signed   R(p) = alpha s_i of the last region i that covers p, 0 where none does;  alpha = (g + 1) / 2
    released       R(p) = alpha max(1/2, (s_i + 1) / 2 of the regions that cover p)
    L = mean R e + lambda mean e_ref,     e = |v - (data - noise)|^2,  e_ref the same towards a reference picture

s in [-1, 1] are the scores of regions, g that of the whole. Released maps lie in [0, 1]: a bad region counts as much as
the background, and since the reference is the picture itself, every token has a weight in [lambda, 1 + lambda]. A
signed map pushes away from bad regions. Without a bound that loss falls for ever, so weights are held at -lambda or
above where the reference is the picture itself (then all factors are at least 0), and at MARGIN lambda more where it is
another one (then the square of v keeps a positive factor).
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["paper_signed", "released"]
LAMBDA = 0.5  # table 5 of the paper: the best of the sweep
MARGIN = 0.1  # of lambda
BoxPixels = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Region:
    """A box, xyxy in pixels (the second corner is outside), and what the judge says of it."""

    box: BoxPixels
    score: float
    name: str = ""
    reason: str = ""


def clip_box(box: Sequence[Any], size: tuple[int, int]) -> BoxPixels | None:
    """Four numbers cut to whole pixels inside a picture (height, width); None if they are no box or none is inside."""
    try:
        x0, y0, x1, y1 = (math.trunc(float(v)) for v in box)
    except (TypeError, ValueError, OverflowError):
        return None
    x0, x1, y0, y1 = max(x0, 0), min(x1, size[1]), max(y0, 0), min(y1, size[0])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def reward_map(regions: Sequence[Region], overall: float, size: tuple[int, int], mode: Mode = "released") -> Tensor:
    """(height, width) float32. Regions are painted in order: in a signed map later ones cover earlier ones, so smaller
    ones belong at the end. Scores are taken as they are."""
    if mode not in ("paper_signed", "released"):
        raise ValueError(f"expected mode paper_signed or released, got {mode!r}")
    out = torch.full(size, 0.0 if mode == "paper_signed" else 0.5)
    for region in regions:
        box = clip_box(region.box, size)
        if box is None:
            continue
        x0, y0, x1, y1 = box
        part = out[y0:y1, x0:x1]
        part.copy_(torch.full_like(part, region.score) if mode == "paper_signed" else
                   part.clamp_min((region.score + 1) / 2))
    return out * ((overall + 1) / 2)


def token_map(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map (height, width) on a grid of tokens, row by row (n,): bilinear, pixel centres."""
    return F.interpolate(pixels[None, None].float(), grid, mode="bilinear", align_corners=False).flatten()


def bounded(weights: Tensor, strength: float, *, apart: bool = False) -> Tensor:
    """Weights that keep the loss above a bound, given lambda; `apart`: the reference is another picture."""
    return weights.clamp_min((MARGIN if apart else 0.0) * strength - strength)


class Weighted(NamedTuple):
    """total = reward + lambda * reference."""

    total: Tensor
    reward: Tensor
    reference: Tensor


def weighted_loss(velocity: Tensor, data: Tensor, noise: Tensor, weights: Tensor | None, strength: float = LAMBDA,
                  reference: Tensor | None = None) -> Weighted:
    """Of velocities (n, d) of latent tokens at their targets data - noise, with a weight for each (n,), None: all 1
    and no reference. `reference` (n, d): latents of another picture that the velocity shall not leave. Signed weights
    are to be `bounded` first."""
    error = (velocity.float() - (data - noise).float()).square().mean(-1)
    if weights is None:
        return Weighted(error.mean(), error.mean(), error.new_zeros(()))
    apart = error if reference is None else (velocity.float() - (reference - noise).float()).square().mean(-1)
    reward, kept = (weights * error).mean(), apart.mean()
    return Weighted(reward + strength * kept, reward, kept)


def factors(weights: Tensor, strength: float = LAMBDA) -> Tensor:
    """What a token's error counts where the reference is the picture itself: R + lambda, never below 0. For a system
    that takes factors on the errors of its tokens (`collate(documents, emphasis)`); those of codes weigh cross-entropy
    the same way."""
    return bounded(weights, strength) + strength
