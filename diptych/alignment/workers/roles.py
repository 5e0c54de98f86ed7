"""The three who align a model: who acts, who judges, and who learns. None knows where it runs, or who calls it.

    Rollout.play(asked, groups, seeds, numbers) -> turns     for each link the trajectories, by number of the document
    Referee.judge(asked, turns) -> values, told              of every document and link; what is to be reported
    Student.update(...), prefer(...), through(...), imitate(...) -> told
                                                             one step; owns the optimiser, averages and checkpoints
    Student.publish() -> weights,  Rollout.take(weights)

A trajectory holds documents and tensors, so everything between them can be sent anywhere.
"""
import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.alignment.answer_cache import AnswerCache
from diptych.alignment.episodes import follow_up
from diptych.alignment.learner import Learner, Update
from diptych.alignment.policy import Trajectory, act
from diptych.alignment.recipe import Align, Link
from diptych.alignment.rewards.base import Reward, check_independent, gains
from diptych.alignment.rewards.table import make
from diptych.alignment.taught import Taught
from diptych.alignment.workers.wire import Slot, copy_into, on_device
from diptych.document import Document
from diptych.systems.base import Sampling, System
from diptych.systems.io import system_tensors
from diptych.training import checkpoint, lora
from diptych.training.recipe import Stage

Turns = list[dict[int, Trajectory]]


class Rollout:
    """Acts with its system, or, where the model as it was answers all along, with that: `was` opens it, by default the
    system without its LoRA. `slot` is where weights are found that are not sent."""

    def __init__(self, recipe: Align, system: System, sampling: Sampling, *,
                 was: Callable[[], AbstractContextManager[System]] | None = None, slot: Slot | None = None,
                 device: str = "cpu") -> None:
        self.recipe, self.system, self.sampling, self.slot = recipe, system.eval().to(device), sampling, slot
        self.chains = {task: ask.links for task, ask in recipe.tasks.items()}
        self.was = was or self._without
        self.cache = AnswerCache(recipe.cache, system) if recipe.cache else None

    def play(self, asked: Sequence[Document], groups: Tensor, seeds: Sequence[Sequence[int]], numbers: Sequence[int]
             ) -> Turns:
        """The episodes that these documents begin: for each link the answers, by the number of the episode. `groups`
        (n,); `seeds` of every link and document; `numbers` that the rules choose by, of every link."""
        chains = [self.chains[d.task] for d in asked]
        turns: Turns = []
        for k in range(max(map(len, chains))):
            coming = dict[int, Document](enumerate(asked)) if not k else {}
            for rule in sorted({c[k].follow for c in chains if len(c) > k and k}):
                rows = [n for n, c in enumerate(chains) if len(c) > k and c[k].follow == rule]
                made = [turns[-1][n].made for n in rows]
                coming |= zip(rows, follow_up(rule, made, groups[rows], numbers[k]), strict=True)
            turns.append({})
            for learn in (True, False):
                rows = [n for n in sorted(coming) if chains[n][k].learn == learn]
                if rows:
                    answers = self._act([coming[n] for n in rows], [seeds[k][n] for n in rows], learn)
                    turns[-1] |= zip(rows, answers, strict=True)
        return turns

    def take(self, weights: Mapping[str, Tensor] | Sequence[str]) -> None:
        """The learner's weights, or the names of those that it left in the slot."""
        if self.recipe.offline:
            return
        if not isinstance(weights, Mapping):
            assert self.slot is not None
            weights = {name: self.slot.views[name] for name in weights}
        copy_into(system_tensors(self.system), weights)

    def _act(self, documents: Sequence[Document], seeds: Sequence[int], learn: bool) -> list[Trajectory]:
        needed = learn and self.recipe.method in ("grpo", "through")
        with self.was() if self.recipe.offline else contextlib.nullcontext(self.system) as system:
            def answer() -> list[Trajectory]:
                return act(system, documents, self.sampling, seeds, learn=needed)

            if self.cache is None:
                return answer()
            made = self.cache.answers(documents, self.sampling, seeds, lambda: [t.made for t in answer()])
            return [Trajectory(d, m, s, ()) for d, m, s in zip(documents, made, seeds, strict=True)]

    @contextlib.contextmanager
    def _without(self) -> Any:
        with lora.inactive(self.system):
            yield self.system


class Referee:
    """Judges what was made. `rewards` replace those that the recipe names: by task, or by the whole chain."""

    def __init__(self, recipe: Align, rewards: Mapping[str, Reward] | None = None) -> None:
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

    def judge(self, asked: Sequence[Document], turns: Sequence[Mapping[int, Trajectory]]
              ) -> tuple[Tensor, dict[str, list[float]]]:
        """(links, n) values, higher is better, 0 where nothing judges, NaN where a reward cannot tell; and all values
        by name, of what is only watched too."""
        values, told = torch.zeros(len(turns), len(asked)), dict[str, list[float]]()
        for task, links in self.chains.items():
            for k in range(len(links)):
                name = chain_name(task, links[:k + 1])
                rows = [n for n, d in enumerate(asked) if d.task == task]
                if not rows:
                    continue
                found = [turns[k][n] for n in rows]
                if name in self.rewards:
                    told[f"reward {name}"] = own = self._gains(self.rewards[name], found)
                    values[k, rows] = torch.tensor(own)
                for reward in self.watched[name]:
                    told[f"{reward.facts.name} {name}"] = self._gains(reward, found)
        return values, told

    @staticmethod
    def _gains(reward: Reward, found: Sequence[Trajectory]) -> list[float]:
        return gains(reward, reward([t.asked for t in found], [t.made for t in found]))


