"""Diffusion transformer that is told what to draw by states of another network: the generator of a serial coupling.

    e = time(t);  m = table + modulation(silu(e))                 shift, scale and gate of both branches, per block
    x += gate * attention(norm(x) * (1 + scale) + shift)
    x += cross(x, c)                                              injection "cross" (PixArt, SANA)
    x += gate' * mlp(norm(x) * (1 + scale') + shift')

`injection` "prefix" puts the condition in front of the tokens, as part of their sequence; "norm" adds its mean to e, so
that only the modulation knows it (DiT). With linear attention and a convolved network the blocks are those of SANA
(arXiv 2410.10629), with softmax attention and a table of positions those of DiT (2212.09748) and PixArt (2310.00426).
The velocity is data - noise. Shape letters: b batch, n tokens, q condition tokens, w width.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.blocks import GeluMlp, RMSNorm, additive, attend
from diptych.parts.linear import ConvolvedMlp, linear_attention
from diptych.parts.positions import TimeEmbedding, sincos_2d
from diptych.parts.vision import Grid, position_ids

NOISE_STEPS = 1000  # noise levels that time embeddings count, as published


@dataclass(frozen=True, kw_only=True)
class DitConfig:
    """`hidden` of the feed-forward network; `side` rows and columns of the fixed table of positions, 0 for none (where
    convolutions see the borders)."""

    token_width: int = 32  # SANA-1.6B at 512 px, and all numbers below
    width: int = 2240
    layers: int = 20
    heads: int = 70
    hidden: int = 5600
    condition_width: int = 2304
    cross_heads: int = 20
    injection: Literal["cross", "prefix", "norm"] = "cross"
    attention: Literal["linear", "softmax"] = "linear"
    mlp: Literal["convolved", "gelu"] = "convolved"
    side: int = 0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % self.cross_heads:
            raise ValueError(f"expected width to be a multiple of heads and cross_heads, got {self.width}, "
                             f"{self.heads} and {self.cross_heads}")
        if self.injection == "prefix" and (self.attention == "linear" or self.mlp == "convolved"):
            raise ValueError("expected softmax attention and mlp gelu with a prefix, whose tokens have no place in the "
                             f"grid, got {self.attention} and {self.mlp}")

    def build(self) -> "Dit":
        return Dit(self)


class SelfAttention(nn.Module):
    def __init__(self, c: DitConfig) -> None:
        super().__init__()
        self.heads, self.linear = c.heads, c.attention == "linear"
        self.qkv, self.out = nn.Linear(c.width, 3 * c.width, bias=False), nn.Linear(c.width, c.width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.linear:
            return self.out(linear_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.out(attend(q, k, v, bias))


class CrossAttention(nn.Module):
    def __init__(self, c: DitConfig) -> None:
        super().__init__()
        self.heads = c.cross_heads
        self.q, self.kv = nn.Linear(c.width, c.width), nn.Linear(c.width, 2 * c.width)
        self.out = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor, condition: Tensor, bias: Tensor | None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(condition).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v, bias))


class Block(nn.Module):
    def __init__(self, c: DitConfig) -> None:
        super().__init__()
        self.c = c
        self.table = nn.Parameter(torch.randn(6, c.width) / c.width**0.5)
        self.attention = SelfAttention(c)
        self.cross = CrossAttention(c) if c.injection == "cross" else None
        self.mlp = ConvolvedMlp(c.width, c.hidden) if c.mlp == "convolved" else GeluMlp(c.width, c.hidden, bias=True)

    def forward(self, x: Tensor, modulation: Tensor, condition: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
        """modulation (b, 6, w); bias (b, 1, q or q + n) for the attention that sees the condition."""
        shift, scale, gate, shift2, scale2, gate2 = (modulation + self.table).chunk(6, 1)
        own = bias if self.c.injection == "prefix" else None
        x = x + gate * self.attention(self._norm(x) * (1 + scale) + shift, own)
        if self.cross is not None:
            x = x + self.cross(x, condition, bias)
        y = self._norm(x) * (1 + scale2) + shift2
        if self.c.mlp == "convolved":
            y = self.mlp(y.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        else:
            y = self.mlp(y)
        return x + gate2 * y

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.c.norm_eps)


class Dit(nn.Module):
    """`dit(x, t, condition, grid, visible)`: latent tokens (b, n, token_width) at flow times t (b,), under a condition
    (b, q, condition_width) of which `visible` (b, q) bool says what counts -> velocities like x."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        c = self.config = config
        self.input, self.output = nn.Linear(c.token_width, c.width), nn.Linear(c.width, c.token_width)
        self.time = TimeEmbedding(c.width)
        self.modulation = nn.Linear(c.width, 6 * c.width)
        self.condition = nn.Sequential(nn.Linear(c.condition_width, c.width), nn.GELU("tanh"),
                                       nn.Linear(c.width, c.width))
        self.condition_norm = RMSNorm(c.width, eps=1e-5)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        uniform_weights(self.modules())
        nn.init.zeros_(self.output.weight)  # a fresh network predicts zero velocity
        self.table = nn.Parameter(torch.randn(2, c.width) / c.width**0.5)
        if c.side:
            self.register_buffer("positions", sincos_2d(c.width, c.side), persistent=False)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, grid: Grid, visible: Tensor | None = None) -> Tensor:
        c, count = self.config, x.shape[1]
        check(x, condition, grid, c.token_width, c.condition_width)
        x = self.input(x.to(self.input.weight.dtype))
        if c.side:
            x = x + cast(Tensor, self.positions)[position_ids(grid, c.side, device=x.device)].to(x.dtype)
        condition = self.condition_norm(self.condition(condition.to(x.dtype)))
        embedded, bias = self.time((1 - t) * NOISE_STEPS), None
        if c.injection == "norm":
            embedded = embedded + mean(condition, visible)
        elif visible is not None:
            seen = visible if c.injection == "cross" else torch.cat((visible, visible.new_ones(len(x), count)), 1)
            bias = additive(seen[:, None], x.dtype)
        if c.injection == "prefix":
            x = torch.cat((condition, x), 1)
        modulation = self.modulation(F.silu(embedded)).unflatten(-1, (6, -1))
        for block in self.blocks:
            x = block(x, modulation, condition, bias, grid)
        shift, scale = (self.table + embedded[:, None]).chunk(2, 1)
        normed = F.layer_norm(x[:, -count:], x.shape[-1:], eps=c.norm_eps)
        return self.output(normed * (1 + scale) + shift)


def uniform_weights(modules: Iterable[nn.Module]) -> None:
    """Fresh weights of linear layers as DiT starts: uniform after Xavier, biases zero."""
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check(x: Tensor, condition: Tensor, grid: Grid, token_width: int, condition_width: int) -> None:
    """What every generator asks of its inputs."""
    if x.ndim != 3 or x.shape[1:] != (grid[0] * grid[1], token_width):
        raise ValueError(f"expected tokens of shape (b, {grid[0] * grid[1]}, {token_width}), got {tuple(x.shape)}")
    if condition.ndim != 3 or condition.shape[0] != len(x) or condition.shape[2] != condition_width:
        raise ValueError(f"expected a condition of shape ({len(x)}, q, {condition_width}), "
                         f"got {tuple(condition.shape)}")


def mean(condition: Tensor, visible: Tensor | None) -> Tensor:
    """(b, q, w) -> (b, w): the mean over what is visible."""
    if visible is None:
        return condition.mean(1)
    shares = visible.to(condition.dtype)
    return (condition * shares[..., None]).sum(1) / shares.sum(1, keepdim=True).clamp_min(1)
