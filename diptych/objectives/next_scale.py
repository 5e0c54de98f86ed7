"""Next-scale prediction: a picture as maps of codes from coarse to fine, all codes of a scale at once (VAR, arXiv
2404.02905; by bits: Infinity, arXiv 2412.04431).

    F_0 = 0,   F_k = F_{k-1} + up(vectors(codes_k))                          (`parts.quantize.ResidualQuantizer`)
    reading    scale k + 1 reads F_k resized to its grid; the first scale reads a start token
               "running": F is kept at the grid of each scale, and resized from one to the next (TokenFlow, 2412.03069)
    loss       cross-entropy of every code, or of every bit of it
    sampling   K passes: the logits of a scale are guided and cut, then all its codes are drawn, apart from each other

Self-correction: training adds changed codes to F (`parts.quantize.flip_bits`). Labels stay the codes that were found,
and those of later scales ask for what then is missing: a model learns to repair.

A scale may be drawn several times: it reads F with the codes it has, and draws all of them anew, with narrower cuts.

Guidance may grow from none at the first scale to all of it at the last (`Guidance.schedule` "linear"; VAR).

Shape letters: b pictures, K scales, L cells of all scales, n of one, c width of a code vector. Codes are (..., *s): s
is () for an index and (d,) for the d bits of a cell.
"""
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diptych.objectives import next_token
from diptych.objectives.guidance import Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.quantize import Grid, ResidualQuantizer, resize, scale_inputs
from diptych.parts.quantize.residual import Change, Resize

Scales = tuple[Grid, ...]
Reading = Resize | Literal["running"]


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


def lesson(quantizer: ResidualQuantizer, features: Tensor, scales: Sequence[Grid], mode: Reading,
           change: Change | None = None) -> Lesson:
    """From feature maps (b, c, h, w). `mode` resizes the sum; `change` is what self-correction does to its codes."""
    out = quantizer(features, scales, change)
    if mode == "running":
        if change is not None:
            raise ValueError("expected no self-correction of a running sum, got changes of its codes")
        return Lesson(out.codes, quantizer.running_inputs(out.codes, scales))
    return Lesson(out.codes, scale_inputs(out.partials, scales, mode))


def loss(logits: Tensor, codes: Tensor) -> Tensor:
    """(..., *s) float32: negative log-likelihoods of codes (..., *s) given logits (..., *s, values)."""
    return next_token.cross_entropy(logits, codes)


# -- sampling ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class How:
    """How one scale is drawn: its guidance, which no longer depends on the scale, and its cuts, those of the first pass
    and of all that come `again`."""

    guidance: Guidance
    codes: TokenSampling
    again: tuple[TokenSampling, ...] = ()


def every_scale(count: int, guidance: Guidance, codes: TokenSampling, again: Sequence[TokenSampling] = ()) -> list[How]:
    """The same for all scales, except that a growing guidance grows from none at the first to all at the last, and that
    the first, which reads no codes, has one pass."""
    return [How(guidance.at(k / max(count - 1, 1)), codes, tuple(again) if k else ()) for k in range(count)]


@dataclass(frozen=True)
class Ask:
    """The sampler asks for the logits of scale number `scale`, whose cells read `inputs` (n, c), None at the first.
    `codes` (cells, *s) are those of the scales before, `turn` counts the passes over this one."""

    scale: int
    inputs: Tensor | None
    codes: Tensor | None = None
    turn: int = 0


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


def uniforms(scales: Sequence[Grid], shape: tuple[int, ...], generator: torch.Generator, again: int = 0
             ) -> list[Tensor]:
    """One number in [0, 1) per decision of a picture, (n, *s) for every pass: one over each scale, and `again` more
    over all but the first."""
    passes = [grid for k, grid in enumerate(scales) for _ in range(1 + again * bool(k))]
    count = sum(rows * columns for rows, columns in passes)
    drawn = torch.rand((count, *shape), generator=generator, device=generator.device, dtype=torch.float64)
    return [drawn[span] for span in spans(passes)]


def sample(quantizer: ResidualQuantizer, scales: Sequence[Grid], mode: Reading, how: Sequence[How],
           uniforms: Sequence[Tensor]) -> Generator[Ask, Mapping[str, Tensor], list[Step]]:
    """Draw one picture. For every `Ask` the caller sends the logits (n, *s, values) of each context of the guidance,
    "full" among them; the last steps of all scales are returned. Uniform numbers (n, *s) per pass choose the codes; at
    temperature 0 the likeliest are taken. Guidance sees as time the share of cells that stand already."""
    passes = sum(1 + len(h.again) for h in how)
    if len(how) != len(scales) or len(uniforms) != passes or how[0].again:
        raise ValueError(f"expected a way to draw each of {len(scales)} scales, the first in one pass, and uniform "
                         f"numbers for all {passes} passes, got {len(how)} and {len(uniforms)}")
    total, steps, numbers = None, list[Step](), iter(uniforms)
    for k, (grid, span) in enumerate(zip(scales, spans(scales), strict=True)):
        before = None if total is None else resize(total, grid, quantizer.config.up if mode == "running" else mode)
        known = torch.cat([step.codes for step in steps]) if steps else None
        read, grown = before, total
        for turn, cuts in enumerate((how[k].codes, *how[k].again)):
            answers = yield Ask(k, None if read is None else read[0].flatten(1).T, known, turn)
            guided = next_token.guide(answers, how[k].guidance, span.start / spans(scales)[-1].stop)
            scores, u = next_token.log_probs(guided, cuts), next(numbers)
            steps[k:] = [Step(next_token.pick(scores, u if cuts.temperature > 0 else None, "scale"), scores)]
            codes = steps[k].codes.unflatten(0, grid)[None]
            if mode == "running":
                read = grown = quantizer.run_on(before, k, codes)
            else:
                grown = quantizer.grow(total, k, codes, scales)
                read = resize(grown, grid, mode)
        total = grown
    return steps
