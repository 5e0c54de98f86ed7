"""Masked autoregression: sets of continuous tokens in random order, each token drawn by a small diffusion network.

    p(x) = prod over sets S_1, S_2, ... of prod_{i in S_j} p(x_i | z_i(x of all earlier sets))

Training hides a share of the tokens, at least 0.7 of them, and asks for those; sampling reveals few tokens at first
and many at last (MAR, arXiv 2406.11838). z_i is what the network that saw the revealed tokens says about place i; the
head turns it into the noise and variance of `objectives.diffusion`. Time for guidance: the share of revealed tokens.

Shape letters: N tokens of a picture, m tokens that are asked for, d width of a token, w width of a condition.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.objectives.diffusion import Diffusion, Network

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (m, d), steps (m,) or (1,), conditions (m, w) -> (m, 2 d)
Guide = Callable[[Sequence[Tensor]], Tensor]  # noise (m, d) as every context predicts it -> noise to use


# -- which tokens are hidden ------------------------------------------------------------------------------------------

def mask_ratio(uniform: Tensor, minimum: float = 0.7, std: float = 0.25) -> Tensor:
    """Share of hidden tokens: the quantile of N(1, std^2), truncated to [minimum, 1], at `uniform` in [0, 1]."""
    low = torch.special.ndtr(torch.tensor((minimum - 1) / std, dtype=torch.float64, device=uniform.device))
    return (1 + std * torch.special.ndtri(low + uniform.double() * (0.5 - low))).clamp(minimum, 1.0)


def random_order(uniforms: Tensor) -> Tensor:
    """(..., N) uniform numbers -> permutations of the N places. Tokens are revealed from the end of an order."""
    return uniforms.argsort(-1)


def hide(order: Tensor, count: int) -> Tensor:
    """(..., N) bool: the first `count` places of each order are hidden."""
    first = torch.arange(order.shape[-1], device=order.device) < count
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, first.expand_as(order))


def schedule(tokens: int, iterations: int) -> list[int]:
    """Hidden tokens after each iteration: floor(N cos(pi / 2 k / iterations)), always fewer than before and at least
    one (so with more iterations than tokens some reveal nothing), none after the last."""
    if iterations < 1:
        raise ValueError(f"expected at least 1 iteration, got {iterations}")
    counts = [tokens]
    for k in range(1, iterations):
        wanted = math.floor(tokens * math.cos(math.pi / 2 * k / iterations))
        counts.append(max(1, min(counts[-1] - 1, wanted)))
    return [*counts[1:], 0]


# -- training ---------------------------------------------------------------------------------------------------------

def terms(head: Head, diffusion: Diffusion, data: Tensor, conditions: Tensor, k: Tensor,
          noise: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error and variational term, each (m,), of tokens data (m, d) at steps k (m,) with noise (m, d)."""
    output = head(diffusion.add_noise(data, noise, k), k, conditions)
    return diffusion.losses(output, data, noise, k)


def loss(head: Head, diffusion: Diffusion, data: Tensor, conditions: Tensor, generator: torch.Generator,
         copies: int = 4) -> tuple[Tensor, Tensor]:
    """(m,) float32 each: the means of the two terms over `copies` draws of step and noise per token. They are told
    apart because the second one has rare, huge values: at the noisiest step the smallest error is far off the data."""
    shape, device = (len(data), copies), generator.device
    k = (torch.rand(shape, generator=generator, device=device) * len(diffusion.steps)).long().to(data.device)
    noise = torch.randn((*shape, data.shape[1]), generator=generator, device=device).to(data.device)
    error, bits = terms(head, diffusion, data.float().repeat_interleave(copies, 0),
                        conditions.repeat_interleave(copies, 0), k.flatten(), noise.flatten(0, 1))
    return error.unflatten(0, shape).mean(1), bits.unflatten(0, shape).mean(1)


# -- sampling ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Set:
    """Tokens to draw together. `conditions` (m, w) in every context, the full one first; `noise` (m, d) is where all
    chains start; `step_noise` (K, m, d); `guide` combines the contexts' noise, the variance is that of the first."""

    conditions: Sequence[Tensor]
    noise: Tensor
    step_noise: Tensor
    guide: Guide
    temperature: float = 1.0


def draw(head: Head, diffusion: Diffusion, sets: Sequence[Set], limit: float | None = None) -> list[Tensor]:
    """The chains (K + 1, m, d) of several sets, run together; the last state of each is the sample."""
    groups: dict[float, list[int]] = {}
    for i, s in enumerate(sets):
        groups.setdefault(s.temperature, []).append(i)
    out: dict[int, Tensor] = {}
    for temperature, numbers in groups.items():
        chosen = [sets[i] for i in numbers]
        path = diffusion.path(network(head, chosen), torch.cat([s.noise for s in chosen]),
                              torch.cat([s.step_noise for s in chosen], 1), temperature=temperature, limit=limit)
        out |= zip(numbers, path.split([len(s.noise) for s in chosen], 1), strict=True)
    return [out[i] for i in range(len(sets))]


def log_prob(head: Head, diffusion: Diffusion, of: Set, path: Tensor, limit: float | None = None) -> Tensor:
    """(m,) log-density of a chain that `draw` made, given its starting noise. The order being uniform, the choice of
    the set itself adds a constant, which is left out; so is the last, noiseless step."""
    return diffusion.log_prob(network(head, [of]), path, temperature=of.temperature, limit=limit)


def mean_log_prob(head: Head, diffusion: Diffusion, of: Set, path: Tensor, limit: float | None = None) -> Tensor:
    """The same per step and dimension (m,): of whole chains, ratios of densities are too far from 1 to learn by."""
    return log_prob(head, diffusion, of, path, limit) / (max(len(path) - 2, 1) * path.shape[-1])


def network(head: Head, sets: Sequence[Set]) -> Network:
    """The head under guidance, for the tokens of all sets one after the other."""
    conditions = torch.cat([c for s in sets for c in s.conditions])
    sizes = [len(s.noise) for s in sets]

    def output(x: Tensor, k: Tensor) -> Tensor:
        repeated = [part for part, s in zip(x.split(sizes), sets, strict=True) for _ in s.conditions]
        answers = iter(head(torch.cat(repeated), k, conditions).float().split([len(part) for part in repeated]))
        guided = []
        for s in sets:
            own = [next(answers).chunk(2, -1) for _ in s.conditions]
            guided.append(torch.cat((s.guide([epsilon for epsilon, _ in own]), own[0][1]), -1))
        return torch.cat(guided)

    return output
