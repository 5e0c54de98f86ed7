"""The trunk: layers of attention and feed-forward over a packed sequence, with parameters assigned by a coupling.

Hidden states travel as one tensor per route, (n_r, width_r), in row-major order of the packed sequence; only for the
attention product are they laid out as rows. So nothing is computed for padding, and routes may differ in width.
"""
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from diptych.parts.blocks import (
    AttentionProjections,
    BlockConfig,
    additive,
    attend,
    make_mlp,
    make_norm,
    split_heads,
    working_dtype,
)
from diptych.parts.cache import Context, Run
from diptych.parts.experts import Coupling, streams
from diptych.parts.masks import Predicate, same
from diptych.parts.positions import Rope
from diptych.parts.tokens import Tokens


class Layer(nn.Module):
    """The parameter sets of one layer: `attention[e]` with its norm, `mlp[e]` with its norm (in a parallel block that
    of the attention)."""

    def __init__(self, c: BlockConfig, attention_sets: int, mlp_sets: int) -> None:
        super().__init__()
        self.parallel = c.parallel
        self.attention_norm = nn.ModuleList(make_norm(c, c.width) for _ in range(attention_sets))
        self.attention = nn.ModuleList(AttentionProjections(c) for _ in range(attention_sets))
        self.mlp_norm = nn.ModuleList(make_norm(c, c.width) for _ in range(0 if c.parallel else mlp_sets))
        self.mlp = nn.ModuleList(make_mlp(c) for _ in range(mlp_sets))

    def before(self, x: Tensor, attention: int) -> Tensor:
        """(n, width) -> queries, keys and values (n, heads + 2 kv_heads, head_dim) of one parameter set."""
        return cast(AttentionProjections, self.attention[attention]).project(self.attention_norm[attention](x))

    def after(self, x: Tensor, mixed: Tensor, attention: int, mlp: int) -> Tensor:
        """Add what attention brought, (n, heads * head_dim), and the feed-forward network."""
        h = x + cast(AttentionProjections, self.attention[attention]).out(mixed)
        normed = self.attention_norm[attention](x) if self.parallel else self.mlp_norm[mlp](h)
        return h + self.mlp[mlp](normed)


class Trunk(nn.Module):
    """`trunk(states, tokens, mask)`: one state tensor per route in, one per route out (after the final norm)."""

    def __init__(self, block: BlockConfig, coupling: Coupling, rope: Rope) -> None:
        super().__init__()
        self.block, self.coupling, self.rope = block, coupling, rope
        self.layers = nn.ModuleList(Layer(block, max(c.attention) + 1, max(c.mlp) + 1) for c in coupling.layers)
        self.norm = nn.ModuleList(make_norm(block, block.width) for _ in range(max(coupling.final) + 1))
        self.groups = streams(coupling)

    def forward(self, states: Sequence[Tensor], tokens: Tokens, mask: Predicate,
                run: Run | None = None) -> list[Tensor]:
        """states[r] (n_r, width) for the tokens of route r in row-major order -> the same shapes.

        With `run` (from `start`), queries also see the cached tokens, and the new keys are written into the contexts.
        """
        rows, length = tokens.shape
        index = tokens.routes(self.coupling.routes)
        flat = [torch.cat([index[r] for r in group]) for group in self.groups]
        x = [torch.cat([states[r] for r in group]) if len(group) > 1 else states[group[0]] for group in self.groups]
        order = torch.cat(flat)
        place = _places(order, rows * length)
        sizes = [len(f) for f in flat]
        cos, sin = self.rope(tokens)
        seen = tokens if run is None else run.seen()
        dtype = working_dtype(x[0])
        allowed = additive(mask.dense(tokens, seen), dtype)
        joint = all(c.joint for c in self.coupling.layers)
        apart = allowed if joint else additive((mask & same("route")).dense(tokens, seen), dtype)

        layers = cast(Sequence[Layer], self.layers)
        for number, (layer, coupling) in enumerate(zip(layers, self.coupling.layers, strict=True)):
            sets = [(coupling.attention[group[0]], coupling.mlp[group[0]]) for group in self.groups]
            qkv = torch.cat([layer.before(h, a) for h, (a, _) in zip(x, sets, strict=True)])
            q, k, v = split_heads(_Lay.apply(qkv, place, order).unflatten(0, (rows, length)), self.block, cos, sin)
            if run is None:
                k, v = k.transpose(1, 2), v.transpose(1, 2)
            else:
                k, v = run.extend(number, k, v)
                k, v = k.to(q.dtype), v.to(q.dtype)
            mixed = attend(q.transpose(1, 2), k, v, allowed if coupling.joint else apart).flatten(0, 1)
            parts = _Take.apply(mixed, order).split(sizes)
            x = [layer.after(h, part, *own) for h, part, own in zip(x, parts, sets, strict=True)]

        out: list[Tensor] = [x[0]] * self.coupling.routes
        for s, group in enumerate(self.groups):
            normed = self.norm[self.coupling.final[group[0]]](x[s])
            for route, part in zip(group, normed.split([len(index[r]) for r in group]), strict=True):
                out[route] = part
        return out

    def start(self, contexts: Sequence[Context], tokens: Tokens, dtype: torch.dtype) -> Run:
        """Open a forward pass behind `contexts` (one per row of `tokens`)."""
        return Run(contexts, tokens, layers=len(self.layers), kv_heads=self.block.kv_heads,
                   head_dim=self.block.head_dim, dtype=dtype)


def pick(states: Sequence[Tensor], tokens: Tokens, cells: Tensor) -> Tensor:
    """States (m, width) of the tokens at the flat places `cells` (m,) of the packed sequence, whatever their route."""
    order = torch.cat(tokens.routes(len(states)))
    return torch.cat(list(states))[_places(order, tokens.index.numel())[cells]]


def _places(order: Tensor, cells: int) -> Tensor:
    """For every cell of the (rows * length) grid the number of its token in the concatenation; padding points at 0."""
    place = torch.zeros(cells, dtype=torch.long, device=order.device)
    place[order] = torch.arange(len(order), device=order.device)
    return place


class _Lay(torch.autograd.Function):
    """tokens[place]: into the grid. Every token has one cell and padding cells get no gradient (masks hide them), so
    the backward pass is a gather too, several times faster than the general scatter-add."""

    @staticmethod
    def forward(ctx, tokens: Tensor, place: Tensor, order: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(order)
        return tokens.index_select(0, place)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Take(torch.autograd.Function):
    """grid[order]: back out of the grid, without padding."""

    @staticmethod
    def forward(ctx, grid: Tensor, order: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(order)
        ctx.cells = grid.shape[0]
        return grid.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        out = gradient.new_zeros(ctx.cells, *gradient.shape[1:])
        return out.index_copy_(0, ctx.saved_tensors[0], gradient), None
