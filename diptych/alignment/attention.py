"""Attention interaction alignment (AIA, arXiv 2511.22663): a loss on how much each layer looks from one modality at the
other.

    I_l = mean over heads and queries of the attention that goes to the keys
          drawing: queries are the tokens of the picture, keys the text of the prompt
          reading: queries are the tokens of the answer, keys the features of the picture
    L   = sum over layers and samples of Huber_{d_l}(I_l - T_l) / (layers * samples),
          Huber_d(r) = r^2 / 2 if |r| <= d, else d (|r| - d / 2)

Targets T and widths d are constants of stages of layers, read off the curves of models that do one task only. They are
stated for a depth and move with it. `variant` "paper" or "released" differ in where reading begins to look more (layer
20 or 21 of 30). A sample without a prompt or a picture to look at has weight 0 and still counts in the divisor.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diptych.document import Document
from diptych.parts.interleave import Page
from diptych.parts.tokens import Modality
from diptych.systems.base import Losses
from diptych.systems.batch import Batch
from diptych.systems.packed import Packed

Kind = Literal["draw", "read"]
RATIO = 50.0  # of the magnitudes of the main loss and this one (section 4.3 of the paper)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """From layer `first` on."""

    first: int
    target: float
    delta: float


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Stages of a network of `depth` layers, for networks of any."""

    stages: tuple[Stage, ...]
    depth: int = 30

    def __post_init__(self) -> None:
        firsts = [s.first for s in self.stages]
        if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)) or any(s.delta <= 0 for s in self.stages):
            raise ValueError(f"expected stages from layer 0 on, in order, with delta > 0, got {firsts}")

    def stage(self, layer: int, depth: int) -> Stage:
        """Of layer number `layer` of `depth`."""
        return [s for s in self.stages if s.first * depth <= layer * self.depth][-1]

    def at(self, depth: int) -> tuple[Tensor, Tensor]:
        """Targets and deltas of all layers (depth,)."""
        own = [self.stage(n, depth) for n in range(depth)]
        return torch.tensor([s.target for s in own]), torch.tensor([s.delta for s in own])


def _stages(*rows: tuple[int, float, float]) -> Schedule:
    return Schedule(stages=tuple(Stage(first=f, target=t, delta=d) for f, t, d in rows))


DRAW = _stages((0, 0.4, 0.2), (10, 0.4, 0.1), (25, 0.2, 0.05))
READ = {"paper": _stages((0, 0.1, 0.05), (10, 0.15, 0.05), (20, 0.3, 0.05), (30, 0.2, 0.05)),
        "released": _stages((0, 0.1, 0.05), (10, 0.15, 0.05), (21, 0.3, 0.05), (30, 0.2, 0.05))}


def huber(gap: Tensor, delta: Tensor) -> Tensor:
    """With a delta of its own everywhere."""
    size = gap.abs()
    return torch.where(size <= delta, gap.square() / 2, delta * (size - delta / 2))


def intensity(shares: Tensor, samples: Tensor, count: int) -> Tensor:
    """Shares of attention (layers, B, T) -> their means over the queries of each sample (layers, count); `samples`
    (B, T): the sample that a query belongs to, -1 for no query."""
    flat = samples.flatten()
    places = torch.nonzero(flat >= 0).squeeze(1)
    sums = shares.new_zeros(len(shares), count).index_add(1, flat[places], shares.flatten(1)[:, places])
    return sums / torch.bincount(flat[places], minlength=count).clamp_min(1)


def errors(found: Tensor, schedule: Schedule, weights: Tensor | None = None) -> Tensor:
    """Intensities (layers, samples) -> the mean over layers of each sample's Huber error (samples,)."""
    target, delta = (v.to(found.device)[:, None] for v in schedule.at(len(found)))
    error = huber(found - target, delta).mean(0)
    return error if weights is None else error * weights


# -- who looks at what ------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Spans:
    """Of a page: the `keys` (B, T) bool, the sample of every query (B, T) or -1, kind and weight of every sample."""

    keys: Tensor
    samples: Tensor
    kinds: tuple[Kind, ...]
    weights: Tensor

    def of(self, kind: Kind) -> list[int]:
        return [n for n, own in enumerate(self.kinds) if own == kind]


