"""Scaling pictures to what a tower or codec accepts."""
import math
from typing import Literal

import numpy as np
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
    return scale_to(pixels, fit_size(pixels.shape[1], pixels.shape[2], shortest, longest, stride))


def scale_to(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, h, w) -> (3, *size), bicubic with antialiasing; unchanged where it has that size."""
    if size == tuple(pixels.shape[1:]):
        return pixels
    scaled = F.interpolate(pixels[None].float(), size, mode="bicubic", antialias=True, align_corners=False)
    return scaled[0].clamp(-1, 1)


def size_of_area(height: int, width: int, area: int, stride: int) -> tuple[int, int]:
    """Sides in multiples of `stride` of a picture with this aspect and about `area` pixels (what Emu3 draws)."""
    scale = math.sqrt(area / (height * width))
    return max(round(height * scale / stride), 1) * stride, max(round(width * scale / stride), 1) * stride


def size_within(height: int, width: int, least: int, most: int, stride: int) -> tuple[int, int]:
    """Sides in multiples of `stride` of a picture that is read: as it is, but for one of more than `most` pixels, which
    gets no more, or of fewer than `least`, which gets no fewer (Qwen2-VL, Emu3)."""
    sides = tuple(max(round(side / stride), 1) * stride for side in (height, width))
    if sides[0] * sides[1] > most:
        scale = math.sqrt(most / (height * width))
        sides = tuple(max(math.floor(side * scale / stride), 1) * stride for side in (height, width))
    elif sides[0] * sides[1] < least:
        scale = math.sqrt(least / (height * width))
        sides = tuple(math.ceil(side * scale / stride) * stride for side in (height, width))
    return sides[0], sides[1]


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


def pad_square(pixels: Tensor, side: int, grey: int = 127, shortest: int = 14,
               filter: Literal["bicubic", "bilinear"] = "bicubic") -> Tensor:
    """(3, h, w) -> (3, side, side): the whole picture on a grey square, scaled in 8 bits as Pillow does it (LLaVA,
    Janus: bicubic). The short side keeps at least `shortest` pixels. A picture that has the size is left alone."""
    if tuple(pixels.shape[1:]) == (side, side):
        return pixels
    from PIL import Image

    eight = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    longest = max(eight.shape[:2])
    height, width = (max(int(n / longest * side), min(shortest, side)) for n in eight.shape[:2])
    square = Image.new("RGB", (side, side), (grey,) * 3)
    scaled = Image.fromarray(eight).resize((width, height), Image.Resampling[filter.upper()])
    square.paste(scaled, ((side - width) // 2, (side - height) // 2))
    return torch.from_numpy(np.array(square)).to(pixels.device).permute(2, 0, 1).float() / 127.5 - 1


def crop_to(pixels: Tensor, height: int, width: int) -> Tensor:
    """(3, h, w) -> (3, height, width): scaled to cover the frame, bicubic with antialiasing, then cut in the middle."""
    if tuple(pixels.shape[1:]) == (height, width):
        return pixels
    scale = max(height / pixels.shape[1], width / pixels.shape[2])
    size = max(round(pixels.shape[1] * scale), height), max(round(pixels.shape[2] * scale), width)
    scaled = F.interpolate(pixels[None].float(), size, mode="bicubic", antialias=True, align_corners=False)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[:, top : top + height, left : left + width].clamp(-1, 1)
