"""Describe pictures in words."""
import argparse

from diptych.cli import common

REQUEST = "describe the picture"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    common.add_model(parser)


def run(args: argparse.Namespace) -> int:
    from diptych.document import Document, Text

    system = common.load_model(args)
    documents = [Document((common.read_picture(path, system), Text(text=REQUEST), Text(role="assistant", target=True)),
                          "caption") for path in args.images]
    for path, made in zip(args.images, system.generate(documents, seeds=args.seed), strict=True):
        text = made.of(Text)[-1].text
        print(f"{path}: {text}" if len(args.images) > 1 else text)
    return 0
