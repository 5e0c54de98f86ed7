"""Discrete flow: paths between noise and tokens, loss, sampler and the log-prob of a sampling step.

    metric    p_t(x | x1) = softmax_x(-beta_t d(x, x1)),  d = |e(x) - e(x1)|^4 of normalised rows of a frozen table
              beta_t = c (t / (1 - t))^a:  0 at t = 0 (uniform), infinite at t = 1 (x1 itself)
    mixture   p_t(x | x1) = (1 - kappa_t) p_0(x) + kappa_t [x = x1],  p_0 uniform or the mask
    loss      cross-entropy of the clean tokens x1 given x_t
    sampler   draw x1 from the posterior given x_t, then jump from z = x_t to x at the rate u_t(x, z | x1)

The rates have the least symmetric kinetic energy (arXiv 2412.03487), u = [p(z) dp(x) - dp(z) p(x)]_+ / p(z):

    metric    u = p_t(x | x1) dbeta [d(z, x1) - d(x, x1)]_+    only to tokens nearer to x1
    mixture   u = dkappa / (1 - kappa) [x = x1]                once at x1, or once unmasked, a token stays

So a metric path goes on moving tokens towards what the posterior says by then: it corrects itself. FUDOKI (arXiv
2505.20147) uses c = 3, a = 0.9. Time: 0 = noise, 1 = data. A likelihood of whole samples is not known; the joint draw
of (x1, x_next) has a log-prob: that of x1 under the posterior, which alone depends on the network, plus `log_prob`.

Shape letters: n tokens, K vocabulary. All arithmetic is float32 or finer; t is a number or (n,).
"""
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.objectives import next_token

CHUNK = 16384  # vocabulary entries at a time; the largest intermediate is (n, CHUNK)
LARGEST = 1e30  # of beta and its rate: finite, so that 0 * beta stays 0 where t = 1

Time = float | Tensor


def cross_entropy(logits: Tensor, x1: Tensor) -> Tensor:
    """(n, K) logits given x_t, (n,) clean tokens -> (n,) loss; summing or averaging is the caller's."""
    return next_token.cross_entropy(logits, x1)


@dataclass(frozen=True)
class Jumps:
    """How tokens leave their place: the total rates `intensity` (n,) float64, the rates of single targets, and
    `choose(rows, uniform)`: targets (m,) of the tokens `rows` (m,), in proportion to these."""

    intensity: Tensor
    rates: Callable[[], Tensor]  # (n, K) float32, 0 at the current token
    choose: Callable[[Tensor, Tensor], Tensor]


class Path(Protocol):
    @property
    def values(self) -> int:
        """K."""
        ...

    def prior(self, uniform: Tensor) -> Tensor:
        """Tokens at t = 0 from uniform numbers (n,) in [0, 1)."""
        ...

    def corrupt(self, x1: Tensor, t: Time, uniform: Tensor) -> Tensor:
        """x_t ~ p_t(. | x1), one uniform number per token."""
        ...

    def jumps(self, x_t: Tensor, x1: Tensor, t: Time) -> Jumps:
        """The rates of leaving x_t towards x1."""
        ...


