"""Verdicts: perfect input scores exactly 1, near misses always fail, blanks score 0, unrelated scenes near chance."""
from itertools import pairwise

import numpy as np
import pytest

from diptych.document import Boxes, Image
from diptych.world.assign import assign
from diptych.world.edits import KINDS, sample_edit
from diptych.world.language import caption_spec
from diptych.world.perceive import Percept
from diptych.world.render import box_of, render
from diptych.world.sample import sample_scene, stream
from diptych.world.scene import PLACES, UNITS, WORLDS, Object, Scene
from diptych.world.spec import Item, Spec
from diptych.world.tasks import document
from diptych.world.verify import (
    iou,
    parse_label,
    verify,
    verify_boxes,
    verify_edit,
    verify_layout,
    verify_percept,
    verify_sequence,
)

MINI = WORLDS["mini"]
RED = Object(id=0, shape="circle", color="red", size="large", radius=488, x=1000, y=2048)
BLUE = Object(id=1, shape="square", color="blue", size="medium", radius=328, x=3000, y=2048)


def scene_of(index: int, world: str = "mini") -> Scene:
    return sample_scene(WORLDS[world], stream(WORLDS[world], "verify", "train", index))


def draw(*objects: Object, background: str = "white") -> np.ndarray:
    return render(Scene(objects=objects, background=background), 64)


def see(*objects: Object, background: str | None = "white", **changes) -> Percept:
    return Percept(objects=objects, confidence=(1.0,) * len(objects), background=background, **changes)


def misses(scene: Scene):
    """The same scene with one thing changed."""
    obj, rest = scene.objects[0], scene.objects[1:]
    other = {"color": next(c for c in MINI.colors if c != obj.color),
             "shape": next(s for s in MINI.shapes if s != obj.shape)}
    for name, value in other.items():
        yield name, scene.replace(objects=(obj.replace(**{name: value}), *rest))
    size, radius = ("medium", 320) if obj.size == "large" else ("large", 456)
    yield "size", scene.replace(objects=(obj.replace(size=size, radius=radius), *rest))
    yield "removed", scene.replace(objects=rest)
    yield "background", scene.replace(background="black" if scene.background != "black" else "white")


@pytest.mark.parametrize("world", ["mini", "core8"])
def test_perfect_input_scores_exactly_one(world):
    for i in range(40):
        scene = scene_of(i, world)
        verdict = verify(render(scene, 64), caption_spec(scene), world)
        assert verdict.exact and not verdict.abstained, (i, verdict)
        assert set(verdict.scores.values()) == {1.0} and verdict.mean == 1


def test_near_misses_always_fail():
    seen = set()
    for i in range(25):
        scene = scene_of(i)
        for name, changed in misses(scene):
            verdict = verify(render(changed, 64), caption_spec(scene))
            assert not verdict.exact and verdict.mean < 1, f"scene {i}: {name} went unnoticed"
            seen.add(name)
    assert seen == {"color", "shape", "size", "removed", "background"}


def test_the_failing_part_is_named():
    spec = caption_spec(Scene(objects=(RED, BLUE)))
    for part, changes in (("color", {"color": "green"}), ("shape", {"shape": "star"}),
                          ("size", {"size": "medium", "radius": 328}), ("place", {"y": 600})):
        verdict = verify(draw(RED.replace(**changes), BLUE), spec)
        assert verdict.scores[part] == 0.5 and not verdict.exact
        untouched = {"color", "shape", "size", "background", "extra"} - {part}
        assert all(verdict.scores[n] == 1 for n in untouched), (part, verdict.scores)


def test_blank_scores_zero_and_unrelated_scenes_little():
    scenes = [scene_of(i) for i in range(40)]
    for scene in scenes[:10]:
        for background in ("white", "black", "gray"):
            blank = verify(draw(background=background), caption_spec(scene))
            assert blank.mean == 0 and not blank.exact and not blank.abstained
    verdicts = [verify(render(other, 64), caption_spec(scene)) for scene, other in pairwise(scenes)]
    assert not any(v.exact for v in verdicts)
    color = float(np.mean([v.scores["color"] for v in verdicts]))
    count = float(np.mean([v.scores["count"] for v in verdicts]))
    assert color < 0.45 and count < 0.1, (color, count)


def test_binding_matters():
    """Red circle and blue square against blue circle and red square: the words are all there."""
    spec = Spec(items=(Item(color="red", shape="circle"), Item(color="blue", shape="square")))
    assert verify_percept(see(RED, BLUE), spec).exact
    swapped = verify_percept(see(RED.replace(color="blue"), BLUE.replace(color="red")), spec)
    assert not swapped.exact and swapped.mean < 1 and swapped.count == 0
    halves = Spec(items=(Item(color="green", shape="circle"), Item(color="red", shape="circle")))
    for objects in ((RED, RED.replace(shape="star", id=2)), (RED.replace(shape="star", id=2), RED)):
        assert verify_percept(see(*objects), halves).count == 0.5, "a whole match outweighs two halves"


