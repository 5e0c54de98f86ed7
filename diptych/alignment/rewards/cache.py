"""A reward that remembers: every answer is judged once, also by later runs.

On disk it is a file of JSON lines: first the identity of the reward, then one line per judged pair with the hash of
both documents. A line is written at once, so a run that is killed loses at most the line it was in, which the next one
removes. Failures are not kept: the next time is another try.
"""
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych.alignment.rewards.base import Facts, Reward, Score, cached, content_hash
from diptych.document import Document

FORMAT = 1


class Cached(Reward):
    FACTS = Facts(name="cached", about="another reward, whose records are kept", low=float("-inf"), high=float("inf"))

    def __init__(self, reward: Reward, path: str | Path | None = None) -> None:
        if not reward.facts.fixed:
            raise ValueError(f"expected a reward whose values stay, got {reward.facts.name}, which depends on the "
                             "company or on a model in training; fix: cache its fixed parts")
        self.reward, self.path = reward, None if path is None else Path(path)
        self.known: dict[str, Score] = {}
        self.asked = self.found = 0  # pairs so far, and those that were known
        if self.path is not None:
            self._open(self.path)

    @property
    def facts(self) -> Facts:
        return self.reward.facts

    @property
    def identity(self) -> str:
        return self.reward.identity

    @property
    def measures(self) -> frozenset[str]:
        return self.reward.measures

    def options(self) -> dict[str, Any]:
        return self.reward.options()

    def __call__(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Score]:
        if len(asked) != len(made):
            raise ValueError(f"expected one answer for each document, got {len(asked)} and {len(made)}")
        keys = [content_hash(a, m) for a, m in zip(asked, made, strict=True)]
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self.known}
        todo = sorted(first.values())
        judged = self.reward([asked[i] for i in todo], [made[i] for i in todo]) if todo else []
        new = dict(zip((keys[i] for i in todo), judged, strict=True))
        kept = {key: score for key, score in new.items() if not score.failure}
        self._write(kept)
        out = [new[key] if first.get(key) == i else cached(self.known.get(key) or new[key])
               for i, key in enumerate(keys)]
        self.known |= kept
        self.asked, self.found = self.asked + len(keys), self.found + len(keys) - len(todo)
        return out

    # -- the file -----------------------------------------------------------------------------------------------------

    def _head(self) -> dict[str, Any]:
        return {"format": FORMAT, "reward": self.reward.identity}

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # the run was killed inside a line
            self._replace(path, b"".join(lines))
        if not lines:
            self._replace(path, _line(self._head()))
            return
        head, *rows = (json.loads(line) for line in lines)
        if head != self._head():
            raise ValueError(f"expected records of {self.reward.identity} in {path}, got those of "
                             f"{head.get('reward')!r}; fix: another file, or remove it")
        self.known = {row["key"]: Score.from_dict(row["score"]) for row in rows}

    def _write(self, scores: dict[str, Score]) -> None:
        if self.path is None or not scores:
            return
        data = b"".join(_line({"key": key, "score": replace(s, cached=False).to_dict()}) for key, s in scores.items())
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            while data:  # usually in one piece: other processes may write to the same file
                data = data[os.write(file, data):]
        finally:
            os.close(file)

    @staticmethod
    def _replace(path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(data)
        temporary.replace(path)


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
