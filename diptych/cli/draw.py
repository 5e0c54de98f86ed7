"""Draw a picture from words, from boxes, or from a plan that the model makes first."""
import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cli import common

if TYPE_CHECKING:
    from diptych.document import Boxes, Document, Image, Piece

TRACE_FRAMES = 8


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default="", help="what to draw")
    parser.add_argument("-o", "--out", type=common.output_picture, required=True, metavar="PICTURE")
    parser.add_argument("--size", type=common.picture_size, metavar="SIDE|WxH",
                        help="pixels (default: the model's own)")
    parser.add_argument("--layout", type=Path, metavar="JSON", help='boxes to fill, 0 to 1 from the top left: '
                        '[{"label": "red circle", "box": [x0, y0, x1, y1]}, ...]')
    parser.add_argument("--plan", action=argparse.BooleanOptionalAction, default=None,
                        help="let the model place boxes before it draws (default: what suits the model)")
    parser.add_argument("--trace", type=common.output_picture, metavar="PICTURE",
                        help="also write how the picture came about, from noise to the end")
    common.add_sampling(parser)
    common.add_model(parser)


def run(args: argparse.Namespace) -> int:
    if not args.prompt.strip() and args.layout is None:
        raise ValueError("expected words or --layout, got neither; fix: diptych draw 'a red circle' -o out.png")
    if args.plan and (args.layout is not None or not args.prompt.strip()):
        raise ValueError("expected --plan with words alone, got a layout or no words")
    boxes = None if args.layout is None else read_layout(args.layout)
    system = common.load_model(args)
    from diptych.data.images import write_image
    from diptych.document import Boxes, Image

    sampling = common.sampling_of(system, args)
    if args.trace is not None:
        sampling = common.sampling_of(system, args, partial=TRACE_FRAMES)
    frames: list[Any] = []

    def collect(index: int, event: Any) -> None:
        if event.kind in ("partial", "picture"):
            frames.append(event.value)

    plan = args.plan if args.plan is not None else sampling.plan and boxes is None
    document = drawing(args.prompt, boxes, plan=plan, size=args.size)
    [made] = system.generate([document], sampling, seeds=args.seed, emit=collect)
    write_image(made.of(Image)[-1], args.out)
    if args.trace is not None:
        write_image(strip(frames), args.trace)
    if args.plan:
        for piece in made.of(Boxes):
            print(json.dumps(layout_json(piece)))
    return 0


def drawing(prompt: str, boxes: "Boxes | None" = None, *, plan: bool = False,
            size: tuple[int, int] | None = None) -> "Document":
    """The document that asks for a drawing, worded as the models learn it."""
    from diptych.document import Boxes, Document, Image, Text

    text = f"plan first , then draw {prompt}" if plan else prompt or "draw this layout"
    pieces: list[Piece] = [Text(text=text)]
    if boxes is not None:
        pieces.append(boxes)
    if plan:
        pieces.append(Boxes(role="assistant", target=True))
    pieces.append(Image(role="assistant", target=True, size=size))
    return Document(tuple(pieces), "plan" if plan else "layout" if boxes is not None else "draw")


def read_layout(path: Path) -> "Boxes":
    """Boxes with labels from a JSON file."""
    from diptych.document import Boxes

    form = 'expected [{"label": "red circle", "box": [x0, y0, x1, y1]}, ...] with 0 <= x0 < x1 <= 1 in ' + str(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{form}, got no JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{form}, got {entries!r:.60}")
    for entry in entries:
        box = entry.get("box") if isinstance(entry, dict) else None
        if (not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box)
                or not isinstance(entry.get("label"), str)):
            raise ValueError(f"{form}, got {entry!r:.60}")
        if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(f"{form}, got the box {box}; fix: divide pixels by the picture's sides")
    return Boxes(boxes=[e["box"] for e in entries], labels=tuple(e["label"] for e in entries))  # type: ignore[arg-type]


def layout_json(piece: "Boxes") -> list[dict[str, Any]]:
    """What `read_layout` reads; labels are left out where there are none."""
    boxes = [] if piece.boxes is None else [[round(float(v), 4) for v in box] for box in piece.boxes]
    if not piece.labels:
        return [{"box": box} for box in boxes]
    return [{"label": label, "box": box} for label, box in zip(piece.labels, boxes, strict=True)]


def strip(frames: list[Any]) -> "Image":
    """Pictures of one size (3, h, w) side by side."""
    import numpy as np

    from diptych.document import Image

    arrays = [np.asarray(Image(pixels=f).to_uint8()) for f in frames]
    gap = np.full((arrays[0].shape[0], 2, 3), 255, np.uint8)
    row = [part for array in arrays for part in (array, gap)][:-1]
    return Image.from_uint8(np.concatenate(row, axis=1))
