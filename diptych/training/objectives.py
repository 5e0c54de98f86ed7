"""What a training minimises: the system's own loss, or one that looks on and adds terms of its own.

    objective: {name: attention, options: {weights: {draw: 5, read: 10}}}

The table is plain and its entries are imported lazily: training knows none of them. An entry is a function
`prepare(system, options)`, which says what does not fit.
"""
import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from diptych import config
from diptych.systems.base import Losses, System
from diptych.training.recipe import Objective

TABLE: dict[str, str] = {
    "attention": "diptych.alignment.attention:prepare",
    "likeness": "diptych.alignment.likeness:prepare",
}


class Goal(Protocol):
    """Deterministic given the batch, the generator and its `state`, which changes between steps only: then steps may be
    cut into parts and runs go on exactly."""

    def __call__(self, system: Any, batch: Any, generator: torch.Generator) -> Losses: ...

    def counts(self, system: Any, batch: Any) -> dict[str, float] | None:
        """Of every term, before the forward pass; None where only that will tell."""
        ...

    def after_step(self, losses: Losses) -> None:
        """Told the sums and counts of every whole step."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class Own:
    """The system's own loss."""

    def __call__(self, system: System, batch: Any, generator: torch.Generator) -> Losses:
        return system.loss(batch, generator)

    def counts(self, system: System, batch: Any) -> dict[str, float] | None:
        return getattr(batch, "counts", None)

    def after_step(self, losses: Losses) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        pass


def make(objective: Objective | None, system: System) -> Goal:
    """As a recipe names it."""
    if objective is None:
        return Own()
    if objective.name not in TABLE:
        raise config.unknown_key(objective.name, TABLE, "objective.name")
    module, _, function = TABLE[objective.name].partition(":")
    return getattr(importlib.import_module(module), function)(system, objective.options)


def tell(goal: Goal, losses: Losses, mesh: Any = None) -> None:
    """After a step: what it gave in all processes, where anything is learnt from that."""
    if mesh is not None and not isinstance(goal, Own):
        from diptych.training import parallel

        losses = parallel.sum_losses(losses, mesh)
    goal.after_step(losses)
