"""Which back end, schedule and placement a run has: choices of the run, not of its recipe, since none changes what is
learnt.

    collocated      all on the same accelerators, one after the other
    disaggregated   each on its own, one stage after the other: rollout, judging, update
    pipelined       on their own; while a part of the prompts is judged, and learnt from, the next is rolled out

    "rollout: 0; reward: 1; learner: 0-1:0"     a line of `alignment.placement` for each role, between semicolons
"""
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from diptych.alignment.placement import Placement, PlacementError, components, sharing
from diptych.alignment.recipe import Align
from diptych.alignment.rewards.base import Reward
from diptych.alignment.workers.crew import Blueprint, Crew, Place, SerialCrew
from diptych.alignment.workers.roles import Referee, Rollout, Student
from diptych.alignment.workers.wire import Slot
from diptych.systems.base import Sampling, System
from diptych.systems.io import system_tensors

Backend = Literal["serial", "process", "ray"]
Schedule = Literal["collocated", "disaggregated", "pipelined"]
ROLES = ("rollout", "reward", "learner")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """`parts`: the prompts of an iteration are answered and judged in so many batches, whatever the schedule; answers
    of other parts are the same up to the rounding of batched kernels. `stream`: an update is begun with the parts that
    are judged. `placement`: a PLACE for each role; without, one worker of each. `address`: the cluster to join."""

    backend: Backend = "serial"
    schedule: Schedule = "collocated"
    placement: Mapping[str, str] = field(default_factory=dict)
    parts: int = 1
    stream: bool = False
    address: str = ""

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"expected at least one part, got {self.parts}")
        if self.stream and self.schedule != "pipelined":
            raise ValueError(f"expected a pipelined schedule to stream answers to the learner, got {self.schedule}")
        if self.backend == "serial" and self.placement:
            raise ValueError("expected a placement for workers that have places, got the serial back end; "
                             "fix: backend=process or ray")
        if self.address and self.backend != "ray":
            raise ValueError(f"expected the ray back end for an address, got {self.backend}")

    def check(self, recipe: Align) -> None:
        """An error where this recipe cannot be run so."""
        if self.parts > recipe.prompts:
            raise ValueError(f"expected at most a part per prompt ({recipe.prompts}), got {self.parts}")
        if not self.stream:
            return
        learnt = {k for ask in recipe.tasks.values() for k, link in enumerate(ask.links) if link.learn}
        if (recipe.method != "grpo" or recipe.updates > 1 or recipe.grpo.spread == "batch" or len(learnt) > 1
                or recipe.grpo.reduction not in ("sequence", "sequence_sum")):
            raise ValueError("expected streamed answers to weigh the same whatever comes after them: method=grpo, "
                             "updates=1, grpo.spread=group or none, grpo.reduction=sequence or sequence_sum, one "
                             "learnt link; fix: one of these, or no streaming")

    def places(self, kind: str, threads: int) -> dict[str, list[Place]]:
        """Of the workers of every role, in order."""
        count = available(kind, self)
        lines = dict(self.placement) or self._usual(count)
        found = components(lines, count)
        if set(found) != set(ROLES) or not all(p.workers for p in found.values()):
            raise PlacementError(f"expected a place for each of {', '.join(ROLES)}, got "
                                           f"{', '.join(found) or 'nothing'}")
        if len(found["learner"].workers) > 1:
            raise PlacementError(f"expected one learner, got {len(found['learner'].workers)} in "
                                           f"{lines!r}; fix: learner: 0-1:0 is one on two")
        self._check_sharing(found)
        if kind != "cpu" and (wide := [n for n, p in found.items() if any(len(a) > 1 for a in p.workers.values())]):
            raise PlacementError(f"expected one device for a worker, got more for {', '.join(wide)}")
        return {role: [Place(a, kind, threads) for _, a in sorted(found[role].workers.items())] for role in ROLES}

    def _usual(self, count: int) -> dict[str, str]:
        """All on all; or acting on the first half and judging on the second, learning on all."""
        if self.schedule == "collocated":
            return {",".join(ROLES): f"0-{count - 1}:0"}
        if count < 2:
            raise PlacementError(f"expected two accelerators to place a {self.schedule} crew on, got {count};"
                                           " fix: schedule=collocated")
        half = (count + 1) // 2
        return {"rollout": f"0-{half - 1}:0", "reward": f"{half}-{count - 1}:0", "learner": f"0-{count - 1}:0"}

    def _check_sharing(self, found: Mapping[str, Placement]) -> None:
        if self.schedule == "collocated":
            if sharing(found) != "collocated":
                raise PlacementError("expected all roles on the same accelerators, got others; "
                                               "fix: schedule=disaggregated or pipelined")
        elif found["rollout"].accelerators & found["reward"].accelerators:
            raise PlacementError("expected rollout and reward on different accelerators, got shared ones; "
                                           "fix: schedule=collocated, or another placement")


def read_placement(text: str) -> dict[str, str]:
    """ "rollout: 0; reward: 1" -> {"rollout": "0", "reward": "1"}"""
    found: dict[str, str] = {}
    for line in filter(None, (part.strip() for part in text.split(";"))):
        names, colon, place = line.partition(":")
        if not colon or not place.strip():
            raise PlacementError(f"expected ROLE: PLACE, got {line!r} in {text!r}")
        if names.strip() in found:
            raise PlacementError(f"expected every role once, got {names.strip()!r} twice in {text!r}")
        found[names.strip()] = place.strip()
    return found


def available(kind: str, workers: Workers) -> int:
    """Cores or devices to place workers on."""
    if workers.backend == "ray":
        from diptych.alignment.workers import on_ray

        return on_ray.accelerators(kind, workers.address)
    if kind != "cpu":
        return getattr(torch, kind).device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_crew(workers: Workers, recipe: Align, system: System, sampling: Sampling,
              rewards: Mapping[str, Reward] | None) -> Crew:
    """The workers of a run. In this process they share `system`; elsewhere each has its own, equal to it."""
    workers.check(recipe)
    if workers.backend == "serial":
        student = Student(recipe, system, sampling, device=str(system.device))
        rollout = Rollout(recipe, system, sampling, was=student.learner.as_it_was, device=str(system.device))
        return SerialCrew({"rollout": rollout, "reward": Referee(recipe, rewards), "learner": student})
    kind = system.device.type
    places = workers.places(kind, torch.get_num_threads())
    system.cpu()
    slot = Slot(system_tensors(system)) if workers.backend == "process" else None
    given: dict[str, Any] = {"recipe": recipe, "system": system, "sampling": sampling, "slot": slot}
    blueprints = {
        "rollout": [Blueprint(Rollout, {**given, "device": p.device}, p) for p in places["rollout"]],
        "reward": [Blueprint(Referee, {"recipe": recipe, "rewards": rewards}, p) for p in places["reward"]],
        "learner": [Blueprint(Student, {**given, "device": p.device}, p) for p in places["learner"]]}
    if workers.backend == "ray":
        from diptych.alignment.workers.on_ray import RayCrew

        return RayCrew(blueprints, workers.address)
    from diptych.alignment.workers.process import ProcessCrew

    try:
        crew = ProcessCrew(blueprints)
        crew.slot = slot
        return crew
    finally:
        assert slot is not None
        slot.close()  # all have it open by now
