import hashlib
import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from diptych.document import Boxes, Document, Image, Text
from diptych.world.claims import questions
from diptych.world.language import caption, caption_spec, parse_caption, same_claims
from diptych.world.programs import parse, run
from diptych.world.render import boxes, render
from diptych.world.sample import SPLITS, admissible, find_world, has_count, has_pair, is_test
from diptych.world.scene import Scene, WorldConfig
from diptych.world.spec import Spec
from diptych.world.tasks import ABOUT_PROMPTS, DRAW_COUNTS, LEVELLED, TASKS, claims, document, record

MINI = find_world("mini")
ALL = (*TASKS, *ABOUT_PROMPTS, *LEVELLED)
FORMS = {
    "caption": "image text text*", "question": "image text text*", "draw": "text image*", "edit": "image text image*",
    "refer": "image text boxes*", "layout": "text boxes image*", "plan": "text boxes* image*",
    "check": "image text text*", "caption-short": "image text text*", "draw-short": "text image*",
    "draw-long": "text image*", "story": "text image* text* image* text* image* text* image*",
    "talk": "image( text (text|boxes)[*]){1,6}"}


def pictures(doc: Document) -> list[Scene]:
    records = doc.meta.get("scenes") or [doc.meta["scene"], *([doc.meta["after"]] if "after" in doc.meta else [])]
    return [Scene.from_dict(r) for r in records]


@pytest.mark.parametrize("task", ALL)
def test_forms(task: str):
    for split in SPLITS:
        doc = document(task, 3, split=split)
        form = " ".join(p.kind + "*" * p.target for p in doc)
        assert re.fullmatch(FORMS[task], form) if task == "talk" else form == FORMS[task]
        assert all(p.role == ("assistant" if p.target else "user") for p in doc)
        assert doc.task == doc.meta["task"] == task and doc.meta["index"] == 3 and doc.meta["split"] == split
        assert doc.meta["world"] == "mini" and not any(p.empty for p in doc)
        assert all(p.empty for p in doc.prompt().targets)


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize("name", ["mini", "rich"])
def test_pictures_are_those_of_the_record(task: str, name: str):
    for index in range(5):
        doc = document(task, index, world=name)
        shown, scenes = doc.of(Image), pictures(doc)
        assert len(shown) == len(scenes)
        for image, scene in zip(shown, scenes, strict=True):
            np.testing.assert_array_equal(image.pixels, render(scene, find_world(name).pixels))
            assert record(scene) == scene.to_dict()
        if "spec" in doc.meta:
            spec = Spec.from_dict(doc.meta["spec"])
            assert json.loads(json.dumps(spec.to_dict())) == claims(spec) == doc.meta["spec"]


@pytest.mark.parametrize("task", ALL)
def test_documents_survive_json(task: str):
    doc = document(task, 1)
    assert Document.from_json(doc.to_json()) == doc
    assert document(task, 1) == doc  # the pictures and the facts are not shared between calls
    assert document(task, 2) != doc


def test_the_same_in_any_process_and_order():
    code = ("import hashlib; from diptych.world.tasks import *\n"
            "for t in reversed(TASKS):\n"
            "    for i in (5, 2): print(t, i, hashlib.sha256(document(t, i).to_json().encode()).hexdigest())")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}).stdout.splitlines()
    here = [f"{t} {i} {hashlib.sha256(document(t, i).to_json().encode()).hexdigest()}" for t in TASKS for i in (2, 5)]
    assert sorted(out) == sorted(here)


@pytest.mark.parametrize("task", ALL)
def test_held_out_combinations_never_occur_in_training(task: str):
    for index in range(350):
        for scene in pictures(document(task, index)):
            assert not has_pair(scene, MINI) and not has_count([o.shape for o in scene.objects], MINI)
            assert not is_test(scene)


@pytest.mark.parametrize("task", ALL)
def test_the_other_splits(task: str):
    for split in ("test", "pairs", "counts"):
        for index in range(12):
            scenes = pictures(document(task, index, split=split))
            assert all(admissible(s, MINI, split, first=i == 0) for i, s in enumerate(scenes))


