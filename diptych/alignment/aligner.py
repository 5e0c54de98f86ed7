"""The loop of alignment: ask, answer several times, judge, learn; resumable like a training.

Iteration k asks documents k * prompts ... of the world's training split, each `group` times with seeds that are a
function of (seed, k, place); nothing else is random. A checkpoint holds tensors and the number of the iteration.

Who answers, judges and learns are workers (`workers.roles`); what they are asked is written once, here, and where they
run is the business of their crew (`workers.setup`).
"""
import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diptych import config
from diptych.alignment.advantages import best_and_worst, best_of_group, by_group, group_advantages
from diptych.alignment.episodes import to_go
from diptych.alignment.learner import Learner
from diptych.alignment.loop import Loop
from diptych.alignment.pairs import PairSource
from diptych.alignment.policy import Trajectory
from diptych.alignment.recipe import FREE, Align
from diptych.alignment.rewards.base import Reward
from diptych.alignment.sifting import read_pairs
from diptych.alignment.workers import timeline
from diptych.alignment.workers.crew import Pending
from diptych.alignment.workers.roles import Turns
from diptych.alignment.workers.setup import Workers, open_crew
from diptych.alignment.workers.wire import copy_into
from diptych.data.mix import Mixture
from diptych.data.order import hash64, permute
from diptych.data.sources import MessagesSource, Source, WorldSource
from diptych.document import Document
from diptych.systems.base import Sampling, System
from diptych.systems.io import system_tensors
from diptych.training import lora
from diptych.training.optim import AdamW

SHOWN = 4  # iterations that the picture of a run shows, its last ones


class Lesson(NamedTuple):
    """What is learnt from one answer: its advantage, 1 for an example; +1 or -1 where answers are compared in pairs."""

    trajectory: Trajectory
    worth: float
    group: int
    link: int


