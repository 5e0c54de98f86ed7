"""Transformer over the codes of a picture from scale to scale (VAR, arXiv 2404.02905; Infinity, arXiv 2412.04431).

    x = [start + first | word(inputs)] + level (+ table)
    x = x + gamma_1 * attention(norm(x) * (1 + scale_1) + shift_1)      a scale sees itself and the coarser ones
    x = x + cross(norm(x), memory)                                      where there is a memory
    x = x + gamma_2 * mlp(norm(x) * (1 + scale_2) + shift_2)
    logits = head(norm(x) * (1 + scale) + shift)

The modulation follows from one condition per picture: by a matrix in every block (VAR), or by one for all blocks with
an offset in each (Infinity). Queries and keys have length 1, and every head learns the factor of its logits. All
pictures of a batch have the same scales.

Shape letters: b pictures, L cells of all scales, n of those at hand, m vectors of the memory, w width, c width of a
code vector, h heads, e channels of a head. Codes are (..., *s): s is () for an index and (d,) for d bits.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.blocks import GeluMlp, RMSNorm, additive, attend
from diptych.parts.positions import axial_angles, rotate
from diptych.parts.quantize import Grid

Scales = tuple[Grid, ...]
Past = tuple[tuple[Tensor, Tensor], ...]  # keys and values (h, n, e) of every layer: what one picture has so far
LARGEST = 100.0  # factor of the cosines


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """`positions`: a learned "table" over the cells of `scales`, or "rotary" ones on the finest grid: cell i of s lies
    at i * finest / s. With `rotary_scales` they are those of the first L cells of these scales instead, whatever the
    scales at hand (Infinity: of its longest schedule). `levels`: rows of the level table, 0 for one per scale."""

    width: int = 2048  # Infinity 2B, and all numbers below
    layers: int = 32
    heads: int = 16
    hidden: int = 8192
    code_width: int = 32
    values: int = 2
    code_shape: tuple[int, ...] = (32,)
    scales: Scales
    levels: int = 0
    positions: Literal["table", "rotary"] = "rotary"
    rotary_scales: Scales = ()
    theta: float = 10_000.0
    shared: bool = True  # one modulation matrix for all blocks
    memory: bool = True
    unit: bool = True  # queries and keys of length 1
    temperature: float = 1.0  # without it the softmax is of q k / (temperature sqrt(e)); VAR's 4
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("scales", "rotary_scales"):  # lists come from JSON and YAML
            object.__setattr__(self, name, tuple((int(r), int(c)) for r, c in getattr(self, name)))
        object.__setattr__(self, "code_shape", tuple(self.code_shape))
        if self.positions not in ("table", "rotary"):
            raise ValueError(f"expected positions table or rotary, got {self.positions!r}")
        if 0 < self.levels < len(self.scales):
            raise ValueError(f"expected a level for each of {len(self.scales)} scales, got {self.levels}")
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(f"expected heads of a multiple of 4 channels, got width {self.width}, heads {self.heads}")


def level_ids(scales: Sequence[Grid], device: torch.device | None = None) -> Tensor:
    """The scale that each of L cells belongs to, (L,)."""
    return torch.cat([torch.full((rows * columns,), k, device=device) for k, (rows, columns) in enumerate(scales)])


def block_causal(scales: Sequence[Grid], device: torch.device | None = None) -> Tensor:
    """(L, L) bool: a cell sees all of its own scale and of the coarser ones."""
    ids = level_ids(scales, device)
    return ids[None] <= ids[:, None]


def finest_places(scales: Sequence[Grid], device: torch.device | None = None) -> Tensor:
    """Row and column (L, 2) of every cell on the finest grid, rounded."""
    out = []
    for grid in scales:
        axes = [(torch.arange(n, device=device) * (finest / n)).round() for n, finest in
                zip(grid, scales[-1], strict=True)]
        out.append(torch.cartesian_prod(*axes).view(-1, 2))
    return torch.cat(out)


class MemoryAttention(nn.Module):
    """Queries (b, n, h, e) over a memory (b, m, width) of which `known` (b, m) says what is there: (b, n, w)."""

    def __init__(self, width: int, memory_width: int) -> None:
        super().__init__()
        self.kv = nn.Linear(memory_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)

    def forward(self, q: Tensor, memory: Tensor, known: Tensor) -> Tensor:
        bias = torch.cat((torch.zeros_like(self.v_bias), self.v_bias))
        k, v = F.linear(memory, self.kv.weight, bias).unflatten(-1, (2, q.shape[2], -1)).transpose(1, 3).unbind(2)
        allowed = additive(known, q.dtype)[:, None].expand(-1, q.shape[1], -1)
        return self.out(attend(q.transpose(1, 2), k, v, allowed))


class Pool(nn.Module):
    """One learned query per head: a memory (b, m, width) with `known` (b, m) -> (b, w)."""

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(heads, width // heads) * (width // heads) ** -0.5)
        self.attention = MemoryAttention(width, memory_width)

    def forward(self, memory: Tensor, known: Tensor) -> Tensor:
        return self.attention(self.query.expand(len(memory), 1, -1, -1).to(memory.dtype), memory, known)[:, 0]


class TextCondition(nn.Module):
    """States of a text (b, m, text_width) -> the condition of a picture (b, w), and with `project` its memory
    (b, m, w). Learned rows, as many as the text has, stand for no text."""

    def __init__(self, width: int, text_width: int, heads: int, rows: int, *, project: bool, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = RMSNorm(text_width, eps)
        self.pool = Pool(width, text_width, heads)
        self.null = nn.Parameter(torch.randn(rows, text_width) * 1.2 * text_width**-0.5)
        if project:
            self.project = nn.Sequential(nn.Linear(text_width, width), nn.GELU("tanh"), nn.Linear(width, width))

    def condition(self, states: Tensor, known: Tensor) -> Tensor:
        return self.pool(self.norm(states), known)

    def memory(self, states: Tensor) -> Tensor:
        return self.project(self.norm(states))


class SelfAttention(nn.Module):
    """Biases of queries and values only: that of keys would not cancel, as they are normalised."""

    def __init__(self, c: ScaleConfig) -> None:
        super().__init__()
        self.c, self.channels = c, c.width // c.heads
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(c.width)) for _ in range(2))
        self.out = nn.Linear(c.width, c.width)
        if c.unit:
            self.factor = nn.Parameter(torch.full((c.heads,), math.log(4)))  # logarithm, per head

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, bias: Tensor | None,
                past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (b, n, w), `past` keys and values (b, h, n', e) -> what is added (b, n, w), keys and values of all."""
        offset = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, offset).unflatten(-1, (3, self.c.heads, -1))
        q, k, v = qkv.unbind(2)
        if self.c.unit:
            factor = self.factor.float().clamp(max=math.log(LARGEST)).exp()[:, None]
            q, k = F.normalize(q.float(), dim=-1) * factor, F.normalize(k.float(), dim=-1)
        else:
            factor = self.channels**-0.5 / self.c.temperature
            q = q.float() * factor
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        q = q * self.channels**0.5  # which `attend` takes out again
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        return self.out(attend(q, k, v, None if bias is None else bias.to(q.dtype))), (k, v)


