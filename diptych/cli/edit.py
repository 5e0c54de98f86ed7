"""Change a picture as an instruction says."""
import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diptych.cli import common

if TYPE_CHECKING:
    from diptych.document import Document, Image


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="a picture file")
    parser.add_argument("instruction", help='such as "make the square green"')
    parser.add_argument("-o", "--out", type=common.output_picture, required=True, metavar="PICTURE")
    common.add_sampling(parser)
    common.add_model(parser)


def run(args: argparse.Namespace) -> int:
    from diptych.data.images import write_image
    from diptych.document import Image

    system = common.load_model(args)
    image = common.read_picture(args.image, system)
    made = system.generate([editing([image], args.instruction)], common.sampling_of(system, args), seeds=args.seed)[0]
    write_image(made.of(Image)[-1], args.out)
    return 0


def editing(images: "Sequence[Image]", instruction: str, size: tuple[int, int] | None = None) -> "Document":
    """The document that asks for a changed picture."""
    from diptych.document import Document, Image, Text

    asked = Image(role="assistant", target=True, size=size)
    return Document((*images, Text(text=instruction), asked), "edit")
