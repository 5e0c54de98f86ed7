"""A judge behind an OpenAI-compatible endpoint (vLLM, SGLang, or a service): `POST {url}/chat/completions`.

Requests run `parallel` at a time. What may pass (no connection, timeouts, 408, 429, 5xx) is tried again, each time
after twice the wait, or after what `Retry-After` says; a reply that cannot be had in the end is a `Failure`, and an
error if none at all could be had. What will not pass (a wrong key or model) is an error at once.
"""
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.alignment.rewards.asking import Reply
from diptych.alignment.rewards.base import Failure
from diptych.document import Document

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses that may pass
LONGEST_WAIT = 60.0  # seconds
Answer = tuple[int, dict[str, str], bytes]  # status, headers, body
Post = Callable[[str, dict[str, str], bytes, float], Answer]


class EndpointError(RuntimeError):
    """The endpoint does not answer, or refuses what it is asked."""


@dataclass(kw_only=True)
class Endpoint:
    """`url` up to and including `/v1`; `key` is sent as a bearer token and stored nowhere. `timeout` and `wait` in
    seconds. `client`: "httpx" where it is installed, or "urllib"; None takes what is there."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    temperature: float = 0.0
    max_tokens: int = 512
    seed: int | None = 0
    timeout: float = 60.0
    retries: int = 4
    wait: float = 1.0
    parallel: int = 4
    client: Literal["httpx", "urllib"] | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"expected the http(s) address of an endpoint, got {self.url!r}")
        if self.retries < 0 or self.parallel < 1 or self.timeout <= 0:
            raise ValueError(f"expected retries >= 0, parallel >= 1 and timeout > 0, got {self.retries}, "
                             f"{self.parallel} and {self.timeout}")
        self._post = _client(self.client)

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url.rstrip('/')} t={self.temperature:g} n={self.max_tokens}"

    @property
    def fixed(self) -> bool:
        return self.temperature == 0

    def __call__(self, documents: Sequence[Document]) -> list[Reply]:
        with ThreadPoolExecutor(self.parallel) as pool:
            replies = list(pool.map(self.ask, documents))
        failed = [r for r in replies if isinstance(r, Failure)]
        if replies and len(failed) == len(replies):
            raise EndpointError(f"expected replies of {self.name}, got none: {failed[0].reason}; "
                                "fix: check that it runs and is reachable")
        return replies

    def ask(self, document: Document) -> Reply:
        """One reply, or why there is none."""
        body = {"model": self.model, "messages": document.to_messages(), "temperature": self.temperature,
                "max_tokens": self.max_tokens}
        if self.seed is not None:
            body["seed"] = self.seed
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        reason, wait = "", self.wait
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(wait, LONGEST_WAIT))
                wait *= 2
            try:
                status, told, answer = self._post(f"{self.url.rstrip('/')}/chat/completions", headers, data,
                                                  self.timeout)
            except OSError as error:  # refused, unknown host, timeout
                reason = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return _said(answer)
            reason = f"status {status}: {answer[:200].decode(errors='replace')}"
            if status not in AGAIN:
                raise EndpointError(f"expected a reply of {self.name}, got {reason}; "
                                    "fix: check the address, the model's name and the key")
            wait = max(wait, _seconds(told.get("retry-after", "")))
        return Failure(f"no reply after {self.retries + 1} tries ({reason})")


def _said(answer: bytes) -> Reply:
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return Failure(f"no chat completion in the answer: {answer[:200].decode(errors='replace')}")
    if isinstance(content, list):  # parts
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else Failure("an empty reply")


def _seconds(text: str) -> float:
    return float(text) if text.replace(".", "", 1).isdigit() else 0.0


def _client(name: str | None) -> Post:
    if name not in (None, "httpx", "urllib"):
        raise ValueError(f"expected client httpx or urllib, got {name!r}")
    if name == "urllib":
        return _by_urllib
    try:
        import httpx
    except ImportError:
        if name == "httpx":
            raise ImportError("expected httpx for this client, got none installed; "
                              "fix: pip install httpx, or client=\"urllib\"") from None
        return _by_urllib

    own = httpx.Client()  # connections are kept, and certificates read once

    def post(url: str, headers: dict[str, str], data: bytes, timeout: float) -> Answer:
        try:
            found = own.post(url, headers=headers, content=data, timeout=timeout)
        except httpx.TransportError as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
        return found.status_code, {k.lower(): v for k, v in found.headers.items()}, found.content

    return post


def _by_urllib(url: str, headers: dict[str, str], data: bytes, timeout: float) -> Answer:
    request: Any = urllib.request.Request(url, data, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as found:
            return found.status, {k.lower(): v for k, v in found.headers.items()}, found.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()
