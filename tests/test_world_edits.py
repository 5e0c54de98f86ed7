from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from diptych.world.edits import KINDS, Edit, edit_mask, sample_edit
from diptych.world.render import render
from diptych.world.sample import SPLITS, Stream, admissible, fits, sample_scene
from diptych.world.scene import SIZES, WORLDS, Object, Scene, WorldConfig, place
from diptych.world.stories import CLOCKWISE, LAWS, LENGTH, growth, laws, sample_story

MINI = WORLDS["mini"]


def edits(kind: str, number: int = 40, split: str = "train", world: WorldConfig = MINI):
    return [sample_edit(world, Stream("edits", kind, i), kind=kind, split=split) for i in range(number)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mini", "rich"])
def test_what_is_not_named_stays(kind: str, name: str):
    world = WORLDS[name]
    for before, edit, after, _text in edits(kind, 15, world=world):
        assert edit.kind == kind and after == edit.apply(before) and before != after
        assert fits(before, world) and fits(after, world)
        assert admissible(before, world, "train") and admissible(after, world, "train")
        untouched = [o for o in before.objects if o.id != edit.target]
        assert [o for o in after.objects if o.id != edit.target] == untouched
        assert (before.background == after.background) == (kind != "background")
        changed = (np.abs(render(before, 64) - render(after, 64)) > 0).any(0)
        mask = edit_mask(before, after, 64)
        assert changed.any() and not (changed & ~mask).any()
        if kind != "background":
            assert mask.mean() < 0.5


def test_each_kind_does_what_its_instruction_says():
    for before, edit, after, text in edits("recolor"):
        new = after.by_id[edit.target]
        assert text.endswith(" " + new.color) and new == before.by_id[edit.target].replace(color=new.color)
    for before, edit, after, text in edits("resize"):
        old, new = before.by_id[edit.target], after.by_id[edit.target]
        assert text.endswith(" " + new.size) and new.size != old.size and (new.x, new.y) == (old.x, old.y)
        assert SIZES[new.size][0] <= new.radius <= SIZES[new.size][1]
    for before, edit, after, text in edits("move"):
        old, new = before.by_id[edit.target], after.by_id[edit.target]
        assert text.endswith(f"the {place(new)}") and place(new) != place(old)
        assert new.attributes() == old.attributes() and new.radius == old.radius
    for before, edit, after, text in edits("add"):
        assert len(after.objects) == len(before.objects) + 1 and edit.target not in before.by_id
        new = after.by_id[edit.target]
        assert all(w in text for w in (new.size, new.color, new.shape, f"at the {place(new)}"))
    for before, edit, after, text in edits("remove"):
        assert len(after.objects) == len(before.objects) - 1 >= 1 and edit.target not in after.by_id
        assert text.startswith(("remove the", "delete the", "take away the"))
    for before, edit, after, text in edits("replace"):
        old, new = before.by_id[edit.target], after.by_id[edit.target]
        assert text.endswith(" " + new.shape) and new == old.replace(shape=new.shape)
    for before, _edit, after, text in edits("background"):
        assert text.endswith(" " + after.background) and before.objects == after.objects


def test_the_instruction_names_one_object():
    """The words between verb and value fit the target and no other object."""
    words = {"color": MINI.colors, "shape": MINI.shapes, "size": MINI.sizes}
    for before, edit, _, text in edits("remove", 120):
        named = {n: w for n, values in words.items() for w in values if w in text.split()}
        assert named, text
        fit = [o.id for o in before.objects if all(getattr(o, n) == w for n, w in named.items())]
        assert fit == [edit.target], text


def test_inverse_edits_restore_the_scene():
    for kind in ("recolor", "resize", "move", "replace"):
        for before, edit, after, _ in edits(kind, 10):
            old = before.by_id[edit.target]
            back = Edit(kind=kind, target=edit.target, changes={k: getattr(old, k) for k in edit.changes})
            assert back.apply(after) == before
    for before, edit, after, _ in edits("add", 10):
        assert Edit(kind="remove", target=edit.target, changes={}).apply(after) == before


@pytest.mark.parametrize("split", SPLITS)
def test_edits_of_every_split(split: str):
    kinds = Counter()
    for index in range(60):
        before, edit, after, _ = sample_edit(MINI, Stream("split", index), split=split)
        assert admissible(before, MINI, split) and admissible(after, MINI, split, first=False)
        kinds[edit.kind] += 1
    assert len(kinds) == len(KINDS)


def test_resizing_goes_both_ways():
    sizes = Counter(after.by_id[edit.target].size for _, edit, after, _ in edits("resize", 100))
    assert min(sizes["medium"], sizes["large"]) > 25


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="expected an edit kind"):
        sample_edit(MINI, Stream(0), kind="swap")
    with pytest.raises(ValueError, match="expected a law"):
        sample_story(MINI, Stream(0), law="explode")


