"""Key-value contexts that can be forked, and run together without copying while the same ones keep company.

A `Context` is one row of a `Store`. Running a batch of contexts first brings them into one store (a copy, unless they
already are its rows). New tokens are written behind each row's own length; a run that must leave no trace (a
denoising step) writes too, but the length does not advance, so the next run overwrites it.
"""
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.parts.tokens import PADDING, Tokens


@dataclass
class Store:
    """keys, values: per attention product (B, kv_heads, capacity, head_dim); tokens: their vectors (B, capacity)."""

    keys: list[Tensor]
    values: list[Tensor]
    tokens: Tokens

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]


def _capacity(tokens: int) -> int:
    """Doubling keeps decoding linear."""
    return max(64, 1 << (tokens - 1).bit_length())


class Context:
    """What a model has read so far. Starts empty, grows by running a trunk with it; `fork()` makes a separate copy."""

    def __init__(self) -> None:
        self.store: Store | None = None
        self.row = 0
        self.length = 0
        self._known: tuple[Store, int, Sequence[int], tuple[list[int], list[int]]] | None = None

    @property
    def capacity(self) -> int:
        return 0 if self.store is None else self.store.capacity

    def reserve(self, count: int) -> None:
        """Room for `count` more tokens behind what was read (something has been)."""
        if self.store is None:
            raise ValueError("expected a context that has read something, got an empty one")
        if self.length + count > self.capacity:
            self.store, self.row = self._copied(self.store, _capacity(self.length + count)), 0

    def _copied(self, old: Store, capacity: int) -> Store:
        """What was read, alone in a store with that much room."""
        def more(x: Tensor, axis: int) -> Tensor:
            x = x[self.row : self.row + 1]
            new = x.new_zeros(*x.shape[:axis], capacity, *x.shape[axis + 1:])
            new.narrow(axis, 0, self.length).copy_(x.narrow(axis, 0, self.length))
            return new

        return Store([more(k, 2) for k in old.keys], [more(v, 2) for v in old.values],
                     old.tokens.map(lambda f: more(f, 1)))

    def pointers(self, products: Sequence[int]) -> tuple[list[int], list[int]]:
        """Where the keys and the values of these products begin in memory: (kv_heads, capacity, head_dim) each."""
        store = self.store
        if store is None:
            raise ValueError("expected a context that has read something, got an empty one")
        known = self._known
        if known is None or known[0] is not store or known[1] != self.row or known[2] is not products:
            keys, values = ([side[p][self.row].data_ptr() for p in products] for side in (store.keys, store.values))
            known = self._known = store, self.row, products, (keys, values)
        return known[3]

    def note(self, tokens: Tokens) -> None:
        """Take in the vectors (1, n) of tokens whose keys and values are there already."""
        if self.store is None:
            raise ValueError("expected a context that has read something, got an empty one")
        count = tokens.shape[1]
        for field in dataclasses.fields(tokens):
            kept = getattr(self.store.tokens, field.name)
            kept[self.row, self.length - count : self.length] = getattr(tokens, field.name)[0]

    def fork(self) -> "Context":
        new = Context()
        if self.store is not None and self.length:
            new.store, new.length = self._copied(self.store, self.length), self.length
        return new


class Run:
    """One forward pass over a batch of contexts: holds the shared store and where new tokens go. `shapes`: (kv_heads,
    head_dim) of every attention product, one or more per layer."""

    def __init__(self, contexts: Sequence[Context], tokens: Tokens, *, shapes: Sequence[tuple[int, int]],
                 dtype: torch.dtype) -> None:
        self.contexts = contexts
        count = tokens.shape[1]
        self.lengths = [c.length for c in contexts]
        device = tokens.index.device
        self.end = max(self.lengths) + count
        self.store = self._gather(shapes, dtype, device, tokens)
        base = torch.tensor(self.lengths, device=device)[:, None]
        self.slots = base + torch.arange(count, device=device)  # (B, T)
        self.rows = torch.arange(len(contexts), device=device)[:, None]
        # Slots behind a row's length may hold the leftovers of an earlier run: hide them before writing the new ones.
        stale = torch.arange(self.store.capacity, device=device)[None] >= base
        self.store.tokens.document.masked_fill_(stale, PADDING)
        for field in dataclasses.fields(tokens):
            getattr(self.store.tokens, field.name)[self.rows, self.slots] = getattr(tokens, field.name)

    def seen(self) -> Tokens:
        """Vectors of every token in reach, cached and new: (B, end)."""
        return self.store.tokens.map(lambda f: f[:, :self.end])

    def extend(self, product: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, T, kv_heads, head_dim); returns all in reach (B, kv_heads, end, head_dim)."""
        store, at = self.store, (self.rows, self.slots)
        if torch.is_grad_enabled():  # what earlier runs have seen must stay as it was until their gradients are there
            for side, new in ((store.keys, k), (store.values, v)):
                side[product] = side[product].transpose(1, 2).index_put(at, new.to(side[product].dtype)).transpose(1, 2)
        else:
            store.keys[product].transpose(1, 2)[at] = k.to(store.keys[product].dtype)
            store.values[product].transpose(1, 2)[at] = v.to(store.values[product].dtype)
        return store.keys[product][:, :, :self.end], store.values[product][:, :, :self.end]

    def commit(self, counts: Sequence[int]) -> None:
        """Keep the first `counts[b]` new tokens of every row."""
        for context, count in zip(self.contexts, counts, strict=True):
            context.length += count

    def _gather(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device,
                tokens: Tokens) -> Store:
        first = self.contexts[0].store
        if (first is not None and first.capacity >= self.end and first.keys[0].shape[0] == len(self.contexts)
                and all(c.store is first and c.row == b for b, c in enumerate(self.contexts))):
            return first
        if len({id(c) for c in self.contexts}) != len(self.contexts):
            raise ValueError("expected different contexts in one run, got one twice; fix: fork it")
        capacity = _capacity(self.end)
        rows = len(self.contexts)
        keys, values = ([torch.zeros((rows, heads, capacity, width), dtype=dtype, device=device)
                         for heads, width in shapes] for _ in range(2))
        store = Store(keys, values,
                      tokens.map(lambda f: torch.zeros((rows, capacity, *f.shape[2:]), dtype=f.dtype, device=device)))
        store.tokens.document.fill_(PADDING)
        for b, context in enumerate(self.contexts):
            old, n = context.store, context.length
            if old is not None and n:
                for i in range(len(shapes)):
                    store.keys[i][b, :, :n] = old.keys[i][context.row, :, :n]
                    store.values[i][b, :, :n] = old.values[i][context.row, :, :n]
                for field in dataclasses.fields(tokens):
                    getattr(store.tokens, field.name)[b, :n] = getattr(old.tokens, field.name)[context.row, :n]
        for b, context in enumerate(self.contexts):
            context.store, context.row = store, b
        return store
