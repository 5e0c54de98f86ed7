"""The studies of judges: equal updates, equal documents, stages that go on where they stopped."""
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from filling import filled
from test_sifting import Replying, thought

from diptych.alignment.aligner import Aligner
from diptych.alignment.recipe import Align, Ask
from diptych.alignment.rewards import table
from diptych.alignment.rewards.base import Reward, gains
from diptych.alignment.rewards.judges import PairJudge
from diptych.alignment.rewards.mining import Contested
from diptych.document import Document, Image
from diptych.parts.resources import SHIPPED
from diptych.replication.measures import judgements
from diptych.replication.runner import recipe_of, run
from diptych.replication.studies import unified_reward as joint
from diptych.replication.studies import unified_reward_think as thinking
from diptych.replication.study import Arm, Context, Job
from diptych.systems.base import System
from diptych.systems.io import load_system, save_system
from diptych.systems.vlm import Vlm
from diptych.training.feed import open_stream
from diptych.world.judging import KINDS

EYES = ("vision", "connector")


def context(folder: Path, study: object = joint, arm: str = "all") -> Context:
    found = study.STUDY  # type: ignore[attr-defined]
    return Context(arm=found.arm(arm), recipe=found.recipe, seed=0, folder=folder, quick=True)


@pytest.mark.parametrize("family, reader, kinds, each", [
    ("", "@reader#trunk", KINDS, joint.EACH), ("show-o: ", "@show-o-reader#trunk", joint.FEW_KINDS, joint.FEWER)])
def test_judges_of_one_kind_make_as_many_updates_on_the_same_documents(
        family: str, reader: str, kinds: Sequence[str], each: int) -> None:
    whole = recipe_of(joint.STUDY, joint.STUDY.arm(f"{family}all"), 0)
    assert whole.init["trunk"] == reader and whole.system == joint.STUDY.shared[reader[1:-6]].system
    assert [s.name for s in whole.data] == list(kinds)
    assert whole.steps * whole.stages[0].batch == each * len(kinds), "each document once"
    for kind in kinds:
        own = recipe_of(joint.STUDY, joint.STUDY.arm(f"{family}{kind}"), 0)
        assert own.stages == whole.stages and own.system == whole.system and own.init == whole.init
        assert own.data == tuple(s for s in whole.data if s.name == kind)
    few = replace(whole, data=tuple(replace(s, documents=4) for s in whole.data))
    read = [d for d in open_stream(few, few.stages[0]).documents_at(0, 24)]
    assert {(d.task.partition("-")[0], d.meta["index"]) for d in read} == {(k, i) for k in kinds for i in range(4)}


def test_arms_that_think_make_as_many_updates() -> None:
    steps = {a.name: recipe_of(thinking.STUDY, a, 0).steps for a in thinking.STUDY.arms}
    behind = thinking.REJECTION + thinking.UPDATES
    formed = thinking.TAUGHT.steps  # once for all arms but the direct one
    assert steps["direct"] == formed + steps["taught"] == formed + steps["think"] + behind
    assert steps["all rows"] == steps["think"]
    starts = {a.name: set(recipe_of(thinking.STUDY, a, 0).init.values()) for a in thinking.STUDY.arms}
    ready = set(joint.READY["janus"].values())  # the codec, of which judging makes no use
    assert all(v.startswith("@judge#") for v in starts["direct"] - ready)
    assert all(v.startswith("@form#") for name in ("taught", "think", "all rows") for v in starts[name] - ready)
    align = thinking.REINFORCED
    assert align.iterations == thinking.UPDATES and align.updates == 1 and set(align.tasks) == set(thinking.THINKING)