def spans(page: Page, *, pad: int | None = None, reference: bool = False) -> Spans:
    """A document that draws is looked at for that, else one that reads a picture and answers. `pad`: id that stands in
    place of a prompt that training left out. `reference`: the spans of the published code, in which the last token of a
    drawing is no query, and the features to look at begin one token early and end one early."""
    tokens = page.tokens
    drawn = tokens.target & ((tokens.modality == Modality.CODE) | (tokens.modality == Modality.LATENT))
    text = tokens.modality == Modality.TEXT
    told = text & ~tokens.target if pad is None else text & ~tokens.target & (page.ids != pad)
    keys, samples = torch.zeros_like(drawn), torch.full_like(page.ids, -1)
    kinds: list[Kind] = []
    weights: list[float] = []
    for b in range(tokens.shape[0]):
        for d in range(int(tokens.document[b].max()) + 1):
            own = tokens.document[b] == d
            if bool((own & drawn[b]).any()):
                queries, kind = own & drawn[b], "draw"
                first = int(torch.nonzero(queries)[0])
                before = torch.arange(len(own), device=own.device) < first
                # the marks of the picture stand in its segment
                looked = own & told[b] & before & (tokens.segment[b] != tokens.segment[b, first])
                enough = int(looked.sum()) > (pad is not None)  # the first token of all stays in a prompt left out
                if reference:
                    queries[int(torch.nonzero(queries)[-1])] = False
            else:
                queries, kind = own & text[b] & tokens.target[b], "read"
                looked = own & (tokens.modality[b] == Modality.FEATURE)
                enough = bool(looked.any())
                looked = _early(looked) if reference else looked
            if not bool(queries.any()):
                continue
            keys[b] |= looked
            samples[b, queries] = len(kinds)
            kinds.append(kind)
            weights.append(float(enough))
    return Spans(keys=keys, samples=samples, kinds=tuple(kinds), weights=torch.tensor(weights))


def _early(looked: Tensor) -> Tensor:
    """(T,) every run one place to the left."""
    return torch.cat((looked[1:], looked.new_zeros(1)))


# -- beside a system's own loss ---------------------------------------------------------------------------------------

@dataclass
class Ratio:
    """A weight that keeps the magnitudes of the main loss and of a term at a ratio, by running means."""

    ratio: float = RATIO
    decay: float = 0.99
    main: float = 0.0
    term: float = 0.0

    def __call__(self, main: float, term: float) -> float:
        first = self.main == self.term == 0
        keep = 0.0 if first else self.decay
        self.main, self.term = keep * self.main + (1 - keep) * main, keep * self.term + (1 - keep) * term
        return self.main / (self.ratio * self.term) if self.term > 0 else 0.0


@dataclass
class AttentionLoss:
    """`aia(system, batch, generator)`: the system's losses with the terms "attention draw" and "attention read", whose
    weights are those of the published code, or given by a `Ratio` each."""

    draw: Schedule = DRAW
    read: Schedule = READ["paper"]
    weights: dict[str, float] = field(default_factory=lambda: {"draw": 5.0, "read": 10.0})
    ratios: dict[str, Ratio] = field(default_factory=dict)
    pad: int | None = None
    reference_spans: bool = False

    def __call__(self, system: Packed, batch: Batch, generator: torch.Generator) -> Losses:
        marked = spans(batch.page, pad=self.pad, reference=self.reference_spans)
        with system.trunk.watch(marked.keys) as seen:
            losses = system.loss(batch, generator)
        if len(seen) != 1:
            raise ValueError(f"expected a loss of one pass through the trunk, got {len(seen)} of "
                             f"{type(system).__name__}")
        found = intensity(seen[0], marked.samples, len(marked.kinds))
        main = float(losses.total().detach())
        schedules: dict[Kind, Schedule] = {"draw": self.draw, "read": self.read}
        for kind, schedule in schedules.items():
            if not (own := marked.of(kind)):
                continue
            error = errors(found[:, own], schedule, marked.weights.to(found.device)[own]).sum()
            name = f"attention {kind}"
            losses.sums[name] = error
            losses.counts[name] = torch.tensor(float(len(own)), device=error.device)
            term = float(error.detach()) / len(own)
            losses.weights[name] = self.ratios[kind](main, term) if kind in self.ratios else self.weights[kind]
        return losses


# -- curves, from which targets are read ------------------------------------------------------------------------------

@torch.no_grad()
def curves(system: Packed, documents: Sequence[Document], *, batch: int = 16, pad: int | None = None
           ) -> dict[str, Tensor]:
    """Intensity of every layer, (layers, samples) for "draw" and for "read", of documents with their targets."""
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(documents), batch):
        part = system.collate(documents[start:start + batch]).to(system.device)
        marked = spans(part.page, pad=pad)
        with system.trunk.watch(marked.keys) as seen:
            system.loss(part, torch.Generator(system.device).manual_seed(0))
        own = intensity(seen[0], marked.samples, len(marked.kinds)).cpu()
        for kind in ("draw", "read"):
            kept = [n for n in marked.of(kind) if marked.weights[n] > 0]
            if kept:
                found.setdefault(kind, []).append(own[:, kept])
    return {kind: torch.cat(parts, 1) for kind, parts in found.items()}


def read_off(curve: Tensor, firsts: Sequence[int], *, least: float = 0.05) -> Schedule:
    """The schedule of a specialist's intensities (layers, samples), with stages from these layers on: targets are
    means, deltas half the deviation, `least` or more."""
    ends = [*firsts[1:], len(curve)]
    parts = [curve[a:b] for a, b in zip(firsts, ends, strict=True)]
    return Schedule(depth=len(curve), stages=tuple(
        Stage(first=f, target=float(p.mean()), delta=max(float(p.std(correction=0)) / 2, least))
        for f, p in zip(firsts, parts, strict=True)))
