"""From pieces to tokens: the writer that lays texts and copies of pictures one behind the other.

    text      mark, ids, mark: causal, one position per token
    feature   mark, semantic features, mark: all see all; every token of the picture has the same position
    latent    mark, codec latents, mark: clean (all see all) or noised (private, and the position does not advance)

A clean picture advances the position by one. This is the layout of BAGEL (arXiv 2505.14683), shared by its relatives.
"""
import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diptych.parts.tokens import Modality, Mode, Strip, Tokens, assemble

UNDERSTAND, GENERATE = 0, 1  # routes
IGNORE = -100  # label of a token without text loss


@dataclass(frozen=True)
class Marks:
    start: int
    end: int
    image_start: int
    image_end: int


@dataclass
class Writer:
    """The tokens of one document so far. `position` and `segment` go on from where an earlier writer stopped."""

    marks: Marks
    position: float = 0
    segment: int = 0
    strip: Strip = dataclasses.field(default_factory=Strip)
    ids: list[int] = dataclasses.field(default_factory=list)
    labels: list[int] = dataclasses.field(default_factory=list)
    features: list[int] = dataclasses.field(default_factory=list)  # picture number of each feature segment
    latents: list[tuple[int, bool]] = dataclasses.field(default_factory=list)  # (picture number, noised)

    def text(self, ids: list[int], *, target: bool = False, role: int = 0, open: bool = True,
             close: bool = True) -> None:
        """A text span; while decoding it is written token by token (`open` and `close` say which marks it gets)."""
        m = self.marks
        ids = [m.start] * open + ids + [m.end] * close
        self.segment += open
        self.strip.add(len(ids), segment=self.segment, modality=Modality.TEXT, mode=Mode.CAUSAL, route=UNDERSTAND,
                       role=role, position=self.position + np.arange(len(ids)), target=target)
        self.ids += ids
        self.labels += ids[1:] + [IGNORE] if target else [IGNORE] * len(ids)
        self.position += len(ids)

    def feature(self, picture: int, count: int, role: int = 0) -> None:
        self._picture(count, Modality.FEATURE, Mode.FULL, UNDERSTAND, role, 1.0, False)
        self.features.append(picture)
        self.position += 1

    def latent(self, picture: int, count: int, *, noised: bool, role: int = 0) -> None:
        self._picture(count, Modality.LATENT, Mode.NOISE if noised else Mode.FULL, GENERATE, role,
                      float("nan") if noised else 1.0, noised)
        self.latents.append((picture, noised))
        self.position += not noised

    def skip(self) -> None:
        """A clean picture that is left out still takes its position."""
        self.position += 1

    def _picture(self, count: int, modality: Modality, mode: Mode, route: int, role: int, time: float,
                 target: bool) -> None:
        self.segment += 1
        mark = (1, Modality.TEXT, UNDERSTAND, False)
        for n, kind, way, goal in (mark, (count, modality, route, target), mark):
            self.strip.add(n, segment=self.segment, modality=kind, mode=mode, route=way, role=role,
                           position=self.position, time=time, target=goal)
        self.ids += [self.marks.image_start] + [0] * count + [self.marks.image_end]
        self.labels += [IGNORE] * (count + 2)


@dataclass
class Page:
    """Writers laid out in rows: token vectors with text ids and labels, each (B, T)."""

    tokens: Tokens
    ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: list[list[Writer]], length: int | None = None, start: list[int] | None = None) -> "Page":
        tokens = assemble([[w.strip for w in row] for row in rows], length, start)
        ids = np.zeros(tokens.shape, np.int64)
        labels = np.full(tokens.shape, IGNORE, np.int64)
        for b, row in enumerate(rows):
            flat = [i for w in row for i in w.ids]
            ids[b, : len(flat)] = flat
            labels[b, : len(flat)] = [i for w in row for i in w.labels]
        return cls(tokens, torch.from_numpy(ids), torch.from_numpy(labels))

    def to(self, device: torch.device | str) -> "Page":
        return Page(self.tokens.to(device), self.ids.to(device), self.labels.to(device))
