"""Compare a system with the published code's numbers in a folder of golden cases; exit code 1 past the tolerance."""
import argparse

from diptych.cli import common


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("system", help="a name of `diptych ls systems`")
    parser.add_argument("folder", help="the published code's weights, inputs and outputs")
    parser.add_argument("--threads", type=common.positive, metavar="N", help="compute threads (default: all cores)")


def run(args: argparse.Namespace) -> int:
    from diptych.adapters import parity

    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    cases = parity.run(args.system, args.folder)
    print(parity.table(cases))
    return 0 if all(case.passed for case in cases) else 1
