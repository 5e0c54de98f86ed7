"""Masked tokens: discrete codes in random order, many at once (MaskGIT, arXiv 2202.04200; Show-o, arXiv 2408.12528).

    training   t ~ U(0, 1), hide max(1, round(N cos(pi t / 2))) of N codes; cross-entropy of the hidden, in place
    sampling   step s of T: draw every hidden code, keep the surest, hide max(1, floor(N cos(pi / 2 (s + 1) / T))) again
    surest     by log p(drawn) + temperature_s * Gumbel; the last step keeps all

`variant` "paper" lets the temperature of the order fall linearly to 0 and computes the schedule exactly; "released"
multiplies the temperature by 1 - (s + 1) / T once more at every step, and its float32 schedule is one short where the
cosine comes out just below a rational number (N = 256 at two thirds: 127). Time for guidance: the share that is known.

Shape letters: N codes of a picture, V values of a code. A hidden code reads V, the value after the last.
"""
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from diptych.objectives import next_token
from diptych.objectives.decisions import Options, decide
from diptych.objectives.next_token import TokenSampling

Variant = Literal["paper", "released"]
Ask = tuple[Tensor, float, Tensor | None]  # what the network shall read, the share known, the best guess so far
TINY = 1e-20  # under logarithms of uniform numbers


# -- training ---------------------------------------------------------------------------------------------------------

def mask_share(t: Tensor) -> Tensor:
    """The share of codes to hide at t in [0, 1]: all of them at 0."""
    return torch.cos(t * math.pi * 0.5)


def hide(t: Tensor, uniforms: Tensor) -> Tensor:
    """(..., N) bool: the hidden places for t (...) and uniform numbers (..., N), at least one."""
    return hide_share(mask_share(t), uniforms)


def hide_share(share: Tensor, uniforms: Tensor) -> Tensor:
    """As `hide`, for the share of codes to hide (...)."""
    count = (uniforms.shape[-1] * share).round().clamp(min=1)
    return uniforms.argsort(-1) < count[..., None]


def cover(codes: Tensor, hidden: Tensor, values: int) -> Tensor:
    """Codes (..., N) as the network reads them."""
    return codes.masked_fill(hidden, values)


def corrupt(blocks: Sequence[Tensor], drawn: Sequence[bool], values: int, generator: torch.Generator,
            share: float | None = None) -> tuple[Tensor, Tensor]:
    """Codes of several pictures (n_i,) -> what the network reads in their place (n,), and which codes of the drawn ones
    are hidden (m,): of each a share of its own, unless it is given."""
    shown, hidden = [], []
    for block, asked in zip(blocks, drawn, strict=True):
        if asked:
            t = torch.rand((1,), generator=generator, device=generator.device)[0]
            uniforms = torch.rand((len(block),), generator=generator, device=generator.device)
            own = hide(t, uniforms) if share is None else hide_share(torch.full_like(t, share), uniforms)
            hidden.append(own.to(block.device))
            block = cover(block, hidden[-1], values)
        shown.append(block)
    none = torch.zeros(0, dtype=torch.bool, device=blocks[0].device)
    return torch.cat(shown), torch.cat([none, *hidden])


def loss(logits: Tensor, codes: Tensor) -> Tensor:
    """(m,) float32: negative log-likelihoods of hidden codes (m,), each given the logits (m, V) in its own place."""
    return next_token.cross_entropy(logits, codes)


# -- sampling ---------------------------------------------------------------------------------------------------------

def schedule(tokens: int, hidden: int, steps: int, variant: Variant = "paper") -> list[int]:
    """How many of the `hidden` among `tokens` codes are hidden again after each step: fewer every time while there is a
    choice, at least one. The last entry has no effect: what the last step draws stays."""
    if steps < 1:
        raise ValueError(f"expected at least 1 step, got {steps}")
    counts = []
    for step in range(steps):
        share = math.cos(math.pi / 2 * (step + 1) / steps)
        if variant == "released":
            share = float(torch.cos(torch.tensor((step + 1) / steps) * math.pi * 0.5))
        else:
            share += 1e-12  # floor(N * 0.5) shall not fall below N / 2 for the last bit of the cosine
        hidden = max(1, min(hidden - 1, math.floor(tokens * share)))
        counts.append(hidden)
    return counts


