"""Depth transformer: the codes of one cell, one after the other, from what a language model says about the cell
(RQ-Transformer, arXiv 2203.01941; VILA-U, UniFork).

    token 0 = in_hidden(h),   token d = in_code(v_1 + ... + v_d),   v_j the vector of the cell's j-th code
    logits_d = head(norm(blocks(tokens + positions)))_d,   causal over depth

Shape letters: n cells, k values of a code, c width of a code vector.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.parts.vision import MLP, Attention, VisionConfig


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """`inner`: width of attention, if it is another than that of the blocks (UniFork)."""

    depth: int = 4  # UniFork, and all numbers below
    values: int = 16384
    code_width: int = 1024
    hidden_width: int = 896
    width: int = 896
    inner: int = 3584
    heads: int = 32
    layers: int = 6
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5


class Block(nn.Module):
    """x + narrow(attention(widen(norm(x)))), then x + mlp(norm(x))."""

    def __init__(self, c: DepthConfig):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.width, c.norm_eps), nn.LayerNorm(c.width, c.norm_eps)
        other = c.inner != c.width
        self.widen = nn.Linear(c.width, c.inner) if other else nn.Identity()
        self.narrow = nn.Linear(c.inner, c.width) if other else nn.Identity()
        self.attention = Attention(VisionConfig(width=c.inner, num_heads=c.heads))
        self.mlp = MLP(VisionConfig(width=c.width, mlp_width=int(c.width * c.mlp_ratio), num_heads=1, gelu="exact"))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.narrow(self.attention(self.widen(self.norm1(x)), mask))
        return x + self.mlp(self.norm2(x))


class DepthTransformer(nn.Module):
    """Hidden states (..., hidden_width) and code vectors (..., depth, c) -> logits (..., depth, k) of every code."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        c = self.config = config
        self.in_hidden, self.in_code = nn.Linear(c.hidden_width, c.width), nn.Linear(c.code_width, c.width)
        self.positions = nn.Parameter(torch.randn(c.depth, c.width) * 0.02)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm, self.head = nn.LayerNorm(c.width, c.norm_eps), nn.Linear(c.width, c.values)

    def forward(self, hidden: Tensor, vectors: Tensor) -> Tensor:
        """Teacher-forced. Vectors of the first codes only give the logits up to the next: d of them, d + 1 logits."""
        c, known = self.config, min(vectors.shape[-2], self.config.depth - 1)
        if vectors.shape[-1] != c.code_width or vectors.shape[:-2] != hidden.shape[:-1]:
            raise ValueError(f"expected code vectors ({', '.join(map(str, hidden.shape[:-1]))}, depth, {c.code_width}) "
                             f"for hidden states {tuple(hidden.shape)}, got {tuple(vectors.shape)}")
        sums = vectors[..., :known, :].cumsum(-2).to(hidden.dtype)
        x = torch.cat((self.in_hidden(hidden)[..., None, :], self.in_code(sums)), -2) + self.positions[:known + 1]
        mask = torch.ones(1, known + 1, known + 1, dtype=torch.bool, device=x.device).tril()
        lead, x = x.shape[:-2], x.flatten(0, -3)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x)).unflatten(0, lead)

    @torch.no_grad()
    def generate(self, hidden: Tensor, embed: Callable[[int, Tensor], Tensor],
                 draw: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Codes (n, depth) int64 and the sum of their vectors (n, c) for hidden states (n, hidden_width).

        `embed(d, codes)`: their vectors. `draw(d, logits)` chooses codes (n,) from logits (n, k); under guidance the
        rows of all branches are in n, and it gives all of one cell the same code. Past tokens are computed again: there
        are at most `depth`.
        """
        c = self.config
        vectors, codes = hidden.new_zeros(len(hidden), 0, c.code_width), []
        for d in range(c.depth):
            codes.append(draw(d, self(hidden, vectors)[:, -1]))
            vectors = torch.cat((vectors, embed(d, codes[-1])[:, None].to(vectors)), 1)
        return torch.stack(codes, 1), vectors.sum(1)