def test_counts_are_exact():
    spec = Spec(items=(Item(count=2, color="red", shape="circle"),))
    two = (RED, RED.replace(id=2, x=3000))
    assert verify_percept(see(*two), spec).exact
    for objects in ((RED,), (*two, RED.replace(id=3, y=3500))):
        verdict = verify_percept(see(*objects), spec)
        assert verdict.count == 0 and not verdict.exact
    open_spec = Spec(items=spec.items, closed=False)
    assert verify_percept(see(*two, BLUE), open_spec).exact and verify_percept(see(*two, BLUE), open_spec).extra is None
    assert verify_percept(see(*two, BLUE), spec).extra == 2 / 3
    assert verify_percept(see(*two, RED.replace(id=4, y=3500)), open_spec).count == 0, "three are not two"
    both = Spec(items=(Item(shape="circle"), Item(shape="circle", color="red")))
    assert verify_percept(see(*two), both).exact, "one red circle may serve as any circle"


def test_places_have_a_tolerance():
    spec = Spec(items=(Item(shape="circle", place="left"),))
    for x, inside in ((1365 + 320, True), (1365 + 336, False)):
        assert verify_percept(see(RED.replace(x=x)), spec).exact is inside
    for name in PLACES:
        row, column = divmod(PLACES.index(name), 3)
        obj = RED.replace(x=700 + column * 1365, y=700 + row * 1365)
        right = [p for p in PLACES if verify_percept(see(obj), Spec(items=(Item(shape="circle", place=p),))).exact]
        assert right == [name]


def test_relations_are_three_valued():
    spec = Spec(items=(Item(shape="circle"), Item(shape="square")), relations=((0, "left of", 1),))
    assert verify_percept(see(RED, BLUE), spec).exact
    assert verify_percept(see(RED.replace(x=3000), BLUE.replace(x=1000)), spec).relation == 0
    close = verify_percept(see(RED.replace(x=2900), BLUE), spec)
    assert close.relation == 0 and close.ambiguous == 1 and not close.exact
    alike = Spec(items=(Item(shape="circle"), Item(shape="circle", count=2)), relations=((0, "above", 1),))
    circles = [RED.replace(id=i, x=x, y=y) for i, (x, y) in enumerate([(800, 3000), (2000, 700), (3200, 3000)])]
    assert verify_percept(see(*circles), alike).exact, "which circle is which is free"
    assert not verify_percept(see(*[c.replace(y=2000) for c in circles]), alike).exact


def test_unknown_blobs_abstain():
    spec = Spec(items=(Item(shape="circle"), Item(shape="hexagon")))
    verdict = verify(draw(RED, BLUE.replace(shape="hexagon")), spec)
    assert verdict.abstained and not verdict.exact
    assert verdict.scores["shape"] == 0.5 and verdict.scores["extra"] == 0.5


