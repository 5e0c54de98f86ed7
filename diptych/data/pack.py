"""Packing documents of different lengths into rows of one token budget."""
from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int, rows: int | None = None,
         names: Sequence[str] | None = None) -> list[list[int]]:
    """Indices of documents per row, each row at most `budget` tokens, every document whole and in exactly one row.

    Best-fit decreasing: the longest document first, each into the fullest row it fits (at most 11/9 of the fewest rows
    possible). Rows come ordered by their first document and hold their documents in order, so equal lengths keep the
    order they came in. With `rows`, more than that many rows are an error.
    """
    def name(i: int) -> str:
        return f"document {i}" + (f" ({names[i]})" if names is not None else "")

    for i, length in enumerate(lengths):
        if not 0 < length <= budget:
            fix = "fix: raise the budget, shorten its text or lower its picture size" if length > budget else \
                "fix: leave empty documents out"
            raise ValueError(f"expected between 1 and {budget} tokens in {name(i)}, got {length}; {fix}")
    packed: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted: the first that fits is the fullest
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[i], -1))
        if at < len(free):
            left, row = free.pop(at)
        else:
            left, row = budget, len(packed)
            packed.append([])
        packed[row].append(i)
        insort(free, (left - lengths[i], row))
    if rows is not None and len(packed) > rows:
        raise ValueError(f"expected {len(lengths)} documents ({sum(lengths)} tokens) to fit {rows} rows of {budget} "
                         f"tokens, got {len(packed)} rows; fix: use fewer documents per batch or a larger budget")
    return sorted(sorted(row) for row in packed)


def pack_rows(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Indices of documents per row of `row` tokens. Longer documents share longer rows, so that the others stay short:
    attention costs the square."""
    out: list[list[int]] = []
    for some in ([i for i, n in enumerate(lengths) if (n > row) == long] for long in (False, True)):
        own = [lengths[i] for i in some]
        out += [[some[i] for i in packed] for packed in pack(own, max([row, *own]))]
    return out


def fill(lengths: Sequence[int], packed: Sequence[Sequence[int]], budget: int) -> float:
    """Share of the budget of all rows that holds tokens."""
    return sum(lengths[i] for row in packed for i in row) / (budget * len(packed)) if packed else 0.0
