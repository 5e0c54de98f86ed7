"""Make a published checkpoint a model of ours; any tensor that finds no home is an error."""
import argparse

from diptych.cli import common

KINDS = ("missing", "unexpected", "reshaped")
DTYPES = ("stored", "float32", "bfloat16", "float16")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FOLDER|OWNER/NAME",
                        help="the checkpoint as published, downloaded or by its name on the hub")
    parser.add_argument("-o", "--out", required=True, metavar="FOLDER", help="a new folder for the model")
    parser.add_argument("--system", metavar="NAME", help="the family, where the files do not tell")
    parser.add_argument("--layout", metavar="NAME", help="its layout, where the files do not tell")
    parser.add_argument("--part", action="append", default=[], type=_part, metavar="NAME=FOLDER",
                        help="what is published apart, such as a tokenizer of pictures; the error says which")
    parser.add_argument("--allow", action="append", default=[], choices=KINDS,
                        help="tensors of ours that are missing, of theirs that are unexpected, or of another shape")
    parser.add_argument("--dtype", choices=DTYPES, default="stored", help="of the weights (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    import torch

    from diptych.adapters.convert import import_folder

    dtype = None if args.dtype == "stored" else getattr(torch, args.dtype)
    done = import_folder(args.source, args.out, system=args.system, layout=args.layout, parts=dict(args.part),
                         allow=args.allow, dtype=dtype)
    print(f"{args.out}: {done.system} ({done.layout} layout), {common.human(done.parameters)} parameters in "
          f"{done.tensors} tensors")
    if done.unused:
        some = ", ".join(done.unused[:3]) + (", ..." if len(done.unused) > 3 else "")
        print(f"kept for an export, not used: {len(done.unused)} tensors ({some})")
    if done.report:
        print(f"allowed: {done.report}")
    print(f'next: diptych draw --model {args.out} "..." -o picture.png')
    return 0


def _part(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not name or not equals or not folder:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, got {text!r}")
    return name, folder
