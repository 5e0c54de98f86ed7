"""Denoising diffusion with learned variance: schedule, loss, respacing, ancestral sampling, log-prob of a chain.

    x_k = sqrt(a_k) data + sqrt(1 - a_k) noise,   a_k = prod (1 - beta),   k = 0 .. K - 1
    loss = mean (eps - noise)^2 + bits of q(x_{k-1} | x_k, data) under the model, whose mean is detached there

DDPM (arXiv 2006.11239) with the cosine schedule and the learned range of variances of improved DDPM (2102.09672,
eq. 15-17), unscaled as DiT and MAR train it. Steps count noise, as published: k = 0 lies next to data. A network maps
x (n, d) at steps (n,) or (1,) to (n, 2 d): the noise, then where the log-variance lies between its two bounds.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]  # (x, original steps) -> (n, 2 d)

BIN = 1 / 255  # half the width of a level of 8-bit pixels in [-1, 1], to which the likelihood at k = 0 refers


def cosine_betas(steps: int, cap: float = 0.999) -> Tensor:
    """(steps,) float64: a(u) = cos^2((u + 0.008) / 1.008 pi / 2), beta = 1 - a(u + 1 / steps) / a(u)."""
    level = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - level[1:] / level[:-1]).clamp_max(cap)


def scaled_linear_betas(steps: int, start: float, end: float) -> Tensor:
    """(steps,) float64 whose roots are evenly spaced (latent diffusion, arXiv 2112.10752)."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()


def respace(steps: int, counts: Sequence[int]) -> list[int]:
    """The steps that a shorter run visits: `steps` in equal sections, `counts[i]` evenly strided ones of section i."""
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"expected 1 to {size} steps in section {i} of {steps} steps, got {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):  # summed up as published: the rounding of ties depends on it
            kept.append(start + round(place))
            place += stride
        start += size
    return kept


