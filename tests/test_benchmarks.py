"""Benchmarks: the truth scores 100%, ignorance about nothing, every mistake is called by its name, runs resume."""
import dataclasses
import json
import math
import re

import numpy as np
import pytest

from diptych.benchmarks.controls import CONTROLS, Control
from diptych.benchmarks.evaluate import evaluate
from diptych.benchmarks.results import Key
from diptych.benchmarks.suite import Outcome, Suite
from diptych.benchmarks.world import SUITES, find_suite, planned_objects
from diptych.document import Boxes, Document, Image, Text
from diptych.ledger import read_entry, wilson, write_entry
from diptych.world import language, tasks
from diptych.world.render import render
from diptych.world.scene import Object, Scene


def filled(document: Document, **changes: object) -> Document:
    """The truth with some of its targets changed: piece number -> new content, as `p2="a red circle"`."""
    pieces = list(document.pieces)
    for name, value in changes.items():
        i = int(name[1:])
        content = {Text: "text", Image: "pixels", Boxes: "boxes"}[type(pieces[i])]
        pieces[i] = value if isinstance(value, Boxes) else pieces[i].replace(**{content: value})  # type: ignore[arg-type]
    return Document(tuple(pieces), document.task, document.meta)


def score(document: Document, **changes: object) -> Outcome:
    return find_suite(document.task).score(document, filled(document, **changes))


def wrong(outcome: Outcome) -> set[str]:
    return {name for name, value in outcome.checks.items() if not value} - {"everything stated", "right at a guess"}


# -- the ends of the scale --------------------------------------------------------------------------------------------

def test_the_truth_is_right_in_everything():
    results = evaluate(Control("oracle"), SUITES, n=6, splits=("test", "pairs", "counts"), progress=False)
    assert len(results.outcomes) == 6 * 3 * len(SUITES)
    bad = {k: o for k, o in results.outcomes.items()
           if not (o.right and o.status == "answered" and all(o.checks.values()))}
    assert bad == {}
    assert {f.metric.value for f in results.figures() if f.kind in ("right", "check", "group")} == {1.0}


def test_unified_bench_draws_after_the_models_own_words():
    """Nothing of the picture reaches the drawing but what was said of it."""
    class Teller:
        def generate(self, documents, sampling=None, *, seeds=0):
            asked.extend(documents)
            return [Control("oracle").generate([d])[0] if d.task == "caption" else
                    Control("copy").generate([d])[0] for d in documents]

    asked: list = []
    results = evaluate(Teller(), ["unified"], n=3, progress=False)
    told, drawn = asked[:3], asked[3:]
    assert [d.task for d in told] == ["caption"] * 3 and all(d.targets[0].empty for d in told)
    for before, after in zip(told, drawn, strict=True):
        true = tasks.document("caption", before.meta["index"], split="test")
        assert [p.kind for p in after] == ["text", "image"] and after.pieces[1].empty
        assert after.pieces[0].text == true.pieces[2].text
    figures = {f.name: f.metric.value for f in results.figures()}
    assert figures["mean facts told"] == 1 and figures["right"] == 0 and figures["mean CLIP similarity"] < 90
    truth = {f.name: f.metric.value for f in evaluate(Control("oracle"), ["unified"], n=3, progress=False).figures()}
    assert truth["mean CLIP similarity"] > 99.9 and truth["right"] == 1


def test_held_out_wordings_are_judged_alike():
    results = evaluate(Control("oracle"), ("question", "draw", "story"), n=6, template="held_out", progress=False)
    assert all(o.right for o in results.outcomes.values())
    shown = []
    evaluate(Control("oracle"), ["caption"], n=4, template="held_out", progress=False,
             watch=lambda key, true, made, outcome: shown.append(true.pieces[1].text))
    assert set(shown) <= set(language.CAPTION_REQUESTS["held_out"])


@pytest.mark.parametrize("suite", SUITES)
def test_answers_that_know_nothing_are_wrong(suite):
    assert SUITES[suite].controls, "every suite says what its figures are worth"
    for name in SUITES[suite].controls:
        metric = evaluate(Control(name), [suite], n=8, progress=False).right(suite)
        assert metric.value <= (0.75 if suite in ("question", "read") else 0.13), name


