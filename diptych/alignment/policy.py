"""Any system as a policy: what it decided, how likely that was, and how likely it is now.

    act(system, documents, sampling, seeds)   -> trajectories: filled documents, and every decision with its log-prob
    recall(system, trajectories, sampling)    -> the same decisions' log-probs under the system as it is, with gradients

Both run the system's own programs (`System.program`), so texts, codes, masked tokens, scales and stochastic flow steps
need nothing of their own: see `objectives.decisions`. With unchanged weights both give the same numbers, but for the
rounding of compiled and batched kernels; `compare` measures that gap, and a ratio of probabilities means nothing where
it is large.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diptych.document import Document, Image
from diptych.objectives.decisions import Decision, Tape, taping
from diptych.systems.base import Program, Sampling, System, Work
from diptych.systems.works import Develop, Read, Step, parts_of

BOUND = 0.02  # of the largest gap of a log-prob, in float32


@dataclass(frozen=True)
class Trajectory:
    """`asked`: the document with its targets empty, or as the data had it; `made`: as the system filled it; `drawn`:
    how many of the decisions were not given."""

    asked: Document
    made: Document
    seed: int
    decisions: tuple[Decision, ...]
    drawn: int = 0

    @property
    def log_probs(self) -> Tensor:
        """(m,) of all decisions, in order."""
        return torch.cat([d.log_prob for d in self.decisions])

    @property
    def kinds(self) -> list[str]:
        """What kind of decision each of them belongs to."""
        return [d.kind for d in self.decisions for _ in d.log_prob]


@torch.no_grad()
def act(system: System, documents: Sequence[Document], sampling: Sampling, seeds: Sequence[int], *, learn: bool = True,
        first: Sequence[Mapping[str, Sequence[Any]]] | None = None, states: bool = False) -> list[Trajectory]:
    """Fill documents, all together, and keep every decision. Raises ValueError if there was none to learn from, but
    without `learn`.

    `first`: for every document what it begins with, values by kind of decision. `states`: whether decisions keep the
    hidden states that they were made of.
    """
    tapes = [Tape(first=begun) for begun in first or [{}] * len(documents)]
    made = _drive(system, documents, sampling, seeds, tapes, None, states)
    for document, tape in zip(documents, tapes, strict=True):
        if learn and not tape.decisions:
            raise ValueError(f"expected {type(system).__name__} to decide something about a document of task "
                             f"{document.task!r}, got no decision; fix: for pictures drawn by flow set "
                             "sampling.stochastic > 0")
    return [Trajectory(d, m, s, tuple(t.decisions), t.drawn)
            for d, m, s, t in zip(documents, made, seeds, tapes, strict=True)]


def recall(system: System, trajectories: Sequence[Trajectory], sampling: Sampling, *, options: bool = False
           ) -> list[list[Decision]]:
    """The decisions of every trajectory taken again: their log-probs (m,) carry gradients unless these are off.
    `options`: they keep what else could have been decided."""
    tapes = [Tape(t.decisions, options=options) for t in trajectories]
    _drive(system, [t.asked for t in trajectories], sampling, [t.seed for t in trajectories], tapes,
           [t.made for t in trajectories])
    for tape in tapes:
        if not tape.complete:
            raise ValueError(f"expected {len(tape.given or ())} decisions again, got {len(tape.decisions)}; fix: the "
                             "same document, sampling and system configuration")
    return [tape.decisions for tape in tapes]


def _drive(system: System, documents: Sequence[Document], sampling: Sampling, seeds: Sequence[int],
           tapes: Sequence[Tape], made: Sequence[Document] | None, states: bool = False) -> list[Document]:
    """Run the programs together, each on its tape. Pictures that are `made` already are not developed again. `states`
    tells the tapes what every decision is made of."""
    programs: dict[int, Program] = {}
    for n, (document, seed) in enumerate(zip(documents, seeds, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        programs[n] = system.program(document.prompt(), sampling, generator, lambda event: None)
    pictures = None if made is None else [_pictures(document) for document in made]
    current: list[tuple[int, Work]] = []  # what was asked in this round, and by whom

    def send(n: int, program: Program, answer: Any) -> Work:
        with taping(tapes[n]):
            work = program.send(answer)
            while pictures is not None and isinstance(work, Develop):
                work = program.send(pictures[n].pop(0).to(system.device))
        current.append((n, work))
        return work

    def run(works: Sequence[Work]) -> list[Any]:
        kept = [(tapes[n], _listen(work)) for n, work in current]
        current.clear()
        answers = system.run(works)
        for tape, own in kept:
            rows = [state for part in own for state in part]
            tape.states = torch.cat(rows) if rows else None
        return answers

    return system.finish(programs, send=send, run=run if states else None)


def _listen(work: Work) -> list[list[Tensor]]:
    """Lists that will hold the states (m, width) behind the answer to this work, part by part."""
    kept: list[list[Tensor]] = []
    for part in parts_of(work):
        if isinstance(part, Read | Step):
            part.states = []
            kept.append(part.states)
    return kept


def _pictures(document: Document) -> list[Tensor]:
    return [torch.from_numpy(p.pixels) for p in document.targets if isinstance(p, Image) and p.pixels is not None]


# -- the gap between acting and learning -------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Gap:
    """Of the log-probs of one kind of decision: the largest and the mean absolute difference, and how many."""

    largest: float
    mean: float
    count: int


@torch.no_grad()
def compare(trajectories: Sequence[Trajectory], recalled: Sequence[Sequence[Decision]], bound: float = BOUND
            ) -> dict[str, Gap]:
    """How far the log-probs of unchanged weights are from those of the rollout, by kind. Raises ArithmeticError beyond
    the bound: ratios would not begin at 1."""
    apart: dict[str, list[Tensor]] = {}
    for trajectory, again in zip(trajectories, recalled, strict=True):
        for old, new in zip(trajectory.decisions, again, strict=True):
            apart.setdefault(old.kind, []).append((new.log_prob - old.log_prob).abs())
    found = {kind: torch.cat(parts) for kind, parts in apart.items()}
    gaps = {kind: Gap(largest=float(d.max()), mean=float(d.mean()), count=len(d)) for kind, d in found.items()}
    for kind, gap in gaps.items():
        if not gap.largest <= bound:
            raise ArithmeticError(f"expected log-probs of {kind} decisions within {bound} of the rollout's, got "
                                  f"{gap.largest:.3g}; fix: act and learn in the same precision and with the same "
                                  "sampling, or raise the bound knowing why")
    return gaps
