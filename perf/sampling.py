"""Drawing with BAGEL and Harmon against the arithmetic of the machine: `python perf/sampling.py`.

Random weights in bfloat16 at the small sizes and at about a hundred million parameters, one picture and four. The limit
is the time that the counted products (linear layers and convolutions) would take at the speed of the best large product
of the same type in the same run.
"""
import argparse
import platform
import time
from dataclasses import replace
from typing import Any

import torch

from diptych.benchmarks.evaluate import counted
from diptych.document import Document, Image, Text
from diptych.systems.bagel import Bagel
from diptych.systems.base import System
from diptych.systems.harmon import Harmon

PROMPT = Document((Text(text="a large red ball to the left of a small blue box"), Image(target=True)))


def peak() -> float:
    """FLOP/s of a large product in bfloat16."""
    best = 0.0
    for side in (1024, 2048, 3072):
        a, b = (torch.ones(side, side, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(4):
            begun = time.perf_counter()
            a @ b
            best = max(best, 2 * side**3 / (time.perf_counter() - begun))
    return best


def systems() -> dict[str, Any]:
    bagel = Bagel.small()
    block = replace(bagel.block, width=640, heads=10, kv_heads=10, head_dim=64, hidden=1728)
    wide = replace(bagel, block=block, depth=9)
    return {"BAGEL, small": lambda: Bagel(bagel), "BAGEL, wide": lambda: Bagel(wide),
            "Harmon, small": lambda: Harmon(Harmon.small())}


def draw(model: System, count: int) -> float:
    begun = time.perf_counter()
    model.generate([PROMPT] * count, seeds=list(range(count)))
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 3), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limit = peak()
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}; a product runs at "
          f"{limit / 1e9:.0f} GFLOP/s\n")
    print("| system | parameters | pictures | GFLOP | seconds | times the limit |\n|---|---|---|---|---|---|")
    for name, build in systems().items():
        torch.manual_seed(0)
        model = build().bfloat16().eval()
        for count in (1, 4):
            draw(model, count)
            with counted(model) as flops:
                draw(model, count)
            best = min(draw(model, count) for _ in range(args.rounds))
            print(f"| {name} | {model.num_parameters() / 1e6:.0f}M | {count} | {flops[0] / 1e9:.1f} | {best:.2f} "
                  f"| {best * limit / flops[0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
