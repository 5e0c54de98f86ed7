"""The study of AIA: arms of a family differ in their objective alone, and what is measured is what it says."""
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from filling import filled

from diptych import config
from diptych.alignment.attention import AttentionLoss, Schedule
from diptych.alignment.attention import Stage as Level
from diptych.replication.runner import recipe_of
from diptych.replication.studies import aia as study
from diptych.replication.study import Context
from diptych.systems.io import save_system
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
    recipes = {arm.name: resolved(arm.name) for arm in study.STUDY.arms if arm.name.startswith(family)}
    plain = [{k: v for k, v in config.to_dict(r).items() if k != "objective"} for r in recipes.values()]
    assert len(plain) == 4 and all(p == plain[0] for p in plain)
    assert recipes[family].objective is None and recipes[family].system == family
    for name, r in recipes.items():
        if r.objective is not None:
            made = config.from_dict(AttentionLoss, r.objective.options, name)
            assert made.specialists is not None and made.specialists.draw == f"@{family}-draws"
            assert set(made.ratios) == {"draw", "read"}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_learnt_goes_on_from_the_shared_start(family: str) -> None:
    recipe, begun, cls = resolved(family), study.SHARED[family], cast(Any, find(family))
    with torch.device("meta"):
        models = [cls(config.merge(cls.small(), r.config, where="a study")) for r in (recipe, begun)]
    names = [{n: p.shape for n, p in m.named_parameters()} for m in models]
    assert names[0] == names[1] and all(matches(n, list(recipe.init)) for n in names[0])
    for kind in ("draw", "read"):
        alone = study.SHARED[f"{family}-{kind}s"]
        assert alone.config == begun.config and list(alone.data[0].tasks) == [study.TASKS[kind]]


@pytest.mark.parametrize("family", FAMILIES)
def test_distance_and_overhead(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls: Any = find(family)
    torch.manual_seed(0)
    model = filled(cls(cls.tiny())).eval()
    for kind in ("draw", "read"):
        save_system(model, tmp_path / "shared" / f"{family}-{kind}s" / "run" / "model")
    context = Context(arm=study.STUDY.arm(family), recipe=resolved(family), seed=0, folder=tmp_path / "arm", quick=True)
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
