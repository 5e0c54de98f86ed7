"""Change a picture as an instruction says."""
import argparse

from diptych.cli import common


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="a picture file")
    parser.add_argument("instruction", help='such as "make the square green"')
    parser.add_argument("-o", "--out", type=common.output_picture, required=True, metavar="PICTURE")
    common.add_sampling(parser)
    common.add_model(parser)


def run(args: argparse.Namespace) -> int:
    from diptych.data.images import write_image
    from diptych.document import Document, Image, Text

    system = common.load_model(args)
    image = common.read_picture(args.image, system)
    document = Document((image, Text(text=args.instruction), Image(role="assistant", target=True)), "edit")
    [made] = system.generate([document], common.sampling_of(system, args), seeds=args.seed)
    write_image(made.of(Image)[-1], args.out)
    return 0
