"""Replicas: each model in several processes behind one front. Needs the extra `ray`.

Ray Serve keeps the processes: it starts them, asks after their health, replaces those that die, and gives each answer
to the process that has the fewest. Its HTTP proxy is switched off. Behind it every replica would be a server with keys,
rates, a queue and metrics of its own: a rate of 60 would be 60 times as many as there are replicas, /metrics would tell
of whichever replica it met, and a picture would wait in one while another is idle. So requests come in through the same
front as without replicas (`app`, `gate`, `chat`, `drawing`), and only filled documents cross to another process:

    HTTP -> front: keys, limits, policy, one line per model -> Ray Serve -> replica: Engine -> events, document -> front

`Pool` stands where an `Engine` would and admits by the same rules (`engine.admit`) over the slots of all replicas that
live, so "first come, first served", 429 and the slots kept for answers hold for all of them together.

An answer whose replica dies is made again by another, once. The same seed says the same, so what a stream has told
already is passed over; should it differ, the stream ends in an error rather than in two halves.
"""
import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import math
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

import diptych
from diptych.document import Document
from diptych.engine import Listen, QueueFull, Request, admit
from diptych.serve import logs
from diptych.serve.errors import ApiError
from diptych.serve.metrics import Metrics
from diptych.serve.replica import Failure, Replica
from diptych.serve.settings import Settings
from diptych.systems.base import Event, Sampling, System

ATTEMPTS = 2  # a request that kills every process it meets must not meet them all
WATCH = 1.0  # seconds between two looks at which replicas live
REVIVAL = 60.0  # seconds without any replica after which those who wait are told
STARTING = 600.0  # seconds that replicas may take to start


