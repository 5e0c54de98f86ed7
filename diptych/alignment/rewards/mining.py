"""Preference pairs from a model's own answers, by ranking and sifting (UnifiedReward, arXiv 2503.05236): candidates are
compared two by two, winners and losers are scored one by one, and the best winner goes with the worst loser.

Verdicts that disagree between both orders, or that cannot be read, drop their pair instead of favouring the first.

Two controls take pairs from the same candidates: "rank" the first comparison that was decided, without scores;
"random" the first two candidates as they come.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diptych.alignment.rewards.base import Reward, gains
from diptych.alignment.rewards.judges import PairJudge
from diptych.alignment.rewards.verdicts import Sifted, sift
from diptych.document import Document

Rule = Literal["sift", "rank", "random"]


@dataclass(frozen=True)
class Mined:
    """Numbers of the chosen and the rejected candidate, their scores, and how many comparisons were decided."""

    chosen: int
    rejected: int
    scores: tuple[float, float]
    decided: int


def mine(asked: Document, candidates: Sequence[Document], pairs: PairJudge, points: Reward,
         rule: Rule = "sift") -> Mined | None:
    """One pair of a prompt's candidates (2 k of them, compared in the order given), or None where nothing was decided
    or the chosen one does not score higher. Scores are NaN where the rule asks for none."""
    if rule not in ("sift", "rank", "random"):
        raise ValueError(f"expected rule sift, rank or random, got {rule!r}")
    if len(candidates) < 2 or len(candidates) % 2:
        raise ValueError(f"expected an even number of candidates, got {len(candidates)}")
    if rule == "random":
        return Mined(0, 1, (math.nan, math.nan), 0)
    numbers = range(0, len(candidates), 2)
    outcomes = pairs.compare([(asked, candidates[i], candidates[i + 1]) for i in numbers])
    won = [(i, i + 1) if o == 1 else (i + 1, i) for i, o in zip(numbers, outcomes, strict=True) if o in (0.0, 1.0)]
    if rule == "rank":
        return Mined(*won[0], (math.nan, math.nan), len(won)) if won else None
    known = gains(points, points([asked] * len(candidates), candidates))
    winners, losers = ([p[side] for p in won if not math.isnan(known[p[side]])] for side in (0, 1))
    if not winners or not losers:
        return None
    found: Sifted[float] = sift([known[i] for i in winners], [known[i] for i in losers])
    if not found.kept:
        return None
    return Mined(winners[found.chosen], losers[found.rejected], (found.chosen_score, found.rejected_score), len(won))
