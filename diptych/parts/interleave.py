"""From pieces to tokens: the writer that lays texts and copies of pictures one behind the other.

    text      mark, ids, mark: causal, one position per token
    feature   mark, semantic features, mark: all see all
    latent    mark, codec latents, mark: clean (all see all) or noised (private, and the position does not advance)
    code      discrete codes among the fixed tokens of a `Grammar`

In the layout of BAGEL (arXiv 2505.14683) the tokens of a picture share one position and a clean picture advances it by
one; with `Layout.spread` every token has its own, as in a plain language model (Janus, Emu3).
"""
import dataclasses
from dataclasses import dataclass
from itertools import groupby
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diptych.parts.grammar import CELL, Grammar
from diptych.parts.tokens import Modality, Mode, Strip, Tokens, assemble
from diptych.parts.vocabulary import Vocabulary

UNDERSTAND, GENERATE = 0, 1  # routes
IGNORE = -100  # label of a token without text loss


@dataclass(frozen=True)
class Marks:
    start: int
    end: int
    image_start: int
    image_end: int

    @classmethod
    def of(cls, v: Vocabulary) -> Self:
        """Those of a tokenizer."""
        return cls(v.start, v.end, v.image_start, v.image_end)

    def known(self, v: Vocabulary | None) -> Self:
        """With the ids of a tokenizer, if there is one, in place of those that are not stated (-1)."""
        stated, found = dataclasses.astuple(self), (-1,) * 4 if v is None else dataclasses.astuple(self.of(v))
        return type(self)(*(a if a >= 0 else b for a, b in zip(stated, found, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How pictures stand among texts: the block of a picture that is read (features, latents) and of one in codes, by
    default between the image marks, and whether their tokens spread over positions of their own. `spatial`: features
    spread over rows and columns, and take as many positions as their longer side has (Qwen2-VL). `drawn`: fixed tokens
    with ids from here on belong to the vocabulary of codes and take their route (row ends of MammothModa2)."""

    read: Grammar | None = None
    code: Grammar | None = None
    spread: bool = False
    spatial: bool = False
    drawn: int | None = None


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What belongs to a piece beside its content: ids that lead to it, what a text begins with, and the marks it
    carries."""

    lead: tuple[int, ...] = ()
    gap: str = ""
    open: bool = True
    close: bool = True


@dataclass
class Writer:
    """The tokens of one document so far. `position` and `segment` go on from where an earlier writer stopped.

    `questions` are the places of tokens that predict a code, in the order of the codes. `branch`: the route of every
    token, where that is decided by the sample and not by what the token is.
    """

    marks: Marks
    position: float = 0
    segment: int = 0
    layout: Layout = Layout()
    strip: Strip = dataclasses.field(default_factory=Strip)
    ids: list[int] = dataclasses.field(default_factory=list)
    labels: list[int] = dataclasses.field(default_factory=list)
    features: list[int] = dataclasses.field(default_factory=list)  # picture number of each feature segment
    latents: list[tuple[int, bool]] = dataclasses.field(default_factory=list)  # (picture number, noised)
    codes: list[tuple[int, bool]] = dataclasses.field(default_factory=list)  # (picture number, drawn)
    questions: list[int] = dataclasses.field(default_factory=list)
    branch: int | None = None

    def text(self, ids: list[int], *, target: bool = False, role: int = 0, frame: Frame = Frame(), open: bool = True,
             close: bool = True, ahead: bool = True) -> None:
        """A text span; while decoding it is written token by token (`open` and `close` say which of the frame it gets).
        The token before each of a target predicts it (`ahead`; the start mark, or the last that leads to the text), or
        its own place does."""
        m = self.marks
        before = [*frame.lead, *[m.start] * frame.open] if open else []
        own = ids + [m.end] * (close and frame.close)
        ids = before + own
        self.segment += open
        self.strip.add(len(ids), segment=self.segment, modality=Modality.TEXT, mode=Mode.CAUSAL,
                       route=self._route(UNDERSTAND), role=role, position=self.position + np.arange(len(ids)),
                       target=target)
        self.ids += ids
        silent = max(len(before) - 1, 0)
        asked = ids[silent + 1 :] + [IGNORE] if ahead else [IGNORE] * (len(before) - silent) + own
        self.labels += [IGNORE] * silent + asked if target else [IGNORE] * len(ids)
        self.position += len(ids)

    def fill(self, count: int, token: int, position: float | None = None) -> None:
        """`count` tokens that only fill up, from here on, or from a position of their own: before a text, say, whose
        length is known when it stands."""
        first = self.position if position is None else position
        self.segment += 1
        self.strip.add(count, segment=self.segment, modality=Modality.FILL, mode=Mode.CAUSAL,
                       route=self._route(UNDERSTAND), position=first + np.arange(count))
        self.ids += [token] * count
        self.labels += [IGNORE] * count
        self.position += count if position is None else 0

    def feature(self, picture: int, count: int, role: int = 0, grid: tuple[int, int] | None = None) -> None:
        """`grid`: rows and columns of the features, which a spatial layout needs."""
        if self.layout.spatial and grid is None:
            raise ValueError("expected the grid of a picture in a spatial layout, got none; fix: pass grid=")
        self._read(count, Modality.FEATURE, Mode.FULL, UNDERSTAND, role, 1.0, False,
                   grid if self.layout.spatial else None)
        self.features.append(picture)
        self.skip()

    def latent(self, picture: int, count: int, *, noised: bool, role: int = 0, queries: int = 0) -> None:
        """`queries`: learnt tokens that belong to the copy; behind it, they have no marks of their own."""
        self._read(count, Modality.LATENT, Mode.NOISE if noised else Mode.FULL, GENERATE, role,
                   float("nan") if noised else 1.0, noised)
        self.latents.append((picture, noised))
        if queries:
            self._block([CELL] * queries, Modality.QUERY, Mode.NOISE if noised else Mode.FULL, GENERATE, role,
                        float("nan") if noised else 1.0, noised)
        if not noised:
            self.skip()

    def skip(self) -> None:
        """A clean picture has one position, also where it is left out; spread tokens have moved on by themselves."""
        self.position += not self.layout.spread

    def plan(self, *grids: tuple[int, int]) -> list[int]:
        """The block of a picture whose codes have these grids (several: scales), as `code` takes it."""
        return (self.layout.code or self._bracketed()).plan(*grids)

    def code(self, picture: int, plan: list[int], *, drawn: bool, mode: Mode = Mode.CAUSAL, ahead: bool = True,
             part: slice = slice(None), apart: bool = False, role: int = 0) -> None:
        """Codes of a picture, or a `part` of its plan, which may be a segment of its own (`apart`: one scale). Drawn
        codes are predicted: by the token before each (`ahead`), or by their own (masked codes, scales)."""
        start, stop, _ = part.indices(len(plan))
        self.segment += apart or start == 0
        if start == 0:
            self.codes.append((picture, drawn))
        cells = range(start + 1, min(stop + 1, len(plan))) if ahead else range(start, stop)
        if drawn:
            self.questions += [self.strip.length + i - ahead - start for i in cells if plan[i] == CELL]
            if ahead and start == 0 and plan[0] == CELL:
                raise ValueError("expected a block of codes that begins with a token, got none to predict the first "
                                 "code from; fix: give the grammar a start")
        self._block(plan[start:stop], Modality.CODE, mode, GENERATE, role, float("nan"), drawn)
        if stop == len(plan) and mode != Mode.NOISE:
            self.skip()

    def _route(self, usual: int) -> int:
        return usual if self.branch is None else self.branch

    def _bracketed(self) -> Grammar:
        return Grammar(start=(self.marks.image_start,), end=(self.marks.image_end,))

    def _read(self, count: int, *how: object) -> None:
        self.segment += 1
        self._block((self.layout.read or self._bracketed()).plan((1, count)), *how)  # type: ignore[arg-type]

    def _block(self, plan: list[int], modality: Modality, mode: Mode, route: int, role: int, time: float,
               target: bool, grid: tuple[int, int] | None = None) -> None:
        """Cells are tokens of the modality, fixed tokens are text, by default of the understanding route."""
        first = self.layout.drawn
        for (cell, own), run in groupby(plan, lambda i: (i == CELL, i == CELL or (first is not None and i >= first))):
            count = len(list(run))
            steps = np.arange(count) if self.layout.spread else np.zeros(count)
            taken = count if self.layout.spread else 0
            if cell and grid is not None:
                steps, taken = np.stack((np.zeros(count), *np.divmod(np.arange(count), grid[1])), 1), max(grid)
            self.strip.add(count, segment=self.segment, modality=modality if cell else Modality.TEXT, mode=mode,
                           route=self._route(route if own else UNDERSTAND), role=role, time=time,
                           target=target and cell,
                           position=self.position + steps)
            self.position += taken
        self.ids += [0 if i == CELL else i for i in plan]
        self.labels += [IGNORE] * len(plan)


@dataclass
class Page:
    """Writers laid out in rows: token vectors with text ids and labels, each (B, T), and the flat places (m,) of the
    tokens that predict codes."""

    tokens: Tokens
    ids: Tensor
    labels: Tensor
    questions: Tensor

    @classmethod
    def of(cls, rows: list[list[Writer]], length: int | None = None, start: list[int] | None = None) -> "Page":
        tokens = assemble([[w.strip for w in row] for row in rows], length, start)
        ids = np.zeros(tokens.shape, np.int64)
        labels = np.full(tokens.shape, IGNORE, np.int64)
        questions: list[int] = []
        for b, row in enumerate(rows):
            flat = [i for w in row for i in w.ids]
            ids[b, : len(flat)] = flat
            labels[b, : len(flat)] = [i for w in row for i in w.labels]
            place = b * tokens.shape[1]
            for w in row:
                questions += [place + q for q in w.questions]
                place += w.strip.length
        return cls(tokens, torch.from_numpy(ids), torch.from_numpy(labels), torch.tensor(questions, dtype=torch.long))

    def to(self, device: torch.device | str) -> "Page":
        return Page(self.tokens.to(device), self.ids.to(device), self.labels.to(device), self.questions.to(device))
