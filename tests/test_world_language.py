from collections import Counter

import numpy as np
import pytest

from diptych.world.language import (
    LEVELS,
    caption,
    caption_spec,
    describe,
    draw_prompt,
    item_phrase,
    label,
    parse_caption,
    plural,
    reading_order,
    same_claims,
)
from diptych.world.sample import Stream, sample_scene
from diptych.world.scene import PLACES, WORLDS, Object, Scene, place, relation
from diptych.world.spec import Item, Spec

MINI = WORLDS["mini"]


def scenes(name: str = "mini", number: int = 150):
    for index in range(number):
        rng = Stream("language", name, index)
        yield sample_scene(WORLDS[name], rng), rng


def true(spec: Spec, scene: Scene) -> bool:
    """Brute force: give every item its objects, all objects of a closed claim used once."""
    left = list(scene.objects)
    chosen = []
    for item in sorted(spec.items, key=lambda i: [i.color, i.shape, i.size, i.texture, i.place].count(None)):
        fit = [o for o in left if item.matches(o) and item.place in (None, place(o))][:item.count]
        if len(fit) < item.count:
            return False
        chosen.append((item, fit))
        left = [o for o in left if o not in fit]
    groups = [next(fit for item, fit in chosen if item is wanted) for wanted in spec.items]
    related = all(relation(a, name, b) == "yes" for i, name, j in spec.relations for a in groups[i] for b in groups[j])
    return related and not left and spec.background in (None, scene.background)


def test_the_canonical_caption():
    scene = Scene(objects=(
        Object(id=0, shape="star", color="blue", size="medium", radius=320, x=2048, y=2048),
        Object(id=1, shape="circle", color="red", size="large", radius=480, x=800, y=880),
        Object(id=2, shape="arrow", color="orange", size="small", radius=208, x=3400, y=1000, texture="hstripe")))
    assert caption(scene) == ("a large red circle at the top left , a small orange horizontally striped arrow at the "
                              "top right , a medium blue star at the center , on a white background")
    assert [o.id for o in reading_order(scene)] == [1, 2, 0]
    assert label(scene.objects[0]) == "medium blue star"


@pytest.mark.parametrize("name", list(WORLDS))
def test_captions_parse_back_to_the_scene(name: str):
    for scene, _ in scenes(name):
        text = caption(scene)
        spec = parse_caption(text)
        assert spec == caption_spec(scene) and true(spec, scene)
        assert parse_caption(text.replace(" ,", ",").upper()) == spec
        # one word changed is another claim or none
        swap = ("large", "medium") if "large" in text else ("medium", "large")
        other = parse_caption(text.replace(*swap, 1))
        assert other is not None and not same_claims(spec, other)


def test_the_caption_does_not_depend_on_the_order_of_objects():
    for scene, rng in scenes(number=50):
        assert caption(scene) == caption(scene.replace(objects=tuple(rng.shuffled(scene.objects))))


@pytest.mark.parametrize("text", [
    "", "a red circle", "a large red circle at the top left", "a large red circle , on a white background",
    "a large red circle at the middle , on a white background", "a large red dog at the top , on a white background",
    "a red circle at the top , on a white background", "large red circle at the top , on a white background",
    "a large red circle at the top , on a red background", "on a white background",
    "a large red shiny circle at the top , on a white background",
    "a large red circle at the top , , on a white background"])
def test_what_is_no_caption_gives_none(text: str):
    assert parse_caption(text) is None


def test_same_claims_ignores_order_and_nothing_else():
    a, b = Item(color="red", shape="circle"), Item(color="blue", shape="star")
    assert same_claims(Spec(items=(a, b)), Spec(items=(b, a)))
    assert not same_claims(Spec(items=(a, b)), Spec(items=(a, a)))
    assert not same_claims(Spec(items=(a,)), Spec(items=(a, a)))
    assert not same_claims(Spec(items=(a,), background="white"), Spec(items=(a,)))
    assert not same_claims(Spec(items=(a, b), relations=((0, "above", 1),)), Spec(items=(a, b)))


@pytest.mark.parametrize("name", [name for name, world in WORLDS.items() if world.max_objects > 1])
@pytest.mark.parametrize("template", ["train", "held_out"])
def test_prompts_are_true_and_not_true_of_another_picture(name: str, template: str):
    related = placed = 0
    before = None
    wrong = []
    for scene, rng in scenes(name):
        text, spec = draw_prompt(scene, rng, template)
        assert true(spec, scene), text
        assert sum(i.count for i in spec.items) == len(scene.objects) and spec.closed
        assert all(w in text for i in spec.items for w in (i.color, i.shape, i.size, i.place) if w)
        assert (spec.background is None) == ("background" not in text)
        assert all(name in text for _, name, _ in spec.relations)
        related += bool(spec.relations)
        placed += any(i.place for i in spec.items)
        wrong.append(before is not None and true(spec, before))
        before = scene
    assert related > 10 and placed > 10 and np.mean(wrong) < 0.05


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("template", ["train", "held_out"])
def test_descriptions_are_true(level: str, template: str):
    seen = set()
    for scene, rng in scenes("rich", 60):
        text, spec = describe(scene, level, rng, template)
        assert true(spec, scene) and text == text.lower().strip() and "  " not in text
        seen.add(text)
        if level == "long":
            assert all(p in text for p in PLACES if any(place(o) == p for o in scene.objects))
    assert len(seen) > 50


def test_wordings_held_out_for_tests_never_occur_in_training():
    texts = {t: set() for t in ("train", "held_out")}
    for template, found in texts.items():
        for index in range(400):
            rng = Stream("words", index)
            found.add(draw_prompt(sample_scene(MINI, rng), rng, template)[0])
    assert not any("in front of" in t for t in texts["train"]) and any("in front of" in t for t in texts["held_out"])


def test_words():
    assert item_phrase(Item(count=2, color="red", shape="cross")) == "two red crosses"
    assert item_phrase(Item(color="orange", place="top")) == "an orange object at the top"
    assert item_phrase(Item(size="large", shape="ellipse", texture="solid")) == "a large ellipse"
    assert plural("hexagon") == "hexagons"
    with pytest.raises(ValueError, match="expected level"):
        describe(next(scenes())[0], "tiny", Stream(0))


def test_prompts_vary():
    scene = sample_scene(MINI, Stream("vary"), count=3)
    texts = Counter(draw_prompt(scene, Stream(i))[0] for i in range(300))
    assert len(texts) > 80 and texts.most_common(1)[0][1] < 40