def test_sequences():
    story = document("story", 0)
    scenes = [Scene.from_dict(s) for s in story.meta["scenes"]]
    pictures = [p.pixels for p in story.of(Image)]
    specs = [caption_spec(s) for s in scenes]
    assert [v.exact for v in verify_sequence(pictures, specs)] == [True] * len(scenes)
    repeated = verify_sequence(pictures[:1] * len(specs), specs)
    assert not all(v.exact for v in repeated), "repeating the start is no story"
    with pytest.raises(ValueError, match="one spec per picture"):
        verify_sequence(pictures, specs[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_edits(kind):
    for i in range(4):
        before, _, after, _ = sample_edit(MINI, stream(MINI, f"verify-{kind}", "train", i), kind=kind)
        a, b = render(before, 64), render(after, 64)
        verdict = verify_edit(a, b, before, after)
        assert verdict.exact and verdict.mean == 1, (kind, i, verdict)
        assert verdict.difference is None if kind == "background" else verdict.difference == 0
        copied = verify_edit(a, a, before, after)
        assert not copied.exact and copied.scores["edited"] < 1, f"copying the source passed as {kind}"
        assert copied.preserved in (1, None)
        if after.objects:
            blank = verify_edit(a, draw(background=after.background), before, after)
            assert blank.mean == 0 and not blank.exact


def test_a_short_move_into_the_next_place_must_happen():
    """The old centre lies within the slack of the new place, so place alone would pass a copy of the source."""
    before = Scene(objects=(RED.replace(x=1365 - 200), BLUE))
    after = before.replace(objects=(RED.replace(x=1365 + 200), BLUE))
    source = render(before, 64)
    assert verify_edit(source, render(after, 64), before, after).exact
    copied = verify_edit(source, source, before, after)
    assert copied.edited == 0 and not copied.exact


def test_damage_outside_an_edit_is_seen():
    before = Scene(objects=(RED, BLUE))
    after = before.replace(objects=(RED.replace(color="green"), BLUE))
    source = render(before, 64)
    for damage in (BLUE.replace(x=BLUE.x - 256), BLUE.replace(color="pink"),
                   BLUE.replace(size="large", radius=456), BLUE.replace(radius=388), None):
        spoiled = after.replace(objects=(after.objects[0], *([damage] if damage else [])))
        verdict = verify_edit(source, render(spoiled, 64), before, after)
        assert verdict.edited == 1 and verdict.preserved == 0 and not verdict.exact, damage
        assert verdict.difference is not None and verdict.difference > 12
    rng = np.random.default_rng(0)
    noisy = np.clip(render(after, 64) + rng.normal(0, 8 / 127.5, (3, 64, 64)), -1, 1).astype(np.float32)
    verdict = verify_edit(source, noisy, before, after)
    assert verdict.exact and verdict.difference is not None and verdict.difference < 10
    more = after.replace(objects=(*after.objects, RED.replace(id=7, y=3500)))
    extra = verify_edit(source, render(more, 64), before, after)
    assert extra.extra == 2 / 3 and extra.preserved == 1 and not extra.exact


def test_layouts():
    task = document("layout", 1)
    boxes, image = task.of(Boxes)[0], task.of(Image)[0].pixels
    verdict = verify_layout(image, boxes.boxes, boxes.labels)
    assert verdict.all_right and verdict.rate == 1 and verdict.mean_iou > 0.9
    box = np.array([box_of(RED), box_of(BLUE)])
    image = draw(RED, BLUE)
    swapped = verify_layout(image, box[::-1], ["large red circle", "blue square"])
    assert swapped.rate == 0 and swapped.mean_iou == 0
    half = verify_layout(image, box, ["large red circle", "medium green square"])
    assert half.rate == 0.5 and not half.all_right and half.ious[1] == 0
    assert verify_layout(draw(), box, ["large red circle", "blue square"]).rate == 0
    with pytest.raises(ValueError, match="one label per box"):
        verify_layout(image, box, ["red circle"])


def test_labels():
    assert parse_label("large red circle") == Item(size="large", color="red", shape="circle")
    assert parse_label("a blue horizontally striped star") == Item(color="blue", shape="star", texture="hstripe")
    assert parse_label("an object") == Item()
    with pytest.raises(ValueError, match="expected a label"):
        parse_label("large red circel")


def test_boxes():
    truth = np.array([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    assert verify_boxes(truth[::-1], truth).exact and verify_boxes(truth, truth).mean_iou == 1
    one = verify_boxes(truth[:1], truth)
    assert (one.recall, one.precision, one.exact, one.mean_iou) == (0.5, 1.0, False, 0.5)
    assert not verify_boxes(truth + 0.4, truth).exact
    empty = np.zeros((0, 4))
    cases = ((empty, empty), (truth, empty), (empty, truth))
    assert [verify_boxes(a, b).exact for a, b in cases] == [True, False, False]
    assert iou(np.array([[0, 0, 2, 2.0]]), np.array([[1, 1, 3, 3.0]]))[0, 0] == pytest.approx(1 / 7)


def test_assignment_is_optimal():
    rng = np.random.default_rng(0)
    for m, n in ((3, 5), (6, 4), (9, 12), (14, 9)):
        values = rng.random((m, n))
        chosen = assign(values)
        used = [j for j in chosen if j >= 0]
        assert len(set(used)) == len(used) == min(m, n)
        total = sum(values[i, j] for i, j in enumerate(chosen) if j >= 0)
        for _ in range(300):  # no exchange and no random order is better
            rows, columns = rng.permutation(m)[:min(m, n)], rng.permutation(n)[:min(m, n)]
            assert total >= values[rows, columns].sum() - 1e-9
        for i in range(m):
            for k in range(m):
                if chosen[i] >= 0 and chosen[k] >= 0:
                    a, b = chosen[i], chosen[k]
                    assert values[i, a] + values[k, b] >= values[i, b] + values[k, a] - 1e-9
    assert [assign(np.zeros(shape)) for shape in ((2, 3), (2, 0), (0, 2))] == [[-1, -1], [-1, -1], []]
    assert assign(np.ones((1, 2)), tie=lambda c: c[0]) == [1]


def test_hungarian_equals_trying_all_orders(monkeypatch):
    import diptych.world.assign as module

    rng = np.random.default_rng(3)
    cases = [rng.integers(0, 5, (m, n)).astype(float) for m, n in ((4, 4), (3, 6), (6, 5), (7, 7))]

    def best() -> list[float]:
        return [sum(c[i, j] for i, j in enumerate(assign(c)) if j >= 0) for c in cases]

    tried = best()
    monkeypatch.setattr(module, "FEW", 0)
    assert best() == tried


def test_canvas_units_are_respected():
    wide = (2 * UNITS, UNITS)
    obj = RED.replace(x=6000)
    spec = Spec(items=(Item(shape="circle", place="right"),))
    assert verify_percept(see(obj, canvas=wide), spec).exact
    assert not verify_percept(see(RED.replace(x=4000), canvas=wide), spec).exact
