"""Preference pairs from a model's own answers, by ranking and sifting (UnifiedReward, arXiv 2503.05236): candidates are
compared two by two, winners and losers are scored one by one, and the best winner goes with the worst loser.

Verdicts that disagree between both orders, or that cannot be read, drop their pair instead of favouring the first.

Two controls take pairs from the same candidates: "rank" the first comparison that was decided, without scores;
"random" the first two candidates as they come.

    mine(system, documents, pairs, points)     draws the candidates, too; an interrupted one goes on by its journal
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tqdm import tqdm

from diptych.alignment.rewards.base import Reward, gains
from diptych.alignment.rewards.judges import PairJudge
from diptych.alignment.rewards.verdicts import Sifted, sift
from diptych.alignment.sifting import Preferred
from diptych.data.journal import Journal
from diptych.document import Document
from diptych.systems.base import Sampling, System

Rule = Literal["sift", "rank", "random"]
RULES: tuple[Rule, ...] = get_args(Rule)


@dataclass(frozen=True)
class Mined:
    """Numbers of the chosen and the rejected candidate, their scores, and how many comparisons were decided."""

    chosen: int
    rejected: int
    scores: tuple[float, float]
    decided: int


@dataclass(frozen=True)
class Contested:
    """Candidates of a prompt (2 k of them, compared in the order given): `won`, numbers of the winner and the loser of
    every comparison that was decided; `scores` of all, larger is better, NaN where the judge did not say."""

    won: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]

    def pair(self, rule: Rule = "sift") -> Mined | None:
        """None where nothing was decided or the chosen one does not score higher. Scores are NaN where the rule asks
        for none."""
        if rule not in RULES:
            raise ValueError(f"expected rule {', '.join(RULES)}, got {rule!r}")
        if rule == "random":
            return Mined(0, 1, (math.nan, math.nan), 0)
        if rule == "rank":
            return Mined(*self.won[0], (math.nan, math.nan), len(self.won)) if self.won else None
        winners, losers = ([p[side] for p in self.won if not math.isnan(self.scores[p[side]])] for side in (0, 1))
        if not winners or not losers:
            return None
        found: Sifted[float] = sift([self.scores[i] for i in winners], [self.scores[i] for i in losers])
        if not found.kept:
            return None
        chosen, rejected = winners[found.chosen], losers[found.rejected]
        return Mined(chosen, rejected, (found.chosen_score, found.rejected_score), len(self.won))


def contest(groups: Sequence[tuple[Document, Sequence[Document]]], pairs: PairJudge, points: Reward) -> list[Contested]:
    """All groups of a prompt and its candidates, judged together, so that the judge answers whole batches."""
    for _, candidates in groups:
        if len(candidates) < 2 or len(candidates) % 2:
            raise ValueError(f"expected an even number of candidates, got {len(candidates)}")
    outcomes = iter(pairs.compare([(asked, made[i], made[i + 1]) for asked, made in groups
                                   for i in range(0, len(made), 2)]))
    asked_all = [asked for asked, made in groups for _ in made]
    known = iter(gains(points, points(asked_all, [m for _, made in groups for m in made])))
    found = []
    for _, made in groups:
        met = [(i, next(outcomes)) for i in range(0, len(made), 2)]
        won = tuple((i, i + 1) if outcome == 1 else (i + 1, i) for i, outcome in met if outcome in (0.0, 1.0))
        found.append(Contested(won, tuple(next(known) for _ in made)))
    return found


def preferred(groups: Sequence[tuple[Document, Sequence[Document]]], judged: Sequence[Contested], rule: Rule
              ) -> list[Preferred | None]:
    """The pair of every group, None where the rule finds none."""
    return [Preferred(made[m.chosen], made[m.rejected], m.scores) if (m := contested.pair(rule)) else None
            for (_, made), contested in zip(groups, judged, strict=True)]


def mine(system: System, documents: Sequence[Document], pairs: PairJudge, points: Reward, *, rule: Rule = "sift",
         candidates: int = 10, sampling: Sampling | None = None, seed: int = 0, batch: int = 16,
         journal: Journal | None = None, progress: bool = False) -> list[Preferred]:
    """A pair of the system's own answers to every document, where there is one. Candidate k of document i has the seed
    `seed` + i `candidates` + k. What is in the `journal` is not asked again: it belongs to this system and judge, this
    way of asking and documents that begin alike."""
    done = [] if journal is None else journal.rows[:len(documents)]
    found = [Preferred.from_dict(row["pair"]) for row in done if row["pair"]]
    with tqdm(total=len(documents), initial=len(done), unit="prompt", disable=None if progress else True,
              leave=False) as bar:
        for start in range(len(done), len(documents), batch):
            asked = [d.prompt() for d in documents[start:start + batch]]
            repeated = [a for a in asked for _ in range(candidates)]
            seeds = range(seed + start * candidates, seed + start * candidates + len(repeated))
            made = system.generate(repeated, sampling, seeds=seeds)
            groups = [(a, made[k:k + candidates])
                      for a, k in zip(documents[start:start + batch], range(0, len(made), candidates), strict=True)]
            judged = [Contested((), ())] * len(groups) if rule == "random" else contest(groups, pairs, points)
            chosen = preferred(groups, judged, rule)
            found += [pair for pair in chosen if pair]
            if journal is not None:
                journal.add({"pair": pair.to_dict() if pair else None} for pair in chosen)
            bar.update(len(asked))
    return found
