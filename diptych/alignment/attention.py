"""Attention interaction alignment (AIA, arXiv 2511.22663): a loss on how much each layer looks from one modality at the
other.

    I_l = mean over heads and queries of the attention that goes to the keys
          drawing: queries are the tokens of the picture, keys the text of the prompt
          reading: queries are the tokens of the answer, keys the features (or codes) of the picture
    L   = sum over layers and samples of Huber_{d_l}(I_l - T_l) / (layers * samples),
          Huber_d(r) = r^2 / 2 if |r| <= d, else d (|r| - d / 2)

Targets T and widths d are constants of stages of layers, read off the curves of models that do one task only. They are
stated for a depth and move with it. `variant` "paper" or "released" differ in where reading begins to look more (layer
20 or 21 of 30). A sample without a prompt or a picture to look at has weight 0 and still counts in the divisor.

In a recipe of a training:    objective: {name: attention, options: {weights: {draw: 5, read: 10}}}
By two specialists:           objective: {name: attention, options: {specialists: {draw: runs/draws, read: runs/reads}}}
By a ratio of magnitudes:     objective: {name: attention, options: {ratios: {draw: {ratio: 50}, read: {}}}}
"""
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diptych import config
from diptych.document import Document
from diptych.parts.interleave import Page
from diptych.parts.tokens import Modality
from diptych.systems.base import Losses, System
from diptych.systems.batch import Batch
from diptych.systems.io import load_system
from diptych.systems.packed import Packed
from diptych.world import tasks

log = logging.getLogger("diptych.alignment")

