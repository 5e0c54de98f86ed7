"""The packed sequence: per-token vectors that say what each token is. Content (ids, features, latents) travels apart.

Shapes: B rows (packs), T tokens in a row. A row may hold several documents; predicates (`parts.masks`) keep them
apart. Within one document, a segment is a stretch of tokens with one mode (a text span, one copy of one picture).
"""
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


class Mode(IntEnum):
    """How the tokens of a segment see each other."""

    CAUSAL = 0  # text
    FULL = 1  # clean picture: all see all
    NOISE = 2  # noised picture: all see all, and no other segment sees it


class Modality(IntEnum):
    TEXT = 0
    FEATURE = 1  # semantic features of an encoder
    LATENT = 2  # codec latents, clean or noised
    CODE = 3  # discrete codes of a picture
    QUERY = 4  # learnt tokens
    FILL = 5  # tokens that only fill up a fixed length


PADDING = -1


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Per-token vectors, each (B, T); `position` (B, T, 3) as (frame, row, column). Padding has document -1.

    `index` is the place in the row's causal order, `route` the expert group (-1 for padding), `time` the flow time
    (1 = data; NaN where it has no meaning), `target` whether the token carries a loss.
    """

    index: Tensor
    document: Tensor
    segment: Tensor
    modality: Tensor
    mode: Tensor
    route: Tensor
    role: Tensor
    target: Tensor
    time: Tensor
    position: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.index.shape[0], self.index.shape[1]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{f.name: function(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def to(self, device: torch.device | str) -> Self:
        return self.map(lambda v: v.to(device))

    def valid(self) -> Tensor:
        """(B, T) bool: not padding."""
        return self.document != PADDING

    def without(self, places: Tensor) -> Self:
        """The tokens at these flat places (m,) become padding: nothing is computed for them and nothing sees them."""
        document, route = (v.flatten().index_fill(0, places, PADDING).view_as(v) for v in (self.document, self.route))
        return dataclasses.replace(self, document=document, route=route)

    def routes(self, count: int) -> list[Tensor]:
        """For every route the flat positions (n,) of its tokens in row-major order."""
        flat = self.route.reshape(-1)
        return [torch.nonzero(flat == r).squeeze(1) for r in range(count)]


@dataclass
class Strip:
    """The tokens of one document (or of what is appended to one), in numpy: built token group by token group."""

    columns: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=lambda: {n: [] for n in _COLUMNS})
    length: int = 0
    segments: int = 0

    def add(self, count: int, *, segment: int, modality: Modality, mode: Mode, route: int, position: ArrayLike,
            role: int = 0, target: ArrayLike = False, time: float = float("nan")) -> None:
        """Append `count` tokens. `position` is a number, (count,) or (count, 3); `target` a bool or (count,)."""
        position = np.asarray(position, np.float32)
        if position.ndim < 2:  # one-dimensional positions repeat on the three axes
            position = np.broadcast_to(position.reshape(-1, 1), (count, 3))
        values = {"segment": segment, "modality": int(modality), "mode": int(mode), "route": route, "role": role,
                  "target": target, "time": time, "position": position}
        for name, dtype in _COLUMNS.items():
            shape = (count, 3) if name == "position" else (count,)
            self.columns[name].append(np.broadcast_to(np.asarray(values[name], dtype), shape))
        self.length += count

    def segment(self) -> int:
        """A fresh segment id."""
        self.segments += 1
        return self.segments - 1

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self.columns.items()}


_COLUMNS: dict[str, type] = {"segment": np.int64, "modality": np.int64, "mode": np.int64, "route": np.int64,
                             "role": np.int64, "target": np.bool_, "time": np.float32, "position": np.float32}
_FILL = {"document": PADDING, "route": PADDING, "segment": PADDING, "time": float("nan")}


def assemble(rows: Sequence[Sequence[Strip]], length: int | None = None, start: Sequence[int] | None = None) -> Tokens:
    """Strips to `Tokens`: `rows[b]` are the strips laid one after the other in row b, padded to `length`.

    `start[b]` is the index of the first token of row b (the length of the context it is appended to).
    """
    used = [sum(s.length for s in row) for row in rows]
    length = max(used, default=0) if length is None else length
    if max(used, default=0) > length:
        raise ValueError(f"expected rows of at most {length} tokens, got {max(used)}; fix: raise the token budget")
    shapes = {"position": (len(rows), length, 3)}
    out = {name: np.full(shapes.get(name, (len(rows), length)), _FILL.get(name, 0), dtype)
           for name, dtype in (_COLUMNS | {"document": np.int64, "index": np.int64}).items()}
    out["index"][:] = np.arange(length)[None] + (0 if start is None else np.asarray(start)[:, None])
    for b, row in enumerate(rows):
        cursor = 0
        for d, strip in enumerate(row):
            if not strip.length:
                continue
            here = slice(cursor, cursor + strip.length)
            for name, values in strip.arrays().items():
                out[name][b, here] = values
            out["document"][b, here] = d
            cursor += strip.length
    return Tokens(**{name: torch.from_numpy(values) for name, values in out.items()})
