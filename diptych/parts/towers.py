"""Vision transformer over the cells of one map, picture or codes, with a learned table that is resized to other grids.

    x = conv(map) + table;   with a class token in front of it;   norm;   pre-norm blocks;   norm;   the cells, as a map

Towers inside tokenizers: SigLIP without its last norm (VILA-U), CLIP (TokenFlow's semantic encoder), and the decoder
that turns codes back into features (TokenFlow, VQ-KD). For packed pictures of mixed sizes see `parts.vision`, whose
blocks these are. Shape letters: b batch, d width, h and w cells.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.vision import Gelu, Grid, Layer, VisionConfig, VisionTransformer

FIRST_SCALE = 1e-5  # of fresh blocks that weigh channels, as DINOv2 starts


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """`side`: rows and columns of the learned table. `table_offset`: added to the sides that the bicubic resizing is
    scaled by (0.1 in DINO's code and what came from it), 0 for the plain sides. `registers` are learned tokens behind
    the class token; where there are some, neither they nor the class token have a row of the table (DINOv2)."""

    width: int = 1024  # SigLIP-L/16 at 256 px, as in VILA-U, and all numbers below
    mlp_width: int = 4096
    layers: int = 23  # its features are those before the last of 24 blocks
    heads: int = 16
    patch: int = 16
    side: int = 16
    norm_eps: float = 1e-6
    gelu: Gelu = "tanh"
    class_token: bool = False
    patch_bias: bool = True
    first_norm: bool = False
    last_norm: bool = False
    table_offset: float = 0.0
    norm_behind: bool = False  # blocks normalise what attention and network say, not what they read (EVA-CLIP-E)
    registers: int = 0
    layer_scale: bool = False  # blocks weigh the channels of what attention and network say (DINOv2)

    def __post_init__(self) -> None:
        if self.registers and not self.class_token:
            raise ValueError(f"expected registers beside a class token only, got {self.registers} without one")
        if self.norm_behind and self.layer_scale:
            raise ValueError("expected blocks with norms behind or with scales, got both")

    @property
    def prefix(self) -> int:
        """Tokens in front of the cells."""
        return self.class_token + self.registers

    @property
    def prefix_rows(self) -> int:
        """Rows of the table in front of those of the cells."""
        return 0 if self.registers else int(self.class_token)

    @property
    def downsample(self) -> int:
        """Pixels per cell, along one side."""
        return self.patch

    def make_encoder(self, in_channels: int, out_channels: int) -> "Tower":
        if out_channels != self.width:
            raise ValueError(f"expected {self.width} channels behind a tower of that width, got {out_channels}; "
                             "fix: set latent_channels or the code width")
        return Tower(self, in_channels)


class BehindLayer(Layer):
    """The same parts, with the norms behind attention and network."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.layer_norm1(self.self_attn(x, mask))
        return x + self.layer_norm2(self.mlp(x))


class ScaledLayer(Layer):
    """The same parts, with a weight per channel of what they say (LayerScale, arXiv 2103.17239)."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__(c)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((c.width,), FIRST_SCALE)) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.scale1 * self.self_attn(self.layer_norm1(x), mask)
        return x + self.scale2 * self.mlp(self.layer_norm2(x))


class Tower(nn.Module):
    """(b, in_channels, H, W) -> (b, d, h, w) with h = H / patch."""

    def __init__(self, config: TowerConfig, in_channels: int = 3):
        super().__init__()
        c = self.config = config
        self.patch_embedding = nn.Conv2d(in_channels, c.width, c.patch, c.patch, bias=c.patch_bias)
        self.positions = nn.Parameter(torch.randn(c.side**2 + c.prefix_rows, c.width) * 0.02)
        if c.class_token:
            self.class_token = nn.Parameter(torch.zeros(c.width))
        if c.registers:
            self.registers = nn.Parameter(torch.randn(c.registers, c.width) * 0.02)
        self.first_norm = nn.LayerNorm(c.width, c.norm_eps) if c.first_norm else nn.Identity()
        block = VisionConfig(width=c.width, mlp_width=c.mlp_width, num_layers=c.layers, num_heads=c.heads,
                             norm_eps=c.norm_eps, gelu=c.gelu)
        kind = BehindLayer if c.norm_behind else ScaledLayer if c.layer_scale else Layer
        self.layers = nn.ModuleList(kind(block) for _ in range(c.layers))
        self.last_norm = nn.LayerNorm(c.width, c.norm_eps) if c.last_norm else nn.Identity()

    def table(self, grid: Grid) -> Tensor:
        """The rows of the learned table for the cells of a grid, (h * w, d); the class token's row is left out."""
        c, rows = self.config, self.positions[self.config.prefix_rows:]
        if grid == (c.side, c.side):
            return rows
        square = rows.float().T.unflatten(1, (c.side, c.side))[None]
        if c.table_offset:
            factors = [(n + c.table_offset) / c.side for n in grid]
            resized = F.interpolate(square, scale_factor=factors, mode="bicubic")
        else:
            resized = F.interpolate(square, size=grid, mode="bicubic")
        return resized[0].flatten(1).T.to(rows.dtype)

    def encode(self, images: Tensor) -> Tensor:
        """(b, in_channels, H, W) -> all states (b, tokens, d), class token and registers first."""
        x = self.patch_embedding(images)
        grid: Grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2) + self.table(grid)
        if self.config.registers:
            first = torch.cat((self.class_token[None], self.registers))
            x = torch.cat((first.expand(len(x), -1, -1), x), 1)
        elif self.config.class_token:
            first = (self.class_token + self.positions[0]).expand(len(x), 1, -1)
            x = torch.cat((first, x), 1)
        x = self.first_norm(x)
        for layer in self.layers:
            x = layer(x, None)
        return self.last_norm(x)

    def forward(self, x: Tensor) -> Tensor:
        grid: Grid = (x.shape[2] // self.config.patch, x.shape[3] // self.config.patch)
        return self.encode(x)[:, self.config.prefix:].transpose(1, 2).unflatten(2, grid)


AnyTowerConfig = TowerConfig | VisionConfig
AnyTower = Tower | VisionTransformer


def build_tower(config: AnyTowerConfig) -> AnyTower:
    """Either kind of tower; `features_of` reads a picture with both."""
    return VisionTransformer(config) if isinstance(config, VisionConfig) else Tower(config)


def features_of(tower: AnyTower, images: Tensor) -> Tensor:
    """Pictures of one size (b, 3, H, W) -> their features as a map (b, d, h, w)."""
    if isinstance(tower, Tower):
        return tower(images)
    grid = (images.shape[2] // tower.config.patch, images.shape[3] // tower.config.patch)
    return tower.encode(images).transpose(1, 2).unflatten(2, grid)
