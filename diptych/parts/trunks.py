"""The trunk: layers of attention and feed-forward over a packed sequence, with parameters assigned by a coupling.

Hidden states travel as one tensor per route, (n_r, width_r), in row-major order of the packed sequence; only for the
attention product are they laid out as rows. So nothing is computed for padding, and routes may differ in width.
"""
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from diptych.parts.attention import Attention, Product, Watch, places_of
from diptych.parts.blocks import (
    AttentionProjections,
    BlockConfig,
    make_mlp,
    make_norm,
    working_dtype,
)
from diptych.parts.cache import Context, Run
from diptych.parts.experts import SKIP, Coupling, LayerCoupling, streams
from diptych.parts.masks import Predicate
from diptych.parts.positions import Rope, TimeEmbedding
from diptych.parts.tokens import Tokens

Modulation = tuple[Tensor, Tensor, Tensor, Tensor]  # scale and gate of attention, scale and gate of the network
Between = Callable[[int, list[Tensor]], list[Tensor]]  # (layers done, states by route) -> what goes on in their place


class Layer(nn.Module):
    """The parameter sets of one layer: `attention[e]` with its norm, `mlp[e]` with its norm (in a parallel block that
    of the attention). `attention`: the block in whose head space each set takes part; `after`: the sets that took part
    in the same product one layer before."""

    def __init__(self, blocks: Sequence[BlockConfig], attention: dict[int, BlockConfig], mlp: Collection[int],
                 after: Collection[int]) -> None:
        super().__init__()
        own = [b if e in attention else None for e, b in enumerate(blocks[:max(attention) + 1])]
        fed = [b if e in mlp else None for e, b in enumerate(blocks[:max(mlp) + 1])]
        self.parallel = blocks[0].parallel
        self.attention_norm = _sets(own, lambda c: make_norm(c, c.width))
        self.behind = [b.norm_behind for b in blocks]
        self.attention = nn.ModuleList(nn.Identity() if c is None else AttentionProjections(c, attention[e])
                                       for e, c in enumerate(own))
        self.mlp_norm = _sets([] if self.parallel else fed, lambda c: make_norm(c, c.width))
        self.mlp = _sets(fed, make_mlp)
        self.modulation = _sets([c if c and c.modulated else None for c in own], lambda c: _gates(c, 4 * c.width))
        self.residual = _sets([c if c and c.residual and e in after else None for e, c in enumerate(own)],
                              lambda c: _gates(c, c.heads))

    def modulate(self, condition: Tensor | None, attention: int) -> Modulation | None:
        """From the embedded times (n, width) of tokens, if their block is modulated."""
        if condition is None:
            return None
        scale, gate, inner, outer = self.modulation[attention](condition).chunk(4, -1)
        return 1 + scale, gate.tanh(), 1 + inner, outer.tanh()

    def gate(self, condition: Tensor | None, attention: int, x: Tensor, heads: int) -> Tensor:
        """How much of the map before each head adds (n, heads), zero for blocks that do not."""
        if condition is None or isinstance(self.residual[attention], nn.Identity):
            return x.new_zeros(len(x), heads)
        return self.residual[attention](condition).tanh()

    def before(self, x: Tensor, attention: int, modulation: Modulation | None = None) -> Tensor:
        """(n, width) -> queries, keys and values (n, heads + 2 kv_heads, head_dim) of one parameter set."""
        normed = x if self.behind[attention] else self.attention_norm[attention](x)
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
        if self.behind[attention]:
            h = x + self.attention_norm[attention](brought)
            return h + self.mlp_norm[mlp](self.mlp[mlp](h))
        normed = self.attention_norm[attention](x) if self.parallel else self.mlp_norm[mlp](h)
        return h + self.mlp[mlp](normed)


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
        widths = [self.blocks[e].width for e in coupling.final]
        self.widths = widths[:coupling.given]  # by route, as given
        if any(self.blocks[e].width != w for c in coupling.layers for served in (c.attention, c.mlp)
               for e, w in zip(served, widths, strict=True) if e != SKIP):
            raise ValueError("expected every route to keep its width through all layers, got sets of several widths")
        self.products: list[list[Product]] = []
        for c in coupling.layers:
            known = {p.streams for p in self.products[-1]} if self.products else set()
            self.products.append([replace(p, follows=p.streams in known) for p in self._products(c)])
        self.layers = nn.ModuleList(self._layer(c, own) for c, own in zip(coupling.layers, self.products, strict=True))
        final = coupling.final
        self.norm = nn.ModuleList(make_norm(b, b.width) if e in final else nn.Identity()
                                  for e, b in enumerate(self.blocks[:max(final) + 1]))
        self.time = nn.ModuleList(TimeEmbedding(b.width) if b.modulated else nn.Identity() for b in self.blocks)
        self.watching: Watch | None = None

    @contextmanager
    def watch(self, keys: Tensor | Callable[[Tokens], Tensor]) -> Iterator[list[Tensor]]:
        """Inside, every forward pass adds to the list how much attention each of its tokens gives to the tokens in
        `keys` (B, T), layer by layer: (layers, B, T), see `Watch`."""
        if self.watching is not None:
            raise ValueError("expected one watch at a time, got one inside another; fix: watch in turns")
        self.watching = Watch(keys)
        try:
            yield self.watching.passes
        finally:
            self.watching = None

    def _products(self, coupling: LayerCoupling) -> list[Product]:
        """Streams that see each other share a product, and so do those that only look alike."""
        sets = {s: coupling.attention[group[0]] for s, group in enumerate(self.groups)}
        active = tuple(s for s, e in sets.items() if e != SKIP)
        alike = len({(self.blocks[sets[s]].geometry, self.ropes[sets[s]]) for s in active}) == 1
        parts = [active] if coupling.joint or alike else [(s,) for s in active]
        return [Product(part, min(sets[s] for s in part), coupling.joint,
                        any(self.blocks[sets[s]].residual for s in part)) for part in parts]

    def _layer(self, coupling: LayerCoupling, products: Sequence[Product]) -> Layer:
        sets = {s: coupling.attention[group[0]] for s, group in enumerate(self.groups)}
        hosts = {sets[s]: self.blocks[p.host] for p in products for s in p.streams}
        if any(self.blocks[e].residual and host.heads != self.blocks[e].heads for e, host in hosts.items()):
            raise ValueError("expected residual attention among as many heads as the block has")
        after = {sets[s] for p in products if p.follows for s in p.streams}
        return Layer(self.blocks, hosts, {e for e in coupling.mlp if e != SKIP}, after)

    def forward(self, states: Sequence[Tensor], tokens: Tokens, mask: Predicate, run: Run | None = None,
                between: Between | None = None) -> list[Tensor]:
        """states[r] (n_r, width) for the tokens of route r in row-major order -> the same shapes.

        With `run` (from `start`), queries also see the cached tokens, and the new keys are written into the contexts.
        Modulated blocks read the times of their tokens, and so does a coupling with intervals of time. `between` is
        called before the first layer and behind every one: it may look at the states, and replace them.
        """
        if self.coupling.intervals == 1:
            return self._through(states, tokens, mask, run, between)
        if between is not None:
            raise ValueError("expected no look between the layers of a trunk that divides a route by time, got one")
        last = self.coupling.given - 1
        divided = self.divide(tokens)
        own = divided.route.flatten()[tokens.routes(last + 1)[last]] - last
        parts = [states[last][own == k] for k in range(self.coupling.intervals)]
        out = self._through([*states[:last], *parts], divided, mask, run)
        together = torch.cat(out[last:])  # interval by interval
        return [*out[:last], together[own.argsort(stable=True).argsort()]]

    def divide(self, tokens: Tokens) -> Tokens:
        """Tokens of the last route at time t go to its interval floor(t K)."""
        last, count = self.coupling.given - 1, self.coupling.intervals
        if count == 1:
            return tokens
        inside = tokens.route == last
        interval = (_known(tokens.time, inside) * count).long().clamp(0, count - 1)
        return replace(tokens, route=torch.where(inside, last + interval, tokens.route))

    def _through(self, states: Sequence[Tensor], tokens: Tokens, mask: Predicate, run: Run | None,
                 between: Between | None = None) -> list[Tensor]:
        index = tokens.routes(self.coupling.routes)
        states = states if between is None else between(0, list(states))
        flat = [torch.cat([index[r] for r in group]) for group in self.groups]
        x = [torch.cat([states[r] for r in group]) if len(group) > 1 else states[group[0]] for group in self.groups]
        dtype = working_dtype(x[0])
        conditions = [self._condition(tokens, f, group) for f, group in zip(flat, self.groups, strict=True)]
        attention = Attention(tokens, mask, run, dtype, flat, self.watching)

        entry = 0
        layers = cast(Sequence[Layer], self.layers)
        for n, (layer, coupling, products) in enumerate(zip(layers, self.coupling.layers, self.products, strict=True)):
            for product in products:
                own = [(s, coupling.attention[self.groups[s][0]], coupling.mlp[self.groups[s][0]])
                       for s in product.streams]
                tuned = [layer.modulate(conditions[s], a) for s, a, _ in own]
                qkv = torch.cat([layer.before(x[s], a, m) for (s, a, _), m in zip(own, tuned, strict=True)])
                routes = [r for s in product.streams for r in self.groups[s]]
                gate = None
                if product.residual:
                    heads = self.blocks[product.host].heads
                    gate = torch.cat([layer.gate(conditions[s], a, x[s], heads) for s, a, _ in own])
                parts = attention(qkv, product, routes, self.blocks[product.host], self.ropes[product.host], entry,
                                  gate)
                entry += 1
                for (s, a, e), part, m in zip(own, parts, tuned, strict=True):
                    x[s] = layer.after(x[s], part, a, e, m)
            if between is not None:
                by_route = between(n + 1, self._by_route(x, index))
                x = [torch.cat([by_route[r] for r in group]) for group in self.groups]
        if self.watching is not None:
            owners = [n for n, products in enumerate(self.products) for _ in products]
            self.watching.note(tokens.shape, owners, attention.shares)
        normed = [self.norm[self.coupling.final[group[0]]](part) for group, part in zip(self.groups, x, strict=True)]
        return self._by_route(normed, index)

    def _by_route(self, x: Sequence[Tensor], index: Sequence[Tensor]) -> list[Tensor]:
        """Of one tensor per stream."""
        out: list[Tensor] = [x[0]] * self.coupling.routes
        for part, group in zip(x, self.groups, strict=True):
            for route, own in zip(group, part.split([len(index[r]) for r in group]), strict=True):
                out[route] = own
        return out

    def _condition(self, tokens: Tokens, places: Tensor, group: Sequence[int]) -> Tensor | None:
        """The embedded times (n, width) of a stream's tokens, in thousandths as diffusion transformers count them."""
        sets = {c.attention[group[0]] for c in self.coupling.layers} - {SKIP}
        modulated = [e for e in sets if self.blocks[e].modulated]
        if not modulated:
            return None
        times = _known(tokens.time.flatten()[places])
        return cast(TimeEmbedding, self.time[modulated[0]])(1000 * times)

    def start(self, contexts: Sequence[Context], tokens: Tokens, dtype: torch.dtype) -> Run:
        """Open a forward pass behind `contexts` (one per row of `tokens`)."""
        hosts = [self.blocks[product.host] for products in self.products for product in products]
        return Run(contexts, self.divide(tokens), shapes=[(b.kv_heads, b.head_dim) for b in hosts], dtype=dtype)


def _known(times: Tensor, of: Tensor | None = None) -> Tensor:
    """Times, zero outside the tokens in question."""
    times = times if of is None else times.masked_fill(~of, 0)
    if bool(times.isnan().any()):
        raise ValueError("expected a time for every token of a modulated block, got tokens without; "
                         "fix: replace their `time`")
    return times


def _gates(c: BlockConfig, count: int) -> nn.Sequential:
    """Start at zero: a fresh block passes its input."""
    linear = nn.Linear(c.width, count)
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
        return torch.cat(list(states))[places_of(torch.cat(index), tokens.index.numel())[cells]]
    found = tokens.route.flatten()[cells].unique().tolist()
    if len(found) > 1:
        raise ValueError(f"expected tokens of one route where routes differ in width, got routes {found}")
    route = found[0] if found else 0
    return states[route][places_of(index[route], tokens.index.numel())[cells]]
