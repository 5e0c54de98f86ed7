"""Pictures, masks and boxes of a scene, from signed distances.

Coverage of a pixel is clamp(.5 - distance in pixels, 0, 1), quantised to 8 bits; objects are composited in z order
with integer arithmetic, so a picture is the same bytes on every machine. `pixels` is the length in pixels of 4096
units: a square canvas becomes (pixels, pixels), a canvas of 4096 x 2048 units (pixels, pixels // 2).

Positions lie on a lattice of 1/8 pixel at 64 pixels, so few stamps exist and all of them are cached.
"""
import math
from functools import lru_cache

import numpy as np

from diptych.world.scene import BACKGROUNDS, COLORS, UNITS, Object, Scene
from diptych.world.shapes import distance, extent

STRIPE = 192  # half-period of stripes and checks in units: 3 px at 64
OUTLINE = 80  # line width of the texture "outline" in units
SHADE = 0.5  # brightness of the second tone of a texture

Box = tuple[float, float, float, float]
Window = tuple[int, int, int, int, np.ndarray, np.ndarray | None]  # top, bottom, left, right and the same
Stamp = tuple[int, int, np.ndarray, np.ndarray | None]  # left, top, coverage 0..255, share of the first tone 0..255


def size_of(scene: Scene, pixels: int) -> tuple[int, int]:
    """(height, width) in pixels."""
    width, height = scene.canvas
    if width * pixels % UNITS or height * pixels % UNITS or not 1 <= pixels <= 4096:
        raise ValueError(f"expected a canvas of whole pixels, got {width} x {height} units at {pixels} px per {UNITS}; "
                         "fix: canvas sides in multiples of 512 and pixels in multiples of 8")
    return height * pixels // UNITS, width * pixels // UNITS


def render(scene: Scene, pixels: int) -> np.ndarray:
    """float32 (3, height, width) in [-1, 1]; exactly the values of `render_uint8`."""
    height, width = size_of(scene, pixels)
    placed = [(o, _place(o, pixels, height, width)) for o in scene.objects]
    if not _simple(placed):
        return _FLOAT[np.ascontiguousarray(render_uint8(scene, pixels).transpose(2, 0, 1))]
    image = _blank(scene.background, height, width).copy()
    for obj, window in placed:
        if window is not None:
            top, bottom, left, right, coverage, _ = window
            image[:, top:bottom, left:right] = _ramp_float(obj.color, scene.background).take(coverage, 1)
    return image


def render_uint8(scene: Scene, pixels: int) -> np.ndarray:
    """8-bit RGB of shape (height, width, 3)."""
    height, width = size_of(scene, pixels)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    for obj in scene.objects:
        window = _place(obj, pixels, height, width)
        if window is None:
            continue
        top, bottom, left, right, coverage, tone = window
        region = image[top:bottom, left:right].astype(np.int32)
        color: np.ndarray = np.array(COLORS[obj.color], np.int32)
        if tone is not None:
            color = _mix(np.array(second_tone(obj.color), np.int32), color, tone[..., None].astype(np.int32))
        image[top:bottom, left:right] = _mix(region, color, coverage[..., None].astype(np.int32))
    return image


def id_map(scene: Scene, pixels: int) -> np.ndarray:
    """int16 (height, width): id of the front object that covers more than half of the pixel, -1 for background."""
    height, width = size_of(scene, pixels)
    ids = np.full((height, width), -1, np.int16)
    for obj in scene.objects:
        window = _place(obj, pixels, height, width)
        if window is not None:
            top, bottom, left, right, coverage, _ = window
            ids[top:bottom, left:right][coverage >= 128] = obj.id
    return ids


def masks(scene: Scene, pixels: int) -> dict[int, np.ndarray]:
    """Visible part of every object: {id: bool (height, width)}."""
    ids = id_map(scene, pixels)
    return {o.id: ids == o.id for o in scene.objects}


def boxes(scene: Scene) -> dict[int, Box]:
    """Amodal boxes {id: (x0, y0, x1, y1)} in [0, 1] of the canvas, from the shapes, hidden parts included."""
    return {o.id: box_of(o, scene.canvas) for o in scene.objects}


def box_of(obj: Object, canvas: tuple[int, int] = (UNITS, UNITS)) -> Box:
    width, height = canvas
    x0, y0, x1, y1 = extent(obj.shape, obj.rotation)
    return (max((obj.x + obj.radius * x0) / width, 0.0), max((obj.y + obj.radius * y0) / height, 0.0),
            min((obj.x + obj.radius * x1) / width, 1.0), min((obj.y + obj.radius * y1) / height, 1.0))


def visible_boxes(scene: Scene, pixels: int) -> dict[int, Box]:
    """Boxes of the visible masks, on the pixel grid; objects that are hidden completely are left out."""
    out: dict[int, Box] = {}
    for key, mask in masks(scene, pixels).items():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            height, width = mask.shape
            out[key] = (float(columns[0] / width), float(rows[0] / height),
                        float((columns[-1] + 1) / width), float((rows[-1] + 1) / height))
    return out


