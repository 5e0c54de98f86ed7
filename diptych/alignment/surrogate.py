"""Losses of policies on log-probs, without any model: clipped surrogates, distances to a reference, entropies, values.

    r = exp(log p - log p_old),   l = max(-A r, -A clip(r, 1 - low, 1 + high))                   (PPO, arXiv 1707.06347)
    dual clip    l = min(l, -A dual)  where A < 0                                                     (arXiv 1912.09729)
    decoupled    r and the clip around a proximal policy, times exp(log p_prox - log p_old)          (arXiv 2110.00641)

Every function gives one number per decision (a token, a flow step, an action); `reduce` makes a scalar of them, and the
way it does belongs to the coefficient beside it: the same beta means different things under different reductions.
Losses are minimised; a positive advantage raises its decision's probability. All in float32. "..." are any dimensions,
the first of which counts trajectories.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.objectives import next_token
from diptych.objectives.flow import Transition
from diptych.objectives.next_token import TokenSampling

Reduction = Literal["token", "sequence", "sequence_sum", "all"]
Estimator = Literal["k1", "k2", "k3", "abs"]
Metrics = dict[str, Tensor]


# -- reductions -------------------------------------------------------------------------------------------------------

def reduce(values: Tensor, mask: Tensor | None, reduction: Reduction, weights: Tensor | None = None) -> Tensor:
    """Values (n, ...) -> a scalar. `mask` (bool, broadcasts) says which count, `weights` scale them first.

    "token"         mean of all that count: long trajectories weigh more (DAPO)
    "sequence"      mean of each trajectory, mean over trajectories (GRPO; those of which nothing counts are left out)
    "sequence_sum"  sum of each trajectory, mean over trajectories: what the policy gradient says
    "all"           sum of what counts divided by the number of all entries, a fixed length (RLinf with weights of
                    `length_weights`; Dr. GRPO)
    """
    values = values.float() if weights is None else values.float() * weights
    counts = torch.ones_like(values) if mask is None else mask.expand_as(values).float()
    values = torch.where(counts > 0, values, 0.0)  # what does not count may be infinite
    if reduction == "token":
        return values.sum() / counts.sum().clamp_min(1)
    if reduction == "all":
        return values.mean()
    if reduction not in ("sequence", "sequence_sum"):
        raise ValueError(f"expected reduction token, sequence, sequence_sum or all, got {reduction!r}")
    sums, counts = values.flatten(1).sum(1), counts.flatten(1).sum(1)
    if reduction == "sequence_sum":
        return sums.mean()
    return (sums / counts.clamp_min(1)).sum() / (counts > 0).sum().clamp_min(1)


def length_weights(lengths: Tensor, longest: int) -> Tensor:
    """longest / length, with which every trajectory weighs the same under the reduction "all"."""
    return longest / lengths.clamp_min(1).float()


# -- the surrogate ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Clip:
    """`low` and `high` bound the ratio at 1 - low and 1 + high, `dual` the loss of a bad decision that became likely;
    `log_ratio` clamps the log-ratio before, for what is a sum over many tokens."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    log_ratio: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.low < 0 or self.high < 0 or (self.dual is not None and self.dual <= 1):
            raise ValueError(f"expected low and high >= 0 and dual > 1, got {self.low}, {self.high} and {self.dual}")


def surrogate(log_prob: Tensor, old: Tensor, advantages: Tensor, clip: Clip, mask: Tensor | None = None) -> Tensor:
    """(...) clipped losses. `old` are log-probs of the policy that acted (or the proximal one), without gradient;
    advantages broadcast. Where the mask is False the ratio is taken as 1: padding may hold any numbers."""
    ratio, limited = _ratios(log_prob, old, clip, mask)
    loss = torch.maximum(-advantages * ratio, -advantages * limited)
    if clip.dual is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * clip.dual), loss)


