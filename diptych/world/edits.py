"""Edits: a function on the record, an instruction that names its object uniquely, and the scene afterwards.

Ids stay; everything the instruction does not name is identical before and after. Both scenes keep the gaps, the
borders, the places and the split.
"""
from dataclasses import dataclass
from typing import Any

import numpy as np

from diptych.world.language import article, item_phrase
from diptych.world.refer import Reference, name_of
from diptych.world.render import id_map, size_of
from diptych.world.sample import Stream, Unsatisfiable, admissible, draw_place, draw_radius, fits, pairs, sample_scene
from diptych.world.scene import PLACES, Object, Scene, WorldConfig, place
from diptych.world.spec import Item

KINDS = ("recolor", "resize", "move", "add", "remove", "replace", "background")
COUNTS = {1: 0.25, 2: 0.4, 3: 0.3, 4: 0.05}  # objects before the edit
TRIES, PATIENCE = 500, 100

WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "recolor": ("make {the} {new}", "paint {the} {new}", "change the color of {the} to {new}"),
        "resize": ("make {the} {new}", "change the size of {the} to {new}"),
        "move": ("move {the} to the {new}", "put {the} at the {new}"),
        "add": ("add {new}", "draw {new}", "put {new}"),
        "remove": ("remove {the}", "delete {the}", "take away {the}"),
        "replace": ("turn {the} into {new}", "change {the} to {new}", "replace {the} with {new}"),
        "background": ("make the background {new}", "change the background to {new}")},
    "held_out": {
        "recolor": ("{the} should be {new}",), "resize": ("{the} should be {new}",), "remove": ("erase {the}",),
        "move": ("{the} should go to the {new}",), "add": ("there should also be {new}",),
        "replace": ("{the} should become {new}",), "background": ("the background should be {new}",)}}


@dataclass(frozen=True, kw_only=True)
class Edit:
    """`changes` are new attributes of object `target`; for "add" all of them, for "remove" none."""

    kind: str
    target: int | None = None
    changes: dict[str, Any]

    def apply(self, scene: Scene) -> Scene:
        if self.kind == "background":
            return Scene(objects=scene.objects, canvas=scene.canvas, **self.changes)
        if self.kind == "add":
            objects = (*scene.objects, Object(id=_new_id(scene), **self.changes))
        elif self.kind == "remove":
            objects = tuple(o for o in scene.objects if o.id != self.target)
        else:
            objects = tuple(o.replace(**self.changes) if o.id == self.target else o for o in scene.objects)
        return Scene(objects=objects, background=scene.background, canvas=scene.canvas)


def edit_mask(before: Scene, after: Scene, pixels: int, margin: int = 2) -> np.ndarray:
    """bool (height, width): where the pictures may differ, the changed objects of both dilated by `margin` pixels."""
    height, width = size_of(before, pixels)
    if before.background != after.background:
        return np.ones((height, width), bool)
    mask = np.zeros((height + 2 * margin, width + 2 * margin), bool)
    for scene, other in ((before, after), (after, before)):
        changed = [o.id for o in scene.objects if other.by_id.get(o.id) != o]
        if changed:
            inside = np.isin(id_map(scene, pixels), changed)
            for dy in range(2 * margin + 1):
                for dx in range(2 * margin + 1):
                    mask[dy:dy + height, dx:dx + width] |= inside
    return mask[margin:margin + height, margin:margin + width]


