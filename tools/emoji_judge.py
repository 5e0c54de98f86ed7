"""Which emoji a picture shows: the one it is nearest to, wherever in the picture and however large.

The distance of a picture to an emoji is the mean squared difference at 16 x 16 pixels, the smallest over all places and
sizes at which training pictures show an emoji, because a caption does not say where. Placements of an emoji are made
from one held-out rendering, whose own place is known.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diptych.data.sources import FolderSource
from diptych.document import Document, Image

SIDE = 16  # pixels at which pictures are compared
SCALES = (0.78, 0.83, 0.88, 0.92)  # of the glyph in the renderings, 0.76 to 0.94
STEP = 0.05  # between places, as a share of the side
WHITE = "white"


@dataclass(frozen=True)
class Split:
    """The pictures of one split in the order of the file: for every emoji the first on white or the first on colour."""

    documents: list[Document]  # to draw
    captions: list[Document]  # to caption, with the name as the target
    rows: list[dict[str, Any]]
    pixels: Tensor  # (n, 3, h, w)

    @property
    def names(self) -> list[str]:
        return [r["name"] for r in self.rows]


def read(folder: Path, *, white: bool) -> Split:
    """One picture of every emoji."""
    draw, caption = FolderSource(folder, "draw"), FolderSource(folder, "caption", text="name")
    seen: set[str] = set()
    documents, captions = [], []
    for i, (_, _, row) in enumerate(draw.rows):
        if missing := {"name", "background", "scale", "dx", "dy"} - set(row):
            raise ValueError(f"expected {', '.join(sorted(missing))} in {folder / 'metadata.jsonl'}, got "
                             f"{', '.join(row)}; fix: make the folder with tools/emoji.py of this version")
        if row["name"] not in seen and (row["background"] == WHITE) == white:
            seen.add(row["name"])
            documents.append(draw.document(i))
            captions.append(caption.document(i))
    pixels = [torch.from_numpy(np.asarray(d.targets[0].pixels)) for d in documents if isinstance(d.targets[0], Image)]
    return Split(documents, captions, [d.meta for d in documents], torch.stack(pixels))


def border(pixels: Tensor) -> Tensor:
    """The colour (n, 3) of the edge of pictures (n, 3, h, w): the median of its pixels."""
    edges = [pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]]
    return torch.cat(edges, -1).median(-1).values


def places() -> list[tuple[float, float, float]]:
    """(scale, dx, dy) where a rendering may show its emoji, close enough to each other for the judge's pixels."""
    found = []
    for scale in SCALES:
        room = (1 - scale) / 2
        steps = torch.linspace(-room, room, math.ceil(2 * room / STEP) + 1).tolist()
        found += [(scale, dx, dy) for dy in steps for dx in steps]
    return found


def move(pixels: Tensor, rows: Sequence[dict[str, Any]], scale: float, dx: float, dy: float) -> Tensor:
    """Renderings (n, 3, h, w) with their emoji at another place and size."""
    ground = border(pixels)[:, :, None, None]
    ratio = torch.tensor([r["scale"] for r in rows]) / scale
    theta = torch.zeros(len(rows), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = ratio
    for axis, (name, to) in enumerate((("dx", dx), ("dy", dy))):  # sides run from -1 to 1: shifts count twice
        theta[:, axis, 2] = 2 * torch.tensor([r[name] for r in rows]) - ratio * 2 * to
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - ground, grid, align_corners=False) + ground


def distances(queries: Tensor, gallery: Tensor, rows: Sequence[dict[str, Any]]) -> Tensor:
    """Mean squared difference (q, n) of pictures to the nearest of the placements of every gallery emoji."""
    def small(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.float(), SIDE).flatten(1)

    q = small(queries)
    best = torch.full((len(queries), len(gallery)), float("inf"))
    for place in tqdm(places(), desc="judge", leave=False):
        g = small(move(gallery, rows, *place))
        best = torch.minimum(best, q.square().sum(1)[:, None] - 2 * q @ g.T + g.square().sum(1)[None])
    return best.clamp_min(0) / q.shape[1]


def ranks(distance: Tensor, own: Tensor, allowed: Tensor | None = None) -> Tensor:
    """How many of the (allowed) others are at least as near as the own one, (q,): 0 is right, ties are wrong."""
    mine = distance.gather(1, own[:, None])
    nearer = distance <= mine
    if allowed is not None:
        nearer &= allowed
    return nearer.scatter(1, own[:, None], False).sum(1)
