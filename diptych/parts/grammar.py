"""The grammar of a picture's block, as data: which fixed tokens stand around and between its cells.

    start  [rows times columns]  opened  cells, each row closed by row_end  [level_end, the next scale ...]  end

One value drives the writer, the labels, the constrained sampler (only cells are drawn, the rest is forced) and the
parser. Janus has a start only; Emu3 (arXiv 2409.18869) states the size in digits and closes every row.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

CELL = -1  # in a plan: a cell of the picture
Grid = tuple[int, int]  # rows, columns


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """All are token ids. With `digits`, the ids of 0 to 9, the block states its rows and columns."""

    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    row_end: tuple[int, ...] = ()
    level_end: tuple[int, ...] = ()  # between two scales
    digits: tuple[int, ...] = ()
    times: tuple[int, ...] = ()
    opened: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("start", "end", "row_end", "level_end", "digits", "times", "opened"):  # lists come from YAML
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.digits) not in (0, 10) or bool(self.digits) != bool(self.times):
            raise ValueError(f"expected the ids of ten digits and of what stands between two numbers, or neither, "
                             f"got {self.digits} and {self.times}")

    def plan(self, *grids: Grid) -> list[int]:
        """The block as fixed ids and `CELL`s; several grids are scales. The size it states is that of the last."""
        plan = list(self.start)
        if self.digits:
            rows, columns = grids[-1]
            plan += [*self._spell(rows), *self.times, *self._spell(columns)]
        plan += self.opened
        for n, (rows, columns) in enumerate(grids):
            plan += self.level_end if n else ()
            plan += ([CELL] * columns + list(self.row_end)) * rows
        return plan + list(self.end)

    def _spell(self, number: int) -> list[int]:
        return [self.digits[int(d)] for d in str(number)]

    def parse(self, ids: Sequence[int], codes: range, *grids: Grid) -> tuple[list[Grid], list[int]]:
        """A block of one flat vocabulary, in which `codes` are the ids of codes -> its grids and its codes from 0.

        Without `grids` the size is the one that the block states. A token that does not fit is an error.
        """
        if not grids:
            grids = (self._stated(ids),)
        plan = self.plan(*grids)
        if len(ids) != len(plan):
            raise ValueError(f"expected {len(plan)} tokens in a block of {list(grids)}, got {len(ids)}")
        for place, (token, wanted) in enumerate(zip(ids, plan, strict=True)):
            if token not in (codes if wanted == CELL else (wanted,)):
                name = "a code" if wanted == CELL else str(wanted)
                raise ValueError(f"expected {name} at place {place} of a block of {list(grids)}, got {token}")
        return list(grids), [i - codes.start for i, wanted in zip(ids, plan, strict=True) if wanted == CELL]

    def _stated(self, ids: Sequence[int]) -> Grid:
        if not self.digits:
            raise ValueError("expected the grid of a block that does not state its size, got none; fix: pass it")
        numbers, place = [], len(self.start)
        for _ in range(2):
            text = ""
            while place < len(ids) and ids[place] in self.digits:
                text, place = text + str(self.digits.index(ids[place])), place + 1
            numbers.append(text)
            place += len(self.times)
        if not all(numbers):
            raise ValueError(f"expected the size in digits behind {list(self.start)}, got {list(ids[:8])}")
        return int(numbers[0]), int(numbers[1])

    @staticmethod
    def steps(plan: Sequence[int]) -> list[slice]:
        """The parts of a plan between two draws: what precedes the first cell, then each cell with the fixed tokens
        behind it."""
        cuts = [0, *(i for i, token in enumerate(plan) if token == CELL), len(plan)]
        return [slice(a, b) for a, b in pairwise(cuts)]

    @staticmethod
    def allowed(token: int, codes: range) -> range:
        """The ids that may stand where the plan has this token: what constrained sampling restricts logits to."""
        return codes if token == CELL else range(token, token + 1)
