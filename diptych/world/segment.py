"""From a picture to blobs: background, distance from it in CIE Lab, connected components, split by colour."""
import logging
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diptych.world.scene import BACKGROUNDS, COLORS

logger = logging.getLogger(__name__)

FRAME = 2  # pixels of border that show the background at 64 px
NEUTRALS = {"white": (250, 250, 250), "black": (20, 20, 20), "gray": (128, 128, 128)}  # decoys: no object has them
_RGB_TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                        [0.0193339, 0.1191920, 0.9503041]])
_FINENESS = 4  # entries of the linearisation table per 8-bit level


@lru_cache(None)
def _linear_table() -> np.ndarray:
    v = np.arange(255 * _FINENESS + 1) / (255 * _FINENESS)
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4).astype(np.float32)


@lru_cache(None)
def _white_matrix() -> np.ndarray:
    return (_RGB_TO_XYZ / _RGB_TO_XYZ.sum(1, keepdims=True)).astype(np.float32)


def to_lab(levels: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of sRGB in 8-bit levels (float), channels first."""
    index = np.rint(levels * _FINENESS).astype(np.int16).clip(0, 255 * _FINENESS)
    xyz = _white_matrix() @ _linear_table()[index].reshape(3, -1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]).reshape(levels.shape)


@lru_cache(None)
def palette(darken: float = 1.0) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and Lab (n, 3) of all colours an object or a decoy may have."""
    names = tuple(COLORS) + tuple(NEUTRALS)
    rgb = np.array([COLORS.get(n, NEUTRALS.get(n)) for n in names], np.float32)
    return names, to_lab((rgb * darken).T).T


def smooth(image: np.ndarray, side: float = 0.135) -> np.ndarray:
    """Gaussian of sigma .5 px as a 3-tap kernel with weights (side, 1, side) over the last two axes."""
    total = 1 + 2 * side
    out = image.copy()
    out[..., 1:] += side * image[..., :-1]
    out[..., :-1] += side * image[..., 1:]
    out[..., 0] += side * image[..., 0]
    out[..., -1] += side * image[..., -1]
    image = out / total**2
    out = image.copy()
    out[..., 1:, :] += side * image[..., :-1, :]
    out[..., :-1, :] += side * image[..., 1:, :]
    out[..., 0, :] += side * image[..., 0, :]
    out[..., -1, :] += side * image[..., -1, :]
    return out


def area_average(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes (c, h, w) down by exact area averaging."""
    def matrix(old: int, new: int) -> np.ndarray:
        edges = np.arange(new + 1) * (old / new)
        cells = np.arange(old)
        overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
        return (overlap.clip(0) * (new / old)).astype(np.float32)

    return matrix(image.shape[1], height) @ image @ matrix(image.shape[2], width).T


@dataclass
class Ground:
    """The background: its colour in levels, its name (None when it is none of the world's) and what was odd."""

    color: np.ndarray
    name: str | None
    noise: float  # standard deviation per channel in levels
    reasons: list[str]


def find_ground(levels: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, Ground]:
    """The picture with linear shading removed, and its background from the median of the frame."""
    _, h, w = levels.shape
    t = max(FRAME, round(FRAME * min(h, w) / 64))
    frame = np.concatenate([levels[:, :t].reshape(3, -1), levels[:, -t:].reshape(3, -1),
                            levels[:, t:-t, :t].reshape(3, -1), levels[:, t:-t, -t:].reshape(3, -1)], 1)
    color = np.median(frame, 1)
    reasons: list[str] = []
    off = np.abs(frame - color[:, None]).max(0)
    sides = [s.reshape(3, -1).mean(1) for s in (levels[:, :t], levels[:, -t:], levels[:, :, :t], levels[:, :, -t:])]
    spread = max(float(np.abs(a - b).max()) for a in sides for b in sides)
    if spread > 10:
        levels, spread, off = _remove_plane(levels, frame, color, t)
        reasons.append("shading")
    if float((off > 40).mean()) > 0.12 or spread > 16:
        reasons.append("background")
    noise = 1.4826 * float(np.median(np.abs(frame - color[:, None])))
    lab = to_lab(np.stack([color] + [np.array(BACKGROUNDS[n], float) for n in names], 1).astype(np.float32))
    gaps = np.sqrt(((lab[:, 1:] - lab[:, :1]) ** 2).sum(0))
    best = int(gaps.argmin())
    if gaps[best] > 20:
        return levels, Ground(color, None, noise, [*reasons, "background"])
    return levels, Ground(color, names[best], noise, reasons)


def _remove_plane(levels: np.ndarray, frame: np.ndarray, color: np.ndarray,
                  t: int) -> tuple[np.ndarray, float, np.ndarray]:
    """Subtracts the plane through the frame; the remaining spread of its sides tells whether shading was the cause."""
    _, h, w = levels.shape
    y, x = np.mgrid[-1:1:h * 1j, -1:1:w * 1j]

    def of(a: np.ndarray) -> np.ndarray:
        return np.concatenate([a[:t].ravel(), a[-t:].ravel(), a[t:-t, :t].ravel(), a[t:-t, -t:].ravel()])

    basis = np.stack([np.ones(frame.shape[1]), of(x), of(y)], 1)
    keep = np.ones(len(basis), bool)
    coefficients = np.zeros((3, 3))
    for _ in range(2):  # the second pass leaves out what is no background
        coefficients = np.linalg.lstsq(basis[keep], frame.T[keep], rcond=None)[0]
        off = np.abs(frame.T - basis @ coefficients).max(1)
        keep = off <= max(20.0, 3 * float(np.median(off)))
    plane = np.einsum("kc,khw->chw", coefficients, np.stack([np.ones_like(x), x, y]))
    flat = (levels - plane + color[:, None, None]).astype(np.float32)
    sides = [s.reshape(3, -1).mean(1) for s in (flat[:, :t], flat[:, -t:], flat[:, :, :t], flat[:, :, -t:])]
    return flat, max(float(np.abs(a - b).max()) for a in sides for b in sides), off


def components(mask: np.ndarray, floor: float) -> tuple[np.ndarray, int]:
    """8-connected components of at least `floor` pixels: labels int32 (h, w) from 1, 0 elsewhere, and their number."""
    h, w = mask.shape
    padded = np.zeros((h, w + 2), np.int8)
    padded[:, 1:-1] = mask
    step = np.diff(padded, axis=1)
    row, start = np.nonzero(step == 1)
    end = np.nonzero(step == -1)[1]
    rows, starts, ends = row.tolist(), start.tolist(), end.tolist()
    n = len(rows)
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0  # first run that may still touch the current one from the row above
    for i in range(n):
        while rows[above] < rows[i] - 1 or (rows[above] == rows[i] - 1 and ends[above] < starts[i]):
            above += 1
        j = above
        while rows[j] == rows[i] - 1 and starts[j] <= ends[i]:
            parent[root(i)] = root(j)
            j += 1
    roots = np.array([root(i) for i in range(n)], np.int64)
    area = np.bincount(roots, weights=end - start, minlength=1)
    number = np.zeros(len(area), np.int32)
    kept = np.flatnonzero(area >= floor)
    number[kept] = np.arange(1, len(kept) + 1)
    marks = np.zeros((h, w + 1), np.int32)
    if n:
        marks[row, start] += number[roots]
        marks[row, end] -= number[roots]
    return np.cumsum(marks, 1, dtype=np.int32)[:, :w], len(kept)


def erode(labels: np.ndarray) -> np.ndarray:
    """Pixels whose 8 neighbours all are foreground; outside the picture counts as foreground."""
    mask = labels > 0
    out = mask.copy()
    out[1:] &= mask[:-1]
    out[:-1] &= mask[1:]
    mask = out.copy()
    out[:, 1:] &= mask[:, :-1]
    out[:, :-1] &= mask[:, 1:]
    return out


def grow(labels: np.ndarray, steps: int) -> np.ndarray:
    """Every label spreads by `steps` pixels into what is free; the larger number wins where two meet."""
    for _ in range(steps):
        wide = labels.copy()
        np.maximum(wide[:, 1:], labels[:, :-1], out=wide[:, 1:])
        np.maximum(wide[:, :-1], labels[:, 1:], out=wide[:, :-1])
        tall = wide.copy()
        np.maximum(tall[1:], wide[:-1], out=tall[1:])
        np.maximum(tall[:-1], wide[1:], out=tall[:-1])
        labels = np.where(labels > 0, labels, tall)
    return labels


def _mixtures(colors: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """(n, n) bool: colour j (in levels) is what soft edges of colour i look like on this background."""
    ray = colors - ground  # (n, 3)
    share = (ray @ ray.T) / np.maximum((ray**2).sum(1)[:, None], 1.0)
    off = np.linalg.norm(ray[None] - share[..., None] * ray[:, None], axis=2)
    return (off < 40) & (share > 0.1) & (share < 0.9)


def split_by_color(labels: np.ndarray, count: int, lab: np.ndarray, ground: np.ndarray, names: tuple[str, ...],
                   floor: float) -> tuple[np.ndarray, int]:
    """Parts touching blobs of different colours. A second colour counts from a fifth of a blob's inner pixels."""
    inside = erode(labels)
    owner = labels[inside]
    if not len(owner):
        return labels, count
    known_names, all_colors = palette()
    colors = all_colors[[known_names.index(n) for n in names]]
    seen = lab[:, inside]
    gaps = (colors**2).sum(1)[:, None] - 2 * (colors @ seen)  # squared distances without |seen|^2
    nearest = gaps.argmin(0)
    known = gaps.min(0) + (seen**2).sum(0) < 20**2
    n = len(names)
    votes = np.bincount(owner[known] * n + nearest[known], minlength=(count + 1) * n).reshape(-1, n)
    strong = (votes >= 0.2 * votes.sum(1, keepdims=True)) & (votes >= floor)
    several = np.flatnonzero(strong.sum(1) > 1).tolist()
    mixed = _mixtures(np.array([COLORS[n] for n in names], float), ground) if several else np.zeros((0, 0), bool)
    for label in several:
        chosen = np.flatnonzero(strong[label])
        chosen = chosen[~mixed[np.ix_(chosen, chosen)].any(0)]
        if len(chosen) < 2:
            continue
        where = labels == label
        own = ((lab[:, where].T[:, None] - colors[chosen][None]) ** 2).sum(2).argmin(1)
        labels = labels.copy()
        labels[where] = 0
        for part in range(len(chosen)):
            piece = np.zeros(labels.shape, bool)
            piece[where] = own == part
            sub, parts = components(piece, floor)
            labels[sub > 0] = sub[sub > 0] + count
            count += parts
    return labels, count
