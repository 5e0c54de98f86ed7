"""The models of a server by name: each with its engine, its identity and how long its answers take."""
import asyncio
import dataclasses
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diptych import config
from diptych.document import Document, Text
from diptych.engine import Engine, QueueFull, Request
from diptych.parts.tokens import Modality
from diptych.serve import errors
from diptych.serve.errors import ApiError
from diptych.serve.metrics import Metrics
from diptych.serve.settings import Settings
from diptych.systems.base import Event, Sampling, System
from diptych.systems.io import fingerprint
from diptych.systems.packed import Packed
from diptych.systems.table import TABLE

if TYPE_CHECKING:
    from diptych.serve.replicas import Fleet, Pool

REMEMBERED = 64  # answers whose time the next estimate rests on
LONGEST_WAIT = 600  # seconds that Retry-After may say
ROOM_TO_DRAW = 4  # a picture may have so many times the pixels that the model draws by itself


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One document to fill."""

    document: Document
    sampling: Sampling
    seed: int


class Answers:
    """The documents of one request under way, seen from the event loop. `tokens`: of each, how many there are so far by
    piece."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self.asks = asks
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()
        self.requests: list[Request] = []
        self.tokens: list[dict[int, int]] = [{} for _ in asks]

    def listener(self, index: int) -> Callable[[Event | None], None]:
        """What the engine's thread tells the events of document `index`."""
        def listen(event: Event | None) -> None:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, event))

        return listen

    async def events(self, quiet: float | None = None) -> AsyncIterator[tuple[int, Event | None] | None]:
        """(document, event), with None for the event when that document has ended; None alone if nothing has come for
        `quiet` seconds. Ends when all have ended."""
        left = len(self.asks)
        while left:
            try:
                index, event = await asyncio.wait_for(self.queue.get(), quiet)
            except TimeoutError:
                yield None
                continue
            if event is None:
                left -= 1
            elif event.tokens:
                self.tokens[index][event.piece] = event.tokens
            yield index, event

    async def documents(self) -> list[Document]:
        """All of them, filled; the first error as `document` raises it, as soon as there is one."""
        made: dict[int, Document] = {}
        async for told in self.events():
            if told is not None and told[1] is None:
                made[told[0]] = self.document(told[0])
        return [made[i] for i in range(len(self.asks))]

    def document(self, index: int) -> Document:
        """One that has ended; ApiError for what the caller may know of a failure, the error itself otherwise."""
        try:
            return self.requests[index].result(0)
        except CancelledError:
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "5"}) from None
        except Exception as error:
            if known := errors.public(error):
                raise known from None
            raise

    def cancel(self) -> None:
        """Give up what has not ended: the slots are free at the next tick."""
        for request in self.requests:
            if not request.future.done():
                request.cancel()

    def produced(self, index: int) -> int:
        return sum(self.tokens[index].values())


@dataclass(frozen=True)
class PromptTokens:
    text: int
    image: int

    @property
    def total(self) -> int:
        return self.text + self.image


