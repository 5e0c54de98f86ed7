"""The tour: every section is on the page, verdicts are those of the verifier, and nothing is fetched or injected."""
import html.parser
import re

import numpy as np
import pytest
import torch

from diptych.benchmarks.controls import CONTROLS
from diptych.benchmarks.suite import Outcome
from diptych.cli import main
from diptych.document import Boxes, Document, Image, Text
from diptych.ledger import Cost, Entry, proportion, write_entry
from diptych.report import page
from diptych.report.questions import questions_about
from diptych.report.sections import SECTIONS, steps, whole
from diptych.report.tour import SCALES, STEPWISE, SWEPT, Tour, guided
from diptych.systems.base import Event, Sampling, System
from diptych.world import tasks
from diptych.world.sample import find_world, stream
from diptych.world.scene import Scene
from diptych.world.spec import Spec
from diptych.world.verify import verify


class Knowing(System):
    """Fills world documents with the truth, everything else with the same words and a blank picture."""

    config = None

    def __init__(self, words: str = "yes") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.words = words
        self.samplings: list[Sampling] = []

    def generate(self, documents, sampling=None, *, seeds=0, emit=None):
        self.samplings.append(sampling or self.default_sampling())
        assert all(p.empty for d in documents for p in d if p.target)
        made = [CONTROLS["oracle"](d) if "index" in d.meta else self._guess(d) for d in documents]
        for i, document in enumerate(made):
            for k, piece in enumerate(document):
                if emit is not None and piece.target and isinstance(piece, Image):
                    for kind in ("partial", "partial", "picture"):
                        emit(i, Event(kind, k, torch.from_numpy(piece.pixels)))
        return made

    def _guess(self, document: Document) -> Document:
        blank = np.zeros((3, 64, 64), np.float32)
        pieces = [p.replace(text=self.words) if p.target and isinstance(p, Text) else
                  p.replace(pixels=blank) if p.target else p for p in document]
        return Document(tuple(pieces), document.task, document.meta)


class Tags(html.parser.HTMLParser):
    """Collects tags with attributes, and checks that they close."""

    VOID = ("meta", "img", "rect", "link", "br")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.found if t == tag]


@pytest.fixture(scope="module")
def toured() -> tuple[Tour, str]:
    tour = Tour(Knowing(), name="knowing", n=3, progress=False)
    return tour, whole(tour, [make() for _, make in steps(tour)])


def test_every_section_is_there_and_complete(toured):
    _, source = toured
    tags = Tags(source)
    assert tags.open == []
    assert [s["id"] for s in tags.all("section")] == list(SECTIONS) == [a["href"][1:] for a in tags.all("a")]
    for key, (title, _, _) in SECTIONS.items():
        body = source.partition(f'<section id="{key}">')[2].partition("</section>")[0]
        assert title.replace("'", "&#x27;") in body
        assert ("<img" in body) == (key != "scores"), key
    assert len(tags.all("img")) > 60 and all(a["alt"] for a in tags.all("img"))
    assert len(re.findall('<div class="steps">', source)) == len(STEPWISE)


def test_nothing_is_fetched(toured):
    _, source = toured
    tags = Tags(source)
    assert not re.search("https?:|//[a-z]|@import|url\\(", re.sub("base64,[^\"]*", "", source))
    assert not [t for t, _ in tags.found if t in ("script", "link", "iframe", "object")]
    assert all(a["src"].startswith("data:image/png;base64,") for a in tags.all("img"))
    assert "prefers-color-scheme: dark" in source and tags.all("meta")[1]["name"] == "viewport"


def test_verdicts_are_the_verifiers(toured):
    tour, source = toured
    sections = {key: source.partition(f'<section id="{key}">')[2].partition("</section>")[0] for key in SECTIONS}
    for key in ("describing", "pointing", "drawing", "editing", "layout", "planning", "story"):
        assert 'class="verdict good"' in sections[key] and 'class="verdict bad"' not in sections[key], key
    assert 'class="verdict good"' not in sections["step-by-step"], "blank pictures show nothing"
    assert 'class="mark good"' in sections["asking"] and 'class="mark bad"' in sections["asking"]
    assert sections["scores"].count("100%") == 7
    assert all(o.right for o in tour.results.outcomes.values())


def test_round_trips_are_judged_by_what_was_drawn():
    tour = Tour(Knowing(tasks.document("caption", 0).pieces[2].text), n=2, progress=False)
    assert [s.outcome.right for s in tour.round_trips(2)] == [False, False]
    scene = Scene.from_dict(tour.shown("draw", 1)[0].true.meta["scene"])
    from diptych.world.language import caption
    tour.system.words = caption(scene)  # type: ignore[assignment]
    assert [s.outcome.right for s in tour.round_trips(2)] == [True, False]


def test_the_sweep_changes_guidance_and_nothing_else():
    system = Knowing()
    rows = Tour(system, n=1, progress=False).sweep()
    used = system.samplings[-len(SCALES):]
    assert [b.scale for s in used for b in s.guidance.branches if b.context == "no_text"] == list(SCALES)
    assert len({repr(guided(s, 1)) for s in used}) == 1
    assert [scale for scale, _ in rows] == list(SCALES) and all(len(r) == SWEPT for _, r in rows)