def test_what_is_measured_of_a_judge(tmp_path: Path) -> None:
    first = judgements(Replying(lambda d: d.meta["answer"][:-11] + "1 is better"), context(tmp_path), ["draw-pair"])
    assert first["draw-pair"] == 0.5 and first["draw-pair: says the first"] == 1
    assert first["draw-pair: orders agree"] == 0
    right = judgements(Replying(lambda d: d.meta["answer"]), context(tmp_path), ["story-pair", "answer-point"])
    assert right["story-pair"] == right["story-pair: orders agree"] == right["answer-point"] == 1
    assert right["story-pair: says the first"] == 0.5
    said = judgements(Replying(lambda d: thought(3, 1, d.meta["better"])), context(tmp_path), ["draw-think"])
    ones = said["draw-think: totals agree"]
    assert said["draw-think"] == said["draw-think: form"] == 1 and 0 < ones < 1 and said["draw-think: words"] > 20


def test_drawing_models_learn_what_a_judge_mines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(joint, "PROMPTS", 2)
    monkeypatch.setattr(joint, "DRAWN", 2)
    oracle = table.make("scene")
    judge = Replying(lambda d: "")

    def contested(groups: Sequence[tuple[Document, Sequence[Document]]], pairs: PairJudge, points: Reward
                  ) -> list[Contested]:
        """Of the first prompt the third drawing is better than the fourth; nothing else is decided."""
        assert pairs.ask is points.ask and all(len(made) == joint.CANDIDATES for _, made in groups)
        judged.append(len(groups))
        asked, made = groups[0]
        true.extend(gains(oracle, oracle([asked] * len(made), made)))
        return [Contested(((2, 3),), (0, 0, 2, 1, 0, 0)), *[Contested((), ())] * (len(groups) - 1)]

    judged: list[int] = []
    true: list[float] = []
    monkeypatch.setattr(joint, "contest", contested)
    here = context(tmp_path / "all-0")
    here.folder.mkdir()
    for rule in joint.RULES:
        align = joint.preferring("show-o", rule, judge, here)
        assert align is not None and align.model == "show-o-grid" and align.method == "dpo"
        if rule == "rank":
            model = load_system(SHIPPED / align.model)
            before = {n: v.clone() for n, v in model.state_dict().items()}
            Aligner(align, model, here.folder / "show-o rank").run()
            after = load_system(here.model("show-o rank")).state_dict()
            changed = {n.partition(".")[0] for n, v in before.items() if not torch.equal(v, after[n])}
            assert "trunk" in changed and "codec" not in changed
    assert judged == [2], "once for all rules"
    found = joint.learnt("show-o", here)
    assert found["show-o: pairs, rank"] == 0.5 and found["show-o: pairs, random"] == 1
    assert found["show-o: gap, rank"] == found["show-o: gap, sift"] == pytest.approx(true[2] - true[3])
    assert found["show-o: gap above random, sift"] == pytest.approx(true[2] - true[3] - true[0] + true[1])
    assert found["show-o: right, random"] == found["show-o: right before"], "what was not trained draws as before"
    (here.folder / "show-o-sift.jsonl").write_text("")
    assert joint.preferring("show-o", "sift", judge, here) is None
    assert joint.true_gaps(here.folder / "show-o-sift.jsonl") == {}


def test_a_job_beside_leaves_the_arm_its_model(tmp_path: Path) -> None:
    """What is measured is the judge, whatever a drawing model learnt from it."""
    torch.manual_seed(0)
    begun = tmp_path / "begun"
    save_system(filled(Vlm(Vlm.tiny())), begun)
    seen: list[str] = []

    def beside(system: System, context: Context) -> Align:
        seen.append(type(system).__name__)
        return Align(model="show-o-grid", world="grid", tasks={"draw": Ask(reward="scene")}, method="own", group=1,
                     prompts=1, iterations=0, lr=1e-4)

    recipe = replace(thinking.JUDGE, system="vlm", size="tiny", config={}, workers=0, threads=1,
                     init={p: f"{begun}#{p}" for p in ("vision", "connector", "embed", "trunk")},
                     stages=(replace(thinking.JUDGE.stages[0], freeze=("vision",), batch=2),))
    arm = Arm(name="a", about="", control=True, then=(Job(name="drawing", recipe=beside, beside=True),))

    def measure(system: System, context: Context) -> dict[str, float]:
        seen.append(type(system).__name__)
        assert type(load_system(context.model("drawing"))).__name__ == "ShowO"
        return {"x": 1.0}

    study = replace(joint.STUDY, recipe=recipe, shared={}, arms=(arm,), claims=(), measure=measure, quick={})
    outcome = run(study, tmp_path / "run", quick=True)
    run(study, tmp_path / "run", quick=True, again=True)
    assert seen == ["Vlm", "Vlm", "Vlm"] and set(outcome.cells[0].then) == {"drawing"}


