"""Diffusion transformer in one stream: what is said, pictures to draw from and noisy tokens are one sequence that sees
all of itself (Lumina-Image 2.0, arXiv 2503.21758; OmniGen2, 2506.18871; MammothModa2, 2511.18262).

    c = blocks(c);   r_i = blocks(matrix'(r_i) + index_i, e);   x = blocks(matrix(x), e)         refiners, each alone
    c, r_1 .. r_k, x = blocks((c, r_1 .. r_k, x), e)                                             e = time(t)
    (s, g, s', g') = matrix(silu(e)) in every block, 0 and 1 where c is alone
    x += tanh(g) * norm(attention(norm(x) * (1 + s)));   x += tanh(g') * norm(mlp(norm(x) * (1 + s')))

Places have three axes: condition token l stands at (l, l, l), a cell of a picture at (shift, row, column), where the
shift starts behind the condition and every picture moves it on by its longer side. The velocity is data - noise.
Shape letters: b pictures to draw, n tokens, q condition tokens, w width.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.blocks import RMSNorm, SwiGLU, additive, attend
from diptych.parts.dit import NOISE_STEPS, uniform_weights
from diptych.parts.dit_gated import turned
from diptych.parts.positions import TimeEmbedding, sincos_2d
from diptych.parts.serial import padded
from diptych.parts.vision import Grid, position_ids

Reference = tuple[Tensor, Grid]  # clean latent tokens (n, token_width) of a picture, and its rows and columns


@dataclass(frozen=True, kw_only=True)
class StreamDitConfig:
    """`axes`: channels of a head that turn by each axis. `references`: how many pictures to draw from are told apart.
    `side` rows and columns of a fixed table of positions beside the rotation, 0 for none, as published."""

    token_width: int = 64  # MammothModa2, and all numbers below
    width: int = 2304
    layers: int = 26
    refiners: int = 2
    heads: int = 24
    kv_heads: int = 8
    hidden: int = 9216
    axes: tuple[int, int, int] = (32, 32, 32)
    time_width: int = 1024
    time_scale: float = NOISE_STEPS
    references: int = 5
    side: int = 0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))  # lists come from JSON and YAML
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"expected width to be a multiple of heads and heads of kv_heads, got {self.width}, "
                             f"{self.heads} and {self.kv_heads}")
        if sum(self.axes) != self.width // self.heads or any(n % 2 for n in self.axes):
            raise ValueError(f"expected even axes that sum to the {self.width // self.heads} channels of a head, "
                             f"got {self.axes}")

    def build(self) -> "StreamDit":
        return StreamDit(self)


class Block(nn.Module):
    def __init__(self, c: StreamDitConfig, modulated: bool = True) -> None:
        super().__init__()
        self.split, head = (c.heads, c.kv_heads, c.kv_heads), c.width // c.heads
        self.modulation = nn.Linear(c.time_width, 4 * c.width) if modulated else None
        self.norm1, self.norm2, self.mlp_norm1, self.mlp_norm2 = (RMSNorm(c.width, c.norm_eps) for _ in range(4))
        self.qkv = nn.Linear(c.width, sum(self.split) * head, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head, 1e-5), RMSNorm(head, 1e-5)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.mlp = SwiGLU(c.width, c.hidden)

    def forward(self, x: Tensor, turn: Tensor, bias: Tensor | None, embedded: Tensor | None = None) -> Tensor:
        """x (b, n, w) with angles (b, n, head_dim / 2), bias (b, 1, n) and embedded times (b, time_width)."""
        if self.modulation is None or embedded is None:
            x = x + self.norm2(self._attention(self.norm1(x), turn, bias))
            return x + self.mlp_norm2(self.mlp(self.mlp_norm1(x)))
        scale, gate, scale2, gate2 = self.modulation(F.silu(embedded))[:, None].chunk(4, -1)
        x = x + gate.tanh() * self.norm2(self._attention(self.norm1(x) * (1 + scale), turn, bias))
        return x + gate2.tanh() * self.mlp_norm2(self.mlp(self.mlp_norm1(x) * (1 + scale2)))

    def _attention(self, x: Tensor, turn: Tensor, bias: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (sum(self.split), -1)).transpose(1, 2)
        q, k, v = qkv.split(self.split, 1)
        q, k = (turned(norm(y), turn[:, None]) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        return self.out(attend(q, k, v, bias))


class StreamDit(nn.Module):
    """`dit(x, t, conditions, grids, references)`: for each of b pictures latent tokens (n_i, token_width) of a grid, a
    flow time t (b,), a condition (q_i, width), which may be empty, and pictures to draw from -> velocities like x."""

    def __init__(self, config: StreamDitConfig) -> None:
        super().__init__()
        c = self.config = config
        self.input, self.reference_input = nn.Linear(c.token_width, c.width), nn.Linear(c.token_width, c.width)
        self.index = nn.Parameter(torch.empty(c.references, c.width))
        self.time = TimeEmbedding(c.time_width, scale=c.time_scale)
        self.condition_refiner = nn.ModuleList(Block(c, modulated=False) for _ in range(c.refiners))
        self.reference_refiner = nn.ModuleList(Block(c) for _ in range(c.refiners))
        self.noise_refiner = nn.ModuleList(Block(c) for _ in range(c.refiners))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.scale, self.output = nn.Linear(c.time_width, c.width), nn.Linear(c.width, c.token_width)
        uniform_weights(self.modules())
        nn.init.normal_(self.index, std=0.02)
        # a fresh network predicts zero velocity, and its blocks pass what they get
        for linear in (self.output, self.scale, *(m.modulation for m in self.modules() if isinstance(m, Block))):
            if linear is not None:
                nn.init.zeros_(linear.weight)
        if c.side:
            self.register_buffer("positions", sincos_2d(c.width, c.side), persistent=False)

    def forward(self, x: Sequence[Tensor], t: Tensor, conditions: Sequence[Tensor], grids: Sequence[Grid],
                references: Sequence[Sequence[Reference]] | None = None) -> list[Tensor]:
        c, count = self.config, len(x)
        references = [()] * count if references is None else references
        self._check(x, conditions, grids, references)
        embedded, dtype = self.time(t), self.input.weight.dtype
        said = [condition_places(len(condition), t.device) for condition in conditions]
        given = [(i, k, *reference) for i, own in enumerate(references) for k, reference in enumerate(own)]
        places: list[list[Tensor]] = []
        for condition, own, grid in zip(conditions, references, grids, strict=True):
            places.append(picture_places([g for _, g in own] + [grid], len(condition), t.device))

        parts = [self._refine(self.condition_refiner, [p.to(dtype) for p in conditions], said)]
        if given:
            tokens = [self._place(self.reference_input(r.to(dtype)), grid) + self.index[k].to(dtype)
                      for _, k, r, grid in given]
            whose = torch.tensor([i for i, *_ in given], device=t.device)
            parts.append(self._refine(self.reference_refiner, tokens, [places[i][k] for i, k, *_ in given],
                                      embedded[whose]))
        noisy = [self._place(self.input(own.to(dtype)), g) for own, g in zip(x, grids, strict=True)]
        parts.append(self._refine(self.noise_refiner, noisy, [own[-1] for own in places], embedded))

        rows = [[part] for part in parts[0]]
        for number, (i, *_) in enumerate(given):
            rows[i].append(parts[1][number])
        rows = [torch.cat((*row, last)) for row, last in zip(rows, parts[-1], strict=True)]
        turns = [torch.cat((own, *pictures)) for own, pictures in zip(said, places, strict=True)]
        out = self._refine(self.blocks, rows, turns, embedded)
        scale = 1 + self.scale(F.silu(embedded))
        return [self.output(F.layer_norm(row[len(row) - len(own):], (c.width,), eps=1e-6) * scale[i])
                for i, (row, own) in enumerate(zip(out, x, strict=True))]

    def _refine(self, blocks: nn.ModuleList, parts: Sequence[Tensor], places: Sequence[Tensor],
                embedded: Tensor | None = None) -> list[Tensor]:
        """Sequences (n_i, w) at places (n_i, 3), each by itself."""
        lengths = [len(part) for part in parts]
        x, visible = padded(parts)
        if not x.shape[1]:
            return list(x)
        turn, bias = padded([axis_angles(own, self.config.axes) for own in places])[0], None
        if visible is not None:
            bias = additive((visible | ~visible.any(1, keepdim=True))[:, None], x.dtype)  # no row may see nothing
        for block in blocks:
            x = block(x, turn, bias, embedded)
        return [row[:n] for row, n in zip(x, lengths, strict=True)]

    def _place(self, x: Tensor, grid: Grid) -> Tensor:
        if not self.config.side:
            return x
        return x + cast(Tensor, self.positions)[position_ids(grid, self.config.side, device=x.device)].to(x.dtype)

    def _check(self, x: Sequence[Tensor], conditions: Sequence[Tensor], grids: Sequence[Grid],
               references: Sequence[Sequence[Reference]]) -> None:
        c = self.config
        for tokens, (rows, columns) in [*zip(x, grids, strict=True), *(r for own in references for r in own)]:
            if tokens.shape != (rows * columns, c.token_width):
                raise ValueError(f"expected tokens of shape ({rows * columns}, {c.token_width}), "
                                 f"got {tuple(tokens.shape)}")
        for condition in conditions:
            if condition.ndim != 2 or condition.shape[1] != c.width:
                raise ValueError(f"expected conditions of shape (q, {c.width}), got {tuple(condition.shape)}")
        most = max((len(own) for own in references), default=0)
        if most > c.references or len(conditions) != len(x) or len(references) != len(x):
            raise ValueError(f"expected a condition and up to {c.references} references for each of {len(x)} pictures, "
                             f"got {len(conditions)} conditions, {len(references)} lists of up to {most} references")


def condition_places(count: int, device: torch.device) -> Tensor:
    """(count, 3): token l at (l, l, l)."""
    return torch.arange(count, device=device)[:, None].expand(-1, 3)


def picture_places(grids: Sequence[Grid], shift: int, device: torch.device) -> list[Tensor]:
    """For pictures with these grids, one behind the other, the places (rows * columns, 3) of their cells."""
    out = list[Tensor]()
    for rows, columns in grids:
        axes = (torch.arange(n, device=device) for n in (1, rows, columns))
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
        out.append(place + torch.tensor([shift, 0, 0], device=device))
        shift += max(rows, columns)
    return out


def axis_angles(places: Tensor, axes: Sequence[int], theta: float = 1e4) -> Tensor:
    """(n, 3) -> (n, sum(axes) / 2): every axis turns channels of its own, neighbours together."""
    out = [places[:, a:a + 1] * theta ** -(torch.arange(0, n, 2, device=places.device, dtype=torch.float32) / n)
           for a, n in enumerate(axes)]
    return torch.cat(out, 1)