class Student:
    """Learns, and keeps what learning needs. The system that it is given is the one that learns; LoRA is attached to it
    already where the recipe has some."""

    def __init__(self, recipe: Align, system: System, sampling: Sampling, *, slot: Slot | None = None,
                 device: str = "cpu") -> None:
        self.recipe, self.system, self.slot = recipe, system.eval().to(device), slot
        apart = recipe.needs_reference and recipe.lora is None
        reference = copy.deepcopy(self.system).requires_grad_(False) if apart else None
        stage = Stage(steps=max(recipe.iterations, 1), batch=recipe.prompts, lr=recipe.lr, freeze=recipe.freeze,
                      only=recipe.only)
        self.taught = Taught(self.system, recipe, stage)
        self.optimizer = self.taught.optimizer
        self.learner = Learner(self.system, self.optimizer, recipe.grpo, sampling, micro=recipe.micro,
                               largest_norm=recipe.optimizer.clip, reference=reference)
        self.cache = AnswerCache(recipe.cache, system) if recipe.cache else None
        self.streaming: Update | None = None

    # -- one step each: `step` is its number, from 1 on ----------------------------------------------------------------

    def update(self, trajectories: Sequence[Trajectory], worth: Tensor, fresh: bool, step: int) -> dict[str, Any]:
        return self._stepped(step, self.learner.update(self._here(trajectories), worth, fresh=fresh))

    def prefer(self, pairs: Sequence[tuple[Trajectory, Trajectory]], seed: int, step: int) -> dict[str, Any]:
        return self._stepped(step, self.learner.prefer(pairs, self.recipe.dpo, seed))

    def through(self, drawings: Sequence[Trajectory], questions: Sequence[Document], seed: int, step: int
                ) -> dict[str, Any]:
        told = self.learner.through(self._here(drawings), questions, seed, self.recipe.tau)
        return self._stepped(step, told)

    def imitate(self, made: Sequence[Document], seed: int, step: int) -> dict[str, Any]:
        found, factors = list(made), None
        if self.recipe.regions is not None:
            with self.learner.as_it_was() as judge:
                weighed = self.recipe.regions.weigh(judge, self.system, made, self.cache)
            found, factors = [m for m, _ in weighed], [f for _, f in weighed]
        told = self.learner.imitate(found, seed, factors) if found else {"used": 0}
        return self._stepped(step, told)

    def begin(self, count: int) -> None:
        """An update whose answers come in parts, `count` altogether."""
        self.streaming = self.learner.begin(fresh=True, count=count)

    def add(self, trajectories: Sequence[Trajectory], worth: Tensor) -> None:
        assert self.streaming is not None
        self.streaming.add(self._here(trajectories), worth)

    def end(self, step: int) -> dict[str, Any]:
        """The step of the update that was begun."""
        assert self.streaming is not None
        return self._stepped(step, self.streaming.end())

    def drop(self) -> None:
        """Forget the update that was begun."""
        self.streaming = None
        self.optimizer.zero_grad()

    def _stepped(self, step: int, told: dict[str, Any]) -> dict[str, Any]:
        self.taught.average(step)
        return told

    def _here(self, trajectories: Sequence[Trajectory]) -> Sequence[Trajectory]:
        if self.system.device.type == "cpu":
            return trajectories
        return [replace(t, decisions=on_device(t.decisions, self.system.device)) for t in trajectories]

    # -- weights -------------------------------------------------------------------------------------------------------

    def publish(self, every: bool = False) -> dict[str, Tensor] | list[str]:
        """What is trained, or every tensor, for those who act: in the slot, with their names, or as they are."""
        found = system_tensors(self.system)
        if not every:
            found = {name: found[name] for name in self.optimizer.named}
        if self.slot is None:
            return {name: t.detach().cpu() for name, t in found.items()}
        self.slot.write(found)
        return list(found)

    def save(self, run: Path, iteration: int, state: Mapping[str, Any]) -> None:
        checkpoint.save(run, iteration, self.taught.tensors(), state, self.recipe.keep)

    def load(self, folder: Path) -> None:
        checkpoint.load(folder, self.taught.tensors())

    def export(self, run: Path) -> None:
        self.taught.export(run)


def chain_name(task: str, links: Sequence[Link]) -> str:
    """How rewards and figures of the last of these links are called: the task, or "draw > answer"."""
    return " > ".join([task, *(link.follow for link in links[1:])])
