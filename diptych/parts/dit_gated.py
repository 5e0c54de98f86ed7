"""Diffusion transformer whose attention adds what the condition says to what the tokens say (Lumina-Next,
arXiv 2406.18583; BLIP3-o, 2505.09568).

    e = time(t) + matrix(norm(mean c));   (s, g, s', g') = matrix(silu(e))              per block
    n = norm(x) * (1 + s);   a = attention(n, n) + tanh(gate) * attention(n, norm(c))   gate: one number per head
    x += tanh(g) * norm(out(a));   x += tanh(g') * norm(mlp(norm(x) * (1 + s')))

Queries and keys are normalised over all heads together; tokens turn by row and column, the condition does not, so its
order says nothing. The velocity is data - noise. Shape letters: b batch, n tokens, q condition tokens, w width.
"""
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.blocks import LayerNorm, RMSNorm, SwiGLU, additive, attend
from diptych.parts.dit import NOISE_STEPS, check, mean, uniform_weights
from diptych.parts.positions import TimeEmbedding, sincos_2d
from diptych.parts.vision import Grid, position_ids


@dataclass(frozen=True, kw_only=True)
class GatedDitConfig:
    """`hidden`: two thirds of four times the width, rounded up to a multiple of 256. `side` rows and columns of a fixed
    table of positions beside the rotation, 0 for none, as published: from rotation alone, tokens have to learn from the
    borders where they are, which takes small networks long."""

    token_width: int = 1792  # BLIP3-o, and all numbers below
    width: int = 1792
    layers: int = 24
    heads: int = 28
    hidden: int = 4864
    condition_width: int = 3584
    time_width: int = 1024
    side: int = 0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % (4 * self.heads):
            raise ValueError(f"expected width to be a multiple of 4 * heads={4 * self.heads}, got {self.width}")

    def build(self) -> "GatedDit":
        return GatedDit(self)


class Heads(nn.Module):
    """Queries of tokens, keys and values of tokens or of the condition."""

    def __init__(self, c: GatedDitConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.q, self.k, self.v = (nn.Linear(c.width, c.width, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = LayerNorm(c.width, 1e-5), LayerNorm(c.width, 1e-5)

    def forward(self, x: Tensor, seen: Tensor, turn: Tensor, bias: Tensor | None) -> Tensor:
        """Tokens x (b, n, w) look at `seen` (b, m, w), which are turned too where they are the tokens themselves."""
        q, k = turned(self._split(self.q_norm(self.q(x))), turn), self._split(self.k_norm(self.k(seen)))
        return attend(q, turned(k, turn) if seen is x else k, self._split(self.v(seen)), bias)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, c: GatedDitConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(c.time_width, 4 * c.width)
        self.norm1, self.norm2, self.mlp_norm1, self.mlp_norm2, self.condition_norm = (
            RMSNorm(c.width, c.norm_eps) for _ in range(5))
        self.own, self.cross = Heads(c), Heads(c)
        self.gate = nn.Parameter(torch.zeros(c.heads))
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.mlp = SwiGLU(c.width, c.hidden)

    def forward(self, x: Tensor, embedded: Tensor, condition: Tensor, turn: Tensor, bias: Tensor | None) -> Tensor:
        """embedded (b, time_width); bias (b, 1, q) for the condition."""
        scale, gate, scale2, gate2 = self.modulation(F.silu(embedded))[:, None].chunk(4, -1)
        n = self.norm1(x) * (1 + scale)
        said = self.cross(n, self.condition_norm(condition), turn, bias).unflatten(-1, (len(self.gate), -1))
        mixed = self.own(n, n, turn, None) + (self.gate.tanh()[:, None] * said).flatten(-2)
        x = x + gate.tanh() * self.norm2(self.out(mixed))
        return x + gate2.tanh() * self.mlp_norm2(self.mlp(self.mlp_norm1(x) * (1 + scale2)))


class GatedDit(nn.Module):
    """`dit(x, t, condition, grid, visible)`: latent tokens (b, n, token_width) at flow times t (b,), under a condition
    (b, q, condition_width) of which `visible` (b, q) bool says what counts -> velocities like x."""

    def __init__(self, config: GatedDitConfig) -> None:
        super().__init__()
        c = self.config = config
        self.input = nn.Linear(c.token_width, c.width)
        self.condition = nn.Sequential(nn.Linear(c.condition_width, c.width), nn.GELU("tanh"),
                                       nn.Linear(c.width, c.width))
        self.time = TimeEmbedding(c.time_width)
        self.mean = nn.Sequential(LayerNorm(c.width), nn.Linear(c.width, c.time_width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.scale, self.output = nn.Linear(c.time_width, c.width), nn.Linear(c.width, c.token_width)
        uniform_weights(self.modules())
        nn.init.zeros_(self.output.weight)  # a fresh network predicts zero velocity
        if c.side:
            self.register_buffer("positions", sincos_2d(c.width, c.side), persistent=False)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, grid: Grid, visible: Tensor | None = None) -> Tensor:
        c = self.config
        check(x, condition, grid, c.token_width, c.condition_width)
        x = self.input(x.to(self.input.weight.dtype))
        if c.side:
            x = x + cast(Tensor, self.positions)[position_ids(grid, c.side, device=x.device)].to(x.dtype)
        condition = self.condition(condition.to(x.dtype))
        embedded = self.time((1 - t) * NOISE_STEPS) + self.mean(mean(condition, visible))
        bias = None if visible is None else additive(visible[:, None], x.dtype)
        turn = angles(grid, c.width // c.heads, x.device)
        for block in self.blocks:
            x = block(x, embedded, condition, turn, bias)
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.output(normed * (1 + self.scale(F.silu(embedded))[:, None]))


def angles(grid: Grid, head_dim: int, device: torch.device, theta: float = 1e4) -> Tensor:
    """(n, head_dim / 2): by row and by column, pair after pair."""
    quarter = head_dim // 4
    inverse = theta ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    return (torch.stack((rows, columns), -1).flatten(0, 1)[:, None] * inverse[:, None]).flatten(1)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate neighbouring channels of x (b, heads, n, head_dim) by angles (n, head_dim / 2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
