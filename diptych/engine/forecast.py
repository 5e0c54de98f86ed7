"""How long a generation will take and how much memory, from a short part of it.

`forecast` drives the programs of the documents as the engine does, but lets the network work only on the first few of
works that are alike, and then ever more rarely; the others get the last answer again, at no cost but their place in
the contexts. So prompts, caches, the last step and the codec are all measured at their real sizes, and a picture of
576 codes takes some twenty steps. What lies between two measured works of a kind is interpolated.

Texts are taken to have `Sampling.text.max_tokens` tokens: how long an answer gets, nobody knows before.
"""
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.document import Document
from diptych.parts.tokens import assemble
from diptych.systems.base import Program, Sampling, System, Work
from diptych.systems.packed import Packed
from diptych.systems.works import Decide, Denoise, Guess, Look, Read, Reveal, Step, Together, kind_of
from diptych.training.memory import synchronize

FIRST = 4  # works of a kind that are measured in a row


@dataclass
class Measured:
    """Ticks that did the same: how many there were, and what those that were measured took, by number."""

    count: int = 0
    seconds: dict[int, float] = field(default_factory=dict)

    def due(self) -> bool:
        """Whether the next one is to be measured: the first few, and two after every doubling."""
        n = self.count
        return n <= FIRST or n & (n - 1) == 0 or (n - 1) & (n - 2) == 0

    @property
    def total(self) -> float:
        """Seconds of all: what was not measured lies between the two that were, or is like the last."""
        known = sorted(self.seconds.items())
        total = sum(took for _, took in known)
        for (a, first), (b, second) in pairwise(known):
            total += (b - a - 1) * (first + second) / 2
        return total + (self.count - 1 - known[-1][0]) * self._last(known)

    @staticmethod
    def _last(known: list[tuple[int, float]]) -> float:
        tail = [took for _, took in known[-2:]]
        return sum(tail) / len(tail)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """`seconds` of all documents together; `kinds`: of each kind of work how many ticks, and their seconds."""

    documents: int
    seconds: float
    kinds: tuple[tuple[str, int, float], ...]


@torch.no_grad()
def forecast(system: System, documents: Sequence[Document], sampling: Sampling | None = None, *,
             words: int | None = None, seed: int = 0) -> Forecast:
    """What it takes to fill the targets of these documents at once. `words`: tokens of each text (default: the most
    that `sampling` allows). Time of the machine as it is now; memory is that of the process, which holds at its peak
    what the whole run would."""
    sampling = sampling or system.default_sampling()
    if words is not None:
        sampling = dataclasses.replace(sampling, text=dataclasses.replace(sampling.text, max_tokens=words))
    rehearsal = _Rehearsal(system)
    programs: dict[int, Program] = {
        n: system.program(d.prompt(), sampling, torch.Generator().manual_seed(seed + n), lambda event: None)
        for n, d in enumerate(documents)}
    start = time.perf_counter()
    system.finish(programs, run=rehearsal.run)
    spent = time.perf_counter() - start
    found = [(name, m.count, m.total) for name, m in rehearsal.ticks()]
    outside = spent - rehearsal.inside  # the programs themselves: choosing codes, counting tokens
    return Forecast(documents=len(documents), seconds=outside + sum(s for *_, s in found), kinds=tuple(found))


class _Rehearsal:
    """Answers works as `System.run` does, for real as rarely as it can."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.measured: dict[tuple[tuple[Hashable, int], ...], Measured] = {}
        self.answers: dict[Hashable, Any] = {}
        self.inside = 0.0
        self.end = system.marks.end if isinstance(system, Packed) else None

    def ticks(self) -> list[tuple[str, Measured]]:
        """By what they did, in the order in which that came up first."""
        return [(" + ".join(dict.fromkeys(_name(mark) for mark, _ in key)), m) for key, m in self.measured.items()]

    def run(self, works: Sequence[Work]) -> list[Any]:
        begun = time.perf_counter()
        marks = [_mark(w) for w in works]
        measured = self.measured.setdefault(tuple(sorted(Counter(marks).items(), key=repr)), Measured())
        known = all(_can_wait(w) and m in self.answers for w, m in zip(works, marks, strict=True))
        if known and not measured.due():
            answers = [self.answers[m] for m in marks]
            for w in works:
                _pretend(w)
        else:
            start = time.perf_counter()
            answers = self.system.run(works)
            synchronize(self.system.device)
            measured.seconds[measured.count] = time.perf_counter() - start
            self.answers |= zip(marks, answers, strict=True)
        measured.count += 1
        if self.end is not None:
            for w, answer in zip(works, answers, strict=True):
                if _says_word(w):
                    answer[..., self.end] = -torch.inf
        self.inside += time.perf_counter() - begun
        return answers


def _mark(work: Work) -> Hashable:
    """What works that cost the same have in common."""
    if isinstance(work, Together):
        return ("together", *map(_mark, work.works))
    try:
        kind = kind_of(work)
    except TypeError:
        return type(work).__name__.lower()
    size: tuple[Any, ...] = ()
    if isinstance(work, Read):
        size = work.writer.strip.length, work.predict, len(work.writer.questions)
    elif isinstance(work, Step):
        size = len(work.trails), work.codes
    elif isinstance(work, Look):
        size = len(work.readers), work.grid
    elif isinstance(work, Denoise):
        size = len(work.conditions), work.grid
    elif isinstance(work, Reveal):
        size = len(work.readers), work.grid, int(work.chosen.sum())
    elif isinstance(work, Guess):
        size = tuple(s.writer.strip.length for s in work.sequences), tuple(work.x.shape)
    elif isinstance(work, Decide):
        size = (work.scale,)
    else:
        size = tuple(tuple(v.shape) for v in vars(work).values() if isinstance(v, Tensor))
    return kind, *size


def _name(mark: Hashable) -> str:
    if isinstance(mark, tuple):
        return _name(mark[1] if mark[0] == "together" else mark[0])
    return str(mark)


def _can_wait(work: Work) -> bool:
    """Whether what follows can do without the traces that the network's own work would leave."""
    if isinstance(work, Together):
        return all(map(_can_wait, work.works))
    if isinstance(work, Read):
        return kind_of(work) == "decode" and work.reader.context.store is not None
    return isinstance(work, Step | Look | Denoise | Guess | Reveal)


def _pretend(work: Work) -> None:
    """Contexts as long as they would be."""
    if isinstance(work, Together):
        for part in work.works:
            _pretend(part)
    elif isinstance(work, Step):
        for trail in work.trails:
            trail.done += 1
            trail.reader.context.length += 1
    elif isinstance(work, Read) and work.keep:
        reader, strip = work.reader, work.writer.strip
        reader.context.reserve(strip.length)
        reader.context.length += strip.length
        reader.context.note(assemble([[strip]], start=[reader.context.length - strip.length]))
        reader.position, reader.segment = work.writer.position, work.writer.segment


def _says_word(work: Work) -> bool:
    return (isinstance(work, Step) and not work.codes) or (
        isinstance(work, Read) and work.predict and not len(work.writer.questions))


def stored_size(folder: Path) -> tuple[int, int]:
    """Parameters and bytes of the weights in a folder and below, from the heads of its files. A torch file tells only
    its bytes: two are taken for a parameter."""
    count = stored = 0
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found = [entry for name, entry in head.items() if name != "__metadata__"]
        count += sum(math.prod(entry["shape"]) for entry in found)
        stored += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in found)
    if not count:
        stored = sum(p.stat().st_size for kind in ("bin", "pt", "pth") for p in folder.rglob(f"*.{kind}"))
        count = stored // 2
    return count, stored