Kind = Literal["draw", "read"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WEIGHTS: dict[Kind, float] = {"draw": 5.0, "read": 10.0}  # of the published code
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


def spans(page: Page, *, silent: Sequence[int] = (), reference: bool = False) -> Spans:
    """A document that draws is looked at for that, else one that reads a picture and answers. `silent`: ids that say
    nothing, marks and the pad of a prompt that training left out: a prompt of these alone is none. `reference`: the
    spans of the published code, in which the last token of a drawing is no query, and the features to look at begin one
    token early and end one early."""
    tokens = page.tokens
    picture = (tokens.modality == Modality.CODE) | (tokens.modality == Modality.LATENT)
    drawn, shown = tokens.target & picture, (tokens.modality == Modality.FEATURE) | (picture & ~tokens.target)
    text = tokens.modality == Modality.TEXT
    quiet = torch.tensor(silent, dtype=torch.long, device=page.ids.device)
    told, words = text & ~tokens.target, ~torch.isin(page.ids, quiet)
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
                enough = bool((looked & words[b]).any())
                if reference:
                    queries[int(torch.nonzero(queries)[-1])] = False
            else:
                queries, kind = own & text[b] & tokens.target[b], "read"
                looked = own & shown[b]
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

    def note(self, main: float, term: float) -> None:
        """What they were in a step."""
        keep = 0.0 if self.main == self.term == 0 else self.decay
        self.main, self.term = keep * self.main + (1 - keep) * main, keep * self.term + (1 - keep) * term

    @property
    def weight(self) -> float:
        """Of the steps after those that were noted; 0 before."""
        return self.main / (self.ratio * self.term) if self.term > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Specialists:
    """Two models, one that draws and one that reads, by the folders of their runs: the schedules are read off their
    curves, with targets for `stages` of equal depth (as many as layers: for every layer its own). `least`: of delta; a
    delta of 1 makes the errors squares."""

    draw: str
    read: str
    stages: int = 3
    least: float = 0.05
    world: str = "mini"
    tasks: dict[str, str] = field(default_factory=lambda: {"draw": "draw", "read": "question"})
    documents: int = 64

    def schedules(self, device: torch.device | str) -> dict[Kind, Schedule]:
        found: dict[Kind, Schedule] = {}
        for kind in KINDS:
            model = self.open(getattr(self, kind), device)
            curve = curves(model, self.shown(kind)).get(kind)
            if curve is None or not 1 <= self.stages <= len(curve):
                got = "nothing" if curve is None else f"{self.stages} stages of {len(curve)} layers"
                raise ValueError(f"expected a specialist that is to {kind} to look at what is there, in at most as "
                                 f"many stages as it has layers, got {got} of {getattr(self, kind)}; fix: "
                                 "specialists.tasks are those that it was trained for, specialists.stages")
            firsts = [round(n * len(curve) / self.stages) for n in range(self.stages)]
            found[kind] = read_off(curve, firsts, least=self.least)
            log.info("%s: targets %s", kind, ", ".join(f"{s.target:.2f}" for s in found[kind].stages))
        return found

    def open(self, place: str, device: torch.device | str) -> Packed:
        folder = Path(place)
        inside = folder / "model" if (folder / "model").is_dir() else folder
        return watchable(load_system(inside, device=device).eval())

    def shown(self, kind: Kind) -> list[Document]:
        return [tasks.document(self.tasks[kind], i, world=self.world) for i in range(self.documents)]


@dataclass
class AttentionLoss:
    """`aia(system, batch, generator)`: the system's losses with the terms "attention draw" and "attention read", whose
    weights are those of the published code, or given by a `Ratio` each, which learns from whole steps. `draw`, `read`:
    schedules in place of the published ones."""

    variant: Literal["paper", "released"] = "paper"
    draw: Schedule | None = None
    read: Schedule | None = None
    specialists: Specialists | None = None
    weights: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    reference_spans: bool = False

    def __post_init__(self) -> None:
        unknown = sorted({*self.weights, *self.ratios} - set(KINDS))
        if unknown:
            raise ValueError(f"expected weights and ratios of {', '.join(KINDS)}, got {unknown[0]!r}")
        if self.specialists is not None and (self.draw or self.read):
            raise ValueError("expected schedules, or specialists to read them off, got both")
        self.schedules: dict[Kind, Schedule] = {"draw": self.draw or DRAW, "read": self.read or READ[self.variant]}

    def __call__(self, system: System, batch: Batch, generator: torch.Generator) -> Losses:
        system = watchable(system)
        marked = self._spans(batch, system)
        with system.trunk.watch(marked.keys.to(system.device)) as seen:
            losses = system.loss(batch, generator)
        if len(seen) != 1:
            raise ValueError(f"expected a loss of one pass through the trunk, got {len(seen)} of "
                             f"{type(system).__name__}")
        found = intensity(seen[0], marked.samples.to(system.device), len(marked.kinds))
        for kind, schedule in self.schedules.items():
            if own := marked.of(kind):
                name = term_of(kind)
                weights = marked.weights[own].to(found.device)
                losses.sums[name] = errors(found[:, own], schedule, weights).sum()
                losses.counts[name] = torch.tensor(float(len(own)), device=found.device)
                losses.weights[name] = self.weight(kind)
        return losses

    def weight(self, kind: Kind) -> float:
        return self.ratios[kind].weight if kind in self.ratios else self.weights.get(kind, WEIGHTS[kind])

    def counts(self, system: System, batch: Batch) -> dict[str, float] | None:
        """Of all terms, if the batch knows those of the system."""
        if (found := batch.counts) is None:
            return None
        marked = self._spans(batch, watchable(system))
        return found | {term_of(kind): float(len(own)) for kind in KINDS if (own := marked.of(kind))}

    def _spans(self, batch: Batch, system: Packed) -> Spans:
        """Found on the host: there are many small questions to ask."""
        return spans(batch.page.to("cpu"), silent=silent_ids(system), reference=self.reference_spans)

    # -- what a run keeps ---------------------------------------------------------------------------------------------

    def after_step(self, losses: Losses) -> None:
        """Learn from a whole step, so that its weights are the same in all its parts, and for the next one."""
        if not self.ratios:
            return
        means = {name: float(value.detach()) for name, value in losses.mean().items()}
        own = {term_of(kind) for kind in KINDS}
        main = sum(losses.weights[name] * value for name, value in means.items() if name not in own)
        for kind, ratio in self.ratios.items():
            term = means.get(f"attention {kind}", math.nan)
            if math.isfinite(main + term):
                ratio.note(main, term)

    def state(self) -> dict[str, Any]:
        return {"ratios": {k: [r.main, r.term] for k, r in self.ratios.items()},
                "schedules": {k: asdict(s) for k, s in self.schedules.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        for kind, (main, term) in state["ratios"].items():
            self.ratios[kind].main, self.ratios[kind].term = main, term
        for kind in KINDS:
            self.schedules[kind] = config.from_dict(Schedule, state["schedules"][kind], f"schedule to {kind}")


def prepare(system: System, options: Mapping[str, Any]) -> AttentionLoss:
    """As a recipe asks for it (`training.objectives`)."""
    loss = config.from_dict(AttentionLoss, options, where="options of the objective attention")
    watchable(system)
    if loss.specialists is not None:
        loss.schedules |= loss.specialists.schedules(system.device)
    return loss


def watchable(system: System) -> Packed:
    if not isinstance(system, Packed):
        raise ValueError("expected a system of one packed sequence, whose attention can be watched, got "
                         f"{type(system).__name__}; fix: train it without the objective attention")
    return system


def term_of(kind: Kind) -> str:
    return f"attention {kind}"


def silent_ids(system: Packed) -> list[int]:
    """Ids that say nothing: marks, and what fills a prompt that training left out."""
    marks, pad = system.marks, getattr(system.config, "pad", None)
    return [marks.start, marks.end, *([] if pad is None else [pad])]


# -- curves, from which targets are read ------------------------------------------------------------------------------

@torch.no_grad()
def curves(system: Packed, documents: Sequence[Document], *, batch: int = 16) -> dict[Kind, Tensor]:
    """Intensity of every layer, (layers, samples) for "draw" and for "read", of documents with their targets."""
    found: dict[Kind, list[Tensor]] = {}
    for start in range(0, len(documents), batch):
        part = system.collate(documents[start:start + batch])
        marked = spans(part.page, silent=silent_ids(system))
        with system.trunk.watch(marked.keys.to(system.device)) as seen:
            system.loss(part.to(system.device), torch.Generator(system.device).manual_seed(0))
        own = intensity(seen[0].cpu(), marked.samples, len(marked.kinds))
        for kind in KINDS:
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