def _ratios(log_prob: Tensor, old: Tensor, clip: Clip, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    log_ratio = log_prob.float() - old.float().detach()
    if mask is not None:
        log_ratio = torch.where(mask, log_ratio, 0.0)
    if clip.log_ratio is not None:
        log_ratio = log_ratio.clamp(*clip.log_ratio)
    ratio = log_ratio.exp()
    return ratio, ratio.clamp(1 - clip.low, 1 + clip.high)


@torch.no_grad()
def metrics(log_prob: Tensor, old: Tensor, advantages: Tensor, clip: Clip, mask: Tensor | None = None,
            reduction: Reduction = "token") -> Metrics:
    """What to watch beside the loss; `reduction` as there.

    `ratio`, `ratio_gap` |r - 1|, `ratio_clipped`; shares `above` and `below` of ratios outside the bounds, `clipped`
    of decisions whose clipped loss is the larger one, `dual`, and `ratio_dual`, what these add to the mean of ratios;
    `kl_k1` and `kl_k2`, estimates of KL(old || new).
    """
    ratio, limited = _ratios(log_prob, old, clip, mask)
    log_ratio = ratio.log()
    plain, bounded = -advantages * ratio, -advantages * limited
    dual = torch.zeros_like(ratio)
    if clip.dual is not None:
        dual = ((advantages < 0) & (-advantages * clip.dual < torch.maximum(plain, bounded))).float()
    found = {"ratio": ratio, "ratio_gap": (ratio - 1).abs(), "ratio_clipped": limited,
             "above": ratio - 1 > clip.high, "below": 1 - ratio > clip.low, "clipped": plain < bounded, "dual": dual,
             "ratio_dual": dual * ratio, "kl_k1": -log_ratio, "kl_k2": 0.5 * log_ratio.square()}
    return {name: reduce(value, mask, reduction) for name, value in found.items()}


# -- old rollouts -----------------------------------------------------------------------------------------------------

def proximal_log_prob(log_prob: Tensor, old: Tensor, versions: Tensor, current: float) -> Tensor:
    """Log-probs (...) of a policy between the one that acted and the one that learns, without gradient: all the way but
    one update of the `current - versions` that lie between them. Versions below 0 are unknown: the one that acted."""
    behind = current - versions.float()
    share = torch.where((versions >= 0) & (behind > 0), (behind - 1) / behind.clamp_min(1e-12), 0.0)
    return (old.float() + share * (log_prob.float() - old.float())).detach()


def behaviour_weights(proximal: Tensor, old: Tensor, threshold: float | None = None) -> tuple[Tensor, Tensor]:
    """exp(proximal - old) (...), by which decoupled losses are scaled, without gradient, and which decisions count:
    those whose weight does not exceed the threshold."""
    weights = (proximal.float() - old.float()).exp().detach()
    return weights, torch.ones_like(weights, dtype=torch.bool) if threshold is None else weights <= threshold


# -- distances and entropies ------------------------------------------------------------------------------------------

def kl(log_prob: Tensor, reference: Tensor, estimator: Estimator, clamp: float | None = None) -> Tensor:
    """(...) estimates of KL(policy || reference) from log-probs of what the policy drew, with d = reference - policy:

    k1 -d, unbiased and of either sign;  k2 d^2 / 2;  k3 exp(d) - d - 1, unbiased and never negative;  abs |d|
    (http://joschu.net/blog/kl-approx.html). `clamp` bounds d on both sides; there is no gradient beyond.
    """
    d = reference.float() - log_prob.float()
    d = d if clamp is None else d.clamp(-clamp, clamp)
    if estimator == "k3":
        return d.exp() - d - 1
    if estimator not in ("k1", "k2", "abs"):
        raise ValueError(f"expected estimator k1, k2, k3 or abs, got {estimator!r}")
    return -d if estimator == "k1" else d.abs() if estimator == "abs" else 0.5 * d.square()


def flow_kl(step: Transition, reference: Transition, duration: Tensor | float,
            variant: Literal["paper", "released"] = "paper") -> Tensor:
    """(...) distance of two flow steps from one state: their exact KL ("paper"), or the square of the gap over twice
    the rate of the noise, smaller by the `duration` of the step, which the released beta = 0.04 belongs to."""
    exact = step.kl(reference)
    return exact if variant == "paper" else exact * torch.as_tensor(duration, dtype=torch.float32).reshape(
        exact.shape if isinstance(duration, Tensor) and duration.ndim else ())


def token_log_probs(logits: Tensor, ids: Tensor, sampling: TokenSampling | None = None) -> Tensor:
    """Log-probs (...) of ids (...) under logits (..., vocabulary): of the softmax, or of what `sampling` draws from."""
    if sampling is None:
        return -next_token.cross_entropy(logits, ids)
    return next_token.log_probs(logits, sampling).gather(-1, ids[..., None])[..., 0]


def entropy(logits: Tensor) -> Tensor:
    """(..., vocabulary) -> (...) in nats; entries of -inf are left out."""
    scores = logits.float().log_softmax(-1)
    return -(scores.exp() * torch.where(scores.isinf(), 0.0, scores)).sum(-1)


# -- values -----------------------------------------------------------------------------------------------------------

def value_loss(values: Tensor, old: Tensor, returns: Tensor, *, delta: float, clip: float) -> Tensor:
    """(...) Huber losses of values: the larger one of the value as it is and moved by at most `clip` from that of the
    policy that acted. Quadratic up to `delta`, linear behind."""
    values, old, returns = values.float(), old.float(), returns.float()
    moved = old + (values - old).clamp(-clip, clip)
    return torch.maximum(*(F.huber_loss(v, returns, reduction="none", delta=delta) for v in (values, moved)))
