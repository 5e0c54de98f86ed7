"""The scene in a picture, without a network: segment by distance from the background, colour from the inside of blobs,
shape by analysis-by-synthesis (`fit`). Made for pictures that a model drew: soft edges, halos, specks, shifted colours.

"Cannot tell" is a value: a blob that no shape of the world explains well and clearly best stays an `Unknown`, and a
percept with unknowns, or with an odd frame or background, is not `certain`.

    levels -> background -> dE in Lab > 18 -> components (split by colour) -> colour -> soft alpha -> shape, size, turn
"""
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from diptych.world.fit import Fit, Hypothesis, fit_shape, synthesise, turned, upright
from diptych.world.render import render, second_tone
from diptych.world.sample import find_world
from diptych.world.scene import COLORS, ROTATION_PERIOD, SIZES, UNITS, Object, Scene, WorldConfig
from diptych.world.segment import (
    FRAME,
    area_average,
    components,
    erode,
    find_ground,
    grow,
    palette,
    smooth,
    split_by_color,
    to_lab,
)

_CHROMA = 0.1  # weight of chroma against luma
_YCC = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
_METRIC = (_YCC.T @ np.diag([1, _CHROMA, _CHROMA]) @ _YCC).astype(np.float32)  # codecs blur chroma more than luma
BLOCKING = ("geometry", "background", "not finite")  # reasons that make the whole picture uncertain
NOISY = 12.0  # standard deviation in levels from which a picture is smoothed twice before it is segmented
NO_BRIGHT = 0.05  # share of the bright tone below which an object has no texture
FAINT = 30.0  # dE below which a blob without inner pixels is a halo
FADED_OFF = 45.0  # levels a measured tone may lie off the ray to a palette colour
SMALLEST, LARGEST = 0.8, 1.25  # radii beyond these factors of the size words are no size of the world


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a blob counts. `foreground` dE in Lab; `area` pixels at 64 px, smaller specks are ignored; `residual` and
    `ratio` accept a shape (share of unexplained energy; relative to the best other shape); `color_ratio`: the second
    palette entry must be this much farther; `color_distance`: largest dE to the palette."""

    foreground: float = 18.0
    area: float = 12.0
    residual: float = 0.03
    ratio: float = 0.8
    decoy_ratio: float = 1.1
    color_ratio: float = 1.25
    color_distance: float = 30.0


LABELS_ONLY = Limits(residual=1.0, ratio=1.01, decoy_ratio=100.0, color_ratio=1.0, color_distance=100.0)  # best guess


@dataclass(frozen=True, kw_only=True)
class Unknown:
    """A blob that is no object of the world; centre in [0, 1], `area` as a share of the picture."""

    reason: str
    x: float
    y: float
    area: float
    guess: str = ""


@dataclass(frozen=True, kw_only=True)
class Percept:
    """What a picture shows. `confidence` belongs to `objects` one by one; `reasons` collects everything odd."""

    objects: tuple[Object, ...]
    confidence: tuple[float, ...]
    unknown: tuple[Unknown, ...] = ()
    background: str | None = None
    reasons: tuple[str, ...] = ()
    canvas: tuple[int, int] = (UNITS, UNITS)

    @property
    def certain(self) -> bool:
        return not self.unknown and not any(r in BLOCKING for r in self.reasons)

    def scene(self) -> Scene:
        if self.background is None:
            raise ValueError("expected a percept with a known background, got None; fix: check `certain` first")
        return Scene(objects=self.objects, background=self.background, canvas=self.canvas)



@lru_cache(64)
def _hypotheses(shapes: tuple[str, ...], rotated: bool) -> tuple[Hypothesis, ...]:
    return turned(shapes) if rotated else upright(shapes)


def perceive(pixels: np.ndarray, world: str | WorldConfig = "mini", *, limits: Limits | None = None,
             canvas: tuple[int, int] = (UNITS, UNITS)) -> Percept:
    """Recovers the scene from `pixels` (3, height, width) in [-1, 1]; pictures larger than the world's are reduced."""
    config, limits = find_world(world), limits or Limits()
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or min(pixels.shape[1:]) < 24:
        raise ValueError(f"expected a picture of shape (3, height, width) of at least 24 px, got {pixels.shape}")
    if not np.isfinite(pixels).all():
        return Percept(objects=(), confidence=(), reasons=("not finite",), canvas=canvas)
    levels = (np.clip(pixels.astype(np.float32), -1, 1) + 1) * np.float32(127.5)
    _, h, w = levels.shape
    if abs(h * canvas[0] / (w * canvas[1]) - 1) > 0.02:
        return Percept(objects=(), confidence=(), reasons=("geometry",), canvas=canvas)
    height, width = config.pixels * canvas[1] // UNITS, config.pixels * canvas[0] // UNITS
    if h > height:
        levels = area_average(levels, height, width)
    return _Look(levels, config, limits, canvas).percept()