def test_majority_knows_the_family_only():
    families = {d.meta["family"]: m.pieces[-1].text for d, m in (
        (d, Control("majority").generate([d.prompt()])[0]) for d in (tasks.document("question", i, split="test")
                                                                     for i in range(12)))}
    assert families["exist"] in ("yes", "no") and families["count"] in language.NUMBERS


# -- every mistake by its name ----------------------------------------------------------------------------------------

def test_caption_mistakes():
    document = next(d for d in (tasks.document("caption", i, split="test") for i in range(99))
                    if len(d.meta["scene"]["objects"]) == 2 and d.meta["scene"]["background"] == "white")
    text = document.pieces[2].text
    first, second, ground = text.split(" , ")
    assert score(document, p2=f"{second} , {first} , {ground}").right, "the order is free"
    assert wrong(score(document, p2=f"{first} , {ground}")) >= {"count"}
    assert wrong(score(document, p2=text.replace("white", "black"))) == {"background"}
    color = document.meta["scene"]["objects"][0]["color"]
    changed = score(document, p2=text.replace(color, "pink" if color != "pink" else "blue"))
    assert wrong(changed) == {"color"} and not changed.right and changed.status == "answered"
    assert "size" in wrong(score(document, p2=re.sub("large|medium", "small", text)))
    unread = score(document, p2="nice colours")
    assert unread.status == "unparsed" and not unread.right and wrong(unread) == set(unread.checks)


def test_question_answers_are_exact():
    document = next(d for d in (tasks.document("question", i, split="test") for i in range(99))
                    if d.meta["answer"] == "yes")
    assert score(document, p2=" yes ").right
    assert (score(document, p2="no").right, score(document, p2="no").status) == (False, "answered")
    assert score(document, p2="yes it is").status == "unparsed"
    assert score(document).groups == (f"family={document.meta['family']}",)


def test_references_want_one_good_box():
    document = tasks.document("refer", 0, split="test")
    [box] = document.pieces[2].boxes
    width = box[2] - box[0]
    assert score(document, p2=np.array([box + [width / 4, 0, width / 4, 0]])).right
    far = score(document, p2=np.array([box + [width / 2, 0, width / 2, 0]]))
    assert not far.right and far.status == "answered" and 0.2 < far.numbers["IoU"] < 0.5
    assert not score(document, p2=np.array([box, box])).right
    assert score(document, p2=np.zeros((0, 4))).status == "unparsed"


def _apart(scene: Scene) -> Object:
    """Another object, of a color that is not there, in a free corner."""
    x, y = max(((x, y) for x in (600, 3500) for y in (600, 3500)),
               key=lambda p: min(math.dist(p, (o.x, o.y)) for o in scene.objects))
    color = next(c for c in ("pink", "orange", "blue") if c not in {o.color for o in scene.objects})
    return Object(id=9, shape="square", color=color, size="medium", radius=320, x=x, y=y)


def test_drawing_mistakes():
    document = next(d for d in (tasks.document("draw", i, split="test") for i in range(99))
                    if [i["count"] for i in d.meta["spec"]["items"]] == [1, 1] and d.meta["spec"]["background"])
    scene = Scene.from_dict(document.meta["scene"])
    assert set(score(document).groups) == {"objects=2", "objects<=3"}
    one = scene.replace(objects=scene.objects[:1])
    assert "count" in wrong(score(document, p1=render(one, 64)))
    color = next(c for c in ("pink", "orange", "blue") if c not in {o.color for o in scene.objects})
    recolored = scene.replace(objects=(scene.objects[0].replace(color=color), scene.objects[1]))
    assert wrong(score(document, p1=render(recolored, 64))) == {"color", "count"}
    ground = scene.replace(background=next(b for b in ("black", "white") if b != scene.background))
    other = score(document, p1=render(ground, 64))
    assert other.right and wrong(other) == {"background"} and not other.checks["everything stated"]
    extra = scene.replace(objects=(*scene.objects, _apart(scene)))
    more = score(document, p1=render(extra, 64))
    assert wrong(more) == {"nothing else"} and not more.right
    noise = score(document, p1=np.random.default_rng(0).uniform(-1, 1, (3, 64, 64)))
    assert not noise.right and not noise.checks["right at a guess"]


