"""Losses of preferred over rejected samples, on their log-likelihoods (n,), without any model.

    h = (log p(w) - log p_ref(w)) - (log p(l) - log p_ref(l))
    sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)                             (DPO, arXiv 2305.18290)
    hinge    max(0, 1 - beta h)                                                                (SLiC, 2305.10425)
    ipo      (h - 1 / (2 beta))^2                                                              (2310.12036)
    orpo     -log p(w) - beta log sigmoid(log odds(w) - log odds(l))      without reference    (2403.07691)
    simpo    -log sigmoid(beta (log p(w) - log p(l)) - margin)            without reference    (2405.14734)

What stands for log p is the generator's business. Texts and codes: sums over tokens or over the bits of next-scale
codes. Diffusion and flow: minus half the mean squared error at one noise and one time, which winner and loser share, so
that beta h = -beta / 2 ((m_w - m_l) - (ref_w - ref_l)) (Diffusion-DPO, 2311.12908). The size of beta follows: 0.1 for
sums over an answer, far less for sums over thousands of bits, 100 to 5000 for means over the elements of a latent.
"""
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from diptych.objectives import next_scale

Kind = Literal["sigmoid", "hinge", "ipo", "orpo", "simpo"]
REFERENCE_FREE = ("orpo", "simpo")
NORMALISED = ("ipo", "orpo", "simpo")  # kinds made for log-likelihoods per token


class Pair(NamedTuple):
    """Log-likelihoods (n,) of the preferred and of the rejected sample."""

    chosen: Tensor
    rejected: Tensor

    @classmethod
    def of(cls, both: Tensor) -> "Pair":
        """From (2 n,), the preferred ones first."""
        if len(both) % 2:
            raise ValueError(f"expected as many preferred as rejected samples, got {len(both)} in all")
        return cls(*both.float().chunk(2))


class Preferred(NamedTuple):
    """Losses (n,) and the rewards (n,) that they stand for, beta (log p - log p_ref), without gradient."""

    losses: Tensor
    chosen: Tensor
    rejected: Tensor

    @property
    def accuracy(self) -> Tensor:
        """Share of pairs whose preferred sample has the larger reward."""
        return (self.chosen > self.rejected).float().mean()

    @property
    def margin(self) -> Tensor:
        return (self.chosen - self.rejected).mean()


@dataclass(frozen=True, kw_only=True)
class Preference:
    """`smoothing` is the share of labels taken to be wrong (sigmoid only), `margin` what simpo asks for. `imitation`
    adds that many times the negative log-likelihood per token of the preferred sample, against which it would fall."""

    kind: Kind = "sigmoid"
    beta: float = 0.1
    smoothing: float = 0.0
    margin: float = 0.5
    imitation: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("sigmoid", "hinge", "ipo", "orpo", "simpo"):
            raise ValueError(f"expected kind sigmoid, hinge, ipo, orpo or simpo, got {self.kind!r}")
        if self.beta <= 0 or not 0 <= self.smoothing < 0.5 or (self.smoothing and self.kind != "sigmoid"):
            raise ValueError(f"expected beta > 0 and a smoothing in [0, 0.5), of sigmoid only, got {self}")

    @property
    def needs_reference(self) -> bool:
        return self.kind not in REFERENCE_FREE

    @property
    def normalised(self) -> bool:
        """Whether log-likelihoods are per token, not sums."""
        return self.kind in NORMALISED

    def __call__(self, policy: Pair, reference: Pair | None = None, nll: Tensor | None = None) -> Preferred:
        """`nll` (n,): negative log-likelihoods per token of the preferred samples, for `imitation`."""
        if (reference is None) == self.needs_reference:
            raise ValueError(f"expected {'a' if self.needs_reference else 'no'} reference for {self.kind}, got "
                             f"{'none' if reference is None else 'one'}")
        if self.imitation and nll is None:
            raise ValueError("expected nll, which imitation is a multiple of, got none")
        base = reference or Pair(*(v.new_zeros(v.shape) for v in policy))
        rewards = [self.beta * (p.float() - r.float().detach()) for p, r in zip(policy, base, strict=True)]
        losses = self._losses(policy, rewards[0] - rewards[1])
        if self.imitation and nll is not None:
            losses = losses + self.imitation * nll
        return Preferred(losses, rewards[0].detach(), rewards[1].detach())

    def _losses(self, policy: Pair, gap: Tensor) -> Tensor:
        """`gap` (n,): beta h."""
        if self.kind == "sigmoid":
            return -(1 - self.smoothing) * F.logsigmoid(gap) - self.smoothing * F.logsigmoid(-gap)
        if self.kind == "hinge":
            return F.relu(1 - gap)
        if self.kind == "ipo":
            return (gap / self.beta - 1 / (2 * self.beta)).square()
        if self.kind == "simpo":
            return -F.logsigmoid(gap - self.margin)
        return -policy.chosen.float() + self.beta * odds_loss(policy)


def odds_loss(policy: Pair) -> Tensor:
    """(n,) -log sigmoid of the log-ratio of odds, p / (1 - p), from log-likelihoods per token (below 0)."""
    odds = [v.float() - (-v.float().expm1()).log() for v in policy]
    return -F.logsigmoid(odds[0] - odds[1])


# -- log-likelihoods --------------------------------------------------------------------------------------------------

def code_log_prob(logits: Tensor, codes: Tensor, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """(n,) of codes (n, L, *s) given logits (n, L, *s, values), s as in `objectives.next_scale`: () for indices, (d,)
    for bits. Summed over positions; over the d bits of a position summed or averaged."""
    each = -next_scale.loss(logits, codes)
    if each.ndim > 2:
        each = each.flatten(2).sum(2) if reduction == "sum" else each.flatten(2).mean(2)
    return each.sum(1)


def error_log_prob(errors: Tensor) -> Tensor:
    """What stands for log-likelihoods (n,) where only squared errors (n,) of a denoiser are known: minus half."""
    return -0.5 * errors.float()


def shared(value: Tensor) -> Tensor:
    """Noise, times or conditions (n, ...) of the pairs for preferred and rejected samples (2 n, ...)."""
    return value.repeat(2, *[1] * (value.ndim - 1))
