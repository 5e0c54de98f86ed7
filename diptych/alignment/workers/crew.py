"""A crew: workers by role, asked by name to do something, wherever they are.

    pending = crew.send("rollout", "play", documents, at=3)     worker 3 (modulo their number), when it is its turn
    judged = crew.send("reward", "judge", pending)              what is pending is handed on when it is there
    judged.get()

Whoever sends does not know where a worker runs. Everything that is sent and answered can be pickled; a worker does what
it is asked one after the other, in the order it was asked. Answers are the same for every crew.
"""
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diptych.alignment.workers.timeline import Span
from diptych.alignment.workers.wire import Slot


class WorkerDied(ChildProcessError):
    """A worker is gone, and what it was asked for with it."""

    def __init__(self, worker: str, where: str, doing: str, how: str) -> None:
        super().__init__(f"expected worker {worker} ({where}) to go on with {doing or 'nothing'}, got its end: {how}; "
                         "fix: see what it said last, then go on at the newest checkpoint with --resume")
        self.worker = worker


@dataclass(frozen=True)
class Place:
    """Where a worker runs: numbers of cores ("cpu") or of devices, and its compute threads. Results depend on the
    number of threads, so all workers of a crew have the same."""

    accelerators: tuple[int, ...] = ()
    kind: str = "cpu"
    threads: int = 0

    @property
    def device(self) -> str:
        return "cpu" if self.kind == "cpu" else f"{self.kind}:{self.accelerators[0]}"

    def __str__(self) -> str:
        what = "core" if self.kind == "cpu" else self.kind
        return f"{what} {', '.join(map(str, self.accelerators))}" if self.accelerators else "anywhere"

    def settle(self) -> None:
        """Bind this process to its cores."""
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.kind == "cpu" and self.accelerators and hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[a] for a in self.accelerators})


@dataclass(frozen=True)
class Blueprint:
    """How a worker is made where it will run: `make(**given)`, all of which can be pickled."""

    make: Callable[..., Any]
    given: Mapping[str, Any] = field(default_factory=dict)
    place: Place = Place()

    def build(self) -> Any:
        self.place.settle()
        return self.make(**self.given)


class Pending:
    """An answer that is on its way."""

    def __init__(self, worker: str, tag: str) -> None:
        self.worker, self.tag, self.span = worker, tag, Span(worker, tag, 0.0, 0.0)

    def wait(self) -> None:
        """Until it is there, and its `span` is known. Raises what the worker raised, or WorkerDied."""
        raise TypeError(f"{type(self).__name__} cannot wait")

    def get(self) -> Any:
        """The answer."""
        raise TypeError(f"{type(self).__name__} has no answer")


class Crew:
    """Back ends implement `_submit` and `close`."""

    alone = False  # whether nothing ever runs beside anything
    slot: Slot | None = None  # where the learner leaves weights that are not sent

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self._sent: list[Pending] = []

    def send(self, role: str, method: str, *args: Any, at: int = 0, tag: str = "") -> Pending:
        number = at % self.sizes[role]
        pending = self._submit(role, number, method, args, tag or method)
        self._sent.append(pending)
        return pending

    def everyone(self, role: str, method: str, *args: Any, tag: str = "") -> list[Pending]:
        return [self.send(role, method, *args, at=n, tag=tag) for n in range(self.sizes[role])]

    def settle(self) -> None:
        """Wait until nothing is on its way."""
        for pending in self._sent:
            pending.wait()

    def drain(self) -> list[Span]:
        """What was done since the last call, when all of it is."""
        self.settle()
        spans, self._sent = [p.span for p in self._sent], []
        return spans

    def push(self, every: bool = False) -> list[Pending]:
        """The learner's weights to all who act: those that it trains, or `every` tensor."""
        published = self.send("learner", "publish", every, tag="weights")
        return [published, *self.everyone("rollout", "take", published, tag="weights")]

    def weights(self) -> Mapping[str, Tensor]:
        """All of the learner's, as they are now."""
        found = self.send("learner", "publish", True).get()
        return self.slot.views if self.slot is not None else found

    def local(self, role: str) -> Any:
        """The worker itself, of a crew in this process."""
        raise ValueError(f"expected a crew in this process to hand out its {role}, got {type(self).__name__}; "
                         "fix: --backend serial")

    def close(self) -> None:
        """End the workers, whatever they are doing."""

    def _submit(self, role: str, number: int, method: str, args: Sequence[Any], tag: str) -> Pending:
        raise TypeError(f"{type(self).__name__} has no workers")


def called(role: str, number: int) -> str:
    return f"{role} {number}"


class _Done(Pending):
    value: Any = None

    def wait(self) -> None:
        return

    def get(self) -> Any:
        return self.value


class SerialCrew(Crew):
    """All in this process, each asked at once; a learner and those who act share their weights."""

    alone = True

    def __init__(self, workers: Mapping[str, Any]) -> None:
        super().__init__(dict.fromkeys(workers, 1))
        self.workers = dict(workers)

    def local(self, role: str) -> Any:
        return self.workers[role]

    def push(self, every: bool = False) -> list[Pending]:
        return []

    def _submit(self, role: str, number: int, method: str, args: Sequence[Any], tag: str) -> Pending:
        found, start = _Done(called(role, number), tag), time.time()
        found.value = getattr(self.workers[role], method)(*(a.get() if isinstance(a, Pending) else a for a in args))
        found.span = Span(found.worker, tag, start, time.time())
        return found
