"""Optimal one-to-one assignment of few things to few things, by value."""
import itertools
from collections.abc import Callable
from functools import lru_cache

import numpy as np

FEW = 7  # up to so many, all orders are tried, which allows a tie-break


@lru_cache(FEW + 1)
def _orders(n: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(n))), np.int64).reshape(-1, n)


def assign(values: np.ndarray, tie: Callable[[list[int]], float] | None = None) -> list[int]:
    """For every row of `values` (m, n) >= 0 the column it gets, -1 for none, such that the sum is largest.

    Pairs of value 0 are never made. `tie` ranks equally good assignments (only if m, n <= FEW).
    """
    m, n = values.shape
    side = max(m, n)
    if not m or not n:
        return [-1] * m
    square = np.zeros((side, side))
    square[:m, :n] = values
    if side > FEW:
        return _made(_hungarian(-square), values)
    orders = _orders(side)
    totals = square[np.arange(side), orders].sum(1)
    best = np.flatnonzero(totals >= totals.max() - 1e-9)
    if tie is None or len(best) == 1:
        return _made(orders[best[0]].tolist(), values)
    candidates = {tuple(_made(orders[b].tolist(), values)) for b in best}
    return list(max(sorted(candidates), key=lambda c: tie(list(c))))


def _made(columns: list[int], values: np.ndarray) -> list[int]:
    m, n = values.shape
    return [j if j < n and values[i, j] > 0 else -1 for i, j in enumerate(columns[:m])]


def _hungarian(cost: np.ndarray) -> list[int]:
    """Column of every row of a square cost matrix at the smallest sum (shortest augmenting paths with potentials)."""
    n = len(cost)
    u, v = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.zeros(n + 1, np.int64)  # of each column; index 0 is the free start
    for i in range(1, n + 1):
        row_of[0] = i
        slack, way, done = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64), np.zeros(n + 1, bool)
        j = 0
        while row_of[j]:
            done[j] = True
            reduced = cost[row_of[j] - 1] - u[row_of[j]] - v[1:]
            better = ~done[1:] & (reduced < slack[1:])
            slack[1:][better], way[1:][better] = reduced[better], j
            free = np.where(done, np.inf, slack)
            nxt = int(free.argmin())
            delta = free[nxt]
            u[row_of[done]] += delta
            v[done] -= delta
            slack[~done] -= delta
            j = nxt
        while j:
            row_of[j] = row_of[way[j]]
            j = int(way[j])
    out = [0] * n
    for column in range(1, n + 1):
        out[int(row_of[column]) - 1] = column - 1
    return out
