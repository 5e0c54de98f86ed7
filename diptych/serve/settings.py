"""What a server is told when it starts: limits, who may call, what is switched on."""
from dataclasses import dataclass

MEBI = 2**20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`slots` requests run at once per model and `queue` wait. `max_pixels`: of all pictures of one request together,
    before they are decoded. `context`: tokens of a prompt, and of an answer. `rate`: requests per minute and key, or
    per address where there are no keys. `hosts`: names that a request may ask for (None: any), the guard of a server
    without keys on this machine against pages that rebind their own name to it. Times are in seconds.

    `replicas` processes per model, on `device`, with `slots` each; `ray_address`: of a cluster where they run instead
    of on this machine (see `replicas`). One replica without an address is this process itself."""

    slots: int = 8
    queue: int = 64
    share: float = 0.5  # of the time, to short answers while pictures are drawn (see `engine.Engine`)
    max_body: int = 20 * MEBI
    max_bodies: int = 8  # as many bodies of the largest size may be held at once, in smaller ones or not
    max_pixels: int = 16_000_000
    max_images: int = 16
    context: int = 2048
    rate: int | None = None
    allow_urls: bool = False
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    body_seconds: float = 60.0  # to send a body
    send_seconds: float = 60.0  # to take a part of a stream
    fetch_seconds: float = 10.0  # to fetch a picture
    studio: bool = True  # serve the page for people
    grace: float = 30.0  # to finish what runs when the server is stopped
    replicas: int = 1
    ray_address: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        low = [name for name in ("slots", "max_body", "max_bodies", "max_pixels", "max_images", "context",
                                "replicas")
               if getattr(self, name) < 1]
        if low or self.queue < 0 or (self.rate is not None and self.rate < 1):
            raise ValueError(f"expected at least 1 of {', '.join(low) or 'rate'} (queue: 0), got {self}")

    @property
    def replicated(self) -> bool:
        """Whether models run in other processes than the front."""
        return self.replicas > 1 or self.ray_address is not None

    @property
    def reserve(self) -> int:
        """Slots that pictures leave to answers."""
        return 0 if self.slots == 1 else max(1, self.slots // 4)
