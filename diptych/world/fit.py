"""Shape by analysis-by-synthesis: which shape, where, how large and how blurred explains a soft alpha map best.

Every hypothesis is a template T: the shape of some radius, rotation and blur, smoothed by a Gaussian. The observed map
is sampled with the same Gaussian on a grid around its centre of mass, so templates need no sub-pixel phases. Centre,
radius, blur, amplitude (and rotation) are never exactly those of the template; their derivatives D span what small
errors of them look like, and the error of a hypothesis is what the best correction c leaves, at a price for c:

    E = min_c |o - T - D c|^2 + c' P c  =  |o|^2 - 2 T o + |T|^2 - |W (o - T)|^2,     W = chol(D D' + P)^-1 D

T and W of all hypotheses lie in one matrix, so one product with the observation compares them all.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diptych.world.scene import ROTATION_PERIOD, SHAPES
from diptych.world.shapes import distance

SIGMA = 0.7  # of the smoothing before comparison, in cells
NOISE_GAIN = 1 / (4 * math.pi * SIGMA**2)  # white noise variance that survives the smoothing, per cell
LOG_STEP = math.log(1.05)  # between template radii
BLURS = (0.3, 0.9, 1.6)  # sigma in cells; the antialiasing of a sharp picture counts as .3
COARSE_BLUR = 0.7
MAX_RADIUS = 9.0  # in cells; larger objects are compared on coarser cells
FLOOR = 0.002  # residual that templates of the right shape leave on clean pictures
PRICE = 0.004  # relative residual that a correction of one standard deviation costs
DEVIATIONS = {"amplitude": 0.12, "x": 0.4, "y": 0.4, "radius": 0.06, "blur": 0.35, "turn": math.radians(6)}
FINE = 0.03  # spacing of the coverage samples, in radii
REACH = 1.62  # largest distance of an outline from its centre (tip of the star), in radii

Hypothesis = tuple[str, int]  # shape, rotation in degrees


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Best explanation of one blob, lengths in pixels. `residual`: noise-corrected share of unexplained energy;
    `ratio`: residual relative to that of the best other shape, both above the noise floor."""

    shape: str
    rotation: float
    x: float
    y: float
    radius: float
    blur: float
    amplitude: float
    residual: float
    ratio: float
    decoy_ratio: float
    decoy_residual: float
    other: str


def upright(shapes: Sequence[str]) -> tuple[Hypothesis, ...]:
    """Hypotheses of a world without rotation: its shapes and, as decoys, all others and their lying forms."""
    decoys = [("rectangle", 90), ("ellipse", 90), ("arrow", 90), ("arrow", 180), ("arrow", 270)]
    return tuple((s, 0) for s in SHAPES) + tuple(d for d in decoys if d[0] not in shapes)