def test_a_guess_is_no_answer():
    """A drawing that is too vague to be right may be right at a guess, and is told apart."""
    document = next(d for d in (tasks.document("draw", i, split="test") for i in range(99))
                    if len(d.meta["scene"]["objects"]) == 1)
    clear = document.pieces[1].pixels
    rows, columns = np.mgrid[0:64, 0:64]
    wavy = [np.rint(1.5 * np.sin(axis / 3)).astype(int) for axis in (rows, columns)]
    vague = score(document, p1=clear[:, (rows + wavy[1]) % 64, (columns + wavy[0]) % 64])
    assert (vague.right, vague.status, vague.checks["right at a guess"]) == (False, "abstained", True)
    assert score(document).right and score(document).checks["right at a guess"]


def test_what_cannot_be_seen_is_told_apart():
    document = tasks.document("draw", 0, split="test")
    unclear = score(document, p1=np.full((3, 64, 64), np.nan))
    assert (unclear.right, unclear.status) == (False, "abstained")


def test_edit_mistakes():
    document = next(d for d in (tasks.document("edit", i, split="test") for i in range(99))
                    if d.meta["edit"] == "recolor" and len(d.meta["scene"]["objects"]) > 1)
    same = score(document, p2=document.pieces[0].pixels)
    assert wrong(same) == {"edited"} and same.groups == ("kind=recolor",)
    after = Scene.from_dict(document.meta["after"])
    rest = [o for o in after.objects if o.id != document.meta["target"]]
    lost = after.replace(objects=tuple(o for o in after.objects if o.id != rest[0].id))
    assert wrong(score(document, p2=render(lost, 64))) == {"preserved"}
    exact = score(document).numbers["largest difference elsewhere"]
    assert exact < 2 < score(document, p2=render(lost, 64)).numbers["largest difference elsewhere"]


def test_layouts_and_plans():
    layout, plan = (next(d for d in (tasks.document(task, i, split="test") for i in range(99))
                         if len(d.pieces[1].boxes) == 2) for task in ("layout", "plan"))
    scene = Scene.from_dict(layout.meta["scene"])
    ground = next(b for b in ("black", "white") if b != scene.background)
    assert wrong(score(layout, p2=render(scene.replace(background=ground), 64))) == {"background"}
    assert "boxes" in wrong(score(layout, p2=render(scene.replace(objects=scene.objects[1:]), 64)))

    boxes = plan.pieces[1]
    assert wrong(score(plan, p1=boxes.replace(labels=("a red thing",) * 2))) == {"plan read", "plan right", "plan kept"}
    assert wrong(score(plan, p1=boxes.replace(boxes=boxes.boxes[::-1]))) >= {"plan kept"}
    assert wrong(score(plan, p1=boxes.replace(boxes=boxes.boxes[:1], labels=boxes.labels[:1]))) >= {"plan right"}
    assert score(plan, p1=boxes.replace(labels=("a red thing",) * 2)).right, "the drawing is what counts"
    assert planned_objects(Boxes(boxes=np.array([[0.5, 0.5, 0.2, 0.9]]), labels=("large red circle",))) is None


# -- figures ----------------------------------------------------------------------------------------------------------

