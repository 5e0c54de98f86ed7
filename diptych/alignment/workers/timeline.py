"""Who did what when: spans that workers record, idle shares, a picture, and how long an iteration should take.

    one after the other   the longest rollout + the longest judging + learning
    pipelined             k equal parts, S and G of the whole: S / k + (k - 1) max(S, G) / k + G / k + learning
    T turns of k parts    T k max(S / k, G / k) + the first part alone, of loops between two workers

(RLinf, arXiv 2509.15965, from measured stage times; `makespan` follows unequal parts and several workers too.)
"""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLORS = ("#3465a4", "#4e9a06", "#ce5c00", "#75507b", "#8f5902", "#555753")


@dataclass(frozen=True)
class Span:
    """Seconds since the epoch between which a worker was busy with something."""

    worker: str
    tag: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def role(self) -> str:
        return self.worker.rpartition(" ")[0] or self.worker


def busy(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds by worker."""
    out: dict[str, float] = {}
    for s in spans:
        out[s.worker] = out.get(s.worker, 0.0) + s.seconds
    return out


def idle(spans: Sequence[Span], start: float | None = None, end: float | None = None) -> dict[str, float]:
    """Share of the time that each worker had nothing to do; by default between the first start and the last end."""
    if not spans:
        return {}
    start = min(s.start for s in spans) if start is None else start
    end = max(s.end for s in spans) if end is None else end
    return {worker: max(0.0, 1 - own / max(end - start, 1e-9)) for worker, own in busy(spans).items()}


def makespan(acting: Sequence[Span], judging: Sequence[Span], learning: Sequence[Span], *, pipelined: bool,
             streamed: bool = False, alone: bool = False, pushing: float = 0.0) -> float:
    """Seconds that an iteration should take by what its stages took: part i is judged after it was rolled out, by the
    worker that did it. `streamed`: the first pieces of learning belong to a part each; `alone`: nothing ran beside
    anything; `pushing`: new weights to those who act."""
    if alone:
        return sum(s.seconds for s in (*acting, *judging, *learning)) + pushing
    played = _finished(acting, [0.0] * len(acting))
    gate = played if pipelined else [max(played, default=0.0)] * len(played)
    judged = _finished(judging, gate)
    done = 0.0
    for n, span in enumerate(learning):
        ready = judged[n] if streamed and n < len(judged) else max(judged, default=0.0)
        done = max(done, ready) + span.seconds
    return max(done, max(judged, default=0.0)) + pushing


def _finished(spans: Sequence[Span], ready: Sequence[float]) -> list[float]:
    """When each is done, if every worker takes its own in order, none before it is ready."""
    free: dict[str, float] = {}
    out = []
    for span, at in zip(spans, ready, strict=True):
        free[span.worker] = max(free.get(span.worker, 0.0), at) + span.seconds
        out.append(free[span.worker])
    return out


def turns(first: Sequence[float], second: Sequence[float], count: int) -> float:
    """Seconds of `count` turns of two workers that wait for each other (an environment and a policy), of parts that
    take them so long: part p of a turn goes to the second after the first, and back."""
    back, at_first, at_second = [0.0] * len(first), 0.0, 0.0
    for _ in range(count):
        for p, (one, two) in enumerate(zip(first, second, strict=True)):
            at_first = max(at_first, back[p]) + one
            at_second = max(at_second, at_first) + two
            back[p] = at_second
    return max(back)


def draw(spans: Sequence[Span], path: str | Path, title: str = "") -> None:
    """A row for each worker with what it did and its idle share, as PNG or SVG by the ending of the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    path, workers = Path(path), sorted({s.worker for s in spans}, key=_order)
    kinds = list(dict.fromkeys(_kind(s.tag) for s in spans))
    start, shares = min(s.start for s in spans), idle(spans)
    figure, axis = plt.subplots(figsize=(9, 1.0 + 0.42 * len(workers)), layout="constrained")
    handles: dict[str, Any] = {}
    for s in spans:
        kind = _kind(s.tag)
        handles[kind] = axis.barh(workers.index(s.worker), s.seconds, left=s.start - start, height=0.7, lw=0.4,
                                  color=COLORS[kinds.index(kind) % len(COLORS)], edgecolor="white")
    axis.set_yticks(range(len(workers)), [f"{w}\nidle {100 * shares[w]:.0f}%" for w in workers], fontsize=8)
    axis.set_ylim(len(workers) - 0.5, -0.5)
    axis.set_xlabel("seconds", fontsize=8)
    axis.set_title(title, fontsize=9)
    axis.legend([handles[k] for k in kinds], kinds, frameon=False, fontsize=8, ncols=len(kinds),
                loc="lower right", bbox_to_anchor=(1, 1))
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format=path.suffix[1:])
    plt.close(figure)
    temporary.replace(path)


def _kind(tag: str) -> str:
    return tag.rstrip("0123456789 ")


def _order(worker: str) -> tuple[int, str]:
    role = worker.rpartition(" ")[0]
    known = ("rollout", "reward", "learner")
    return (known.index(role) if role in known else len(known), worker)
