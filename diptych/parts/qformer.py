"""Querying transformer: learned queries look at the features of a picture and become a short sequence (BLIP-2, arXiv
2301.12597), causal where query i sees only those up to i (SEED, arXiv 2310.01218).

    x = norm(queries)
    x = norm(x + self_attention(x));  x = norm(x + cross_attention(x, features)), every so many layers;
    x = norm(x + mlp(x))

The block is that of BERT: norms stand behind the sums. Shape letters: b pictures, q queries, d width, m features of f.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.blocks import additive, attend


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """`cross_every`: layers 0, cross_every, 2 cross_every, ... look at the features."""

    width: int = 768  # BERT-base, and all numbers below
    mlp_width: int = 3072
    layers: int = 12
    heads: int = 12
    norm_eps: float = 1e-12
    queries: int = 32  # BLIP-2
    cross_every: int = 2  # BLIP-2
    feature_width: int = 1408  # EVA-CLIP ViT-g
    causal: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"expected width to be a multiple of heads={self.heads}, got {self.width}")
        if min(self.layers, self.queries, self.cross_every) < 1:
            raise ValueError(f"expected layers, queries and cross_every of at least 1, got {self.layers}, "
                             f"{self.queries} and {self.cross_every}")


class Attention(nn.Module):
    """norm(x + attention(x, seen)), for queries x (b, q, d) and what they look at (b, m, s)."""

    def __init__(self, c: QFormerConfig, seen_width: int) -> None:
        super().__init__()
        self.heads = c.heads
        self.query = nn.Linear(c.width, c.width)
        self.key, self.value = nn.Linear(seen_width, c.width), nn.Linear(seen_width, c.width)
        self.out, self.norm = nn.Linear(c.width, c.width), nn.LayerNorm(c.width, c.norm_eps)

    def forward(self, x: Tensor, seen: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y in (self.query(x), self.key(seen), self.value(seen)))
        return self.norm(x + self.out(attend(q, k, v, bias)))


class Layer(nn.Module):
    def __init__(self, c: QFormerConfig, looks: bool) -> None:
        super().__init__()
        self.attention = Attention(c, c.width)
        self.cross = Attention(c, c.feature_width) if looks else None
        self.up, self.down = nn.Linear(c.width, c.mlp_width), nn.Linear(c.mlp_width, c.width)
        self.norm = nn.LayerNorm(c.width, c.norm_eps)

    def forward(self, x: Tensor, features: Tensor, bias: Tensor | None) -> Tensor:
        x = self.attention(x, x, bias)
        x = x if self.cross is None else self.cross(x, features)
        return self.norm(x + self.down(F.gelu(self.up(x))))


class QFormer(nn.Module):
    """Features (b, m, f) -> states of the queries (b, q, d)."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        c = self.config = config
        self.queries = nn.Parameter(torch.empty(c.queries, c.width))
        self.norm = nn.LayerNorm(c.width, c.norm_eps)
        self.layers = nn.ModuleList(Layer(c, i % c.cross_every == 0) for i in range(c.layers))
        nn.init.normal_(self.queries, std=0.02)  # matrices start as torch has it: BERT's spread at BERT's width

    def forward(self, features: Tensor, count: int | None = None, causal: bool | None = None) -> Tensor:
        """`count`: with the first queries only. `causal` replaces what the config says."""
        c = self.config
        count = c.queries if count is None else count
        if not 1 <= count <= c.queries:
            raise ValueError(f"expected 1 to {c.queries} queries, got {count}")
        if features.ndim != 3 or features.shape[2] != c.feature_width:
            raise ValueError(f"expected features of shape (b, m, {c.feature_width}), got {tuple(features.shape)}")
        x = self.norm(self.queries[:count]).to(features.dtype).expand(len(features), -1, -1)
        bias = None
        if c.causal if causal is None else causal:
            bias = additive(torch.ones(1, count, count, dtype=torch.bool, device=x.device).tril(), x.dtype)
        for layer in cast(Sequence[Layer], self.layers):
            x = layer(x, features, bias)
        return x