def turned(shapes: Sequence[str], starts: int = 8) -> tuple[Hypothesis, ...]:
    """Hypotheses of a world with free rotation. A diamond is a turned square and never a hypothesis of its own."""
    out: list[Hypothesis] = []
    for shape in SHAPES:
        if shape == "diamond" and shape not in shapes:
            continue
        period = ROTATION_PERIOD[shape]
        steps = 1 if period == 1 else max(starts, period // 12)
        out += [(shape, round(i * period / steps)) for i in range(steps)]
    return tuple(out)


@lru_cache(2048)
def _coverage(shape: str, rotation: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (n,) in radii and coverage (n, n) of the shape turned by `rotation` degrees."""
    half = math.ceil((REACH + 0.05) / FINE)
    u = np.arange(-half, half + 1) * FINE
    angle = math.radians(rotation)
    c, s = math.cos(angle), math.sin(angle)
    d = distance(shape, u[None] * c + u[:, None] * s, u[:, None] * c - u[None] * s)
    return u, np.clip(0.5 - d / FINE, 0, 1)


def reach(radius: float) -> int:
    """Half side in cells of the comparison grid for objects of this radius in cells."""
    return math.ceil(REACH * radius * 1.06 + 2.0)


def _weights(p: np.ndarray, u: np.ndarray, radius: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Integral of a Gaussian around each p over the samples at u * radius; also (p - u * radius)."""
    offset = p[:, None] - u[None] * radius
    return np.exp(-(offset**2) / (2 * sigma**2)) * (FINE * radius / (sigma * math.sqrt(2 * math.pi))), offset


def synthesise(fit: Fit, height: int, width: int) -> np.ndarray:
    """The alpha map that the fit stands for, (height, width)."""
    u, coverage = _coverage(fit.shape, round(fit.rotation) % ROTATION_PERIOD[fit.shape])
    rows, _ = _weights(np.arange(height) - fit.y, u, fit.radius, max(fit.blur, 0.2))
    columns, _ = _weights(np.arange(width) - fit.x, u, fit.radius, max(fit.blur, 0.2))
    return rows @ coverage @ columns.T


@dataclass(frozen=True)
class _Template:
    """`rows` (1 + k, cells): T, then W. `square` = |T|^2, `shift` = W T, `back` maps W (o - T) to corrections."""

    rows: np.ndarray
    square: float
    shift: np.ndarray
    back: np.ndarray


@lru_cache(4000)  # about 40 kB each
def _template(shape: str, rotation: int, index: int, blur: float) -> _Template:
    radius = math.exp(index * LOG_STEP)
    u, coverage = _coverage(shape, rotation)
    half = reach(radius)
    p = np.arange(-half, half + 1.0)
    sigma = math.sqrt(SIGMA**2 + blur**2)
    a, offset = _weights(p, u, radius, sigma)
    moved = a * offset / sigma**2
    grown = a * (1 + u[None] * radius * offset / sigma**2)
    spread = a * (offset**2 / sigma**4 - 1 / sigma**2)
    ca = coverage @ a.T
    t = a @ ca
    tx, ty = a @ (coverage @ moved.T), moved @ ca
    basis = [t, tx, ty, a @ (coverage @ grown.T) + grown @ ca, blur * (a @ (coverage @ spread.T) + spread @ ca)]
    if ROTATION_PERIOD[shape] > 1:
        basis.append(p[None] * ty - p[:, None] * tx)
    d = np.stack([b.ravel() for b in basis])
    deviation = np.array(list(DEVIATIONS.values())[:len(d)])
    square = float(t.ravel() @ t.ravel())
    lower = np.linalg.cholesky(d @ d.T + np.diag(PRICE * square / deviation**2))
    w = np.linalg.solve(lower, d)
    return _Template(np.concatenate([t.reshape(1, -1), w]).astype(np.float32), square, w @ t.ravel(),
                     np.linalg.inv(lower).T)


@dataclass(frozen=True)
class _Bank:
    """Templates of many hypotheses side by side; absent corrections (the turn of a circle) are zero rows."""

    keys: tuple[tuple[str, int, float], ...]
    rows: np.ndarray
    square: np.ndarray
    shift: np.ndarray
    back: list[np.ndarray]
    names: list[str]  # shapes; the keys of one shape are neighbours
    first: np.ndarray  # index of the first key of each shape
    size: list[int]

    def errors(self, o: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E of every key and its W (o - T), (keys, k)."""
        product = (self.rows @ o).reshape(len(self.keys), -1)
        moved = product[:, 1:] - self.shift
        return float(o @ o) - 2 * product[:, 0] + self.square - (moved**2).sum(1), moved


def _stack(keys: Sequence[tuple[str, int, float]], index: int) -> _Bank:
    keys = sorted(keys)
    templates = [_template(shape, rotation, index, blur) for shape, rotation, blur in keys]
    names = [shape for shape, _, _ in keys]
    first = [i for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    k = len(DEVIATIONS)
    rows = np.zeros((len(keys), 1 + k, templates[0].rows.shape[1]), np.float32)
    shift = np.zeros((len(keys), k))
    for i, t in enumerate(templates):
        rows[i, :len(t.rows)] = t.rows
        shift[i, :len(t.shift)] = t.shift
    return _Bank(tuple(keys), rows.reshape(-1, rows.shape[2]), np.array([t.square for t in templates]), shift,
                 [t.back for t in templates], [names[i] for i in first], np.array(first),
                 [names.count(names[i]) for i in first])


@lru_cache(128)
def _full_bank(hypotheses: tuple[Hypothesis, ...], index: int) -> _Bank:
    return _stack([(shape, rotation, blur) for shape, rotation in hypotheses for blur in BLURS], index)


@lru_cache(128)
def _coarse_bank(hypotheses: tuple[Hypothesis, ...], index: int) -> tuple[np.ndarray, np.ndarray]:
    """Only T of every hypothesis, at one blur: enough to find the few rotations worth a full comparison."""
    templates = [_template(shape, rotation, index, COARSE_BLUR) for shape, rotation in hypotheses]
    return np.stack([t.rows[0] for t in templates]), np.array([t.square for t in templates])


def _sample(alpha: np.ndarray, x: float, y: float, half: int, cell: float) -> np.ndarray:
    """The map, smoothed by SIGMA cells, on a grid of (2 half + 1)^2 cells around (x, y)."""
    grid = np.arange(-half, half + 1) * cell
    gain = 1 / (SIGMA * cell * math.sqrt(2 * math.pi))
    scale = -0.5 / (SIGMA * cell) ** 2
    rows = np.exp(scale * ((grid + y)[:, None] - np.arange(alpha.shape[0])) ** 2) * gain
    columns = np.exp(scale * ((grid + x)[:, None] - np.arange(alpha.shape[1])) ** 2) * gain
    return (rows.astype(np.float32) @ alpha @ columns.astype(np.float32).T).ravel()


def _shortlist(o: np.ndarray, hypotheses: tuple[Hypothesis, ...], index: int, keep: int) -> list[Hypothesis]:
    """The two best rotations of each of the best shapes; what lies between them is left to the correction."""
    rows, square = _coarse_bank(hypotheses, index)
    errors = square - 2 * (rows @ o)
    order = np.argsort(errors)
    taken: dict[str, list[Hypothesis]] = {}
    for i in order.tolist():
        shape = hypotheses[i][0]
        if shape in taken or len(taken) < keep:
            taken.setdefault(shape, [])
            if len(taken[shape]) < 2:
                taken[shape].append(hypotheses[i])
    return [h for group in taken.values() for h in group]


def fit_shape(alpha: np.ndarray, x: float, y: float, radius: float, shapes: Sequence[str],
              hypotheses: tuple[Hypothesis, ...], *,
              noise: float = 0.0, count: int = 0, rotated: bool = False) -> Fit | None:
    """Fits `alpha` (height, width), zero outside the blob, from a first guess of centre and radius in pixels.

    `noise`: standard deviation of alpha per pixel; `count`: number of pixels that may carry it.
    """
    best: Fit | None = None
    chosen: list[Hypothesis] = []
    for attempt in range(3):
        cell = max(1.0, radius / MAX_RADIUS)
        index = round(math.log(radius / cell) / LOG_STEP)
        o = _sample(alpha, x, y, reach(math.exp(index * LOG_STEP)), cell)
        if rotated:
            chosen = _shortlist(o, hypotheses, index, 6) if best is None else _nearby(best, chosen)
            bank = _stack([(s, r, b) for s, r in chosen for b in BLURS], index)
        else:
            bank = _full_bank(hypotheses, index)
        found = _select(bank, o, shapes, noise**2 * NOISE_GAIN / cell**2 * count / cell**2, count / cell**2)
        if found is None:
            return None
        i, residual, ratio, decoy_ratio, decoy_residual, other, correction = found
        shape, rotation, blur = bank.keys[i]
        dx, dy = float(correction[1]) * cell, float(correction[2]) * cell
        grown = float(correction[3])
        turn = math.degrees(float(correction[5])) if len(correction) > 5 else 0.0
        period = ROTATION_PERIOD[shape]
        new = Fit(shape=shape, rotation=(rotation + turn) % period if period > 1 else 0.0, x=x + dx, y=y + dy,
                  radius=math.exp(index * LOG_STEP) * cell * math.exp(grown),
                  blur=max(blur + float(correction[4]), 0.0) * cell, amplitude=1 + float(correction[0]),
                  residual=residual, ratio=ratio, decoy_ratio=decoy_ratio, decoy_residual=decoy_residual,
                  other=other)
        if best is not None and new.residual > best.residual:
            return best
        best = new
        settled = abs(dx) + abs(dy) < 0.5 * cell and abs(math.log(best.radius / radius)) < LOG_STEP
        if (settled and not (rotated and attempt == 0)) or not 0.5 < best.radius / radius < 2:
            break
        x, y, radius = best.x, best.y, best.radius
    return best


def _nearby(best: Fit, chosen: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Second round: the found rotation, and the rivals as they were."""
    period = ROTATION_PERIOD[best.shape]
    return [(best.shape, round(best.rotation) % period)] + [h for h in chosen if h[0] != best.shape]


def _select(bank: _Bank, o: np.ndarray, shapes: Sequence[str], noise_energy: float,
            cells: float) -> tuple[int, float, float, float, float, str, np.ndarray] | None:
    errors, moved = bank.errors(o)
    energy = float(o @ o) - noise_energy
    if energy <= 0:
        return None
    best = np.minimum.reduceat(errors, bank.first)
    known = [name in shapes for name in bank.names]
    group = min((float(e), j) for j, e in enumerate(best) if known[j])[1]
    i = int(bank.first[group]) + int(errors[bank.first[group]:][:bank.size[group]].argmin())
    residuals = np.maximum(best - noise_energy, 0) / energy
    residual = float(residuals[group])
    second = {True: (math.inf, ""), False: (math.inf, "")}  # best rival among the world's shapes, among decoys
    for j, value in enumerate(residuals.tolist()):
        if j != group:
            second[known[j]] = min(second[known[j]], (value, bank.names[j]))
    floor = FLOOR + 2.5 * noise_energy * math.sqrt(2 / max(cells, 1.0)) / energy
    ratio, decoy_ratio = ((residual + floor) / (second[own][0] + floor) for own in (True, False))
    back = bank.back[i]
    other = min(second.values())[1]
    return i, residual, ratio, decoy_ratio, second[False][0], other, back @ moved[i, :len(back)]
