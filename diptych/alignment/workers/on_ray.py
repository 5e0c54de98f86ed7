"""A crew of Ray actors (the extra `diptych[ray]`): on this machine, where it is started and ended by the run, or on a
cluster that the run joins. Answers go from worker to worker through Ray's object store."""
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from diptych.alignment.workers.crew import Blueprint, Crew, Pending, Place, WorkerDied, called
from diptych.alignment.workers.timeline import Span
from diptych.alignment.workers.wire import pack, unpack


class _Actor:
    """What runs in an actor's process."""

    def __init__(self, blueprint: bytes) -> None:
        self.worker = unpack(blueprint).build()

    def ready(self) -> int:
        return os.getpid()

    def call(self, method: str, *parcels: bytes) -> tuple[bytes, tuple[float, float]]:
        start = time.time()
        found = pack(getattr(self.worker, method)(*map(unpack, parcels)))
        return found, (start, time.time())


class _Promise(Pending):
    def __init__(self, crew: "RayCrew", worker: str, where: str, tag: str, method: str, refs: Sequence[Any]) -> None:
        super().__init__(worker, tag)
        self.crew, self.where, self.method = crew, where, method
        self.parcel, self.times = refs
        self.value: Any = None

    def wait(self) -> None:
        if not self.span.end:
            [times] = self.crew.open(self, [self.times])
            self.span = Span(self.worker, self.tag, *times)

    def get(self) -> Any:
        self.wait()
        if self.value is None:
            self.value = unpack(self.crew.open(self, [self.parcel])[0])
        return self.value


class RayCrew(Crew):
    """`blueprints` of all workers by role; their places are numbered over the nodes of the cluster in order."""

    def __init__(self, blueprints: Mapping[str, Sequence[Blueprint]], address: str = "") -> None:
        super().__init__({role: len(own) for role, own in blueprints.items()})
        self.ray = join(address)
        self.actors, self.where = dict[str, Any](), dict[str, str]()
        try:
            for role, own in blueprints.items():
                for n, blueprint in enumerate(own):
                    self._start(called(role, n), blueprint, address)
            for name, actor in self.actors.items():
                lone = _Promise(self, name, self.where[name], "start", "its start", (None, None))
                self.open(lone, [actor.ready.remote()])
        except BaseException:
            self.close()
            raise

    def _start(self, name: str, blueprint: Blueprint, address: str) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node, place = locate(self.ray.nodes(), blueprint.place)
        # Ray would hide the devices that it has not dealt out itself
        variables = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        if not address:
            variables["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        options = {"num_cpus": 0, "max_restarts": 0, "runtime_env": {"env_vars": variables},
                   "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}
        parcel = pack(Blueprint(blueprint.make, blueprint.given, place))
        self.actors[name] = self.ray.remote(**options)(_Actor).remote(parcel)
        self.where[name] = f"node {node['NodeManagerAddress']}, {place}"

    def _submit(self, role: str, number: int, method: str, args: Sequence[Any], tag: str) -> Pending:
        name = called(role, number)
        given = [a.parcel if isinstance(a, _Promise) else pack(a) for a in args]
        refs = self.actors[name].call.options(num_returns=2).remote(method, *given)
        return _Promise(self, name, self.where[name], tag, method, refs)

    def open(self, promise: _Promise, refs: Sequence[Any]) -> Any:
        errors = self.ray.exceptions
        try:
            return self.ray.get(list(refs))
        except errors.RayTaskError as error:  # raised in the worker, or in one that it waited for
            cause = error.cause if isinstance(error.cause, BaseException) else error
            cause.add_note(f"in worker {promise.worker} ({promise.where})")
            raise cause from None
        except (errors.RayActorError, errors.ObjectLostError) as error:
            gone = self._gone(promise.worker)
            self.close()
            raise WorkerDied(gone, self.where[gone], promise.method, str(error).strip().splitlines()[0]) from None

    def _gone(self, asked: str) -> str:
        """Who is no longer there: not always the one that was asked, which may have waited for another."""
        for name, actor in self.actors.items():
            try:
                self.ray.get(actor.ready.remote(), timeout=5)
            except self.ray.exceptions.RayActorError:
                return name
            except self.ray.exceptions.GetTimeoutError:  # busy
                continue
        return asked

    def close(self) -> None:
        for actor in self.actors.values():
            self.ray.kill(actor)
        self.actors = {}
        if self.ray.is_initialized():
            self.ray.shutdown()  # also ends what was started here


def join(address: str = "") -> Any:
    """The module, connected: to the cluster at the address, or to one that is started on this machine for the run."""
    import ray

    if ray.is_initialized():
        return ray
    if address:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
        return ray
    # a cluster of one machine is nobody else's business: it listens there alone, and tells nobody that it runs
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning", _node_ip_address="127.0.0.1",
             object_store_memory=256 * 2**20)
    return ray


def accelerators(kind: str, address: str = "") -> int:
    """How many cores or devices the nodes of the cluster have together."""
    return sum(_count(node, kind) for node in join(address).nodes())


def locate(nodes: Sequence[Mapping[str, Any]], place: Place) -> tuple[Mapping[str, Any], Place]:
    """The node that has the accelerators of a place, and their numbers there."""
    first = 0
    for node in sorted((n for n in nodes if n["Alive"]), key=lambda n: (n["NodeManagerAddress"], n["NodeID"])):
        own = [a - first for a in place.accelerators]
        first += (size := _count(node, place.kind))
        if all(0 <= a < size for a in own):
            return node, Place(tuple(own), place.kind, place.threads)
    raise ValueError(f"expected the accelerators of a worker on one node, got {place}; fix: another placement")


def _count(node: Mapping[str, Any], kind: str) -> int:
    return int(node["Resources"].get("CPU" if kind == "cpu" else "GPU", 0)) if node["Alive"] else 0
