"""One update of a policy from answers and what they were worth: by their advantages, by preference, or as examples."""
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diptych.alignment import surrogate
from diptych.alignment.policy import Gap, Trajectory, compare, recall
from diptych.alignment.preference import Pair, Preference, error_log_prob
from diptych.alignment.recipe import Grpo
from diptych.alignment.through import answer_loss
from diptych.document import Document, Text
from diptych.objectives.decisions import Decision
from diptych.systems.base import Sampling, System
from diptych.systems.bidirectional import Bidirectional
from diptych.systems.coded import Coded
from diptych.systems.packed import Packed
from diptych.training import lora
from diptych.training.optim import AdamW


class Learner:
    """`reference`: the model as it was, for the distance to it; a system with LoRA attached is its own, without."""

    def __init__(self, system: System, optimizer: AdamW, settings: Grpo, sampling: Sampling, *, largest_norm: float,
                 micro: int, reference: System | None = None) -> None:
        self.system, self.optimizer, self.settings, self.sampling = system, optimizer, settings, sampling
        self.largest_norm, self.micro, self.reference = largest_norm, micro, reference

    def update(self, trajectories: Sequence[Trajectory], advantages: Tensor, *, fresh: bool) -> dict[str, Any]:
        """One step. `fresh`: the weights are those that acted, so log-probs must be the rollout's (ArithmeticError if
        they are not) and every ratio is 1; the gaps are told then."""
        update = self.begin(fresh=fresh)
        update.add(trajectories, advantages)
        return update.end()

    def begin(self, *, fresh: bool, count: int | None = None) -> "Update":
        """An update to which answers are added: all at once, or, if `count` says how many there will be, in parts.
        Gradients are the same to the last bit."""
        if count is not None and self.settings.reduction not in ("sequence", "sequence_sum"):
            raise ValueError("expected reduction sequence or sequence_sum of answers in parts, got "
                             f"{self.settings.reduction}: what they weigh depends on all")
        self.optimizer.zero_grad()
        return Update(self, fresh, count)

    def imitate(self, documents: Sequence[Document], seed: int, emphasis: Sequence[Tensor | None] | None = None
                ) -> dict[str, Any]:
        """One step of the loss that the system was trained with, on these documents; `emphasis` weighs the tokens of
        their drawings (as `Packed.collate` has it)."""
        if emphasis is None:
            batch = self.system.collate(documents)
        elif isinstance(self.system, Packed):
            batch = self.system.collate(documents, emphasis)
        else:
            raise ValueError(f"expected a system that weighs the tokens of a drawing, got {type(self.system).__name__}")
        generator = torch.Generator(self.system.device).manual_seed(seed)
        self.optimizer.zero_grad()
        total = self.system.loss(batch.to(self.system.device), generator).total()
        total.backward()
        return {"loss": float(total.detach()), **self.step(), "used": len(documents)}

    def prefer(self, pairs: Sequence[tuple[Trajectory, Trajectory]], preference: Preference, seed: int
               ) -> dict[str, Any]:
        """One step towards the first of each pair. What stands for a log-likelihood is the sum over the decisions that
        made the answer, or over the tokens of one that is given, or, of pictures drawn by flow, minus half the squared
        error at a time and noise that both of a pair share (Diffusion-DPO, arXiv 2311.12908)."""
        sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
        self.optimizer.zero_grad()
        size = max(1, self.micro // 2)
        for start in range(0, len(pairs), size):
            part = pairs[start:start + size]
            both = [chosen for chosen, _ in part] + [rejected for _, rejected in part]
            seeds = [seed + start + n for n in range(len(part))] * 2
            reference = None
            if preference.needs_reference:
                with torch.no_grad(), self.as_it_was() as system:
                    value, sizes = self._likelihoods(system, both, seeds)
                    reference = Pair.of(value / sizes if preference.normalised else value)
            value, sizes = self._likelihoods(self.system, both, seeds)
            nll = -Pair.of(value / sizes).chosen
            found = preference(Pair.of(value / sizes if preference.normalised else value), reference, nll)
            (found.losses.sum() / len(pairs)).backward()
            told = {"loss": found.losses.detach().mean(), "accuracy": found.accuracy, "margin": found.margin}
            for name, mean in told.items():
                sums[name] += float(mean) * len(part) / len(pairs)
        return {**sums, **self.step(), "used": 2 * len(pairs)}

    def through(self, drawings: Sequence[Trajectory], questions: Sequence[Document], seed: int, tau: float
                ) -> dict[str, Any]:
        """One step towards the true answers to questions about drawings, through the codes of these drawings."""
        total = 0.0
        self.optimizer.zero_grad()
        for start in range(0, len(questions), self.micro):
            part = slice(start, start + self.micro)
            asked = questions[part]
            loss = answer_loss(self.system, drawings[part], asked, self.sampling, seed + start, tau)
            loss = loss * len(asked) / len(questions)
            loss.backward()
            total += float(loss.detach())
        return {"loss": total, **self.step(), "used": len(questions)}

    def _likelihoods(self, system: System, trajectories: Sequence[Trajectory], seeds: Sequence[int]
                     ) -> tuple[Tensor, Tensor]:
        """(n,) log-likelihoods, comparable within one kind of answer, and (n,) how many decisions or tokens they are
        sums over: a half where they are minus half a mean error."""
        out: dict[int, Tensor] = {}
        sizes = [0.5] * len(trajectories)
        stepwise = [n for n, t in enumerate(trajectories) if t.decisions and "flow" not in t.kinds]
        if stepwise:
            again = recall(system, [trajectories[n] for n in stepwise], self.sampling)
            for n, found in zip(stepwise, again, strict=True):
                each = torch.cat([d.log_prob for d in found])
                out[n], sizes[n] = each.sum(), len(each)
        for n, (trajectory, seed) in enumerate(zip(trajectories, seeds, strict=True)):
            if n in out:
                continue
            if _scored(system, trajectory):
                each = system.score([trajectory.made]).values[0]
                out[n], sizes[n] = each.sum(), len(each)
                continue
            generator = torch.Generator(system.device).manual_seed(seed)
            mean = system.loss(system.collate([trajectory.made]).to(system.device), generator).mean()
            if "image" not in mean:
                raise ValueError(f"expected {type(system).__name__} to draw, or to decide step by step, got neither in "
                                 f"a document of task {trajectory.made.task!r}")
            out[n] = error_log_prob(mean["image"])
        values = torch.stack([out[n] for n in range(len(trajectories))])
        return values, values.new_tensor(sizes)

    def step(self) -> dict[str, Any]:
        norm, bad = self.optimizer.clipped_step(self.largest_norm)
        return {"grad_norm": float(norm), "skipped": bool(bad)}

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[System]:
        """The system before anything was learnt."""
        if self.reference is not None:
            yield self.reference
            return
        with lora.inactive(self.system):
            yield self.system


class Update:
    """An update by advantages in the making. Answers are learnt from in micro-batches of those that teach something, in
    the order they come, whatever the parts."""

    def __init__(self, learner: Learner, fresh: bool, count: int | None) -> None:
        self.learner, self.fresh, self.count = learner, fresh, count
        self.waiting: list[tuple[Trajectory, Tensor, Tensor]] = []
        self.sums: dict[str, float] = {}
        self.gaps: list[dict[str, Gap]] = []
        self.used = 0

    def add(self, trajectories: Sequence[Trajectory], advantages: Tensor) -> None:
        """`advantages` (n,)."""
        weights, micro = self._weights(trajectories), self.learner.micro
        self.waiting += [(t, a, w) for t, a, w in zip(trajectories, advantages, weights, strict=True)
                         if float(a) != 0 or self.learner.settings.beta]
        while len(self.waiting) >= micro:
            self._learn(self.waiting[:micro])
            self.waiting = self.waiting[micro:]

    def end(self) -> dict[str, Any]:
        """The step, and what to tell of it."""
        if self.waiting:
            self._learn(self.waiting)
        told = {"gaps": _widest(self.gaps)} if self.fresh else {}
        return {**self.sums, **self.learner.step(), "used": self.used, **told}

    def _learn(self, part: Sequence[tuple[Trajectory, Tensor, Tensor]]) -> None:
        chosen = [trajectory for trajectory, _, _ in part]
        again = recall(self.learner.system, chosen, self.learner.sampling)
        if self.fresh:
            self.gaps.append(compare(chosen, again, self.learner.settings.bound))
        reference = self._reference(chosen)
        loss = torch.zeros((), device=self.learner.system.device)
        for i, (trajectory, advantage, weights) in enumerate(part):
            own = None if reference is None else reference[i]
            loss = loss + self._loss(trajectory, again[i], own, advantage, weights)
        loss.backward()
        self.used += len(part)

    def _weights(self, trajectories: Sequence[Trajectory]) -> list[Tensor]:
        """What every decision weighs under the reduction: its derivative by that decision. Of answers in parts, rows
        that are still to come stand for the others."""
        rows = len(trajectories) if self.count is None else self.count
        longest = max((len(t.log_probs) for t in trajectories), default=1)
        mask = torch.zeros(rows, longest, dtype=torch.bool)
        mask[len(trajectories):, 0] = True
        for row, t in zip(mask, trajectories, strict=False):
            row[: len(t.log_probs)] = True
        values = torch.zeros(mask.shape, requires_grad=True)
        [found] = torch.autograd.grad(surrogate.reduce(values, mask, self.learner.settings.reduction), values)
        return [row[: len(t.log_probs)] for row, t in zip(found, trajectories, strict=False)]

    def _loss(self, old: Trajectory, new: Sequence[Decision], reference: Sequence[Decision] | None, advantage: Tensor,
              weights: Tensor) -> Tensor:
        settings, total = self.learner.settings, torch.zeros((), device=self.learner.system.device)
        parted = weights.split([len(now.log_prob) for now in new])
        for kind in dict.fromkeys(now.kind for now in new):  # all of a kind at once: they may be many and small
            own = [k for k, now in enumerate(new) if now.kind == kind]
            log_prob, before = (torch.cat([d[k].log_prob for k in own]) for d in (new, old.decisions))
            w = torch.cat([parted[k] for k in own]).to(log_prob.device)
            cut, worth = settings.clip(kind), advantage.to(w.device)
            losses = surrogate.surrogate(log_prob, before, worth, cut)
            parts = {"loss": losses, "clipped": ((log_prob - before).exp() - 1).abs() > cut.high}
            if reference is not None:
                parts["kl"] = self._distance([new[k] for k in own], [reference[k] for k in own])
                losses = losses + settings.beta * parts["kl"]
            total = total + (w * losses).sum()
            for name, value in parts.items():
                self.sums[name] = self.sums.get(name, 0.0) + float((w * value.detach()).sum())
        return total

    def _distance(self, now: Sequence[Decision], then: Sequence[Decision]) -> Tensor:
        """(m,) of decisions of one kind."""
        if now[0].kind == "flow":  # both are known exactly
            return torch.cat([a.about.kl(b.about).flatten() for a, b in zip(now, then, strict=True)])
        return surrogate.kl(torch.cat([d.log_prob for d in now]), torch.cat([d.log_prob for d in then]),
                            self.learner.settings.estimator, self.learner.settings.clamp)

    @torch.no_grad()
    def _reference(self, trajectories: Sequence[Trajectory]) -> list[list[Decision]] | None:
        if not self.learner.settings.beta:
            return None
        with self.learner.as_it_was() as system:
            return recall(system, trajectories, self.learner.sampling)


def _scored(system: System, trajectory: Trajectory) -> bool:
    """Whether an answer that is given, not just made, has a likelihood token by token."""
    if trajectory.decisions or type(system).score is System.score or isinstance(system, Bidirectional):
        return False  # what is masked says one thing or another by which places are hidden: an error, which pairs share
    words = all(isinstance(piece, Text) for piece in trajectory.made.targets)
    return words or (isinstance(system, Coded) and system.scores_codes)


def _widest(gaps: Sequence[dict[str, Gap]]) -> dict[str, dict[str, float]]:
    """Over micro-batches, by kind: the largest, and the mean over all decisions."""
    found: dict[str, dict[str, float]] = {}
    for kind in sorted({k for g in gaps for k in g}):
        own = [g[kind] for g in gaps if kind in g]
        count = sum(g.count for g in own)
        found[kind] = {"largest": max(g.largest for g in own), "count": count,
                       "mean": math.fsum(g.mean * g.count for g in own) / count}
    return found
