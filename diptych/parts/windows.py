"""Vision transformer with rotary positions and attention in windows, for pictures of any size (the tower of
Qwen2.5-VL, arXiv 2502.13923, section 2.1.1; with every layer `full`, layer norms and GELU that of Qwen2-VL,
2409.12191; with a table of positions and deep levels beside these that of Qwen3-VL, 2511.21631).

    x = matrix(patch);   blocks over (row, column), most within windows, a few within the picture
    m x m neighbours: norm, side by side, Linear, GELU, Linear -> one token of the language model
    the same from states inside the tower (side by side, then norm): levels for its first layers (DeepStack, 2406.04334)

Patches travel in the published order: merged cells row by row, inside each its m x m patches row by row. A patch is
flattened as (colour, frame, row, column); a still picture fills all frames. Shape letters: n patches, d width.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diptych.parts.blocks import LayerNorm, RMSNorm, SwiGLU, additive, attend
from diptych.parts.positions import axial_angles, rotate
from diptych.parts.vision import MLP, Grid, VisionConfig


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """`window` in pixels; `full` are the layers that see the whole picture. `mean` and `std` of pixels in [0, 1].
    `table`: rows and columns of a learned table of positions, resized to the picture, 0 for none. `deep`: layers whose
    states become further levels of the tokens."""

    width: int = 1280  # Qwen2.5-VL-3B, and all numbers below
    hidden: int = 3420
    layers: int = 32
    heads: int = 16
    patch: int = 14
    frames: int = 2
    merge: int = 2
    window: int = 112
    full: tuple[int, ...] = (7, 15, 23, 31)
    out_width: int = 2048
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["swiglu", "quick", "tanh"] = "swiglu"  # or a GELU between two matrices: x sigmoid(1.702 x), or by tanh
    patch_bias: bool = False
    table: int = 0
    deep: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("full", "mean", "std", "deep"):  # lists come from JSON and YAML
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.window % (self.patch * self.merge) or self.width % (4 * self.heads):
            raise ValueError(f"expected window to be a multiple of {self.patch * self.merge} pixels and width of "
                             f"4 * heads={4 * self.heads}, got {self.window} and {self.width}")
        if any(not 0 <= i < self.layers for i in self.deep) or list(self.deep) != sorted(set(self.deep)):
            raise ValueError(f"expected deep layers out of {self.layers} in order, got {self.deep}")

    @property
    def stride(self) -> int:
        """Pixels per token of the language model, along one side."""
        return self.patch * self.merge


def _norm(c: WindowConfig) -> nn.Module:
    return RMSNorm(c.width) if c.norm == "rms" else LayerNorm(c.width, 1e-6)


def _merger(merged: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, out))


class WindowLayer(nn.Module):
    def __init__(self, c: WindowConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.norm1, self.norm2 = _norm(c), _norm(c)
        self.qkv, self.out = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
        self.mlp = SwiGLU(c.width, c.hidden, bias=True) if c.mlp == "swiglu" else \
            MLP(VisionConfig(width=c.width, mlp_width=c.hidden, num_heads=c.heads, gelu=c.mlp))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        x = x + self.out(attend(q, k, v, bias))
        return x + self.mlp(self.norm2(x))


class WindowTower(nn.Module):
    """`tower(patches, grids)`: patches (n, colours * frames * p * p) of pictures with these grids of patches -> tokens
    (n / m^2, out_width), merged cells row by row, picture after picture; with `deep` layers (n / m^2, levels *
    out_width), what the language model reads first and what is added behind its first layers side by side."""

    precision: torch.dtype = torch.float32  # of the rotary frequencies, see `Rope`

    def __init__(self, config: WindowConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embedding = nn.Linear(3 * c.frames * c.patch**2, c.width, bias=c.patch_bias)
        if c.table:
            self.table = nn.Parameter(0.02 * torch.randn(c.table, c.table, c.width))
        self.layers = nn.ModuleList(WindowLayer(c) for _ in range(c.layers))
        self.norm = _norm(c)
        merged = c.width * c.merge**2
        self.merger = _merger(merged, c.out_width)
        self.deep = nn.ModuleList(nn.Sequential(LayerNorm(merged, 1e-6), *_merger(merged, c.out_width)) for _ in c.deep)

    def patches(self, picture: Tensor) -> Tensor:
        """One picture (3, h, w) in [-1, 1], sides multiples of `stride` -> (n, colours * frames * p * p)."""
        c = self.config
        height, width = picture.shape[1:]
        if height % c.stride or width % c.stride:
            raise ValueError(f"expected sides that are multiples of {c.stride}, got {height} x {width}; fix: resize")
        mean, std = (torch.tensor(v, device=picture.device).view(3, 1, 1) for v in (c.mean, c.std))
        x = ((picture.float() + 1) / 2 - mean) / std
        x = x.unflatten(2, (-1, c.merge, c.patch)).unflatten(1, (-1, c.merge, c.patch))
        x = x.permute(1, 4, 2, 5, 0, 3, 6)  # cell row and column, patch row and column inside, colour, pixels
        return x.flatten(0, 3)[:, :, None].expand(-1, -1, c.frames, -1, -1).flatten(1)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        c, device = self.config, patches.device
        count = sum(rows * columns for rows, columns in grids)
        if patches.shape != (count, self.patch_embedding.in_features):
            raise ValueError(f"expected patches of shape ({count}, {self.patch_embedding.in_features}) for grids "
                             f"{list(grids)}, got {tuple(patches.shape)}")
        place = torch.cat([_places(grid, c.merge, device) for grid in grids])  # (n, 2): row, column
        picture = torch.repeat_interleave(torch.arange(len(grids), device=device),
                                          torch.tensor([h * w for h, w in grids], device=device))
        cos, sin = axial_angles(place[None], c.width // c.heads, precision=self.precision)
        near = torch.cat((picture[:, None], place // (c.window // c.patch)), 1)
        x = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))[None]
        if c.table:
            sides = torch.cat([torch.tensor([[h, w]], device=device).expand(h * w, 2) for h, w in grids])
            x = x + self.positions(place, sides).to(x.dtype)
        levels = list[Tensor]()
        whole = additive((picture[:, None] == picture)[None], x.dtype)
        window = additive((near[:, None] == near).all(-1)[None], x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, whole if i in c.full else window)
            if i in c.deep:
                levels.append(self.deep[len(levels)](x[0].unflatten(0, (-1, c.merge**2)).flatten(1)))
        last = self.merger(self.norm(x[0]).unflatten(0, (-1, c.merge**2)).flatten(1))
        return torch.cat((last, *levels), 1) if levels else last

    def positions(self, place: Tensor, sides: Tensor) -> Tensor:
        """Rows of the table (n, d) for patches at `place` (n, 2) of grids with `sides` (n, 2): bilinear between its
        cells, the corners of picture and table falling together."""
        at = place * ((self.config.table - 1) / (sides - 1).clamp_min(1).float())
        low = at.floor().long().clamp_max(self.config.table - 1)
        high, part = (low + 1).clamp_max(self.config.table - 1), at - low
        rows, columns = ((low[:, a], high[:, a], part[:, a:a + 1]) for a in (0, 1))
        near, far = (self.table[r, columns[0]] * (1 - columns[2]) + self.table[r, columns[1]] * columns[2]
                     for r in rows[:2])
        return near * (1 - rows[2]) + far * rows[2]

    def see(self, pictures: Sequence[Tensor]) -> Tensor:
        """Pictures (3, h, w) -> their tokens (n, out_width) in order."""
        p = self.config.patch
        patches = torch.cat([self.patches(picture) for picture in pictures])
        return self(patches, [(v.shape[1] // p, v.shape[2] // p) for v in pictures])


def _places(grid: Grid, merge: int, device: torch.device) -> Tensor:
    """Row and column of every patch in the published order, (n, 2)."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    place = torch.stack((rows, columns), -1).unflatten(1, (-1, merge)).unflatten(0, (-1, merge))
    return place.permute(0, 2, 1, 3, 4).flatten(0, 3)
