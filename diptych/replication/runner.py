"""Running a study: every arm with every seed is trained, measured and written down; what is there is not done again.

    FOLDER/ARM-SEED/run/            the training, resumable; its checkpoints go once the model is exported
    FOLDER/ARM-SEED/result.json     what was measured, with the resolved recipe and the cost
"""
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diptych import config
from diptych.ledger.entry import Cost, Entry
from diptych.ledger.interval import Metric, mean
from diptych.replication.study import Arm, Context, Finding, Measured, Study
from diptych.systems.io import load_system
from diptych.training.plan import plan
from diptych.training.recipe import Recipe
from diptych.training.trainer import Trainer

log = logging.getLogger("diptych.replication")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One arm with one seed."""

    arm: str
    seed: int
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All cells of a study with what they say about its claims."""

    study: Study
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    quick: bool

    def values(self, arm: str, metric: str) -> list[float]:
        """By seed; an error names what the study did not measure."""
        found = [c.metrics for c in self.cells if c.arm == arm]
        if any(metric not in m for m in found):
            known = ", ".join(sorted({k for m in found for k in m}))
            raise ValueError(f"expected {metric!r} to be measured of arm {arm!r}, got {known or 'nothing'}")
        return [m[metric] for m in found]

    def metric(self, arm: str, metric: str) -> Metric:
        return mean(self.values(arm, metric), self.study.units.get(metric, ""))

    def metrics(self) -> list[str]:
        return list(dict.fromkeys(k for c in self.cells for k in c.metrics))

    def findings(self) -> list[Finding]:
        out = []
        for claim in self.study.claims:
            treatment = self.values(claim.treatment, claim.metric)
            control = self.values(claim.control, claim.metric) if claim.control else [0.0] * len(treatment)
            out.append(Finding.of(claim, treatment, control))
        return out

    def cost(self, arm: str) -> Cost:
        """Of one seed of an arm; the same for all seeds up to the seconds, which are the mean."""
        costs = [c.cost for c in self.cells if c.arm == arm]
        return replace(costs[0], seconds=sum(c.seconds or 0.0 for c in costs) / len(costs))

    def entry(self) -> Entry:
        """For the ledger: every metric of every arm, and every claim with its verdict."""
        if self.quick:
            raise ValueError("expected a full run for the ledger, got a quick one; fix: leave --quick away")
        study = self.study
        metrics = {f"{a.name}: {m}": self.metric(a.name, m) for a in study.arms for m in self.metrics()
                   if all(m in c.metrics for c in self.cells if c.arm == a.name)}
        findings = self.findings()
        metrics |= {f"effect: {f.claim.text}": f.effect for f in findings}
        arms = {c.arm: c.recipe for c in self.cells if c.seed == self.seeds[0]}
        costs = [c.cost for c in self.cells]
        total = Cost(flops=sum(c.flops or 0.0 for c in costs), tokens=sum(c.tokens or 0 for c in costs),
                     documents=sum(c.documents or 0 for c in costs), seconds=sum(c.seconds or 0.0 for c in costs))
        return Entry(name=f"claim-{study.name}", kind="claim", system=study.recipe.system, level="E2",
                     recipe={"arms": arms}, seeds=self.seeds, cost=total, metrics=metrics,
                     verdicts={f.claim.text: f.verdict for f in findings}, note=study.about)


def recipe_of(study: Study, arm: Arm, seed: int, quick: bool = False) -> Recipe:
    """The resolved recipe of a cell: what all share, what sets the arm apart, the seed."""
    changes = {**arm.changes, **(study.quick if quick else {}), "seed": seed}
    plain = config.override(config.to_dict(study.recipe), [f"{k}={json.dumps(v)}" for k, v in changes.items()])
    return config.from_dict(Recipe, plain, where=f"arm {arm.name} of {study.name}")


def run(study: Study, folder: str | Path, *, seeds: Sequence[int] | None = None, quick: bool = False,
        device: str = "cpu") -> Outcome:
    """Do what is not done yet. Seeds come one after the other with all arms of each, so that an interrupted study is
    as even as possible."""
    folder = Path(folder)
    seeds = tuple(study.seeds if seeds is None else seeds)[: 1 if quick else None]
    cells = []
    for number, seed in enumerate(seeds):
        for arm in study.arms:
            log.info("%s: %s, seed %d (%d of %d)", study.name, arm.name, seed,
                     number * len(study.arms) + study.arms.index(arm) + 1, len(seeds) * len(study.arms))
            cells.append(_cell(study, arm, seed, folder / f"{arm.name}-{seed}", quick, device))
    return Outcome(study=study, seeds=seeds, cells=tuple(cells), quick=quick)


def _cell(study: Study, arm: Arm, seed: int, folder: Path, quick: bool, device: str) -> Cell:
    recipe = recipe_of(study, arm, seed, quick)
    path = folder / "result.json"
    plain = json.loads(json.dumps(config.to_dict(recipe)))
    if path.is_file():
        found = config.from_dict(Cell, json.loads(path.read_text()), str(path))
        if found.recipe != plain:
            raise ValueError(f"expected {path} to come from this study's recipe, got another; "
                             f"fix: give another folder, or delete {folder}")
        return found
    trainer = Trainer(recipe, folder / "run", device=device)
    trainer.run()
    if trainer.stop:
        raise KeyboardInterrupt
    system = load_system(folder / "run" / "model", cls=type(trainer.system), device=device).eval()
    measured = study.measure(system, Context(arm=arm, recipe=recipe, seed=seed, folder=folder, quick=quick))
    metrics, curves = _split(measured)
    place = trainer.place
    cost = Cost(flops=plan(recipe, device).flops, tokens=place.tokens, documents=place.documents,
                seconds=round(place.seconds, 1))
    cell = Cell(arm=arm.name, seed=seed, metrics=metrics, curves=curves, cost=cost, recipe=plain)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(config.to_dict(cell), indent=1))
    temporary.replace(path)
    for checkpoint in (folder / "run").glob("step-*"):
        shutil.rmtree(checkpoint)
    return cell


def _split(measured: Measured) -> tuple[dict[str, float], dict[str, list[float]]]:
    metrics = {k: float(v) for k, v in measured.items() if isinstance(v, int | float)}
    curves = {k: [float(x) for x in v] for k, v in measured.items() if not isinstance(v, int | float)}
    return metrics, curves