def temperatures(start: float, steps: int, variant: Variant = "paper") -> list[float]:
    """How much chance there is in the order at each step; none in the last."""
    out, running = [], start
    for step in range(steps):
        left = 1 - (step + 1) / steps
        running = running * left if variant == "released" else start * left
        out.append(running)
    return out


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers in [0, 1)."""
    return -(-(uniforms.clamp(min=TINY)).log()).clamp(min=TINY).log()


@dataclass(frozen=True)
class Step:
    """One step: `drawn` (N,) codes of all places, as they were where they are known, and which are hidden again."""

    drawn: Tensor
    remasked: Tensor

    def codes(self, values: int) -> Tensor:
        """What the network reads next."""
        return cover(self.drawn, self.remasked, values)


def reveal(scores: Tensor, codes: Tensor, uniforms: Tensor | None, noise: Tensor, left: int,
           temperature: float) -> Step:
    """Draw the hidden ones of codes (N,) from log-probs (N, V) with uniform numbers (N,) (None: the likeliest), and
    hide the `left` least sure again; `noise` (N,) is Gumbel noise. Of equally sure ones the first is hidden."""
    hidden = codes == scores.shape[-1]
    drawn = torch.where(hidden, next_token.choose(scores, uniforms), codes)
    sure = scores.gather(-1, drawn[:, None])[:, 0] + temperature * noise.to(scores)
    rank = sure.masked_fill(~hidden, math.inf).argsort(stable=True).argsort()
    return Step(drawn, rank < left)


def fill(x: Tensor, uniforms: Tensor, order: Tensor, values: int, sampling: TokenSampling, temperature: float,
         variant: Variant = "paper", log: list[Step] | None = None) -> Generator[Ask, Tensor, Tensor]:
    """The sampler as a coroutine: yields codes (N,) for the network to read, is sent logits (N, V), and returns codes
    with none hidden; those of x that are known stay (inpainting). Uniform numbers (T, N) choose codes and, through
    Gumbel noise of the `temperature`, their `order`; T is the number of steps. `log` collects them."""
    total, drawn = len(uniforms), None
    left = schedule(len(x), int((x == values).sum()), total, variant)
    heat = temperatures(temperature, total, variant)
    for k in range(total):
        logits = yield x, 1 - int((x == values).sum()) / len(x), drawn
        scores, last = next_token.log_probs(logits, sampling), k == total - 1
        chance = uniforms[k] if sampling.temperature > 0 else None
        step = decide("masked code", partial(reveal, scores, x, chance, gumbel(order[k]), left[k], heat[k]),
                      partial(_revealed, scores, x, values, last), options=partial(_options, scores, x, values, last))
        if log is not None:
            log.append(step)
        x, drawn = step.codes(values), step.drawn
    return x if drawn is None else drawn


def _revealed(scores: Tensor, x: Tensor, values: int, last: bool, step: Step) -> Tensor:
    return log_prob(scores, x, step.drawn if last else step.codes(values), values)


def _options(scores: Tensor, x: Tensor, values: int, last: bool, step: Step) -> Options:
    after = step.drawn if last else step.codes(values)
    cells = torch.nonzero((x == values) & (after != values)).squeeze(1)
    return Options(after[cells], scores[cells], cells)


def log_prob(scores: Tensor, before: Tensor, after: Tensor, hidden: int | None = None) -> Tensor:
    """Log-probs (m,) float32 of the codes that a step revealed, hidden in `before` (N,) and not in `after` (N,), under
    the log-probs (N, V) it drew from. The choice of places, which those codes and the noise decide, is left out. A
    hidden code reads V unless told otherwise."""
    hidden = scores.shape[-1] if hidden is None else hidden
    revealed = (before == hidden) & (after != hidden)
    return scores[revealed].float().gather(-1, after[revealed][:, None])[:, 0]
