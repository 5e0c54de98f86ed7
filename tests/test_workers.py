"""Roles and schedules of alignment, what travels between workers, and where they may be."""
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import Level, aligner, differing, recipe, weights

from diptych.alignment.placement import PlacementError
from diptych.alignment.recipe import Ask, Grpo, Link
from diptych.alignment.workers.crew import Place
from diptych.alignment.workers.setup import Workers, read_placement
from diptych.alignment.workers.wire import Slot, on_device, pack, unpack

PARTS = Workers(parts=2)
STREAMED = Workers(parts=2, schedule="pipelined", stream=True)


# -- what is learnt ---------------------------------------------------------------------------------------------------

def test_streaming_changes_no_bit_and_parts_only_round(tmp_path: Path) -> None:
    found, told = {}, {}
    for name, workers in {"whole": None, "parts": PARTS, "streamed": STREAMED}.items():
        a = aligner(tmp_path / name, workers)
        told[name] = [a.iterate() for _ in range(2)]
        found[name] = weights(a)
    assert not differing(found["parts"], found["streamed"])
    assert differing(found["whole"], weights(aligner(tmp_path / "new"))), "something was learnt"
    for name, value in found["whole"].items():
        torch.testing.assert_close(value, found["parts"][name], atol=1e-4, rtol=1e-3, msg=name)
    for key in ("reward draw", "loss", "grad_norm", "used", "gaps", "same in all", "answers", "steps"):
        assert told["parts"][-1][key] == told["streamed"][-1][key], key


def test_an_answer_that_is_not_judged_ends_the_stream(tmp_path: Path) -> None:
    found = []
    for workers in (PARTS, STREAMED):
        a = aligner(tmp_path, workers, Level(missing=7))
        line = a.iterate()
        assert line["failed"] == 1 and line["steps"] == 1
        found.append(weights(a))
    assert not differing(*found)


def test_episodes_in_parts_keep_their_seeds(tmp_path: Path) -> None:
    tasks = {"draw": Ask(watch=("scene",), then=(Link(follow="answer", reward="answer"),))}
    found = []
    for workers in (None, PARTS):
        a = aligner(tmp_path, workers, tasks=tasks, updates=2)
        asked, groups, seeds = a.ask()
        turns = a.play(asked, groups, seeds)
        found.append([{n: (t.seed, t.asked.task) for n, t in turn.items()} for turn in turns])
        assert a.judge(asked, turns)[0].shape == (2, 8)
    assert found[0] == found[1] and sorted(found[0][1]) == list(range(8))


# -- what travels -----------------------------------------------------------------------------------------------------

def test_tensors_travel_as_what_they_show() -> None:
    big = torch.arange(100_000, dtype=torch.float32)
    sent = {"part": big[5:7], "number": torch.tensor(3), "half": torch.tensor([1.5, 2], dtype=torch.bfloat16),
            "yes": torch.tensor([True]), "turned": torch.arange(6).view(2, 3).T}
    parcel = pack(sent)
    assert len(parcel) < 3000
    for name, value in unpack(parcel).items():
        assert torch.equal(value, sent[name]) and value.dtype == sent[name].dtype, name
    trained = torch.nn.Linear(2, 2)
    assert unpack(pack(trained)).weight.requires_grad
    moved = on_device((1, {"a": [big[:2]]}, Place((1,))), "meta")
    assert moved[1]["a"][0].is_meta and moved[2] == Place((1,))


def test_a_slot_is_seen_by_all_who_opened_it() -> None:
    slot = Slot({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16), "c": torch.tensor(7)})
    other = unpack(pack(slot))
    slot.close()
    assert not Path(slot.path).exists()
    slot.write({"b": torch.full((2, 2), 2.0)})
    assert torch.equal(other.views["a"], torch.ones(3)) and int(other.views["c"]) == 7
    assert bool((other.views["b"] == 2).all()) and other.views["b"].dtype == torch.bfloat16


# -- choices ----------------------------------------------------------------------------------------------------------

def places(monkeypatch: pytest.MonkeyPatch, count: int, **changes: object) -> dict[str, list[Place]]:
    monkeypatch.setattr("diptych.alignment.workers.setup.available", lambda kind, workers: count)
    return Workers(backend="process", **changes).places("cpu", 1)  # type: ignore[arg-type]


def test_placements_say_who_is_where(monkeypatch: pytest.MonkeyPatch) -> None:
    text = read_placement("rollout: 0-1; reward: 2 ;learner: 0-2:0")
    found = places(monkeypatch, 4, schedule="pipelined", placement=text)
    assert {r: [p.accelerators for p in own] for r, own in found.items()} == {
        "rollout": [(0,), (1,)], "reward": [(2,)], "learner": [(0, 1, 2)]}
    usual = places(monkeypatch, 5, schedule="disaggregated")
    assert [p[0].accelerators for p in usual.values()] == [(0, 1, 2), (3, 4), (0, 1, 2, 3, 4)]
    assert {p[0].accelerators for p in places(monkeypatch, 2).values()} == {(0, 1)}
    assert places(monkeypatch, 2, placement={"rollout": "0-1", "reward,learner": "0-1:0"})["rollout"][1].device == "cpu"


@pytest.mark.parametrize(("count", "changes", "message"), [
    (2, {"placement": {"rollout": "0", "reward": "0"}}, "a place for each of rollout, reward, learner"),
    (2, {"placement": {"rollout,reward,learner": "0-1"}}, "one learner, got 2"),
    (2, {"placement": {"rollout": "0", "reward": "1", "learner": "0"}}, "fix: schedule=disaggregated or pipelined"),
    (2, {"schedule": "pipelined", "placement": {"rollout,reward,learner": "0"}}, "rollout and reward on different"),
    (1, {"schedule": "disaggregated"}, "two accelerators"),
])
def test_what_cannot_be_placed_is_named(count: int, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
                                        ) -> None:
    with pytest.raises(PlacementError, match=message):
        places(monkeypatch, count, **changes)


def test_choices_that_contradict_each_other() -> None:
    for text, message in (("rollout", "ROLE: PLACE"), ("reward: 0; reward: 1", "every role once")):
        with pytest.raises(PlacementError, match=message):
            read_placement(text)
    with pytest.raises(ValueError, match="pipelined schedule to stream"):
        Workers(stream=True)
    with pytest.raises(ValueError, match="places, got the serial"):
        Workers(placement={"rollout": "0"})
    with pytest.raises(ValueError, match="ray back end for an address"):
        Workers(backend="process", address="auto")
    with pytest.raises(ValueError, match=r"part per prompt \(2\), got 3"):
        Workers(parts=3).check(recipe())
    for changes in ({"updates": 2}, {"method": "best"}, {"grpo": Grpo(spread="batch")},
                    {"grpo": Grpo(reduction="token")}):
        with pytest.raises(ValueError, match="weigh the same whatever comes after"):
            STREAMED.check(recipe(**changes))


def test_the_command_refuses_what_cannot_be(diptych_run: Any, tmp_path: Path) -> None:
    for extra, message in ((["--stream"], "pipelined schedule to stream"), (["--placement", "rollout"], "ROLE: PLACE"),
                           (["--ray-address", "auto"], "ray back end")):
        code, _, told = diptych_run("align", "mini-draw", "--run", tmp_path / "run", *extra)
        assert code == 2 and message in told and not (tmp_path / "run").exists()
