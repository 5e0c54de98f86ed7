"""The batch of systems that put documents into one packed sequence."""
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from diptych.document import Document, Image, Text
from diptych.parts.interleave import IGNORE, Page, Writer
from diptych.parts.tokens import Modality


@dataclass
class Batch:
    """A page of tokens with the pictures it refers to."""

    page: Page
    pictures: list[Tensor]  # for the codec, (3, h, w)
    views: list[Tensor]  # for the tower, (3, h, w), one per feature segment in page order
    latents: list[tuple[int, bool]]  # (picture number, noised), one per latent segment in page order
    codes: list[tuple[int, bool]] = field(default_factory=list)  # (picture number, drawn), one per block of codes
    references: list[tuple[int, ...]] = field(default_factory=list)  # clean pictures before it, one per block of codes
    further: dict[str, float] = field(default_factory=dict)  # counts of loss terms that the tokens do not tell
    code_depth: int = 1  # codes in one cell
    emphasis: dict[int, Tensor] = field(default_factory=dict)  # picture number -> factors (n,) on its tokens' errors
    chance: bool = False  # whether the loss draws which of the codes count: then its forward pass alone knows counts

    @classmethod
    def of(cls, written: Sequence[tuple[Writer, list[Tensor], list[Tensor]]], bins: Sequence[Sequence[int]]) -> Self:
        """Documents as writer, pictures and views; `bins` are the numbers of those that share a row."""
        pictures, views = list[Tensor](), list[Tensor]()
        latents, codes = list[tuple[int, bool]](), list[tuple[int, bool]]()
        references = list[tuple[int, ...]]()
        for n in (n for row in bins for n in row):
            w, own, seen = written[n]
            first = len(pictures)
            latents += [(first + i, noised) for i, noised in w.latents]
            codes += [(first + i, drawn) for i, drawn in w.codes]
            references += [tuple(first + i for i, noised in w.latents if not noised and i < at) for at, _ in w.codes]
            pictures += own
            views += seen
        page = Page.of([[written[n][0] for n in row] for row in bins])
        return cls(page, pictures, views, latents, codes, references)

    def to(self, device: torch.device | str) -> "Batch":
        return replace(self, page=self.page.to(device), pictures=[p.to(device) for p in self.pictures],
                       views=[v.to(device) for v in self.views],
                       emphasis={i: f.to(device) for i, f in self.emphasis.items()})

    def emphasised(self, errors: Tensor, drawn: Sequence[tuple[int, int]], counted: Tensor | None = None) -> Tensor:
        """Errors (n, ...) of the tokens of `drawn` pictures (number, tokens), or of those `counted` (all,) bool, times
        their factors."""
        if not self.emphasis:
            return errors
        parts = [self.emphasis.get(i, errors.new_ones(count)) for i, count in drawn]
        sizes = [(len(part), count) for part, (_, count) in zip(parts, drawn, strict=True)]
        if any(a != b for a, b in sizes):
            got, wanted = next((a, b) for a, b in sizes if a != b)
            raise ValueError(f"expected a factor for every token of a drawn picture, got {got} for {wanted}; "
                             "fix: make them on its grid")
        factors = torch.cat(parts) if counted is None else torch.cat(parts)[counted]
        if len(factors) != len(errors):
            raise ValueError(f"expected errors of the tokens of pictures alone where they are weighted, got "
                             f"{len(errors)} for {len(factors)}; fix: no factors for this system")
        return errors * factors.view(-1, *[1] * (errors.ndim - 1)).to(errors.dtype)

    @property
    def counts(self) -> dict[str, float] | None:
        """Tokens of each loss term: lets a step of several batches reduce exactly without counting first."""
        if self.chance and self.codes:
            return None
        tokens = self.page.tokens
        latents, codes, queries = (int(((tokens.modality == kind) & tokens.target).sum())
                                   for kind in (Modality.LATENT, Modality.CODE, Modality.QUERY))
        found = {"text": int((self.page.labels != IGNORE).sum()), "image": latents + codes * self.code_depth,
                 "semantic": queries, **self.further}
        return {name: float(count) for name, count in found.items() if count}

    @property
    def num_tokens(self) -> int:
        return int(self.page.tokens.valid().sum())


def emphasise(batch: Batch, written: Sequence[tuple[Writer, list[Tensor], list[Tensor]]],
              bins: Sequence[Sequence[int]], factors: Sequence[Tensor | None]) -> Batch:
    """A batch of what was written in these bins with factors (n,) on the errors of the one drawing of each, None: 1."""
    emphasis: dict[int, Tensor] = {}
    first = 0
    for n in (n for row in bins for n in row):
        w, pictures, _ = written[n]
        drawn = {i for i, target in (*w.latents, *w.codes) if target}
        own = factors[n]
        if own is not None:
            if len(drawn) != 1:
                raise ValueError(f"expected one drawing where its tokens are weighted, got {len(drawn)}; "
                                 "fix: a document with one picture to draw")
            emphasis |= {first + i: own for i in drawn}
        first += len(pictures)
    return replace(batch, emphasis=emphasis)


def dropped(document: Document, rates: tuple[float, float, float]) -> tuple[bool, bool, bool]:
    """Which of its conditions (texts, clean copies, features) a training document loses: a pure function of the
    document, so that runs resume exactly. Only where the one picture to draw comes last; no text target loses the
    pictures it depends on."""
    drawn = [i for i, p in enumerate(document) if p.target and isinstance(p, Image)]
    if drawn != [len(document) - 1]:
        return False, False, False
    u, given = chances(document), len(document.of(Image)) > 1 and len(document.targets) == 1
    return u[0] < rates[0], given and u[1] < rates[1], given and u[2] < rates[2]


def chances(document: Document) -> list[float]:
    """Three numbers in [0, 1) that a document decides by, the same whenever it is read within an epoch."""
    meta = document.meta
    facts = (document.task, meta.get("split"), meta.get("index"), [p.text for p in document.of(Text)],
             *((meta["epoch"], meta.get("file")) if "epoch" in meta else ()))
    key = zlib.crc32(repr(facts).encode())
    return [(key >> s & 1023) / 1024 for s in (0, 10, 20)]
