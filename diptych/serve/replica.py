"""What runs in the process of a replica: one model with an engine of its own (see `replicas`)."""
import asyncio
import contextlib
import traceback
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import diptych
from diptych.document import Document
from diptych.engine import Engine
from diptych.systems.base import Event, Sampling


@dataclass(frozen=True)
class Failure:
    """An error as it travels: what callers may be told is a ValueError here too (see `errors.public`)."""

    told: bool
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        text = "".join(traceback.format_exception(error))
        return cls(isinstance(error, ValueError), str(error) or type(error).__name__, text)

    def error(self) -> Exception:
        """To be raised in the front; its log then has where it came from."""
        made: Exception = ValueError(self.message) if self.told else RuntimeError(self.message)
        made.add_note(f"in a replica:\n{self.traceback}")
        return made


Said = Event | Document | Failure


class Replica:
    """Fills documents for the front. `held` has a reference to the model, which Ray keeps for replicas to come."""

    def __init__(self, held: Sequence[Any], version: str, *, slots: int, share: float, threads: int, device: str
                 ) -> None:
        import ray

        if diptych.__version__ != version:
            raise ValueError(f"expected diptych {version} as in the front, got {diptych.__version__} on this machine")
        torch.set_num_threads(threads)
        system = ray.get(held[0]).to(device).eval()
        # Nothing is reserved here: the front sends no more pictures than may run at once.
        self.engine = Engine(system, slots=slots, share=share).start()

    async def fill(self, document: Document, sampling: Sampling, seed: int) -> AsyncIterator[list[Said]]:
        """What happens, as it comes, and last the filled document or why there is none. Closed early, it gives its
        slot back."""
        loop = asyncio.get_running_loop()
        heard: asyncio.Queue[Event | None] = asyncio.Queue()

        def listen(event: Event | None) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, event)

        try:
            request = self.engine.submit(document, sampling, seed=seed, listen=listen)
        except Exception as error:
            yield [Failure.of(error)]
            return
        try:
            ended = False
            while not ended:
                events = [await heard.get()]
                with contextlib.suppress(asyncio.QueueEmpty):
                    while True:
                        events.append(heard.get_nowait())
                ended = events[-1] is None
                said: list[Said] = [_portable(e) for e in events if e is not None]
                if ended:
                    said.append(_outcome(request.future))
                yield said
        finally:
            if not request.future.done():
                request.cancel()

    def check_health(self) -> None:
        """Asked by Ray; an error has this process replaced."""
        if self.engine.thread is None or not self.engine.thread.is_alive():
            raise RuntimeError("expected the engine to run, got one whose thread has ended")


def _outcome(future: Any) -> Document | Failure:
    try:
        return future.result(0)
    except (Exception, CancelledError) as error:
        return Failure.of(error)


def _portable(event: Event) -> Event:
    """The front may have no accelerator."""
    return Event(event.kind, event.piece, event.value.detach().cpu(), event.tokens) if isinstance(
        event.value, Tensor) else event