class _Look:
    """One picture under inspection."""

    def __init__(self, levels: np.ndarray, config: WorldConfig, limits: Limits, canvas: tuple[int, int]) -> None:
        self.config, self.limits, self.canvas = config, limits, canvas
        self.scale = levels.shape[2] / canvas[0]  # pixels per unit
        self.fine = self.scale * UNITS / 64  # 1 at 64 px
        self.floor = limits.area * self.fine**2
        self.levels, self.ground = find_ground(levels, config.backgrounds)
        self.reasons = list(self.ground.reasons)
        self.lab = to_lab(smooth(self.levels) if self.ground.noise < NOISY else smooth(smooth(self.levels)))
        ground = to_lab(self.ground.color.reshape(3, 1).astype(np.float32)).reshape(3, 1, 1)
        self.distance = np.sqrt(((self.lab - ground) ** 2).sum(0))
        quiet = float(np.quantile(self.distance[[*range(FRAME), *range(-FRAME, 0)]], 0.98))
        labels, count = components(self.distance > min(max(limits.foreground, 1.4 * quiet), 30.0), self.floor)
        self.textured = config.textures != ("solid",)
        if not self.textured and count:
            labels, count = split_by_color(labels, count, self.lab, self.ground.color, config.colors, self.floor)
        self.labels, self.count = labels, count
        self.owner = grow(labels, max(3, round(3 * self.fine)))
        self.inside = erode(labels)
        self.far = self.levels[:, self.owner == 0][:, ::3] - self.ground.color[:, None]
        self.hypotheses = _hypotheses(config.shapes, config.rotated)
        self.found: list[tuple[Object, float]] = []
        self.unknown: list[Unknown] = []

    def percept(self) -> Percept:
        for label in np.unique(self.labels).tolist():
            if label:
                self._blob(label)
        self.found.sort(key=lambda f: (f[0].y, f[0].x))
        self.reasons += [u.reason for u in self.unknown]
        return Percept(objects=tuple(o.replace(id=i) for i, (o, _) in enumerate(self.found)),
                       confidence=tuple(c for _, c in self.found), unknown=tuple(self.unknown),
                       background=self.ground.name, reasons=tuple(dict.fromkeys(self.reasons)), canvas=self.canvas)

    def _blob(self, label: int) -> None:
        where = self.labels == label
        if not (where & self.inside).any() and float(self.distance[where].max()) < FAINT:
            return None  # nothing but an edge and hardly visible: the halo of something else
        name, gap, rivalry, tones = self._color(where)
        alpha, noise, pixels = self._alpha(label, tones)
        area = float(alpha.sum())
        if area < self.floor:
            return None
        y, x = (float((alpha.sum(a) * np.arange(alpha.shape[1 - a])).sum() / area) for a in (1, 0))
        if gap > self.limits.color_distance or rivalry * self.limits.color_ratio > 1 or name not in self.config.colors:
            fit, faded = self._faded(label, tones[0])
            return self._keep(fit, faded, rivalry) if fit else self._reject("unknown colour", x, y, area, name)
        if math.sqrt(area / math.pi) < SIZES["small"][0] * SMALLEST * self.scale:
            return self._reject("too small", x, y, area, name)
        fit = self._fit(alpha, noise, pixels)
        if fit is not None and self._accepted(fit):
            return self._keep(fit, name, rivalry)
        foreign = fit is not None and fit.decoy_residual < min(fit.residual, self.limits.residual)
        parts = [] if foreign else self._peel(alpha, noise)
        for part in parts:
            self._keep(part, name, rivalry)
        if parts:
            return None
        touches = where[0].any() or where[-1].any() or where[:, 0].any() or where[:, -1].any()
        return self._reject("border" if touches else "shape", x, y, area, name, "" if fit is None else fit.shape)

    def _faded(self, label: int, tone: np.ndarray) -> tuple[Fit | None, str]:
        """Blur mixes the colour of a thin shape with the background everywhere. Every palette colour on the ray from
        the background through the measured tone is tried; the right one needs no amplitude besides 1."""
        seen = tone - self.ground.color
        accepted: list[tuple[float, str, Fit]] = []
        for name in self.config.colors if not self.textured else ():
            ray = np.array(COLORS[name], float) - self.ground.color
            share = float(seen @ ray / (ray @ ray))
            if not 0.4 < share < 1.1 or float(np.linalg.norm(seen - share * ray)) > FADED_OFF * share:
                continue
            fit = self._fit(*self._alpha(label, [self.ground.color + ray]))
            if fit is not None and self._accepted(fit) and abs(fit.amplitude - 1) < 0.15:
                accepted.append((fit.residual, name, fit))
        accepted.sort(key=lambda a: a[0])
        if not accepted or (len(accepted) > 1 and accepted[0][0] > self.limits.ratio * accepted[1][0]):
            return None, ""
        return accepted[0][2], accepted[0][1]

    def _color(self, where: np.ndarray) -> tuple[str, float, float, list[np.ndarray]]:
        """Palette name, dE to it, that relative to the second, and the measured tones in levels (bright first)."""
        deep = where & self.inside
        if deep.sum() < 4:
            deep = where
        far = self.distance[deep]
        rank = int(0.6 * (len(far) - 1))
        keep = far >= min(float(np.partition(far, rank)[rank]), 0.9 * float(far.max()))
        if self.textured:
            keep[:] = True  # the dark tone may be much nearer to the background than the bright one
        lab, levels = self.lab[:, deep][:, keep], self.levels[:, deep][:, keep]
        names, colors = palette()
        if not self.textured:
            gaps = np.sqrt(((np.median(lab, 1) - colors) ** 2).sum(1))
            first, second = np.argsort(gaps)[:2]
            return names[first], float(gaps[first]), float(gaps[first] / gaps[second]), [np.median(levels, 1)]
        count = len(COLORS)
        bright = np.sqrt(((lab[:, None] - colors.T[:, :count, None]) ** 2).sum(0))
        dark = np.sqrt(((lab[:, None] - palette(0.5)[1].T[:, :count, None]) ** 2).sum(0))
        share = (bright < dark).mean(1)
        gaps = np.minimum(bright, dark).mean(1) + np.where(share > NO_BRIGHT, 0, 1000)  # no texture is nearly all dark
        first, second = np.argsort(gaps)[:2]
        is_bright = bright[first] < dark[first]
        tones = [np.median(levels[:, is_bright] if is_bright.any() else levels, 1)]
        if NO_BRIGHT < share[first] < 0.85:
            tones.append(np.median(levels[:, ~is_bright], 1))
        return names[first], float(gaps[first]), float(gaps[first] / gaps[second]), tones

    def _alpha(self, label: int, tones: list[np.ndarray]) -> tuple[np.ndarray, float, int]:
        """Coverage (h, w) of the blob by projection on the line background -> colour; its noise; pixels involved."""
        own = self.owner == label
        shifted = self.levels - self.ground.color[:, None, None].astype(np.float32)
        maps, noises = [], []
        for tone in tones:
            direction = (tone - self.ground.color).astype(np.float32)
            weighted = _METRIC @ direction
            direction = weighted / max(float(direction @ weighted), 1.0)
            maps.append(np.tensordot(direction, shifted, 1))
            noises.append(1.4826 * float(np.median(np.abs(direction @ self.far))) if self.far.shape[1] else 0.0)
        alpha = maps[0]
        if len(tones) == 2:  # outside the inner pixels, the tone is that of the nearest inner pixel
            inner = self.inside & (self.labels == label)
            gaps = [((self.levels - t[:, None, None]) ** 2).sum(0) for t in tones]
            tone_of = grow(np.where(inner, 1 + (gaps[1] < gaps[0]), 0).astype(np.int32), max(4, round(4 * self.fine)))
            alpha = np.where(inner, 1.0, np.where(tone_of == 2, maps[1], maps[0])).astype(np.float32)
        return np.where(own, np.clip(alpha, -0.5, 1.5), 0).astype(np.float32), max(noises), int(own.sum())

    def _fit(self, alpha: np.ndarray, noise: float, pixels: int) -> Fit | None:
        area = float(alpha.sum())
        if area < self.floor:
            return None
        y, x = (float((alpha.sum(a) * np.arange(alpha.shape[1 - a])).sum() / area) for a in (1, 0))
        return fit_shape(alpha, x, y, math.sqrt(area / math.pi), self.config.shapes, self.hypotheses,
                         noise=noise, count=pixels, rotated=self.config.rotated)

    def _reject(self, reason: str, x: float, y: float, area: float, color: str, shape: str = "") -> None:
        h, w = self.labels.shape
        self.unknown.append(Unknown(reason=reason, x=(x + 0.5) / w, y=(y + 0.5) / h, area=area / (h * w),
                                    guess=f"{color} {shape}".strip()))

    def _accepted(self, fit: Fit) -> bool:
        if not SIZES["small"][0] * SMALLEST <= fit.radius / self.scale <= SIZES["large"][1] * LARGEST:
            return False
        return (fit.shape in self.config.shapes and fit.residual < self.limits.residual
                and fit.ratio < self.limits.ratio and fit.decoy_ratio < self.limits.decoy_ratio)

    def _keep(self, fit: Fit, color: str, rivalry: float) -> None:
        radius = fit.radius / self.scale
        words = list(SIZES)
        size = words[sum(radius > (SIZES[a][1] + SIZES[b][0]) / 2 for a, b in pairwise(words))]
        found = Object(id=0, shape=fit.shape, color=color, size=size, radius=round(radius),
                       x=round((fit.x + 0.5) / self.scale), y=round((fit.y + 0.5) / self.scale),
                       rotation=round(fit.rotation) % ROTATION_PERIOD[fit.shape] if self.config.rotated else 0)
        doubt = 0.0
        if self.textured:
            texture, doubt = self._texture(fit, found)
            found = found.replace(texture=texture)
        if doubt > self.limits.ratio:
            return self._reject("texture", fit.x, fit.y, math.pi * fit.radius**2, color, fit.shape)
        confidence = min(1 - fit.ratio**2, 1 - rivalry**2, 1 - doubt**2, 1 - fit.residual)
        self.found.append((found, round(max(confidence, 0.0), 4)))

    def _texture(self, fit: Fit, found: Object) -> tuple[str, float]:
        """The texture whose rendering at the fitted place differs least, and its error relative to the second."""
        bright, dark = np.array(COLORS[found.color], np.float32), np.array(second_tone(found.color), np.float32)
        axis = (bright - dark) / float((bright - dark) @ (bright - dark))

        def tone(levels: np.ndarray) -> np.ndarray:
            return smooth(np.tensordot(axis, levels - dark[:, None, None], 1))  # 1 bright, 0 dark

        sure = synthesise(fit, *self.labels.shape) > 0.97
        seen = tone(self.levels)
        errors: list[tuple[float, str]] = []
        for name in self.config.textures:
            alone = Scene(objects=(found.replace(texture=name),), canvas=self.canvas)
            drawn = tone((render(alone, round(self.scale * UNITS)) + 1) * np.float32(127.5))
            errors.append((float(((seen - drawn) ** 2)[sure].mean()) if sure.any() else 0.0, name))
        errors.sort()
        if len(errors) == 1:
            return errors[0][1], 0.0
        return errors[0][1], (errors[0][0] + 0.01) / (errors[1][0] + 0.01)

    def _peel(self, alpha: np.ndarray, noise: float) -> list[Fit]:
        """Explains one blob as two or three touching objects of its colour; empty if that fails too."""
        for number in (2, 3):
            if alpha.sum() < number * math.pi * (SIZES["small"][0] * self.scale) ** 2:
                break
            fits = self._peel_into(alpha, noise, number)
            if fits and all(self._accepted(f) for f in fits):
                return fits
        return []

    def _peel_into(self, alpha: np.ndarray, noise: float, number: int) -> list[Fit]:
        ys, xs = np.nonzero(alpha > 0.5)
        if len(ys) < number * 4:
            return []
        points = np.stack([xs, ys], 1).astype(np.float64)
        centers = _spread_centers(points, number)
        h, w = alpha.shape
        gx, gy = np.arange(w)[None], np.arange(h)[:, None]
        nearest = np.argmin([(gx - x) ** 2 + (gy - y) ** 2 for x, y in centers], 0)
        pieces = [np.where(nearest == i, alpha, 0).astype(np.float32) for i in range(number)]
        fits: list[Fit] = []
        for _ in range(3):
            fits = []
            for piece in pieces:
                fit = self._fit(piece, noise, int((piece != 0).sum()))
                if fit is None:
                    return []
                fits.append(fit)
            drawn = [synthesise(f, h, w) for f in fits]
            pieces = [(alpha - sum(d for j, d in enumerate(drawn) if j != i)).astype(np.float32) for i in range(number)]
        return fits


def _spread_centers(points: np.ndarray, number: int) -> np.ndarray:
    """k-means from the farthest points: where touching objects of similar size have their centres."""
    start = [points[((points - points.mean(0)) ** 2).sum(1).argmax()]]
    while len(start) < number:
        start.append(points[np.min([((points - s) ** 2).sum(1) for s in start], 0).argmax()])
    centers = np.array(start)
    for _ in range(8):
        nearest = ((points[:, None] - centers[None]) ** 2).sum(2).argmin(1)
        for i in set(nearest.tolist()):
            centers[i] = points[nearest == i].mean(0)
    return centers
