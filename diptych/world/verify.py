"""Does a picture show what was asked? Every verdict comes from the parse of the picture (`perceive`), clause by clause.

Perfect input scores exactly 1, an empty picture 0. Scores that a spec does not ask for are None. A picture that the
parser cannot read is `abstained`: its unknown blobs satisfy nothing, and it is never `exact`.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from diptych.world.assign import assign
from diptych.world.edits import edit_mask
from diptych.world.language import TEXTURE_WORDS
from diptych.world.perceive import Percept, perceive
from diptych.world.render import box_of
from diptych.world.scene import COLORS, PLACES, SHAPES, SIZES, Object, Scene, WorldConfig, relation
from diptych.world.spec import Item, Spec

World = str | WorldConfig
SLACK = 0.08  # of the side: a centre so far outside the stated cell still counts
STILL = 0.05  # of the side: an object within this distance did not move
AREA_RATIO = (0.8, 1.25)  # of an untouched object
POOL = 5  # pixels; single differing pixels are noise, a differing patch is a change
IOU = 0.5
ATTRIBUTES = ("color", "shape", "size", "texture")
_VALUE = {"color": 1.0, "shape": 1.0, "size": 0.5, "texture": 0.5, "place": 0.5}
_BOUND = 2.0  # all attributes on one object outweigh any mix of halves


class _Scores:
    """Shared by the verdicts: named parts in [0, 1], None where nothing was asked."""

    PARTS: tuple[str, ...] = ()

    @property
    def scores(self) -> dict[str, float]:
        return {n: getattr(self, n) for n in self.PARTS if getattr(self, n) is not None}

    @property
    def mean(self) -> float:
        """Average of the parts that were asked for."""
        values = list(self.scores.values())
        return sum(values) / len(values) if values else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "percept"}  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Verdict(_Scores):
    """`ambiguous` counts stated relations that are neither true nor false: they are not satisfied."""

    PARTS = ("color", "shape", "size", "texture", "count", "place", "relation", "background", "extra")

    exact: bool
    abstained: bool
    color: float | None = None
    shape: float | None = None
    size: float | None = None
    texture: float | None = None
    count: float | None = None
    place: float | None = None
    relation: float | None = None
    background: float | None = None
    extra: float | None = None
    ambiguous: int = 0
    percept: Percept


def verify(pixels: np.ndarray, spec: Spec, world: World = "mini") -> Verdict:
    """Checks a picture (3, height, width) in [-1, 1] against the claims of a prompt or caption."""
    return verify_percept(perceive(pixels, world), spec)


def verify_percept(percept: Percept, spec: Spec) -> Verdict:
    objects, items = percept.objects, spec.items
    slots = [i for i, item in enumerate(items) for _ in range(item.count)]
    values = np.array([[_value(items[i], o, percept) for o in objects] for i in slots])
    values = values.reshape(len(slots), len(objects))

    def holds(chosen: list[int]) -> float:
        return float(sum(t == "yes" for t in _relations(spec, slots, chosen, objects)))

    chosen = assign(values, holds if spec.relations else None)
    given = [objects[j] if j >= 0 else None for j in chosen]
    parts: dict[str, float | None] = {}
    for name in ATTRIBUTES:
        stated = [(getattr(items[i], name), o) for i, o in zip(slots, given, strict=True) if getattr(items[i], name)]
        parts[name] = _share(o is not None and getattr(o, name) == wanted for wanted, o in stated)
    parts["place"] = _share(o is not None and items[i].matches(o) and in_place(o, items[i].place or "", percept.canvas)
                            for i, o in zip(slots, given, strict=True) if items[i].place)
    parts["count"] = _share(_counted(spec, k, objects, slots, given) for k in range(len(items)))
    truths = _relations(spec, slots, chosen, objects)
    parts["relation"] = _share(t == "yes" for t in truths)
    parts["background"] = None if spec.background is None else float(percept.background == spec.background)
    if spec.closed:
        total = len(objects) + len(percept.unknown)
        parts["extra"] = sum(o is not None for o in given) / total if total else float(not slots)
    if slots and not objects:  # a bare canvas shows nothing of what was asked, not even its background
        parts = {n: None if v is None else 0.0 for n, v in parts.items()}
    return Verdict(exact=percept.certain and all(v is None or v == 1 for v in parts.values()),
                   abstained=not percept.certain, ambiguous=truths.count("ambiguous"), percept=percept, **parts)


def in_place(obj: Object, name: str, canvas: tuple[int, int], slack: float = SLACK) -> bool:
    """Whether the centre lies in the 3x3 cell or at most `slack` outside."""
    row, column = divmod(PLACES.index(name), 3)
    return all(cell / 3 - slack <= value / side <= (cell + 1) / 3 + slack
               for cell, value, side in ((column, obj.x, canvas[0]), (row, obj.y, canvas[1])))


def _value(item: Item, obj: Object, percept: Percept) -> float:
    stated = [n for n in ATTRIBUTES if getattr(item, n) is not None]
    right = [n for n in stated if getattr(item, n) == getattr(obj, n)]
    value = sum(_VALUE[n] for n in right) + (_BOUND if len(right) == len(stated) else 0.0)
    if item.place and in_place(obj, item.place, percept.canvas):
        value += _VALUE["place"] * (1 if len(right) < len(stated) else 2)
    return value


def _share(checks: Any) -> float | None:
    found = list(checks)
    return sum(map(bool, found)) / len(found) if found else None


def _counted(spec: Spec, index: int, objects: Sequence[Object], slots: Sequence[int],
             given: Sequence[Object | None]) -> bool:
    """As many objects as stated, no more: others that match may only be there for items that they also match."""
    item = spec.items[index]
    own = sum(i == index and o is not None and item.matches(o) for i, o in zip(slots, given, strict=True))
    others = sum(i != index and o is not None and item.matches(o) for i, o in zip(slots, given, strict=True)
                 if o is not None and spec.items[i].matches(o))
    return own == item.count and sum(item.matches(o) for o in objects) <= own + others


def _relations(spec: Spec, slots: Sequence[int], chosen: Sequence[int], objects: Sequence[Object]) -> list[str]:
    """Truth of every stated relation: yes only if it holds between all objects of its two items."""
    def of(item: int) -> list[Object]:
        found = [objects[j] for i, j in zip(slots, chosen, strict=True) if i == item and j >= 0]
        return found if len(found) == spec.items[item].count and all(map(spec.items[item].matches, found)) else []

    out = []
    for a, name, b in spec.relations:
        truths = {relation(x, name, y) for x in of(a) for y in of(b)}
        out.append("no" if "no" in truths or not truths else "ambiguous" if "ambiguous" in truths else "yes")
    return out


def verify_sequence(pictures: Sequence[np.ndarray], specs: Sequence[Spec], world: World = "mini") -> list[Verdict]:
    """One verdict per picture of a story."""
    if len(pictures) != len(specs):
        raise ValueError(f"expected one spec per picture, got {len(pictures)} pictures and {len(specs)} specs")
    return [verify(p, s, world) for p, s in zip(pictures, specs, strict=True)]


# -- edits ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class EditVerdict(_Scores):
    """`edited`: share of changed, added and removed objects that are as they should be; `preserved`: share of the
    others that stayed as they were; `difference`: largest difference of 5x5-pooled levels (0..255) outside the edit,
    None if the edit is everywhere. It is reported and is no part of `exact`: it depends on the codec of a model."""

    PARTS = ("edited", "preserved", "background", "extra")

    exact: bool
    abstained: bool
    edited: float | None
    preserved: float | None
    background: float
    extra: float
    difference: float | None
    percept: Percept


def verify_edit(before: np.ndarray, after: np.ndarray, scene_before: Scene, scene_after: Scene,
                world: World = "mini") -> EditVerdict:
    """Checks an edited picture `after` of `before`; objects of the two scenes correspond by id.

    Objects that the edit put somewhere count within the 3x3 cell of their new place; all others must not move.
    """
    percept = perceive(after, world, canvas=scene_after.canvas)
    wanted, found = scene_after.objects, percept.objects
    values = np.array([[_likeness(w, f) for f in found] for w in wanted]).reshape(len(wanted), len(found))
    chosen = assign(values)
    edited: list[bool] = []
    preserved: list[bool] = []
    for w, j in zip(wanted, chosen, strict=True):
        old = scene_before.by_id.get(w.id)
        seen = found[j] if j >= 0 else None
        if old == w:
            preserved.append(seen is not None and _same(w, seen))
        elif old is None or (old.x, old.y) != (w.x, w.y):
            # the slack of a place reaches into the next one: what stayed where it was did not move
            stayed = old is not None and seen is not None and _distance(old, seen) <= STILL
            edited.append(seen is not None and not stayed and seen.attributes() == w.attributes()
                          and _near(w, seen, percept.canvas))
        else:
            edited.append(seen is not None and seen.attributes() == w.attributes() and _distance(w, seen) <= STILL)
    for old in scene_before.objects:
        if old.id not in scene_after.by_id:
            edited.append(not any(_distance(old, f) <= STILL and f.attributes() == old.attributes() for f in found))
    background = float(percept.background == scene_after.background)
    if scene_before.background != scene_after.background:
        edited.append(bool(background))
    total = len(found) + len(percept.unknown)
    extra = sum(j >= 0 for j in chosen) / total if total else float(not wanted)
    parts = {"edited": _share(edited), "preserved": _share(preserved), "background": background, "extra": extra}
    if wanted and not found:
        parts = {n: None if v is None else 0.0 for n, v in parts.items()}
    return EditVerdict(exact=percept.certain and all(v is None or v == 1 for v in parts.values()),
                       abstained=not percept.certain, percept=percept,
                       difference=pooled_difference(before, after, scene_before, scene_after), **parts)  # type: ignore[arg-type]


def _distance(a: Object, b: Object) -> float:
    return math.dist(a.center, b.center)


def _likeness(wanted: Object, found: Object) -> float:
    alike = sum(a == b for a, b in zip(wanted.attributes(), found.attributes(), strict=True))
    return alike + 2 * max(0.0, 1 - 4 * _distance(wanted, found))


def _same(wanted: Object, found: Object) -> bool:
    low, high = AREA_RATIO
    return (found.attributes() == wanted.attributes() and _distance(wanted, found) <= STILL
            and low <= (found.radius / wanted.radius) ** 2 <= high)


def _near(wanted: Object, found: Object, canvas: tuple[int, int]) -> bool:
    column, row = (min(3 * v // side, 2) for v, side in ((wanted.x, canvas[0]), (wanted.y, canvas[1])))
    return in_place(found, PLACES[row * 3 + column], canvas)


def pooled_difference(before: np.ndarray, after: np.ndarray, scene_before: Scene, scene_after: Scene) -> float | None:
    """Largest absolute difference in levels of POOL x POOL means over patches that lie outside the edit."""
    if before.shape != after.shape:
        raise ValueError(f"expected pictures of one shape, got {before.shape} and {after.shape}")
    width = before.shape[2]
    mask = edit_mask(scene_before, scene_after, round(width * 4096 / scene_before.canvas[0]))
    gap = np.where(mask, 0.0, (np.asarray(after, np.float64) - before) * 127.5)

    def pool(a: np.ndarray) -> np.ndarray:
        total = np.pad(a, [(0, 0)] * (a.ndim - 2) + [(1, 0), (1, 0)]).cumsum(-1).cumsum(-2)
        return (total[..., POOL:, POOL:] - total[..., :-POOL, POOL:] - total[..., POOL:, :-POOL]
                + total[..., :-POOL, :-POOL]) / POOL**2

    free = pool(mask.astype(np.float64)) < 1e-9
    return float(np.abs(pool(gap)[:, free]).max()) if free.any() else None


# -- layouts and boxes ------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class LayoutVerdict:
    """`rate`: share of instances of the right description with IoU >= .5; `ious`: per instance, 0 if there is none."""

    rate: float
    all_right: bool
    mean_iou: float
    ious: tuple[float, ...]
    abstained: bool
    percept: Percept


def verify_layout(pixels: np.ndarray, boxes: np.ndarray, labels: Sequence[str], world: World = "mini") -> LayoutVerdict:
    """Checks that every box (xyxy in [0, 1]) holds an object of its label ("large red circle")."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    if len(boxes) != len(labels):
        raise ValueError(f"expected one label per box, got {len(boxes)} boxes and {len(labels)} labels")
    percept = perceive(pixels, world)
    items = [parse_label(label) for label in labels]
    seen = np.array([box_of(o, percept.canvas) for o in percept.objects]).reshape(-1, 4)
    fit = np.array([[item.matches(o) for o in percept.objects] for item in items], float).reshape(len(items), len(seen))
    overlap = iou(boxes, seen) * fit
    chosen = assign(overlap * (1 + (overlap >= IOU)))  # first of all as many successes as possible
    ious = tuple(float(overlap[i, j]) if j >= 0 else 0.0 for i, j in enumerate(chosen))
    right = [v >= IOU for v in ious]
    empty = float(not percept.objects)
    return LayoutVerdict(rate=sum(right) / len(right) if right else empty, all_right=all(right) and percept.certain,
                         mean_iou=sum(ious) / len(ious) if ious else empty, ious=ious,
                         abstained=not percept.certain, percept=percept)


