"""Errors as the OpenAI API words them: {"error": {"message", "type", "param", "code"}}.

What a caller may know of an error is decided here and nowhere else: messages of ours ("expected ..., got ...") lose the
folders of paths that they name, anything else becomes a number that stands in the log with its traceback.
"""
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {400: "invalid_value", 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
         408: "timeout", 413: "too_large", 415: "unsupported_media_type", 429: "rate_limit_exceeded",
         499: "client_gone", 500: "server_error", 503: "unavailable"}
# directories in front of a file's name, where they begin a path (and not inside an address or a media type)
FOLDERS = re.compile(r"(?<![\w:/.+-])~?/(?:[^\s/'\",;:()<>]+/)+")
LONGEST = 600  # characters of a message


class ApiError(HTTPException):
    """An answer with this status. `param` names the parameter at fault, `code` says which error in one word."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.param = code or CODES.get(status, "error"), param

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


class ClientGone(ApiError):
    """The caller has hung up: nobody reads the answer, the log does."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection")


def public(error: BaseException) -> ApiError | None:
    """What a caller may know of an error; None: nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, ValueError) and str(error).startswith("expected "):
        return ApiError(400, FOLDERS.sub("", str(error))[:LONGEST])
    return None


def of_validation(error: ValidationError, fields: Mapping[str, Any], value: Any) -> ApiError:
    """The first thing wrong with a body, by the name of its parameter. What was sent is not repeated at length."""
    every = [(_path(e["loc"], value, e["type"]), e) for e in error.errors(include_url=False)]
    # Of the ways to read one value, the one that came furthest says best what is wrong with it.
    path, first = max((pair for pair in every if pair[0][: len(every[0][0])] == every[0][0]), key=lambda p: len(p[0]))
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")[:120]
    if first["type"] == "missing":
        return ApiError(400, f"expected the parameter {param}, got none", code="missing_required_parameter",
                        param=param)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(path[-1]), fields, n=1, cutoff=0.6) if len(path) == 1 else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return ApiError(400, f"expected a known parameter, got {param!r}{hint}", code="unknown_parameter", param=param)
    extra = getattr(fields.get(str(path[0])) if path else None, "json_schema_extra", None)
    reason = f" ({extra['x-reason']})" if isinstance(extra, dict) and "x-reason" in extra else ""
    return ApiError(400, f"{param or 'body'}: {first['msg']}{reason}"[:LONGEST], param=param or None)


def _path(places: Sequence[int | str], value: Any, kind: str) -> list[int | str]:
    """Where in a body an error is: without what pydantic says of the types that it tried."""
    out: list[int | str] = []
    for n, place in enumerate(places):
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and place in value:
            value = value[place]
        elif not (kind == "missing" and n == len(places) - 1):
            continue
        out.append(place)
    return out