class Served:
    """A model with its engine, here or in the processes of a fleet. `submit` is called by the event loop only."""

    def __init__(self, name: str, system: System, settings: Settings, metrics: Metrics, fleet: "Fleet | None" = None
                 ) -> None:
        if not isinstance(system, Packed):
            raise ValueError(f"expected a model that fills documents, got {type(system).__name__} as {name!r}; "
                             "fix: `diptych ls systems` lists them")
        self.name, self.system, self.settings, self.metrics = name, system, settings, metrics
        self.created = int(time.time())
        self.hash = fingerprint(system)
        self.engine: Engine | Pool = fleet.pool(name, system, metrics) if fleet else Engine(
            system, slots=settings.slots, queue=settings.queue, reserve=settings.reserve, share=settings.share)
        self.seconds: deque[float] = deque(maxlen=REMEMBERED)
        metrics.watch(name, lambda: len(self.engine.waiting), lambda: len(self.engine.running))

    @property
    def picture(self) -> tuple[int, int] | None:
        """(height, width) that the model draws by itself; None if it does not draw."""
        size = self.system.default_sampling().size or getattr(self.system.config, "picture", None)
        return (size[0], size[1]) if self.system.draws and size else None

    def card(self) -> dict[str, Any]:
        size, sampling = self.picture, self.system.default_sampling()
        row = next((row for row in TABLE.values() if row.home == home(self.system)), None)
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "diptych",
                "hash": self.hash, "system": type(self.system).__name__, "parameters": self.system.num_parameters(),
                "draws": self.system.draws, "size": f"{size[1]}x{size[0]}" if size else None,
                "title": row.title if row else None, "family": list(row.family) if row else [],
                "steps": sampling.evaluations, "guidance": words_scale(sampling), "plan": sampling.plan,
                "negative_prompt": self.system.negatives}

    def size(self, text: str | None) -> tuple[int, int] | None:
        """`WIDTHxHEIGHT` -> (height, width), within what may be drawn."""
        if text is None or text == "auto":
            return None
        width, height = map(int, text.split("x"))
        own = self.picture
        most = min(self.settings.max_pixels, ROOM_TO_DRAW * own[0] * own[1] if own else self.settings.max_pixels)
        if width * height > most:
            raise ApiError(400, f"expected a size of at most {most} pixels, got {width} x {height}", param="size")
        stride = getattr(self.system, "stride", 1)
        if width % stride or height % stride:
            raise ApiError(400, f"expected a size in multiples of {stride}, got {width} x {height}", param="size")
        return height, width

    def count(self, document: Document) -> PromptTokens:
        """Tokens before the first target, as the network reads them; raises what is wrong with the document."""
        first = next(i for i, p in enumerate(document) if p.target)
        writer = self.system.write(document.prompt(), clean=first)[0]
        kinds = writer.strip.arrays()["modality"] if writer.strip.length else []
        text = sum(int(k) == Modality.TEXT for k in kinds)
        return PromptTokens(text, len(kinds) - text)

    def check_length(self, document: Document) -> PromptTokens:
        """The same, within the limits. Texts are looked at before they are tokenised."""
        room = self.settings.context
        longest = sum(len(p.text or "") for p in document if isinstance(p, Text))
        tokens = PromptTokens(longest, 0) if longest > 32 * room else self.count(document)
        if tokens.total > room:
            told = "characters" if longest > 32 * room else "tokens"
            raise ApiError(400, f"expected a prompt of at most {room} tokens, got {tokens.total} {told}; fix: shorten "
                           "it, or start the server with a larger --context", code="context_length_exceeded")
        return tokens

    def submit(self, asks: Sequence[Ask]) -> Answers:
        """All of them or, with 429 and when to come again, none."""
        most = self.engine.slots + self.settings.queue
        if len(asks) > most:
            raise ApiError(400, f"expected at most {most} answers, got {len(asks)}", param="n")
        room = self.engine.room or 0
        if len(asks) > room:
            wait = self.estimate(len(asks) - room)
            raise ApiError(429, f"the queue is full; try again in {wait} seconds", code="queue_full",
                           headers={"Retry-After": str(wait)})
        answers = Answers(asks)
        try:
            for i, ask in enumerate(asks):
                request = self.engine.submit(ask.document, ask.sampling, seed=ask.seed, listen=answers.listener(i))
                answers.requests.append(request)
                request.future.add_done_callback(_after(self.note, request))
        except (QueueFull, RuntimeError):
            answers.cancel()
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "5"}) from None
        return answers

    def estimate(self, places: int) -> int:
        """Whole seconds until so many places will be free: as many answers have to leave, `slots` at a time."""
        times = list(self.seconds) or [1.0]
        wait = places * sum(times) / len(times) / self.engine.slots
        return min(LONGEST_WAIT, max(1, math.ceil(wait)))

    def note(self, request: Request) -> None:
        """What an ended request took."""
        kind = "picture" if request.draws else "text"
        if request.cancelled:
            self.metrics.cancelled.labels(self.name).inc()
        if request.started is None or request.finished is None:
            return
        self.metrics.wait.labels(self.name, kind).observe(request.started - request.submitted)
        if request.future.exception() is None:
            took = request.finished - request.started
            self.seconds.append(took)
            self.metrics.work.labels(self.name, kind).observe(took)


def _after(note: Callable[[Request], None], request: Request) -> Callable[[Any], None]:
    return lambda future: note(request)


class Models:
    """By name; the first is what a request without a name gets."""

    def __init__(self, systems: Mapping[str, System], settings: Settings, metrics: Metrics) -> None:
        if not systems:
            raise ValueError("expected at least one model to serve, got none")
        self.fleet = _fleet(settings) if settings.replicated else None
        self.named = {name: Served(name, system.eval(), settings, metrics, self.fleet)
                      for name, system in systems.items()}

    def find(self, name: str | None) -> Served:
        if name is None:
            return next(iter(self.named.values()))
        if name not in self.named:
            told = config.unknown_key(name[:80], self.named, "model")
            raise ApiError(404, str(told), code="model_not_found", param="model")
        return self.named[name]

    def start(self) -> None:
        """The engines run, or answer from their processes, when it returns."""
        if self.fleet is not None:
            self.fleet.start()
        for served in self.named.values():
            if isinstance(served.engine, Engine):
                served.engine.start()

    def close(self, *, cancel: bool = False) -> None:
        for served in self.named.values():
            served.engine.close(cancel=cancel)
        if self.fleet is not None:
            self.fleet.close()


def _fleet(settings: Settings) -> "Fleet":
    from diptych.serve.replicas import Fleet  # needs ray

    return Fleet(settings)


def home(system: System) -> str:
    """As the table of systems names it."""
    return f"{type(system).__module__}:{type(system).__name__}"


def words_scale(sampling: Sampling) -> float:
    """How strongly the words guide."""
    return next((b.scale for b in sampling.guidance.branches if b.context == "no_text"), 1.0)


def sampling_dict(sampling: Sampling) -> dict[str, Any]:
    """What `config.from_dict(Sampling, ...)` reads again."""
    return config.to_dict(dataclasses.replace(sampling, partial=0))