def test_jobs_behind_the_cold_start_run_once_and_are_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    begun = tmp_path / "begun"
    save_system(filled(Vlm(Vlm.tiny())), begun)
    sifted: list[str] = []

    class Split(thinking.Thought):
        """Half of the answers are right."""

        def __call__(self, asked: Sequence[Document], made: Sequence[Document]) -> list:
            sifted.append("sifted")
            return [replace(s, value=2.0 * (len(d.of(Image)) == 2)) for s, d in zip(super().__call__(asked, made), made,
                                                                                  strict=True)]

    def judged(system: System, context: Context, names: Sequence[str], **how: object) -> dict[str, float]:
        return {key: 0.5 for n in names for key in (n, f"{n}: form", f"{n}: totals agree")}

    monkeypatch.setattr(thinking, "judgements", judged)
    monkeypatch.setattr(thinking, "consistent", lambda made: True)
    monkeypatch.setattr(thinking, "Thought", Split)
    monkeypatch.setattr(thinking, "REPLY", 6)
    monkeypatch.setattr(thinking, "FROZEN", EYES)
    monkeypatch.setattr(thinking, "REINFORCED", replace(thinking.REINFORCED, freeze=EYES))
    short = {**thinking.REINFORCED.sampling, "text": {"temperature": 1.0, "max_tokens": 6}}
    monkeypatch.setattr(thinking, "REINFORCED", replace(thinking.REINFORCED, sampling=short))
    small = {"system": "vlm", "size": "tiny", "config": {}, "workers": 0, "threads": 1, "stages.0.freeze": list(EYES),
             "init": {part: f"{begun}#{part}" for part in (*EYES, "embed", "trunk")}}
    arms = tuple(replace(thinking.STUDY.arm(n), changes={**thinking.STUDY.arm(n).changes, **small})
                 for n in ("think", "all rows"))
    study = replace(thinking.STUDY, arms=arms, claims=(), shared={})
    outcome = run(study, tmp_path / "run", quick=True)
    assert sifted == ["sifted"], "for both arms, which begin alike"
    think, rows = outcome.cells
    assert think.metrics["rows kept as right"] == 8 and think.metrics["rows left wrong"] == 16
    assert {"cold start: verdicts", "rejection: verdicts", "totals agree: gained"} <= set(think.metrics)
    assert think.then["reinforced"]["documents"] == "rows-0/wrong.jsonl" and rows.then["rejection"]["init"] == {}
    assert rows.then["reinforced"]["documents"] == "rows-0/all.jsonl"
    steps = 3 * 4 + 2 * joint.BATCH + 8  # documents of the cold start, of own answers, answers to learn from
    assert think.cost.documents == steps and not list(tmp_path.glob("run/*/*/step-*"))
    folder = tmp_path / "run" / "think-0"
    states = [load_system(folder / job / "model").state_dict() for job in ("run", "rejection", "reinforced")]
    changed = [{n.partition(".")[0] for n, v in b.items() if not torch.equal(v, a[n])} for a, b in pairwise(states)]
    # all answers of an untrained model are equally bad, so that reinforcement may find nothing to learn
    assert "trunk" in changed[0] and not set.union(*changed) & set(EYES)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "reinforced")
    again = run(study, tmp_path / "run", quick=True)
    assert sifted == ["sifted"], "nothing is sifted twice"
    assert again.cells[0].metrics == think.metrics
    ended = load_system(folder / "reinforced" / "model").state_dict()
    assert all(torch.equal(v, states[-1][n]) for n, v in ended.items())
