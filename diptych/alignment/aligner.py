"""The loop of alignment: ask, answer several times, judge, learn; resumable like a training.

Iteration k asks documents k * prompts ... of the world's training split, each `group` times with seeds that are a
function of (seed, k, place); nothing else is random. A checkpoint holds tensors and the number of the iteration.
"""
import contextlib
import copy
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diptych import config
from diptych.alignment.advantages import best_and_worst, best_of_group, by_group, group_advantages
from diptych.alignment.episodes import follow_up, to_go
from diptych.alignment.learner import Learner
from diptych.alignment.pairs import PairSource
from diptych.alignment.policy import Trajectory, act
from diptych.alignment.recipe import FREE, Align, Link
from diptych.alignment.rewards.base import Reward, check_independent, gains
from diptych.alignment.rewards.table import make
from diptych.data.mix import Mixture
from diptych.data.order import hash64
from diptych.data.sources import MessagesSource, Source, WorldSource
from diptych.document import Document
from diptych.systems.base import Sampling, System
from diptych.systems.io import save_system, system_tensors
from diptych.training import checkpoint, lora
from diptych.training.ema import Ema
from diptych.training.optim import AdamW
from diptych.training.progress import Metrics, Progress, event, interruptible
from diptych.training.recipe import Stage, differences
from diptych.training.stages import fixed_names, trained_names

log = logging.getLogger("diptych.alignment")


class Lesson(NamedTuple):
    """What is learnt from one answer: its advantage, 1 for an example; +1 or -1 where answers are compared in pairs."""

    trajectory: Trajectory
    worth: float
    group: int
    link: int


