"""Structured logs: one JSON object a line on standard error, each with the id of its request. Never what was asked or
answered, never a key."""
import json
import logging
import secrets
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from diptych.serve.errors import ApiError

log = logging.getLogger("diptych.serve")
request_id: ContextVar[str] = ContextVar("request_id", default="")


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "logger": record.name,
                                "event": record.getMessage()}
        if told := request_id.get():
            line["request_id"] = told
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


def write(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **facts: Any) -> None:
    """One line with these facts."""
    log.log(level, event, extra={"facts": facts}, exc_info=error)


def unexpected(error: BaseException) -> ApiError:
    """What a caller is told of an error that nobody foresaw: a number under which the log has the traceback."""
    number = secrets.token_hex(8)
    write("unexpected error", level=logging.ERROR, error=error, error_id=number)
    return ApiError(500, f"something went wrong; the operator finds it under {number}")


def configure(level: str) -> None:
    """All that this process logs, in this form. Called by the command line; the library leaves logging alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("ray", "ray.serve"):  # where replicas are used: of these loggers the warnings, in this form too
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # warns of every byte that callers get wrong
