"""Answers that know nothing: what a figure is worth is seen against them. A control takes the place of a system."""
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from diptych.document import Boxes, Document, Image, Piece, Text
from diptych.world import tasks

TRAIN = 600  # training items that `majority` counts
FALLBACK_SIZE = (64, 64)


class Filler(Protocol):
    """What `evaluate` needs of a system."""

    def generate(self, documents: Sequence[Document], sampling: Any = None, *, seeds: Sequence[int] | int = 0
                 ) -> list[Document]: ...


class Control:
    """Fills the targets of world documents by a rule, see `CONTROLS`."""

    def __init__(self, name: str) -> None:
        if name not in CONTROLS:
            raise ValueError(f"expected a control out of {', '.join(CONTROLS)}, got {name!r}")
        self.name = name

    def generate(self, documents: Sequence[Document], sampling: Any = None, *, seeds: Sequence[int] | int = 0
                 ) -> list[Document]:
        return [CONTROLS[self.name](document) for document in documents]


def _fill(document: Document, answer: Callable[[int, Piece], Piece]) -> Document:
    pieces = tuple(answer(i, p) if p.target else p for i, p in enumerate(document))
    return Document(pieces, document.task, document.meta)


def blank(document: Document) -> Document:
    """Empty canvases, no words, no boxes."""
    def answer(_: int, piece: Piece) -> Piece:
        if isinstance(piece, Image):
            return piece.replace(pixels=np.full((3, *(piece.size or FALLBACK_SIZE)), 245 / 127.5 - 1, np.float32))
        return piece.replace(text="") if isinstance(piece, Text) else piece.replace(boxes=np.zeros((0, 4)))
    return _fill(document, answer)


def copy(document: Document) -> Document:
    """Every picture is the last one that was given, unchanged."""
    given = [p for p in document if isinstance(p, Image) and not p.target]

    def answer(_: int, piece: Piece) -> Piece:
        return piece.replace(pixels=given[-1].pixels) if given and isinstance(piece, Image) else piece
    return _fill(blank(document), answer)


def middle(document: Document) -> Document:
    """A box around the middle half of the picture."""
    box = np.array([[0.25, 0.25, 0.75, 0.75]])
    return _fill(blank(document), lambda _, p: p.replace(boxes=box) if isinstance(p, Boxes) else p)


def other(document: Document) -> Document:
    """The true answers of some training document: right in form, and as right by chance as that is."""
    taken = iter(_answers(document, "train"))
    return _fill(document, lambda _, p: next(taken).replace(role=p.role, target=True))


def majority(document: Document) -> Document:
    """The most frequent training answer of the question's family."""
    best = _frequent(document.meta["world"]).get(document.meta["family"], "")
    return _fill(blank(document), lambda _, p: p.replace(text=best) if isinstance(p, Text) else p)


def oracle(document: Document) -> Document:
    """The truth: a check of the suites themselves."""
    taken = iter(_answers(document, document.meta["split"]))
    return _fill(document, lambda _, p: next(taken).replace(role=p.role, target=True))


def _answers(document: Document, split: str) -> tuple[Piece, ...]:
    """Of the document of this number in a split; of what was asked about another one, the picture of that."""
    meta = document.meta
    found = tasks.document(meta.get("source", document.task), meta["index"], split=split, world=meta["world"])
    return tuple(found.of(Image)) if "source" in meta else tuple(found.targets)


@lru_cache(8)
def _frequent(world: str) -> dict[str, str]:
    counts: dict[str, Counter[str]] = {}
    for index in range(TRAIN):
        meta = tasks.document("question", index, world=world).meta
        counts.setdefault(meta["family"], Counter())[meta["answer"]] += 1
    # of equally frequent answers the first in the alphabet, whatever order they came in
    return {family: min(found.items(), key=lambda item: (-item[1], item[0]))[0] for family, found in counts.items()}


CONTROLS: dict[str, Callable[[Document], Document]] = {
    f.__name__: f for f in (blank, copy, middle, other, majority, oracle)}
