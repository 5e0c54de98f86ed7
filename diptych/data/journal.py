"""Records kept line by line, so that long work goes on where it was interrupted.

A file of JSON lines: the first says what the records belong to, every other is one record. What is added is written at
once and behind all that is there, also by several processes; a process that is killed loses at most the line it was in,
which the next one removes.
"""
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """The file at `path`, made where it is not there. `head`: JSON values that say what the records belong to; an error
    where the file says otherwise, which calls them `what`. `rows`: the records that were there."""

    def __init__(self, path: str | Path, head: Mapping[str, Any], what: str) -> None:
        self.path, self.rows = Path(path), list[dict[str, Any]]()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.loads(json.dumps(head))
        # not splitlines of a text, which also ends lines where a record holds a separator of its own
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # the process was killed inside a line
            self._replace(b"".join(lines))
        if not lines:
            self._replace(_line(head))
            return
        found, *self.rows = (json.loads(line) for line in lines)
        if found != head:
            raise ValueError(f"expected {what} in {self.path}, got others; fix: another file, or remove it")

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        data = b"".join(map(_line, rows))
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            while data:  # usually in one piece
                data = data[os.write(file, data):]
        finally:
            os.close(file)

    def remove(self) -> None:
        """Once the work is done and its result is written."""
        self.path.unlink()

    def _replace(self, data: bytes) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_bytes(data)
        temporary.replace(self.path)


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
