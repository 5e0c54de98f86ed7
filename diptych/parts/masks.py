"""Attention masks as predicates over per-token vectors, joined with `&`, `|` and `~`.

A predicate is written once and renders to a dense boolean mask for SDPA, to a `flex_attention` mask function and to
a picture. Example (BAGEL): `valid & same("document") & (causal | (same("segment") & bidirectional)) & hide_noise`.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diptych.parts.tokens import Mode, Tokens

View = Callable[[str], Tensor]  # field name -> values, already shaped to broadcast query against key
Allow = Callable[[View, View], Tensor]


@dataclass(frozen=True)
class Predicate:
    """allow(query, key) -> bool; `name` is how it prints. `raised`: pairs whose scores are higher by a number. Made of
    functions of this module, so that a system with one can be pickled."""

    allow: Allow
    name: str
    raised: tuple[tuple["Predicate", float], ...] = ()

    def __and__(self, other: "Predicate") -> "Predicate":
        return Predicate(partial(_both, self.allow, other.allow), f"({self.name} & {other.name})",
                         self.raised + other.raised)

    def __or__(self, other: "Predicate") -> "Predicate":
        for mask in (self, other):
            mask._unraised("|")
        return Predicate(partial(_either, self.allow, other.allow), f"({self.name} | {other.name})")

    def __invert__(self) -> "Predicate":
        self._unraised("~")
        return Predicate(partial(_not, self.allow), f"~{self.name}")

    def __repr__(self) -> str:
        return self.name

    def _unraised(self, use: str) -> None:
        if self.raised:
            raise ValueError(f"expected a mask without raised scores for {use}, got {self.name}; "
                             "fix: raise them last")

    def favour(self, pairs: "Predicate", amount: float) -> "Predicate":
        """The same mask; scores of the pairs that `pairs` allows are higher by `amount` before the softmax."""
        return Predicate(self.allow, f"favour({self.name}, {pairs.name}, {amount})", (*self.raised, (pairs, amount)))

    def bias(self, query: Tokens, key: Tokens | None = None) -> Tensor | None:
        """(B, Q, K) float32 to be added to the scores; None without raised ones."""
        if not self.raised:
            return None
        return torch.stack([amount * pairs._pairs(query, key) for pairs, amount in self.raised]).sum(0)

    def dense(self, query: Tokens, key: Tokens | None = None) -> Tensor:
        """(B, Q, K) bool. A query that may see nothing (padding) sees column 0, so that softmax stays finite."""
        mask = self._pairs(query, key).clone()
        mask[..., 0] |= ~mask.any(-1)
        return mask

    def _pairs(self, query: Tokens, key: Tokens | None) -> Tensor:
        key = query if key is None else key
        mask = self.allow(lambda n: getattr(query, n)[:, :, None], lambda n: getattr(key, n)[:, None, :])
        return mask.expand(query.shape[0], query.shape[1], key.shape[1])

    def flex(self, query: Tokens, key: Tokens | None = None) -> Callable[..., Tensor]:
        """`mask_mod(b, h, q_idx, kv_idx)` for `flex_attention.create_block_mask`."""
        self._unraised("flex_attention")
        keys = query if key is None else key

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self.allow(lambda n: getattr(query, n)[b, q_idx], lambda n: getattr(keys, n)[b, kv_idx])

        return mask_mod


def _both(one: Allow, two: Allow, q: View, k: View) -> Tensor:
    return one(q, k) & two(q, k)


def _either(one: Allow, two: Allow, q: View, k: View) -> Tensor:
    return one(q, k) | two(q, k)


def _not(one: Allow, q: View, k: View) -> Tensor:
    return ~one(q, k)


def _same(field: str, q: View, k: View) -> Tensor:
    return q(field) == k(field)


def _key_is(field: str, values: tuple[int, ...], q: View, k: View) -> Tensor:
    return _one_of(k(field), values)


def _query_is(field: str, values: tuple[int, ...], q: View, k: View) -> Tensor:
    return _one_of(q(field), values)


def _one_of(vector: Tensor, values: tuple[int, ...]) -> Tensor:
    out = vector == values[0]
    for value in values[1:]:
        out = out | (vector == value)
    return out


def _before(q: View, k: View) -> Tensor:
    return k("index") <= q("index")


def _there(q: View, k: View) -> Tensor:
    return (k("document") >= 0) & (q("document") >= 0)


def same(field: str) -> Predicate:
    return Predicate(partial(_same, field), f"same({field})")


def key_is(field: str, *values: int) -> Predicate:
    """The key's field is one of `values`."""
    values = tuple(map(int, values))  # torch.compile (2.13) mistakes comparison with an IntEnum
    return Predicate(partial(_key_is, field, values), f"key_is({field}, {', '.join(map(str, values))})")


def query_is(field: str, *values: int) -> Predicate:
    """The query's field is one of `values`."""
    values = tuple(map(int, values))
    return Predicate(partial(_query_is, field, values), f"query_is({field}, {', '.join(map(str, values))})")


causal = Predicate(_before, "causal")
valid = Predicate(_there, "valid")
bidirectional = key_is("mode", Mode.FULL, Mode.NOISE)
"""To be joined with `same("segment")`: pictures see themselves in both directions."""
hide_noise = ~(key_is("mode", Mode.NOISE) & ~same("segment"))
"""A noised picture is seen by itself alone."""

packed_causal = valid & same("document") & causal
interleaved = valid & same("document") & (causal | (same("segment") & bidirectional)) & hide_noise
"""Text causal, pictures bidirectional, noised pictures private (BAGEL, Transfusion)."""


def picture(predicate: Predicate, tokens: Tokens, row: int = 0, cell: int = 8) -> Any:
    """A PIL image of the mask of one row: allowed cells coloured by the modality of the key, document borders dark.

    Queries run down, keys run right.
    """
    from PIL import Image, ImageDraw

    shades = {0: (52, 101, 164), 1: (78, 154, 6), 2: (206, 92, 0)}
    count = int(tokens.valid()[row].sum())
    mask = predicate.dense(tokens)[row, :count, :count]
    image = Image.new("RGB", (count * cell + 1, count * cell + 1), (246, 246, 244))
    draw = ImageDraw.Draw(image)
    modality = tokens.modality[row].tolist()
    mode = tokens.mode[row].tolist()
    for q, k in torch.nonzero(mask).tolist():
        shade = shades.get(modality[k], (117, 80, 123))
        if mode[k] == Mode.NOISE:
            shade = tuple((c + 255) // 2 for c in shade)
        draw.rectangle((k * cell, q * cell, k * cell + cell - 2, q * cell + cell - 2), fill=shade)
    segment = tokens.segment[row].tolist()
    for i in range(1, count):
        if segment[i] != segment[i - 1]:
            draw.line((i * cell - 1, 0, i * cell - 1, count * cell), fill=(186, 189, 182))
            draw.line((0, i * cell - 1, count * cell, i * cell - 1), fill=(186, 189, 182))
    return image
