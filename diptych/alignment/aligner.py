"""The loop of alignment: ask, answer several times, judge, learn; resumable like a training.

Iteration k asks documents k * prompts ... of the world's training split, each `group` times with seeds that are a
function of (seed, k, place); nothing else is random. A checkpoint holds tensors and the number of the iteration.
"""
import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych import config
from diptych.alignment.advantages import best_of_group, by_group, group_advantages
from diptych.alignment.learner import Learner
from diptych.alignment.policy import Trajectory, act
from diptych.alignment.recipe import FREE, Align
from diptych.alignment.rewards.base import Reward
from diptych.alignment.rewards.table import make
from diptych.data.mix import Mixture
from diptych.data.order import hash64
from diptych.data.sources import WorldSource
from diptych.document import Document
from diptych.systems.base import Sampling, System
from diptych.systems.io import save_system, system_tensors
from diptych.training import checkpoint, lora
from diptych.training.ema import Ema
from diptych.training.optim import AdamW, clip, gradient_norm
from diptych.training.progress import Metrics, Progress, event, interruptible
from diptych.training.recipe import Stage, differences
from diptych.training.stages import fixed_names, trained_names

log = logging.getLogger("diptych.alignment")


class Aligner:
    """`Aligner(recipe, system, folder).run()` aligns to the end, going on at the newest checkpoint in the folder.

    `rewards` (task -> reward) replace those that the recipe names.
    """

    def __init__(self, recipe: Align, system: System, run: str | Path, *,
                 rewards: Mapping[str, Reward] | None = None) -> None:
        self.recipe, self.system, self.run_folder = recipe, system.eval(), Path(run)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.rewards = dict(rewards or {task: make(a.reward, **a.options) for task, a in recipe.tasks.items()})
        tasks = {task: a.weight for task, a in recipe.tasks.items()}
        self.stream = Mixture([(WorldSource(recipe.world, tasks, "train"), 1.0)], hash64(recipe.seed, 7, 0) >> 1)
        self.sampling: Sampling = config.merge(system.default_sampling(), recipe.sampling, "sampling")
        reference = copy.deepcopy(system).requires_grad_(False) if recipe.grpo.beta and recipe.lora is None else None
        if recipe.lora is not None:
            lora.attach(system, recipe.lora.layers, recipe.lora.rank, recipe.lora.alpha, seed=recipe.seed)
        stage = Stage(steps=recipe.iterations, batch=recipe.prompts, lr=recipe.lr, freeze=recipe.freeze,
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
        seeds = [hash64(r.seed, self.iteration, n) >> 1 for n in range(len(asked))]
        return asked, groups, seeds

    def judge(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """(n,) values, higher is better; NaN where a reward cannot tell."""
        values = torch.full((len(trajectories),), math.nan)
        for task, reward in self.rewards.items():
            rows = [n for n, t in enumerate(trajectories) if t.asked.task == task]
            if rows:
                scores = reward([trajectories[n].asked for n in rows], [trajectories[n].made for n in rows])
                values[rows] = torch.tensor([reward.facts.sign * s.value for s in scores])
        return values

    def iterate(self) -> dict[str, Any]:
        """Ask, answer, judge, learn. Returns what to log."""
        start = time.perf_counter()
        asked, groups, seeds = self.ask()
        trajectories = act(self.system, asked, self.sampling, seeds)
        acted = time.perf_counter()
        rewards = self.judge(trajectories)
        judged, known = time.perf_counter(), ~rewards.isnan()
        line: dict[str, Any] = {"iteration": self.iteration + 1, "failed": int((~known).sum())}
        if known.any():
            for task in self.rewards:
                own = torch.tensor([t.asked.task == task for t in trajectories]) & known
                if own.any():
                    line[f"reward {task}"] = float(rewards[own].mean())
            line["same in all"] = float(by_group(rewards[known], groups[known]).zero_std_share)
            line |= self.learn(trajectories, rewards, groups, known)
        self.iteration, self.answers = self.iteration + 1, self.answers + len(asked)
        line |= {"answers": self.answers, "steps": self.steps, "seconds acting": acted - start,
                 "seconds judging": judged - acted, "seconds learning": time.perf_counter() - judged}
        return line

    def learn(self, trajectories: Sequence[Trajectory], rewards: Tensor, groups: Tensor, known: Tensor
              ) -> dict[str, Any]:
        r = self.recipe
        advantages = torch.zeros(len(trajectories))
        if r.method == "best":
            spread = by_group(rewards[known], groups[known])
            apart = spread.std[spread.index] > 0  # of equals none is the best
            advantages[known] = best_of_group(rewards[known], groups[known]) * apart
        else:
            g = r.grpo
            advantages[known] = group_advantages(rewards[known], groups[known], spread=g.spread, unbiased=g.unbiased,
                                                 eps=g.eps).clamp(-g.largest, g.largest)
        found: dict[str, Any] = {}
        for k, part in enumerate(torch.arange(r.prompts).chunk(r.updates)):
            rows = torch.isin(groups, part) & known
            chosen = [trajectories[n] for n in torch.nonzero(rows).flatten().tolist()]
            if not bool(advantages[rows].any()) and not (r.method == "grpo" and r.grpo.beta):
                continue  # nothing to learn from
            if r.method == "best":
                found |= self._copy([t.made for t, a in zip(chosen, advantages[rows], strict=True) if a > 0], k)
            else:
                found |= self.learner.update(chosen, advantages[rows], fresh=k == 0)
            self.steps += 1
            if self.ema is not None:
                self.ema.update(self.steps)
        return found

    def _copy(self, documents: Sequence[Document], k: int) -> dict[str, Any]:
        """One step of the usual training loss on what the model made itself."""
        generator = torch.Generator(self.system.device).manual_seed(hash64(self.recipe.seed, self.iteration, k) >> 1)
        self.optimizer.zero_grad()
        losses = self.system.loss(self.system.collate(documents).to(self.system.device), generator)
        losses.total().backward()
        parameters = list(self.optimizer.named.values())
        norm = gradient_norm(parameters)
        clip(parameters, norm, self.recipe.optimizer.clip)
        self.optimizer.step_unless(~torch.isfinite(norm))
        return {"loss": float(losses.total().detach()), "grad_norm": float(norm), "used": len(documents)}

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
