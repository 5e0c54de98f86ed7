"""Who calls: API keys with names, and how often each may."""
import hashlib
import hmac
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "DIPTYCH_API_KEYS"
SHORTEST = 16  # characters of a key
MOST_BUCKETS = 10_000


def read_keys(path: Path | None, environment: Mapping[str, str] = os.environ) -> "Keys | None":
    """Keys of a file, one `name:key` a line, and of the variable DIPTYCH_API_KEYS (`name:key,name:key`); None if
    neither is given. A key without a name is called by its place."""
    lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    lines += environment.get(VARIABLE, "").split(",")
    entries = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if path is None and not entries:
        return None
    named: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        name, colon, key = entry.rpartition(":")
        name = name.strip() if colon else f"key-{number}"
        if len(key.strip()) < SHORTEST:
            raise ValueError(f"expected keys of at least {SHORTEST} characters, got a shorter one as {name!r}; "
                             "fix: python -c 'import secrets; print(secrets.token_urlsafe(32))'")
        if name in named:
            raise ValueError(f"expected every key to have a name of its own, got {name!r} twice")
        named[name] = key.strip()
    if not named:
        raise ValueError(f"expected keys in {path}, one name:key a line, got none")
    return Keys(named)


class Keys:
    """Keeps digests only. Every known key is compared with, so that the time tells nothing."""

    def __init__(self, named: Mapping[str, str]) -> None:
        self.digests = {name: _digest(key) for name, key in named.items()}

    def name_of(self, key: str) -> str | None:
        """Whose key this is."""
        own, found = _digest(key), None
        for name, digest in self.digests.items():
            if hmac.compare_digest(own, digest):
                found = name
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


@dataclass
class Bucket:
    tokens: float
    at: float


class Rate:
    """Token buckets: `per_minute` requests may come at once, and as many in every minute after."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.size, self.clock = per_minute, clock
        self.buckets: dict[str, Bucket] = {}

    def take(self, who: str) -> tuple[float, int]:
        """(seconds until the next request is welcome, 0 if this one is; how many are left)."""
        now = self.clock()
        if who not in self.buckets and len(self.buckets) >= MOST_BUCKETS:
            self._forget(now)
        bucket = self.buckets.setdefault(who, Bucket(self.size, now))
        bucket.tokens = min(self.size, bucket.tokens + (now - bucket.at) * self.size / 60)
        bucket.at = now
        if bucket.tokens < 1:
            return (1 - bucket.tokens) * 60 / self.size, 0
        bucket.tokens -= 1
        return 0.0, int(bucket.tokens)

    def _forget(self, now: float) -> None:
        """Those that are full again know nothing; if that frees none, the ones that were asked for longest ago."""
        full = [k for k, b in self.buckets.items() if b.tokens + (now - b.at) * self.size / 60 >= self.size]
        oldest = sorted(self.buckets, key=lambda k: self.buckets[k].at)[: MOST_BUCKETS // 10]
        for key in full or oldest:
            del self.buckets[key]
