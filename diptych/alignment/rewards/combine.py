"""Several rewards as one: weighted sum, product or smallest, each turned such that higher is better and brought to a
scale that is stated.

    "range"   (value - worst) / (best - worst), in [0, 1]
    "none"    the value, or its negative where lower is better
    "batch"   (value - mean) / (std + 1e-6) over all answers that are judged together; depends on the company
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from diptych.alignment.rewards.base import Facts, Reward, Score, gains
from diptych.document import Document

Scale = Literal["range", "none", "batch"]
How = Literal["sum", "product", "min"]
EPS = 1e-6  # below which the values of a batch are all alike


@dataclass(frozen=True, kw_only=True)
class Term:
    """One reward of several. `weight` counts in a sum only."""

    reward: Reward
    weight: float = 1.0
    scale: Scale = "range"

    def __post_init__(self) -> None:
        facts = self.reward.facts
        if self.scale == "range" and not math.isfinite(facts.high - facts.low):
            raise ValueError(f'expected a finite range for scale "range", got {facts.name} from {facts.low} to '
                             f'{facts.high}; fix: scale="none" or "batch"')
        if self.scale not in ("range", "none", "batch"):
            raise ValueError(f"expected scale range, none or batch, got {self.scale!r}")

    def bounds(self) -> tuple[float, float]:
        """The least and the largest scaled value."""
        facts = self.reward.facts
        if self.scale == "batch":
            return -math.inf, math.inf
        if self.scale == "range":
            return 0.0, 1.0
        ends = facts.sign * facts.low, facts.sign * facts.high
        return min(ends), max(ends)

    def scaled(self, values: Sequence[float]) -> list[float]:
        """Of values with higher is better; NaN stays."""
        facts = self.reward.facts
        if self.scale == "range":
            worst = facts.sign * facts.worst
            return [(v - worst) / (facts.high - facts.low) for v in values]
        if self.scale == "none":
            return list(values)
        known = [v for v in values if not math.isnan(v)]
        mean = sum(known) / max(len(known), 1)
        std = math.sqrt(sum((v - mean) ** 2 for v in known) / max(len(known), 1))
        return [(v - mean) / (std + EPS) for v in values]


class Combined(Reward):
    """`parts` of its records: every reward's own value by name, and its parts as NAME/PART. An answer that one of them
    cannot judge has no value. A product and the smallest of several need values that are not negative and of one
    scale: "range"."""

    FACTS = Facts(name="combined", about="weighted sum, product or smallest of several", low=-math.inf, high=math.inf,
                  fixed=False)

    def __init__(self, terms: Sequence[Term], how: How = "sum") -> None:
        names = [t.reward.facts.name for t in terms]
        if not terms or len(set(names)) < len(names):
            raise ValueError(f"expected rewards of different names, got {', '.join(names) or 'none'}")
        if how not in ("sum", "product", "min"):
            raise ValueError(f"expected how sum, product or min, got {how!r}")
        if how != "sum" and any(t.scale != "range" or t.weight != 1 for t in terms):
            raise ValueError(f'expected terms of scale "range" and weight 1 for the {how}, got others')
        self.terms, self.how = tuple(terms), how

    @property
    def facts(self) -> Facts:
        own = [t.reward.facts for t in self.terms]
        low, high = 0.0, 1.0
        if self.how == "sum":
            ends = [sorted(t.weight * b for b in t.bounds()) for t in self.terms if t.weight]
            low, high = sum(e[0] for e in ends), sum(e[1] for e in ends)
        needs = dict.fromkeys(n for f in own for n in f.needs)
        return Facts(name=f"{self.how}({', '.join(f.name for f in own)})", about=self.FACTS.about, low=low, high=high,
                     ties=all(f.ties for f in own) if self.how == "sum" else any(f.ties for f in own),
                     needs=tuple(needs), calls=sum(f.calls for f in own), seconds=sum(f.seconds for f in own),
                     fixed=all(f.fixed for f in own) and all(t.scale != "batch" for t in self.terms))

    def options(self) -> dict[str, Any]:
        return {"terms": [[t.reward.identity, t.weight, t.scale] for t in self.terms]}

    @property
    def measures(self) -> frozenset[str]:
        return frozenset().union(*(t.reward.measures for t in self.terms))

    def __call__(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Score]:
        found = [t.reward(asked, made) for t in self.terms]
        scaled = [t.scaled(gains(t.reward, scores)) for t, scores in zip(self.terms, found, strict=True)]
        out = []
        for i in range(len(made)):
            own = [scores[i] for scores in found]
            score = Score(value=0.0, parts=self._parts(own), seconds=sum(s.seconds for s in own),
                          cached=all(s.cached for s in own))
            failed = [f"{t.reward.facts.name}: {s.failure}" for t, s in zip(self.terms, own, strict=True) if s.failure]
            value = math.nan if failed else self._value([values[i] for values in scaled])
            out.append(replace(score, value=value, failure="; ".join(failed)))
        return out

    def _value(self, values: Sequence[float]) -> float:
        if self.how == "sum":
            return sum(t.weight * v for t, v in zip(self.terms, values, strict=True))
        return math.prod(values) if self.how == "product" else min(values)

    def _parts(self, own: Sequence[Score]) -> dict[str, float]:
        out: dict[str, float] = {}
        for term, score in zip(self.terms, own, strict=True):
            name = term.reward.facts.name
            if not score.failure:
                out[name] = score.value
            out |= {f"{name}/{part}": value for part, value in score.parts.items()}
        return out