def test_the_mask_covers_what_was_hidden():
    low = Object(id=0, shape="circle", color="red", size="large", radius=496, x=2000, y=2000)
    high = low.replace(id=1, color="blue", x=2300)
    mask = edit_mask(Scene(objects=(low, high)), Scene(objects=(low,)), 64, margin=1)
    assert mask[31, 36] and not mask[5, 5] and not edit_mask(Scene(objects=(low,)), Scene(objects=(low,)), 64).any()


# -- stories ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["mini", "rich"])
def test_every_picture_of_a_story_is_a_valid_scene(law: str, name: str):
    world = WORLDS[name]
    for index in range(8):
        story = sample_story(world, Stream("story", index), law=law)
        assert len(story.scenes) == LENGTH and len(story.events) == LENGTH - 1 and story.law == law
        for number, scene in enumerate(story.scenes):
            assert fits(scene, world) and admissible(scene, world, "train", first=number == 0)
        for a, b in pairwise(story.scenes):
            assert a != b
            both = set(a.by_id) & set(b.by_id)
            changed = [k for k in both if a.by_id[k] != b.by_id[k]]
            appeared = (set(a.by_id) | set(b.by_id)) - both
            assert len(changed) + len(appeared) + (a.background != b.background) == 1


def test_laws():
    def told(law: str):
        return [sample_story(MINI, Stream("law", i), law=law) for i in range(12)]

    for law, order in (("grow", 1), ("shrink", -1)):
        for story in told(law):
            radii = np.array([[o.radius for o in s.objects] for s in story.scenes])
            steps = np.diff(radii, axis=0) * order
            assert ((steps > 0).sum(1) == 1).all() and (steps >= 0).all()
            assert sorted(radii[:, steps.any(0)].ravel()) == [r for _, r in growth(MINI)]
    for story in told("move"):
        mover = next(o.id for o in story.scenes[0].objects if o != story.scenes[1].by_id[o.id])
        path = [CLOCKWISE.index(place(s.by_id[mover]) or "") for s in story.scenes]
        way = -1 if "counterclockwise" in story.premise else 1
        assert all((b - a) % 8 == way % 8 for a, b in pairwise(path))
        assert all(e.endswith(CLOCKWISE[p]) for e, p in zip(story.events, path[1:], strict=True))
    for story in told("vanish"):
        gone = [next(o for o in a.objects if o.id not in b.by_id) for a, b in pairwise(story.scenes)]
        left = story.scenes[-1].objects
        assert len(left) == 1 and [o.x for o in (*gone, *left)] == sorted(o.x for o in story.scenes[0].objects)
    for story in told("appear"):
        assert [len(s.objects) for s in story.scenes] == [1, 2, 3, 4]
        new = [s.objects[-1] for s in story.scenes[1:]]
        assert all(o.shape in e and o.color in e for o, e in zip(new, story.events, strict=True))
    for story in told("spread"):
        first = min(story.scenes[0].objects, key=lambda o: o.x).color
        assert [sum(o.color == first for o in s.objects) for s in story.scenes] == [1, 2, 3, 4]
        assert all(e.endswith(f"turns {first}") for e in story.events)
    for story in told("background"):
        shown = [s.background for s in story.scenes]
        assert shown[0] == shown[3] and len(set(shown)) == 3 and " , then ".join(shown[1:]) in story.premise
    for law, name in (("recolor", "color"), ("transform", "shape")):
        for story in told(law):
            for a, b, event in zip(story.scenes, story.scenes[1:], story.events, strict=False):
                old, new = next((a.by_id[o.id], o) for o in b.objects if a.by_id[o.id] != o)
                assert new == old.replace(**{name: getattr(new, name)}) and event.endswith(" " + getattr(new, name))
                assert getattr(new, name) in story.premise


def test_small_worlds_tell_fewer_stories():
    world = WorldConfig(name="few", max_objects=2, sizes=("large",))
    assert set(laws(world)) == {"move", "recolor", "transform", "background"}
    assert sample_story(world, Stream(0)).law in laws(world)
    scene = sample_scene(world, Stream(0))
    assert len(scene.objects) <= 2
