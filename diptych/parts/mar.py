"""Masked autoregressive transformer: an encoder that sees only the revealed tokens of a picture, a decoder that says
something about every place, and the per-token network that turns this into noise predictions (MAR, arXiv 2406.11838).

    encoder   z_proj(x), buffers in front, + positions, norm, hidden tokens dropped, blocks, norm
    decoder   embed, mask tokens at the hidden places, + positions, blocks, norm, buffers dropped, + positions
    head      residual MLP, modulated by time + condition: x + gate * mlp(norm(x) * (1 + scale) + shift)

Buffers are places without content that give the encoder room when few tokens are revealed. Pictures of another size
than the learned grid resize its positions bilinearly.

Shape letters: b pictures, N tokens of a picture, B buffers, m revealed tokens, d width of a token, w of the network.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.positions import TimeEmbedding
from diptych.parts.vision import Grid, Layer, VisionConfig


@dataclass(frozen=True, kw_only=True)
class MarConfig:
    """`side`: rows and columns of the learned positions. Decoder numbers of 0 are those of the encoder."""

    width: int = 768  # MAR-B, and all numbers below
    layers: int = 12
    heads: int = 12
    decoder_width: int = 0
    decoder_layers: int = 0
    decoder_heads: int = 0
    mlp_ratio: float = 4.0
    token_width: int = 16  # channels of a latent cell
    side: int = 16
    buffers: int = 64
    norm_eps: float = 1e-6

    @property
    def decoder(self) -> tuple[int, int, int]:
        """Width, layers and heads of the decoder."""
        return (self.decoder_width or self.width, self.decoder_layers or self.layers, self.decoder_heads or self.heads)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    width: int = 1024  # Harmon with MAR-B
    layers: int = 6


def _blocks(width: int, layers: int, heads: int, c: MarConfig) -> nn.ModuleList:
    shape = VisionConfig(width=width, mlp_width=int(width * c.mlp_ratio), num_layers=layers, num_heads=heads,
                         norm_eps=c.norm_eps, gelu="exact")
    return nn.ModuleList(Layer(shape) for _ in range(layers))


class Mar(nn.Module):
    def __init__(self, config: MarConfig) -> None:
        super().__init__()
        c = self.config = config
        width, layers, heads = c.decoder
        cells = c.side**2
        self.fake_latent = nn.Parameter(torch.zeros(1, c.width))  # what buffers hold without a class
        self.z_proj = nn.Linear(c.token_width, c.width)
        self.z_proj_ln = nn.LayerNorm(c.width, 1e-6)
        self.encoder_positions = nn.Parameter(torch.zeros(1, c.buffers + cells, c.width))
        self.encoder_blocks = _blocks(c.width, c.layers, c.heads, c)
        self.encoder_norm = nn.LayerNorm(c.width, c.norm_eps)
        self.decoder_embed = nn.Linear(c.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_positions = nn.Parameter(torch.zeros(1, c.buffers + cells, width))
        self.decoder_blocks = _blocks(width, layers, heads, c)
        self.decoder_norm = nn.LayerNorm(width, c.norm_eps)
        self.head_positions = nn.Parameter(torch.zeros(1, cells, width))
        for p in (self.fake_latent, self.mask_token, self.encoder_positions, self.decoder_positions,
                  self.head_positions):
            nn.init.normal_(p, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def encode(self, x: Tensor, hidden: Tensor, grid: Grid, start: Tensor | None = None) -> Tensor:
        """Tokens x (b, N, d), hidden (b, N) bool with equally many True in every row -> (b, B + m, w): the buffers,
        then the revealed tokens row by row. `start` (b, w) is what buffers hold instead of `fake_latent`."""
        self._check(x.shape[1], hidden, grid)
        buffers = self.fake_latent.expand(len(x), -1) if start is None else start
        tokens = self.z_proj(x.to(self.z_proj.weight.dtype))
        tokens = torch.cat((buffers[:, None].expand(-1, self.config.buffers, -1).to(tokens.dtype), tokens), 1)
        tokens = self.z_proj_ln(tokens + self._positions(self.encoder_positions, grid))
        # dropped, not masked: the cost is that of the revealed tokens
        seen = tokens[:, self.config.buffers:][~hidden].reshape(len(x), -1, tokens.shape[-1])
        return self._run(self.encoder_blocks, self.encoder_norm,
                         torch.cat((tokens[:, :self.config.buffers], seen), 1))

    def decode(self, states: Tensor, hidden: Tensor, grid: Grid) -> Tensor:
        """States as `encode` gives them (b, B + m, w), hidden (b, N) -> conditions (b, N, w) of every place."""
        self._check(hidden.shape[1], hidden, grid)
        x = self.decoder_embed(states)
        count = self.config.buffers
        places = self.mask_token.to(x.dtype).expand(*hidden.shape, -1)
        places = places.masked_scatter(~hidden[..., None], x[:, count:])
        x = torch.cat((x[:, :count], places), 1) + self._positions(self.decoder_positions, grid)
        x = self._run(self.decoder_blocks, self.decoder_norm, x)[:, count:]
        return x + self._positions(self.head_positions, grid)

    def _check(self, tokens: int, hidden: Tensor, grid: Grid) -> None:
        if tokens != grid[0] * grid[1] or hidden.shape[1] != tokens:
            raise ValueError(f"expected {grid[0] * grid[1]} tokens and as many flags for a grid of {grid[0]} x "
                             f"{grid[1]}, got {tokens} and {hidden.shape[1]}")
        counts = hidden.sum(1)
        if bool((counts != counts[0]).any()):
            raise ValueError(f"expected equally many hidden tokens in every picture, got {counts.tolist()}; "
                             "fix: run pictures with other counts apart")

    def _positions(self, table: Tensor, grid: Grid) -> Tensor:
        """The learned positions for a grid; rows before the last side * side belong to buffers."""
        side = self.config.side
        if grid == (side, side):
            return table
        front = table.shape[1] - side * side
        cells = table[:, front:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        cells = F.interpolate(cells, grid, mode="bilinear", align_corners=False)
        return torch.cat((table[:, :front], cells.flatten(2).transpose(1, 2)), 1)

    @staticmethod
    def _run(blocks: nn.ModuleList, norm: nn.Module, x: Tensor) -> Tensor:
        for block in cast(Sequence[nn.Module], blocks):
            x = block(x, None)
        return norm(x)


class ModulatedBlock(nn.Module):
    """x + gate * mlp(norm(x) * (1 + scale) + shift), the three from y: both (n, width). Starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(y).chunk(3, -1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    """Noised tokens x (m, d), steps (m,) or (1,), conditions (m, w) -> noise and variance (m, 2 d)."""

    def __init__(self, config: HeadConfig, token_width: int, condition_width: int) -> None:
        super().__init__()
        width = config.width
        self.time = TimeEmbedding(width)
        self.condition = nn.Linear(condition_width, width)
        self.input = nn.Linear(token_width, width)
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.output = nn.Linear(width, 2 * token_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (cast(nn.Linear, self.time.mlp[0]), cast(nn.Linear, self.time.mlp[2])):
            nn.init.normal_(layer.weight, std=0.02)
        closed = [*(cast(ModulatedBlock, b).modulation[1] for b in self.blocks), self.modulation[1], self.output]
        for layer in cast(list[nn.Linear], closed):  # a fresh head predicts no noise, and middling variance
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, steps: Tensor, condition: Tensor) -> Tensor:
        dtype = self.input.weight.dtype
        y = self.time(steps) + self.condition(condition.to(dtype))
        h = self.input(x.to(dtype))
        for block in self.blocks:
            h = block(h, y)
        shift, scale = self.modulation(y).chunk(2, -1)
        return self.output(self.norm(h) * (1 + scale) + shift)
