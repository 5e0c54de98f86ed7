"""Candidates to be judged: labels are exact, places are balanced, replies are those that the readers of judges read."""
import math
from collections import Counter

import numpy as np
import pytest

from diptych.alignment.rewards import verdicts
from diptych.document import Document, Image, Text
from diptych.world import judging
from diptych.world.judging import DIMENSIONS, HIGH, KINDS, LOW, MOST, NAMES, sample_case
from diptych.world.language import caption, parse_caption
from diptych.world.perceive import perceive
from diptych.world.render import render
from diptych.world.sample import SPLITS, Stream, admissible, find_world, is_test, sample_scene, stream
from diptych.world.scene import Scene
from diptych.world.tasks import JUDGING, document
from diptych.world.verify import verify

MINI = find_world("mini")


def text(doc: Document) -> str:
    return str(doc.pieces[-1].text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", JUDGING)
def test_labels_follow_from_the_scores_and_are_read_back(task: str) -> None:
    kind, _, mode = task.partition("-")
    for i in range(25):
        doc = document(task, i, world="few")
        scores, said = doc.meta["scores"], text(doc)
        assert all(0 <= s <= MOST for row in scores for s in row) and len(scores[0]) == len(DIMENSIONS[kind])
        assert all(3 * MOST - sum(row) <= MOST for row in scores), "at most three defects"
        if mode == "point":
            assert verdicts.point(said, LOW, HIGH) == HIGH - (3 * MOST - sum(scores[0]))
            continue
        first, second = map(sum, scores)
        assert doc.meta["better"] == (1 if first > second else 2) and first != second
        assert doc.meta["answer"] == f"{NAMES[kind]} {doc.meta['better']} is better"
        assert verdicts.pair(said) == doc.meta["better"]
        if mode == "think":
            assert verdicts.well_formed(said) and verdicts.accurate(said, doc.meta["answer"])
            assert verdicts.supported(said) is True


def test_the_better_one_stands_in_either_place() -> None:
    for kind in KINDS:
        found = Counter(document(f"{kind}-pair", i, world="one").meta["better"] for i in range(300))
        assert 0.42 < found[1] / 300 < 0.58, (kind, found)


def test_thoughts_err_in_places_but_not_in_the_verdict() -> None:
    slips = scores = 0
    for i in range(120):
        doc = document("draw-think", i)
        lines = text(doc).partition(" ; total score")[0].removeprefix("<think> ").split(";")
        told = [line.split()[-2:] for line in lines]
        for (a, b), *true in zip(told, *doc.meta["scores"], strict=True):
            slips += (int(a) != true[0]) + (int(b) != true[1])
            scores += 2
    assert 0.02 < slips / scores < judging.SLIP * 1.3


def test_one_picture_without_defects_shows_what_is_described_and_every_wrong_attribute_is_seen() -> None:
    right = wrong = 0
    for i in range(150):
        case = sample_case(MINI, stream(MINI, "exact", "test", i), "draw", split="test")
        spec = parse_caption(case.prompt)
        for c in case.candidates:
            if spec is None or c.defects[1] or c.defects[2]:
                continue
            [pixels] = c.pictures
            verdict = verify(pixels, spec)
            if c.defects[0] == 0:
                np.testing.assert_array_equal(pixels, render(case.scene, MINI.pixels))
                assert verdict.exact
                right += 1
            else:
                seen = perceive(pixels)
                assert not verdict.exact and len(seen.objects) == len(case.scene.objects)
                by_place = sorted(case.scene.objects, key=lambda o: (o.x, o.y))
                changed = sum(getattr(a, n) != getattr(b, n) for n in ("color", "shape", "size") for a, b in
                              zip(by_place, (min(seen.objects, key=lambda s: math.dist(s.center, o.center))
                                             for o in by_place), strict=True))
                assert changed + (seen.background != case.scene.background) == c.defects[0]
                wrong += 1
    assert right > 15 and wrong > 15


def test_steps_of_blur_and_noise_grow_and_are_levels() -> None:
    scene = sample_scene(MINI, stream(MINI, "look", "train", 0))
    clean = render(scene, 64)
    for seed in range(6):
        made = [judging.degraded(clean, k, Stream("steps", seed)) for k in range(4)]
        errors = [float(np.abs(m - clean).mean()) for m in made]
        assert errors[0] == 0 and errors == sorted(errors) and len(set(errors)) == 4
        for m in made:
            np.testing.assert_array_equal(Image.from_uint8(Image(pixels=m).to_uint8()).pixels, m)


def test_torn_and_bitten_objects_change_inside_their_surroundings_only() -> None:
    for i in range(20):
        scene = sample_scene(MINI, stream(MINI, "form", "train", i))
        clean, obj = render(scene, 64), scene.objects[0]
        for spoil in (judging.torn, judging.bitten):
            made = spoil(clean, obj, scene)
            rows, columns = np.nonzero(np.abs(made - clean).max(0) > 0.02)
            assert len(rows) >= 8, (spoil, obj)
            reach = 2.2 * obj.radius / 64 + 2
            assert np.abs(columns - obj.x / 64).max() <= reach and np.abs(rows - obj.y / 64).max() <= reach


@pytest.mark.parametrize("split", SPLITS)
def test_described_scenes_belong_to_the_split(split: str) -> None:
    for task in ("draw-pair", "answer-pair"):
        for i in range(15):
            scene = Scene.from_dict(document(task, i, split=split).meta["scene"])
            assert admissible(scene, MINI, split)
            assert is_test(scene) == (split == "test") or split in ("pairs", "counts")


def test_training_pictures_never_show_a_held_out_pair() -> None:
    held = {f"{c} {s}" for c, s in MINI.held_out_pairs}
    for i in range(60):
        doc = document("draw-pair", i)
        for picture, row in zip(doc.of(Image), doc.meta["scores"], strict=True):
            if row[1] == row[2] == MOST:
                assert not {f"{o.color} {o.shape}" for o in perceive(picture.pixels).objects} & held


def test_inspections_say_what_is_asked_for_of_what_is_shown() -> None:
    asked: Counter[str] = Counter()
    clean = 0
    for i in range(120):
        doc = document("inspect", i, world="one")
        [request], [_, look, form] = [d.text for d in doc.of(Text)[:1]], doc.meta["scores"][0]
        names = str(request).removeprefix("tell the ").removesuffix(" of the image").split(" and ")
        asked.update(names)
        scene = Scene.from_dict(doc.meta["scene"])
        wanted = {"look": f"look {look}", "form": f"form {form}", "words": caption(scene)}
        assert text(doc) == doc.meta["answer"] == " ; ".join(wanted[n] for n in names)
        if look == form == MOST:
            np.testing.assert_array_equal(doc.of(Image)[0].pixels, render(scene, find_world("one").pixels))
            clean += 1
        elif look == MOST:
            assert not np.array_equal(doc.of(Image)[0].pixels, render(scene, find_world("one").pixels))
    assert min(asked.values()) > 60 and set(asked) == {"look", "form", "words"} and clean >= 3
    assert "please tell me" in str(document("inspect", 0, template="held_out").of(Text)[0].text)


def test_held_out_requests_ask_otherwise() -> None:
    a, b = (document("draw-pair", 3, template=t).of(Text)[0].text for t in ("train", "held_out"))
    assert a != b and "please tell me" in str(b)
    with pytest.raises(ValueError, match="expected a kind"):
        sample_case(MINI, stream(MINI, "x", "train", 0), "song")


def test_swapping_a_pair_swaps_everything() -> None:
    for kind in KINDS:
        doc = document(f"{kind}-pair", 5, world="few")
        other = judging.swapped(doc)
        assert other.meta["better"] == 3 - doc.meta["better"] and other.meta["scores"] == doc.meta["scores"][::-1]
        assert other.pieces[-1].empty and judging.swapped(_filled(other)).prompt() == doc.prompt()
        assert other.prompt() != doc.prompt() and len(other) == len(doc)
    with pytest.raises(ValueError, match="expected a pair"):
        judging.swapped(document("draw-point", 0))


def test_worlds_of_one_object_have_questions_of_every_kind_that_they_can() -> None:
    assert all(document("question", i, split="test", world="one").meta["answer"] for i in range(60))


def _filled(doc: Document) -> Document:
    return Document((*doc.pieces[:-1], doc.pieces[-1].replace(text=doc.meta["answer"])), doc.task, doc.meta)
