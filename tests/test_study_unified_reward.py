"""The studies of judges: equal updates, equal documents, stages that go on where they stopped."""
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filling import filled
from test_sifting import Replying, shades, thought

from diptych.alignment.rewards.mining import Mined
from diptych.document import Document, Image
from diptych.replication.measures import judgements
from diptych.replication.runner import recipe_of
from diptych.replication.studies import unified_reward as joint
from diptych.replication.studies import unified_reward_think as thinking
from diptych.replication.study import Context
from diptych.systems.io import load_system, save_system
from diptych.systems.vlm import Vlm
from diptych.training.feed import open_stream
from diptych.world.judging import KINDS


def context(folder: Path, study: object = joint, arm: str = "all") -> Context:
    found = study.STUDY  # type: ignore[attr-defined]
    return Context(arm=found.arm(arm), recipe=found.recipe, seed=0, folder=folder, quick=True)


def test_judges_of_one_kind_make_as_many_updates_on_the_same_documents() -> None:
    whole = recipe_of(joint.STUDY, joint.STUDY.arm("all"), 0)
    assert [s.name for s in whole.data] == list(KINDS)
    assert whole.steps * whole.stages[0].batch == joint.EACH * len(KINDS), "each document once"
    for kind in KINDS:
        own = recipe_of(joint.STUDY, joint.STUDY.arm(kind), 0)
        assert own.stages == whole.stages and own.system == whole.system and own.init == whole.init
        assert own.data == tuple(s for s in whole.data if s.name == kind)
    few = replace(whole, data=tuple(replace(s, documents=4) for s in whole.data))
    read = [d for d in open_stream(few, few.stages[0]).documents_at(0, 24)]
    assert {(d.task.partition("-")[0], d.meta["index"]) for d in read} == {(k, i) for k in KINDS for i in range(4)}


def test_arms_that_think_make_as_many_updates() -> None:
    steps = {a.name: recipe_of(thinking.STUDY, a, 0).steps for a in thinking.STUDY.arms}
    behind = thinking.REJECTION + thinking.UPDATES
    formed = thinking.TAUGHT.steps  # once for all arms but the direct one
    assert steps["direct"] == formed + steps["taught"] == formed + steps["think"] + behind
    assert steps["all rows"] == steps["think"]
    starts = {a.name: set(recipe_of(thinking.STUDY, a, 0).init.values()) for a in thinking.STUDY.arms}
    assert all(v.startswith("@judge#") for v in starts["direct"])
    assert all(v.startswith("@form#") for name in ("taught", "think", "all rows") for v in starts[name])
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


def test_mining_is_judged_by_the_exact_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, made = shades([0.4, 0.3, 0.1, 1.0])
    monkeypatch.setattr(joint, "drawings", lambda count: [(asked, made, [0.5, 0.25, 0.0, 1.0])] * count)
    mined = {"sift": Mined(3, 2, (4.0, 1.0), 2), "rank": Mined(0, 1, (math.nan, math.nan), 2), "random": None}
    monkeypatch.setattr(joint, "mine", lambda asked, made, pairs, points, rule: mined[rule])
    found = joint.mined(Vlm(Vlm.tiny()), context(tmp_path))
    assert found["mined by sift: gap"] == 1 and found["mined by rank: gap"] == 0.25
    assert found["mined by sift: above random"] == 0.75 and found["mined by rank: above random"] == 0
    monkeypatch.setattr(joint, "mine", lambda *args: None)
    none = joint.mined(Vlm(Vlm.tiny()), context(tmp_path))
    assert none["mined by sift: pairs"] == none["mined by sift: above random"] == 0


def test_stages_behind_the_cold_start_run_once_and_are_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                ) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "think-0"
    save_system(filled(Vlm(Vlm.tiny())), folder / "run" / "model")
    calls: list[str] = []

    def verdicts_of(system: object, context: Context) -> dict[str, float]:
        calls.append("measured")
        return {"verdicts": 0.5, "form": 0.5, "totals agree": 0.5}

    class Split(thinking.Thought):
        """Half of the answers are right."""

        def __call__(self, asked: Sequence[Document], made: Sequence[Document]) -> list:
            calls.append("sifted")
            return [replace(s, value=2.0 * (len(d.of(Image)) == 2)) for s, d in zip(super().__call__(asked, made), made,
                                                                                  strict=True)]

    monkeypatch.setattr(thinking, "verdicts_of", verdicts_of)
    monkeypatch.setattr(thinking, "consistent", lambda made: True)
    monkeypatch.setattr(thinking, "Thought", Split)
    monkeypatch.setattr(thinking, "REPLY", 6)
    short = {**thinking.REINFORCED.sampling, "text": {"temperature": 1.0, "max_tokens": 6}}
    monkeypatch.setattr(thinking, "REINFORCED", replace(thinking.REINFORCED, sampling=short))
    base = context(folder, thinking, "think")
    base = replace(base, recipe=replace(base.recipe, workers=0, threads=1, size="tiny"))
    found: dict[str, float] = {}
    model = folder / "run" / "model"
    made = thinking.reasoned(load_system(model).eval(), base, found)
    assert found["rows kept as right"] == 8 and found["rows left wrong"] == 16
    assert calls == ["measured", "sifted", "measured"]
    assert not list(folder.glob("*/step-*")), "checkpoints go once a model is there"
    again = thinking.reasoned(load_system(model).eval(), base, {})
    assert calls[3:] == ["measured", "measured"], "nothing is sifted or trained twice"
    for a, b in zip(made.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    before = load_system(model).state_dict()
    changed = {n.partition(".")[0] for n, v in made.state_dict().items() if not torch.equal(v, before[n])}
    assert "trunk" in changed and not changed & {"vision", "connector"}
