"""A reward that remembers: every answer is judged once, also by later runs.

On disk it is a journal (`data.journal`) of the reward's identity, with one record per judged pair by the hash of both
documents. Failures are not kept: the next time is another try.
"""
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych.alignment.rewards.base import Facts, Reward, Score, cached, content_hash
from diptych.data.journal import Journal
from diptych.document import Document

FORMAT = 1


class Cached(Reward):
    FACTS = Facts(name="cached", about="another reward, whose records are kept", low=float("-inf"), high=float("inf"))

    def __init__(self, reward: Reward, path: str | Path | None = None) -> None:
        if not reward.facts.fixed:
            raise ValueError(f"expected a reward whose values stay, got {reward.facts.name}, which depends on the "
                             "company or on a model in training; fix: cache its fixed parts")
        head = {"format": FORMAT, "reward": reward.identity}
        self.reward, self.asked, self.found = reward, 0, 0  # pairs so far, and those that were known
        self.journal = None if path is None else Journal(path, head, f"records of {reward.identity}")
        rows = self.journal.rows if self.journal else []
        self.known: dict[str, Score] = {row["key"]: Score.from_dict(row["score"]) for row in rows}

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
        if self.journal is not None and kept:
            self.journal.add({"key": key, "score": replace(s, cached=False).to_dict()} for key, s in kept.items())
        out = [new[key] if first.get(key) == i else cached(self.known.get(key) or new[key])
               for i, key in enumerate(keys)]
        self.known |= kept
        self.asked, self.found = self.asked + len(keys), self.found + len(keys) - len(todo)
        return out
