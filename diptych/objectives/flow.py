"""Rectified flow: path, loss, samplers and the log-prob of a sampling step.

    x_t = (1 - t) noise + t data,   velocity = data - noise,   t: 0 = noise, 1 = data

Released models count noise downwards from 1; `1 - t` is their time. Shapes: x (..., n, d); t scalar or broadcastable.
The stochastic sampler has the marginals of the ODE (Flow-GRPO, arXiv 2505.05470), rewritten for this time:

    s = a sqrt((1 - t) / t),  mean = x (1 - s^2 h / (2 (1 - t))) + v (1 + s^2 t / (2 (1 - t))) h,  std = s sqrt(h)
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Time = float | Tensor
Velocity = Callable[[Tensor, float], Tensor]  # (x, t) -> velocity of the same shape
Shift = Literal["linear", "root"] | float


def shift_time(t: Tensor, shift: float | Tensor) -> Tensor:
    """Move times towards noise: u -> s u / (1 + (s - 1) u) in the noise level u = 1 - t."""
    u = 1 - t
    return 1 - shift * u / (1 + (shift - 1) * u)


def shift_for(tokens: int, shift: Shift) -> float:
    """The shift of a picture of so many latent tokens: a number whatever they are; "linear": exp(m), m growing from 0.5
    at 256 tokens to 1.15 at 4096 (FLUX); "root": sqrt(tokens) / 20 (OmniGen2)."""
    if shift == "root":
        return tokens**0.5 / 20
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)) if shift == "linear" else float(shift)


def grid_time(u: Tensor, steps: int) -> Tensor:
    """Uniform numbers in [0, 1) -> times 0, 1 / steps, ..., 1 - 1 / steps: a grid of noise levels that holds pure noise
    but not pure data (schedulers that index a table of levels)."""
    return (u * steps).floor() / steps


def sample_time(count: int, generator: torch.Generator, *, shift: float = 1.0, mean: float = 0.0,
                std: float = 1.0, steps: int = 0) -> Tensor:
    """(count,) logit-normal training times: the noise level is sigmoid(N(mean, std)), then shifted (BAGEL, SD3). With
    `steps` they are uniform on a grid of so many, then shifted (SANA, Lumina)."""
    if steps:
        return shift_time(grid_time(torch.rand(count, generator=generator, device=generator.device), steps), shift)
    u = torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=generator.device))
    return shift_time(1 - u, shift)


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t; `t` broadcasts against data."""
    return (1 - t) * noise + t * data


