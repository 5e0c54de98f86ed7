"""Signed distance functions of the shapes, in a frame where every shape has the area of the unit circle.

`distance(shape, x, y)` is negative inside. Coverage of a pixel is clamp(.5 - distance in pixels, 0, 1), which gives
antialiased pictures of any size from one formula.
"""
import math
from functools import lru_cache

import numpy as np

PI = math.pi


def _polygon(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a simple polygon, points (n, 2) in order."""
    best = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf)
    inside = np.zeros(best.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0), strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        h = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, (px - ex * h) ** 2 + (py - ey * h) ** 2)
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    return np.where(inside, -1, 1) * np.sqrt(best)


def _regular(n: int, start: float) -> np.ndarray:
    angle = np.radians(start) + np.arange(n) * 2 * PI / n
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def _raw_points(shape: str) -> np.ndarray | None:
    """Polygon outline before area and centroid normalisation; y points down, shapes stand upright."""
    if shape == "star":
        points = np.empty((10, 2))
        points[0::2], points[1::2] = _regular(5, -90), 0.42 * _regular(5, -54)
        return points
    if shape == "cross":
        a = 0.36
        return np.array([(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a),
                         (-1, -a), (-a, -a)])
    return {"square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1.0)]), "diamond": _regular(4, -90),
            "triangle": _regular(3, -90),
            "rectangle": np.array([(-1.5, -0.75), (1.5, -0.75), (1.5, 0.75), (-1.5, 0.75)]),
            "pentagon": _regular(5, -90), "hexagon": _regular(6, 0),
            "arrow": np.array([(-1, -0.35), (0.1, -0.35), (0.1, -0.85), (1, 0), (0.1, 0.85), (0.1, 0.35), (-1, 0.35)]),
            }.get(shape)


@lru_cache(None)
def outline(shape: str) -> np.ndarray | None:
    """Polygon (n, 2) with the area of the unit circle and its centroid at the origin; None for curved shapes."""
    points = _raw_points(shape)
    if points is None:
        return None
    nx, ny = np.roll(points, -1, 0).T
    x, y = points.T
    cross = x * ny - nx * y
    area = cross.sum() / 2
    centroid = np.array([((x + nx) * cross).sum(), ((y + ny) * cross).sum()]) / (6 * area)
    return (points - centroid) * math.sqrt(PI / abs(area))


# The heart is a square turned by 45 degrees with half discs on its two upper sides. With side s its area is
# s^2 (1 + pi/4); its centroid lies above the centre of the square.
HEART_SIDE = math.sqrt(PI / (1 + PI / 4))
_ABOVE = HEART_SIDE / (2 * math.sqrt(2)) + (4 / (3 * PI)) * HEART_SIDE / 2 / math.sqrt(2)  # centroid of the half discs
HEART_DROP = (PI / 4) * _ABOVE / (1 + PI / 4)
RING_INNER = 0.5  # of the outer radius
RING_OUTER = 1 / math.sqrt(1 - RING_INNER**2)
ELLIPSE_AXES = (math.sqrt(1.7), 1 / math.sqrt(1.7))


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance in units of the equal-area radius; x, y broadcastable arrays in the shape's frame (y down)."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 1
    if shape == "ring":
        middle, half = RING_OUTER * (1 + RING_INNER) / 2, RING_OUTER * (1 - RING_INNER) / 2
        return np.abs(np.sqrt(x * x + y * y) - middle) - half
    if shape == "square":
        return _box(x, y, math.sqrt(PI) / 2)
    if shape == "ellipse":  # first-order distance: exact on the outline, which is what antialiasing needs
        a, b = ELLIPSE_AXES
        k = np.sqrt((x / a) ** 2 + (y / b) ** 2)
        return k * (k - 1) / np.maximum(np.sqrt((x / a**2) ** 2 + (y / b**2) ** 2), 1e-6)
    if shape == "heart":
        y = y - HEART_DROP
        c = math.sqrt(0.5)
        box = _box((x + y) * c, (y - x) * c, HEART_SIDE / 2)
        offset = HEART_SIDE / 2 * c
        discs = np.sqrt((np.abs(x) - offset) ** 2 + (y + offset) ** 2) - HEART_SIDE / 2
        return np.minimum(box, discs)
    points = outline(shape)
    if points is None:
        raise ValueError(f"expected a shape of the world, got {shape!r}")
    return _polygon(points, np.asarray(x, float), np.asarray(y, float))


def _box(x: np.ndarray, y: np.ndarray, half: float) -> np.ndarray:
    dx, dy = np.abs(x) - half, np.abs(y) - half
    return np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2) + np.minimum(np.maximum(dx, dy), 0)


@lru_cache(None)
def extent(shape: str, rotation: int = 0) -> tuple[float, float, float, float]:
    """Tight (x0, y0, x1, y1) around the centroid in units of the equal-area radius."""
    angle = math.radians(rotation)
    points = outline(shape)
    if points is None:  # sample the curved outline finely; the error is far below a lattice step
        if shape == "heart":
            t = np.linspace(0, 2 * PI, 2001)
            offset = HEART_SIDE / 2 * math.sqrt(0.5)
            disc = np.stack([np.cos(t), np.sin(t)], 1) * HEART_SIDE / 2
            tip = np.array([[0, 2 * offset]])
            points = np.concatenate([disc + (offset, -offset), disc + (-offset, -offset), tip]) + (0, HEART_DROP)
        else:
            a, b = ELLIPSE_AXES if shape == "ellipse" else (RING_OUTER if shape == "ring" else 1.0,) * 2
            t = np.linspace(0, 2 * PI, 2001)
            points = np.stack([a * np.cos(t), b * np.sin(t)], 1)
    x = points[:, 0] * math.cos(angle) - points[:, 1] * math.sin(angle)
    y = points[:, 0] * math.sin(angle) + points[:, 1] * math.cos(angle)
    return float(x.min()), float(y.min()), float(x.max()), float(y.max())
