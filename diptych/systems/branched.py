"""What systems share that understand with one branch and draw with another, a sample going through one of them whole.

A document is learnt as one sample per branch that has targets in it, each a beginning of it with those targets only. It
is filled target by target: those in a row that belong to one branch are filled by it, then the other reads all from the
start.
"""
from collections.abc import Sequence
from itertools import groupby

import torch

from diptych.document import Document, Image, Piece
from diptych.parts.interleave import GENERATE, UNDERSTAND
from diptych.systems.base import Emit, Program, Sampling
from diptych.systems.coded import Coded
from diptych.systems.works import Reader


class Branched(Coded):
    def samples(self, document: Document) -> list[Document]:
        """One per branch."""
        kinds = {branch_of(p) for p in document.targets}
        if len(kinds) < 2:
            return [document]
        return [_beginning(document, [i for i, p in enumerate(document) if p.target and branch_of(p) == kind])
                for kind in sorted(kinds)]

    def reader(self, document: Document) -> Reader:
        return Reader(branch=max((branch_of(p) for p in document.targets), default=UNDERSTAND))

    def drop_rates(self) -> tuple[float, float, float]:
        return self.config.drop_text, 0.0, self.config.drop_feature

    def program(self, document: Document, sampling: Sampling, generator: torch.Generator, emit: Emit) -> Program:
        pieces = document.pieces
        targets = [i for i, p in enumerate(pieces) if p.target]
        for _, run in groupby(targets, key=lambda i: branch_of(document.pieces[i])):
            part = _beginning(Document(pieces, document.task, document.meta), list(run))
            filled = yield from super().program(part, sampling, generator, emit)
            pieces = filled.pieces + pieces[len(filled):]
        pieces = tuple(p.replace(target=old.target) for p, old in zip(pieces, document, strict=True))
        return Document(pieces, document.task, document.meta)


def branch_of(piece: Piece) -> int:
    """The branch that predicts it."""
    return GENERATE if isinstance(piece, Image) else UNDERSTAND


def _beginning(document: Document, targets: Sequence[int]) -> Document:
    """Up to the last of these pieces, which are its only targets."""
    pieces = tuple(p.replace(target=i in targets) for i, p in enumerate(document.pieces[: targets[-1] + 1]))
    return Document(pieces, document.task, document.meta)
