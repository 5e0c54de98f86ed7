"""Running a study: every arm with every seed is trained, measured and written down; what is there is not done again.

    FOLDER/shared/NAME/run/         what all arms start from
    FOLDER/cache/                   answers that arms of a seed share
    FOLDER/ARM-SEED/run/            the training, resumable; its checkpoints go once all is measured
    FOLDER/ARM-SEED/JOB/            what comes behind it, the same
    FOLDER/ARM-SEED/result.json     what was measured, with the resolved recipe and the cost
"""
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from diptych import config
from diptych.adapters.published import open_model
from diptych.alignment import start
from diptych.alignment.game import Contest
from diptych.alignment.recipe import Align
from diptych.ledger.entry import Cost, Entry
from diptych.ledger.interval import Metric, mean
from diptych.replication.study import MODEL, RUN, Arm, Context, Finding, Job, Measured, Study, shared_model
from diptych.systems import table
from diptych.systems.base import System
from diptych.systems.io import load_system
from diptych.training.plan import plan
from diptych.training.recipe import Recipe
from diptych.training.trainer import Trainer

log = logging.getLogger("diptych.replication")

QUICK_STEPS = 3  # of every stage in a short run, or iterations of an alignment
T = TypeVar("T", bound=Recipe | Align | Contest)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One arm with one seed."""

    arm: str
    seed: int
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    recipe: dict[str, Any] = field(default_factory=dict)
    then: dict[str, dict[str, Any]] = field(default_factory=dict)  # recipes of the jobs behind it, by name


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All cells of a study with what they say about its claims."""

    study: Study
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    quick: bool
    shared: tuple[Cell, ...] = ()

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
            control = [0.0] * len(treatment)
            if claim.control:
                control = self.values(claim.control, claim.against or claim.metric)
            out.append(Finding.of(claim, treatment, control, self.study.units.get(claim.metric, "")))
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
        recipes = {"arms": {c.arm: c.recipe for c in self.cells if c.seed == self.seeds[0]}}
        behind = {c.arm: c.then for c in self.cells if c.seed == self.seeds[0] and c.then}
        recipes |= {"then": behind} if behind else {}
        recipes |= {"shared": {c.arm: c.recipe for c in self.shared}} if self.shared else {}
        costs = [c.cost for c in (*self.shared, *self.cells)]
        total = _sum(costs)
        # what it is about: the system, or the method, that it is named after, whatever it trains
        return Entry(name=f"claim-{study.name}", kind="claim", system=study.name, level="E2",
                     recipe=recipes, seeds=self.seeds, cost=total, metrics=metrics,
                     verdicts={f.claim.text: f.verdict for f in findings}, note=study.about)


def recipe_of(study: Study, arm: Arm, seed: int, quick: bool = False) -> Recipe | Align | Contest:
    """The resolved recipe of a cell: what all share, what sets the arm apart, the seed."""
    recipe = _changed(study.recipe, {**arm.changes, "seed": seed}, where=f"arm {arm.name} of {study.name}")
    return _short(recipe, study.quick, study) if quick else recipe


def _changed(recipe: T, changes: Mapping[str, Any], where: str) -> T:
    plain = config.override(config.to_dict(recipe), [f"{k}={json.dumps(v)}" for k, v in changes.items()])
    return config.from_dict(type(recipe), plain, where=where)


def _short(recipe: T, changes: Mapping[str, Any], study: Study) -> T:
    if isinstance(recipe, Recipe):
        stages = tuple(replace(s, steps=min(s.steps, QUICK_STEPS), warmup=0) for s in recipe.stages)
        short: Any = replace(recipe, stages=stages)
    else:
        short = replace(recipe, iterations=min(recipe.iterations, QUICK_STEPS))
    return _changed(short, changes, where=f"quick run of {study.name}")


def run(study: Study, folder: str | Path, *, seeds: Sequence[int] | None = None, quick: bool = False,
        device: str = "cpu", again: bool = False) -> Outcome:
    """Do what is not done yet. Seeds come one after the other with all arms of each, so that an interrupted study is
    as even as possible. `again` measures trained models anew."""
    folder = Path(folder)
    seeds = tuple(study.seeds if seeds is None else seeds)[: 1 if quick else None]
    shared, cells = [], []
    for name, recipe in study.shared.items():
        log.info("%s: %s, for all arms", study.name, name)
        changes = study.quick_shared or (study.quick if isinstance(study.recipe, Recipe) else {})
        cell = Cell(arm=name, seed=recipe.seed, recipe=_plain(_short(recipe, changes, study) if quick else recipe))
        shared.append(_cell(cell, folder, folder / "shared" / name, device))
    for number, seed in enumerate(seeds):
        for arm in study.arms:
            if arm.fixed and number:
                first = next(c for c in cells if c.arm == arm.name)
                cells.append(replace(first, seed=seed, cost=Cost(), recipe=_plain(recipe_of(study, arm, seed, quick))))
                continue
            log.info("%s: %s, seed %d (%d of %d)", study.name, arm.name, seed,
                     number * len(study.arms) + study.arms.index(arm) + 1, len(seeds) * len(study.arms))
            place, recipe = folder / f"{arm.name}-{seed}", recipe_of(study, arm, seed, quick)
            context = Context(arm=arm, recipe=recipe, seed=seed, folder=place, quick=quick)
            cell = Cell(arm=arm.name, seed=seed, recipe=_plain(recipe))
            cells.append(_cell(cell, folder, place, device, arm.then, context,
                               lambda s, c=context: study.measure(s, c), again))
    return Outcome(study=study, seeds=seeds, cells=tuple(cells), quick=quick, shared=tuple(shared))


