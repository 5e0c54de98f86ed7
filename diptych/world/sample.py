"""Scenes drawn at random: constrained objects first, then the others, then places, with every rule of the world kept.

Random numbers come from Philox keyed by a stable hash of names and the index, so item 7 of a task is the same on any
machine, in any order, in any number of processes. Only raw 64-bit words are used; they never change between versions
of numpy.

Splits:
    train    no held-out pair or count in any picture; no picture whose key belongs to the test tenth
    test     drawn alike, but the first picture has a key of the test tenth, so the document never occurs in train
    pairs    every picture has at least one object of a held-out (color, shape) pair, and no held-out count
    counts   every picture has exactly a held-out number of a shape, and no held-out pair
"""
import hashlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from diptych.world.scene import PLACES, ROTATION_PERIOD, SIZES, STEP, UNITS, VERSION, WORLDS, Object, Scene, WorldConfig
from diptych.world.shapes import ELLIPSE_AXES, HEART_DROP, HEART_SIDE, RING_OUTER, extent, outline
from diptych.world.spec import Item

SPLITS = ("train", "test", "pairs", "counts")
TEST_SHARE = 10  # one key in so many belongs to the test split
ROTATION_STEP = 15
DIRECTIONS = 16  # in which two outlines are tested for a gap
PLACE_TRIES, ATTRIBUTE_TRIES, SCENE_TRIES = 30, 40, 400
T = TypeVar("T")
Body = tuple[str, int, int, int, int]  # shape, radius, x, y, rotation
Avoid = Callable[[str, str, str], bool]  # (color, shape, size) -> must not occur among the free objects


class Unsatisfiable(ValueError):
    """No scene was found within the tries: the constraints contradict each other or the canvas is too full."""