class Aligner(Loop):
    """`Aligner(recipe, system, folder).run()` aligns to the end, going on at the newest checkpoint in the folder.

    `rewards` replace those that the recipe names: by task, or by the whole chain such as "draw > answer". `source`
    replaces the world: any documents of the recipe's tasks.
    """

    FREE = FREE

    def __init__(self, recipe: Align, system: System, run: str | Path, *, rewards: Mapping[str, Reward] | None = None,
                 source: Source | None = None, workers: Workers | None = None) -> None:
        super().__init__(recipe, system, run)
        self.recipe, self.workers = recipe, workers or Workers()
        self.chains = {task: ask.links for task, ask in recipe.tasks.items()}
        self.preferred = read_pairs(recipe.preferred) if recipe.preferred else []
        if not self.preferred:
            source = _source(recipe) if source is None else source
            self.stream = Mixture([(source, 1.0)], hash64(recipe.seed, 7, 0) >> 1)
        self.sampling: Sampling = config.merge(system.default_sampling(), recipe.sampling, "sampling")
        if recipe.lora is not None:
            lora.attach(system, recipe.lora.layers, recipe.lora.rank, recipe.lora.alpha, seed=recipe.seed)
        self.crew = open_crew(self.workers, recipe, system, self.sampling, rewards)
        self.recent: deque[list[timeline.Span]] = deque(maxlen=SHOWN)

    @property
    def learner(self) -> Learner:
        """That of workers in this process."""
        return self.crew.local("learner").learner

    @property
    def optimizer(self) -> AdamW:
        return self.crew.local("learner").optimizer

    # -- one iteration -------------------------------------------------------------------------------------------------

    def ask(self) -> tuple[list[Document], Tensor, list[int]]:
        """The documents of this iteration, `group` of each in a row, which group each belongs to, and their seeds."""
        r, first = self.recipe, self.iteration * self.recipe.prompts
        asked = [self.stream.document(first + p) for p in range(r.prompts) for _ in range(r.group)]
        groups = torch.arange(r.prompts).repeat_interleave(r.group)
        return asked, groups, self.seeds(0, len(asked))

    def seeds(self, link: int, count: int) -> list[int]:
        """Of the answers to all documents of a link of this iteration."""
        return [hash64(self.recipe.seed, self.iteration, link * count + n) >> 1 for n in range(count)]

    def play(self, asked: Sequence[Document], groups: Tensor, seeds: Sequence[int]) -> Turns:
        """The episodes that these documents begin: for each link the answers, by the number of the episode."""
        parts = self._parts(groups)
        return joined([p.get() for p in self._play(asked, groups, seeds, parts)], parts)

    def _play(self, asked: Sequence[Document], groups: Tensor, seeds: Sequence[int], parts: Sequence[Sequence[int]]
              ) -> list[Pending]:
        foreign = sorted({d.task for d in asked} - set(self.chains))
        if foreign:
            raise ValueError(f"expected documents of {', '.join(self.chains)}, got one of {foreign[0]!r}; "
                             "fix: name it under tasks, or leave it out of the file")
        links = max(len(self.chains[d.task]) for d in asked)
        table = [list(seeds), *(self.seeds(k, len(asked)) for k in range(1, links))]
        numbers = [hash64(self.recipe.seed, self.iteration, -k) >> 1 for k in range(links)]
        return [self.crew.send("rollout", "play", [asked[n] for n in rows], groups[rows],
                               [[own[n] for n in rows] for own in table], numbers, at=i, tag=f"act {i + 1}")
                for i, rows in enumerate(parts)]

    def _parts(self, groups: Tensor) -> list[list[int]]:
        """The rows of each part: whole groups."""
        return [torch.nonzero(torch.isin(groups, ids)).flatten().tolist()
                for ids in torch.unique(groups).chunk(self.workers.parts)]

    def judge(self, asked: Sequence[Document], turns: Sequence[Mapping[int, Trajectory]]
              ) -> tuple[Tensor, dict[str, float]]:
        """(links, n) values, higher is better, 0 where nothing judges, NaN where a reward cannot tell; and the means by
        name, of what is only watched too."""
        return self._values([self.crew.send("reward", "judge", asked, turns)], [list(range(len(asked)))])

    def _values(self, judged: Sequence[Pending], parts: Sequence[Sequence[int]]) -> tuple[Tensor, dict[str, float]]:
        found = [j.get() for j in judged]
        values = torch.zeros(max(len(v) for v, _ in found), sum(map(len, parts)))
        named: dict[str, list[float]] = {}
        for (own, told), rows in zip(found, parts, strict=True):
            values[: len(own), rows] = own
            for name, numbers in told.items():
                named.setdefault(name, []).extend(numbers)
        means = {name: float(torch.tensor(numbers).nanmean()) for name, numbers in named.items()}
        return values, {name: mean for name, mean in means.items() if mean == mean}

    def iterate(self) -> dict[str, Any]:
        """Ask, answer, judge, learn. Returns what to log."""
        self.crew.drain()  # checkpoints and the like belong to no iteration
        start = time.time()
        if self.preferred:
            return self._prefer() | self._times(start, [], [])
        asked, groups, seeds = self.ask()
        parts = self._parts(groups)
        played = self._play(asked, groups, seeds, parts)
        self._stage()
        judged = [self.crew.send("reward", "judge", [asked[n] for n in rows], p, at=i, tag=f"judge {i + 1}")
                  for i, (rows, p) in enumerate(zip(parts, played, strict=True))]
        self._stage()
        learnt = self._stream(played, judged, parts, groups) if self.workers.stream else None
        turns, (values, told) = joined([p.get() for p in played], parts), self._values(judged, parts)
        worth = to_go(values)
        known = ~worth[0].isnan()
        line: dict[str, Any] = {"iteration": self.iteration + 1, "failed": int((~known).sum()), **told}
        if known.any():
            line["same in all"] = float(by_group(worth[0][known], groups[known]).zero_std_share)
            line |= self.learn(self.lessons(turns, worth, groups)) if learnt is None else learnt
        if not self.recipe.offline:
            self.crew.push()
        self.iteration, self.answers = self.iteration + 1, self.answers + sum(map(len, turns))
        return line | {"answers": self.answers, "steps": self.steps} | self._times(start, played, judged)

    def _stage(self) -> None:
        """Where one stage ends and the next begins: nothing that a pipeline waits for."""
        if self.workers.schedule != "pipelined":
            self.crew.settle()

    def _times(self, start: float, played: Sequence[Pending], judged: Sequence[Pending]) -> dict[str, Any]:
        """How long the workers were busy; how long the iteration took, and should have by what its stages took."""
        spans = self.crew.drain()
        took = time.time() - start
        self.recent.append(spans)
        acting, judging = [p.span for p in played], [p.span for p in judged]
        learning = [s for s in spans if s.role == "learner" and s.tag != "weights"]
        pushed = {role: [s.seconds for s in spans if s.role == role and s.tag == "weights"]
                  for role in ("learner", "rollout")}
        pushing = sum(pushed["learner"]) + max(pushed["rollout"], default=0.0)
        expected = timeline.makespan(
            acting, judging, [s for s in learning if s.tag != "begin"], pipelined=self.workers.schedule == "pipelined",
            streamed=self.workers.stream, alone=self.crew.alone, pushing=pushing)
        seconds = {"acting": acting, "judging": judging, "learning": learning}
        return {**{f"seconds {k}": sum(s.seconds for s in v) for k, v in seconds.items()},
                "makespan": took, "makespan predicted": expected,
                "idle": {k: round(v, 4) for k, v in timeline.idle(spans, start, start + took).items()}}

    def lessons(self, turns: Sequence[Mapping[int, Trajectory]], worth: Tensor, groups: Tensor) -> list[Lesson]:
        """Of all links that are learnt from; `worth` (links, n) is compared within a group and link."""
        out: list[Lesson] = []
        for k, turn in enumerate(turns):
            rows = [n for n in sorted(turn) if self.chains[turns[0][n].asked.task][k].learn and not worth[k, n].isnan()]
            if not rows:
                continue
            weights = torch.tensor([float(turns[0][n].asked.meta.get("weight", 1.0)) for n in rows])
            values = self._compared(worth[k, rows], groups[rows], weights).tolist()
            out += [Lesson(turn[n], v, int(groups[n]), k) for n, v in zip(rows, values, strict=True)]
        return out

    def _compared(self, worth: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
        method, g = self.recipe.method, self.recipe.grpo
        if method in ("own", "through"):
            return torch.ones_like(worth)
        if method == "dpo":
            return best_and_worst(worth, groups)
        if method == "best":
            spread = by_group(worth, groups)
            return best_of_group(worth, groups) * (spread.std[spread.index] > 0)  # of equals none is the best
        found = group_advantages(worth, groups, spread=g.spread, unbiased=g.unbiased, eps=g.eps, weights=weights)
        return found.clamp(-g.largest, g.largest)

    def learn(self, lessons: Sequence[Lesson]) -> dict[str, Any]:
        """`updates` steps, each from the answers to a part of the prompts."""
        r, found, fresh = self.recipe, dict[str, Any](), True
        for k, part in enumerate(torch.arange(r.prompts).chunk(r.updates)):
            mine = [x for x in lessons if int(part[0]) <= x.group <= int(part[-1])]
            if not self._teaches(mine):
                continue
            seed, step = hash64(r.seed, self.iteration, k) >> 1, self.steps + 1
            if r.method == "grpo":
                worth = torch.tensor([x.worth for x in mine])
                done = self.crew.send("learner", "update", [x.trajectory for x in mine], worth, fresh, step)
            elif r.method == "dpo":
                done = self.crew.send("learner", "prefer", opposites(mine), seed, step)
            elif r.method == "through":
                done = self._through(mine, seed, step)
            else:
                made = [x.trajectory.made for x in mine if x.worth > 0]
                done = self.crew.send("learner", "imitate", made, seed, step)
            found |= done.get()
            fresh, self.steps = False, step
        return found

    def _prefer(self) -> dict[str, Any]:
        """`updates` steps from the next pairs of the file, whose order is another one every time it is read."""
        r, count, found = self.recipe, len(self.preferred), dict[str, Any]()
        chosen = []
        for n in range(self.iteration * r.prompts, (self.iteration + 1) * r.prompts):
            turn, place = divmod(n, count)
            pair = self.preferred[permute(place, count, hash64(r.seed, 11, turn))]
            chosen.append(tuple(Trajectory(d.prompt(), d, 0, ()) for d in (pair.chosen, pair.rejected)))
        for k, part in enumerate(torch.arange(r.prompts).chunk(r.updates)):
            seed = hash64(r.seed, self.iteration, k) >> 1
            self.steps += 1
            found |= self.crew.send("learner", "prefer", [chosen[n] for n in part], seed, self.steps).get()
        self.iteration, self.answers = self.iteration + 1, self.answers + 2 * r.prompts
        return {"iteration": self.iteration, **found, "answers": self.answers, "steps": self.steps}

    def _through(self, lessons: Sequence[Lesson], seed: int, step: int) -> Pending:
        """Drawings with the questions about them, or, where drawings do not learn, questions with their answers."""
        drawings = [x.trajectory for x in lessons if not x.link]
        answers = [x.trajectory for x in lessons if x.link]
        asked = [t.asked for t in answers]
        if drawings:
            return self.crew.send("learner", "through", drawings, asked, seed, step)
        return self.crew.send("learner", "imitate", asked, seed, step)

    def _teaches(self, lessons: Sequence[Lesson]) -> bool:
        distance = self.recipe.method == "grpo" and bool(self.recipe.grpo.beta)
        return any(x.worth for x in lessons) or (bool(lessons) and distance)

    def _stream(self, played: Sequence[Pending], judged: Sequence[Pending], parts: Sequence[Sequence[int]],
                groups: Tensor) -> dict[str, Any] | None:
        """Learn from every part as soon as it is judged; one step at the end. None if an answer could not be judged,
        which changes what all others weigh: they are to be learnt from anew."""
        self.crew.send("learner", "begin", sum(map(len, parts)))
        teaches = False
        for play, verdict, rows in zip(played, judged, parts, strict=True):
            worth = to_go(verdict.get()[0])
            lessons = self.lessons(play.get(), worth, groups[rows])
            if len(lessons) < len(rows):
                self.crew.send("learner", "drop")
                return None
            teaches = teaches or self._teaches(lessons)
            self.crew.send("learner", "add", [x.trajectory for x in lessons],
                           torch.tensor([x.worth for x in lessons]), tag="learn")
        if not teaches:
            self.crew.send("learner", "drop")
            return {}
        self.steps += 1
        return self.crew.send("learner", "end", self.steps).get()

    # -- the loop ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        with contextlib.closing(self.crew):
            yield

    def ended(self) -> None:
        if self.recent:
            spans = [s for own in self.recent for s in own]
            timeline.draw(spans, self.run_folder / "timeline.png", self._told())
        if not self.crew.alone:
            copy_into(system_tensors(self.system), self.crew.weights())

    def _told(self) -> str:
        w = self.workers
        return f"{w.backend}, {w.schedule}, {w.parts} parts" + (", streamed" if w.stream else "")

    def write(self, state: dict[str, Any]) -> None:
        self.crew.send("learner", "save", self.run_folder, self.iteration, state).get()

    def read(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.crew.send("learner", "load", folder).get()
        self.crew.push(every=True)

    def give(self) -> None:
        self.crew.send("learner", "export", self.run_folder).get()
        if self.recipe.lora is not None and not self.crew.alone:
            lora.merge(self.system)


def joined(turns: Sequence[Turns], parts: Sequence[Sequence[int]]) -> Turns:
    """The turns of all parts, numbered as the rows of the whole."""
    out: Turns = [{} for _ in range(max(map(len, turns)))]
    for own, rows in zip(turns, parts, strict=True):
        for turn, found in zip(out, own, strict=False):
            turn |= {rows[n]: trajectory for n, trajectory in found.items()}
    return out


def _source(recipe: Align) -> Source:
    """Where documents come from."""
    if recipe.documents:
        return MessagesSource(recipe.documents)
    if recipe.pairs is not None:
        return PairSource(recipe.pairs, recipe.world, seed=recipe.seed)
    return WorldSource(recipe.world, {task: a.weight for task, a in recipe.tasks.items()}, "train")


def opposites(lessons: Sequence[Lesson]) -> list[tuple[Trajectory, Trajectory]]:
    """The best and the worst answer of every group and link."""
    found: dict[tuple[int, int], dict[bool, Trajectory]] = {}
    for x in lessons:
        if x.worth:
            found.setdefault((x.group, x.link), {})[x.worth > 0] = x.trajectory
    return [(p[True], p[False]) for p in found.values()]