class ScaleBlock(nn.Module):
    def __init__(self, c: ScaleConfig) -> None:
        super().__init__()
        self.c = c
        self.attention, self.mlp = SelfAttention(c), GeluMlp(c.width, c.hidden, bias=True)
        if c.shared:
            self.offset = nn.Parameter(torch.randn(6, c.width) * c.width**-0.5)
        else:
            self.modulation = _modulation(c.width, 6)
        if c.memory:
            self.cross_norm = nn.LayerNorm(c.width, c.norm_eps)
            self.cross_query = nn.Linear(c.width, c.width)
            self.cross = MemoryAttention(c.width, c.width)

    def forward(self, x: Tensor, condition: Tensor, turn: tuple[Tensor, Tensor] | None, bias: Tensor | None,
                memory: tuple[Tensor, Tensor] | None, past: tuple[Tensor, Tensor] | None
                ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`condition`: the picture's vector (b, w), or with one matrix for all blocks what it gave, (b, 6 w)."""
        six = self.offset + condition.unflatten(-1, (6, -1)) if self.c.shared else \
            self.modulation(condition).unflatten(-1, (6, -1))
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six[:, :, None].unbind(1)
        brought, kept = self.attention(_modulated(x, scale1, shift1, self.c.norm_eps), turn, bias, past)
        x = x + gamma1 * brought
        if memory is not None:
            q = self.cross_query(self.cross_norm(x)).unflatten(-1, (self.c.heads, -1))
            x = x + self.cross(q, *memory)
        return x + gamma2 * self.mlp(_modulated(x, scale2, shift2, self.c.norm_eps)), kept


class ScaleTransformer(nn.Module):
    """`enter` makes tokens of what is read, `forward` logits of them; between the two another network may work."""

    def __init__(self, config: ScaleConfig) -> None:
        super().__init__()
        c = self.config = config
        self.word = nn.Linear(c.code_width, c.width)
        self.first = nn.Parameter(torch.randn(c.width) * c.width**-0.5)
        self.level = nn.Embedding(c.levels or len(c.scales), c.width)
        if c.positions == "table":
            self.table = nn.Parameter(torch.randn(len(level_ids(c.scales)), c.width) * c.width**-0.5)
        if c.shared:
            self.modulation = _modulation(c.width, 6)
        self.blocks = nn.ModuleList(ScaleBlock(c) for _ in range(c.layers))
        self.head_modulation = _modulation(c.width, 2)
        self.head = nn.Linear(c.width, c.values * math.prod(c.code_shape))
        self._start()

    def _start(self) -> None:
        """Blocks begin as the identity; what they add later shrinks with their number (VAR, released code)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=(3 * self.config.width) ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.level.weight, std=self.config.width**-0.5)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, ScaleBlock):
                    for last in (module.attention.out, module.mlp.down):
                        last.weight /= math.sqrt(2 * self.config.layers)
                    given = module.offset if self.config.shared else cast(nn.Linear, module.modulation[1]).weight
                    given.unflatten(0, (6, -1))[:2] *= 1e-5
            if self.config.shared:
                cast(nn.Linear, self.modulation[1]).weight.unflatten(0, (6, -1))[:2] *= 1e-5

    def enter(self, inputs: Tensor | None, start: Tensor | None) -> Tensor:
        """Tokens (b, n, w): the start vector (b, w) of the first scale's cell, if given, then inputs (b, n', c)."""
        if start is None and inputs is None:
            raise ValueError("expected a start vector, inputs or both, got neither")
        first = None if start is None else (start + self.first)[:, None]
        words = None if inputs is None else self.word(inputs.to(self.word.weight.dtype))
        return torch.cat([x for x in (first, words) if x is not None], 1)

    def forward(self, x: Tensor, condition: Tensor, scales: Sequence[Grid], memory: Tensor | None = None,
                known: Tensor | None = None) -> Tensor:
        """Logits (b, L, *s, values) of tokens (b, L, w) of all scales, with conditions (b, w) and memories (b, m, w) of
        which `known` (b, m) bool says what is there."""
        return self._run(x, condition, scales, slice(0, x.shape[1]), memory, known, None)[0]

    def step(self, x: Tensor, condition: Tensor, scales: Sequence[Grid], at: int, past: Sequence[Past],
             memory: Tensor | None = None, known: Tensor | None = None) -> tuple[Tensor, list[Past]]:
        """The same for the tokens (b, n, w) of scale number `at` alone: `past` (empty at the first) is what each of the
        pictures has of the scales before. Logits (b, n, *s, values), and what they have then."""
        before = sum(rows * columns for rows, columns in scales[:at])
        span = slice(before, before + scales[at][0] * scales[at][1])
        return self._run(x, condition, scales, span, memory, known, past)

    def _run(self, x: Tensor, condition: Tensor, scales: Sequence[Grid], span: slice, memory: Tensor | None,
             known: Tensor | None, past: Sequence[Past] | None) -> tuple[Tensor, list[Past]]:
        c, scales = self.config, tuple(scales)
        ids = level_ids(scales, x.device)[span]
        if len(ids) != x.shape[1] or (memory is None) == c.memory:
            raise ValueError(f"expected {len(ids)} tokens for scales {list(scales)}, and a memory: {c.memory}, got "
                             f"{x.shape[1]} and {memory is not None}")
        x = x + self.level(ids) + (self._table(scales)[span] if c.positions == "table" else 0)
        turn = self._turn(scales, span, x.device) if c.positions == "rotary" else None
        # with all before in `past`, the tokens of one scale see everything
        bias = additive(block_causal(scales, x.device), x.dtype)[None] if past is None else None
        told = None
        if memory is not None:
            told = memory, torch.ones(memory.shape[:2], dtype=torch.bool, device=x.device) if known is None else known
        given, grown = self.modulation(condition) if c.shared else condition, []
        for i, block in enumerate(self.blocks):
            own = None
            if past is not None and past[0]:
                own = torch.stack([p[i][0] for p in past]), torch.stack([p[i][1] for p in past])
            x, kept = block(x, given, turn, bias, told, own)
            if past is not None:
                grown.append(kept)
        scale, shift = self.head_modulation(condition).unflatten(-1, (2, -1))[:, :, None].unbind(1)
        logits = self.head(_modulated(x, scale, shift, c.norm_eps)).unflatten(-1, (*c.code_shape, c.values))
        return logits, [tuple((k[b], v[b]) for k, v in grown) for b in range(len(past or ()))]

    def _table(self, scales: Scales) -> Tensor:
        if scales != self.config.scales:
            raise ValueError(f"expected the scales of the learned positions, {list(self.config.scales)}, "
                             f"got {list(scales)}; fix: draw pictures of that size")
        return self.table

    def _turn(self, scales: Scales, span: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        c = self.config
        places = finest_places(c.rotary_scales or scales, device)[span]
        if len(places) != span.stop - span.start:
            raise ValueError(f"expected at most {sum(r * n for r, n in c.rotary_scales)} cells, as the scales of the "
                             f"rotary positions have, got {list(scales)}")
        cos, sin = axial_angles(places, c.width // c.heads, c.theta)
        return cos[None], sin[None]


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def _modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The norm has no weights of its own; its statistics are float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * (1 + scale) + shift
