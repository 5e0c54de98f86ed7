"""Stages: which parameters a stage trains, at which rate, and where in its schedule it is."""
import difflib
import fnmatch
import math
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from diptych.training.recipe import Stage


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted name, or anything above it, is spelled by one of the patterns (`*` as in file names)."""
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, p + ".*") for p in patterns)


def check_patterns(names: Sequence[str], patterns: Iterable[str], what: str) -> None:
    for pattern in patterns:
        if not any(matches(n, [pattern]) for n in names):
            above = {".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 2)}
            near = difflib.get_close_matches(pattern, sorted(above), n=1, cutoff=0.4)
            hint = f"; fix: did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"expected {what} to name parameters, got {pattern!r} which names none{hint}")


def trained_names(system: nn.Module, stage: Stage, fixed: Collection[str] = ()) -> set[str]:
    """Names of the parameters a stage trains; `fixed` ones, which the system was built not to train, never."""
    names = [n for n, p in system.named_parameters() if p.is_floating_point()]
    check_patterns(names, stage.freeze, f"freeze of stage {stage.name!r}")
    check_patterns(names, stage.only, f"only of stage {stage.name!r}")
    check_patterns(names, stage.rates, f"rates of stage {stage.name!r}")
    check_patterns([n for n in names if n not in fixed], stage.only, f"only of stage {stage.name!r} (fixed ones aside)")
    chosen = {n for n in names if (not stage.only or matches(n, stage.only)) and not matches(n, stage.freeze)}
    chosen -= set(fixed)
    if not chosen:
        raise ValueError(f"expected stage {stage.name!r} to train something, got everything frozen")
    return chosen


def fixed_names(system: nn.Module) -> frozenset[str]:
    """Parameters that do not require gradients as built."""
    return frozenset(n for n, p in system.named_parameters() if not p.requires_grad)


def rate_factor(name: str, stage: Stage) -> float:
    factor = 1.0
    for pattern, value in stage.rates.items():
        if matches(name, [pattern]):
            factor = value
    return factor


def lr_at(stage: Stage, step: int) -> float:
    """Learning rate of the 0-based `step` within its stage."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    if stage.schedule == "constant":
        return stage.lr
    start = max(stage.warmup, stage.steps - round(stage.decay * stage.steps))
    done = min(max(step - start, 0) / max(stage.steps - start, 1), 1.0)
    fall = (1 + math.cos(math.pi * done)) / 2 if stage.schedule == "cosine" else 1 - done
    return stage.lr * (stage.floor + (1 - stage.floor) * fall)
