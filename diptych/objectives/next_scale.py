"""Next-scale prediction: a picture as maps of codes from coarse to fine, all codes of a scale at once (VAR, arXiv
2404.02905; by bits: Infinity, arXiv 2412.04431).

    F_0 = 0,   F_k = F_{k-1} + up(vectors(codes_k))                          (`parts.quantize.ResidualQuantizer`)
    reading    scale k + 1 reads F_k resized to its grid; the first scale reads a start token
    loss       cross-entropy of every code, or of every bit of it
    sampling   K passes: the logits of a scale are guided and cut, then all its codes are drawn, apart from each other

Self-correction: training adds changed codes to F (`parts.quantize.flip_bits`). Labels stay the codes that were found,
and those of later scales ask for what then is missing: a model learns to repair.

Guidance may grow from none at the first scale to all of it at the last (`Guidance.schedule` "linear"; VAR).

Shape letters: b pictures, K scales, L cells of all scales, n of one, c width of a code vector. Codes are (..., *s): s
is () for an index and (d,) for the d bits of a cell.
"""
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diptych.objectives import next_token
from diptych.objectives.guidance import Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.quantize import Grid, ResidualQuantizer, resize, scale_inputs
from diptych.parts.quantize.residual import Change, Resize

Scales = tuple[Grid, ...]


# -- scales -----------------------------------------------------------------------------------------------------------

def scales_for(base: Sequence[Grid], grid: Grid) -> Scales:
    """As many scales as `base` in its proportions, the last of which is `grid`: pictures of another size."""
    rows, columns = base[-1]
    return tuple((max(1, round(r * grid[0] / rows)), max(1, round(c * grid[1] / columns))) for r, c in base)


def spans(scales: Sequence[Grid]) -> list[slice]:
    """Where the cells of each scale stand among the L cells."""
    out, start = [], 0
    for rows, columns in scales:
        out.append(slice(start, start + rows * columns))
        start += rows * columns
    return out


# -- training ---------------------------------------------------------------------------------------------------------

class Lesson(NamedTuple):
    """`codes` (b, L, *s) to predict, and what the cells of all scales but the first read: `inputs` (b, L - n_1, c)."""

    codes: Tensor
    inputs: Tensor


def lesson(quantizer: ResidualQuantizer, features: Tensor, scales: Sequence[Grid], mode: Resize,
           change: Change | None = None) -> Lesson:
    """From feature maps (b, c, h, w). `mode` resizes the sum; `change` is what self-correction does to its codes."""
    out = quantizer(features, scales, change)
    return Lesson(out.codes, scale_inputs(out.partials, scales, mode))


def loss(logits: Tensor, codes: Tensor) -> Tensor:
    """(..., *s) float32: negative log-likelihoods of codes (..., *s) given logits (..., *s, values)."""
    return next_token.cross_entropy(logits, codes)


# -- sampling ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class How:
    """How one scale is drawn: its guidance, which no longer depends on the scale, and its cuts."""

    guidance: Guidance
    codes: TokenSampling


def every_scale(count: int, guidance: Guidance, codes: TokenSampling) -> list[How]:
    """The same for all scales, except that a growing guidance grows from none at the first to all at the last."""
    return [How(guidance.at(k / max(count - 1, 1)), codes) for k in range(count)]


@dataclass(frozen=True)
class Ask:
    """The sampler asks for the logits of scale number `scale`, whose cells read `inputs` (n, c), None at the first.
    `codes` (cells, *s) are those of the scales before."""

    scale: int
    inputs: Tensor | None
    codes: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What one scale became: codes (n, *s) drawn from log-probs (n, *s, values)."""

    codes: Tensor
    scores: Tensor

    @property
    def log_probs(self) -> Tensor:
        """(n, *s) float32, of the codes; those of a scale are independent given the scales before."""
        return log_prob(self.scores, self.codes)


def log_prob(scores: Tensor, codes: Tensor) -> Tensor:
    """Log-probs (n, *s) float32 of codes (n, *s) under the log-probs (n, *s, values) that a step draws from."""
    return scores.float().gather(-1, codes[..., None])[..., 0]


def uniforms(scales: Sequence[Grid], shape: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    """One number in [0, 1) per decision of a picture, (n, *s) for every scale."""
    count = sum(rows * columns for rows, columns in scales)
    drawn = torch.rand((count, *shape), generator=generator, device=generator.device, dtype=torch.float64)
    return [drawn[span] for span in spans(scales)]


def sample(quantizer: ResidualQuantizer, scales: Sequence[Grid], mode: Resize, how: Sequence[How],
           uniforms: Sequence[Tensor]) -> Generator[Ask, Mapping[str, Tensor], list[Step]]:
    """Draw one picture. For every `Ask` the caller sends the logits (n, *s, values) of each context of the guidance,
    "full" among them; the steps of all scales are returned. Uniform numbers (n, *s) per scale choose the codes; at
    temperature 0 the likeliest are taken. Guidance sees as time the share of cells that stand already."""
    if not len(how) == len(uniforms) == len(scales):
        raise ValueError(f"expected a way to draw and uniform numbers for each of {len(scales)} scales, "
                         f"got {len(how)} and {len(uniforms)}")
    total, steps = None, list[Step]()
    for k, (grid, span) in enumerate(zip(scales, spans(scales), strict=True)):
        inputs = None if total is None else resize(total, grid, mode)[0].flatten(1).T
        answers = yield Ask(k, inputs, torch.cat([step.codes for step in steps]) if steps else None)
        guided = next_token.guide(answers, how[k].guidance, span.start / spans(scales)[-1].stop)
        scores = next_token.log_probs(guided, how[k].codes)
        codes = next_token.choose(scores, uniforms[k] if how[k].codes.temperature > 0 else None)
        steps.append(Step(codes, scores))
        total = quantizer.grow(total, k, codes.unflatten(0, grid)[None], scales)
    return steps
