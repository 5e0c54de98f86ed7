"""One update of a policy from answers and what they were worth."""
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diptych.alignment import surrogate
from diptych.alignment.policy import Gap, Trajectory, compare, recall
from diptych.alignment.recipe import Grpo
from diptych.objectives.decisions import Decision
from diptych.systems.base import Sampling, System
from diptych.training import lora
from diptych.training.optim import AdamW, clip, gradient_norm


class Learner:
    """`reference`: the model as it was, for the distance to it; a system with LoRA attached is its own, without."""

    def __init__(self, system: System, optimizer: AdamW, settings: Grpo, sampling: Sampling, *, largest_norm: float,
                 micro: int, reference: System | None = None) -> None:
        self.system, self.optimizer, self.settings, self.sampling = system, optimizer, settings, sampling
        self.largest_norm, self.micro, self.reference = largest_norm, micro, reference

    def update(self, trajectories: Sequence[Trajectory], advantages: Tensor, *, fresh: bool) -> dict[str, Any]:
        """One step. `fresh`: the weights are those that acted, so log-probs must be the rollout's (ArithmeticError if
        they are not) and every ratio is 1."""
        sums: dict[str, float] = {}
        gaps: list[dict[str, Gap]] = []
        self.optimizer.zero_grad()
        scale = self._weights(trajectories)
        useful = [n for n in range(len(trajectories)) if float(advantages[n]) != 0 or self.settings.beta]
        for start in range(0, len(useful), self.micro):
            part = useful[start:start + self.micro]
            chosen = [trajectories[n] for n in part]
            again = recall(self.system, chosen, self.sampling)
            if fresh:
                gaps.append(compare(chosen, again, self.settings.bound))
            reference = self._reference(chosen)
            loss = torch.zeros((), device=self.system.device)
            for i, n in enumerate(part):
                own = None if reference is None else reference[i]
                loss = loss + self._loss(chosen[i], again[i], own, advantages[n], scale[n], sums)
            loss.backward()
        norm = gradient_norm(list(self.optimizer.named.values()))
        bad = ~torch.isfinite(norm)
        clip(list(self.optimizer.named.values()), norm, self.largest_norm)
        self.optimizer.step_unless(bad)
        return {**sums, "grad_norm": float(norm), "skipped": bool(bad), "used": len(useful), "gaps": _widest(gaps)}

    def _weights(self, trajectories: Sequence[Trajectory]) -> list[Tensor]:
        """What every decision weighs under the reduction: its derivative by that decision."""
        longest = max(len(t.log_probs) for t in trajectories)
        mask = torch.zeros(len(trajectories), longest, dtype=torch.bool)
        for row, t in zip(mask, trajectories, strict=True):
            row[: len(t.log_probs)] = True
        values = torch.zeros(mask.shape, requires_grad=True)
        [found] = torch.autograd.grad(surrogate.reduce(values, mask, self.settings.reduction), values)
        return [row[: len(t.log_probs)] for row, t in zip(found, trajectories, strict=True)]

    def _loss(self, old: Trajectory, new: Sequence[Decision], reference: Sequence[Decision] | None, advantage: Tensor,
              weights: Tensor, sums: dict[str, float]) -> Tensor:
        total, at = torch.zeros((), device=self.system.device), 0
        for k, (before, now) in enumerate(zip(old.decisions, new, strict=True)):
            w = weights[at:at + len(now.log_prob)].to(now.log_prob.device)
            at += len(now.log_prob)
            cut, worth = self.settings.clip(now.kind), advantage.to(w.device)
            losses = surrogate.surrogate(now.log_prob, before.log_prob, worth, cut)
            parts = {"loss": losses, "clipped": ((now.log_prob - before.log_prob).exp() - 1).abs() > cut.high}
            if reference is not None:
                parts["kl"] = self._distance(now, reference[k])
                losses = losses + self.settings.beta * parts["kl"]
            total = total + (w * losses).sum()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float((w * value.detach()).sum())
        return total

    def _distance(self, now: Decision, then: Decision) -> Tensor:
        if now.kind == "flow":  # both are known exactly
            return now.about.kl(then.about).flatten()
        return surrogate.kl(now.log_prob, then.log_prob, self.settings.estimator)

    @torch.no_grad()
    def _reference(self, trajectories: Sequence[Trajectory]) -> list[list[Decision]] | None:
        if not self.settings.beta:
            return None
        with self._as_it_was() as system:
            return recall(system, trajectories, self.sampling)

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[System]:
        if self.reference is not None:
            yield self.reference
            return
        with lora.inactive(self.system):
            yield self.system


def _widest(gaps: Sequence[dict[str, Gap]]) -> dict[str, dict[str, float]]:
    """Over micro-batches, by kind: the largest, and the mean over all decisions."""
    found: dict[str, dict[str, float]] = {}
    for kind in sorted({k for g in gaps for k in g}):
        own = [g[kind] for g in gaps if kind in g]
        count = sum(g.count for g in own)
        found[kind] = {"largest": max(g.largest for g in own), "count": count,
                       "mean": math.fsum(g.mean * g.count for g in own) / count}
    return found
