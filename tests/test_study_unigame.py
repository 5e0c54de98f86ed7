"""The study of UniGame: what sets its arms apart, and its figures on a model that is not taught yet."""
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filling import filled

from diptych import config
from diptych.alignment.game import Contest
from diptych.replication import runner
from diptych.replication.studies import unigame as study
from diptych.replication.study import Arm, Claim, Context, Study
from diptych.systems.janus import Janus
from diptych.training.recipe import Recipe, Source, Stage


def resolved(arm: str) -> Contest:
    found = runner.recipe_of(study.STUDY, study.STUDY.arm(arm), 0)
    assert isinstance(found, Contest)
    return found


@pytest.mark.parametrize("family", [of.name for of in study.FAMILIES])
def test_arms_take_as_many_steps_on_as_many_questions(family: str) -> None:
    found = {arm.name.partition(": ")[2]: resolved(arm.name) for arm in study.STUDY.arms if arm.name.startswith(family)}
    assert found["start"].iterations == 0
    rest = [r for name, r in found.items() if name != "start"]
    assert len({(r.iterations, r.batch, r.digging.batch, r.lr, r.model, r.world) for r in rest}) == 1
    assert {(r.hard, r.rival.kind) for r in rest} == {("seen", "learnt"), ("drawn", "random"), ("features", "learnt"),
                                                      ("drawn", "learnt")}
    plain = [{k: v for k, v in config.to_dict(r).items() if k not in ("hard", "rival")} for r in rest]
    assert all(p == plain[0] for p in plain)


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = filled(Janus(Janus.tiny())).eval()
    monkeypatch.setattr(study, "ASKED", 4)
    monkeypatch.setattr(study, "DRAWN", 2)
    context = Context(arm=study.STUDY.arm("janus: sft"), recipe=replace(resolved("janus: sft"), world="few"), seed=0,
                      folder=tmp_path, quick=True)
    found = study.measure(model, context)
    assert set(study.STUDY.units) == set(found) and all(-1 <= float(v) <= 1 for v in found.values())  # type: ignore[arg-type]
    assert {c.metric for c in study.STUDY.claims} <= set(found)
    with pytest.raises(ValueError, match="to judge some of 0"):
        study.mean_of(study.SceneScore(), [], [])


def test_arms_play_from_what_was_taught_once(tmp_path: Path) -> None:
    taught = Recipe(system="janus", data=(Source(world="few", tasks={"draw": 1, "question": 1}),), workers=0,
                    stages=(Stage(steps=1, batch=2, lr=1e-3, freeze=("codec", "vision")),))
    recipe = replace(study.RECIPE, model="@janus", world="few", batch=2, iterations=1, digging=replace(
        study.RECIPE.digging, batch=1, count=1, mining=replace(study.RECIPE.digging.mining, tau=0.0), sampling={}))
    small = Study(name="small", title="", about="", recipe=recipe, shared={"janus": taught},
                  measure=lambda system, context: {"size": system.num_parameters()},
                  arms=(Arm(name="start", about="", control=True, changes={"iterations": 0}),
                        Arm(name="game", about="")),
                  claims=(Claim(text="as large", metric="size", treatment="game", control="start"),))
    outcome = runner.run(small, tmp_path, seeds=(0,))
    start, game = outcome.cells
    assert start.metrics == game.metrics and start.cost.documents == 0 and game.cost.documents == 2
    files = [tmp_path / f"{name}-0" / "run" / "model" / "model.safetensors" for name in ("start", "game")]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert (tmp_path / "shared" / "janus" / "run" / "model").is_dir()
