"""Diffusion transformer in two streams: tokens of pictures and words keep parameters of their own and see each other in
one attention (Stable Diffusion 3, arXiv 2403.03206; MMDiT-X of Stable Diffusion 3.5).

    e = time(t) + mlp(pooled);   (s, c, g, s', c', g') = matrix(silu(e))            per block and stream
    a_x, a_w = attention([n(x), n(w)], [n(x), n(w)])          n(x) = norm(x) * (1 + c) + s
    x += g * a_x + g" * attention(n"(x), n"(x));   x += g' * mlp(n'(x))            the second attention in some blocks
    w += g * a_w;                                  w += g' * mlp(n'(w))            in the last block only looked at

Pictures to draw from are clean latents in front of the noisy ones: the same matrix, the same places, the same
modulation, so that their order alone tells them apart. Only the noisy ones are read out. A picture lies in the middle
of the table of places. The velocity is data - noise. Shape letters: b batch, n tokens, m tokens of pictures to draw
from, q condition tokens, w width.
"""
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.blocks import AttentionProjections, BlockConfig, additive, attend, make_mlp
from diptych.parts.dit import NOISE_STEPS, check, uniform_weights
from diptych.parts.positions import TimeEmbedding, sincos_2d
from diptych.parts.vision import Grid, position_ids

EPS = 1e-6  # of all norms


@dataclass(frozen=True, kw_only=True)
class JointDitConfig:
    """`dual` are the blocks in which pictures have a second attention among themselves. The table of places has `side`
    rows and columns, which count as `span`: smaller steps where there are more rows than that."""

    token_width: int = 64  # Stable Diffusion 3.5 Medium, and all numbers below
    width: int = 1536
    layers: int = 24
    heads: int = 24
    hidden: int = 6144
    condition_width: int = 4096
    pooled_width: int = 2048
    dual: tuple[int, ...] = tuple(range(13))
    side: int = 384
    span: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "dual", tuple(self.dual))  # lists come from JSON and YAML
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"expected width to be a multiple of heads and of 4, got {self.width} and {self.heads}")
        if any(not 0 <= i < self.layers for i in self.dual):
            raise ValueError(f"expected dual blocks out of {self.layers}, got {self.dual}")

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(width=self.width, heads=self.heads, kv_heads=self.heads, head_dim=self.width // self.heads,
                           hidden=self.hidden, qk_norm=True, norm_eps=EPS, mlp="gelu", bias=True)

    def build(self) -> "JointDit":
        return JointDit(self)