@dataclass(frozen=True)
class Transition:
    """p(x_next | x): a diagonal Gaussian, mean and std like x (n, d). With std 0 it is deterministic."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """(n,) float32 log-density, summed over the d dimensions."""
        if not bool((self.std > 0).all()):
            raise ValueError("expected a stochastic step (std > 0) to have a log-prob; fix: leave out the last step")
        z = (x.float() - self.mean) / self.std
        return (-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


class Diffusion:
    """A schedule. `betas` (K,) float64; `steps` the original step of each k, which is what a network is told."""

    def __init__(self, betas: Tensor, steps: Sequence[int] | None = None) -> None:
        self.betas = betas
        self.steps = list(range(len(betas))) if steps is None else list(steps)
        self.level = torch.cumprod(1 - betas, 0)  # a_k
        before = torch.cat((torch.ones(1, dtype=torch.float64), self.level[:-1]))
        variance = betas * (1 - before) / (1 - self.level)
        log_variance = torch.cat((variance[1:2], variance[1:])).log() if len(betas) > 1 else betas.log()
        self.tables = {  # in double precision until looked up: 1 - a_k loses digits
            "signal": self.level.sqrt(), "noise": (1 - self.level).sqrt(),
            "unscale": self.level.rsqrt(), "unnoise": (1 / self.level - 1).sqrt(),
            "from_data": betas * before.sqrt() / (1 - self.level),
            "from_x": (1 - before) * (1 - betas).sqrt() / (1 - self.level),
            "log_low": log_variance, "log_high": betas.log(),
        }

    @classmethod
    def cosine(cls, steps: int = 1000) -> "Diffusion":
        return cls(cosine_betas(steps))

    def respaced(self, counts: Sequence[int]) -> "Diffusion":
        """The schedule that visits `respace(K, counts)` only, with betas that keep a_k at those steps."""
        kept = respace(len(self.betas), counts)
        level = self.level[kept]
        before = torch.cat((torch.ones(1, dtype=torch.float64), level[:-1]))
        return Diffusion(1 - level / before, [self.steps[k] for k in kept])

    def look_up(self, name: str, k: Tensor) -> Tensor:
        """(n, 1) float32 values of a table at steps k (n,)."""
        return self.tables[name].float().to(k.device)[k][:, None]

    def add_noise(self, data: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """x_k of data and noise (n, d) at steps k (n,)."""
        return self.look_up("signal", k) * data + self.look_up("noise", k) * noise

    def moments(self, x: Tensor, output: Tensor, k: Tensor, limit: float | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (n, d) of p(x_{k-1} | x_k). `limit` clips the data that the noise implies: networks
        that are not sure of the noise at the first steps otherwise throw the chain far out."""
        epsilon, fraction = output.float().chunk(2, -1)
        low, high = self.look_up("log_low", k), self.look_up("log_high", k)
        fraction = (fraction + 1) / 2
        data = self.look_up("unscale", k) * x - self.look_up("unnoise", k) * epsilon
        data = data if limit is None else data.clamp(-limit, limit)
        mean = self.look_up("from_data", k) * data + self.look_up("from_x", k) * x
        return mean, fraction * high + (1 - fraction) * low

    def losses(self, output: Tensor, data: Tensor, noise: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What the network said at `add_noise(data, noise, k)` -> squared error of the noise and variational term in
        bits per dimension, each (n,), means over d, float32. The second one trains the variance only."""
        data, noise = data.float(), noise.float()
        epsilon, fraction = output.float().chunk(2, -1)
        x = self.add_noise(data, noise, k)
        mean, log_variance = self.moments(x, torch.cat((epsilon.detach(), fraction), -1), k)
        wanted = self.look_up("from_data", k) * data + self.look_up("from_x", k) * x
        log_wanted = self.look_up("log_low", k)
        kl = 0.5 * (log_variance - log_wanted - 1 + (log_wanted - log_variance).exp()
                    + (wanted - mean).square() * (-log_variance).exp())
        nats = torch.where(k[:, None] == 0, -_binned_log_prob(data, mean, 0.5 * log_variance), kl)
        return (epsilon - noise).square().mean(-1), nats.mean(-1) / math.log(2)

    def transition(self, network: Network, x: Tensor, k: int, *, temperature: float = 1.0,
                   limit: float | None = None) -> Transition:
        """The step from x_k (n, d) towards data; the last one (k = 0) takes the mean. `temperature` scales noise."""
        output = network(x, torch.tensor([self.steps[k]], device=x.device))
        mean, log_variance = self.moments(x, output, torch.tensor([k], device=x.device), limit)
        return Transition(mean, (0.5 * log_variance).exp() * (temperature if k else 0.0))

    def path(self, network: Network, noise: Tensor, step_noise: Tensor, *, temperature: float = 1.0,
             limit: float | None = None) -> Tensor:
        """Ancestral sampling from x = noise (n, d) with the noise of every step, (K, n, d), in the order of use; the
        last one is not used. All states (K + 1, n, d), the first is `noise`, the last the sample."""
        if step_noise.shape != (len(self.steps), *noise.shape):
            raise ValueError(f"expected step noise of shape {(len(self.steps), *noise.shape)}, "
                             f"got {tuple(step_noise.shape)}")
        states = [noise.float()]
        for k, z in zip(reversed(range(len(self.steps))), step_noise, strict=True):
            step = self.transition(network, states[-1], k, temperature=temperature, limit=limit)
            states.append(step.sample(z))
        return torch.stack(states)

    def log_prob(self, network: Network, path: Tensor, *, temperature: float = 1.0,
                 limit: float | None = None) -> Tensor:
        """(n,) log-density of the states of a path (K + 1, n, d) given its first one. The last step has no noise and
        hence no density: it is left out."""
        out = torch.zeros(path.shape[1], device=path.device)
        for i, k in enumerate(range(len(self.steps) - 1, 0, -1)):
            step = self.transition(network, path[i], k, temperature=temperature, limit=limit)
            out = out + step.log_prob(path[i + 1])
        return out


def _normal_cdf(x: Tensor) -> Tensor:
    """The approximation by tanh that published models were trained with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _binned_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of the 8-bit level around x under N(mean, std^2); the outermost levels take the tails."""
    inverse = (-log_std).exp()
    above, below = _normal_cdf(inverse * (x - mean + BIN)), _normal_cdf(inverse * (x - mean - BIN))
    inside = (above - below).clamp_min(1e-12).log()
    outside = torch.where(x > 0.999, (1 - below).clamp_min(1e-12).log(), inside)
    return torch.where(x < -0.999, above.clamp_min(1e-12).log(), outside)
