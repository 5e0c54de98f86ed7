"""Alignment: how much two representations of the same items agree on which items are alike.

    mutual neighbours = mean over items i of |N_a(i) n N_b(i)| / k,   N(i) the k items nearest to i by cosine

Needs no training, and neither width nor basis of the two matter (mutual k-nearest neighbours of the Platonic
Representation Hypothesis, arXiv 2405.07987; UniFork, arXiv 2506.17202, follows it layer by layer).
"""
from collections.abc import Sequence

import torch
from torch import Tensor


def mutual_neighbours(a: Tensor, b: Tensor, k: int = 10) -> float:
    """The share, in [0, 1], of the k nearest neighbours that items have in common in a (n, d) and in b (n, e). Features
    are centred first; chance is k / (n - 1)."""
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or not 0 < k < len(a):
        raise ValueError(f"expected two matrices with a row for each of more than k = {k} items, "
                         f"got {tuple(a.shape)} and {tuple(b.shape)}")
    near_a, near_b = _nearest(a, k), _nearest(b, k)
    common = (near_a[:, :, None] == near_b[:, None, :]).any(2)
    return float(common.double().mean())


def slope(curve: Sequence[float], start: float = 0.0) -> float:
    """Least-squares slope of a curve over relative depth (its first value at 0, its last at 1), from `start` on."""
    depth = torch.linspace(0, 1, len(curve), dtype=torch.float64)
    late = depth >= start
    if int(late.sum()) < 2:
        raise ValueError(f"expected at least two values from depth {start} on, got a curve of {len(curve)}")
    x, y = depth[late], torch.tensor(curve, dtype=torch.float64)[late]
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def _nearest(x: Tensor, k: int) -> Tensor:
    """(n, k) numbers of the nearest others by cosine around the mean."""
    x = x.detach().double()
    x = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    return (x @ x.T).fill_diagonal_(-torch.inf).topk(k, 1).indices
