"""The page of the ledger: every system with what was measured, nothing fetched, sorted and filtered in a browser."""
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import browser
import ledger_entries
import pytest
from test_tour import Tags

from diptych.ledger import Metric, proportion, read_entry, write_entry
from diptych.report import ledger, ledger_table
from diptych.report.ledger_table import amount, clock, levels, origins, score
from diptych.report.plot import plot
from diptych.systems.table import FAMILIES, TABLE

ROOT = Path(__file__).parents[1]
SYSTEMS = {"bagel": 131, "janus": 88, "metaquery": 118, "unifork": 97, "harmon": 12}
chromium = pytest.mark.skipif(browser.BINARY is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five systems of the table, the reference, a claim, and an entry of another kind."""
    folder = tmp_path_factory.mktemp("entries")
    ledger_entries.made_up(folder, SYSTEMS)
    entry = read_entry(folder / "world-harmon.json")
    assert entry.model is not None
    metrics = {k: v for k, v in entry.metrics.items() if not k.startswith("edit")}
    unable = {"edit": "expected one picture in a document, got <two>"}
    write_entry(replace(entry, model=replace(entry.model, unable=unable), metrics=metrics), folder, replace=True)
    shutil.copy(ROOT / "diptych/ledger/entries/codec.json", folder)
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> str:
    return ledger.page_of(folder)


@pytest.fixture(scope="module")
def lines(folder: Path) -> dict[str, ledger_table.Line]:
    return {line.key: line for line in ledger.lines(ledger.read_entries(folder), folder)}


# -- what is on it ----------------------------------------------------------------------------------------------------

def test_the_page_in_the_documentation_is_up_to_date() -> None:
    there = ROOT / "docs" / "ledger.html"
    assert there.read_text(encoding="utf-8") == ledger.page_of(), \
        "fix: python -m diptych ledger page -o docs/ledger.html"


def test_every_system_says_what_it_is() -> None:
    for name, row in TABLE.items():
        assert row.family and set(row.family) <= set(FAMILIES), f"{name}: family"
        assert row.coupling and row.objective, f"{name}: coupling and objective in words"


def test_every_system_has_a_row_measured_or_not(made: str) -> None:
    found = Tags(made)
    rows = [b["id"] for b in found.all("tbody") if b.get("id")]
    assert sorted(rows) == sorted(f"system-{name}" for name in (*TABLE, "mini"))
    assert rows[:3] == ["system-mini", "system-bagel", "system-metaquery"], "the best drawings first"
    assert rows[5] == "system-harmon", "then what was not measured"
    assert made.count("No run yet.") == len(TABLE) - len(SYSTEMS) and "diptych league vargpt --ledger" in made


def test_one_file_and_nothing_from_outside(made: str) -> None:
    found = Tags(made)
    assert not found.all("link") and all("src" not in a for a in found.all("script"))
    assert all(a["src"].startswith("data:") for a in found.all("img"))
    outside = {a["href"] for a in found.all("a") if not a["href"].startswith("#")}
    assert all(h.startswith("https://arxiv.org/abs/") for h in outside)
    assert not re.search(r"url\((?!data:)|@import|\bfetch\(|XMLHttpRequest|<iframe", made)
    ids = {a["id"] for _, a in found.found if "id" in a}
    assert {a["href"][1:] for a in found.all("a") if a["href"].startswith("#")} <= ids, "links inside lead somewhere"


def test_the_same_entries_give_the_same_page(folder: Path, made: str) -> None:
    assert ledger.page_of(folder) == made


def test_scores_have_their_intervals_on_both_splits(lines: dict[str, ledger_table.Line]) -> None:
    shown = score(lines["janus"], "draw")
    low, high = proportion(88, 200).low, proportion(88, 200).high
    assert '44%</b><small><span class="hidden">test, 95% interval </span>' \
           f"{low * 100:.0f} to {high * 100:.0f}" in shown
    assert '40%</b><small><span class="hidden">held out, 95% interval </span>33 to 46' in shown


def test_what_cannot_be_done_and_what_was_not_taught_is_said(lines: dict[str, ledger_table.Line], made: str) -> None:
    assert score(lines["harmon"], "edit") == \
        '<small title="expected one picture in a document, got &lt;two&gt;">cannot</small>'
    assert "Cannot do edit: expected one picture in a document, got &lt;two&gt;" in made and "<two>" not in made
    assert "untaught" in score(lines["metaquery"], "question") and "untaught" not in score(lines["metaquery"], "draw")
    assert "untaught" not in score(lines["janus"], "question"), "talks hold questions"
    assert "no run" in score(lines["vargpt"], "draw")


def test_costs_origins_and_budgets(lines: dict[str, ledger_table.Line], made: str) -> None:
    shown = ledger_table.costs(lines["bagel"])
    assert shown[0].startswith("10.9M<small>9M trained</small><small>8M to draw</small><small>5M to answer</small>")
    assert shown[1:] == ["2", "0.2", "2,000", "5 min"] and ledger_table.costs(lines["vargpt"]) == [""] * 5
    assert "48,000 documents, 750 steps of 64: draw, edit, talk, caption. Starts from zoo/codec, zoo/clip." in made
    assert lines["mini"].reference and "trained far longer" in made
    assert '<tbody id="system-mini" class="reference"' in made
    assert "48,000 per system, and the items asked, 200 per task" in made
    assert origins({}) == "Starts from nothing." and origins({"a": "runs/x/model#codec"}) == "Starts from runs/x."
    assert [amount(x) for x in (7, 1500, 10_912_596)] == ["7", "1.5k", "10.9M"]
    assert [clock(x) for x in (59, 600, 13_425)] == ["59 s", "10 min", "3 h 44 min"]


def test_claims_have_verdicts_and_belong_to_systems(lines: dict[str, ledger_table.Line], made: str) -> None:
    assert levels(lines["unifork"]) == ["E1", "E2", "E3"] and levels(lines["metaquery"]) == ["E1", "E3"]
    assert levels(lines["mini"]) == ["E1"], "what holds for the system is not shown of a model"
    assert '<a class="claims-of" href="#claim-unifork">1 of 3 claims reproduced</a>' in made
    assert '<article class="card claim" id="claim-unifork"><div><h3><a href="#system-unifork">UniFork</a>' in made
    assert '<td>a branch per task beats one trunk for both</td><td class="number">0.062 [0.021, 0.103]</td>' in made
    assert '<span class="mark bad">&#10007; not reproduced</span>' in made and "draws &lt;better&gt;" in made
    assert "claims measured <b>3, 1 reproduced</b>" in made


def test_drawings_carry_their_prompts_and_verdicts(lines: dict[str, ledger_table.Line], made: str) -> None:
    entry = lines["bagel"].entry
    assert entry is not None and entry.pictures is not None
    tiles = re.findall(r'<span class="tile"[^>]*aria-label="([^"]*)"', made.partition('id="system-bagel"')[2])[:8]
    assert tiles == [f"{p}: {'right' if r else 'not right'}" for p, r in
                     zip(entry.pictures.prompts, entry.pictures.right, strict=True)]
    assert made.count("--strip: url(data:image/png;base64,") == len(SYSTEMS) + 1
    assert len(re.findall(r'<ol class="tiles prompts">(.*?)</ol>', made)[0].split("<li>")) == 9


def test_drawings_of_other_prompts_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "entries")
    entry = read_entry(tmp_path / "entries/world-janus.json")
    assert entry.pictures is not None
    other = replace(entry.pictures, prompts=("a cat", *entry.pictures.prompts[1:]))
    write_entry(replace(entry, pictures=other), tmp_path / "entries", replace=True)
    with pytest.raises(ValueError, match="world-janus to be of the shared prompts.*diptych league janus"):
        ledger.page_of(tmp_path / "entries")


def test_a_ledger_without_runs_has_a_page(tmp_path: Path) -> None:
    found = Tags(made := ledger.page_of(tmp_path))
    assert len([b for b in found.all("tbody") if b.get("id")]) == len(TABLE)
    assert "None measured yet." in made and 'id="cost"' not in made


def test_labels_of_the_plot_stay_apart() -> None:
    points = [{"key": str(i), "title": f"System {i}", "cost": cost, "right": Metric(value=0.5, low=0.4, high=0.6),
               "reference": False} for i, cost in enumerate((5.0, 5.1, 40.0))]
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(start|end)">System', plot(points))
    assert found[0] != found[1] and found[2][2] == "start"
    (x0, y0, _), (x1, y1, _) = found[:2]
    assert abs(float(x0) - float(x1)) > 9 or abs(float(y0) - float(y1)) > 9
    single = plot(points[:1])
    assert "System 0: 5 GFLOP, 50% right" in single


# -- in the browser ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def file(made: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "ledger.html"
    path.write_text(made, encoding="utf-8")
    return path


ORDER = "[...document.querySelectorAll('tbody[id]:not([hidden])')].map(b => b.id.slice(7))"
HASH = "location.hash.slice(1)"


def sorted_by(chrome: browser.Browser) -> dict[str, str]:
    """heading -> direction of the columns that say they are sorted."""
    return dict(chrome.run("[...document.querySelectorAll('#league thead th')].filter(t => t.ariaSort !== 'none')"
                           ".map(t => [t.querySelector('button').textContent, t.ariaSort])"))


def click(chrome: browser.Browser, selector: str) -> None:
    chrome.run(f"document.querySelector('button' + {selector!r}).click()")


@chromium
def test_headings_sort(chrome: browser.Browser, file: Path) -> None:
    chrome.look(1280)
    chrome.open(file)
    measured = ["mini", "bagel", "metaquery", "unifork", "janus", "harmon"]
    assert chrome.run(ORDER)[:6] == measured and sorted_by(chrome) == {"Draw": "descending"}
    click(chrome, "[data-sort=draw-test]")
    assert chrome.run(ORDER)[:6] == measured[::-1], "what was not measured stays last"
    assert sorted_by(chrome) == {"Draw": "ascending"} and chrome.run(HASH) == "sort=draw-test&dir=asc"
    click(chrome, "[data-sort=parameters]")
    assert chrome.run(ORDER)[:6] == ["mini", "harmon", "unifork", "metaquery", "janus", "bagel"]
    assert sorted_by(chrome) == {"Parameters": "ascending"}, "the smallest first"
    click(chrome, "[data-sort=name]")
    titles = sorted((row.title for row in TABLE.values()), key=str.lower)
    shown = chrome.run("[...document.querySelectorAll('tbody[id] th b')].map(b => b.textContent)")
    assert [t for t in shown if t != "mini"] == titles
    click(chrome, "[data-sort=level]")
    assert chrome.run(ORDER)[0] == "unifork", "E1 E2 E3 before E1 E3"
    click(chrome, "[data-sort=edit-pairs]")
    assert chrome.run(ORDER)[:5] == measured[:5] and "harmon" in chrome.run(ORDER)[5:]
    assert chrome.run("document.querySelectorAll('#league button.on').length") == 1


@chromium
def test_every_heading_is_a_key_of_every_row(chrome: browser.Browser, file: Path) -> None:
    chrome.open(file)
    missing = chrome.run("[...document.querySelectorAll('button[data-sort]')].map(b => 'data-' + b.dataset.sort)"
                         ".filter(k => ![...document.querySelectorAll('tbody[id]')].every(b => b.hasAttribute(k)))")
    assert missing == []
    assert chrome.run("[...document.querySelectorAll('#league thead th')].every(t => t.querySelector('button'))")


@chromium
def test_the_keyboard_sorts_and_filters(chrome: browser.Browser, file: Path) -> None:
    chrome.open(file)
    chrome.run("document.querySelector('button[data-sort=name]').focus()")
    chrome.press("Enter")
    assert sorted_by(chrome) == {"System": "ascending"}
    chrome.press(" ")
    assert sorted_by(chrome) == {"System": "descending"}, "the heading keeps the focus"
    chrome.press("Tab")
    assert chrome.run("document.activeElement.dataset.sort") == "level"
    chrome.press("Enter")
    assert sorted_by(chrome) == {"Evidence": "descending"}
    chrome.run("document.querySelector('[data-filter=family]').focus()")
    chrome.press("Tab")
    chrome.press("Enter")
    assert chrome.run("document.activeElement.dataset.value") == "flow"
    assert set(chrome.run(ORDER)) == {"mini", *(n for n, row in TABLE.items() if "flow" in row.family)}


@chromium
def test_filters_count_and_share_their_state(chrome: browser.Browser, file: Path) -> None:
    chrome.open(file)
    click(chrome, "[data-value='next token']")
    wanted = {n for n, row in TABLE.items() if "next token" in row.family}
    assert set(chrome.run(ORDER)) == wanted
    assert chrome.run("document.getElementById('count').textContent") == f"{len(wanted)} of {len(TABLE) + 1} rows"
    click(chrome, "[data-value=E2]")
    both = {n for n in wanted if "E2" in TABLE[n].levels}
    assert set(chrome.run(ORDER)) == both < wanted
    pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map(b => b.dataset.value)"
    assert chrome.run(pressed) == ["next token", "E2"]
    address = chrome.run(HASH)
    assert address == "sort=draw-test&dir=desc&family=next+token&level=E2"
    chrome.open(file, "#" + address)
    assert set(chrome.run(ORDER)) == both and chrome.run(pressed) == ["next token", "E2"]
    click(chrome, "[data-value=E2]")
    click(chrome, "[data-filter=family][data-value='']")
    assert len(chrome.run(ORDER)) == len(TABLE) + 1, "a second click takes a filter away"


@chromium
def test_an_address_opens_the_table_as_it_was(chrome: browser.Browser, file: Path) -> None:
    chrome.open(file, "#sort=parameters&dir=desc")
    assert chrome.run(ORDER)[0] == "bagel" and sorted_by(chrome) == {"Parameters": "descending"}
    chrome.run("location.hash = '#sort=picture'")
    assert chrome.run(f"new Promise(done => setTimeout(() => done({ORDER}), 50))")[0] == "bagel"
    assert sorted_by(chrome) == {"GFLOP per picture": "ascending"}, "without a direction the column's own"
    chrome.open(file, "#sort=%3Cb%3E&dir=sideways&family=none")
    assert sorted_by(chrome) == {"Draw": "descending"} and len(chrome.run(ORDER)) == len(TABLE) + 1
    chrome.open(file, "#system-janus")
    assert sorted_by(chrome) == {"Draw": "descending"}
    assert chrome.run("document.querySelector(':target').id") == "system-janus"


@chromium
@pytest.mark.parametrize("width", [360, 820, 1280])
def test_it_fits_every_width_and_fetches_nothing(chrome: browser.Browser, file: Path, width: int) -> None:
    chrome.look(width)
    chrome.open(file)
    assert chrome.run("document.documentElement.scrollWidth") <= width
    assert [u for u in chrome.requests if not u.startswith("data:")] == [file.as_uri()]
    assert chrome.run("[...document.querySelectorAll('#league thead button')]"
                      ".every(b => b.getBoundingClientRect().width > 0)"), "sorting is there at every width"


@chromium
def test_light_and_dark(chrome: browser.Browser, file: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        chrome.look(1280, scheme=scheme)
        chrome.open(file)
        grounds.append(chrome.run("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(250, 249, 246)", "rgb(22, 23, 25)"]
