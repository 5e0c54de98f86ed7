"""A crew of processes on this machine, one for each worker, spawned; answers travel through pipes as bytes."""
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from diptych.alignment.workers.crew import Blueprint, Crew, Pending, WorkerDied, called
from diptych.alignment.workers.timeline import Span
from diptych.alignment.workers.wire import pack, unpack

PATIENCE = 5.0  # seconds that a worker has to end by itself


class _Job(Pending):
    """`parcel` is the answer, unopened: it may only be passed on."""

    def __init__(self, crew: "ProcessCrew", worker: str, tag: str, method: str, args: Sequence[Any]) -> None:
        super().__init__(worker, tag)
        self.crew, self.method, self.args = crew, method, args
        self.parcel: bytes | None = None
        self.error: BaseException | None = None
        self.value: Any = None

    @property
    def done(self) -> bool:
        return self.parcel is not None or self.error is not None

    def wait(self) -> None:
        while not self.done:
            self.crew.pump()
        if self.error is not None:
            raise self.error

    def get(self) -> Any:
        self.wait()
        if self.value is None and self.parcel is not None:
            self.value = unpack(self.parcel)
        return self.value


class _Worker:
    def __init__(self, name: str, blueprint: Blueprint) -> None:
        self.name, self.place, self.waiting = name, blueprint.place, deque[_Job]()
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, pack(blueprint)), name=f"diptych {name}",
                                       daemon=True)
        self.process.start()
        other.close()  # so that the end of the process is the end of the pipe
        self.busy: _Job | None = None

    def __str__(self) -> str:
        return f"process {self.process.pid}, {self.place}"


class ProcessCrew(Crew):
    """`blueprints` of all workers by role. Ends them all when one is gone."""

    def __init__(self, blueprints: Mapping[str, Sequence[Blueprint]]) -> None:
        super().__init__({role: len(own) for role, own in blueprints.items()})
        self.over: WorkerDied | None = None
        self.workers = {called(role, n): _Worker(called(role, n), b)
                        for role, own in blueprints.items() for n, b in enumerate(own)}
        ready = []
        for worker in self.workers.values():
            worker.busy = _Job(self, worker.name, "start", "its start", ())
            ready.append(worker.busy)
        try:
            for job in ready:
                job.wait()
        except BaseException:
            self.close()
            raise

    def pids(self) -> dict[str, int]:
        return {name: w.process.pid or 0 for name, w in self.workers.items()}

    def _submit(self, role: str, number: int, method: str, args: Sequence[Any], tag: str) -> Pending:
        self._check_open()
        worker = self.workers[called(role, number)]
        job = _Job(self, worker.name, tag, method, args)
        worker.waiting.append(job)
        self._hand_out()
        return job

    def _hand_out(self) -> None:
        """Give every worker that has nothing to do the first of what waits for it, if all it needs is there. One at a
        time: two ends that both write more than a pipe holds would wait for each other."""
        for worker in self.workers.values():
            while worker.busy is None and worker.waiting:
                needed = [a for a in worker.waiting[0].args if isinstance(a, _Job)]
                failed = next((a.error for a in needed if a.error is not None), None)
                if failed is not None:
                    worker.waiting.popleft().error = failed
                    continue
                if not all(a.done for a in needed):
                    break
                worker.busy = job = worker.waiting.popleft()
                parcels = [a.parcel if isinstance(a, _Job) else pack(a) for a in job.args]
                try:
                    worker.pipe.send_bytes(pack((job.method, parcels)))
                except OSError:
                    self._lost(worker)

    def pump(self) -> None:
        """Wait for an answer, or the end of a worker."""
        self._check_open()
        ready = wait([w.pipe for w in self.workers.values()])
        for worker in self.workers.values():
            if worker.pipe in ready:
                self._receive(worker)
        self._hand_out()

    def _check_open(self) -> None:
        if not self.workers:
            raise self.over or RuntimeError("expected a crew at work, got one that was ended")

    def _receive(self, worker: _Worker) -> None:
        try:
            good, answer, start, end = unpack(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            self._lost(worker)
        job, worker.busy = worker.busy, None
        assert job is not None
        job.span = Span(worker.name, job.tag, start, end)
        if good:
            job.parcel = answer
            return
        error, told = unpack(answer)
        error.add_note(f"in worker {worker.name} ({worker}):\n{told}")
        job.error = error

    def _lost(self, worker: _Worker) -> NoReturn:
        worker.process.join(PATIENCE)
        code = worker.process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        doing = worker.busy.method if worker.busy is not None else ""
        self.over = WorkerDied(worker.name, str(worker), doing, how)
        self.close()
        raise self.over

    def close(self) -> None:
        for worker in self.workers.values():
            if worker.busy is not None:
                worker.process.terminate()
            worker.pipe.close()  # whoever waits for work ends
        for worker in self.workers.values():
            worker.process.join(PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self.workers = {}


def _serve(pipe: Connection, blueprint: bytes) -> None:
    """The life of a worker: made, then asked until the other end of the pipe is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks decides when to stop
    start = time.time()
    try:
        worker, answer = unpack(blueprint).build(), (True, b"")
    except Exception as error:
        worker, answer = None, (False, _failure(error))
    pipe.send_bytes(pack((*answer, start, time.time())))
    while worker is not None:
        try:
            method, parcels = unpack(pipe.recv_bytes())
        except (EOFError, OSError):
            break
        start = time.time()
        try:
            answer = (True, pack(getattr(worker, method)(*map(unpack, parcels))))
        except Exception as error:
            answer = (False, _failure(error))
        try:
            pipe.send_bytes(pack((*answer, start, time.time())))
        except OSError:
            break
    pipe.close()
    os._exit(0)  # nothing here is worth the time that an orderly end of an interpreter takes


def _failure(error: Exception) -> bytes:
    told = traceback.format_exc()
    try:
        parcel = pack((error, told))
        unpack(parcel)
    except Exception:  # one that does not survive the way
        parcel = pack((RuntimeError(f"{type(error).__name__}: {error}"), told))
    return parcel