def test_contents():
    for index in range(40):
        doc = document("caption", index)
        scene = pictures(doc)[0]
        spec = parse_caption(doc.pieces[2].text)
        assert doc.pieces[2].text == caption(scene) and spec == Spec.from_dict(doc.meta["spec"]) == caption_spec(scene)
        doc = document("refer", index)
        scene = pictures(doc)[0]
        target = run(parse(doc.meta["program"]), scene)
        np.testing.assert_allclose(doc.of(Boxes)[0].boxes, [boxes(scene)[target.id]], rtol=1e-6)
        assert doc.meta["target"] == target.id and doc.of(Boxes)[0].boxes.shape == (1, 4)
        doc = document("edit", index)
        assert same_claims(Spec.from_dict(doc.meta["spec"]), caption_spec(pictures(doc)[1]))
        for task in ("plan", "layout"):
            doc = document(task, index)
            scene, piece = pictures(doc)[0], doc.of(Boxes)[0]
            assert len(piece.labels) == len(piece.boxes) == len(scene.objects)
            for label, box in zip(piece.labels, piece.boxes, strict=True):
                assert any(label == f"{o.size} {o.color} {o.shape}" and np.allclose(box, boxes(scene)[o.id], atol=1e-6)
                           for o in scene.objects)


def test_levels_of_detail():
    for index in range(20):
        short, drawn, long = (document(t, index) for t in ("caption-short", "draw-short", "draw-long"))
        for doc, text in ((short, short.pieces[2].text), (drawn, drawn.pieces[0].text)):
            spec = Spec.from_dict(doc.meta["spec"])
            assert spec.background is None and all(i.size is None and i.place is None for i in spec.items)
            assert sum(i.count for i in spec.items) == len(pictures(doc)[0].objects)
            assert all(i.color in text and i.shape in text for i in spec.items) and "background" not in text
        scene = pictures(long)[0]
        assert caption(scene) in long.pieces[0].text and Spec.from_dict(long.meta["spec"]) == caption_spec(scene)


def test_prompts_decide_the_questions_about_them():
    kinds = Counter()
    for index in range(60):
        doc = document("check", index)
        asked, answer = doc.of(Text)
        found = {q.text: q.answer for q in questions(Spec.from_dict(doc.meta["spec"]))}
        assert found[asked.text] == answer.text == doc.meta["answer"]
        kinds[doc.meta["family"]] += 1
        scene = pictures(doc)[0]
        if doc.meta["family"] == "color":
            shape = asked.text.split()[-2]
            assert [o.color for o in scene.objects if o.shape == shape] == [answer.text]
    assert set(kinds) >= {"exist", "count", "color", "place", "absent"}


def test_drawings_have_the_documented_numbers_of_objects():
    counts = Counter(len(document("draw", i).meta["scene"]["objects"]) for i in range(1500))
    for number, share in DRAW_COUNTS.items():
        assert abs(counts[number] / 1500 - share) < 0.05


def test_wordings_for_tests_differ_and_words_are_few():
    words: set[str] = set()
    for task in TASKS:
        train = {p.text for i in range(150) for p in document(task, i).of(Text) if not p.target}
        other = {p.text for i in range(60) for p in document(task, i, template="held_out").of(Text) if not p.target}
        words.update(w for text in train for w in text.split())
        words.update(w for i in range(50) for p in document(task, i).of(Text) for w in p.text.split())
        assert not train & other, task
    assert len(words) <= 160 and all(w == w.lower() for w in words)


def test_worlds_of_ones_own():
    world = WorldConfig(name="own", shapes=("circle", "ring", "arrow", "hexagon"), colors=("brown", "blue", "pink"),
                        sizes=("small", "medium", "large"), max_objects=5, pixels=96,
                        held_out_pairs=(("brown", "ring"),), held_out_counts=((2, "arrow"),))
    for task in TASKS:
        for index in range(4):
            doc = document(task, index, world=world)
            assert all(i.size == (96, 96) for i in doc.of(Image))
            assert all(admissible(s, world, "train") for s in pictures(doc))


@pytest.mark.parametrize("arguments, match", [
    ({"task": "sing"}, "expected task"), ({"task": "draw", "split": "val"}, "expected split"),
    ({"task": "draw", "world": "maxi"}, "expected a world"),
    ({"task": "edit", "template": "new"}, "expected template")])
def test_errors(arguments: dict, match: str):
    with pytest.raises(ValueError, match=match):
        document(**({"index": 0} | arguments))
