"""Which worker of which component runs on which accelerators, a line of text per component (RLinf, arXiv 2509.15965).

    components    NAME[,NAME...]: PLACE            actor,rollout: 0-3
    PLACE         SEGMENT[,SEGMENT...]             0-1:0-3,4-7
    SEGMENT       ACCELERATORS[:WORKERS]           each N, N-M or, accelerators only, all

A segment spreads its workers evenly: several per accelerator, or several accelerators per worker; one number divides
the other. Without WORKERS there is one per accelerator, counted on from the segment before. Accelerators ascend over
the segments, workers follow each other without a gap.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Sharing = Literal["collocated", "disaggregated", "hybrid"]


class PlacementError(ValueError):
    """Numbers that are no placement. What is not even a number is a plain ValueError."""


@dataclass(frozen=True)
class Segment:
    accelerators: tuple[int, ...]
    workers: tuple[int, ...]

    def of(self, worker: int) -> tuple[int, ...]:
        """The accelerators of one of its workers."""
        at, (n, m) = self.workers.index(worker), (len(self.accelerators), len(self.workers))
        return self.accelerators[at * n // m:(at + 1) * n // m] if n >= m else (self.accelerators[at * n // m],)


@dataclass(frozen=True)
class Placement:
    segments: tuple[Segment, ...]

    @property
    def workers(self) -> dict[int, tuple[int, ...]]:
        """Worker -> its accelerators."""
        return {w: s.of(w) for s in self.segments for w in s.workers}

    @property
    def accelerators(self) -> frozenset[int]:
        return frozenset(a for s in self.segments for a in s.accelerators)


def parse(text: str, accelerators: int) -> Placement:
    """A PLACE among so many accelerators. An empty one has no workers."""
    segments, above, following = list[Segment](), -1, None
    for part in text.split(",") if text.strip() else []:
        left, colon, right = part.partition(":")
        chosen = range(accelerators) if left.strip() == "all" else _span(left, part)
        workers = _span(right, part) if colon else range(following or 0, (following or 0) + len(chosen))
        if not chosen or chosen.stop > accelerators or chosen.start <= above:
            raise PlacementError(f"expected accelerators out of {accelerators} that ascend, got {part!r} in {text!r}")
        if len(chosen) % len(workers) and len(workers) % len(chosen):
            raise PlacementError(f"expected one number to divide the other, got {len(chosen)} accelerators and "
                                 f"{len(workers)} workers in {part!r}")
        if following is not None and workers.start != following:
            raise PlacementError(f"expected workers from {following} on in {part!r}, got {workers.start}; "
                                 "fix: leave no gap between segments")
        above, following = chosen.stop - 1, workers.stop
        segments.append(Segment(tuple(chosen), tuple(workers)))
    return Placement(tuple(segments))


def _span(text: str, part: str) -> range:
    if text.strip() == "all":
        raise PlacementError(f"expected numbers of workers, got all in {part!r}; fix: leave them out")
    first, dash, last = text.partition("-")
    try:
        start, stop = int(first), int(last if dash else first) + 1
    except ValueError:
        raise ValueError(f"expected N or N-M, got {text.strip()!r} in {part!r}") from None
    if start >= stop:
        raise PlacementError(f"expected a range that ascends, got {text.strip()!r}")
    return range(start, stop)


def components(lines: Mapping[str, str], accelerators: int) -> dict[str, Placement]:
    """{"actor,rollout": "0-3", ...} -> the placement of every component by its name."""
    out = dict[str, Placement]()
    for names, text in lines.items():
        for name in (n.strip() for n in names.split(",")):
            if not name or name in out:
                raise PlacementError(f"expected every component once, got {name!r} in {names!r}")
            out[name] = parse(text, accelerators)
    return out


def sharing(placements: Mapping[str, Placement]) -> Sharing:
    """Collocated: all components on the same accelerators, one at a time. Disaggregated: none shares any, they run side
    by side. Hybrid: anything between."""
    homes = [p.accelerators for p in placements.values()]
    if all(h == homes[0] for h in homes):
        return "collocated"
    return "disaggregated" if sum(map(len, homes)) == len(frozenset[int]().union(*homes)) else "hybrid"
