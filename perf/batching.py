"""Mixed requests to the engine, all at once against one after the other: `python perf/batching.py`.

Captions, questions, drawings and edits in turn, of the world; the same requests with the same seeds both ways, and the
answers must be the same. `--model` as for the command line.
"""
import argparse
import platform
import time
from dataclasses import replace

import numpy as np
import torch

from diptych.adapters.published import open_model
from diptych.cli.common import find_model
from diptych.document import Document, Image
from diptych.engine import Engine
from diptych.systems.base import System
from diptych.world import tasks

KINDS = ("caption", "draw", "question", "edit")


def serve(model: System, documents: list[Document], together: int) -> tuple[float, list[Document]]:
    """Seconds, and what was answered."""
    engine, begun = Engine(model, slots=together), time.perf_counter()
    requests = [engine.submit(d, seed=n) for n, d in enumerate(documents)]
    while engine.step():
        pass
    return time.perf_counter() - begun, [r.result() for r in requests]


def alike(one: Document, two: Document) -> bool:
    return all(np.allclose(a.pixels, b.pixels, atol=0.05) if isinstance(a, Image) and isinstance(b, Image)  # type: ignore
               else a == b for a, b in zip(one, two, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="mini")
    for name, default in (("requests", 64), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = open_model(find_model(args.model)).eval()
    documents = [tasks.document(KINDS[n % len(KINDS)], n, split="test").prompt() for n in range(args.requests)]
    documents = [replace(d, meta={}) for d in documents]
    serve(model, documents[:4], 4)
    alone, expected = serve(model, documents, 1)
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, {args.model}, {args.requests} "
          f"requests: {', '.join(KINDS)} in turn")
    print(f"one at a time: {args.requests / alone:.2f} per second")
    for together in (4, 16):
        took, made = serve(model, documents, together)
        same = sum(alike(a, b) for a, b in zip(made, expected, strict=True))
        print(f"{together} at once: {args.requests / took:.2f} per second, {alone / took:.2f}x; {same} of "
              f"{args.requests} answers the same")


if __name__ == "__main__":
    main()