class Block(nn.Module):
    """`last`: nothing reads the words behind it, so they have keys and values only. Their queries are kept, as
    published, but asked by no one."""

    def __init__(self, c: JointDitConfig, dual: bool, last: bool) -> None:
        super().__init__()
        form, w = c.block, c.width
        self.heads = c.heads
        self.modulation = nn.Linear(w, (9 if dual else 6) * w)
        self.words_modulation = nn.Linear(w, (2 if last else 6) * w)
        self.attention, self.words_attention = AttentionProjections(form), AttentionProjections(form)
        self.dual = AttentionProjections(form) if dual else None
        self.mlp, self.words_mlp = make_mlp(form), None if last else make_mlp(form)
        if last:
            self.words_attention.out = nn.Identity()  # type: ignore[assignment]
            self.words_attention.q_norm.requires_grad_(False)

    def forward(self, x: Tensor, words: Tensor, embedded: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (b, m + n, w), words (b, q, w), embedded times after silu (b, w), bias (b, 1, m + n + q)."""
        shift, scale, gate, shift2, scale2, gate2, *more = _parts(self.modulation, embedded)
        told, count = _parts(self.words_modulation, embedded), x.shape[1]
        if self.words_mlp is None:
            told.reverse()  # published with the scale first
        own = self.attention.project(modulated(x, shift, scale))
        said = self.words_attention.project(modulated(words, told[0], told[1]))
        mixed = self._attend(torch.cat((own, said), 1), count if self.words_mlp is None else None, bias)
        out = x + gate * self.attention.merge(mixed[:, :count])
        if self.dual is not None:
            out = out + more[2] * self.dual.merge(self._attend(self.dual.project(modulated(x, more[0], more[1]))))
        out = out + gate2 * self.mlp(modulated(out, shift2, scale2))
        if self.words_mlp is None:
            return out, words
        words = words + told[2] * self.words_attention.merge(mixed[:, count:])
        return out, words + told[5] * self.words_mlp(modulated(words, told[3], told[4]))

    def _attend(self, qkv: Tensor, asked: int | None = None, bias: Tensor | None = None) -> Tensor:
        """(b, k, 3 heads, head_dim) -> (b, k, w), of the first `asked` tokens where not all are."""
        q, k, v = qkv.transpose(1, 2).split(self.heads, 1)
        return attend(q[:, :, :asked], k, v, bias)


class JointDit(nn.Module):
    """`dit(x, t, condition, pooled, grid, visible, references)`: latent tokens (b, n, token_width) at flow times t
    (b,), under a condition (b, q, condition_width) of which `visible` (b, q) bool says what counts and one vector of
    the whole (b, pooled_width) -> velocities like x. `references` (b, m, token_width): clean latent tokens of pictures
    of the same grid, one behind the other."""

    positions: Tensor

    def __init__(self, config: JointDitConfig) -> None:
        super().__init__()
        c = self.config = config
        self.input, self.output = nn.Linear(c.token_width, c.width), nn.Linear(c.width, c.token_width)
        # published checkpoints bring the table along
        self.register_buffer("positions", sincos_2d(c.width, c.side, c.span / c.side))
        self.time = TimeEmbedding(c.width)
        self.pooled = nn.Sequential(nn.Linear(c.pooled_width, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.condition = nn.Linear(c.condition_width, c.width)
        self.blocks = nn.ModuleList(Block(c, i in c.dual, i == c.layers - 1) for i in range(c.layers))
        self.modulation = nn.Linear(c.width, 2 * c.width)
        uniform_weights(self.modules())
        # a fresh network predicts zero velocity, and its blocks pass what they get
        blocks = cast(list[Block], list(self.blocks))
        for linear in (self.output, self.modulation, *(m for b in blocks for m in (b.modulation, b.words_modulation))):
            nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, pooled: Tensor, grid: Grid,
                visible: Tensor | None = None, references: Tensor | None = None) -> Tensor:
        c, count, dtype = self.config, x.shape[1], self.input.weight.dtype
        check(x, condition, grid, c.token_width, c.condition_width)
        if pooled.shape != (len(x), c.pooled_width):
            raise ValueError(f"expected a pooled vector of shape ({len(x)}, {c.pooled_width}), "
                             f"got {tuple(pooled.shape)}")
        places = self.positions[central_ids(grid, c.side, x.device)].to(dtype)
        x = self.input(x.to(dtype)) + places
        if references is not None:
            if references.shape[::2] != (len(x), c.token_width) or references.shape[1] % count:
                raise ValueError(f"expected references of shape ({len(x)}, a multiple of {count}, {c.token_width}), "
                                 f"got {tuple(references.shape)}; fix: scale them to the size of the picture to draw")
            given = self.input(references.to(dtype)).unflatten(1, (-1, count)) + places
            x = torch.cat((given.flatten(1, 2), x), 1)
        embedded = F.silu(self.time((1 - t) * NOISE_STEPS) + self.pooled(pooled.to(dtype)))
        words, bias = self.condition(condition.to(dtype)), None
        if visible is not None:
            seen = torch.cat((visible.new_ones(x.shape[:2]), visible), 1)
            bias = additive(seen[:, None], x.dtype)
        for block in self.blocks:
            x, words = block(x, words, embedded, bias)
        scale, shift = _parts(self.modulation, embedded)
        return self.output(modulated(x[:, -count:], shift, scale))


def _parts(modulation: nn.Linear, embedded: Tensor) -> list[Tensor]:
    """(b, w) -> shifts, scales and gates (b, 1, w)."""
    return list(modulation(embedded)[:, None].split(embedded.shape[-1], -1))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def central_ids(grid: Grid, side: int, device: torch.device) -> Tensor:
    """Rows of a flattened `side` x `side` table for the cells of a picture in its middle, (rows * columns,)."""
    top, left = ((side - n) // 2 for n in grid)
    return position_ids(grid, side, device=device) + top * side + left
