"""The trunk: layers of attention and feed-forward over a packed sequence, with parameters assigned by a coupling.

Hidden states travel as one tensor per route, (n_r, width_r), in row-major order of the packed sequence; only for the
attention product are they laid out as rows. So nothing is computed for padding, and routes may differ in width.
"""
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

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
from diptych.parts.experts import SKIP, Coupling, LayerCoupling, streams
from diptych.parts.masks import Predicate, key_is, same
from diptych.parts.positions import Rope, TimeEmbedding
from diptych.parts.tokens import Tokens

WORTH = 0.8  # share of the attention products that is left, from which on rows of two lengths are kept apart
Modulation = tuple[Tensor, Tensor, Tensor, Tensor]  # scale and gate of attention, scale and gate of the network


class Layer(nn.Module):
    """The parameter sets of one layer: `attention[e]` with its norm, `mlp[e]` with its norm (in a parallel block that
    of the attention). `host`: the block in whose head space each attention set takes part, None where there is none."""

    def __init__(self, blocks: Sequence[BlockConfig], attention: dict[int, BlockConfig], mlp: Collection[int]) -> None:
        super().__init__()
        own = [b if e in attention else None for e, b in enumerate(blocks[:max(attention) + 1])]
        fed = [b if e in mlp else None for e, b in enumerate(blocks[:max(mlp) + 1])]
        self.parallel = blocks[0].parallel
        self.attention_norm = _sets(own, lambda c: make_norm(c, c.width))
        self.attention = nn.ModuleList(nn.Identity() if c is None else AttentionProjections(c, attention[e])
                                       for e, c in enumerate(own))
        self.mlp_norm = _sets([] if self.parallel else fed, lambda c: make_norm(c, c.width))
        self.mlp = _sets(fed, make_mlp)
        self.modulation = _sets([c if c and c.modulated else None for c in own], _modulation)

    def modulate(self, condition: Tensor | None, attention: int) -> Modulation | None:
        """From the embedded times (n, width) of tokens, if their block is modulated."""
        if condition is None:
            return None
        scale, gate, inner, outer = self.modulation[attention](condition).chunk(4, -1)
        return 1 + scale, gate.tanh(), 1 + inner, outer.tanh()

    def before(self, x: Tensor, attention: int, modulation: Modulation | None = None) -> Tensor:
        """(n, width) -> queries, keys and values (n, heads + 2 kv_heads, head_dim) of one parameter set."""
        normed = self.attention_norm[attention](x)
        normed = normed if modulation is None else normed * modulation[0]
        return cast(AttentionProjections, self.attention[attention]).project(normed)

    def after(self, x: Tensor, mixed: Tensor, attention: int, mlp: int, modulation: Modulation | None = None) -> Tensor:
        """Add what attention brought, (n, heads * head_dim), and the feed-forward network."""
        brought = cast(AttentionProjections, self.attention[attention]).merge(mixed)
        if modulation is not None:
            _, gate, inner, outer = modulation
            h = x + gate * brought
            return h + outer * self.mlp[mlp](inner * self.mlp_norm[mlp](h))
        h = x + brought
        normed = self.attention_norm[attention](x) if self.parallel else self.mlp_norm[mlp](h)
        return h + self.mlp[mlp](normed)


@dataclass(frozen=True)
class Product:
    """One attention product of a layer: the streams that take part, the parameter set whose heads and rotation it has,
    and whether routes see each other."""

    streams: tuple[int, ...]
    host: int
    joint: bool