def test_what_models_and_users_write_is_text_only():
    evil = '<script>alert("x")</script>'
    tour = Tour(Knowing(evil), name=evil, n=1, progress=False)
    source = whole(tour, [make() for title, make in steps(tour) if title == "Asking"])
    assert "<script" not in source and "&lt;script&gt;" in source
    marks = page.boxes(np.array([[0.1, -1, 2, 0.5]]), labels=(evil,))
    assert "<script" not in marks and 'width="90.00" height="50.00"' in marks
    assert "<script" not in page.picture(Image(pixels=np.zeros((3, 8, 8))), evil, evil)
    assert "<script" not in page.verdict(Outcome(right=False, checks={evil: False}))


@pytest.mark.parametrize(("outcome", "words"), [
    (Outcome(right=True), "right"), (Outcome(right=True, checks={"size": False}), "right, except size"),
    (Outcome(right=False, checks={"count": False, "color": True}), "wrong: count"),
    (Outcome(right=False, status="abstained"), "no clear shapes"),
    (Outcome(right=False, status="unparsed"), "no answer that can be read")])
def test_verdicts_in_words(outcome, words):
    assert f" {words}</p>" in page.verdict(outcome)


def test_questions_about_a_picture_have_true_answers():
    world = find_world("mini")
    for index in range(30):
        scene = Scene.from_dict(tasks.document("caption", index, split="test").meta["scene"])
        asked = questions_about(scene, world, stream(world, "tour", "test", index))
        answers = dict(asked)
        assert len(answers) == len(asked) >= 3 and {"yes", "no"} <= set(answers.values())
        for question, answer in asked:
            words = question.split()
            if words[0] == "is":
                there = (words[3], words[4]) in {(o.color, o.shape) for o in scene.objects}
                assert answer == ("yes" if there else "no")
            if words[:2] == ["what", "color"]:
                assert [o.color for o in scene.objects if o.shape == words[4]] == [answer]


def test_stepwise_prompts_can_be_drawn():
    """The claims beside the words are those of a picture of the world."""
    from diptych.world.render import render
    from diptych.world.sample import sample_scene

    world = find_world("mini")
    for number, (words, spec) in enumerate(STEPWISE):
        assert all((i.color, i.shape) not in world.held_out_pairs for i in spec.items)
        count = sum(i.count for i in spec.items)
        for index in range(400):
            scene = sample_scene(world, stream(world, f"s{number}", "train", index), wants=spec.items, count=count)
            if verify(render(scene, 64), spec, world).exact:
                break
        else:
            raise AssertionError(f"no scene for {words}")
    assert Spec.from_dict(STEPWISE[0][1].to_dict()) == STEPWISE[0][1]


def test_the_ledger_stands_beside_the_scores(toured, monkeypatch, tmp_path):
    tour, _ = toured
    for name, date, right in (("knowing-old", "2025-01-01", 1), ("knowing-new", "2025-02-01", 471),
                              ("other", "2025-03-01", 9)):
        write_entry(Entry(name=name, kind="quality", system="bagel", level="E1", recipe={}, cost=Cost(), date=date,
                          metrics={"draw/test": proportion(right, 500)}), tmp_path)
    from diptych.ledger import read_entries
    from diptych.report import sections
    monkeypatch.setattr("diptych.report.tour.read_entries", lambda: read_entries(tmp_path))
    shown = sections.scores(tour)
    assert "94%" in shown and "of 500" in shown and "2025-02-01" in shown and "not measured" in shown


def test_tour_on_the_command_line_with_an_untrained_model(tmp_path, capsys):
    import dataclasses

    from diptych.objectives.next_token import TextSampling
    from diptych.systems.bagel import Bagel
    from diptych.systems.io import save_system

    config = Bagel.tiny()
    short = dataclasses.replace(config.sampling, evaluations=2, text=TextSampling(max_tokens=3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_system(Bagel(dataclasses.replace(config, sampling=short)), tmp_path / "model")
    code = main.main(["tour", "-o", str(tmp_path / "report"), "--model", str(tmp_path / "model"), "--n", "1"])
    printed = capsys.readouterr().out
    assert code == 0 and str(tmp_path / "report" / "index.html") in printed and "everything" not in printed
    source = (tmp_path / "report" / "index.html").read_text()
    assert [s["id"] for s in Tags(source).all("section")] == list(SECTIONS)
    (tmp_path / "file").write_text("")
    assert main.main(["tour", "-o", str(tmp_path / "file"), "--model", str(tmp_path / "model")]) == 2
    assert "expected a folder" in capsys.readouterr().err


def test_a_model_without_boxes_still_has_a_page():
    assert page.boxes(None) == page.boxes(np.zeros((0, 4)))
    assert "rect" not in page.boxes(Boxes(boxes=np.zeros((0, 4))).boxes)
