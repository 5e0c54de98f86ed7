"""What a reward is: it looks at what was asked and what was made, and says how good that is.

    reward(asked, made) -> [Score, ...]      one record for each pair of documents

`asked` are documents as the data has them (their `meta` holds what verifiers need; their targets may be emptied),
`made` the same documents as a model filled them. A reward declares what its numbers are (`Facts`); combinations and
caches of rewards are rewards themselves.

An answer that is missing gets the worst value. A reward that cannot tell (its judge did not answer, or not in a form
that can be read) says so in `failure`, its value is NaN, and whoever trains leaves that sample out.
"""
import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from diptych.document import Document

# what a reward may need besides the two documents
NEEDS = ("truth", "reference", "model", "group")
SLACK = 1e-4  # a value may lie so far outside its range, relative to the range: rounding of cosines and sums


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the values of a reward are.

    `low`, `high`: the range; `sign` 1: higher is better, -1: lower is better. `ties`: whether equal values for
    different answers are expected, so that a group may say nothing. `needs`: "truth" (facts of the world in the meta
    of what was asked), "reference" (a true picture in it), "model" (a network), "group" (other answers to the same).
    `calls`: networks asked per answer (a reply of many tokens is one). `seconds`: per answer on one core of a CPU,
    where no network is asked. `fixed`: the same documents get the same value at any time and in any company.
    """

    name: str
    about: str
    low: float
    high: float
    sign: int = 1
    ties: bool = True
    needs: tuple[str, ...] = ()
    calls: float = 0.0
    seconds: float = 0.0
    fixed: bool = True

    def __post_init__(self) -> None:
        unknown = [n for n in self.needs if n not in NEEDS]
        if unknown or self.sign not in (1, -1) or not self.low < self.high:
            raise ValueError(f"expected needs out of {', '.join(NEEDS)}, sign 1 or -1 and low < high, got "
                             f"{', '.join(self.needs)}, {self.sign}, {self.low} and {self.high}")

    @property
    def worst(self) -> float:
        return self.low if self.sign > 0 else self.high


@dataclass(frozen=True, kw_only=True)
class Score:
    """The record of one answer. `parts`: what the value is made of, by name; `seconds`: what it took (0 if `cached`);
    `failure`: why there is no value, which is NaN then."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False
    failure: str = ""

    def __post_init__(self) -> None:
        if math.isnan(self.value) != bool(self.failure):
            raise ValueError(f"expected a value, or NaN and why there is none, got {self.value} and {self.failure!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON values: a missing value is None."""
        return {"value": None if self.failure else self.value, "parts": dict(self.parts), "seconds": self.seconds,
                "cached": self.cached, "failure": self.failure}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Score":
        return cls(**{**data, "value": math.nan if data["value"] is None else data["value"]})


@dataclass(frozen=True)
class Rating:
    """What a reward says of one answer, before it is recorded."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a reward cannot tell."""

    reason: str


class Reward:
    """One way to judge. Subclasses set `FACTS` and implement `rate`; those with settings name them in `options`."""

    FACTS: ClassVar[Facts]

    @property
    def facts(self) -> Facts:
        return self.FACTS

    def options(self) -> dict[str, Any]:
        """JSON values of everything that decides a value besides the documents."""
        return {}

    @property
    def identity(self) -> str:
        """Equal for rewards that give equal values."""
        options = self.options()
        return self.facts.name + (f" {json.dumps(options, sort_keys=True)}" if options else "")

    @property
    def measures(self) -> frozenset[str]:
        """Names of what is measured, whatever the settings: a figure of the same name is no independent evidence."""
        return frozenset({self.facts.name})

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        """Of answers that are there."""
        raise TypeError(f"{type(self).__name__} does not judge")

    def __call__(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Score]:
        """One record per pair, in order."""
        if len(asked) != len(made):
            raise ValueError(f"expected one answer for each document, got {len(asked)} and {len(made)}")
        there = [i for i, document in enumerate(made) if not any(p.empty for p in document.targets)]
        scores = [Score(value=self.facts.worst, parts={"missing": 1.0})] * len(made)
        start = time.perf_counter()
        found = self.rate([asked[i] for i in there], [made[i] for i in there]) if there else []
        seconds = (time.perf_counter() - start) / max(len(there), 1)
        for i, rating in zip(there, found, strict=True):
            scores[i] = self._scored(rating, seconds)
        return scores

    def _scored(self, rating: Rating | Failure, seconds: float) -> Score:
        if isinstance(rating, Failure):
            return Score(value=math.nan, seconds=seconds, failure=rating.reason)
        low, high = self.facts.low, self.facts.high
        slack = SLACK * (high - low) if math.isfinite(high - low) else 0.0
        if not low - slack <= rating.value <= high + slack:
            raise ValueError(f"expected a value of {self.facts.name} between {low} and {high}, got {rating.value}")
        return Score(value=min(max(float(rating.value), low), high), parts=rating.parts, seconds=seconds)


def gains(reward: Reward, scores: Iterable[Score]) -> list[float]:
    """Values turned such that higher is better; NaN where there is none."""
    return [reward.facts.sign * s.value for s in scores]


def check_independent(reward: Reward, metric: Any) -> None:
    """An error if a figure that is to be reported is what the model was trained on. `metric`: a reward, a suite, or
    the name of a measure."""
    if isinstance(metric, Reward):
        measured = metric.measures
    elif isinstance(metric, str):
        measured = frozenset({metric})
    else:
        measured = frozenset({f"suite/{metric.name}"})
    shared = sorted(reward.measures & measured)
    if shared:
        raise ValueError(f"expected a metric that is not the reward, got {', '.join(shared)} as both; "
                         "fix: report another measure, or train on another reward")


# -- identity of documents --------------------------------------------------------------------------------------------

def content_hash(*documents: Document) -> str:
    """Of everything in the documents: pieces to the last bit, task and meta."""
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        head = json.dumps([document.task, dict(document.meta)], sort_keys=True, default=str)
        digest.update(f"document {len(document)} {head}".encode())
        for piece in document:
            for name, value in sorted(vars(piece).items()):
                if isinstance(value, np.ndarray):
                    digest.update(f"{name} {value.dtype.str} {value.shape}".encode())
                    digest.update(np.ascontiguousarray(value).tobytes())
                else:
                    digest.update(f"{piece.kind} {name} {value!r};".encode())
    return digest.hexdigest()


def groups(asked: Sequence[Document]) -> list[list[int]]:
    """Numbers of the documents that ask the same, in order of their first."""
    found: dict[str, list[int]] = {}
    for i, document in enumerate(asked):
        found.setdefault(content_hash(document.prompt()), []).append(i)
    return list(found.values())


def cached(score: Score) -> Score:
    return replace(score, seconds=0.0, cached=True)
