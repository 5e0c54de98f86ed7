import hashlib

import numpy as np
import pytest

from diptych.document import Image
from diptych.world.render import boxes, id_map, masks, render, render_uint8, second_tone, visible_boxes
from diptych.world.sample import Stream, sample_scene, stream
from diptych.world.scene import BACKGROUNDS, COLORS, SHAPES, TEXTURES, UNITS, WORLDS, Object, Scene, WorldConfig


def one(shape: str = "circle", **changes) -> Scene:
    values = dict(id=7, shape=shape, color="red", size="large", radius=496, x=2000, y=2104) | changes
    return Scene(objects=(Object(**values),))


def test_hundred_renders_are_the_same_bytes_everywhere():
    digest = hashlib.sha256()
    for name in ("mini", "core8", "rich"):
        world = WORLDS[name]
        for index in range(34):
            digest.update(render_uint8(sample_scene(world, stream(world, "hash", "train", index)), 64).tobytes())
    assert digest.hexdigest()[:16] == "ffc1611ac23b1f70"


@pytest.mark.parametrize("name", ["mini", "rich"])
@pytest.mark.parametrize("pixels", [32, 64, 96, 256])
def test_float_and_8_bit_pictures_agree(name: str, pixels: int):
    world = WORLDS[name]
    for index in range(5):
        scene = sample_scene(world, stream(world, "agree", "train", index))
        exact = Image.from_uint8(render_uint8(scene, pixels)).pixels
        np.testing.assert_array_equal(render(scene, pixels), exact)
        assert render(scene, pixels).dtype == np.float32


def test_overlapping_objects_are_drawn_in_z_order():
    below = Object(id=0, shape="circle", color="red", size="large", radius=496, x=2000, y=2000)
    above = below.replace(id=1, color="blue", x=2200)
    scene = Scene(objects=(below, above))
    picture, ids = render_uint8(scene, 64), id_map(scene, 64)
    row, column = 2000 * 64 // UNITS, 2200 * 64 // UNITS
    assert tuple(picture[row, column]) == COLORS["blue"] and ids[row, column] == 1
    np.testing.assert_array_equal(render(scene, 64), Image.from_uint8(picture).pixels)
    left, right = visible_boxes(scene, 64)[0], boxes(scene)[0]
    assert left[2] < right[2] - 0.02  # part of the lower object is hidden


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rotation", [0, 30])
def test_area_is_that_of_the_circle_at_every_size(shape: str, rotation: int):
    scene = one(shape, rotation=rotation)
    expected = np.pi * (496 / UNITS) ** 2
    for pixels in (64, 128, 256):
        shown = render(scene, pixels)[1].astype(float)  # green: the background's 245 falls to red's 38
        background, color = BACKGROUNDS["white"][1] / 127.5 - 1, COLORS["red"][1] / 127.5 - 1
        area = ((shown - background) / (color - background)).mean()
        assert area == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_touch_the_picture(shape: str):
    for rotation in (0, 15, 50):
        scene = one(shape, rotation=rotation)
        box, visible = boxes(scene)[7], visible_boxes(scene, 256)[7]
        # corners cover less than half of their last pixel, so the amodal box is a little larger
        assert np.abs(np.subtract(box, visible)).max() < 5 / 256
        assert box[0] <= visible[0] + 1 / 256 and box[2] >= visible[2] - 1 / 256
        drawn = np.argwhere((render_uint8(scene, 256) != BACKGROUNDS["white"]).any(-1))
        y0, x0 = drawn.min(0) / 256
        y1, x1 = (drawn.max(0) + 1) / 256
        assert np.abs(np.subtract(box, (x0, y0, x1, y1))).max() < 1.6 / 256


def test_ids_masks_and_background():
    scene = sample_scene(WORLDS["mini"], Stream("masks"), count=4)
    ids = id_map(scene, 64)
    assert set(np.unique(ids)) == {-1, 0, 1, 2, 3}
    for key, mask in masks(scene, 64).items():
        assert mask.dtype == bool and mask.sum() == (ids == key).sum() > 40
    assert (render_uint8(scene, 64)[0, 0] == BACKGROUNDS[scene.background]).all()
    green = render_uint8(one("star"), 64)[..., 1].astype(int)  # 245 on the background, 38 inside
    np.testing.assert_array_equal(id_map(one("star"), 64) == 7, green < (245 + 38) / 2)


@pytest.mark.parametrize("canvas", [(4096, 2048), (2048, 4096), (3584, 4096)])
def test_other_canvases(canvas: tuple[int, int]):
    world = WORLDS["mini"]
    for index in range(10):
        scene = sample_scene(world, Stream(canvas, index), count=2, canvas=canvas)
        for pixels in (32, 64, 200):
            if 512 * pixels % UNITS:
                continue
            picture = render(scene, pixels)
            assert picture.shape == (3, canvas[1] * pixels // UNITS, canvas[0] * pixels // UNITS)
            for key, mask in masks(scene, pixels).items():
                rows, columns = np.nonzero(mask)
                x0, y0, x1, y1 = boxes(scene)[key]
                assert x0 - 0.05 <= columns.mean() / mask.shape[1] <= x1 + 0.05
                assert y0 - 0.05 <= rows.mean() / mask.shape[0] <= y1 + 0.05


def test_objects_over_the_border_are_clipped():
    inside, outside = one(x=0, y=4096), one(x=-2000, y=2000)
    assert render(inside, 64).shape == (3, 64, 64) and (id_map(inside, 64) == 7).any()
    assert boxes(inside)[7][0] == 0 and boxes(inside)[7][3] == 1
    assert not (id_map(outside, 64) == 7).any() and 7 not in visible_boxes(outside, 64)


def test_a_canvas_of_broken_pixels_is_refused():
    with pytest.raises(ValueError, match="multiples of 512"):
        render(Scene(objects=(), canvas=(512, 512)), 100)


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_have_two_tones(texture: str):
    picture = render_uint8(one("square", texture=texture, radius=536), 64)
    inside = picture[id_map(one("square", radius=536), 64) == 7]
    distances = [np.abs(inside.astype(int) - tone).max(-1) for tone in (COLORS["red"], second_tone("red"))]
    tones = [(distance < 40).mean() for distance in distances]
    assert tones[0] > 0.1 and (tones[1] == 0 if texture == "solid" else tones[1] > 0.1)


def test_stripes_stay_level_in_rotated_objects():
    level = render_uint8(one("circle", texture="hstripe"), 64)
    turned = render_uint8(one("square", texture="hstripe", rotation=45), 64)
    row = slice(24, 40)
    assert (level[30, 30] == turned[30, 30]).all()
    assert (np.ptp(turned[row, 31].astype(int), 0) > 50).any() and (np.ptp(turned[32, 28:34].astype(int), 0) == 0).all()


def test_worlds_of_other_sizes_render():
    world = WorldConfig(name="large", pixels=96, sizes=("small", "medium"), max_objects=6)
    scene = sample_scene(world, Stream("large"), count=6)
    assert render(scene, world.pixels).shape == (3, 96, 96) and len(visible_boxes(scene, 96)) == 6
