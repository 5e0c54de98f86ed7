"""What pipelining rollout, judging and update is worth: `python perf/pipeline.py [--quick] [--real] [--out FOLDER]`.

Stages that only wait cost no processor, so their ratios hold on any machine. Two shapes of work:

    loop        an environment and a policy that wait for each other at every turn, as in RLinf (arXiv 2510.06710),
                which reports 1.61 to 1.88 of its pipelined mode over the disaggregated one
    iteration   rollout, judging and update of one iteration, as `diptych align` has it

A stage takes `fixed` of its time for a batch of any size, the rest shrinks with the batch. `--real` adds the bundled
model's own rollout, verifier and update on the cores of this machine; `--out` writes timelines there.
"""
import argparse
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diptych import config
from diptych.adapters.published import open_model
from diptych.alignment.aligner import Aligner
from diptych.alignment.recipe import Align
from diptych.alignment.workers import timeline
from diptych.alignment.workers.crew import Blueprint, Pending, Place
from diptych.alignment.workers.process import ProcessCrew
from diptych.alignment.workers.setup import Workers
from diptych.cli.common import find_model, find_recipe

PARTS = (1, 2, 4)


class Sleeper:
    """A stage of known length."""

    def work(self, seconds: float, *after: Any) -> None:
        time.sleep(seconds)


def part(whole: float, k: int, fixed: float) -> float:
    return whole * (fixed + (1 - fixed) / k)


def loop(crew: ProcessCrew, s: float, g: float, k: int, count: int) -> tuple[float, list[timeline.Span]]:
    """Seconds of `count` turns of an environment and a policy, in k parts that take them s and g."""
    crew.drain()
    start, back = time.time(), list[Pending | None]([None] * k)
    for _ in range(count):
        for p in range(k):
            seen = crew.send("environment", "work", s, *[b for b in (back[p],) if b is not None], tag=f"step {p + 1}")
            back[p] = crew.send("policy", "work", g, seen, tag=f"act {p + 1}")
    spans = crew.drain()
    return time.time() - start, spans


def iteration(crew: ProcessCrew, s: float, g: float, u: float, k: int, pipelined: bool
              ) -> tuple[float, float, list[timeline.Span]]:
    """Seconds of a rollout, judging and update, and what the formula expects."""
    crew.drain()
    start = time.time()
    played = [crew.send("environment", "work", s, tag=f"rollout {p + 1}") for p in range(k)]
    if not pipelined:
        crew.settle()
    for n, p in enumerate(played):
        crew.send("policy", "work", g, p, tag=f"judge {n + 1}")
    crew.settle()
    crew.send("environment", "work", u, tag="update")
    spans = crew.drain()
    took = time.time() - start
    wanted = [[timeline.Span(name, "", 0, t)] * n for name, t, n in (("a", s, k), ("b", g, k), ("c", u, 1))]
    return took, timeline.makespan(*wanted, pipelined=pipelined), spans


def simulated(seconds: float, count: int, out: Path | None) -> list[str]:
    lines = ["| work | fixed | S : G | k | predicted s | measured s | ratio predicted | ratio measured |",
             "|---|---|---|---|---|---|---|---|"]
    place = Place(threads=1)
    crew = ProcessCrew({"environment": [Blueprint(Sleeper, place=place)], "policy": [Blueprint(Sleeper, place=place)]})
    try:
        for fixed, scale in ((0.0, 1.0), (0.1, 1.0), (0.2, 1.0), (0.0, 0.5)):
            first = None
            for k in PARTS:
                s, g = part(seconds, k, fixed), part(scale * seconds, k, fixed)
                wanted = timeline.turns([s] * k, [g] * k, count)
                took, spans = loop(crew, s, g, k, count)
                first = first or (wanted, took)
                lines.append(row(f"loop, {count} turns", fixed, scale, str(k), wanted, took, first))
                if out is not None and not fixed and scale == 1:
                    timeline.draw(spans, out / f"loop-{k}.png", f"{count} turns in {k} parts")
        for fixed in (0.0, 0.2):
            first = None
            for k in PARTS:
                s, whole = part(10 * seconds, k, fixed), 10 * seconds
                took, wanted, spans = iteration(crew, s, s, whole / 5, k, pipelined=k > 1)
                first = first or (wanted, took)
                lines.append(row("iteration, U = S / 5", fixed, 1.0, str(k), wanted, took, first))
                if out is not None and not fixed:
                    timeline.draw(spans, out / f"iteration-{k}.png", f"rollout, judging, update in {k} parts")
    finally:
        crew.close()
    return lines


def row(work: str, fixed: float, scale: float, k: str, wanted: float, took: float, first: Sequence[float]) -> str:
    return (f"| {work} | {100 * fixed:.0f}% | 1 : {scale:g} | {k} | {wanted:.3f} | {took:.3f} | {first[0] / wanted:.2f}"
            f" | {first[1] / took:.2f} |")


def real(count: int, out: Path | None) -> list[str]:
    """Iterations of the bundled model, the first of each not counted: kernels are made and pages are touched then."""
    changes = [f"iterations={count + 1}", "prompts=4", "group=4", "updates=1", "save_every=1000", "grpo.spread=group",
               "sampling.evaluations=4", "threads=1"]
    recipe = config.load(Align, find_recipe("mini-draw", "align"), changes)
    beside = {"rollout": "0", "reward": "1", "learner": "0-1:0"}
    both = {"rollout": "0-1", "reward,learner": "0-1:0"}
    runs = {"serial": Workers(parts=2),
            "disaggregated": Workers(backend="process", schedule="disaggregated", placement=beside, parts=2),
            "pipelined": Workers(backend="process", schedule="pipelined", placement=beside, parts=2),
            "pipelined, streamed": Workers(backend="process", schedule="pipelined", placement=beside, parts=2,
                                           stream=True),
            "collocated, two rollouts": Workers(backend="process", placement=both, parts=2)}
    lines = ["| schedule | acting s | judging s | learning s | predicted s | measured s | the same weights |",
             "|---|---|---|---|---|---|---|"]
    expected: list[torch.Tensor] = []
    for name, workers in runs.items():
        told: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            model = open_model(find_model(recipe.model)).eval()
            system = Aligner(recipe, model, folder, workers=workers).run(told.append)
            if out is not None:
                (out / f"real-{name.replace(', ', '-').replace(' ', '-')}.png").write_bytes(
                    (Path(folder) / "timeline.png").read_bytes())
        found = [p.detach() for p in system.parameters()]
        expected = expected or found
        same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        keys = ("seconds acting", "seconds judging", "seconds learning", "makespan predicted", "makespan")
        means = [sum(line[k] for line in told[1:]) / count for k in keys]
        lines.append(f"| {name} | {' | '.join(f'{m:.2f}' for m in means)} | {'yes' if same else 'no'} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer turns and iterations")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("\n".join(simulated(0.04 if args.quick else 0.1, 6 if args.quick else 16, args.out)))
    if args.real:
        print()
        print("\n".join(real(1 if args.quick else 3, args.out)))


if __name__ == "__main__":
    main()
