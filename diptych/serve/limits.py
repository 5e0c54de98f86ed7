"""Bodies: how large, how slow and how deep they may be. Nothing is parsed before it is counted."""
import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from diptych.serve.errors import ApiError, ClientGone

DEEPEST = 32  # of nested lists and objects
MOST_VALUES = 100_000
LARGE = 200_000  # bytes of JSON that are parsed beside the event loop


class Bodies:
    """Counts the bytes of every body on its way, of one and of all together. `slowest`: seconds to send one."""

    def __init__(self, largest: int, most: int, slowest: float) -> None:
        self.largest, self.most, self.slowest = largest, most, slowest
        self.held = 0

    def counted(self, receive: Receive) -> tuple[Receive, Callable[[], None]]:
        """`receive` that raises ApiError at a limit, and what gives the bytes back when the request is over."""
        state = {"bytes": 0, "done": False}
        deadline = time.monotonic() + self.slowest

        async def counting() -> Message:
            if state["done"]:
                return await receive()
            message = await self._in_time(receive(), deadline)
            if message["type"] != "http.request":
                return message
            size = len(message.get("body", b""))
            state["bytes"] += size
            self.held += size
            if state["bytes"] > self.largest:
                raise self.too_large()
            if self.held > self.most:
                raise ApiError(503, "the server holds as many bodies as it may", headers={"Retry-After": "1"})
            state["done"] = not message.get("more_body", False)
            return message

        def over() -> None:
            self.held -= state["bytes"]
            state["bytes"] = 0

        return counting, over

    def too_large(self) -> ApiError:
        return ApiError(413, f"expected a body of at most {self.largest} bytes, got more; fix: send smaller pictures")

    async def _in_time(self, message: Awaitable[Message], deadline: float) -> Message:
        try:
            return await asyncio.wait_for(message, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise ApiError(408, f"expected the body within {self.slowest:g} seconds") from None


async def read_json(request: Request) -> dict[str, Any]:
    """The object in a body; ApiError for anything else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps pages of other sites out: a browser sends this type only after asking.
        raise ApiError(415, f"expected the content type application/json, got {kind[:80] or 'none'!r}")
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientGone() from None
    return await run_in_threadpool(parse, body) if len(body) > LARGE else parse(body)


def parse(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also: numbers of thousands of digits, bytes that are no UTF-8
        told = "too many levels" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"expected JSON in the body, got damaged text: {told[:120]}", code="invalid_json") from None
    for text in _walk(value):
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ApiError(400, "expected text in the body, got half of a surrogate pair",
                               code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"expected a JSON object in the body, got {type(value).__name__}", code="invalid_json")
    return value


def _walk(value: Any) -> Iterator[str]:
    """All texts, keys too; an error for what is nested too deep or too much."""
    level, count = [value], 0
    for _ in range(DEEPEST):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                yield one
            elif isinstance(one, dict):
                below += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                below += one
        count += len(below)
        if count > MOST_VALUES:
            raise ApiError(400, f"expected at most {MOST_VALUES} values in the body, got more", code="invalid_json")
        if not below:
            return
        level = below
    raise ApiError(400, f"expected at most {DEEPEST} levels in the body, got more", code="invalid_json")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


async def read_form(request: Request, max_files: int, max_bytes: int) -> FormData:
    """A multipart form. Close it when its files have been read."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise ApiError(415, f"expected the content type multipart/form-data, got {kind[:80].decode('latin-1')!r}")
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientGone() from None
    # The parser takes a form that breaks off for one that ends: a mask that was cut off would go unnoticed.
    if not body.rstrip(b"\r\n\t ").endswith(b"--" + options.get(b"boundary", b"\0") + b"--"):
        raise ApiError(400, "expected a multipart form with its last boundary, got one that breaks off",
                       code="invalid_form")

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        return await MultiPartParser(request.headers, whole(), max_files=max_files, max_fields=64,
                                     max_part_size=max_bytes).parse()
    except (MultiPartException, ValueError, KeyError, AssertionError) as error:
        told = str(getattr(error, "message", "") or "damaged parts")
        raise ApiError(400, f"expected a multipart form, got: {told[:120]}", code="invalid_form") from None


def fields_of(form: FormData) -> tuple[dict[str, str], dict[str, list[UploadFile]]]:
    """Texts (each once) and files (any number) of a form."""
    texts: dict[str, str] = {}
    files: dict[str, list[UploadFile]] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            files.setdefault(name, []).append(value)
        elif name in texts:
            raise ApiError(400, f"expected the field {name[:80]} once, got it again", param=name[:80])
        else:
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise ApiError(400, f"expected text in {name[:80]!r}", param="body") from None
            texts[name] = value
    return texts, files