class Half:
    """The truth for even items, nothing for odd ones; remembers what it was asked, and may stop working."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.stop_after = stop_after

    def generate(self, documents, sampling=None, *, seeds=0):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        assert all(p.empty for d in documents for p in d if p.target), "a system never sees the truth"
        self.asked += [(d.task, d.meta["index"], s) for d, s in zip(documents, seeds, strict=True)]
        return [(CONTROLS["oracle"] if d.meta["index"] % 2 == 0 else CONTROLS["blank"])(d) for d in documents]


def test_figures_have_counts_and_wilson_intervals(tmp_path):
    results = evaluate(Half(), ("caption", "draw"), n=10, progress=False)
    metric = results.right("caption")
    assert (metric.value, metric.n, (metric.low, metric.high)) == (0.5, 10, wilson(5, 10))
    metrics = results.metrics()
    assert metrics["caption/test/unparsed"].value == 0.5
    assert metrics["caption/test/color"].value == metrics["draw/test/count"].value == 0.5
    groups = [f.metric.n for f in results.figures() if f.suite == "caption" and f.kind == "group"]
    assert sum(n or 0 for n in groups) == 10
    few = metrics["draw/test/objects<=3"]
    assert few.n == sum(len(tasks.document("draw", i, split="test").meta["scene"]["objects"]) <= 3 for i in range(10))
    table = results.table()
    assert "50.0%" in table and "objects<=3" in results.table(detail=False)
    assert "objects=1" in table and "objects=1" not in results.table(detail=False)

    entry = results.entry("half-test", system="bagel", recipe={"steps": 1})
    assert read_entry(write_entry(entry, tmp_path)) == entry
    assert entry.metrics["caption/test"] == metric and entry.seeds == (0,) and entry.cost.documents == 20
    assert entry.recipe["evaluation"]["suites"] == {"caption": "world w1", "draw": "world w1"}
    results.write(tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["metrics"]["caption/test"]["value"] == 0.5 and len(written["items"]) == 20


def test_seeds_belong_to_items():
    one, two, other = Half(), Half(), Half()
    evaluate(one, ["question"], n=7, batch=7, progress=False)
    evaluate(two, ("caption", "question"), n=9, batch=2, progress=False)
    evaluate(other, ["question"], n=7, seed=1, progress=False)
    assert set(one.asked) <= set(two.asked)
    assert len({seed for _, _, seed in two.asked}) == 18
    assert not set(one.asked) & set(other.asked)


def _suite(**changes) -> Suite:
    def even(true: Document, made: Document) -> Outcome:
        index = true.meta["index"]
        return Outcome(right=index % 2 == 0, status="answered" if index % 4 != 3 else "abstained")
    return dataclasses.replace(SUITES["question"], name="own", score=even, **changes)


def test_unanswered_items_can_be_left_apart():
    metrics = evaluate(Half(), [_suite(missing="apart")], n=8, progress=False).metrics()
    assert (metrics["own/test"].value, metrics["own/test"].n) == (4 / 6, 6)
    assert (metrics["own/test/abstained"].value, metrics["own/test/abstained"].n) == (2 / 8, 8)
    assert evaluate(Half(), [_suite()], n=8, progress=False).right("own").n == 8


def test_several_answers_to_an_item_are_one_observation():
    system = Half()
    metric = evaluate(system, [_suite(samples=3)], n=8, progress=False).right("own")
    assert len(system.asked) == 24 and len({seed for _, _, seed in system.asked}) == 24
    assert (metric.value, metric.n, metric.unit) == (0.5, 8, "share")


def test_no_answer_at_all_is_counted():
    class Silent:
        def generate(self, documents, sampling=None, *, seeds=0):
            return list(documents)
    results = evaluate(Silent(), ("draw", "caption"), n=3, progress=False)
    assert {o.status for o in results.outcomes.values()} == {"missing"}
    assert results.metrics()["draw/test/missing"].value == 1 and results.right("caption").value == 0


# -- resuming ---------------------------------------------------------------------------------------------------------

def test_a_run_that_was_stopped_goes_on(tmp_path):
    path = tmp_path / "items.jsonl"
    settings = {"n": 6, "batch": 2, "progress": False, "splits": ("test", "pairs")}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Half(stop_after=6), ("caption", "refer"), **settings, resume_file=path)
    with path.open("a") as file:
        file.write('{"key": ["caption", "te')  # killed inside a line
    rest = Half()
    results = evaluate(rest, ("caption", "refer"), **settings, resume_file=path)
    assert len(rest.asked) == 24 - 6, "finished items are not asked again"
    whole = evaluate(Half(), ("caption", "refer"), **settings)
    assert results.outcomes == whole.outcomes and results.metrics() == whole.metrics()
    assert results.cost.documents == 24
    more = Half()
    longer = evaluate(more, ["caption"], n=7, progress=False, resume_file=path)
    assert [a[:2] for a in more.asked] == [("caption", 6)] and longer.right("caption").n == 7
    assert all(json.loads(line) for line in path.read_text().splitlines())
    with pytest.raises(ValueError, match="expected results of this system"):
        evaluate(Half(), ["caption"], n=6, seed=1, progress=False, resume_file=path)


def test_wrong_names_and_numbers_are_refused():
    with pytest.raises(ValueError, match="did you mean 'caption'"):
        find_suite("captions")
    with pytest.raises(ValueError, match="expected a split of draw"):
        evaluate(Half(), ["draw"], splits=("train",))
    for changes in ({"n": 0}, {"batch": 0}, {"splits": ()}):
        with pytest.raises(ValueError, match="expected n >= 1"):
            evaluate(Half(), ["draw"], **changes)
    with pytest.raises(ValueError, match="expected different suites"):
        evaluate(Half(), ["draw", "draw"])
    with pytest.raises(ValueError, match="expected an answer that is right"):
        Outcome(right=True, status="unparsed")


# -- a real system ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny():
    import torch

    from diptych.objectives.next_token import TextSampling
    from diptych.systems.bagel import Bagel

    config = Bagel.tiny()
    short = dataclasses.replace(config.sampling, evaluations=2, text=TextSampling(max_tokens=4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        system = Bagel(dataclasses.replace(config, sampling=short))
        torch.nn.init.normal_(system.latent_out.weight, std=0.1)
    return system


def test_an_untrained_system_goes_through_all_suites(tiny, tmp_path):
    path = tmp_path / "items.jsonl"
    results = evaluate(tiny, SUITES, n=2, progress=False, resume_file=path)
    assert len(results.outcomes) == 2 * len(SUITES) and not any(o.right for o in results.outcomes.values())
    assert (results.cost.flops or 0) > 1e6 and (results.cost.seconds or 0) > 0
    each = [f.metric.value * (f.metric.n or 0) for f in results.figures() if f.name == "mean GFLOP"]
    assert sum(each) * 1e9 == pytest.approx(results.cost.flops), "every answer says what it cost"
    assert results.settings["sampling"]["evaluations"] == 2
    import torch

    with torch.no_grad():
        tiny.head.weight += 1
    try:
        with pytest.raises(ValueError, match="expected results of this system"):
            evaluate(tiny, ["caption"], n=2, progress=False, resume_file=path)
    finally:
        with torch.no_grad():
            tiny.head.weight -= 1


def test_eval_on_the_command_line(tiny, tmp_path, capsys, monkeypatch):
    from diptych.cli import main
    from diptych.ledger import entry
    from diptych.systems.io import save_system

    save_system(tiny, tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text("system: bagel\nsize: tiny\ndata: [{world: mini}]\n"
                                          "stages: [{steps: 1, batch: 1, lr: 0.1}]\n")
    monkeypatch.setattr(entry, "ENTRIES", tmp_path / "entries")
    out = tmp_path / "results.json"
    code = main.main(["eval", str(tmp_path / "model"), "--suites", "caption,refer", "--splits", "test,pairs",
                      "--n", "2", "--controls", "--out", str(out), "--ledger", "tiny-world"])
    printed = capsys.readouterr().out
    assert code == 0 and "caption" in printed and "pairs" in printed and "control: other" in printed
    assert len(json.loads(out.read_text())["items"]) == 8
    written = read_entry(tmp_path / "entries" / "tiny-world.json")
    assert written.system == "bagel" and written.recipe["model"]["size"] == "tiny" and "refer/pairs" in written.metrics
    assert main.main(["eval", str(tmp_path / "model"), "--suites", "caption,questoin"]) == 2
    assert "did you mean 'question'" in capsys.readouterr().err


def test_keys_are_plain_tuples():
    assert Key(*json.loads(json.dumps(list(Key("draw", "test", 3))))) == ("draw", "test", 3, 0)