def _plain(recipe: Recipe | Align | Contest) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict(recipe)))


def _cell(cell: Cell, study: Path, folder: Path, device: str, then: Sequence[Job] = (), context: Context | None = None,
          measure: Callable[[System], Measured] = lambda system: {}, again: bool = False) -> Cell:
    """The cell with its cost and figures, trained and measured unless `folder` holds them."""
    path = folder / "result.json"
    if path.is_file():
        found = config.from_dict(Cell, json.loads(path.read_text()), str(path))
        if not _same(found.recipe, cell.recipe):
            raise ValueError(f"expected {path} to come from this study's recipe, got another; "
                             f"fix: give another folder, or delete {folder}")
        if not again:
            return found
        cell = found
        made = [folder / name / MODEL for name in (RUN, *(job.name for job in then if not job.beside))]
        model = [place for place in made if place.is_dir()][-1]
    else:
        cell = replace(cell, cost=_run(_recipe(cell.recipe, folder), folder / RUN, study, device))
        model = folder / RUN / MODEL
        for job in then:
            assert context is not None
            system = _load(model, cell.recipe, device)
            recipe = job.recipe(system, context)
            if recipe is not None:
                cost = _run(recipe, folder / job.name, study, device, None if job.beside else system)
                told = json.loads(json.dumps(_plain(recipe)).replace(f"{study}/", ""))  # wherever the study lies
                cell = replace(cell, cost=_sum([cell.cost, cost]), then=cell.then | {job.name: told})
                model = model if job.beside else folder / job.name / MODEL
    metrics, curves = _split(measure(_load(model, cell.recipe, device)))
    cell = replace(cell, metrics=metrics, curves=curves)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(config.to_dict(cell), indent=1))
    temporary.replace(path)
    for checkpoint in folder.glob("*/step-*"):
        shutil.rmtree(checkpoint)
    return cell


def _load(model: Path, recipe: Mapping[str, Any], device: str) -> System:
    cls = table.find(recipe["system"]) if "system" in recipe else None
    return load_system(model, cls=cls, device=device).eval()


def _same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether both say the same, with what an older version did not know at its default."""
    try:
        return _recipe(found, Path()) == _recipe(wanted, Path())
    except config.ConfigError:
        return False


def _recipe(plain: Mapping[str, Any], folder: Path) -> Recipe | Align | Contest:
    if "system" in plain:
        return config.from_dict(Recipe, plain, where=str(folder))
    return start.read(plain, str(folder))


def _run(recipe: Recipe | Align | Contest, place: Path, study: Path, device: str, system: System | None = None) -> Cost:
    """Train, align or play to the end, or go on to it; of `system`, if there is one, instead of what the recipe names.
    Threads are for whoever starts the run to say."""
    recipe = replace(recipe, threads=0)
    if isinstance(recipe, Recipe):
        recipe = replace(recipe, init=_located(recipe.init, study))
        if recipe.objective is not None:
            options = _located(recipe.objective.options, study)
            recipe = replace(recipe, objective=replace(recipe.objective, options=options))
        trainer = Trainer(recipe, place, system=system, device=device)
        trainer.run()
        if trainer.stop:
            raise KeyboardInterrupt
        done = trainer.place
        return Cost(flops=plan(recipe, device).flops, tokens=done.tokens, documents=done.documents,
                    seconds=round(done.seconds, 1))
    if isinstance(recipe, Align) and recipe.offline and recipe.method in ("best", "own"):
        recipe = replace(recipe, cache=str(study / "cache"))  # all arms of a seed learn from the same answers
    system = system or open_model(_located(recipe.model, study), device=device)
    loop = start.start(recipe, system, place)
    loop.run()
    if loop.stop:
        raise KeyboardInterrupt
    # documents are what the model made to learn from; FLOPs of acting and learning are not counted
    return Cost(documents=loop.answers, seconds=round(loop.seconds, 1))


def _sum(costs: Sequence[Cost]) -> Cost:
    """Of the jobs of one arm: what one of them did not count is missing from the sum of that."""
    return Cost(flops=sum(c.flops or 0.0 for c in costs), tokens=sum(c.tokens or 0 for c in costs),
                documents=sum(c.documents or 0 for c in costs), seconds=sum(c.seconds or 0.0 for c in costs))


def _located(value: Any, study: Path) -> Any:
    """Plain data with the places of what is shared: "@NAME" is the model of a shared training, "@NAME#part" a part."""
    if isinstance(value, dict):
        return {k: _located(v, study) for k, v in value.items()}
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    name, hash_, part = value[1:].partition("#")
    return f"{shared_model(study, name)}{hash_}{part}"


def _split(measured: Measured) -> tuple[dict[str, float], dict[str, list[float]]]:
    metrics = {k: float(v) for k, v in measured.items() if isinstance(v, int | float)}
    curves = {k: [float(x) for x in v] for k, v in measured.items() if not isinstance(v, int | float)}
    return metrics, curves
