"""Vision transformer over packed patches of pictures of any size, the SigLIP tower as NaViT packs it.

    tokens = Linear(patch) + table[row * max_side + column];  pre-norm blocks, attention within a picture;  post-norm

Key layout is the published one (`vision_model.embeddings.patch_embedding...`) with the patch convolution written as a
Linear over patches flattened as (row, column, channel). Shape letters: n tokens of all pictures, d width, p patch side.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.blocks import additive, attend
from diptych.parts.pictures import merge_grid

Grid = tuple[int, int]  # rows, columns of patches
Gelu = Literal["tanh", "exact", "quick"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """`interpolate` chooses how a patch finds its row of the learned table: its own cell (False), or the cell of the
    `max_side` x `max_side` table at the same fraction of the picture (True)."""

    width: int = 1152  # SigLIP so400m
    mlp_width: int = 4304
    num_layers: int = 26  # BAGEL keeps 26 of 27
    num_heads: int = 16
    patch: int = 14
    max_side: int = 70  # BAGEL: vit_max_num_patch_per_side
    image_channels: int = 3
    norm_eps: float = 1e-6
    interpolate: bool = False
    gelu: Gelu = "tanh"  # SigLIP's approximation, exact (timm), x sigmoid(1.702 x) (CLIP)

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"expected width to be a multiple of num_heads={self.num_heads}, got {self.width}")

    @classmethod
    def paper(cls) -> "VisionConfig":
        """The SigLIP2-so400m tower as BAGEL uses it."""
        return cls()

    @classmethod
    def from_published(cls, values: Mapping[str, Any], *, interpolate: bool = False) -> "VisionConfig":
        """From the `vit_config.json` of a SigLIP tower."""
        names = {"hidden_size": "width", "intermediate_size": "mlp_width", "num_hidden_layers": "num_layers",
                 "num_attention_heads": "num_heads", "patch_size": "patch", "num_channels": "image_channels",
                 "layer_norm_eps": "norm_eps"}
        fixed = {"hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0, "rope": False}
        unknown = sorted(set(values) - set(names) - set(fixed) - {"image_size", "model_type"})
        if unknown:
            raise ValueError(f"expected vision keys {', '.join(sorted({*names, *fixed, 'image_size'}))}, "
                             f"got unknown {', '.join(unknown)}")
        for key, only in fixed.items():
            if values.get(key, only) != only:
                raise ValueError(f"expected vision {key} to be {only!r}, got {values[key]!r}")
        known: dict[str, Any] = {names[k]: v for k, v in values.items() if k in names}
        return cls(max_side=values["image_size"] // values["patch_size"], interpolate=interpolate, **known)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(b, c, h, w) -> (b, h/p * w/p, p * p * c); tokens row by row, inside a token (row, column, channel)."""
    b, c, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(f"expected sides that are multiples of {patch}, got {height} x {width}; fix: resize or crop")
    x = images.reshape(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(tokens: Tensor, patch: int, grid: Grid) -> Tensor:
    """The inverse: (b, rows * columns, p * p * c) -> (b, c, rows * p, columns * p)."""
    rows, columns = grid
    if tokens.shape[1] != rows * columns:
        raise ValueError(f"expected {rows * columns} tokens for a grid of {rows} x {columns}, got {tokens.shape[1]}")
    x = tokens.reshape(tokens.shape[0], rows, columns, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, rows * patch, columns * patch)


def position_ids(grid: Grid, max_side: int, *, interpolate: bool = False, device: torch.device | None = None) -> Tensor:
    """Rows of a flattened `max_side` x `max_side` table for the patches of one picture, (rows * columns,)."""
    axes = []
    for count in grid:
        index = torch.arange(count, device=device)
        if interpolate:
            bounds = torch.arange(1, max_side, device=device) / max_side
            index = torch.bucketize(torch.arange(count, device=device) / count, bounds, right=True)
        elif count > max_side:
            raise ValueError(f"expected at most {max_side} patches per side, got a grid of {grid[0]} x {grid[1]}; "
                             "fix: resize the picture")
        axes.append(index)
    return (axes[0][:, None] * max_side + axes[1]).flatten()


class Embeddings(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.config = c
        self.patch_embedding = nn.Linear(c.image_channels * c.patch**2, c.width)
        self.position_embedding = nn.Embedding(c.max_side**2, c.width)

    def forward(self, patches: Tensor, grid_sizes: Sequence[Grid]) -> Tensor:
        c, device = self.config, patches.device
        cached: dict[Grid, Tensor] = {}
        for grid in set(grid_sizes):
            cached[grid] = position_ids(grid, c.max_side, interpolate=c.interpolate, device=device)
        positions = torch.cat([cached[grid] for grid in grid_sizes])
        return self.patch_embedding(patches) + self.position_embedding(positions)


class Attention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.num_heads = c.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.width, c.width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (b, n, d); mask (b or 1, n or 1, n), True where a row may look."""
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, None if mask is None else additive(mask, q.dtype)))


class MLP(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.width, c.mlp_width), nn.Linear(c.mlp_width, c.width)
        self.gelu: Gelu = c.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), self.gelu))


def gelu(x: Tensor, kind: Gelu) -> Tensor:
    """Its three variants in use: exact, by tanh, and x sigmoid(1.702 x)."""
    if kind == "quick":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if kind == "tanh" else "none")


class Layer(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(c.width, c.norm_eps), Attention(c)
        self.layer_norm2, self.mlp = nn.LayerNorm(c.width, c.norm_eps), MLP(c)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class _Tower(nn.Module):
    """Names of the published key layout: embeddings, encoder.layers.N, post_layernorm."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.embeddings = Embeddings(c)
        layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(c.width, c.norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.encoder["layers"].children():
            x = layer(x, mask)
        return self.post_layernorm(x)


class VisionTransformer(nn.Module):
    """Packed patches (n, p * p * 3) of pictures with the given grids -> features (n, d), in the same order."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = _Tower(config)

    def forward(self, patches: Tensor, grid_sizes: Sequence[Grid]) -> Tensor:
        counts = [rows * columns for rows, columns in grid_sizes]
        if patches.ndim != 2 or patches.shape[0] != sum(counts):
            raise ValueError(f"expected packed patches of shape ({sum(counts)}, {self.config.patch**2 * 3}) for "
                             f"grids {list(grid_sizes)}, got {tuple(patches.shape)}")
        x, mask = self.vision_model.embeddings(patches, grid_sizes), None
        if len(set(counts)) <= 1:  # pictures of one length need no mask: a batch
            x = x.reshape(len(counts), -1, x.shape[-1])
        else:
            picture = torch.repeat_interleave(torch.arange(len(counts), device=x.device),
                                              torch.tensor(counts, device=x.device))
            x, mask = x[None], (picture[:, None] == picture[None, :])[None]
        return self.vision_model(x, mask).flatten(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures of one size (b, 3, h, w) in [-1, 1] -> (b, tokens, d)."""
        grid = (images.shape[2] // self.config.patch, images.shape[3] // self.config.patch)
        patches = patchify(images, self.config.patch)
        return self(patches.flatten(0, 1), [grid] * len(images)).unflatten(0, (len(images), -1))


def merged_features(tower: VisionTransformer, views: Sequence[Tensor], merge: int) -> tuple[Tensor, list[Grid]]:
    """Pictures (3, h, w) of any sizes -> their features, `merge` x `merge` neighbours joined to one token
    (n, merge^2 d), in order, and the grids of these tokens."""
    patch = tower.config.patch
    grids = [(v.shape[1] // patch, v.shape[2] // patch) for v in views]
    alike = len(set(grids)) == 1
    if alike:
        patches = patchify(torch.stack(list(views)), patch).flatten(0, 1)
    else:
        patches = torch.cat([patchify(v[None], patch)[0] for v in views])
    features = tower(patches.to(next(tower.parameters()).dtype), grids)
    if merge > 1 and alike:
        features = merge_grid(features.unflatten(0, (len(views), -1)), grids[0], merge).flatten(0, 1)
    elif merge > 1:
        parts = features.split([h * w for h, w in grids])
        features = torch.cat([merge_grid(p[None], g, merge)[0] for p, g in zip(parts, grids, strict=True)])
    return features, [(h // merge, w // merge) for h, w in grids]


class Connector(nn.Module):
    """fc1, tanh-GELU, fc2: features of the tower to the width of a language model."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(in_width, out_width), nn.Linear(out_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
