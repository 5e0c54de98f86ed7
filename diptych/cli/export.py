"""Write a model in a published layout: an imported one comes back bit for bit."""
import argparse


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="NAME|FOLDER", help="an imported model, a trained one, or a published "
                                                              "checkpoint to be written in another layout")
    parser.add_argument("-o", "--out", required=True, metavar="FOLDER", help="where the published files go")
    parser.add_argument("--layout", metavar="NAME", help="such as huggingface (default: that of the import, or the "
                                                         "authors')")


def run(args: argparse.Namespace) -> int:
    from diptych.adapters.convert import export_folder
    from diptych.cli.common import find_model

    system, layout = export_folder(find_model(args.model), args.out, layout=args.layout)
    print(f"{args.out}: {system}, {layout} layout")
    return 0
