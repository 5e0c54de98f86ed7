"""What the model makes of fixed held-out documents while it trains: a picture grid and its texts."""
import importlib
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pil
from PIL import ImageDraw

from diptych.document import Boxes, Document, Image, Piece, Text
from diptych.systems.base import System

Sampler = Callable[[System, Sequence[Document], int, Path], None]

CELL = 128  # pixels
_INK, _PAPER, _MARK = (30, 30, 30), (255, 255, 255), (214, 80, 40)


def find_sampler(spec: str) -> Sampler:
    """`module:function` -> the function."""
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"expected a sampler as module:function, got {spec!r} ({error})") from None


def grid(system: System, documents: Sequence[Document], step: int, folder: Path) -> None:
    """Write `step-N.png` (a row per document, its targets framed) and `step-N.json` (the texts, made and wanted)."""
    made = system.generate([d.prompt() for d in documents])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.png"
    temporary = path.with_name("." + path.name)
    draw_grid(made, documents).save(temporary, "PNG")
    temporary.replace(path)
    texts = [{"task": d.task, "made": [p.text for p in m.targets if isinstance(p, Text)],
              "wanted": [p.text for p in d.targets if isinstance(p, Text)]}
             for m, d in zip(made, documents, strict=True)]
    path.with_suffix(".json").write_text(json.dumps(texts, indent=1, ensure_ascii=False))


def draw_grid(made: Sequence[Document], wanted: Sequence[Document]) -> Pil.Image:
    """One row per document: its pieces as made; beside every target the wanted one, in a thinner frame."""
    rows = []
    for document, truth in zip(made, wanted, strict=True):
        cells: list[tuple[Piece, int]] = []
        for piece, true in zip(document, truth, strict=True):
            cells += [(piece, 3), (true, 1)] if piece.target else [(piece, 0)]
        rows.append(cells)
    columns = max(len(r) for r in rows)
    sheet = Pil.new("RGB", (columns * (CELL + 6) + 6, len(rows) * (CELL + 6) + 6), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (piece, frame) in enumerate(row):
            left, top = 6 + x * (CELL + 6), 6 + y * (CELL + 6)
            sheet.paste(_cell(piece), (left, top))
            for edge in range(1, frame + 1):
                pen.rectangle((left - edge, top - edge, left + CELL + edge - 1, top + CELL + edge - 1), outline=_MARK)
    return sheet


def _cell(piece: Piece) -> Pil.Image:
    if isinstance(piece, Image) and piece.pixels is not None:
        return Pil.fromarray(piece.to_uint8()).resize((CELL, CELL), Pil.Resampling.NEAREST)
    cell = Pil.new("RGB", (CELL, CELL), (244, 244, 240))
    ImageDraw.Draw(cell).multiline_text((5, 5), "\n".join(textwrap.wrap(_words(piece), 20)[:9]), fill=_INK)
    return cell


def _words(piece: Piece) -> str:
    content: Any = next((v for v in (getattr(piece, n, None) for n in ("text", "source")) if v is not None), None)
    if isinstance(piece, Boxes) and piece.boxes is not None:
        content = "; ".join(" ".join(f"{v:.2f}" for v in box) for box in np.asarray(piece.boxes))
    # Pillow's built-in font knows Latin-1 only
    return f"({piece.kind})" if content is None else str(content).encode("latin-1", "replace").decode("latin-1")
