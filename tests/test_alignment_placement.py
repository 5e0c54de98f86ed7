"""Placements as text: who gets which accelerators, what is refused, how components share."""
import pytest

from diptych.alignment.placement import PlacementError, components, parse, sharing


@pytest.mark.parametrize("text, workers", [
    ("0-3", {0: (0,), 1: (1,), 2: (2,), 3: (3,)}),
    ("all", {i: (i,) for i in range(8)}),
    ("4-5", {0: (4,), 1: (5,)}),
    ("5", {0: (5,)}),
    ("0-1:0-3", {0: (0,), 1: (0,), 2: (1,), 3: (1,)}),  # several on each
    ("0-3:0-1", {0: (0, 1), 1: (2, 3)}),  # several for each
    ("0-2:0", {0: (0, 1, 2)}),
    ("0,2,4", {0: (0,), 1: (2,), 2: (4,)}),
    ("0-1:0-3, 5-6", {0: (0,), 1: (0,), 2: (1,), 3: (1,), 4: (5,), 5: (6,)}),
    ("0-1:1-2,4:3-4", {1: (0,), 2: (1,), 3: (4,), 4: (4,)}),
    ("", {}),
])
def test_workers_get_their_accelerators(text: str, workers: dict[int, tuple[int, ...]]) -> None:
    assert parse(text, 8).workers == workers


@pytest.mark.parametrize("text, message", [
    ("0-3:0-2", "one number to divide the other, got 4 accelerators and 3 workers"),
    ("3-0", "a range that ascends, got '3-0'"),
    ("0-8", "out of 8 that ascend, got '0-8'"),
    ("0-3,2-5", "that ascend, got '2-5'"),
    ("4-7,0-3", "that ascend, got '0-3'"),
    ("all:all", "fix: leave them out"),
    ("0-1:0,2-3:2", "workers from 1 on in '2-3:2', got 2; fix: leave no gap"),
])
def test_what_is_no_placement_is_named(text: str, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        parse(text, 8)


@pytest.mark.parametrize("text", ["a-b", "1,", "0-1:x", "-1"])
def test_what_is_no_number_is_another_error(text: str) -> None:
    with pytest.raises(ValueError, match="expected N or N-M") as error:
        parse(text, 8)
    assert not isinstance(error.value, PlacementError)


def test_components_share_or_do_not() -> None:
    cases = {"collocated": {"actor,env,rollout": "all"}, "disaggregated": {"actor": "0-3", "env,": "4-5"},
             "hybrid": {"env": "0-3", "rollout": "4-7", "actor": "0-7"}}
    own = components(cases["hybrid"], 8)
    assert list(own) == ["env", "rollout", "actor"] and own["rollout"].accelerators == {4, 5, 6, 7}
    assert sharing(own) == "hybrid" and sharing(components(cases["collocated"], 8)) == "collocated"
    assert sharing(components({"actor": "0-3", "env": "4-5", "rollout": "6-7"}, 8)) == "disaggregated"
    for lines in (cases["disaggregated"], {"actor,actor": "0"}):
        with pytest.raises(PlacementError, match="every component once"):
            components(lines, 8)