def require(address: str | None) -> None:
    """Imports Ray with what it reads when it is imported; ModuleNotFoundError without the extra.

    A Ray of our own (no address) answers only who knows its token, for whoever reaches an open one can run what they
    like there; and but for a port of each replica it listens on this machine only. It reports nothing to anybody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # it has files of its own
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # SIGTERM is no failure, and ours to handle
    if address is None and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # what it calls a Ray for one machine
    import ray.serve  # noqa: F401


class Lost(Exception):
    """The process that worked on an answer is gone."""


class Replay:
    """Tells a listener the events of several attempts at one answer as if there had been one."""

    def __init__(self, listen: Listen) -> None:
        self.listen, self.place = listen, 0
        self.told: list[tuple[str, int, str | None]] = []

    def restart(self) -> None:
        self.place = 0

    def tell(self, event: Event) -> None:
        said = event.kind, event.piece, event.value if isinstance(event.value, str) else None
        if self.place < len(self.told):
            if self.told[self.place] != said:
                raise _gone("the process that made this answer died, and another says it differently")
        else:
            self.told.append(said)
            self.listen(event)
        self.place += 1


class Pool:
    """The line of one model: `submit` as of an Engine, from any thread; all else happens in the fleet's loop."""

    def __init__(self, fleet: "Fleet", name: str, system: System, settings: Settings, metrics: Metrics,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.fleet, self.name, self.system, self.settings = fleet, name, system, settings
        self.metrics, self.clock = metrics, clock
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.tasks: dict[Request, asyncio.Task[None]] = {}
        self.numbers = itertools.count()
        self.lock = threading.Lock()
        self.closing = False
        self.alive, self.seen = settings.replicas, clock()
        self.handle: Any = None  # of Ray Serve
        metrics.replicas.labels(name).set_function(lambda: self.alive)

    @property
    def slots(self) -> int:
        """Of all replicas that live; while none does, those of the one that is awaited."""
        return self.settings.slots * max(1, self.alive)

    @property
    def room(self) -> int:
        return max(0, self.settings.queue + self.slots - len(self.running) - len(self.waiting))

    def submit(self, document: Document, sampling: Sampling | None = None, *, seed: int = 0,
               listen: Listen | None = None) -> Request:
        """Queue a document whose targets are to be filled."""
        request = Request(next(self.numbers), document.prompt(), sampling or self.system.default_sampling(), seed,
                          listen, self.clock())
        request.left = lambda: self._later(self._leave, request)
        with self.lock:
            if self.closing:
                raise RuntimeError("expected open replicas, got some that are closing")
            if self.room == 0:
                raise QueueFull(f"expected at most {self.settings.queue} requests to wait, got one more")
            self.waiting.append(request)
        self._later(self._admit)
        return request

    def between(self, function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """As an engine's, on the weights of this process, which answer nothing themselves."""
        return self.fleet.aside.submit(function)

    def close(self, *, cancel: bool = False) -> None:
        """Finish (or cancel) what is under way. Nothing can be submitted afterwards."""
        with self.lock:
            self.closing = True
            left = [*self.waiting, *self.running]
        for request in left:
            if cancel:
                request.cancel()
        concurrent.futures.wait([r.future for r in left])

    # -- in the loop of the fleet -------------------------------------------------------------------------------------

    def _later(self, call: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is under way any more
            self.fleet.loop.call_soon_threadsafe(call, *args)

    def _admit(self) -> None:
        with self.lock:
            admitted = admit(self.waiting, self.running, slots=self.slots,
                             reserve=self.settings.reserve * max(1, self.alive), now=self.clock())
        for request in admitted:
            self.tasks[request] = asyncio.ensure_future(self._fill(request))

    def _leave(self, request: Request) -> None:
        """Its client has gone."""
        with self.lock:
            waits = request in self.waiting
            if waits:
                self.waiting.remove(request)
        if waits:
            request.finish(None)
        elif request in self.tasks:
            self.tasks[request].cancel()

    async def _fill(self, request: Request) -> None:
        document, error = None, None
        try:
            document = await self._ask(request)
        except asyncio.CancelledError:
            pass  # `finish` without either says so
        except Exception as failed:
            error = failed
        del self.tasks[request]
        with self.lock:
            self.running.remove(request)
        request.finished = self.clock()
        request.finish(document, error)
        self._admit()

    async def _ask(self, request: Request) -> Document:
        told = Replay(request.listen)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._attempt(request, told)
            except Lost as lost:
                again = attempt < ATTEMPTS
                self.metrics.lost.labels(self.name, "again" if again else "failed").inc()
                logs.write("replica lost", level=logging.WARNING, model=self.name, attempt=attempt,
                           reason=str(lost)[:200])
        raise _gone("the process that made this answer died, and the one after it as well")

    async def _attempt(self, request: Request, told: Replay) -> Document:
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        told.restart()
        document: Document | None = None
        stream = self.handle.fill.remote(request.document, request.sampling, request.seed)
        try:
            async for said in stream:
                for one in said:
                    if isinstance(one, Event):
                        told.tell(one)
                    elif isinstance(one, Failure):
                        raise one.error()
                    else:
                        document = one
        except RayTaskError:  # of the code there: as any other error
            raise
        except (RayError, RayServeException) as error:
            raise Lost(str(error).partition("\n")[0]) from error
        finally:
            if document is None:
                stream.cancel()
        if document is None:
            raise Lost("it ended without an answer")
        return document

    def look(self, alive: int) -> None:
        """What the fleet sees of this model's replicas."""
        now = self.clock()
        if alive != self.alive:
            logs.write("replicas", level=logging.INFO if alive > self.alive else logging.WARNING, model=self.name,
                       alive=alive, wanted=self.settings.replicas)
            self.alive = alive
            self._admit()
        if alive:
            self.seen = now
        elif now - self.seen > REVIVAL:
            self._give_up()

    def _give_up(self) -> None:
        """Nobody waits for ever on processes that do not come back."""
        with self.lock:
            left = [*self.waiting, *self.running]
            self.waiting.clear()
        for request in left:
            request.finish(None, _gone("no process of this model is left"))
            if request in self.tasks:
                self.tasks[request].cancel()


def _gone(told: str) -> ApiError:
    return ApiError(503, f"{told}; try again", code="replica_lost", headers={"Retry-After": "5"})


class Fleet:
    """Ray, started for this server or joined, and the replicas of all models in it."""

    def __init__(self, settings: Settings) -> None:
        require(settings.ray_address)
        self.settings = settings
        self.pools: list[Pool] = []
        self.apps: list[str] = []
        self.own = False
        self.aside = concurrent.futures.ThreadPoolExecutor(1, "diptych-aside")
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="diptych-replicas", daemon=True)

    def pool(self, name: str, system: System, metrics: Metrics) -> Pool:
        """The line of a model; its weights stay on the CPU of this process."""
        self.pools.append(Pool(self, name, system, self.settings, metrics))
        return self.pools[-1]

    def start(self) -> None:
        """Returns when all replicas answer."""
        import ray
        from ray import serve

        settings, number = self.settings, self.settings.replicas * len(self.pools)
        joins = settings.ray_address is not None or ray.is_initialized()
        threads = max(1, torch.get_num_threads() // (1 if joins else settings.replicas))
        if not ray.is_initialized():
            quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
            if joins:
                ray.init(address=settings.ray_address, **quiet)
            else:
                self.own = True
                ray.init(address="local", num_cpus=number * threads, object_store_memory=self._bytes() + 2**29,
                         include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        files = {"enable_access_log": False, "log_level": "WARNING"}
        serve.start(proxy_location="Disabled", logging_config=files)
        resources = {"num_cpus": threads, "num_gpus": self._gpus(number, joins)}
        deployment = serve.deployment(Replica).options(  # type: ignore[attr-defined]
            num_replicas=settings.replicas, ray_actor_options=resources, logging_config=files,
            # No more than that, so that two which come at once do not wait in one process while another is idle.
            max_ongoing_requests=settings.slots, health_check_timeout_s=60, graceful_shutdown_timeout_s=5)
        targets, stem = [], f"diptych-{secrets.token_hex(4)}"
        for pool in self.pools:
            bound = deployment.bind([ray.put(pool.system)], diptych.__version__, slots=settings.slots,
                                    share=settings.share, threads=threads, device=settings.device)
            self.apps.append(f"{stem}-{len(self.apps)}")
            targets.append(serve.RunTarget(target=bound, name=self.apps[-1], route_prefix=None))
        handles = serve.run_many(targets, wait_for_applications_running=False)
        for pool, handle in zip(self.pools, handles, strict=True):
            pool.handle = handle.options(stream=True)
        self._await()
        self.thread.start()

    def _bytes(self) -> int:
        """What all weights take."""
        return sum(t.numel() * t.element_size() for pool in self.pools for t in pool.system.state_dict().values())

    def _gpus(self, number: int, joins: bool) -> float:
        """GPUs of a replica; on one machine all replicas share those that are there."""
        if not self.settings.device.startswith("cuda"):
            return 0
        there = torch.cuda.device_count()
        return 1 if joins or there >= number else 1 / math.ceil(number / max(1, there))

    def _await(self) -> None:
        began = told = time.monotonic()
        while len(found := self._look()) < len(self.apps) or any(n < self.settings.replicas for n, _ in found):
            failed = next((message for _, message in found if message), None)
            now = time.monotonic()
            if failed or now - began > STARTING:
                raise OSError(f"expected {self.settings.replicas} replicas to start, got: {failed or 'none in time'}; "
                              "fix: fewer of them, or a cluster with the CPUs and GPUs that they ask for")
            if now - told > 30:
                logs.write("waiting for replicas", level=logging.WARNING, alive=[n for n, _ in found])
                told = now
            time.sleep(0.1)

    def _look(self) -> list[tuple[int, str]]:
        """Of each model: (replicas that live, why they will not if they do not)."""
        from ray import serve

        known = serve.status().applications
        found = []
        for name in self.apps:
            if name in known:
                live = sum(d.replica_states.get("RUNNING", 0) for d in known[name].deployments.values())
                found.append((live, known[name].message if known[name].status == "DEPLOY_FAILED" else ""))
        return found

    def _run(self) -> None:
        watching = self.loop.create_task(self._watch())
        self.loop.run_forever()
        watching.cancel()
        self.loop.run_until_complete(asyncio.gather(watching, return_exceptions=True))
        self.loop.run_until_complete(self.loop.shutdown_default_executor())  # Ray may not end while it is asked
        self.loop.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH)
            try:
                found = await asyncio.to_thread(self._look)
            except Exception as error:  # Ray does not answer: what it said last is the best there is
                logs.write("replicas unknown", level=logging.WARNING, reason=type(error).__name__)
                continue
            for pool, (alive, _) in zip(self.pools, found, strict=False):
                pool.look(alive)

    def close(self) -> None:
        """After the pools: a Ray of our own ends, another one gets its processes back."""
        import ray
        from ray import serve

        self.aside.shutdown(wait=True, cancel_futures=True)
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
        if self.apps and not self.own:
            for name in self.apps:
                serve.delete(name, _blocking=False)
        ray.shutdown()
