"""A map replaced by a sum of code vectors, each looked up for what the ones before left over.

    F_0 = 0,  r = z;   for k = 1..K:   code_k = nearest(down(r)),   q_k = phi_k(up(vectors(code_k))),
                                       F_k = F_{k-1} + q_k,         r = r - q_k

All steps at the map's own size: residual quantization (RQ-VAE, arXiv 2203.01941; VILA-U, UniFork). Step k on a grid of
its own, coarse to fine: multi-scale residual quantization (VAR, arXiv 2404.02905; TokenFlow, Infinity). What the losses
compare (`compare`), and hence the way of the gradient, is

    sum    F_k with z after every step; the straight-through value is F_K             (VAR, RQ-VAE)
    step   vectors(code_k) with down(r) in every step; each is straight-through by itself     (TokenFlow, Infinity)

and the mean over the steps is taken. Shape letters: b batch, c width, h and w cells.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.quantize.codebook import AnyCodebookConfig, CodebookConfig
from diptych.parts.quantize.codes import CodeLayout, Grid, Quantized
from diptych.parts.quantize.vector import LossWeights, distance_losses, straight_through

Resize = Literal["area", "bicubic", "bilinear", "nearest"]
Change = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """phi(x) = (1 - ratio) x + ratio conv(x). `count` convolutions: step k of K takes the one whose tick is nearest to
    k / (K - 1), with ticks spread evenly (VAR: share_quant_resi)."""

    count: int = 4
    ratio: float = 0.5
    kernel: int = 3


@dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """Either `depth` steps at the map's size or one step per entry of `scales`, the last of which is the map's size.

    `shared`: all steps look into one codebook. `up`, `down`: how maps change size (trilinear with one frame: bilinear).
    """

    codebook: AnyCodebookConfig = field(default_factory=CodebookConfig)
    depth: int = 0
    scales: tuple[Grid, ...] = ()
    shared: bool = True
    down: Resize = "area"
    up: Resize = "bicubic"
    mix: MixConfig | None = None
    compare: Literal["sum", "step"] = "sum"
    weights: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple((int(h), int(w)) for h, w in self.scales))
        if bool(self.depth) == bool(self.scales):
            raise ValueError(f"expected either depth or scales, got depth {self.depth} and scales {self.scales}")

    @property
    def width(self) -> int:
        return self.codebook.width

    @property
    def steps(self) -> int:
        return self.depth or len(self.scales)

    def build(self) -> "ResidualQuantizer":
        return ResidualQuantizer(self)


def resize(x: Tensor, grid: Grid, mode: Resize) -> Tensor:
    """(b, c, h, w) to another grid; a map of that size stays as it is."""
    if tuple(x.shape[2:]) == tuple(grid):
        return x
    return F.interpolate(x, size=grid, mode=mode)


class Mix(nn.Module):
    """One of a few convolutions, blended with its input: (b, c, h, w) -> same."""

    def __init__(self, config: MixConfig, width: int):
        super().__init__()
        self.config = config
        self.convs = nn.ModuleList(nn.Conv2d(width, width, config.kernel, padding=config.kernel // 2)
                                   for _ in range(config.count))

    def which(self, step: int, steps: int) -> int:
        """The convolution of one step; ticks lie at the middle of equal parts, of thirds for four (VAR)."""
        n = self.config.count
        start = 1 / 3 / n if n == 4 else 1 / 2 / n
        # In these very operations: at 10 scales some steps lie halfway between ticks, and rounding decides.
        gap = (1 - start - start) / max(n - 1, 1)
        ticks = [i * gap + start for i in range(n - 1)] + [1 - start] if n > 1 else [start]
        at = step / max(steps - 1, 1)
        return min(range(n), key=lambda i: abs(ticks[i] - at))

    def forward(self, x: Tensor, step: int, steps: int) -> Tensor:
        conv: Any = self.convs[self.which(step, steps)]
        mixed = F.conv2d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), padding=self.config.kernel // 2)
        return x * (1 - self.config.ratio) + mixed * self.config.ratio


class ResidualQuantizer(nn.Module):
    """(b, c, h, w) -> codes (b, h, w, depth), or (b, positions) over all scales, with a last dimension for bits."""

    def __init__(self, config: ResidualConfig):
        super().__init__()
        self.config = config
        self.codebooks: Any = nn.ModuleList(config.codebook.build()
                                            for _ in range(1 if config.shared else config.steps))
        self.mix = Mix(config.mix, config.width) if config.mix else None

    @property
    def codebook(self) -> Any:
        """The codebook of the first step, which is that of all if they share it."""
        return self.codebooks[0]

    def codebook_of(self, step: int) -> Any:
        return self.codebooks[0 if self.config.shared else step]

    def forward(self, z: Tensor, scales: Sequence[Grid] | None = None, change: Change | None = None) -> Quantized:
        """`scales` other than the config's: of another resolution, or with one left out. `change(step, codes)` gives
        the codes whose vectors are added in place of the ones found; those found are returned (labels that repair)."""
        return self._walk(z, scales, change, None)

    def follow(self, z: Tensor, generator: torch.Generator) -> Quantized:
        """The same, and codebooks of moving averages follow, step by step: a later step searches the moved rows."""
        return self._walk(z, None, None, generator)

    def _walk(self, z: Tensor, scales: Sequence[Grid] | None, change: Change | None,
              generator: torch.Generator | None) -> Quantized:
        c, size = self.config, (z.shape[2], z.shape[3])
        grids = self._grids(size, scales)
        codes, partials, losses = [], [], []
        with torch.autocast(z.device.type, enabled=False):  # sums of small differences: float32 throughout
            whole = z.float()
            rest = whole.detach() if c.compare == "sum" else whole
            total = torch.zeros_like(rest)
            for k, grid in enumerate(grids):
                book = self.codebook_of(k)
                x = book.space(resize(rest, grid, c.down).movedim(1, -1))
                found = book.nearest(x)
                vectors = book.vectors(found if change is None else change(k, found))
                if generator is not None:
                    book.follow(x, found, generator)
                added = vectors if c.compare == "sum" else straight_through(vectors, x)
                added = self._raise(added, k, len(grids), size)
                total, rest = total + added, rest - added.detach()
                codes.append(found)
                partials.append(total)
                terms = distance_losses(*((total, whole) if c.compare == "sum" else (vectors, x)), c.weights)
                if c.weights.entropy:
                    terms["entropy"] = c.weights.entropy * book.entropy(x)
                losses.append(terms)
        value = straight_through(total, whole) if c.compare == "sum" else total
        means = {name: torch.stack([terms[name] for terms in losses]).mean() for name in losses[0]}
        joined = torch.stack(codes, 3) if c.depth else torch.cat([code.flatten(1, 2) for code in codes], 1)
        return Quantized(joined, value.to(z.dtype), means, tuple(partials))

    def _grids(self, size: Grid, scales: Sequence[Grid] | None) -> list[Grid]:
        if self.config.depth:
            if scales is not None:
                raise ValueError(f"expected no scales with depth {self.config.depth}, got {list(scales)}")
            return [size] * self.config.depth
        if scales is None and self.config.scales[-1] != size:
            raise ValueError(f"expected a map of {self.config.scales[-1]} cells for scales {list(self.config.scales)}, "
                             f"got {size}; fix: pass the scales for this resolution")
        return [(int(h), int(w)) for h, w in (self.config.scales if scales is None else scales)]

    def _raise(self, vectors: Tensor, step: int, steps: int, size: Grid) -> Tensor:
        """Vectors (b, rows, columns, c) of one step -> what they add to the map."""
        x = resize(vectors.movedim(-1, 1), size, self.config.up)
        return x if self.mix is None else self.mix(x, step, steps)

    def step_codes(self, codes: Tensor, scales: Sequence[Grid] | None = None) -> list[Tensor]:
        """Codes as this quantizer gives them -> per step (b, rows, columns), with a last dimension for bits. Codes of
        the first steps only are allowed: a preview."""
        if self.config.depth:
            return list(codes.unbind(3))
        grids, count = list(self.config.scales if scales is None else scales), 0
        for k, (rows, columns) in enumerate(grids):
            count += rows * columns
            if count == codes.shape[1]:
                return CodeLayout(values=self.codebook.values, grids=tuple(grids[:k + 1])).split(codes)
        raise ValueError(f"expected codes of the first scales of {grids}, {count} positions for all, "
                         f"got {codes.shape[1]}")

    def partial_maps(self, codes: Tensor, scales: Sequence[Grid] | None = None) -> list[Tensor]:
        """The sum of code vectors after each step, (b, c, h, w) float32."""
        maps: list[Tensor] = []
        for k, part in enumerate(self.step_codes(codes, scales)):
            maps.append(self.grow(maps[-1] if maps else None, k, part, scales))
        return maps

    def grow(self, total: Tensor | None, step: int, codes: Tensor, scales: Sequence[Grid] | None = None) -> Tensor:
        """The sum of code vectors (b, c, h, w) float32 before a step (None at the first) with those of its codes
        (b, rows, columns), which have a last dimension for bits."""
        grids = self.config.scales if scales is None else scales
        steps, size = (self.config.depth, codes.shape[1:3]) if self.config.depth else (len(grids), grids[-1])
        added = self._raise(self.codebook_of(step).vectors(codes), step, steps, (int(size[0]), int(size[1])))
        return added if total is None else total + added

    def vectors(self, codes: Tensor) -> Tensor:
        """The vector of every single code (..., c) float32. Codes of any shape, but (..., depth) where every depth has
        a codebook of its own."""
        if self.config.shared:
            return self.codebook.vectors(codes)
        if self.config.scales:
            raise ValueError("expected codebooks that are shared, got one per scale; fix: use step_codes, codebook_of")
        return torch.stack([self.codebook_of(d).vectors(part) for d, part in enumerate(codes.unbind(-1))], -2)

    def lookup(self, codes: Tensor, scales: Sequence[Grid] | None = None) -> Tensor:
        """Codes -> the sum of their vectors, (b, c, h, w) float32."""
        return self.partial_maps(codes, scales)[-1]

    def running_inputs(self, codes: Tensor, scales: Sequence[Grid] | None = None, again: int | None = None) -> Tensor:
        """What a next-scale model reads when the sum itself is resized from scale to scale (TokenFlow), where
        `scale_inputs` resizes it from the full size: (b, all but the first scale's positions, c). The positions of
        scale `again` hold its own codes as well, so that they can be drawn once more."""
        parts, inputs = self.step_codes(codes, scales), []
        total = self.run_on(None, 0, parts[0])
        for k, part in enumerate(parts[1:], 1):
            before = resize(total, (part.shape[1], part.shape[2]), self.config.up)
            total = self.run_on(before, k, part)
            inputs.append((total if k == again else before).flatten(2).transpose(1, 2))
        return torch.cat(inputs, 1)

    def run_on(self, before: Tensor | None, step: int, codes: Tensor) -> Tensor:
        """The sum at the size of one step: what was before (b, c, rows, columns), resized to it, and the vectors of its
        codes (b, rows, columns)."""
        own = self.codebook_of(step).vectors(codes).movedim(-1, 1)
        return own if before is None else before + own

    def layout(self, grid: Grid, scales: Sequence[Grid] | None = None) -> CodeLayout:
        grids, book = self._grids(grid, scales), self.codebook
        if self.config.depth:
            return CodeLayout(values=book.values, grids=(grid,), depth=self.config.depth * book.depth)
        return CodeLayout(values=book.values, grids=tuple(grids), depth=book.depth)


def scale_inputs(maps: Sequence[Tensor], scales: Sequence[Grid], mode: Resize) -> Tensor:
    """What a next-scale model reads: the sum after scale k resized to scale k + 1, (b, all but the first
    scale's positions, c)."""
    resized = [resize(total, grid, mode) for total, grid in zip(maps[:len(scales) - 1], scales[1:], strict=True)]
    return torch.cat([x.flatten(2).transpose(1, 2) for x in resized], 1)


def flip_bits(uniforms: Sequence[Tensor], strengths: Sequence[float]) -> Change:
    """Self-correction (Infinity, section 3.3): bits (..., d) of step k turn over where uniforms[k] < strengths[k];
    later steps are left alone. The labels stay what they were found to be, so a model learns to repair."""
    def change(step: int, bits: Tensor) -> Tensor:
        if step >= len(strengths):
            return bits
        turned = uniforms[step].reshape(bits.shape).to(bits.device) < strengths[step]
        return torch.where(turned, 1 - bits, bits)
    return change


def draw_flips(layout: CodeLayout, steps: int, batch: int, strongest: float, generator: torch.Generator) -> Change:
    """Random flips for the first `steps` scales: one strength per scale from 0, 0.01, ..., `strongest` (one draw for a
    batch, as in the paper), and a uniform per bit."""
    levels = int(100 * strongest) + 1
    device = generator.device
    strengths = (torch.randint(levels, (steps,), generator=generator, device=device) * 0.01).tolist()
    uniforms = [torch.rand((batch, rows, columns, layout.depth), generator=generator, device=device)
                for rows, columns in layout.grids[:steps]]
    return flip_bits(uniforms, strengths)