class Trunk(nn.Module):
    """`trunk(states, tokens, mask)`: one state tensor per route in, one per route out (after the final norm).

    One block and rotation for all parameter sets of the coupling, or one per set: they may differ in width and heads.
    Where such experts attend jointly, it is in the head space of the first.
    """

    def __init__(self, block: BlockConfig | Sequence[BlockConfig], coupling: Coupling,
                 rope: Rope | Sequence[Rope]) -> None:
        super().__init__()
        sets = 1 + max(e for c in coupling.layers for e in (*c.attention, *c.mlp))
        self.blocks = [block] * sets if isinstance(block, BlockConfig) else list(block)
        self.ropes = [rope] * sets if isinstance(rope, Rope) else list(rope)
        if len(self.blocks) != sets or len(self.ropes) != sets or len({b.parallel for b in self.blocks}) > 1:
            raise ValueError(f"expected a block and a rotation for each of {sets} parameter sets, all parallel or "
                             f"none, got {len(self.blocks)} and {len(self.ropes)}")
        self.coupling, self.groups = coupling, streams(coupling)
        self.widths = [self.blocks[e].width for e in coupling.final]  # by route
        if any(self.blocks[e].width != w for c in coupling.layers for served in (c.attention, c.mlp)
               for e, w in zip(served, self.widths, strict=True) if e != SKIP):
            raise ValueError("expected every route to keep its width through all layers, got sets of several widths")
        self.products = [self._products(c) for c in coupling.layers]
        self.layers = nn.ModuleList(
            Layer(self.blocks, {c.attention[self.groups[s][0]]: self.blocks[p.host] for p in own for s in p.streams},
                  {e for e in c.mlp if e != SKIP})
            for c, own in zip(coupling.layers, self.products, strict=True))
        final = coupling.final
        self.norm = nn.ModuleList(make_norm(b, b.width) if e in final else nn.Identity()
                                  for e, b in enumerate(self.blocks[:max(final) + 1]))
        self.time = nn.ModuleList(TimeEmbedding(b.width) if b.modulated else nn.Identity() for b in self.blocks)

    def _products(self, coupling: LayerCoupling) -> list[Product]:
        """Streams that see each other share a product, and so do those that only look alike."""
        sets = {s: coupling.attention[group[0]] for s, group in enumerate(self.groups)}
        active = tuple(s for s, e in sets.items() if e != SKIP)
        alike = len({(self.blocks[sets[s]].geometry, self.ropes[sets[s]]) for s in active}) == 1
        parts = [active] if coupling.joint or alike else [(s,) for s in active]
        return [Product(part, min(sets[s] for s in part), coupling.joint) for part in parts]

    def forward(self, states: Sequence[Tensor], tokens: Tokens, mask: Predicate,
                run: Run | None = None) -> list[Tensor]:
        """states[r] (n_r, width) for the tokens of route r in row-major order -> the same shapes.

        With `run` (from `start`), queries also see the cached tokens, and the new keys are written into the contexts.
        Modulated blocks read the times of their tokens.
        """
        index = tokens.routes(self.coupling.routes)
        flat = [torch.cat([index[r] for r in group]) for group in self.groups]
        x = [torch.cat([states[r] for r in group]) if len(group) > 1 else states[group[0]] for group in self.groups]
        dtype = working_dtype(x[0])
        conditions = [self._condition(tokens, f, group) for f, group in zip(flat, self.groups, strict=True)]
        attention = _Attention(tokens, mask, run, dtype, flat)

        entry = 0
        layers = cast(Sequence[Layer], self.layers)
        for layer, coupling, products in zip(layers, self.coupling.layers, self.products, strict=True):
            for product in products:
                own = [(s, coupling.attention[self.groups[s][0]], coupling.mlp[self.groups[s][0]])
                       for s in product.streams]
                tuned = [layer.modulate(conditions[s], a) for s, a, _ in own]
                qkv = torch.cat([layer.before(x[s], a, m) for (s, a, _), m in zip(own, tuned, strict=True)])
                routes = [r for s in product.streams for r in self.groups[s]]
                parts = attention(qkv, product, routes, self.blocks[product.host], self.ropes[product.host], entry)
                entry += 1
                for (s, a, e), part, m in zip(own, parts, tuned, strict=True):
                    x[s] = layer.after(x[s], part, a, e, m)

        out: list[Tensor] = [x[0]] * self.coupling.routes
        for s, group in enumerate(self.groups):
            normed = self.norm[self.coupling.final[group[0]]](x[s])
            for route, part in zip(group, normed.split([len(index[r]) for r in group]), strict=True):
                out[route] = part
        return out

    def _condition(self, tokens: Tokens, places: Tensor, group: Sequence[int]) -> Tensor | None:
        """The embedded times (n, width) of a stream's tokens, in thousandths as diffusion transformers count them."""
        sets = {c.attention[group[0]] for c in self.coupling.layers} - {SKIP}
        modulated = [e for e in sets if self.blocks[e].modulated]
        if not modulated:
            return None
        times = tokens.time.flatten()[places]
        if bool(times.isnan().any()):
            raise ValueError("expected a time for every token of a modulated block, got tokens without; "
                             "fix: replace their `time`")
        return cast(TimeEmbedding, self.time[modulated[0]])(1000 * times)

    def start(self, contexts: Sequence[Context], tokens: Tokens, dtype: torch.dtype) -> Run:
        """Open a forward pass behind `contexts` (one per row of `tokens`)."""
        hosts = [self.blocks[product.host] for products in self.products for product in products]
        return Run(contexts, tokens, shapes=[(b.kv_heads, b.head_dim) for b in hosts], dtype=dtype)


class _Band(NamedTuple):
    """Rows (b,) of like length: a product over short rows does not pay for the longest one."""

    rows: Tensor
    length: int


