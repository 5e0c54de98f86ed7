"""Continuous batching of mixed requests: answers and pictures advance together, newcomers join at every tick.

A request is a program (`System.program`) that yields work. A tick collects the next work of every running request,
lets the system execute it batched, and hands each its answer. A request's result depends on its seed only, not on its
company: noise comes from its own generator, and contexts are separate.
"""
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import torch

from diptych.document import Document, Image, Video
from diptych.systems.base import Event, Program, Sampling, System, Work

log = logging.getLogger("diptych.engine")

Listen = Callable[[Event | None], None]


class QueueFull(RuntimeError):
    """More requests wait already than the engine was told to let wait."""


class Request:
    """One document under way. `result()` waits for the filled document, `events()` streams what happens before.

    `listen` takes the events in place of `events()`, and None when the request has ended; it is called from the
    engine's thread. `left` is called by `cancel`, for engines that do not look at every tick. `submitted`, `started`
    and `finished` are readings of the engine's clock.
    """

    def __init__(self, number: int, document: Document, sampling: Sampling, seed: int, listen: Listen | None = None,
                 submitted: float = 0.0) -> None:
        self.number, self.document, self.sampling, self.seed = number, document, sampling, seed
        self.draws = any(isinstance(p, Image | Video) for p in document.targets)
        self.future: Future[Document] = Future()
        self.queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.listen = listen or self.queue.put
        self.cancelled = False
        self.left: Callable[[], None] | None = None
        self.program: Program | None = None
        self.answer: Any = None
        self.submitted = submitted
        self.started: float | None = None
        self.finished: float | None = None

    def cancel(self) -> None:
        """Stop at the next tick; `result()` then raises CancelledError."""
        self.cancelled = True
        if self.left is not None:
            self.left()

    def result(self, timeout: float | None = None) -> Document:
        return self.future.result(timeout)

    def events(self) -> Iterator[Event]:
        """Text deltas, partial and finished pictures, in order, until the request ends. Meant for one consumer."""
        while (event := self.queue.get()) is not None:
            yield event

    def finish(self, document: Document | None, error: BaseException | None = None) -> None:
        if self.future.done():
            return
        if self.program is not None:
            self.program.close()
            self.program = None
        if error is None and document is not None:
            self.future.set_result(document)
        else:
            self.future.set_exception(error or CancelledError())
        try:
            self.listen(None)
        except Exception:  # a listener that is gone must not stop the others
            log.exception("request %d: its listener failed", self.number)


def admit(waiting: deque[Request], running: list[Request], *, slots: int, reserve: int, now: float) -> list[Request]:
    """The oldest that may move from `waiting` to `running`, until `slots` are taken; of these, pictures leave
    `reserve`."""
    passed: list[Request] = []
    admitted: list[Request] = []
    drawing = sum(r.draws for r in running)
    while waiting and len(running) < slots:
        request = waiting.popleft()
        if request.draws and drawing >= slots - reserve:
            passed.append(request)
            continue
        drawing += request.draws
        request.started = now
        running.append(request)
        admitted.append(request)
    waiting.extendleft(reversed(passed))
    return admitted


