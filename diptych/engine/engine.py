"""Continuous batching of mixed requests: answers and pictures advance together, newcomers join at every tick.

A request is a program (`System.program`) that yields work. A tick collects the next work of every running request,
lets the system execute it batched, and hands each its answer. A request's result depends on its seed only, not on its
company: noise comes from its own generator, and contexts are separate.
"""
import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import torch

from diptych.document import Document
from diptych.systems.base import Event, Program, Sampling, System, Work

log = logging.getLogger("diptych.engine")


class Request:
    """One document under way. `result()` waits for the filled document, `events()` streams what happens before."""

    def __init__(self, number: int, document: Document, sampling: Sampling, seed: int) -> None:
        self.number, self.document, self.sampling, self.seed = number, document, sampling, seed
        self.future: Future[Document] = Future()
        self.queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.cancelled = False
        self.program: Program | None = None
        self.answer: Any = None

    def cancel(self) -> None:
        """Stop at the next tick; `result()` then raises CancelledError."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> Document:
        return self.future.result(timeout)

    def events(self) -> Iterator[Event]:
        """Text deltas, partial and finished pictures, in order, until the request ends. Meant for one consumer."""
        while (event := self.queue.get()) is not None:
            yield event

    def finish(self, document: Document | None, error: BaseException | None = None) -> None:
        if self.program is not None:
            self.program.close()
            self.program = None
        if error is None and document is not None:
            self.future.set_result(document)
        else:
            self.future.set_exception(error or CancelledError())
        self.queue.put(None)


class Engine:
    """Runs requests of one system. Drive it with `step()` from one thread, or let `start()` do so in the background.

    `slots`: requests that run at once; the others wait, first come first served.
    """

    def __init__(self, system: System, *, slots: int = 32) -> None:
        if slots < 1:
            raise ValueError(f"expected at least 1 slot, got {slots}")
        self.system, self.slots = system, slots
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.numbers = itertools.count()
        self.wake = threading.Condition()
        self.thread: threading.Thread | None = None
        self.closing = False

    def submit(self, document: Document, sampling: Sampling | None = None, *, seed: int = 0) -> Request:
        """Queue a document whose targets are to be filled."""
        if not document.targets:
            raise ValueError("expected a document with a target to fill, got none; fix: add e.g. Text(target=True)")
        request = Request(next(self.numbers), document.prompt(), sampling or self.system.default_sampling(), seed)
        with self.wake:
            if self.closing:
                raise RuntimeError("expected an open engine, got one that is closing")
            self.waiting.append(request)
            self.wake.notify()
        return request

    @torch.no_grad()
    def step(self) -> bool:
        """One tick. Returns whether anything is left to do."""
        with self.wake:
            while self.waiting and len(self.running) < self.slots:
                self.running.append(self.waiting.popleft())
        works: list[tuple[Request, Work]] = []
        for request in list(self.running):
            work = self._advance(request)
            if work is None:
                self.running.remove(request)
            else:
                works.append((request, work))
        for (request, _), answer in zip(works, self._run(works), strict=True):
            if isinstance(answer, BaseException):
                self.running.remove(request)
                request.finish(None, answer)
            else:
                request.answer = answer
        return bool(self.running or self.waiting)

    def _advance(self, request: Request) -> Work | None:
        """The request's next work; None if it has ended in one way or another."""
        if request.cancelled:
            request.finish(None)
            return None
        try:
            if request.program is None:
                generator = torch.Generator().manual_seed(request.seed)
                request.program = self.system.program(request.document, request.sampling, generator, request.queue.put)
                return next(request.program)
            return request.program.send(request.answer)
        except StopIteration as stop:
            request.finish(stop.value)
        except Exception as error:  # a request that fails harms no other
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
                self.wake.wait_for(lambda: self.waiting or self.running or self.closing)
                if self.closing and not (self.waiting or self.running):
                    return
            self.step()

    def close(self, *, cancel: bool = False) -> None:
        """Finish (or cancel) what is under way, then stop. Nothing can be submitted afterwards."""
        with self.wake:
            self.closing = True
            if cancel:
                for request in (*self.waiting, *self.running):
                    request.cancel()
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
