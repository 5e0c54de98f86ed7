"""Querying transformer: learned queries look at the features of a picture and become a short sequence (BLIP-2, arXiv
2301.12597), causal where query i sees only those up to i (SEED, arXiv 2310.01218).

    x = norm(queries)
    x = norm(x + self_attention(x));  x = norm(x + cross_attention(x, features)), every so many layers;
    x = norm(x + mlp(x))

The block is that of BERT: norms stand behind the sums. With `form` "gated" it is that of MammothModa2 (2511.18262):

    features = linear(norm(features));  x = queries
    x += self_attention(norm(x));  x += cross_attention(norm(x), features);  x += swiglu(norm(x))

Shape letters: b pictures, q queries, d width, m features of f.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.blocks import RMSNorm, SwiGLU, additive, attend


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
    form: Literal["bert", "gated"] = "bert"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"expected width to be a multiple of heads={self.heads}, got {self.width}")
        if min(self.layers, self.queries, self.cross_every) < 1:
            raise ValueError(f"expected layers, queries and cross_every of at least 1, got {self.layers}, "
                             f"{self.queries} and {self.cross_every}")


class Attention(nn.Module):
    """norm(x + attention(x, seen)), for queries x (b, q, d) and what they look at (b, m, s), themselves by default;
    gated: x + attention(norm(x), seen)."""

    def __init__(self, c: QFormerConfig, seen_width: int) -> None:
        super().__init__()
        self.heads, self.first = c.heads, c.form == "gated"
        self.query = nn.Linear(c.width, c.width)
        self.key, self.value = nn.Linear(seen_width, c.width), nn.Linear(seen_width, c.width)
        self.out, self.norm = nn.Linear(c.width, c.width), _norm(c)

    def forward(self, x: Tensor, seen: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        y = self.norm(x) if self.first else x
        seen = y if seen is None else seen
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for z in (self.query(y), self.key(seen), self.value(seen)))
        x = x + self.out(attend(q, k, v, bias))
        return x if self.first else self.norm(x)


class Layer(nn.Module):
    def __init__(self, c: QFormerConfig, looks: bool) -> None:
        super().__init__()
        self.attention, gated = Attention(c, c.width), c.form == "gated"
        self.cross = Attention(c, c.width if gated else c.feature_width) if looks else None
        if gated:
            self.mlp = SwiGLU(c.width, c.mlp_width)
        else:
            self.up, self.down = nn.Linear(c.width, c.mlp_width), nn.Linear(c.mlp_width, c.width)
        self.norm, self.gated = _norm(c), gated

    def forward(self, x: Tensor, features: Tensor, bias: Tensor | None, seen: Tensor | None = None) -> Tensor:
        """`bias` of the queries among themselves, `seen` that of what they look at."""
        x = self.attention(x, bias=bias)
        x = x if self.cross is None else self.cross(x, features, seen)
        return x + self.mlp(self.norm(x)) if self.gated else self.norm(x + self.down(F.gelu(self.up(x))))


def _norm(c: QFormerConfig) -> nn.Module:
    return RMSNorm(c.width, c.norm_eps) if c.form == "gated" else nn.LayerNorm(c.width, c.norm_eps)


class QFormer(nn.Module):
    """Features (b, m, f), of which `visible` (b, m) bool count -> states of the queries (b, q, d)."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        c = self.config = config
        self.queries = nn.Parameter(torch.empty(c.queries, c.width))
        gated = c.form == "gated"
        self.norm = nn.Identity() if gated else _norm(c)
        self.project = nn.Sequential(RMSNorm(c.feature_width, c.norm_eps), nn.Linear(c.feature_width, c.width)) \
            if gated else nn.Identity()
        self.layers = nn.ModuleList(Layer(c, i % c.cross_every == 0) for i in range(c.layers))
        nn.init.normal_(self.queries, std=0.02)  # matrices start as torch has it: BERT's spread at BERT's width

    def forward(self, features: Tensor, count: int | None = None, causal: bool | None = None,
                visible: Tensor | None = None) -> Tensor:
        """`count`: with the first queries only. `causal` replaces what the config says."""
        c = self.config
        count = c.queries if count is None else count
        if not 1 <= count <= c.queries:
            raise ValueError(f"expected 1 to {c.queries} queries, got {count}")
        if features.ndim != 3 or features.shape[2] != c.feature_width:
            raise ValueError(f"expected features of shape (b, m, {c.feature_width}), got {tuple(features.shape)}")
        x = self.norm(self.queries[:count]).to(features.dtype).expand(len(features), -1, -1)
        features, bias = self.project(features), None
        seen = None if visible is None else additive(visible[:, None], x.dtype)
        if c.causal if causal is None else causal:
            bias = additive(torch.ones(1, count, count, dtype=torch.bool, device=x.device).tril(), x.dtype)
        for layer in cast(Sequence[Layer], self.layers):
            x = layer(x, features, bias, seen)
        return x