def parse_label(label: str) -> Item:
    """The attributes named by a label such as "large red horizontally striped circle"."""
    text = label.lower()
    texture = next((t for t, words in TEXTURE_WORDS.items() if words and words in text), None)
    words = (text.replace(TEXTURE_WORDS[texture], "") if texture else text).split()
    stated: dict[str, str | None] = {}
    for name, allowed in (("color", COLORS), ("shape", SHAPES), ("size", SIZES)):
        stated |= dict.fromkeys([name], next((w for w in words if w in allowed), None))
    left = [w for w in words if w not in stated.values() and w not in ("a", "an", "the", "object")]
    if left or not words:
        raise ValueError(f"expected a label of colour, shape, size and texture words, got {label!r}")
    return Item(texture=texture, **stated)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class BoxVerdict:
    """`ious` per true box at the best one-to-one assignment; `precision` and `recall` at IoU >= .5."""

    mean_iou: float
    recall: float
    precision: float
    exact: bool
    ious: tuple[float, ...]


def verify_boxes(predicted: np.ndarray, truth: np.ndarray) -> BoxVerdict:
    """Compares two sets of boxes (n, 4), xyxy in [0, 1], in any order. Two empty sets agree."""
    predicted, truth = (np.asarray(b, np.float64).reshape(-1, 4) for b in (predicted, truth))
    overlap = iou(truth, predicted)
    chosen = assign(overlap)
    ious = tuple(float(overlap[i, j]) if j >= 0 else 0.0 for i, j in enumerate(chosen))
    hits = sum(v >= IOU for v in ious)
    empty = float(len(predicted) == len(truth))
    recall = hits / len(truth) if len(truth) else empty
    precision = hits / len(predicted) if len(predicted) else empty
    return BoxVerdict(mean_iou=sum(ious) / len(ious) if ious else empty, recall=recall, precision=precision,
                      exact=recall == precision == 1, ious=ious)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair of boxes (n, 4) and (m, 4), xyxy."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    area_a, area_b = (np.clip(x[:, 2:] - x[:, :2], 0, None).prod(-1) for x in (a, b))
    union = area_a[:, None] + area_b[None] - common
    return np.where(union > 0, common / np.where(union > 0, union, 1), 0.0)