def sample_edit(world: WorldConfig, rng: Stream, *, kind: str | None = None, split: str = "train",
                template: str = "train") -> tuple[Scene, Edit, Scene, str]:
    """(before, edit, after, instruction)."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"expected an edit kind out of {', '.join(KINDS)}, got {kind!r}")
    wanted = kind or _draw_kind(world, rng)
    for attempt in range(TRIES):
        if attempt % PATIENCE == PATIENCE - 1:  # the split may have no edit of this kind
            wanted = kind or _draw_kind(world, rng)
        try:
            made = _BUILD[wanted](world, rng, split)
        except Unsatisfiable:
            continue
        if made is None:
            continue
        before, edit, reference, new = made
        after = edit.apply(before)
        if admissible(before, world, split) and admissible(after, world, split, first=False) and fits(after, world):
            wording = rng.choice(WORDINGS[template][wanted])
            return before, edit, after, wording.format(the=reference.text if reference else "", new=new)
    raise Unsatisfiable(f"expected an edit ({kind or 'any'}) for split {split}, got none in {TRIES} tries")


Made = tuple[Scene, Edit, Reference | None, str] | None


def _draw_kind(world: WorldConfig, rng: Stream) -> str:
    impossible = {"resize": len(world.sizes) < 2, "background": len(world.backgrounds) < 2,
                  "add": world.max_objects < 2, "remove": world.max_objects < 2}
    return rng.choice([k for k in KINDS if not impossible.get(k)])


def _count(world: WorldConfig, rng: Stream, split: str, extra: int = 0) -> int:
    if split == "counts":  # one more than the held-out number, often: an object that the edit can change
        low = min(n for n, _ in world.held_out_counts)
        return min(low + rng.below(2) + extra, world.max_objects)
    return max(world.min_objects + extra, min(rng.weighted(COUNTS) + extra, world.max_objects))


def _start(world: WorldConfig, rng: Stream, split: str, extra: int = 0,
           wants: tuple[Item, ...] = ()) -> tuple[Scene, Object]:
    scene = sample_scene(world, rng, wants=wants, count=_count(world, rng, split, extra), split=split)
    return scene, scene.objects[0] if wants else rng.choice(scene.objects)


def _recolor(world: WorldConfig, rng: Stream, split: str) -> Made:
    scene, obj = _start(world, rng, split)
    colors = [c for c, _ in pairs(world, None, obj.shape, None if split == "pairs" else False) if c != obj.color]
    reference = name_of(scene, obj, rng)
    if not colors or reference is None:
        return None
    color = rng.choice(colors)
    return scene, Edit(kind="recolor", target=obj.id, changes={"color": color}), reference, color


def _resize(world: WorldConfig, rng: Stream, split: str) -> Made:
    # the scene is drawn with the bigger size, so there is room for both
    small, big = sorted(rng.shuffled(range(len(world.sizes)))[:2])
    scene, obj = _start(world, rng, split, wants=(Item(size=world.sizes[big]),))
    new = world.sizes[small]
    changes: dict[str, Any] = {"size": new, "radius": draw_radius(rng, new)}
    if rng.chance(0.5):
        grown, new = {"size": obj.size, "radius": obj.radius}, obj.size
        scene, changes = Edit(kind="resize", target=obj.id, changes=changes).apply(scene), grown
    reference = name_of(scene, scene.by_id[obj.id], rng)
    return reference and (scene, Edit(kind="resize", target=obj.id, changes=changes), reference, new)


def _move(world: WorldConfig, rng: Stream, split: str) -> Made:
    scene, obj = _start(world, rng, split)
    old = place(obj, scene.canvas)
    cell = rng.choice([p for p in PLACES if p != old])
    others = [(o.shape, o.radius, o.x, o.y, o.rotation) for o in scene.objects if o.id != obj.id]
    spot = draw_place(world, rng, (obj.shape, obj.radius, obj.rotation), others, scene.canvas, cell)
    reference = name_of(scene, obj, rng)
    if spot is None or reference is None:
        return None
    return scene, Edit(kind="move", target=obj.id, changes={"x": spot[0], "y": spot[1]}), reference, cell


def _add(world: WorldConfig, rng: Stream, split: str) -> Made:
    scene, obj = _start(world, rng, split, extra=1)
    before = Edit(kind="remove", target=obj.id, changes={}).apply(scene)
    changes = {name: value for name, value in obj.__dict__.items() if name != "id"}
    new = item_phrase(Item(color=obj.color, shape=obj.shape, size=obj.size, texture=obj.texture,
                           place=place(obj, scene.canvas)))
    return before, Edit(kind="add", target=_new_id(before), changes=changes), None, new


def _remove(world: WorldConfig, rng: Stream, split: str) -> Made:
    scene, obj = _start(world, rng, split, extra=1)
    reference = name_of(scene, obj, rng)
    return reference and (scene, Edit(kind="remove", target=obj.id, changes={}), reference, "")


def _replace(world: WorldConfig, rng: Stream, split: str) -> Made:
    scene, obj = _start(world, rng, split)
    shapes = [s for _, s in pairs(world, obj.color, None, None if split == "pairs" else False) if s != obj.shape]
    reference = name_of(scene, obj, rng)
    if not shapes or reference is None:
        return None
    shape = rng.choice(shapes)
    changes: dict[str, Any] = {"shape": shape} if not world.rotated else {"shape": shape, "rotation": 0}
    return scene, Edit(kind="replace", target=obj.id, changes=changes), reference, f"{article(shape)} {shape}"


def _background(world: WorldConfig, rng: Stream, split: str) -> Made:
    scene, _ = _start(world, rng, split)
    new = rng.choice([b for b in world.backgrounds if b != scene.background])
    return scene, Edit(kind="background", changes={"background": new}), None, new


def _new_id(scene: Scene) -> int:
    return max((o.id for o in scene.objects), default=-1) + 1


_BUILD = {"recolor": _recolor, "resize": _resize, "move": _move, "add": _add, "remove": _remove, "replace": _replace,
          "background": _background}
