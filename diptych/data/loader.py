"""Batches from worker processes, in order, resumable at any batch.

Batch k of a rank is a pure function of (mixture, k), so worker n of w simply makes the batches with k % w == n and the
parent takes them in turn. Nothing is shared: batches come back pickled through one pipe per worker.

    for step, batch in Loader(mixture, 64, system.collate, start=1000): ...
"""
import io
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from diptych.data.mix import Mixture
from diptych.document import Document

log = logging.getLogger(__name__)

Collate = Callable[[Sequence[Document]], Any]


class DataError(RuntimeError):
    """A batch could not be made; says which batch and which document."""


class Loader:
    """Iterates over (step, batch) from `start` on, without end unless `stop` is given.

    batch_size: documents per rank and step. workers: processes; 0 makes batches in this process. prefetch: batches each
    worker has ready. Rank r of `world_size` gets the positions of the mixture congruent to r. Broken files are named in
    the log once and collected in `mixture.problems`.
    """

    def __init__(self, mixture: Mixture, batch_size: int, collate: Collate, start: int = 0, workers: int = 1,
                 rank: int = 0, world_size: int = 1, *, stop: int | None = None, prefetch: int = 3,
                 method: str | None = None) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("start", start, 0), ("workers", workers, 0),
                                   ("world_size", world_size, 1), ("prefetch", prefetch, 1)):
            if value < least:
                raise ValueError(f"expected {name} of at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"expected a rank below world_size {world_size}, got {rank}")
        self.mixture, self.batch_size, self.collate = mixture, batch_size, collate
        self.start, self.stop, self.workers, self.prefetch = start, stop, workers, prefetch
        self.rank, self.world_size = rank, world_size
        # Fork needs no pickling of collate (whose owner may hold a whole model); elsewhere only spawn is safe.
        self._method = method or ("fork" if sys.platform == "linux" else "spawn")

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        steps, seen = self._steps(self.start, 1), set(self.mixture.problems.items)
        if seen:
            log.warning("%s: %s", ", ".join(s.name for s in self.mixture.sources), self.mixture.problems.summary())
        if self.workers == 0:
            for step in steps:
                batch = self.batch(step)
                _warn(self.fresh_problems(seen))
                yield step, batch
            return
        pool: list[_Worker] = []
        try:
            for i in range(self.workers):
                pool.append(_Worker(self, i, pool))
            for step in steps:
                batch, problems = pool[(step - self.start) % self.workers].take(step)
                self.mixture.note(problems)
                _warn(self.fresh_problems(seen))
                yield step, batch
        finally:
            _close(pool)

    def batch(self, step: int) -> Any:
        """Batch `step` of this rank, made here and now."""
        documents: list[Document] = []
        try:
            for i in range(self.batch_size):
                documents.append(self.mixture.document(self._position(step, i)))
            return self.collate(documents)
        except Exception as error:
            raise DataError(f"batch {step}: {self._blame(step, documents, error)}") from error

    def _position(self, step: int, i: int) -> int:
        return (step * self.batch_size + i) * self.world_size + self.rank

    def _steps(self, start: int, stride: int) -> Iterator[int]:
        step = start
        while self.stop is None or step < self.stop:
            yield step
            step += stride

    def _blame(self, step: int, documents: list[Document], error: Exception) -> str:
        """Name the document: the one that could not be made, or the first that fails to collate alone."""
        guilty = len(documents)
        if guilty == self.batch_size:
            guilty = next((i for i, d in enumerate(documents) if self._fails(d)), -1)
        if guilty < 0:
            return f"{type(error).__name__}: {error} (in collate; each document alone is fine)"
        position = self._position(step, guilty)
        source, index = self.mixture.locate(position)
        return f"{type(error).__name__}: {error} (document {index} of {source.name}, position {position})"

    def _fails(self, document: Document) -> bool:
        try:
            self.collate([document])
        except Exception:
            return True
        return False

    def fresh_problems(self, seen: set[str]) -> dict[str, str]:
        """Problems of the mixture that are not in `seen`, which learns them."""
        fresh = {name: reason for name, reason in self.mixture.problems if name not in seen}
        seen.update(fresh)
        return fresh


def _warn(problems: dict[str, str]) -> None:
    for name, reason in problems.items():
        log.warning("skipped %s: %s", name, reason)


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, loader: Loader, index: int, earlier: list["_Worker"]) -> None:
        context: Any = multiprocessing.get_context(loader._method)
        self.index = index
        self.pipe, theirs = context.Pipe(duplex=False)
        # A forked child inherits the reading ends of its siblings, which would keep their pipes open.
        inherited = [w.pipe for w in earlier] + [self.pipe] if loader._method == "fork" else []
        self.process = context.Process(target=_work, args=(loader, index, theirs, inherited, os.getpid()), daemon=True,
                                       name=f"diptych-data-{index}")
        with warnings.catch_warnings():
            # Python warns about forking beside threads; the child only touches numpy and one-threaded torch.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            self.process.start()
        theirs.close()  # so that a dead worker reads as end of file

    def take(self, step: int) -> tuple[Any, dict[str, str]]:
        try:
            made, payload, problems = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            raise DataError(f"batch {step}: data worker {self.index} died (exit code {self.process.exitcode}); "
                            "fix: if the machine ran out of memory, use fewer workers or smaller batches") from None
        if isinstance(payload, _Failure):
            raise DataError(f"{payload.message}\n\nIn the data worker:\n{payload.traceback}")
        assert made == step, f"worker {self.index} made batch {made}, expected {step}"
        return payload, problems


def _close(pool: list[_Worker]) -> None:
    for worker in pool:
        worker.process.terminate()
    for worker in pool:
        worker.process.join(2)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.pipe.close()


# -- in the worker ----------------------------------------------------------------------------------------------------

class _Failure:
    def __init__(self, message: str, trace: str) -> None:
        self.message, self.traceback = message, trace


def _work(loader: Loader, index: int, pipe: Connection, inherited: list[Connection], parent: int) -> None:
    # The parent decides about Ctrl-C; its own SIGTERM handler (say, save a checkpoint) must not run here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for connection in inherited:
        connection.close()
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool does not survive a fork
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(5)
    ready: queue.Queue[bytes | None] = queue.Queue(loader.prefetch)
    sender = threading.Thread(target=_send, args=(pipe, ready), daemon=True)
    sender.start()
    seen = set(loader.mixture.problems.items)
    for step in loader._steps(loader.start + index, loader.workers):
        try:
            payload = loader.batch(step)
            data = _dumps((step, payload, loader.fresh_problems(seen)))
        except Exception as error:
            ready.put(pickle.dumps((step, _Failure(str(error), traceback.format_exc()), {})))
            break
        ready.put(data)
    ready.put(None)
    sender.join()


def _send(pipe: Connection, ready: "queue.Queue[bytes | None]") -> None:
    try:
        while (data := ready.get()) is not None:
            pipe.send_bytes(data)
        pipe.close()
    except OSError:
        os._exit(0)  # the parent has gone


def _die_with(parent: int) -> None:
    """No orphan: also when the parent was killed so hard that nothing could be cleaned up."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Pickler(pickle.Pickler):
    """Tensors as plain arrays: torch's own way goes through shared memory files that outlive crashed runs."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor and obj.device.type == "cpu" and obj.layout == torch.strided:
            flat = obj.detach().contiguous()
            return _rebuild, (flat.view(-1).view(torch.uint8).numpy() if flat.numel() else None, obj.dtype, obj.shape)
        return NotImplemented


def _rebuild(data: Any, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    if data is None:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).view(shape)


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()
