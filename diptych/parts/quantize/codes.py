"""What quantizers hand out: codes in a layout, the quantized map, loss terms, and figures of a codebook's health."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]  # rows, columns


class Quantized(NamedTuple):
    """A feature map (b, c, h, w) after quantization.

    `codes` int64: (b, h, w) or (b, h, w, depth) of one grid, (b, positions) or (b, positions, depth) of several.
    `vectors` (b, c, h, w): the code vectors in value, the features in gradient (straight-through).
    `losses`: named float32 scalars with their weights applied; training adds them up.
    `partials`: for quantizers that go in steps, the sum of code vectors after each, (b, c, h, w) float32.
    """

    codes: Tensor
    vectors: Tensor
    losses: dict[str, Tensor]
    partials: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CodeLayout:
    """The codes of one picture: `depth` codes, each one of `values`, at every cell of one or several grids.

    One grid: raster codes, or a 1-D sequence as (1, n). Several grids: scales, coarse to fine, each in raster order.
    Depth: residual levels, or, with two values, the bits of a cell, the most significant first.
    """

    values: int
    grids: tuple[Grid, ...]
    depth: int = 1

    @property
    def positions(self) -> int:
        """Cells of all grids together."""
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def count(self) -> int:
        """Codes of one picture: all depths at all positions."""
        return self.positions * self.depth

    @property
    def bits(self) -> float:
        """Information of one picture's codes at most."""
        return self.count * math.log2(self.values)

    def flatten(self, codes: Tensor) -> Tensor:
        """Codes as a quantizer gives them -> (b, positions, depth)."""
        if codes.shape[0] * self.count != codes.numel():
            raise ValueError(f"expected {self.count} codes per picture ({len(self.grids)} grids, depth {self.depth}), "
                             f"got shape {tuple(codes.shape)}")
        return codes.reshape(codes.shape[0], self.positions, self.depth)

    def split(self, codes: Tensor) -> list[Tensor]:
        """Codes (b, positions, ...) -> one tensor (b, rows, columns, ...) per grid."""
        sizes = [rows * columns for rows, columns in self.grids]
        if codes.shape[1] != sum(sizes):
            raise ValueError(f"expected {sum(sizes)} positions for grids {list(self.grids)}, got {codes.shape[1]}")
        return [part.unflatten(1, grid) for part, grid in zip(codes.split(sizes, 1), self.grids, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([part.flatten(1, 2) for part in parts], 1)

    def scale_ids(self, device: torch.device | None = None) -> Tensor:
        """The grid that each position belongs to, (positions,)."""
        return torch.cat([torch.full((rows * columns,), i, device=device)
                          for i, (rows, columns) in enumerate(self.grids)])


class Health(NamedTuple):
    """How a codebook is used by a sample of codes."""

    use: float  # share of the codes that occur
    perplexity: float  # exp of the entropy in nats: as many equally frequent codes would be as uncertain
    dead: int  # codes that never occur


def health(codes: Tensor, values: int) -> Health:
    """Figures over all codes of a sample, whatever its shape; values in [0, `values`)."""
    counts = torch.bincount(codes.flatten(), minlength=values)
    if len(counts) > values:
        raise ValueError(f"expected codes below {values}, got {int(codes.max())}")
    p = counts.double() / counts.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=1e-30).log()).sum()
    used = int((counts > 0).sum())
    return Health(used / values, float(entropy.exp()), values - used)
