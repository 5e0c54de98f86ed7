"""Scaling pictures to what a tower or codec accepts."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_size(height: int, width: int, shortest: int, longest: int, stride: int) -> tuple[int, int]:
    """Sides such that the long one is at most `longest` and, where that allows it, the short one at least `shortest`;
    both multiples of `stride`, the aspect kept as well as that allows."""
    scale = min(longest / max(height, width), 1.0)
    scale = max(scale, shortest / min(height, width))
    if max(height, width) * scale > longest:
        scale = longest / max(height, width)

    def side(value: int) -> int:
        return max(stride, min(round(value * scale / stride), math.floor(longest / stride)) * stride)

    return side(height), side(width)


def fit_sides(pixels: Tensor, shortest: int, longest: int, stride: int) -> Tensor:
    """(3, h, w) -> (3, h', w') by `fit_size`, bicubic with antialiasing; unchanged where it fits already."""
    size = fit_size(pixels.shape[1], pixels.shape[2], shortest, longest, stride)
    if size == tuple(pixels.shape[1:]):
        return pixels
    scaled = F.interpolate(pixels[None].float(), size, mode="bicubic", antialias=True, align_corners=False)
    return scaled[0].clamp(-1, 1)


def merge_grid(tokens: Tensor, grid: tuple[int, int], merge: int) -> Tensor:
    """(b, h * w, d) -> (b, h/m * w/m, m * m * d): m x m neighbours side by side in one token."""
    (h, w), m = grid, merge
    x = tokens.reshape(tokens.shape[0], h // m, m, w // m, m, -1)
    return x.transpose(2, 3).reshape(tokens.shape[0], (h // m) * (w // m), -1)


def stack_by_size(pictures: list[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Pictures (3, h, w) of any sizes -> (their numbers, batch) per size."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(pictures):
        sizes.setdefault(tuple(p.shape), []).append(i)
    return [(numbers, torch.stack([pictures[i] for i in numbers])) for numbers in sizes.values()]
