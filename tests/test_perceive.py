"""The parser: scenes back from pixels, exactly or not at all."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.world.degrade import DEGRADATIONS
from diptych.world.fit import Fit, fit_shape, synthesise, upright
from diptych.world.perceive import LABELS_ONLY, perceive
from diptych.world.render import render
from diptych.world.sample import sample_scene, stream
from diptych.world.scene import BACKGROUNDS, COLORS, ROTATION_PERIOD, SIZES, UNITS, WORLDS, Object, Scene
from diptych.world.segment import components, grow, split_by_color, to_lab


def scene_of(world: str, index: int) -> Scene:
    return sample_scene(WORLDS[world], stream(WORLDS[world], "perceive", "train", index))


def thing(**changes) -> Object:
    plain = {"id": 0, "shape": "circle", "color": "red", "size": "large", "radius": 488, "x": 2048, "y": 2048}
    return Object(**plain | changes)


def picture(*objects: Object, background: str = "white", pixels: int = 64) -> np.ndarray:
    return render(Scene(objects=objects, background=background), pixels)


def same(scene: Scene, percept) -> bool:
    def key(objects):
        return sorted((*o.attributes(), round(o.x / UNITS, 1), round(o.y / UNITS, 1)) for o in objects)

    left = list(percept.objects)
    for obj in scene.objects:
        near = [f for f in left if f.attributes() == obj.attributes() and math.dist(f.center, obj.center) < 0.02]
        if not near:
            return False
        left.remove(near[0])
    return percept.certain and not left and percept.background == scene.background


@pytest.mark.parametrize("world", ["mini", "core8"])
def test_clean_scenes_are_recovered_exactly(world):
    wrong = [i for i in range(80) if not same(s := scene_of(world, i), perceive(render(s, 64), world))]
    assert not wrong, f"{world}: scenes {wrong} were not recovered"


@pytest.mark.parametrize("name", ["blur .7, noise 8", "blur 1", "noise 10", "codec", "jpeg 75"])
def test_degraded_scenes_are_recovered_or_refused(name):
    rng, total = np.random.default_rng(0), 40
    results = [(s := scene_of("mini", i), perceive(DEGRADATIONS[name](render(s, 64), rng))) for i in range(total)]
    answered = [(s, p) for s, p in results if p.certain]
    right = sum(same(s, p) for s, p in answered)
    assert right >= 0.97 * len(answered), f"{name}: {right} of {len(answered)} right"
    assert len(answered) >= 0.93 * total, f"{name}: only {len(answered)} of {total} answered"


def test_rich_world_gives_rotation_and_texture():
    for i in range(4):
        scene = scene_of("rich", i)
        percept = perceive(render(scene, 128), "rich")
        assert same(scene, percept), (i, scene.objects, percept)
        for obj in scene.objects:
            found = min(percept.objects, key=lambda f: math.dist(f.center, obj.center))
            period = ROTATION_PERIOD[obj.shape]
            off = abs((obj.rotation - found.rotation + period / 2) % period - period / 2)
            assert period == 1 or off <= 3, (obj, found)


@settings(max_examples=40, deadline=None)
@given(shape=st.sampled_from(WORLDS["core8"].shapes), color=st.sampled_from(WORLDS["core8"].colors),
       background=st.sampled_from(sorted(BACKGROUNDS)), radius=st.sampled_from([304, 328, 344, 448, 496, 536]),
       x=st.integers(130, 380), y=st.integers(130, 380))
def test_every_single_object_is_measured(shape, color, background, radius, x, y):
    obj = thing(shape=shape, color=color, radius=radius, x=8 * x, y=8 * y)
    percept = perceive(picture(obj, background=background), "core8")
    assert percept.certain and percept.background == background and len(percept.objects) == 1
    found = percept.objects[0]
    assert (found.shape, found.color) == (shape, color)
    assert math.dist((found.x, found.y), (obj.x, obj.y)) < 16, "centre within a quarter pixel"
    assert abs(found.radius / radius - 1) < 0.04
    assert found.size == ("large" if radius > 400 else "medium")
    assert 0 < percept.confidence[0] <= 1


def test_all_three_sizes():
    for size, (low, high) in SIZES.items():
        for radius in (low, high):
            percept = perceive(picture(thing(radius=radius, shape="heart"), pixels=64), "mini")
            assert [o.size for o in percept.objects] == [size]


def test_foreign_shapes_are_refused_not_guessed():
    for shape in ("pentagon", "hexagon", "ellipse", "rectangle", "arrow", "ring", "diamond"):
        for radius in (328, 496):
            percept = perceive(picture(thing(shape=shape, radius=radius)), "mini")
            assert not percept.certain and not percept.objects, f"{shape} was read as {percept.objects}"
            assert percept.unknown[0].reason == "shape"


def test_foreign_colors_and_odd_blobs_are_refused():
    assert perceive(picture(thing(color="brown"))).unknown[0].reason == "unknown colour"
    image = picture(thing())
    image[:, 33:45, 20:44] = image[:, :1, :1]  # half of the circle is gone
    assert not perceive(image).certain
    y, x = np.mgrid[:64, :64]
    wave = np.hypot(x - 32, y - 32) < 8 + 3 * np.sin(4 * np.arctan2(y - 32, x - 32))
    blob = np.where(wave, -0.7, 0.92)[None].repeat(3, 0) + np.array([0.0, 0.0, 0.9])[:, None, None] * wave
    assert not perceive(blob.astype(np.float32)).certain


def test_touching_objects_are_told_apart():
    left, right = thing(shape="square", x=1400), thing(shape="square", x=1400 + 2 * 436, color="blue")
    percept = perceive(picture(left, right))
    assert sorted(o.color for o in percept.objects) == ["blue", "red"] and percept.certain
    percept = perceive(picture(thing(x=1400), thing(x=1400 + 976)))
    assert [o.shape for o in percept.objects] == ["circle", "circle"] and percept.certain
    assert [round(o.x, -2) for o in percept.objects] == [1400, 2400]


def test_thin_blurred_shapes_keep_their_color():
    """An orange ring fades towards brown on black; the fit tells blur from darkness."""
    ring = thing(shape="ring", color="orange", radius=312)
    percept = perceive(DEGRADATIONS["blur 1.5"](picture(ring, background="black"), np.random.default_rng(0)), "core8")
    assert [o.attributes()[:2] for o in percept.objects] == [("orange", "ring")]


def test_specks_are_ignored_and_larger_ones_reported():
    image = picture(thing())
    image[:, 5:7, 5:9] = np.array([-1, -1, 1])[:, None, None]
    assert perceive(image).certain and len(perceive(image).objects) == 1
    image[:, 5:9, 5:10] = np.array([-1, -1, 1])[:, None, None]
    assert not perceive(image).certain


def test_halos_are_ignored():
    image = picture(thing(), background="gray")
    y, x = np.mgrid[:64, :64]
    ring = np.abs(np.hypot(x - 32, y - 32) - 12.5) < 0.8
    assert perceive(image + (0.5 * ring).astype(np.float32)).certain
    image[:2, ring] = -1
    assert not perceive(image).certain, "a clear ring is something"


def test_shading_is_removed():
    image = picture(thing(color="green"), thing(shape="star", x=1000, y=1000)) * 0.8
    image += np.linspace(-0.08, 0.08, 64)[None, None]
    percept = perceive(image.astype(np.float32))
    assert "shading" in percept.reasons and percept.certain
    assert sorted(o.attributes()[:2] for o in percept.objects) == [("green", "circle"), ("red", "star")]


def test_blank_and_broken_pictures():
    blank = perceive(picture(background="gray"))
    assert blank.certain and blank.objects == () and blank.background == "gray"
    assert blank.scene() == Scene(objects=(), background="gray")
    assert not perceive(np.full((3, 64, 64), np.nan)).certain
    noise = np.random.default_rng(0).uniform(-1, 1, (3, 64, 64))
    assert not perceive(noise).certain
    bars = picture(thing(radius=328))
    bars[:, :12] = bars[:, -12:] = -1
    assert not perceive(bars).certain, "a letterbox is no background"
    quarters = picture(thing(radius=328))
    quarters[:, :32, :32] = quarters[:, 32:, 32:] = -0.8
    assert "background" in perceive(quarters).reasons, "four tiles are no background"
    pinkish = np.broadcast_to(np.array([0.9, 0.1, 0.4])[:, None, None], (3, 64, 64))
    assert perceive(pinkish).background is None and not perceive(pinkish).certain
    with pytest.raises(ValueError, match="known background"):
        perceive(pinkish).scene()
    assert perceive(picture(thing())[:, :48]).reasons == ("geometry",)
    with pytest.raises(ValueError, match="expected a picture"):
        perceive(np.zeros((64, 64, 3)))
    with pytest.raises(ValueError, match="expected a world"):
        perceive(picture(), "minni")


def test_larger_pictures_and_other_canvases():
    scene = scene_of("mini", 3)
    assert same(scene, perceive(render(scene, 256)))
    wide = Scene(objects=(thing(x=6000, y=1000), thing(x=1000, y=3000, color="blue", id=1)), canvas=(8192, 4096))
    percept = perceive(render(wide, 64), canvas=(8192, 4096))
    assert [(o.color, round(o.x, -2)) for o in percept.objects] == [("red", 6000), ("blue", 1000)]
    assert percept.scene().canvas == (8192, 4096)


def test_labels_only_guesses_where_the_strict_parser_refuses():
    image = picture(thing(shape="hexagon"))
    assert not perceive(image).certain
    assert [o.shape for o in perceive(image, limits=LABELS_ONLY).objects] == ["circle"]


def test_noise_is_not_held_against_a_fit():
    shapes, rng = WORLDS["mini"].shapes, np.random.default_rng(0)
    clean = Fit(shape="star", rotation=0, x=31.3, y=30.8, radius=6, blur=0.6, amplitude=1, residual=0, ratio=0,
                decoy_ratio=0, decoy_residual=0, other="")
    alpha = (synthesise(clean, 64, 64) + rng.normal(0, 0.15, (64, 64))).astype(np.float32)
    alpha[:20], alpha[44:], alpha[:, :20], alpha[:, 44:] = 0, 0, 0, 0
    fit, blind = (fit_shape(alpha, 31, 31, 6.2, shapes, upright(shapes), noise=n, count=24 * 24) for n in (0.15, 0))
    assert fit is not None and blind is not None and fit.shape == "star"
    assert fit.residual < 0.01 < 0.02 < blind.residual
    assert math.dist((fit.x, fit.y), (31.3, 30.8)) < 0.2 and abs(fit.radius - 6) < 0.3 and abs(fit.blur - 0.6) < 0.4


def test_components_match_a_flood_fill():
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = rng.random((17, 23)) < 0.4
        labels, count = components(mask, 3)
        seen = np.zeros_like(mask)
        sizes = []
        for start in zip(*np.nonzero(mask), strict=True):
            if seen[start]:
                continue
            stack, cells = [start], []
            seen[start] = True
            while stack:
                r, c = stack.pop()
                cells.append((r, c))
                for n in [(r + dr, c + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1)]:
                    if 0 <= n[0] < 17 and 0 <= n[1] < 23 and mask[n] and not seen[n]:
                        seen[n] = True
                        stack.append(n)
            numbers = {int(labels[c]) for c in cells}
            assert len(numbers) == 1 and (numbers == {0}) == (len(cells) < 3)
            sizes += [len(cells)] * (len(cells) >= 3)
        assert count == len(sizes) and sorted(np.bincount(labels.ravel())[1:].tolist()) == sorted(sizes)


def test_lab_and_growth():
    assert np.allclose(to_lab(np.array([[[255.0]], [[255.0]], [[255.0]]], np.float32)).ravel(), [100, 0, 0], atol=0.1)
    red = to_lab(np.array([[[255.0]], [[0.0]], [[0.0]]], np.float32)).ravel()
    assert np.allclose(red, [53.2, 80.1, 67.2], atol=0.2)
    labels = np.zeros((5, 9), np.int32)
    labels[2, 1], labels[2, 7] = 1, 2
    grown = grow(labels, 2)
    assert (grown[:, :4] == 1).all() and (grown[:, 5:] == 2).all() and (grown[:, 4] == 0).all()


def test_split_by_color_leaves_soft_edges_alone():
    orange, brown = (np.array(COLORS[n], np.float32) for n in ("orange", "brown"))
    black = np.array(BACKGROUNDS["black"], np.float32)
    levels = np.broadcast_to(black[:, None, None], (3, 20, 20)).copy()
    levels[:, 3:17, 3:17], levels[:, 6:14, 6:14] = brown[:, None, None], orange[:, None, None]
    labels = np.zeros((20, 20), np.int32)
    labels[3:17, 3:17] = 1
    names = tuple(COLORS)
    assert split_by_color(labels, 1, to_lab(levels), black, names, 12)[1] == 1, "brown is orange's halo on black"
    assert split_by_color(labels, 1, to_lab(levels), np.full(3, 245.0), names, 12)[1] > 1
