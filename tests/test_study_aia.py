"""The study of AIA: arms of a family differ in their objective alone, and what is measured is what it says."""
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from filling import filled

from diptych import config
from diptych.alignment.attention import AttentionLoss, Schedule
from diptych.alignment.attention import Stage as Level
from diptych.parts.resources import SHIPPED
from diptych.replication.runner import recipe_of
from diptych.replication.studies import aia as study
from diptych.replication.study import Context
from diptych.systems.io import load_system, save_system
from diptych.systems.table import find
from diptych.training.recipe import Recipe
from diptych.training.stages import matches

FAMILIES = tuple(study.CONFIG)


def resolved(arm: str) -> Recipe:
    found = recipe_of(study.STUDY, study.STUDY.arm(arm), 0)
    assert isinstance(found, Recipe)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_arms_differ_in_their_objective_alone(family: str) -> None:
    recipes = {arm.name: resolved(arm.name) for arm in study.STUDY.arms if arm.name.startswith(f"{family}: ")}
    plain = [{k: v for k, v in config.to_dict(r).items() if k != "objective"} for r in recipes.values()]
    assert len(plain) == 4 and all(p == plain[0] for p in plain)
    alone = recipes[f"{family}: alone"]
    assert alone.objective is None and alone.system == family
    for name, r in recipes.items():
        if r.objective is not None:
            made = config.from_dict(AttentionLoss, r.objective.options, name)
            assert made.specialists is not None and made.specialists.draw == f"@{family}-draws"
            assert set(made.ratios) == {"draw", "read"}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_learnt_goes_on_from_the_bundled_model(family: str) -> None:
    recipe, cls = resolved(f"{family}: alone"), cast(Any, find(family))
    with torch.device("meta"):
        model = cls(config.merge(cls.small(), recipe.config, where="a study"))
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert shapes == {n: p.shape for n, p in load_system(SHIPPED / f"{family}-grid").named_parameters()}
    assert all(matches(n, list(recipe.init)) for n in shapes)
    assert {part: place for part, place in recipe.init.items() if part in study.LEARNT[family]} == {
        part: f"zoo/{family}-grid#{part}" for part in study.LEARNT[family]}
    for kind in ("draw", "read"):
        specialist = study.SHARED[f"{family}-{kind}s"]
        assert specialist.config == recipe.config and list(specialist.data[0].tasks) == [study.TASKS[kind]]
        assert not set(study.LEARNT[family]) & set(specialist.init), "from scratch"


@pytest.mark.parametrize("family", FAMILIES)
def test_distance_and_overhead(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls: Any = find(family)
    torch.manual_seed(0)
    model = filled(cls(cls.tiny())).eval()
    for kind in ("draw", "read"):
        save_system(model, tmp_path / "shared" / f"{family}-{kind}s" / "run" / "model")
    arm = study.STUDY.arm(f"{family}: alone")
    context = Context(arm=arm, recipe=resolved(arm.name), seed=0, folder=tmp_path / "arm", quick=True)
    flat = {kind: Schedule(stages=(Level(first=0, target=1.0, delta=0.1),)) for kind in ("draw", "read")}
    monkeypatch.setattr(study, "STAGES", 2)
    found = study.looks(model, context)
    assert all(0 < v < 1 for k in ("draw", "read") for v in found[f"looks to {k}"])
    assert found["distance"] < 0.1, "its own specialist"
    monkeypatch.setattr(study.Specialists, "schedules", lambda self, device: flat)
    far = study.looks(model, context)
    for kind in ("draw", "read"):
        mean = sum(found[f"looks to {kind}"]) / 2
        assert far[f"distance to {kind}"] == pytest.approx(1 - mean, abs=1e-5)
    assert study.overhead(model, context)["time of a step, times"] > 0.5
    assert all(p.grad is None for p in model.parameters())