def squared_error(prediction: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """(n, d) -> (n,): mean over the d dimensions of (prediction - (data - noise))^2, float32."""
    return (prediction.float() - (data - noise).float()).square().mean(-1)


def schedule(evaluations: int, shift: float = 1.0, start: float = 0.0, end: float | None = None) -> list[float]:
    """The evaluations + 1 times of a sampling run, from `start` (shifted) to 1, evenly, or evenly to `end` (shifted)
    and from there to 1 at once. A release that speaks of N timesteps does N - 1, or asks the network at `end`."""
    if evaluations < 1 or not 0 <= start < 1 or not (end is None or start < end < 1):
        raise ValueError(f"expected at least 1 evaluation, 0 <= start < 1 and start < end < 1, got {evaluations}, "
                         f"{start} and {end}")
    times = torch.linspace(start, 1, evaluations + 1, dtype=torch.float64)
    if end is not None:
        times[:-1] = torch.linspace(start, end, evaluations, dtype=torch.float64)
    times = shift_time(times, shift)
    return times.clamp(0, 1).tolist()  # rounding may leave the interval, in which guidance acts


def euler_step(x: Tensor, velocity: Tensor, t: float, to: float) -> Tensor:
    return x + velocity * (to - t)


def second_order_step(x: Tensor, velocity: Tensor, t: float, to: float,
                      before: tuple[float, Tensor] | None) -> Tensor:
    """One step of DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2, midpoint): an Euler step, which already is its first
    order, plus the change of the expected data since `before` = (its time, the data expected there). The first step has
    none, and the last one, to t = 1, leaves it out."""
    plain = euler_step(x, velocity, t, to)
    if before is None or to >= 1 or before[0] <= 0:
        return plain
    past, now, then = (math.log(s / (1 - s)) for s in (before[0], t, to))  # half the log signal-to-noise ratio
    change = (then - now) / (now - past) * (x + (1 - t) * velocity - before[1])
    return plain + 0.5 * (to - t * (1 - to) / (1 - t)) * change


@dataclass(frozen=True)
class Transition:
    """Gaussian p(x_next | x): mean (..., n, d), std a number or one per sample that broadcasts against it. With std 0
    the step is deterministic and has no density."""

    mean: Tensor
    std: Tensor | float

    def sample(self, generator: torch.Generator) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        return self.at(noise.to(self.mean.device))

    def at(self, noise: Tensor) -> Tensor:
        """The state that standard normal noise (..., n, d) leads to."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """log N(x; mean, std^2) over the last two dimensions (tokens, channels), float32: their mean (Flow-GRPO, whose
        clip range of 1e-4 belongs to it), or their sum, the log-density itself. `x` may come from another policy."""
        std = self._std()
        z = (x.float() - self.mean.float()) / std
        each = -0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)
        return each.mean((-2, -1)) if reduction == "mean" else each.sum((-2, -1))

    def kl(self, other: "Transition") -> Tensor:
        """KL(self || other) of a step with the same std, mean over tokens and channels, float32 (Flow-GRPO, eq. 9)."""
        return ((self.mean.float() - other.mean.float()) / self._std()).square().mean((-2, -1)) / 2

    def _std(self) -> Tensor:
        std = torch.as_tensor(self.std, dtype=torch.float32)
        if bool((std <= 0).any()):
            raise ValueError("expected a stochastic step (std > 0) to have a log-prob; fix: sample with noise > 0")
        return std


def sde_step(x: Tensor, velocity: Tensor, t: Time, to: Time, noise: float, first: Time) -> Transition:
    """One stochastic step in float32. `noise` is `a` above; `first` is the run's second time, which stands in where
    t = 0 would divide by zero. Times are numbers, or tensors that broadcast against x: a step of its own per sample."""
    x, v = x.float(), velocity.float()
    t, to, first = _number(t), _number(to), _number(first)
    level, h = 1 - t, to - t
    s2 = noise**2 * level / torch.where(t > 0, t, first)
    mean = x * (1 - s2 / (2 * level) * h).float() + v * ((1 + s2 * t / (2 * level)) * h).float()
    return Transition(mean, (s2 * h).sqrt().float())


def dance_step(x: Tensor, velocity: Tensor, t: Time, to: Time, noise: float) -> Transition:
    """The step of DanceGRPO (arXiv 2505.07818) in float32: as much noise at every time, and the score, that of the data
    which the velocity expects, corrects the mean.

        mean = x + v h + a^2 / 2 score h,   score = (t (x + (1 - t) v) - x) / (1 - t)^2,   std = a sqrt(h)
    """
    x, v = x.float(), velocity.float()
    t, to = _number(t), _number(to)
    level, h = 1 - t, to - t
    drift = (0.5 * noise**2 * h / level.square()).float()
    mean = x + v * h.float() + drift * (t.float() * (x + level.float() * v) - x)
    return Transition(mean, noise * h.sqrt().float())


def _number(time: Time) -> Tensor:
    """Times as tensors; numbers stay on the CPU, which any device reads, and in double precision."""
    return time if isinstance(time, Tensor) else torch.tensor(time, dtype=torch.float64)


def sample(velocity: Velocity, noise: Tensor, times: list[float]) -> Tensor:
    """Integrate the ODE from noise with Euler steps: the same arithmetic as every other caller of `euler_step`."""
    x = noise
    for t, to in pairwise(times):
        x = euler_step(x, velocity(x, t), t, to)
    return x