def second_tone(color: str) -> tuple[int, int, int]:
    """The darker tone that textures alternate with."""
    r, g, b = COLORS[color]
    return int(r * SHADE), int(g * SHADE), int(b * SHADE)


# -- stamps -----------------------------------------------------------------------------------------------------------

@lru_cache(16384)
def _stamp(shape: str, radius: int, rotation: int, texture: str, phase_x: int, phase_y: int, pixels: int) -> Stamp:
    """One object around its centre. A phase is the centre's offset from a pixel's corner in 1/4096 pixel."""
    scale = pixels / UNITS
    r, fx, fy = radius * scale, phase_x / UNITS, phase_y / UNITS
    x0, y0, x1, y1 = extent(shape, rotation)
    left, right = math.floor(fx + x0 * r - 1), math.ceil(fx + x1 * r + 1)
    top, bottom = math.floor(fy + y0 * r - 1), math.ceil(fy + y1 * r + 1)
    dx = (np.arange(left, right) + 0.5 - fx)[None, :]
    dy = (np.arange(top, bottom) + 0.5 - fy)[:, None]
    angle = math.radians(rotation)
    c, s = math.cos(angle), math.sin(angle)
    d = distance(shape, (dx * c + dy * s) / r, (dy * c - dx * s) / r) * r
    coverage = np.rint(np.clip(0.5 - d, 0, 1) * 255).astype(np.uint8)
    rows, columns = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
    inner = np.s_[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    tone = _tone(texture, dx, dy, d, scale)
    return (left + int(columns[0]), top + int(rows[0]), np.ascontiguousarray(coverage[inner]),
            None if tone is None else np.ascontiguousarray(np.broadcast_to(tone, coverage.shape)[inner]))


def _tone(texture: str, dx: np.ndarray, dy: np.ndarray, d: np.ndarray, scale: float) -> np.ndarray | None:
    if texture == "solid":
        return None
    if texture == "outline":
        first = np.clip(0.5 + d + OUTLINE * scale, 0, 1)
    else:  # stripes stay level in rotated objects, otherwise hstripe at 90 degrees would be vstripe
        bands = [_bands(v, STRIPE * scale) for v, names in ((dy, ("hstripe", "checker")), (dx, ("vstripe", "checker")))
                 if texture in names]
        first = bands[0] if len(bands) == 1 else bands[0] * bands[1] + (1 - bands[0]) * (1 - bands[1])
    return np.rint(first * 255).astype(np.uint8)


def _bands(offset: np.ndarray, half: float) -> np.ndarray:
    """Antialiased stripes of width `half`, the first tone centred at offset 0."""
    edge = half / 2 - np.abs((offset + half) % (2 * half) - half)
    return np.clip(0.5 + edge, 0, 1)


def _place(obj: Object, pixels: int, height: int, width: int) -> Window | None:
    """The object's stamp clipped to the picture: (top, bottom, left, right, coverage, tone), or None outside."""
    x, phase_x = divmod(obj.x * pixels, UNITS)
    y, phase_y = divmod(obj.y * pixels, UNITS)
    left, top, coverage, tone = _stamp(obj.shape, obj.radius, obj.rotation, obj.texture, phase_x, phase_y, pixels)
    left, top = left + x, top + y
    bottom, right = top + coverage.shape[0], left + coverage.shape[1]
    if left >= 0 and top >= 0 and right <= width and bottom <= height:
        return top, bottom, left, right, coverage, tone
    inner = np.s_[max(-top, 0):height - top, max(-left, 0):width - left]
    top, bottom, left, right = max(top, 0), min(bottom, height), max(left, 0), min(right, width)
    if top >= bottom or left >= right:
        return None
    return top, bottom, left, right, coverage[inner], None if tone is None else tone[inner]


def _simple(placed: list[tuple[Object, Window | None]]) -> bool:
    """Solid objects in disjoint windows: every pixel is one colour over the bare background."""
    windows = [w for _, w in placed if w is not None]
    for i, a in enumerate(windows):
        if a[5] is not None:
            return False
        for b in windows[:i]:
            if a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]:
                return False
    return True


def _mix(under: np.ndarray, over: np.ndarray, share: np.ndarray) -> np.ndarray:
    return (under * (255 - share) + over * share + 127) // 255


@lru_cache(None)
def _ramp_float(color: str, background: str) -> np.ndarray:
    """float32 (3, 256): the colour over the background at every coverage."""
    share = np.arange(256, dtype=np.int32)[None]
    under, over = (np.array(c, np.int32)[:, None] for c in (BACKGROUNDS[background], COLORS[color]))
    return _FLOAT[_mix(under, over, share)]


@lru_cache(64)
def _blank(background: str, height: int, width: int) -> np.ndarray:
    image = np.empty((3, height, width), np.float32)
    image[:] = _FLOAT[np.array(BACKGROUNDS[background])][:, None, None]
    return image


_FLOAT = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)  # as Image.from_uint8
