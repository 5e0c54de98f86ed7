"""The ledger: intervals against known values, records that survive the disk, fair comparison."""
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import diptych
from diptych.ledger import (
    Cost,
    Entry,
    Machine,
    Metric,
    Model,
    Pictures,
    compare,
    differing_keys,
    mean,
    proportion,
    read_entries,
    read_entry,
    render_table,
    wilson,
    write_entry,
)
from diptych.ledger.entry import code_version
from diptych.training.precision import native_bf16


def make_entry(**changes: Any) -> Entry:
    fields: dict[str, Any] = dict(
        name="mini-world", kind="quality", system="bagel", level="E1",
        recipe={"seed": 0, "trunk": {"width": 256, "layers": 6}, "stages": [{"lr": 1e-3}, {"lr": 1e-4}]},
        sampling={"steps": 24, "guidance": 3.0}, seeds=(0, 1),
        cost=Cost(flops=3.2e15, tokens=12_000_000, documents=200_000, seconds=5400.5),
        metrics={"caption": proportion(481, 500), "psnr": mean([31.0, 31.5, 32.0], "dB")})
    return Entry(**{**fields, **changes})


# -- intervals --------------------------------------------------------------------------------------------------------

def test_wilson_gives_the_published_values():
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29
    expected = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605),
                (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (successes, n), (low, high) in expected.items():
        assert wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


@given(n=st.integers(1, 5000), data=st.data())
def test_wilson_contains_the_share_and_mirrors(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert (low, high) == pytest.approx(tuple(1 - x for x in reversed(wilson(n - k, n))), abs=1e-12)


def test_wilson_refuses_impossible_counts():
    for k, n in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
            wilson(k, n)


def test_mean_uses_student_quantiles_for_few_seeds():
    metric = mean([1.0, 2.0, 3.0])
    assert metric.value == 2 and metric.n == 3
    assert metric.high is not None and metric.low is not None
    assert metric.high - 2 == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert metric.low == pytest.approx(4 - metric.high)
    many = mean([float(i % 2) for i in range(1000)])
    assert many.high is not None and many.high - 0.5 == pytest.approx(1.96 * 0.5 / math.sqrt(1000), rel=1e-2)
    assert mean([4.0]).low is None


def test_mean_of_equal_values_is_that_value_without_a_rounding_error():
    value = 268 / 300
    metric = mean([value] * 3)
    assert metric.low == metric.value == metric.high == value


def test_metric_refuses_nonsense():
    with pytest.raises(ValueError, match="finite"):
        Metric(value=float("nan"))
    with pytest.raises(ValueError, match="low <= value <= high"):
        Metric(value=0.5, low=0.6, high=0.7)
    with pytest.raises(ValueError, match="both ends"):
        Metric(value=0.5, low=0.4)


# -- records ----------------------------------------------------------------------------------------------------------

def test_entry_survives_the_disk(tmp_path):
    entry = make_entry()
    path = write_entry(entry, tmp_path)
    assert path.name == "mini-world.json"
    assert read_entry(path) == entry
    assert [p.name for p in tmp_path.iterdir()] == ["mini-world.json"], "no temporary file may stay"


def test_entry_fills_in_code_machine_and_date():
    entry = make_entry()
    assert entry.code.startswith(diptych.__version__)
    assert entry.machine.cpu and entry.machine.cores >= 1
    assert re.fullmatch(r"\d+\.\d+.*", entry.machine.torch), entry.machine.torch
    assert entry.machine.bf16 is native_bf16("cpu"), "in which arithmetic it was computed"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry.date)


def test_code_version_names_the_commit_of_a_checkout():
    root = Path(diptych.__file__).parents[1]
    pattern = r"\+g[0-9a-f]{7,}(\.dirty)?" if (root / ".git").exists() else ""
    assert re.fullmatch(re.escape(diptych.__version__) + pattern, code_version())


def test_existing_entry_is_replaced_only_on_demand(tmp_path):
    write_entry(make_entry(), tmp_path)
    changed = make_entry(note="again")
    with pytest.raises(ValueError, match="replace=True"):
        write_entry(changed, tmp_path)
    assert read_entries(tmp_path)[0].note == ""
    write_entry(changed, tmp_path, replace=True)
    assert [e.note for e in read_entries(tmp_path)] == ["again"]
    assert len(list(tmp_path.iterdir())) == 1


def test_entries_come_by_name(tmp_path):
    for name in ("b", "a", "c.2"):
        write_entry(make_entry(name=name), tmp_path)
    assert [e.name for e in read_entries(tmp_path)] == ["a", "b", "c.2"]
    assert read_entries(tmp_path / "nowhere") == []


@pytest.mark.parametrize(("changes", "message"), [
    (dict(name="../evil"), "lower-case"), (dict(level="E5"), "E1, E2, E3, E4"), (dict(kind="rumour"), "kind"),
    (dict(metrics={}), "at least one metric"), (dict(date="yesterday"), "yesterday"),
    (dict(recipe={"lr": float("nan")}), "JSON compliant")])
def test_entry_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        make_entry(**changes)


def test_damaged_files_are_named(tmp_path):
    path = write_entry(make_entry(), tmp_path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "metricks": {}}))
    with pytest.raises(ValueError, match=r"mini-world\.json.*'metricks'.*'metrics'"):
        read_entry(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"expected JSON in .*mini-world\.json"):
        read_entry(path)
    path.unlink()
    (tmp_path / "other.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="hold the entry 'other'"):
        read_entry(tmp_path / "other.json")


def test_bundled_entries_are_valid():
    names = [e.name for e in read_entries()]
    assert len(names) == len(set(names))


# -- comparison -------------------------------------------------------------------------------------------------------

def test_compare_gives_the_difference_with_its_interval():
    # Newcombe 1998 (two samples), method 10: 56/70 - 48/80 = 0.2 [0.0524, 0.3339]
    a, b = make_entry(metrics={"x": proportion(48, 80)}), make_entry(metrics={"x": proportion(56, 70)}, seeds=(7,))
    [difference] = compare(a, b)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert difference.clear
    assert not compare(a, a)[0].clear


def test_compare_refuses_different_recipes_and_names_the_keys():
    a = make_entry()
    b = make_entry(recipe={"seed": 0, "trunk": {"width": 128, "layers": 6}, "stages": [{"lr": 1e-3}, {"lr": 3e-4}]},
                   sampling={"steps": 24})
    with pytest.raises(ValueError) as caught:
        compare(a, b)
    text = str(caught.value)
    for key in ("recipe.trunk.width", "recipe.stages.1.lr", "sampling.guidance"):
        assert key in text
    assert "layers" not in text and "seed," not in text
    compare(a, b, varying=["recipe.trunk", "recipe.stages.1.lr", "sampling"])
    with pytest.raises(ValueError, match="sampling.guidance"):
        compare(a, b, varying=["recipe"])


def test_compare_refuses_other_units_kinds_and_nothing_in_common():
    a = make_entry(metrics={"x": Metric(value=1.0, unit="s")})
    with pytest.raises(ValueError, match="one unit for x"):
        compare(a, make_entry(metrics={"x": Metric(value=1.0, unit="dB")}))
    with pytest.raises(ValueError, match="common metric"):
        compare(a, make_entry(metrics={"y": Metric(value=1.0)}))
    with pytest.raises(ValueError, match="different in kind"):
        compare(a, make_entry(kind="claim"))


def test_a_machine_says_where_bfloat16_was_emulated():
    here = Machine(cpu="a processor", cores=2, torch="2", python="3", bf16=False)
    assert here.where == "2 cores of a processor, bfloat16 computed as float32"
    assert replace(here, bf16=True).where == replace(here, bf16=None).where == "2 cores of a processor"
    assert replace(here, accelerator="a card").where == "a card, 2 cores of a processor"


def test_speeds_of_different_machines_are_not_compared():
    metrics = {"x": Metric(value=1.0, unit="documents/s")}
    here = make_entry(kind="speed", metrics=metrics)
    there = make_entry(kind="speed", metrics=metrics, machine=Machine(cpu="other", cores=64, torch="1", python="3"))
    with pytest.raises(ValueError, match=r"machine\.cpu"):
        compare(here, there)
    assert compare(here, here)[0].value == 0


def test_differing_keys_sees_missing_keys_and_lengths():
    assert differing_keys({"a": 1}, {"a": 1}) == []
    assert differing_keys({"a": None}, {}) == ["a"]
    assert differing_keys({"a": [1, 2]}, {"a": [1]}) == ["a"]
    assert differing_keys({"a": {"b": 1}}, {"a": 3}) == ["a"]


def test_table_shows_values_intervals_and_cost():
    other = make_entry(name="b", cost=Cost(seconds=2.5), metrics={"a|b": Metric(value=0.1234)})
    table = render_table([make_entry(), other])
    lines = table.splitlines()
    assert len(lines) == 2 + 2 + 1
    low, high = (f"{x * 100:.1f}" for x in wilson(481, 500))
    assert f"| caption | 96.2% [{low}, {high}] | 500 |" in lines[2]
    assert "| 3.2e+15 FLOP, 1.2e+07 tokens, 2e+05 documents, 90.0 min |" in lines[2]
    assert "31.5 [30.26, 32.74] dB" in lines[3] and "mini-world" not in lines[3]
    assert "a\\|b" in lines[4] and "2.5 s" in lines[4]


# -- the verb ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two entries measured alike, one of another recipe, one claim."""
    write_entry(make_entry(name="a"), tmp_path)
    write_entry(make_entry(name="b", metrics={"caption": proportion(300, 500)}), tmp_path)
    write_entry(make_entry(name="other", recipe={"seed": 1}), tmp_path)
    write_entry(make_entry(name="claim-x", kind="claim", level="E2", note="x against y",
                           verdicts={"more": "reproduced", "less": "inconclusive"}), tmp_path)
    return tmp_path


def test_the_verb_lists_and_shows(diptych_run, folder):
    code, out, _ = diptych_run("ledger", "list", "--entries", folder)
    assert code == 0 and [line.split()[0] for line in out.splitlines()[2:]] == ["a", "b", "claim-x", "other"]
    assert "caption 96.2%, psnr 31.5 dB" in out and "1 reproduced, 1 inconclusive" in out
    assert [x.split()[0] for x in diptych_run("ledger", "list", "--kind", "claim", "--entries", folder)[1].splitlines()
            ][2:] == ["claim-x"]
    assert diptych_run("ledger", "list", "--kind", "speed", "--entries", folder)[1] == "(none)\n"
    out = diptych_run("ledger", "show", "claim-x", "--entries", folder)[1]
    assert "x against y" in out and re.search(r"caption +96.2% \[94.1, 97.6\] +500", out)
    assert re.search(r"less +inconclusive", out) and "90.0 min" in out
    shown = json.loads(diptych_run("ledger", "show", "a", "--json", "--entries", folder)[1])
    assert Entry.from_dict(shown) == read_entry(folder / "a.json")
    code, _, err = diptych_run("ledger", "show", "claim-y", "--entries", folder)
    assert code == 2 and "did you mean 'claim-x'" in err


def test_a_model_is_shown_with_its_facts(diptych_run, folder):
    model = Model(parameters=10_900_000, trained=9_000_000, drawing=8_000_000, ingredients={"codec": "zoo/codec"},
                  training=Cost(documents=48_000), unable={"edit": "one picture only"})
    pictures = Pictures(file="m.png", prompts=("a", "b"), seeds=(0, 1), right=(True, False))
    write_entry(make_entry(name="m", model=model, pictures=pictures), folder)
    assert read_entry(folder / "m.json").model == model and read_entry(folder / "m.json").pictures == pictures
    out = " ".join(diptych_run("ledger", "show", "m", "--entries", folder)[1].split())
    for words in ("10.9M, 9M trained, 8M to draw", "codec: zoo/codec", "4.8e+04 documents", "no edit one picture only",
                  "m.png, 1 of 2 right"):
        assert words in out


def test_the_verb_compares_what_was_measured_alike(diptych_run, folder):
    code, out, _ = diptych_run("ledger", "compare", "a", "b", "--entries", folder)
    assert code == 0 and re.search(r"caption +96.2% .* 60.0% .* -36.2 \[-40.8, -31.\d\] +clear", out)
    code, _, err = diptych_run("ledger", "compare", "a", "other", "--entries", folder)
    assert code == 2 and "different in recipe.seed" in err
    assert diptych_run("ledger", "compare", "a", "other", "--varying", "recipe", "--entries", folder)[0] == 0


def test_the_verb_writes_the_page(diptych_run, folder, tmp_path):
    page = tmp_path / "out" / "page.html"
    assert diptych_run("ledger", "page", "-o", page, "--entries", folder)[:2] == (0, f"{page}\n")
    assert page.read_text().startswith("<!doctype html>") and "x against y" in page.read_text()
    for argv, words in ((["-o", tmp_path], ".html file"), (["-o", page, "--entries", tmp_path / "no"], "folder of a")):
        code, _, err = diptych_run("ledger", "page", *argv)
        assert code == 2 and words in err
