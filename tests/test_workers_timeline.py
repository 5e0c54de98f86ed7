"""How long an iteration should take, and its picture."""
from pathlib import Path

import pytest

from diptych.alignment.workers.timeline import Span, busy, draw, idle, makespan, turns


def spans(worker: str, *seconds: float) -> list[Span]:
    return [Span(worker, f"act {n}", 0.0, s) for n, s in enumerate(seconds)]


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(("s", "g"), [(1.0, 1.0), (2.0, 0.5), (0.5, 3.0)])
def test_makespans_are_those_of_the_formulas(k: int, s: float, g: float) -> None:
    acting, judging, learning = spans("rollout 0", *[s / k] * k), spans("reward 0", *[g / k] * k), spans("learner 0", 2)
    found = {p: makespan(acting, judging, learning, pipelined=p, pushing=0.25) for p in (True, False)}
    assert found[False] == pytest.approx(s + g + 2.25)
    assert found[True] == pytest.approx((s + g) / k + (k - 1) * max(s, g) / k + 2.25)
    assert makespan(acting, judging, learning, pipelined=True, alone=True) == pytest.approx(s + g + 2)


def test_learning_by_parts_and_several_workers() -> None:
    acting, judging = spans("rollout 0", 1, 1), spans("reward 0", 1, 1)
    learning = spans("learner 0", 1, 1, 0.5)  # the last is the step
    assert makespan(acting, judging, learning, pipelined=True, streamed=True) == pytest.approx(4.5)
    assert makespan(acting, judging, learning, pipelined=True) == pytest.approx(5.5)
    two = [*spans("rollout 0", 1), *spans("rollout 1", 1)]
    assert makespan(two, judging, [], pipelined=True) == pytest.approx(3)
    assert makespan(two, judging, [], pipelined=False) == pytest.approx(3)


@pytest.mark.parametrize(("k", "expected"), [(1, 20.0), (2, 10.5), (4, 10.25)])
def test_turns_of_two_that_wait_for_each_other(k: int, expected: float) -> None:
    assert turns([1 / k] * k, [1 / k] * k, 10) == pytest.approx(expected)
    assert turns([2 / k] * k, [1 / k] * k, 10) == pytest.approx(30 if k == 1 else 20 + 1 / k)


def test_idle_shares_and_the_picture(tmp_path: Path) -> None:
    own = [Span("rollout 0", "act 1", 10.0, 12.0), Span("rollout 0", "act 2", 12.0, 13.0),
           Span("reward 0", "judge 1", 12.0, 14.0)]
    assert busy(own) == {"rollout 0": 3.0, "reward 0": 2.0} and idle([]) == {}
    assert idle(own) == pytest.approx({"rollout 0": 0.25, "reward 0": 0.5})
    assert idle(own, 10, 16)["rollout 0"] == pytest.approx(0.5)
    for name in ("timeline.png", "timeline.svg"):
        draw(own, tmp_path / name, "two workers")
        assert (tmp_path / name).stat().st_size > 2000
    told = (tmp_path / "timeline.svg").read_text()
    assert told.count("<path") > 5 and sorted(p.name for p in tmp_path.iterdir()) == ["timeline.png", "timeline.svg"]
