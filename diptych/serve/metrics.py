"""What Prometheus reads at /metrics. One registry per server: several may live in one process."""
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class Metrics:
    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("diptych_requests", "Requests by path and status", ("path", "status"), registry=own)
        self.errors = Counter("diptych_errors", "Errors by code", ("code",), registry=own)
        self.seconds = Histogram("diptych_request_seconds", "From the first byte of a request to the last of its "
                                 "answer", ("path",), buckets=SECONDS, registry=own)
        self.wait = Histogram("diptych_wait_seconds", "In the queue, by kind of answer", ("model", "kind"),
                              buckets=SECONDS, registry=own)
        self.work = Histogram("diptych_work_seconds", "In a slot, by kind of answer", ("model", "kind"),
                              buckets=SECONDS, registry=own)
        self.tokens = Counter("diptych_tokens", "Tokens by direction", ("model", "direction"), registry=own)
        self.pictures = Counter("diptych_pictures", "Pictures by direction", ("model", "direction"), registry=own)
        self.cancelled = Counter("diptych_cancelled", "Answers given up because the client left", ("model",),
                                 registry=own)
        self.waiting = Gauge("diptych_queue_depth", "Answers that wait for a slot", ("model",), registry=own)
        self.running = Gauge("diptych_running", "Answers that have a slot", ("model",), registry=own)
        self.replicas = Gauge("diptych_replicas", "Processes of a model that live, where it has its own", ("model",),
                              registry=own)
        self.lost = Counter("diptych_replica_lost", "Answers whose process died, by whether another makes them",
                            ("model", "then"), registry=own)
        self.bodies = Gauge("diptych_body_bytes", "Bytes of bodies that are held", registry=own)

    def watch(self, model: str, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        """Have a model's queue read whenever metrics are."""
        self.waiting.labels(model).set_function(waiting)
        self.running.labels(model).set_function(running)

    def text(self) -> bytes:
        return generate_latest(self.registry)