def _column(t: Time, like: Tensor) -> Tensor:
    """(n,) float64 times of the tokens `like`."""
    return torch.as_tensor(t, dtype=torch.float64, device=like.device).expand(like.shape)


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The number of cumulated shares of weights (n, K) that are <= uniform (n,): a draw in proportion to them."""
    mass = weights.double().cumsum(-1)
    passed = mass > uniform.to(mass)[:, None] * mass[:, -1:]
    return passed.to(torch.uint8).argmax(-1)


# -- metric path ------------------------------------------------------------------------------------------------------

class MetricPath:
    """The path on a frozen table (K, width). Nothing of size K x K is ever made, nor (n, K) unless asked for."""

    def __init__(self, table: Tensor, c: float = 3.0, a: float = 0.9, chunk: int = CHUNK) -> None:
        if c <= 0 or a <= 0:
            raise ValueError(f"expected c > 0 and a > 0, got c = {c} and a = {a}")
        self.rows = F.normalize(table.detach().float(), dim=-1)
        self.values, self.c, self.a, self.chunk = len(table), c, a, chunk

    def beta(self, t: Time) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return (self.c * (t / (1 - t)).pow(self.a)).clamp_max(LARGEST)

    def beta_rate(self, t: Time) -> Tensor:
        """Its derivative; 0 at t = 0, where it diverges for a < 1: nothing moves before there is a direction."""
        t = torch.as_tensor(t, dtype=torch.float64)
        rate = self.c * self.a * t.pow(self.a - 1) * (1 - t).pow(-self.a - 1)
        return torch.where(t > 0, rate.clamp_max(LARGEST), 0.0)

    def distance(self, x: Tensor, span: slice = slice(None)) -> Tensor:
        """Tokens (n,) -> float32 distances (n, k) in [0, 16] to the vocabulary, or to a span of it."""
        cosine = self.rows[x] @ self.rows[span].T
        d = (2 - 2 * cosine).square()
        first, stop, _ = span.indices(self.values)
        inside = torch.nonzero((x >= first) & (x < stop)).squeeze(1)
        d[inside, x[inside] - first] = 0.0  # exactly: beta may be huge
        return d

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        """(n,) distances of pairs of tokens."""
        d = (2 - 2 * (self.rows[x] * self.rows[y]).sum(-1)).square()
        return d.masked_fill(x == y, 0.0)

    def probs(self, x1: Tensor, t: Time) -> Tensor:
        """p_t(. | x1), (n, K)."""
        return (-self.beta(_column(t, x1))[:, None].float() * self.distance(x1)).softmax(-1)

    def prior(self, uniform: Tensor) -> Tensor:
        return _uniform(uniform, self.values)

    def corrupt(self, x1: Tensor, t: Time, uniform: Tensor) -> Tensor:
        beta = self.beta(_column(t, x1)).float()

        def density(rows: Tensor, span: slice) -> Tensor:
            return torch.exp(-beta[rows, None] * self.distance(x1[rows], span))

        every = torch.arange(len(x1), device=x1.device)
        mass = torch.stack([density(every, s).double().sum(-1) for s in self._spans()], -1)
        return self._draw(density, mass, every, uniform)

    def jumps(self, x_t: Tensor, x1: Tensor, t: Time) -> Jumps:
        t = _column(t, x1)
        beta, speed, away = self.beta(t).float(), self.beta_rate(t), self.between(x_t, x1)

        def flow(rows: Tensor, span: slice, d: Tensor | None = None) -> Tensor:
            d = self.distance(x1[rows], span) if d is None else d
            nearer = torch.exp(-beta[rows, None] * d) * (away[rows, None] - d).clamp_min(0)
            here = torch.arange(self.values, device=x1.device)[span] == x_t[rows, None]
            return nearer.masked_fill(here, 0.0)

        every, total, parts = torch.arange(len(x1), device=x1.device), torch.zeros_like(t), []
        for span in self._spans():
            d = self.distance(x1, span)
            total += torch.exp(-beta[:, None] * d).double().sum(-1)
            parts.append(flow(every, span, d).double().sum(-1))
        mass, scale = torch.stack(parts, -1), speed / total
        return Jumps(mass.sum(-1) * scale, lambda: (flow(every, slice(None)) * scale[:, None]).float(),
                     lambda rows, uniform: self._draw(flow, mass, rows, uniform))

    def _spans(self) -> Iterator[slice]:
        for first in range(0, self.values, self.chunk):
            yield slice(first, min(first + self.chunk, self.values))

    def _draw(self, weights: Callable[[Tensor, slice], Tensor], mass: Tensor, rows: Tensor, uniform: Tensor) -> Tensor:
        """Draw for the tokens `rows` (m,) in proportion to weights whose sums over spans are mass (n, spans): first
        the span, then inside it."""
        mass, out = mass[rows], torch.zeros_like(rows)
        after = mass.cumsum(-1)
        level = uniform.to(mass) * after[:, -1]
        chosen = (after > level[:, None]).to(torch.uint8).argmax(-1)
        left = level - (after - mass).gather(1, chosen[:, None])[:, 0]
        for number, span in enumerate(self._spans()):
            own = torch.nonzero(chosen == number).squeeze(1)
            if len(own):
                out[own] = span.start + invert(weights(rows[own], span), left[own] / mass[own, number])
        return out


def calibrate(table: Tensor, a: float = 0.9, middle: float = 0.5, share: float = 0.9, samples: int = 256) -> float:
    """The c with which at t = `middle` tokens have lost `share` of the mean distance to x1 that noise has, by bisection
    over evenly spaced rows of the table. Distances, not p_t(x1 | x1): tables of few dimensions have near neighbours
    that mean the same, and a c that tells these apart in the middle leaves noise hardly any time. About 3, the paper's,
    for random tables of the sizes of its two."""
    path = MetricPath(table, 1.0, a)
    x = torch.linspace(0, len(table) - 1, min(samples, len(table)), device=table.device).round().long()
    d, scale = path.distance(x).double(), (middle / (1 - middle)) ** a
    noise = float(d.mean())
    if noise < 1e-6 or not 0 < share < 1:
        raise ValueError(f"expected a table of different rows and a share between 0 and 1, got a mean distance of "
                         f"{noise:g} and {share:g}; fix: remove repeated rows, or set c")

    def lost(c: float) -> float:
        return 1 - float((torch.softmax(-c * scale * d, -1) * d).sum(-1).mean()) / noise

    low, high = -20.0, 20.0  # of log c
    for _ in range(60):
        center = (low + high) / 2
        low, high = (center, high) if lost(math.exp(center)) < share else (low, center)
    return math.exp(high)


# -- mixture path -----------------------------------------------------------------------------------------------------

def _uniform(uniform: Tensor, values: int) -> Tensor:
    return (uniform.double() * values).long().clamp_max(values - 1)


@dataclass(frozen=True)
class Polynomial:
    """kappa_t = t^n."""

    n: float = 1.0

    def value(self, t: Tensor) -> Tensor:
        return t.pow(self.n)

    def rate(self, t: Tensor) -> Tensor:
        return self.n * t.pow(self.n - 1)


@dataclass(frozen=True)
class Kinetic:
    """kappa_t = 1 - sin^2((1 - t) w) / sin^2 w, w = arccos sqrt(p_0(x1)): of least kinetic energy for a source that
    gives x1 the probability `source`; sin^2(pi t / 2) for a mask."""

    source: float = 0.0

    def value(self, t: Tensor) -> Tensor:
        w = math.acos(math.sqrt(self.source))
        return 1 - torch.sin((1 - t) * w).square() / math.sin(w) ** 2

    def rate(self, t: Tensor) -> Tensor:
        w = math.acos(math.sqrt(self.source))
        return w * torch.sin(2 * (1 - t) * w) / math.sin(w) ** 2


@dataclass(frozen=True, kw_only=True)
class MixturePath:
    """Between noise and data token by token. `mask`: the id that noise consists of (outside the vocabulary or in it);
    without it, noise is uniform. `divergence_free` >= 0 adds rates that leave the marginals as they are: to x1 and
    back to noise (uniform noise only)."""

    values: int
    mask: int | None = None
    schedule: Polynomial | Kinetic = Polynomial()
    divergence_free: float = 0.0

    def __post_init__(self) -> None:
        if self.divergence_free and self.mask is not None:
            raise ValueError("expected uniform noise with divergence_free, got a mask; fix: leave one of them out")

    def prior(self, uniform: Tensor) -> Tensor:
        if self.mask is not None:
            return torch.full(uniform.shape, self.mask, dtype=torch.long, device=uniform.device)
        return _uniform(uniform, self.values)

    def mix(self, x0: Tensor, x1: Tensor, t: Time, uniform: Tensor) -> Tensor:
        """x_t of given ends: x0 where uniform < 1 - kappa."""
        return torch.where(uniform.to(x1.device) < 1 - self.schedule.value(_column(t, x1)), x0, x1)

    def corrupt(self, x1: Tensor, t: Time, uniform: Tensor) -> Tensor:
        noise = 1 - self.schedule.value(_column(t, x1))
        uniform = uniform.to(noise)
        # where a number falls below the share of noise, its place there is uniform again
        x0 = self.prior((uniform / noise.clamp_min(1e-12)).clamp_max(1 - 1e-12))
        return torch.where(uniform < noise, x0, x1)

    def jumps(self, x_t: Tensor, x1: Tensor, t: Time) -> Jumps:
        t = _column(t, x1)
        kappa, speed = self.schedule.value(t), self.schedule.rate(t)
        # at kappa = 0 it diverges: nothing moves before there is a direction
        back = torch.where(kappa > 0, self.divergence_free * speed / (kappa * (1 - kappa)), 0.0)
        to_data, to_noise = speed / (1 - kappa) + back * kappa, back * (1 - kappa)
        other = (x_t != x1).double()
        every = torch.arange(len(x1), device=x1.device)

        def rates(rows: Tensor = every) -> Tensor:
            u = (to_noise[rows, None] / self.values).expand(-1, self.values).clone()
            u.scatter_add_(1, x1[rows, None], to_data[rows, None])
            here = torch.arange(self.values, device=x1.device) == x_t[rows, None]
            return u.masked_fill(here, 0.0)

        def choose(rows: Tensor, uniform: Tensor) -> Tensor:
            return invert(rates(rows), uniform) if self.divergence_free else x1[rows]

        stay = (x_t < self.values).double()  # a mask outside the vocabulary is no target of its own
        return Jumps(to_data * other + to_noise * (1 - stay / self.values), lambda: rates().float(), choose)

    def velocity(self, logits: Tensor, x_t: Tensor, t: Time) -> Tensor:
        """The marginal velocity (n, K) that the posterior's logits imply, its diagonal included."""
        t = _column(t, x_t)
        factor = self.schedule.rate(t) / (1 - self.schedule.value(t))
        v = logits.float().softmax(-1).double()
        known = (x_t < self.values).double()
        v = v.scatter_add(1, x_t.clamp_max(self.values - 1)[:, None], -known[:, None])
        return (factor[:, None] * v).float()

    def generalized_kl(self, logits: Tensor, x1: Tensor, x_t: Tensor, t: Time) -> Tensor:
        """(n,) terms of the evidence bound: -dkappa / (1 - kappa) (p(x_t) - [x_t = x1] + [x_t != x1] log p(x1))."""
        t = _column(t, x1)
        factor = self.schedule.rate(t) / (1 - self.schedule.value(t))
        logs, same = logits.float().log_softmax(-1), (x_t == x1).float()
        known = (x_t < self.values).float()
        p_here = logs.gather(1, x_t.clamp_max(self.values - 1)[:, None])[:, 0].exp() * known
        return -factor.float() * (p_here - same + (1 - same) * logs.gather(1, x1[:, None])[:, 0])


