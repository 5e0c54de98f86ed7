"""Answers on their way: server-sent events that end with their reader, and waiting that ends when nobody waits."""
import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from diptych.serve import errors, logs
from diptych.serve.errors import ApiError, ClientGone

T = TypeVar("T")
QUIET = 15.0  # seconds after which a comment keeps the connection open


def event(data: Mapping[str, Any] | str, name: str | None = None) -> bytes:
    told = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {name}\n" if name else "").encode() + f"data: {told}\n\n".encode("utf-8", "replace")


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_there(request: Request, work: Coroutine[Any, Any, T], give_up: Callable[[], None]) -> T:
    """The result of some work; if the client leaves or the work fails, `give_up` is called at once."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone()
        return working.result()
    except BaseException:
        give_up()
        raise
    finally:
        await _stop(working, watching)


async def _stop(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Parts as they come. `give_up` is called when the reader leaves, takes longer than `seconds` for a part, or
    something fails; an error becomes the last event, and stands in the notes of the request."""

    def __init__(self, parts: AsyncIterator[bytes], give_up: Callable[[], None], seconds: float) -> None:
        super().__init__()
        self.parts, self.give_up, self.seconds = parts, give_up, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(scope, send))
        watching = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                scope.setdefault("diptych", {})["error"] = ClientGone()
        finally:
            self.give_up()
            await _stop(sending, watching)

    async def _send_all(self, scope: Scope, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
                   (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for part in self.parts:
                await self._send(send, part)
        except TimeoutError:
            scope.setdefault("diptych", {})["error"] = ApiError(408, "the client reads too slowly", code="slow_reader")
            return
        except Exception as error:
            known = errors.public(error) or logs.unexpected(error)
            scope.setdefault("diptych", {})["error"] = known
            await self._send(send, event(known.body(), "error"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, part: bytes) -> None:
        """A reader that takes nothing for long is as good as gone: its answer would wait in memory."""
        await asyncio.wait_for(send({"type": "http.response.body", "body": part, "more_body": True}), self.seconds)
