"""Ask a question about a picture; answers are words, or boxes with --boxes."""
import argparse
import json
from typing import TYPE_CHECKING

from diptych.cli import common

if TYPE_CHECKING:
    from diptych.document import Boxes, Image


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="a picture file")
    parser.add_argument("question")
    parser.add_argument("--boxes", action="store_true", help='answer with boxes, as in: "where is the red star?"')
    parser.add_argument("-o", "--out", type=common.output_picture, metavar="PICTURE",
                        help="with --boxes: the picture with the boxes marked")
    common.add_model(parser)


def run(args: argparse.Namespace) -> int:
    if args.out is not None and not args.boxes:
        raise ValueError("expected -o together with --boxes, got -o alone")
    from diptych.document import Boxes, Document, Text

    system = common.load_model(args)
    image = common.read_picture(args.image, system)
    answer = Boxes(role="assistant", target=True) if args.boxes else Text(role="assistant", target=True)
    document = Document((image, Text(text=args.question), answer), "refer" if args.boxes else "question")
    [made] = system.generate([document], seeds=args.seed, emit=None if args.boxes else common.stream_text)
    if not args.boxes:
        print()
        return 0
    from diptych.cli.draw import layout_json
    from diptych.data.images import write_image

    found = made.of(Boxes)[-1]
    print(json.dumps(layout_json(found)))
    if args.out is not None:
        write_image(marked(image, found), args.out)
    return 0


def marked(image: "Image", boxes: "Boxes") -> "Image":
    """The picture with the outline of every box in magenta, on white so that it shows on any ground."""
    import numpy as np
    from PIL import Image as Pil
    from PIL import ImageDraw

    picture = Pil.fromarray(image.to_uint8())
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    for x0, y0, x1, y1 in boxes.boxes if boxes.boxes is not None else ():
        corners = [float(x0) * (width - 1), float(y0) * (height - 1), float(x1) * (width - 1), float(y1) * (height - 1)]
        line = max(1, round(max(width, height) / 200))
        draw.rectangle(corners, outline=(255, 255, 255), width=3 * line)
        draw.rectangle([corners[0] + line, corners[1] + line, corners[2] - line, corners[3] - line]
                       if corners[2] - corners[0] > 4 * line and corners[3] - corners[1] > 4 * line else corners,
                       outline=(217, 0, 217), width=line)
    return type(image).from_uint8(np.asarray(picture))
