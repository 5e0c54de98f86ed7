import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from diptych.world.render import masks
from diptych.world.sample import (
    SPLITS,
    Stream,
    Unsatisfiable,
    admissible,
    find_world,
    fits,
    has_count,
    has_pair,
    is_test,
    sample_scene,
    stream,
)
from diptych.world.scene import PLACES, SIZES, STEP, WORLDS, WorldConfig, place
from diptych.world.spec import Item

MINI = WORLDS["mini"]


def test_streams_are_pure_functions_of_their_key():
    assert [Stream("a", 1).random() for _ in range(2)] == [Stream("a", 1).random()] * 2
    first = Stream("a", 1)
    values = [first.random() for _ in range(1000)]
    assert len(set(values)) == 1000 and 0.45 < np.mean(values) < 0.55 and all(0 <= v < 1 for v in values)
    assert values[0] != Stream("a", 2).random() != Stream("b", 1).random()
    # a stored value: any other machine and version must give the same worlds
    assert Stream("w1", "mini", "caption", "train", 0).random() == 0.5844237052778528


def test_the_same_in_another_process():
    code = ("from diptych.world.sample import *; from diptych.world.scene import WORLDS;"
            "print([sample_scene(WORLDS['rich'], stream(WORLDS['rich'], 't', 'train', i)).key() for i in range(20)])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    rich = WORLDS["rich"]
    assert out.strip() == str([sample_scene(rich, stream(rich, "t", "train", i)).key() for i in range(20)])


def test_draws_are_uniform():
    rng = Stream("uniform")
    assert max(Counter(rng.below(5) for _ in range(5000)).values()) < 1150
    assert Counter(tuple(rng.shuffled("abc")) for _ in range(6000)).most_common()[-1][1] > 850
    shares = Counter(rng.weighted({"a": 3.0, "b": 1.0}) for _ in range(4000))
    assert 2850 < shares["a"] < 3150
    assert 900 < sum(rng.chance(0.25) for _ in range(4000)) < 1100


@pytest.mark.parametrize("name", list(WORLDS))
@pytest.mark.parametrize("split", SPLITS)
def test_scenes_keep_every_rule(name: str, split: str):
    world = find_world(name)
    if split == "counts" and not world.held_out_counts:
        with pytest.raises(ValueError, match=f"held-out counts .* got '{name}'"):
            sample_scene(world, stream(world, "rules", split, 0), split=split)
        return
    for index in range(40):
        scene = sample_scene(world, stream(world, "rules", split, index), split=split)
        assert fits(scene, world) and admissible(scene, world, split)
        assert world.min_objects <= len(scene.objects) <= world.max_objects
        assert [o.id for o in scene.objects] == list(range(len(scene.objects)))
        for o in scene.objects:
            low, high = SIZES[o.size]
            assert low <= o.radius <= high and not any(v % STEP for v in (o.radius, o.x, o.y))
            assert o.shape in world.shapes and o.color in world.colors and o.texture in world.textures
            assert place(o, scene.canvas, world.place_margin / 4096 - 1e-3) is not None
        assert (split == "pairs") == has_pair(scene, world)
        assert (split == "counts") == has_count([o.shape for o in scene.objects], world)
        assert is_test(scene) if split == "test" else not is_test(scene) or split in ("pairs", "counts")


def test_outlines_keep_the_gap_in_pictures():
    for index in range(15):
        scene = sample_scene(MINI, Stream("gap", index), count=4)
        shown = {k: np.argwhere(m) for k, m in masks(scene, 128).items()}
        for a, b in combinations(shown.values(), 2):
            distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min()
            assert distance >= 8  # 256 units are 8 px at 128
        for points in shown.values():
            assert points.min() >= 3 and points.max() <= 124  # a border of 4 px


def test_wishes_come_first_and_are_kept():
    wants = (Item(count=2, color="blue", shape="circle", size="large"), Item(shape="heart", place="bottom left"))
    for index in range(30):
        scene = sample_scene(MINI, Stream("wishes", index), wants=wants, count=4, background="gray",
                             avoid=lambda color, shape, size: color == "red" or shape == "star")
        a, b, c, d = scene.objects
        assert all(wants[0].matches(o) for o in (a, b)) and c.shape == "heart" and place(c) == "bottom left"
        assert d.color != "red" and d.shape != "star" and scene.background == "gray"


def test_contradictory_wishes_are_named():
    with pytest.raises(Unsatisfiable, match="red star"):
        sample_scene(MINI, Stream(0), wants=(Item(color="red", shape="star"),))
    with pytest.raises(Unsatisfiable):
        sample_scene(MINI, Stream(0), wants=(Item(count=3, shape="triangle"),), count=3)
    with pytest.raises(ValueError, match="expected count"):
        sample_scene(MINI, Stream(0), wants=(Item(count=3),), count=2)
    with pytest.raises(ValueError, match="expected split"):
        sample_scene(MINI, Stream(0), split="valid")
    with pytest.raises(ValueError, match="expected a world"):
        find_world("maxi")


def test_attributes_and_places_are_balanced():
    scenes = [sample_scene(MINI, Stream("balance", i), count=2) for i in range(1200)]
    objects = [o for s in scenes for o in s.objects]
    places = Counter(place(o) for o in objects)
    assert set(places) == set(PLACES) and max(places.values()) < 1.5 * min(places.values())
    sizes = Counter(o.size for o in objects)
    assert max(sizes.values()) < 1.2 * min(sizes.values())
    pairs = Counter((o.color, o.shape) for o in objects)
    assert len(pairs) == 8 * 6 - len(MINI.held_out_pairs) and max(pairs.values()) < 2 * min(pairs.values())


def test_the_splits_share_no_scene():
    keys = {split: {sample_scene(MINI, Stream(split, i), count=1, split=split).key() for i in range(800)}
            for split in ("train", "test", "pairs")}
    assert not any(keys[a] & keys[b] for a, b in combinations(keys, 2))


def test_a_world_without_held_out_parts_has_no_such_splits():
    world = WorldConfig(name="open", held_out_pairs=(), held_out_counts=())
    assert len(sample_scene(world, Stream(1), count=2).objects) == 2
    for split in ("pairs", "counts"):
        with pytest.raises(ValueError, match="held"):
            sample_scene(world, Stream(1), split=split)