class Engine:
    """Runs requests of one system. Drive it with `step()` from one thread, or let `start()` do so in the background.

    `slots`: requests that run at once; the others wait (at most `queue` of them, then `submit` raises QueueFull).

    Who comes first: the oldest that may. Two rules keep long pictures and short answers from each other's throat; they
    are off by default, where only throughput counts.

    - `reserve` slots are never held by requests that draw: a wall of pictures leaves room for answers. Nobody starves:
      an answer is passed over by no one, a picture only while other pictures hold all the slots they may hold, and
      then the next of these to fall free is the oldest picture's, whatever has come since.
    - `share` of the time belongs to answers while both kinds run. A tick in which pictures advance takes as long as
      their network takes, and an answer of thirty tokens would wait for thirty of them; so after every such tick
      answers advance alone until they have had their share. At 1/2 no picture takes more than twice its time.
    """

    def __init__(self, system: System, *, slots: int = 32, queue: int | None = None, reserve: int = 0,
                 share: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        if slots < 1:
            raise ValueError(f"expected at least 1 slot, got {slots}")
        if not 0 <= reserve < slots or not 0 <= share < 1 or (queue is not None and queue < 0):
            raise ValueError(f"expected 0 <= reserve < slots, 0 <= share < 1 and queue >= 0, got reserve {reserve}, "
                             f"share {share}, queue {queue}")
        self.system, self.slots, self.limit = system, slots, queue
        self.reserve, self.share, self.clock = reserve, share, clock
        self.owed = 0.0  # seconds that answers may advance alone
        self.calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.numbers = itertools.count()
        self.wake = threading.Condition()
        self.thread: threading.Thread | None = None
        self.closing = False

    @property
    def room(self) -> int | None:
        """How many more requests `submit` would take now; None if any number."""
        if self.limit is None:
            return None
        return max(0, self.limit + self.slots - len(self.running) - len(self.waiting))

    def submit(self, document: Document, sampling: Sampling | None = None, *, seed: int = 0,
               listen: Listen | None = None) -> Request:
        """Queue a document whose targets are to be filled."""
        if not document.targets:
            raise ValueError("expected a document with a target to fill, got none; fix: add e.g. Text(target=True)")
        request = Request(next(self.numbers), document.prompt(), sampling or self.system.default_sampling(), seed,
                          listen, self.clock())
        with self.wake:
            if self.closing:
                raise RuntimeError("expected an open engine, got one that is closing")
            if self.room == 0:
                raise QueueFull(f"expected at most {self.limit} requests to wait, got one more; fix: try again later")
            self.waiting.append(request)
            self.wake.notify()
        return request

    def between(self, function: Callable[[], Any]) -> Future[Any]:
        """Call this between two ticks, while nothing else uses the system; requests wait as long as it takes."""
        future: Future[Any] = Future()
        with self.wake:
            if self.closing:
                raise RuntimeError("expected an open engine, got one that is closing")
            self.calls.append((function, future))
            self.wake.notify()
        return future

    @torch.no_grad()
    def step(self) -> bool:
        """One tick. Returns whether anything is left to do."""
        self._call()
        with self.wake:
            self._leave()
            admit(self.waiting, self.running, slots=self.slots, reserve=self.reserve, now=self.clock())
        turn = self._turn()
        begun = self.clock()
        works: list[tuple[Request, Work]] = []
        for request in turn:
            work = self._advance(request)
            if work is None:
                self._end(request)
            else:
                works.append((request, work))
        for (request, _), answer in zip(works, self._run(works), strict=True):
            if isinstance(answer, BaseException):
                self._end(request, answer)
            else:
                request.answer = answer
        self._account(turn, self.clock() - begun)
        return bool(self.running or self.waiting or self.calls)

    def _call(self) -> None:
        """One call that waits: those who have more to do ask again, and requests come in between."""
        with self.wake:
            function, future = self.calls.popleft() if self.calls else (None, None)
        if function is None or future is None or not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except Exception as error:  # the caller's, not the engine's
            future.set_exception(error)

    # -- who runs -----------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Cancelled requests free their slots and their places before others are admitted."""
        for request in [r for r in (*self.running, *self.waiting) if r.cancelled]:
            if request in self.running:
                self._end(request)
            else:
                self.waiting.remove(request)
                request.finish(None)

    def _turn(self) -> list[Request]:
        """Who advances in this tick: all, or answers alone while they are owed time."""
        answers = [r for r in self.running if not r.draws]
        if not answers or len(answers) == len(self.running):
            self.owed = 0.0
        return answers if self.owed > 0 else list(self.running)

    def _account(self, turn: Sequence[Request], seconds: float) -> None:
        if any(r.draws for r in turn):
            self.owed = seconds * self.share / (1 - self.share)
        else:
            self.owed -= seconds

    def _end(self, request: Request, error: BaseException | None = None) -> None:
        """Off the slots; `finish` does nothing to one that has its result already."""
        self.running.remove(request)
        if request.finished is None:
            request.finished = self.clock()
        request.finish(None, error)

    def _advance(self, request: Request) -> Work | None:
        """The request's next work; None if it has ended in one way or another."""
        if request.cancelled:
            request.finish(None)
            return None
        try:
            if request.program is None:
                generator = torch.Generator().manual_seed(request.seed)
                request.program = self.system.program(request.document, request.sampling, generator, request.listen)
                return next(request.program)
            return request.program.send(request.answer)
        except StopIteration as stop:
            request.finished = self.clock()
            request.finish(stop.value)
        except Exception as error:  # a request that fails harms no other
            request.finished = self.clock()
            request.finish(None, error)
        return None

    def _run(self, works: Sequence[tuple[Request, Work]]) -> list[Any]:
        if not works:
            return []
        try:
            return self.system.run([work for _, work in works])
        except Exception as error:
            if len(works) == 1:
                return [error]
            log.warning("a batch of %d failed (%s); running its parts alone", len(works), error)
        return [answer for pair in works for answer in self._run([pair])]

    # -- in the background --------------------------------------------------------------------------------------------

    def start(self) -> "Engine":
        if self.thread is None:
            self.thread = threading.Thread(target=self._loop, name="diptych-engine", daemon=True)
            self.thread.start()
        return self

    def _loop(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.waiting or self.running or self.calls or self.closing)
                if self.closing and not (self.waiting or self.running or self.calls):
                    return
            try:
                self.step()
            except Exception as error:  # nobody may wait for ever on a thread that has died
                log.exception("a tick failed; the requests that ran fail with it")
                for request in list(self.running):
                    self._end(request, error)

    def close(self, *, cancel: bool = False) -> None:
        """Finish (or cancel) what is under way, then stop. Nothing can be submitted afterwards."""
        with self.wake:
            self.closing = True
            if cancel:
                for request in (*self.waiting, *self.running):
                    request.cancel()
                for _, future in self.calls:
                    future.cancel()
            self.wake.notify()
        if self.thread is not None:
            self.thread.join()
        else:
            while self.step():
                pass

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(cancel=kind is not None)


def generate(system: System, documents: Sequence[Document], sampling: Sampling | None = None, *,
             seeds: Sequence[int] | int = 0, slots: int = 64, progress: str | None = None) -> list[Document]:
    """Fill the targets of any number of documents, `slots` at a time. One seed serves every document alike.

    `progress` is the label of a progress bar. The first error of a document is raised.
    """
    seeds = [seeds] * len(documents) if isinstance(seeds, int) else list(seeds)
    if len(seeds) != len(documents):
        raise ValueError(f"expected one seed, or one per document ({len(documents)}), got {len(seeds)}")
    engine = Engine(system, slots=slots)
    requests = [engine.submit(d, sampling, seed=s) for d, s in zip(documents, seeds, strict=True)]
    from tqdm import tqdm

    with tqdm(total=len(requests), desc=progress, disable=progress is None) as bar:
        done = 0
        while engine.step():
            now = sum(r.future.done() for r in requests)
            bar.update(now - done)
            done = now
        bar.update(len(requests) - done)
    return [r.result(0) for r in requests]
