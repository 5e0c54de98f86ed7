"""Scenes: small frozen records of what is in a picture. Everything else in the world is a pure function of one.

Units: a canvas side has 4096 units, all stored lengths are multiples of 8 (1/8 px at 64 px), so records, JSON, SVG
and renderings agree exactly on every machine. `radius` is that of the circle with the same area: a "large star" and
a "large circle" cover the same number of pixels.
"""
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

VERSION = "w1"  # changes whenever a rendering, a rule or a random stream changes
UNITS = 4096
STEP = 8

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond",
          "rectangle", "ellipse", "pentagon", "hexagon", "arrow")
COLORS: dict[str, tuple[int, int, int]] = {  # sRGB; smallest CIE76 distance of two is 32
    "red": (220, 38, 38), "green": (22, 163, 74), "blue": (37, 99, 235), "yellow": (250, 204, 21),
    "purple": (147, 51, 234), "orange": (249, 115, 22), "cyan": (6, 182, 212), "pink": (236, 72, 153),
    "brown": (120, 66, 18),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"white": (245, 245, 245), "black": (25, 25, 25),
                                                "gray": (128, 128, 128)}
SIZES: dict[str, tuple[int, int]] = {"small": (200, 240), "medium": (304, 344), "large": (448, 536)}  # radius, units
TEXTURES = ("solid", "hstripe", "vstripe", "checker", "outline")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
ROTATION_PERIOD = {"circle": 1, "ring": 1, "square": 90, "diamond": 90, "cross": 90, "star": 72, "triangle": 120,
                   "pentagon": 72, "hexagon": 60, "rectangle": 180, "ellipse": 180, "heart": 360, "arrow": 360}

Truth = Literal["yes", "no", "ambiguous"]
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True, kw_only=True)
class Object:
    """One object. `x`, `y`: centre of area in units from the top left; `rotation` degrees, modulo the symmetry."""

    id: int
    shape: str
    color: str
    size: str
    radius: int
    x: int
    y: int
    rotation: int = 0
    texture: str = "solid"

    def __post_init__(self) -> None:
        for name, value, allowed in (("shape", self.shape, SHAPES), ("color", self.color, COLORS),
                                     ("size", self.size, SIZES), ("texture", self.texture, TEXTURES)):
            if value not in allowed:
                raise ValueError(f"expected {name} to be one of {', '.join(allowed)}, got {value!r}")

    def replace(self, **changes: Any) -> "Object":
        return dataclasses.replace(self, **changes)

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) in [0, 1] of the canvas width (square canvases)."""
        return self.x / UNITS, self.y / UNITS

    def attributes(self) -> tuple[str, str, str, str]:
        return self.color, self.shape, self.size, self.texture


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects in z order (later is in front) on a background. `canvas` is (width, height) in units."""

    objects: tuple[Object, ...]
    background: str = "white"
    canvas: tuple[int, int] = (UNITS, UNITS)
    version: str = VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "objects", tuple(self.objects))
        if self.background not in BACKGROUNDS:
            raise ValueError(f"expected background to be one of {', '.join(BACKGROUNDS)}, got {self.background!r}")

    def replace(self, **changes: Any) -> "Scene":
        return dataclasses.replace(self, **changes)

    @cached_property
    def by_id(self) -> dict[int, Object]:
        return {o.id: o for o in self.objects}

    def to_dict(self) -> dict[str, Any]:
        return {"version": self.version, "canvas": list(self.canvas), "background": self.background,
                "objects": [dataclasses.asdict(o) for o in self.objects]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Scene":
        return cls(objects=tuple(Object(**o) for o in data["objects"]), background=data["background"],
                   canvas=tuple(data["canvas"]), version=data["version"])  # type: ignore[arg-type]

    def key(self) -> str:
        """Hash of the canonical form (multiset of attributes with 4x4 grid places): drives the splits."""
        cells = sorted((o.attributes(), o.rotation, o.x * 4 // self.canvas[0], o.y * 4 // self.canvas[1])
                       for o in self.objects)
        return hashlib.sha256(json.dumps([self.background, cells]).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Which scenes exist. `pixels` is the (square) picture side; gaps and borders in units.

    `held_out_pairs` (color, shape) and `held_out_counts` (number, shape) never appear in a training split: no
    training scene has such an object, or exactly that many of that shape.
    """

    name: str = "mini"
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "star", "heart", "cross")
    colors: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
    sizes: tuple[str, ...] = ("medium", "large")
    textures: tuple[str, ...] = ("solid",)
    backgrounds: tuple[str, ...] = ("white", "black", "gray")
    rotated: bool = False
    min_objects: int = 1
    max_objects: int = 4
    pixels: int = 64
    gap: int = 256  # between outlines
    border: int = 128
    place_margin: int = 160  # distance of every centre from the borders of the 3x3 places
    held_out_pairs: tuple[tuple[str, str], ...] = field(default=(
        ("red", "star"), ("green", "heart"), ("blue", "triangle"), ("yellow", "cross"), ("purple", "square"),
        ("cyan", "circle")))
    held_out_counts: tuple[tuple[int, str], ...] = ((3, "triangle"), (3, "heart"))


WORLDS: dict[str, WorldConfig] = {
    "mini": WorldConfig(),
    "one": WorldConfig(name="one", max_objects=1, held_out_counts=()),  # what a minute of training can learn
    # ... in codes, of which a small object takes few and a background many
    "plain": WorldConfig(name="plain", sizes=("large",), backgrounds=("white",), max_objects=1, held_out_counts=()),
    # ... and what small models learn to draw rightly in minutes: little but what, which colour and where
    "grid": WorldConfig(name="grid", shapes=("circle", "square", "triangle", "cross"), sizes=("large",),
                        colors=("red", "green", "blue", "yellow", "purple", "cyan"), backgrounds=("white",),
                        max_objects=1, pixels=48, place_margin=600,
                        held_out_pairs=(("blue", "triangle"), ("yellow", "cross")), held_out_counts=()),
    "few": WorldConfig(name="few", max_objects=2, held_out_counts=()),
    "core8": WorldConfig(name="core8", shapes=SHAPES[:8], max_objects=6),
    "rich": WorldConfig(name="rich", shapes=tuple(s for s in SHAPES if s != "diamond"), sizes=("medium", "large"),
                        textures=TEXTURES, rotated=True, max_objects=5, pixels=128),
}


def relation(a: Object, name: str, b: Object) -> Truth:
    """Three-valued spatial relation "a NAME b": yes needs a margin of .1 and the dominant axis; no needs the same
    margin the other way, or clear dominance of the other axis."""
    dx, dy = (b.x - a.x) / UNITS, (b.y - a.y) / UNITS
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[name]
    if along > 0.10 and along >= abs(across):
        return "yes"
    if along < -0.10 or (abs(across) > 0.10 and abs(across) > 2 * abs(along)):
        return "no"
    return "ambiguous"


def place(obj: Object, canvas: tuple[int, int] = (UNITS, UNITS), margin: float = 0.0) -> str | None:
    """Name of the 3x3 cell of the centre, or None within `margin` (fraction of the side) of a cell border."""
    cell = []
    for value, side in ((obj.x, canvas[0]), (obj.y, canvas[1])):
        fraction = value / side
        if min(abs(fraction - 1 / 3), abs(fraction - 2 / 3)) < margin:
            return None
        cell.append(min(int(fraction * 3), 2))
    return PLACES[cell[1] * 3 + cell[0]]
