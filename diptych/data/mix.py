"""Weighted mixing of sources in which position k is a pure function of (seed, k).

That makes everything else simple: any worker can compute any batch, a resumed run needs only a position, and ranks
take every w-th document of one global order. Three pieces of `order.py` do it:

- which source: a golden-ratio (Kronecker) sequence over the weights, so that every stretch of the mixture holds close
  to its share of each source; how often a source came before k is counted in O(log k), not by walking there;
- which epoch and place of a finite source: that count divided by the source's length;
- which document: a keyed permutation of the source for (seed, source, epoch).
"""
from collections.abc import Mapping, Sequence
from typing import Any

from diptych.data.order import Schedule, hash64, permute
from diptych.data.sources import BrokenDocument, Problems, Source
from diptych.document import Document

_TRIES = 100  # neighbours tried for a broken file before the source counts as broken


class Mixture:
    """Documents of several sources by weight (share of documents, not of tokens).

    `documents_at` is pure; `take` walks on from `position`, which is all of the state.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]], seed: int = 0) -> None:
        if not sources:
            raise ValueError("expected at least one (source, weight), got none")
        for source, weight in sources:
            if not weight > 0:
                raise ValueError(f"expected a positive weight, got {weight!r} for {source.name}; fix: leave it out")
            if source.size == 0:
                raise ValueError(f"expected documents in {source.name}, got none; {source.problems.summary()}")
        self.sources = [s for s, _ in sources]
        self.weights = [float(w) for _, w in sources]
        self.seed = seed
        self.position = 0
        self._elsewhere = Problems()
        self._schedule = Schedule(self.weights, seed)

    def documents_at(self, start: int, count: int, *, rank: int = 0, world_size: int = 1) -> list[Document]:
        """`count` documents from place `start` of the order of one rank (global positions congruent to rank)."""
        return [self.document((start + i) * world_size + rank) for i in range(count)]

    def take(self, count: int) -> list[Document]:
        documents = self.documents_at(self.position, count)
        self.position += count
        return documents

    def document(self, position: int) -> Document:
        """The document at a global position; broken ones are replaced by the next of the same epoch."""
        which, nth = self._schedule.at(position)
        source = self.sources[which]
        for attempt in range(_TRIES if source.size is None else min(_TRIES, source.size)):
            index = self._index(which, nth, attempt)
            try:
                document = source.document(index)
            except BrokenDocument as error:
                source.problems.add(error.name, error.reason)
                continue
            if source.size is None:
                return document
            # so that what is chosen by a document's facts, such as dropped conditions, differs between epochs
            return Document(document.pieces, document.task, {"epoch": nth // source.size, **document.meta})
        raise ValueError(f"expected readable documents in {source.name}, got {attempt + 1} broken ones in a row; "
                         f"{source.problems.summary()}; fix: run `diptych doctor data` on it")

    def locate(self, position: int) -> tuple[Source, int]:
        """Source and index of a position, for messages."""
        which, nth = self._schedule.at(position)
        return self.sources[which], self._index(which, nth, 0)

    @property
    def problems(self) -> Problems:
        """What is wrong in all sources together."""
        together = Problems()
        together.update(self._elsewhere.items)
        for source in self.sources:
            together.update(source.problems.items)
        return together

    def note(self, problems: Mapping[str, str]) -> None:
        """Record problems that were found elsewhere (in a worker process)."""
        self._elsewhere.update(problems)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved run; refuses a state of other sources, weights or seed, whose order would differ."""
        mine = self._identity()
        for key, value in mine.items():
            if state.get(key) != value:
                raise ValueError(f"expected a data state with {key} {value}, got {state.get(key)}; "
                                 "fix: resume with the same data, or start a new run")
        self.position = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        sources = [[s.name, s.size, w] for s, w in zip(self.sources, self.weights, strict=True)]
        return {"seed": self.seed, "sources": sources}

    def _index(self, which: int, nth: int, attempt: int) -> int:
        size = self.sources[which].size
        if size is None:  # every seed reads its own stretch of an endless source
            return (hash64(self.seed, which) >> 34 << 30) + nth + attempt * (1 << 61)
        epoch, place = divmod(nth, size)
        return permute((place + attempt) % size, size, hash64(self.seed, which, epoch))
