"""Attention of a packed sequence: states without padding are laid out as rows, product by product, and taken back.

A layer has one product for all streams that see each other, or several where experts differ in their heads. What the
products of one forward pass have in common (masks, angles, places) is computed once.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diptych.parts.blocks import BlockConfig, additive, attend, attend_after, split_heads
from diptych.parts.cache import Run
from diptych.parts.masks import Predicate, key_is, same
from diptych.parts.positions import Rope
from diptych.parts.tokens import Tokens

WORTH = 0.8  # share of the attention products that is left, from which on rows of two lengths are kept apart


@dataclass(frozen=True)
class Product:
    """One attention product of a layer: the streams that take part, the parameter set whose heads and rotation it has,
    and whether routes see each other. `residual`: whether some block in it adds attention maps; `follows`: whether the
    layer before has such a product too."""

    streams: tuple[int, ...]
    host: int
    joint: bool
    residual: bool
    follows: bool = False


class Watch:
    """How much attention every token gives to chosen ones: `passes` gets, of each forward pass, (layers, B, T) float32,
    the mean over heads (0 where nothing attends). Differentiable, and no map is kept: the values that attention mixes
    carry one channel more, which is 1 in the chosen keys, so what arrives in it is their share.

    `keys`: (B, T) bool, or what makes them of the vectors of all tokens in reach, cached ones among them."""

    def __init__(self, keys: "Tensor | Callable[[Tokens], Tensor]") -> None:
        self.keys, self.passes = keys, list[Tensor]()

    def columns(self, seen: Sequence[Tokens], bands: "Sequence[_Band]", cached: bool) -> list[Tensor]:
        """Of the keys of every band (b, K)."""
        if not isinstance(self.keys, Tensor):
            return [self.keys(tokens) for tokens in seen]
        if cached:
            raise ValueError("expected a function of the tokens to watch a forward pass behind a context, got a mask; "
                             "fix: pass what makes the mask of their vectors")
        return [self.keys[b.rows, :b.length] for b in bands] if bands else [self.keys]

    def note(self, shape: tuple[int, int], layers: Sequence[int], found: "Sequence[tuple[int, Tensor, Tensor]]"
             ) -> None:
        """Shares (n,) at flat places (n,), by number of the product; `layers`: of every product."""
        grids = [found[0][2].new_zeros(shape[0] * shape[1]) for _ in range(layers[-1] + 1)]
        for entry, places, share in found:
            grids[layers[entry]] = grids[layers[entry]].index_copy(0, places, share)
        self.passes.append(torch.stack(grids).unflatten(1, shape))


class _Band(NamedTuple):
    """Rows (b,) of like length: a product over short rows does not pay for the longest one."""

    rows: Tensor
    length: int


class Attention:
    """The attention products of one forward pass: what they have in common is computed once. Cells are those of the
    grid (B, T), band by band where rows differ much in length."""

    def __init__(self, tokens: Tokens, mask: Predicate, run: Run | None, dtype: torch.dtype,
                 flat: Sequence[Tensor], watch: Watch | None = None) -> None:
        self.mask, self.run, self.dtype, self.flat = mask, run, dtype, flat
        self.number = torch.arange(tokens.index.numel(), device=tokens.index.device)  # of the cell at a flat place
        self.queries = [tokens]
        bands = _bands(tokens) if run is None else []
        if len(bands) > 1:
            grid = self.number.view(tokens.shape)
            cells = torch.cat([grid[b.rows, :b.length].flatten() for b in bands])
            self.number = places_of(cells, tokens.index.numel())
            self.queries = [tokens.map(lambda v, b=b: v[b.rows, :b.length]) for b in bands]
        self.shapes = [t.shape for t in self.queries]
        self.keys = self.queries if run is None else [run.seen()]
        self.columns = watch and watch.columns(self.keys, bands if len(bands) > 1 else (), run is not None)
        self.shares: list[tuple[int, Tensor, Tensor]] = []  # what a watch is told: product, flat places, shares
        self.allowed: dict[tuple[int, ...] | None, list[Tensor]] = {}
        self.turned: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.laid: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.maps: dict[tuple[int, ...], list[Tensor]] = {}  # of the last residual product of these streams

    def __call__(self, qkv: Tensor, product: Product, routes: Sequence[int], block: BlockConfig, rope: Rope,
                 entry: int, gate: Tensor | None) -> tuple[Tensor, ...]:
        """(n, heads + 2 kv_heads, head_dim) of all its streams -> what each is brought, (n_s, heads * head_dim). `gate`
        (n, heads) if the product is residual."""
        sizes = [len(self.flat[s]) for s in product.streams]
        order, place = self._lay_out(product.streams)
        if not len(order):  # its slots in the contexts may hold anything: no mask shows them
            return qkv.flatten(1)[:, :block.heads * block.head_dim].split(sizes)
        if id(rope) not in self.turned:
            self.turned[id(rope)] = [rope(t) for t in self.queries]
        cells = [rows * length for rows, length in self.shapes]
        laid = _Lay.apply(qkv, place, order).split(cells)
        gates = [None] * len(laid) if gate is None else _Lay.apply(gate, place, order).split(cells)
        maps = self.maps.get(product.streams, []) if product.follows else []
        mixed, made = [], list[Tensor]()
        for n, (part, shape, turn, bias) in enumerate(zip(laid, self.shapes, self.turned[id(rope)],
                                                          self._bias(product, routes), strict=True)):
            q, k, v = split_heads(part.unflatten(0, shape), block, *turn)
            if self.run is None:
                k, v = k.transpose(1, 2), v.transpose(1, 2)
            else:
                k, v = self.run.extend(entry, k, v)
                k, v = k.to(q.dtype), v.to(q.dtype)
            if self.columns is not None:
                chosen = self.columns[n][:, None, :, None].expand(-1, v.shape[1], -1, 1)
                v = torch.cat((v, chosen.to(v.dtype)), -1)
            if (opened := gates[n]) is None:
                out = attend(q.transpose(1, 2), k, v, bias)
            else:
                out, used = attend_after(q.transpose(1, 2), k, v, bias, opened.unflatten(0, shape),
                                         maps[n] if maps else None)
                made.append(used)
            mixed.append(out.flatten(0, 1))
        self.maps[product.streams] = made
        brought = torch.cat(mixed) if len(mixed) > 1 else mixed[0]
        if self.columns is not None:
            heads, share = brought.unflatten(1, (block.heads, -1)).split((block.head_dim, 1), 2)
            brought, seen = heads.flatten(1), share.squeeze(2).float().mean(1)
            self.shares.append((entry, torch.cat([self.flat[s] for s in product.streams]), _Take.apply(seen, order)))
        return _Take.apply(brought, order).split(sizes)

    def _lay_out(self, of: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The cell of every token of these streams, and the token of every cell."""
        if of not in self.laid:
            order = self.number[torch.cat([self.flat[s] for s in of])]
            self.laid[of] = order, places_of(order, sum(rows * length for rows, length in self.shapes))
        return self.laid[of]

    def _bias(self, product: Product, routes: Sequence[int]) -> list[Tensor]:
        """Of a product that has all streams the mask as it is; others see the keys they hold."""
        whole = len(product.streams) == len(self.flat)
        key = None if not product.joint else () if whole else tuple(routes)
        if key not in self.allowed:
            mask = self.mask & same("route") if key is None else self.mask & key_is("route", *key) if key else self.mask
            self.allowed[key] = [_rendered(mask, q, k, self.dtype)
                                 for q, k in zip(self.queries, self.keys, strict=True)]
        return self.allowed[key]


def _rendered(mask: Predicate, query: Tokens, key: Tokens, dtype: torch.dtype) -> Tensor:
    out, raised = additive(mask.dense(query, key), dtype), mask.bias(query, key)
    return out if raised is None else out + raised.to(dtype)


def _bands(tokens: Tokens) -> list[_Band]:
    """All rows, or the short ones and the long ones where that makes attention products much smaller."""
    rows, width = tokens.shape
    if rows < 2:
        return [_Band(torch.arange(rows, device=tokens.index.device), width)]
    ends = (tokens.valid() * torch.arange(1, width + 1, device=tokens.index.device)).amax(1)
    lengths, order = ends.sort()
    known = lengths.tolist()
    costs = {cut: cut * known[cut - 1] ** 2 + (rows - cut) * width**2 for cut in range(1, rows) if known[cut - 1]}
    cut = min(costs, key=lambda c: costs[c], default=0)
    if not cut or costs[cut] > WORTH * rows * width**2:
        return [_Band(order, width)]
    return [_Band(order[:cut], known[cut - 1]), _Band(order[cut:], width)]


def places_of(order: Tensor, cells: int) -> Tensor:
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