class Stream:
    """Random numbers as a pure function of the key. Plain Python numbers: far faster than scalar numpy draws."""

    __slots__ = ("_bits", "_next", "_values")

    def __init__(self, *key: object) -> None:
        digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=np.frombuffer(digest, np.uint64))
        self._values: list[float] = []
        self._next = 0

    def random(self) -> float:
        """Uniform in [0, 1)."""
        if self._next == len(self._values):
            self._values = ((self._bits.random_raw(128) >> np.uint64(11)) * 2.0**-53).tolist()
            self._next = 0
        value = self._values[self._next]
        self._next += 1
        return value

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def choice(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out

    def weighted(self, weights: dict[T, float]) -> T:
        point = self.random() * sum(weights.values())
        for value, weight in weights.items():
            point -= weight
            if point < 0:
                return value
        return next(reversed(weights))


def stream(world: WorldConfig, task: str, split: str, index: int) -> Stream:
    """The random numbers of one document."""
    return Stream(VERSION, world.name, task, split, index)


def find_world(world: WorldConfig | str) -> WorldConfig:
    if isinstance(world, WorldConfig):
        return world
    if world not in WORLDS:
        raise ValueError(f"expected a world out of {', '.join(WORLDS)}, got {world!r}")
    return WORLDS[world]


# -- splits -----------------------------------------------------------------------------------------------------------

@lru_cache(None)
def pairs(world: WorldConfig, color: str | None = None, shape: str | None = None,
          held_out: bool | None = False) -> tuple[tuple[str, str], ...]:
    """The (color, shape) pairs of a world: those of training (False), the held-out ones (True) or all (None)."""
    return tuple((c, s) for c in world.colors for s in world.shapes if color in (None, c) and shape in (None, s)
                 and (held_out is None or ((c, s) in world.held_out_pairs) == held_out))


def has_pair(scene: Scene, world: WorldConfig) -> bool:
    held = world.held_out_pairs
    return any((o.color, o.shape) in held for o in scene.objects)


def has_count(shapes: Sequence[str], world: WorldConfig) -> bool:
    """Whether exactly a held-out number of a shape is there."""
    return any(shapes.count(shape) == n for n, shape in world.held_out_counts)


def is_test(scene: Scene) -> bool:
    """Membership in the test tenth, by the hash of the canonical scene."""
    return int(scene.key(), 16) % TEST_SHARE == 0


def admissible(scene: Scene, world: WorldConfig, split: str, *, first: bool = True) -> bool:
    """Whether a picture may occur in a split; `first` says that it is the first picture of its document."""
    counted = has_count([o.shape for o in scene.objects], world)
    if (split == "pairs") != has_pair(scene, world) or (split == "counts") != counted:
        return False
    return not is_test(scene) if split == "train" else not (split == "test" and first) or is_test(scene)


# -- geometry ---------------------------------------------------------------------------------------------------------

_UNIT = [(math.cos(2 * math.pi * k / DIRECTIONS), math.sin(2 * math.pi * k / DIRECTIONS)) for k in range(DIRECTIONS)]


@lru_cache(None)
def _support(shape: str, rotation: int) -> tuple[float, ...]:
    """How far the shape reaches in each direction, in units of the equal-area radius."""
    angle = math.radians(rotation)
    points = outline(shape)
    out = []
    for x, y in _UNIT:
        u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        if points is not None:
            out.append(float((points @ (u, v)).max()))
        elif shape == "heart":
            half, offset = HEART_SIDE / 2, HEART_SIDE / 2 * math.sqrt(0.5)
            out.append(HEART_DROP * v + max(abs(u) * offset - v * offset + half, 2 * offset * v))
        else:
            a, b = ELLIPSE_AXES if shape == "ellipse" else (RING_OUTER if shape == "ring" else 1.0,) * 2
            out.append(math.hypot(a * u, b * v))
    return tuple(out)


def apart(a: Body, b: Body, gap: float) -> bool:
    """Whether two bodies keep at least `gap` units between their convex outlines.

    Tested by separating lines in the directions nearest to that of the centres; conservative by some units.
    """
    dx, dy = b[2] - a[2], b[3] - a[3]
    reach_a, reach_b = _support(a[0], a[4]), _support(b[0], b[4])
    nearest = round(math.atan2(dy, dx) * (DIRECTIONS / (2 * math.pi)))
    for turn in (0, 1, -1, 2, -2):
        k = (nearest + turn) % DIRECTIONS
        x, y = _UNIT[k]
        if dx * x + dy * y - a[1] * reach_a[k] - b[1] * reach_b[k - DIRECTIONS // 2] >= gap:
            return True
    return False


class Room(NamedTuple):
    """Lattice positions open to a centre: (first, last) multiples of STEP for each third, or None."""

    columns: tuple[tuple[int, int] | None, ...]
    rows: tuple[tuple[int, int] | None, ...]


@lru_cache(8192)
def _room(shape: str, radius: int, rotation: int, canvas: tuple[int, int], border: int, margin: int) -> Room:
    x0, y0, x1, y1 = extent(shape, rotation)
    axes = []
    for low, high, side in ((x0, x1, canvas[0]), (y0, y1, canvas[1])):
        thirds = []
        for third in range(3):
            first = max(border - low * radius, third * side / 3 + margin if third else 0)
            last = min(side - border - high * radius, (third + 1) * side / 3 - margin if third < 2 else side)
            ends = math.ceil(first / STEP), math.floor(last / STEP)
            thirds.append(ends if ends[0] <= ends[1] else None)
        axes.append(tuple(thirds))
    return Room(*axes)


def room(world: WorldConfig, shape: str, radius: int, rotation: int, canvas: tuple[int, int]) -> Room:
    return _room(shape, radius, rotation, canvas, world.border, world.place_margin)


def draw_place(world: WorldConfig, rng: Stream, body: tuple[str, int, int], others: Sequence[Body],
               canvas: tuple[int, int], cell: str | None = None, tries: int = PLACE_TRIES) -> tuple[int, int] | None:
    """A free position for a body (shape, radius, rotation) in a cell (any if None), or None."""
    shape, radius, rotation = body
    columns, rows = room(world, shape, radius, rotation, canvas)
    fixed = None if cell is None else PLACES.index(cell)
    for _ in range(tries):
        number = rng.below(9) if fixed is None else fixed
        column, row = columns[number % 3], rows[number // 3]
        if column is None or row is None:
            continue
        x = STEP * (column[0] + rng.below(column[1] - column[0] + 1))
        y = STEP * (row[0] + rng.below(row[1] - row[0] + 1))
        candidate = (shape, radius, x, y, rotation)
        if all(apart(candidate, other, world.gap) for other in others):
            return x, y
    return None


def fits(scene: Scene, world: WorldConfig) -> bool:
    """Whether every object keeps the gap, the border and the place margin."""
    bodies = [(o.shape, o.radius, o.x, o.y, o.rotation) for o in scene.objects]
    for i, (shape, radius, x, y, rotation) in enumerate(bodies):
        columns, rows = room(world, shape, radius, rotation, scene.canvas)
        if not any(t and t[0] * STEP <= x <= t[1] * STEP for t in columns):
            return False
        if not any(t and t[0] * STEP <= y <= t[1] * STEP for t in rows):
            return False
        if not all(apart(bodies[i], other, world.gap) for other in bodies[:i]):
            return False
    return True


# -- scenes -----------------------------------------------------------------------------------------------------------

def draw_radius(rng: Stream, size: str) -> int:
    low, high = SIZES[size]
    return low + STEP * rng.below((high - low) // STEP + 1)


def draw_rotation(world: WorldConfig, rng: Stream, shape: str) -> int:
    if not world.rotated:
        return 0
    return ROTATION_STEP * rng.below(max(math.ceil(ROTATION_PERIOD[shape] / ROTATION_STEP), 1))


def sample_scene(world: WorldConfig, rng: Stream, *, wants: Sequence[Item] = (), count: int | None = None,
                 avoid: Avoid | None = None, background: str | None = None, split: str = "train",
                 canvas: tuple[int, int] = (UNITS, UNITS)) -> Scene:
    """A scene with the wanted objects (their ids come first, in order) and free ones up to `count`.

    Open attributes are drawn uniformly over what the split allows. Free objects never satisfy `avoid`. Raises
    Unsatisfiable when the wishes contradict the split or do not fit on the canvas.
    """
    wanted = [item for item in wants for _ in range(item.count)]
    total = count
    if total is None:
        total = max(len(wanted), world.min_objects + rng.below(world.max_objects - world.min_objects + 1))
    if split not in SPLITS:
        raise ValueError(f"expected split to be one of {', '.join(SPLITS)}, got {split!r}")
    if not {"pairs": world.held_out_pairs, "counts": world.held_out_counts}.get(split, True):
        raise ValueError(f"expected a world with held-out {split} for the split of that name, got {world.name!r}")
    if split == "counts":
        total = max(total, min(n for n, _ in world.held_out_counts)) if count is None else total
    if total < len(wanted):
        raise ValueError(f"expected count >= the {len(wanted)} wanted objects, got {total}")
    failures = 0
    for _ in range(SCENE_TRIES):
        chosen = _attributes(world, rng, wanted, total, avoid, split)
        if chosen is None:
            failures += 1
            if failures > ATTRIBUTE_TRIES:
                break
            continue
        placed = _arrange(world, rng, chosen, canvas)
        if placed is None:
            continue
        scene = Scene(objects=tuple(placed), background=background or rng.choice(world.backgrounds), canvas=canvas)
        if split in ("pairs", "counts") or is_test(scene) == (split == "test"):
            return scene
    raise Unsatisfiable(f"expected a {split} scene of {total} objects with {wants}, got none; "
                        "fix: fewer or smaller objects, or wishes that the split allows")


def _attributes(world: WorldConfig, rng: Stream, wanted: Sequence[Item], total: int, avoid: Avoid | None,
                split: str) -> list[tuple[str, str, str, str, str | None]] | None:
    """(color, shape, size, texture, place) of every object, or None if the draw breaks a rule of the split."""
    free: list[Item | None] = [*wanted, *[None] * (total - len(wanted))]
    forced: dict[int, tuple[str | None, str]] = {}  # object number -> (color, shape) that the split demands
    if split == "pairs" and not any((i.color, i.shape) in world.held_out_pairs for i in wanted):
        forced[rng.below(total)] = rng.choice(world.held_out_pairs)
    elif split == "counts" and not has_count([i.shape for i in wanted if i.shape], world):
        n, shape = rng.choice(world.held_out_counts)
        if n > total:
            return None
        forced = {i: (None, shape) for i in rng.shuffled(range(total))[:n]}
    out = []
    for i, item in enumerate(free):
        color, shape = (item.color, item.shape) if item is not None else (None, None)
        if i in forced:
            c, s = forced[i]
            if (color not in (None, c) and c is not None) or shape not in (None, s):
                return None
            color, shape = c or color, s
        held_out: bool | None = None if split == "pairs" else False
        options = pairs(world, color, shape, held_out)
        if not options:
            if i in forced:
                return None
            raise Unsatisfiable(f"expected a color and a shape that split {split} allows, got {color} {shape}")
        for _ in range(20):
            color, shape = options[rng.below(len(options))]
            size = (item.size if item is not None else None) or world.sizes[rng.below(len(world.sizes))]
            if item is not None or avoid is None or not avoid(color, shape, size):
                break
        else:
            return None
        texture = (item.texture if item is not None else None) or (
            world.textures[0] if len(world.textures) == 1 else rng.choice(world.textures))
        out.append((color, shape, size, texture, item.place if item is not None else None))
    if split != "pairs" and any((c, s) in world.held_out_pairs for c, s, *_ in out):
        return None
    if has_count([o[1] for o in out], world) != (split == "counts"):
        return None
    return out


def _arrange(world: WorldConfig, rng: Stream, chosen: Sequence[tuple[str, str, str, str, str | None]],
             canvas: tuple[int, int]) -> list[Object] | None:
    bodies = [(shape, draw_radius(rng, size), draw_rotation(world, rng, shape)) for _, shape, size, *_ in chosen]
    spots: dict[int, Body] = {}
    # objects with a given cell first, then the big ones: both are hard to place late
    for i in sorted(range(len(chosen)), key=lambda i: (chosen[i][4] is None, -bodies[i][1])):
        spot = draw_place(world, rng, bodies[i], list(spots.values()), canvas, chosen[i][4])
        if spot is None:
            return None
        spots[i] = (bodies[i][0], bodies[i][1], *spot, bodies[i][2])
    return [Object(id=i, shape=shape, color=color, size=size, radius=spots[i][1], x=spots[i][2], y=spots[i][3],
                   rotation=spots[i][4], texture=texture)
            for i, (color, shape, size, texture, _) in enumerate(chosen)]