class _Attention:
    """The attention products of one forward pass: what they have in common is computed once. Cells are those of the
    grid (B, T), band by band where rows differ much in length."""

    def __init__(self, tokens: Tokens, mask: Predicate, run: Run | None, dtype: torch.dtype,
                 flat: Sequence[Tensor]) -> None:
        self.mask, self.run, self.dtype, self.flat = mask, run, dtype, flat
        self.number = torch.arange(tokens.index.numel(), device=tokens.index.device)  # of the cell at a flat place
        self.queries = [tokens]
        if run is None and len(bands := _bands(tokens)) > 1:
            grid = self.number.view(tokens.shape)
            cells = torch.cat([grid[b.rows, :b.length].flatten() for b in bands])
            self.number = _places(cells, tokens.index.numel())
            self.queries = [tokens.map(lambda v, b=b: v[b.rows, :b.length]) for b in bands]
        self.shapes = [t.shape for t in self.queries]
        self.keys = self.queries if run is None else [run.seen()]
        self.allowed: dict[tuple[int, ...] | None, list[Tensor]] = {}
        self.turned: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.laid: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, qkv: Tensor, product: Product, routes: Sequence[int], block: BlockConfig, rope: Rope,
                 entry: int) -> tuple[Tensor, ...]:
        """(n, heads + 2 kv_heads, head_dim) of all its streams -> what each is brought, (n_s, heads * head_dim)."""
        sizes = [len(self.flat[s]) for s in product.streams]
        order, place = self._lay_out(product.streams)
        if not len(order):  # its slots in the contexts may hold anything: no mask shows them
            return qkv.flatten(1)[:, :block.heads * block.head_dim].split(sizes)
        if id(rope) not in self.turned:
            self.turned[id(rope)] = [rope(t) for t in self.queries]
        laid = _Lay.apply(qkv, place, order).split([rows * length for rows, length in self.shapes])
        mixed = []
        for part, shape, turn, bias in zip(laid, self.shapes, self.turned[id(rope)], self._bias(product, routes),
                                           strict=True):
            q, k, v = split_heads(part.unflatten(0, shape), block, *turn)
            if self.run is None:
                k, v = k.transpose(1, 2), v.transpose(1, 2)
            else:
                k, v = self.run.extend(entry, k, v)
                k, v = k.to(q.dtype), v.to(q.dtype)
            mixed.append(attend(q.transpose(1, 2), k, v, bias).flatten(0, 1))
        return _Take.apply(torch.cat(mixed) if len(mixed) > 1 else mixed[0], order).split(sizes)

    def _lay_out(self, of: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The cell of every token of these streams, and the token of every cell."""
        if of not in self.laid:
            order = self.number[torch.cat([self.flat[s] for s in of])]
            self.laid[of] = order, _places(order, sum(rows * length for rows, length in self.shapes))
        return self.laid[of]

    def _bias(self, product: Product, routes: Sequence[int]) -> list[Tensor]:
        """Of a product that has all streams the mask as it is; others see the keys they hold."""
        whole = len(product.streams) == len(self.flat)
        key = None if not product.joint else () if whole else tuple(routes)
        if key not in self.allowed:
            mask = self.mask & same("route") if key is None else self.mask & key_is("route", *key) if key else self.mask
            self.allowed[key] = [additive(mask.dense(q, k), self.dtype)
                                 for q, k in zip(self.queries, self.keys, strict=True)]
        return self.allowed[key]


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


def _modulation(c: BlockConfig) -> nn.Sequential:
    """Its gates start at zero: a fresh block passes its input."""
    linear = nn.Linear(c.width, 4 * c.width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def _sets(blocks: Sequence[BlockConfig | None], make: Callable[[BlockConfig], nn.Module]) -> nn.ModuleList:
    """One module per parameter set; where a layer lacks a set, nothing that has parameters holds its place."""
    return nn.ModuleList(nn.Identity() if c is None else make(c) for c in blocks)


def pick(states: Sequence[Tensor], tokens: Tokens, cells: Tensor) -> Tensor:
    """States (m, width) of the tokens at the flat places `cells` (m,) of the packed sequence, whatever their route;
    where routes differ in width, all of one route."""
    index = tokens.routes(len(states))
    if len({s.shape[-1] for s in states}) == 1:
        return torch.cat(list(states))[_places(torch.cat(index), tokens.index.numel())[cells]]
    found = tokens.route.flatten()[cells].unique().tolist()
    if len(found) > 1:
        raise ValueError(f"expected tokens of one route where routes differ in width, got routes {found}")
    route = found[0] if found else 0
    return states[route][_places(index[route], tokens.index.numel())[cells]]


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
