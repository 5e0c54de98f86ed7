import json
from dataclasses import replace
from pathlib import Path

import pytest
import training_system as small

from diptych import replication
from diptych.ledger.entry import read_entry, write_entry
from diptych.replication import page, runner
from diptych.replication.study import Arm, Claim, Context, Finding, Study
from diptych.systems import table
from diptych.training.recipe import Source, Stage


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Study:
    row = table.Row(title="Tiny", paper="", year=2025, home="training_system:TinyText", levels=(), about="a test")
    monkeypatch.setitem(table.TABLE, "tiny-text", row)
    line = json.dumps([{"role": "user", "content": "say it"}, {"role": "assistant", "content": "red circle"}])
    (tmp_path / "a.jsonl").write_text((line + "\n") * 8)
    recipe = small.recipe(data=(Source(messages=str(tmp_path / "a.jsonl")),), save_every=2,
                          stages=(Stage(steps=4, batch=4, lr=1e-2),))

    def measure(system: small.TinyText, context: Context) -> dict[str, object]:
        width = system.config.width
        return {"width": width, "noisy": width + context.seed * 100.0, "curve": [0.0, float(width)]}

    return Study(name="tiny", title="Width", about="Wider is wider.", recipe=recipe, measure=measure,
                 arms=(Arm(name="narrow", about="as it is", control=True),
                       Arm(name="wide", about="twice the width", changes={"config.width": 32})),
                 claims=(Claim(text="wider", metric="width", treatment="wide", control="narrow", margin=10),
                         Claim(text="half as wide", metric="width", treatment="wide", control="narrow", ratio=True,
                               better="lower", margin=0.9),
                         Claim(text="noisy", metric="noisy", treatment="wide", margin=120)),
                 quick={"stages.0.batch": 2})


def verdict(treatment: list[float], control: list[float], **changes: object) -> str:
    claim = Claim(text="c", metric="m", treatment="t", control="c")
    return Finding.of(replace(claim, **changes), treatment, control).verdict


def test_verdicts() -> None:
    assert verdict([0.9, 0.91, 0.92], [0.5, 0.52, 0.5]) == "reproduced"
    assert verdict([0.5, 0.52, 0.5], [0.9, 0.91, 0.92]) == "not reproduced"
    assert verdict([0.9, 0.5, 0.7], [0.6, 0.7, 0.5]) == "inconclusive"
    assert verdict([0.9], [0.1]) == "inconclusive", "one seed has no interval"
    assert verdict([0.9, 0.91, 0.92], [0.5, 0.52, 0.5], better="lower") == "not reproduced"
    assert verdict([0.49, 0.5, 0.52], [0.5, 0.51, 0.52], margin=-0.05) == "reproduced", "little is lost"
    assert verdict([1.0, 1.1, 0.9], [4.0, 4.4, 3.6], better="lower", ratio=True, margin=3.5) == "reproduced"
    assert verdict([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], margin=1.0) == "inconclusive", "equal to the margin is not above"
    assert verdict([1.0, 1.0, 1.0], [0.5, 0.5, 0.5]) == "reproduced", "exact figures need no interval"
    assert verdict([0.5, 0.6, 0.5], [0.25, 0.35, 0.25]) == "inconclusive", "noise that cancels by chance is not exact"


def test_pairs_by_seed_cancel_what_seeds_share() -> None:
    control = [0.1, 0.5, 0.9]
    assert verdict([c + d for c, d in zip(control, (0.05, 0.06, 0.055), strict=True)], control) == "reproduced"


def test_a_study_runs_resumes_and_is_written(study: Study, tmp_path: Path) -> None:
    outcome = runner.run(study, tmp_path / "run")
    assert [(c.arm, c.seed) for c in outcome.cells] == [(a, s) for s in (0, 1, 2) for a in ("narrow", "wide")]
    assert [f.verdict for f in outcome.findings()] == ["reproduced", "not reproduced", "inconclusive"]
    assert outcome.cells[1].recipe["config"] == {"width": 32} and outcome.cells[1].recipe["seed"] == 0
    cost = outcome.cost("wide")
    assert cost.documents == 16 and cost.flops > outcome.cost("narrow").flops
    assert not list((tmp_path / "run").glob("*/run/step-*")) and (tmp_path / "run/wide-2/run/model").is_dir()

    made = page.write(outcome, tmp_path / "page")
    text = made.read_text()
    assert "| wider | 16 | above 10 | reproduced |" in text and "**not reproduced**" in text
    assert "`config.width=32`" in text
    assert (tmp_path / "page/tiny.png").stat().st_size > 5000 and (tmp_path / "page/tiny-curves.png").is_file()

    entry = outcome.entry()
    assert entry.verdicts == {"wider": "reproduced", "half as wide": "not reproduced", "noisy": "inconclusive"}
    assert entry.level == "E2" and entry.metrics["wide: width"].value == 32 and entry.cost.documents == 6 * 16
    assert read_entry(write_entry(entry, tmp_path / "ledger")) == entry

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("result.json")}
    (tmp_path / "run/wide-1/result.json").unlink()
    again = runner.run(study, tmp_path / "run")
    assert again.findings() == outcome.findings()
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("result.json")}
    assert [p.parent.name for p in after if after[p] != before[p]] == ["wide-1"]
    older = tmp_path / "run/wide-1/result.json"
    known = json.loads(older.read_text())
    del known["recipe"]["accumulate"]  # as before there was such a thing
    older.write_text(json.dumps(known))
    assert runner.run(study, tmp_path / "run").findings() == outcome.findings()
    with pytest.raises(ValueError, match="another folder"):
        runner.run(replace(study, recipe=replace(study.recipe, seed=5, ema=0.5)), tmp_path / "run")