# -- sampling ---------------------------------------------------------------------------------------------------------

def step(path: Path, x_t: Tensor, x1: Tensor, t: Time, h: float, jump: Tensor, target: Tensor) -> Tensor:
    """One Euler step of length h towards the posterior sample x1: a token leaves with probability 1 - exp(-h u), where
    `jump` (n,) is smaller, and goes where `target` (n,) says; both are uniform numbers."""
    jumps = path.jumps(x_t, x1, t)
    leaving = jump.to(jumps.intensity) < -torch.expm1(-h * jumps.intensity)
    rows = torch.nonzero(leaving).squeeze(1)
    return x_t.index_copy(0, rows, jumps.choose(rows, target.to(x_t.device)[rows])) if len(rows) else x_t


def log_prob(path: Path, x_next: Tensor, x_t: Tensor, x1: Tensor, t: Time, h: float) -> Tensor:
    """(n,) float32 log-probs of the jumps and stays from x_t to x_next of `step`, given x1; -inf where impossible."""
    jumps = path.jumps(x_t, x1, t)
    stay = -h * jumps.intensity
    rate = jumps.rates().gather(1, x_next.clamp_max(path.values - 1)[:, None])[:, 0].double()
    move = torch.log(-torch.expm1(stay)) + torch.log(rate / jumps.intensity.clamp_min(1e-300))
    return torch.where(x_next == x_t, stay, torch.where(jumps.intensity > 0, move, -math.inf)).float()


@dataclass(frozen=True)
class Chance:
    """The uniform numbers of a walk of N steps: of its start (n,), of posterior samples (N, n), of jumps and their
    targets (N - 1, n)."""

    start: Tensor
    posterior: Tensor
    jump: Tensor
    target: Tensor

    @classmethod
    def draw(cls, steps: int, count: int, generator: torch.Generator) -> "Chance":
        u = torch.rand(3 * steps - 1, count, generator=generator, dtype=torch.float64)
        return cls(u[0], *u[1:].split([steps, steps - 1, steps - 1]))


def euler(path: Path, x: Tensor, times: Sequence[float],
          chance: Chance) -> Generator[tuple[Tensor, float], Tensor, Tensor]:
    """The sampler as a coroutine: yields the tokens (n,) and their time, is sent a posterior sample (n,) each time, and
    returns the last one: what the network believes at the end, not the state of the chain. The N + 1 `times` rise from
    the start to the end."""
    for i, t in enumerate(times[:-2]):
        x1 = yield x, t
        x = step(path, x, x1, t, times[i + 1] - t, chance.jump[i], chance.target[i])
    return (yield x, times[-2])