class Aligner:
    """`Aligner(recipe, system, folder).run()` aligns to the end, going on at the newest checkpoint in the folder.

    `rewards` replace those that the recipe names: by task, or by the whole chain such as "draw > answer". `source`
    replaces the world: any documents of the recipe's tasks.
    """

    def __init__(self, recipe: Align, system: System, run: str | Path, *,
                 rewards: Mapping[str, Reward] | None = None, source: Source | None = None) -> None:
        self.recipe, self.system, self.run_folder = recipe, system.eval(), Path(run)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.chains = {task: ask.links for task, ask in recipe.tasks.items()}
        self.rewards, self.watched = dict(rewards or {}), dict[str, list[Reward]]()
        for task, links in self.chains.items():
            for k, link in enumerate(links):
                name = chain_name(task, links[:k + 1])
                if link.reward and name not in self.rewards:
                    self.rewards[name] = make(link.reward, **link.options)
                self.watched[name] = [make(w) for w in link.watch]
        for reward in self.rewards.values():
            for other in itertools.chain.from_iterable(self.watched.values()):
                check_independent(reward, other)
        source = _source(recipe) if source is None else source
        self.stream = Mixture([(source, 1.0)], hash64(recipe.seed, 7, 0) >> 1)
        self.sampling: Sampling = config.merge(system.default_sampling(), recipe.sampling, "sampling")
        apart = recipe.needs_reference and recipe.lora is None
        reference = copy.deepcopy(system).requires_grad_(False) if apart else None
        if recipe.lora is not None:
            lora.attach(system, recipe.lora.layers, recipe.lora.rank, recipe.lora.alpha, seed=recipe.seed)
        stage = Stage(steps=max(recipe.iterations, 1), batch=recipe.prompts, lr=recipe.lr, freeze=recipe.freeze,
                      only=recipe.only)
        names = trained_names(system, stage, fixed_names(system))
        for name, parameter in system.named_parameters():
            parameter.requires_grad_(name in names)
        self.optimizer = AdamW(system, names, recipe.optimizer, stage)
        self.learner = Learner(system, self.optimizer, recipe.grpo, self.sampling, micro=recipe.micro,
                               largest_norm=recipe.optimizer.clip, reference=reference)
        self.ema = Ema(system, names, recipe.ema) if recipe.ema else None
        self.iteration, self.answers, self.steps, self.seconds, self.stop = 0, 0, 0, 0.0, False

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

    def play(self, asked: Sequence[Document], groups: Tensor, seeds: Sequence[int]) -> list[dict[int, Trajectory]]:
        """The episodes that these documents begin: for each link the answers, by the number of the episode."""
        foreign = sorted({d.task for d in asked} - set(self.chains))
        if foreign:
            raise ValueError(f"expected documents of {', '.join(self.chains)}, got one of {foreign[0]!r}; "
                             "fix: name it under tasks, or leave it out of the file")
        chains = [self.chains[d.task] for d in asked]
        turns: list[dict[int, Trajectory]] = []
        for k in range(max(map(len, chains))):
            coming = dict[int, Document](enumerate(asked)) if not k else {}
            for rule in sorted({c[k].follow for c in chains if len(c) > k and k}):
                rows = [n for n, c in enumerate(chains) if len(c) > k and c[k].follow == rule]
                made = [turns[-1][n].made for n in rows]
                number = hash64(self.recipe.seed, self.iteration, -k) >> 1
                coming |= zip(rows, follow_up(rule, made, groups[rows], number), strict=True)
            own = seeds if not k else self.seeds(k, len(asked))
            turns.append({})
            for learn in (True, False):
                rows = [n for n in sorted(coming) if chains[n][k].learn == learn]
                if rows:
                    answers = self._act([coming[n] for n in rows], [own[n] for n in rows], learn)
                    turns[-1] |= zip(rows, answers, strict=True)
        return turns

    def _act(self, documents: Sequence[Document], seeds: Sequence[int], learn: bool) -> list[Trajectory]:
        needed = learn and self.recipe.method == "grpo"
        who = self.learner.as_it_was() if self.recipe.offline else contextlib.nullcontext(self.system)
        with who as system:
            return act(system, documents, self.sampling, seeds, learn=needed)

    def judge(self, asked: Sequence[Document], turns: Sequence[Mapping[int, Trajectory]]
              ) -> tuple[Tensor, dict[str, float]]:
        """(links, n) values, higher is better, 0 where nothing judges, NaN where a reward cannot tell; and the means by
        name, of what is only watched too."""
        values, told = torch.zeros(len(turns), len(asked)), dict[str, float]()
        for task, links in self.chains.items():
            for k in range(len(links)):
                name = chain_name(task, links[:k + 1])
                rows = [n for n, d in enumerate(asked) if d.task == task]
                found = [turns[k][n] for n in rows]
                if not rows:
                    continue
                if name in self.rewards:
                    values[k, rows] = self._means(f"reward {name}", self.rewards[name], found, told)
                for reward in self.watched[name]:
                    self._means(f"{reward.facts.name} {name}", reward, found, told)
        return values, told

    def _means(self, name: str, reward: Reward, found: Sequence[Trajectory], told: dict[str, float]) -> Tensor:
        values = torch.tensor(gains(reward, reward([t.asked for t in found], [t.made for t in found])))
        if not values.isnan().all():
            told[name] = float(values.nanmean())
        return values

    def iterate(self) -> dict[str, Any]:
        """Ask, answer, judge, learn. Returns what to log."""
        start = time.perf_counter()
        asked, groups, seeds = self.ask()
        turns = self.play(asked, groups, seeds)
        acted = time.perf_counter()
        values, told = self.judge(asked, turns)
        judged, worth = time.perf_counter(), to_go(values)
        known = ~worth[0].isnan()
        line: dict[str, Any] = {"iteration": self.iteration + 1, "failed": int((~known).sum()), **told}
        if known.any():
            line["same in all"] = float(by_group(worth[0][known], groups[known]).zero_std_share)
            line |= self.learn(self.lessons(turns, worth, groups))
        self.iteration, self.answers = self.iteration + 1, self.answers + sum(map(len, turns))
        line |= {"answers": self.answers, "steps": self.steps, "seconds acting": acted - start,
                 "seconds judging": judged - acted, "seconds learning": time.perf_counter() - judged}
        return line

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
        if method == "own":
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
            if not any(x.worth for x in mine) and not (mine and r.method == "grpo" and r.grpo.beta):
                continue  # nothing to learn from
            seed = hash64(r.seed, self.iteration, k) >> 1
            if r.method == "grpo":
                worth = torch.tensor([x.worth for x in mine])
                found |= self.learner.update([x.trajectory for x in mine], worth, fresh=fresh)
            elif r.method == "dpo":
                found |= self.learner.prefer(opposites(mine), r.dpo, seed)
            else:
                found |= self._imitate([x.trajectory.made for x in mine if x.worth > 0], seed)
            fresh, self.steps = False, self.steps + 1
            if self.ema is not None:
                self.ema.update(self.steps)
        return found

    def _imitate(self, made: Sequence[Document], seed: int) -> dict[str, Any]:
        if self.recipe.regions is None:
            return self.learner.imitate(made, seed)
        with self.learner.as_it_was() as judge:
            weighed = self.recipe.regions.weigh(judge, self.system, made)
        if not weighed:
            return {"used": 0}
        return self.learner.imitate([m for m, _ in weighed], seed, [factors for _, factors in weighed])

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self, watch: Callable[[dict[str, Any]], None] | None = None) -> System:
        """Iterate to the end (or until interrupted, after a checkpoint); a finished run leaves `model/`."""
        r = self.recipe
        self.run_folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        config.save(r, self.run_folder / "recipe.yaml")
        metrics = Metrics(self.run_folder, self.iteration)
        progress = Progress(r.iterations, self.iteration, self.run_folder.name)
        with interruptible(self._ask_to_stop), contextlib.closing(metrics), contextlib.closing(progress):
            while self.iteration < r.iterations and not self.stop:
                start = time.perf_counter()
                line = self.iterate()
                self.seconds += time.perf_counter() - start
                line |= {"step": self.iteration, "seconds": round(self.seconds, 3)}
                metrics.write(line)
                progress.step()
                if watch is not None:
                    watch(line)
                if self.iteration % r.save_every == 0 or self.iteration == r.iterations or self.stop:
                    metrics.flush()
                    self.save()
        if self.iteration >= r.iterations:
            self.export()
        return self.system

    def tensors(self) -> checkpoint.Tensors:
        found = {"model": system_tensors(self.system), "optimizer": self.optimizer.tensors()}
        return found | ({"ema": self.ema.shadow} if self.ema is not None else {})

    def save(self) -> None:
        place = {k: getattr(self, k) for k in ("iteration", "answers", "steps", "seconds")}
        state = {"place": place, "recipe": config.to_dict(self.recipe), "torch": torch.__version__}
        checkpoint.save(self.run_folder, self.iteration, self.tensors(), state, self.recipe.keep)

    def resume(self) -> None:
        checkpoint.clean(self.run_folder)
        folder = checkpoint.latest(self.run_folder)
        if folder is None:
            return
        state = checkpoint.read_state(folder)
        changed = differences(state["recipe"], config.to_dict(self.recipe))
        fatal = [c for c in changed if c.split(".")[0] not in FREE]
        if fatal:
            raise config.ConfigError(f"{folder}: expected the recipe this run was started with, got changes in "
                                     f"{', '.join(fatal)}; fix: give the run another name, or change these back")
        checkpoint.load(folder, self.tensors())
        for name, value in state["place"].items():
            setattr(self, name, value)
        log.info("continuing %s at iteration %d", self.run_folder.name, self.iteration)
        event(self.run_folder, "resumed", step=self.iteration, changed=changed)

    def export(self) -> None:
        """Write the aligned system to `model/`: averaged weights if there are any, LoRA merged."""
        with self.ema.swapped() if self.ema is not None else contextlib.nullcontext():
            if self.recipe.lora is not None:
                lora.save(self.system, self.run_folder / "lora")
                lora.merge(self.system)
            save_system(self.system, self.run_folder / "model")
        event(self.run_folder, "finished", step=self.iteration)

    def _ask_to_stop(self) -> None:
        self.stop = True


def chain_name(task: str, links: Sequence[Link]) -> str:
    """How rewards and figures of the last of these links are called: the task, or "draw > answer"."""
    return " > ".join([task, *(link.follow for link in links[1:])])


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