def test_an_arm_that_no_seed_moves_is_made_once(study: Study, tmp_path: Path) -> None:
    still = replace(study, arms=(replace(study.arms[0], fixed=True), study.arms[1]), claims=study.claims[:2])
    outcome = runner.run(still, tmp_path)
    assert {p.parent.name for p in tmp_path.rglob("result.json")} == {"narrow-0", "wide-0", "wide-1", "wide-2"}
    assert outcome.values("narrow", "noisy") == [16, 16, 16] and outcome.values("wide", "noisy") == [32, 132, 232]
    assert outcome.entry().cost.documents == 4 * 16, "what was not made costs nothing"


def test_two_measures_of_one_arm_are_compared(study: Study, tmp_path: Path) -> None:
    """What is compared is done with the same model, so no arm has to be a control."""
    within = Claim(text="wider than it is", metric="noisy", against="width", treatment="wide", control="wide", margin=1)
    found = replace(study, claims=(within,), arms=(study.arms[1],))
    outcome = runner.run(found, tmp_path / "run")
    [finding] = outcome.findings()
    assert finding.effect.value == pytest.approx(100.0) and outcome.values("wide", "width") == [32, 32, 32]
    assert "noisy" in page.markdown(outcome) and page.write(outcome, tmp_path / "page").is_file()
    with pytest.raises(ValueError, match="control"):
        replace(found, claims=(replace(within, against=""),))


def test_quick_runs_prove_nothing(study: Study, tmp_path: Path) -> None:
    outcome = runner.run(study, tmp_path / "run", quick=True)
    assert [c.seed for c in outcome.cells] == [0, 0]
    assert outcome.cells[0].cost.documents == 2 * runner.QUICK_STEPS, "few steps, and what the study changes"
    assert {f.verdict for f in outcome.findings()} == {"inconclusive"}
    assert "proves nothing" in page.markdown(outcome)
    with pytest.raises(ValueError, match="full run"):
        outcome.entry()


def test_arms_start_from_what_is_trained_once(study: Study, tmp_path: Path) -> None:
    begun = replace(study.recipe, seed=9, ema=0.0)
    late = Arm(name="late", about="starts trained", changes={"init": {"blocks": "@begun#blocks"}})
    shared = replace(study, shared={"begun": begun}, arms=(study.arms[0], late), claims=())
    outcome = runner.run(shared, tmp_path / "run", seeds=(0, 1))
    [begin] = outcome.shared
    assert begin.cost.documents == 16 and begin.seed == 9
    assert outcome.cells[1].recipe["init"] == {"blocks": "@begun#blocks"}, "a result does not depend on its folder"
    assert outcome.entry().cost.documents == 5 * 16 and "begun" in outcome.entry().recipe["shared"]
    assert outcome.cells[0].metrics == outcome.cells[1].metrics
    with pytest.raises(FileNotFoundError, match="weights of"):
        runner.run(replace(shared, shared={}), tmp_path / "other")


def test_what_is_trained_can_be_measured_again(study: Study, tmp_path: Path) -> None:
    first = runner.run(study, tmp_path / "run", seeds=(0,))
    wider = replace(study, measure=lambda system, context: {**study.measure(system, context), "seen": 1.0})
    assert runner.run(wider, tmp_path / "run", seeds=(0,)).cells == first.cells, "what is there stays"
    second = runner.run(wider, tmp_path / "run", seeds=(0,), again=True)
    assert [c.metrics for c in second.cells] == [{**c.metrics, "seen": 1.0} for c in first.cells]
    assert [c.cost for c in second.cells] == [c.cost for c in first.cells], "nothing was trained"


def test_mistakes_in_studies_are_named(study: Study, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'wider'"):
        replace(study, claims=(replace(study.claims[0], treatment="wider"),))
    with pytest.raises(ValueError, match="at least 3 seeds"):
        replace(study, seeds=(0, 1))
    with pytest.raises(ValueError, match="control"):
        replace(study, arms=study.arms[1:], claims=())
    outcome = runner.run(replace(study, claims=(replace(study.claims[0], metric="depth"),)), tmp_path, quick=True)
    with pytest.raises(ValueError, match="'depth' to be measured"):
        outcome.findings()
    with pytest.raises(ValueError, match="study out of"):
        replication.find("nothing")


@pytest.mark.parametrize("name", replication.names())
def test_every_study_states_arms_that_resolve(name: str) -> None:
    found = replication.find(name)
    assert found.name == name
    recipes = [runner.recipe_of(found, arm, 0) for arm in found.arms]
    assert len({str(r) for r in recipes}) == len(recipes)
