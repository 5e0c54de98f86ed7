"""What stands before every endpoint, as plain ASGI: ids, log lines, metrics and the last catch; then who may come in.

`Gate` is outermost: whatever happens inside, its caller gets an answer in the form of the API, with the request's id.
`Access` asks for the host and origin, the key and its rate, and counts bodies.
"""
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diptych.serve import errors, logs
from diptych.serve.auth import Keys, Rate
from diptych.serve.context import Context
from diptych.serve.errors import ApiError, ClientGone
from diptych.serve.limits import Bodies

GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::\d{1,5})?\Z")
OPEN = ("/health", "/openapi.json", "/", "/ledger")  # need no key: nothing of the models, nothing to ask them
SAFE = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY"}


class Gate:
    def __init__(self, app: ASGIApp, context: Context) -> None:
        self.app, self.context = app, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        told = given if GIVEN_ID.match(given) else f"req_{secrets.token_hex(12)}"
        logs.request_id.set(told)
        facts: dict[str, Any] = scope.setdefault("diptych", {})
        began, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = told
                for name, value in SAFE.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            known = errors.public(error) or logs.unexpected(error)
            facts["error"] = known
            if status == 0 and not isinstance(known, ClientGone):
                await answer_error(known)(scope, receive, sending)
        finally:
            self._note(scope, facts, status, time.monotonic() - began)

    def _note(self, scope: Scope, facts: dict[str, Any], status: int, seconds: float) -> None:
        error = facts.pop("error", None)
        path = getattr(scope.get("route"), "path", "other")  # not what was asked for: anybody can make up paths
        metrics = self.context.metrics
        unsent = isinstance(error, ApiError) and (status == 0 or isinstance(error, ClientGone))
        shown = error.status_code if unsent else status
        metrics.requests.labels(path, str(shown)).inc()
        metrics.seconds.labels(path).observe(seconds)
        if isinstance(error, ApiError):
            metrics.errors.labels(error.code).inc()
            facts["code"] = error.code
        client = scope.get("client")
        logs.write("request", method=scope["method"], path=path, status=shown, seconds=round(seconds, 4),
                   client=client[0] if client else None, **facts)


class Access:
    def __init__(self, app: ASGIApp, context: Context, keys: Keys | None) -> None:
        settings = context.settings
        self.app, self.context, self.keys = app, context, keys
        self.rate = None if settings.rate is None else Rate(settings.rate)
        self.bodies = Bodies(settings.max_body, settings.max_bodies * settings.max_body, settings.body_seconds)
        context.metrics.bodies.set_function(lambda: self.bodies.held)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        facts = scope.setdefault("diptych", {})
        extra: dict[str, str] = {}
        try:
            self._check_names(headers)
            if scope["path"] not in OPEN:
                who = self._caller(headers, scope)
                facts["key"] = who if self.keys is not None else ""
                extra = self._charge(who)
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length[:18]) > self.bodies.largest:
                raise self.bodies.too_large()
        except ApiError as error:
            facts["error"] = error
            await answer_error(error)(scope, receive, send)
            return
        counting, over = self.bodies.counted(receive)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(extra)
            await send(message)

        try:
            await self.app(scope, counting, sending)
        finally:
            over()

    def _check_names(self, headers: Headers) -> None:
        """Pages of other sites may not use a visitor's browser to come here: neither openly, nor under a name of their
        own that they have pointed at this machine."""
        settings = self.context.settings
        host = headers.get("host", "")
        name = HOST.match(host)
        if settings.hosts is not None and (name is None or name[1].strip("[]").lower() not in settings.hosts):
            raise ApiError(403, f"expected one of the hosts {', '.join(settings.hosts)}, got {host[:80]!r}; "
                           "fix: --allow-host", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is None or origin in settings.cors or "*" in settings.cors:
            return
        if origin.partition("://")[2] != host:
            raise ApiError(403, f"expected no request from another site, got one from {origin[:80]!r}; fix: --cors",
                           code="origin_not_allowed")

    def _caller(self, headers: Headers, scope: Scope) -> str:
        """The name of the key, or where there are none the address."""
        if self.keys is None:
            client = scope.get("client")
            return client[0] if client else "local"
        scheme, _, key = headers.get("authorization", "").partition(" ")
        name = self.keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            raise ApiError(401, "expected an API key as Authorization: Bearer ..., got "
                           f"{'an unknown one' if key else 'none'}", headers={"WWW-Authenticate": "Bearer"})
        return name

    def _charge(self, who: str) -> dict[str, str]:
        if self.rate is None:
            return {}
        wait, left = self.rate.take(who)
        told = {"x-ratelimit-limit-requests": str(self.rate.size), "x-ratelimit-remaining-requests": str(left)}
        if wait:
            seconds = max(1, round(wait + 0.5))
            raise ApiError(429, f"expected at most {self.rate.size} requests a minute; try again in {seconds} seconds",
                           headers={"Retry-After": str(seconds), **told})
        return told


def answer_error(error: ApiError) -> Response:
    made = Context.json(error.body(), error.status_code)
    made.headers.update(error.headers or {})
    return made
