"""What a recipe will take: parameters, memory and time, measured on a few real steps where they fit."""
import argparse
import contextlib
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

from diptych.cli import common

if TYPE_CHECKING:
    from diptych.training.recipe import Recipe

TIMED_STEPS = 3
# Weights, gradients and moments beyond this share of the free memory are not built just to be measured.
MEMORY_SHARE = 0.5


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe (`diptych ls recipes`)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes, such as size=paper")
    parser.add_argument("--no-measure", action="store_true", help="count only, run no step")
    common.add_device(parser)


def run(args: argparse.Namespace) -> int:
    path = common.find_recipe(args.recipe)
    device = common.set_up_device(args)
    from diptych.training.recipe import load_recipe

    recipe = load_recipe(path, args.overrides)
    print(f"{path}: {recipe.system} {recipe.size}, {recipe.steps} steps in {len(recipe.stages)} stage(s)")
    if recipe.about:
        print(" ".join(recipe.about.split()))
    state = _count(recipe)
    free = _free_memory(device)
    print(f"\nmemory for weights, gradients, moments and averages: {common.human(state, 'B')} "
          f"({common.human(free, 'B')} free on {device}); activations come on top")
    if args.no_measure:
        return 0
    if state > MEMORY_SHARE * free:
        print("time: not measured, because that is too much for this machine")
        return 0
    _measure(recipe, device)
    return 0


def _count(recipe: "Recipe") -> int:
    """Print the parameters, by module and by stage; returns the bytes of the training state."""
    import torch

    from diptych.training.setup import system_config
    from diptych.training.stages import trained_names

    cls, config = system_config(recipe)
    with torch.device("meta"):
        system = cls(config)
    sizes = {name: p.numel() for name, p in system.named_parameters()}
    trained = [trained_names(system, stage) for stage in recipe.stages]
    print("\n" + common.table(parameter_rows(sizes), ("module", "parameters", "share")) + "\n")
    print(common.table([(s.name, s.steps, s.batch, s.lr, common.human(sum(sizes[n] for n in names)))
                        for s, names in zip(recipe.stages, trained, strict=True)],
                       ("stage", "steps", "batch", "lr", "trains")))
    ever = sum(sizes[n] for n in set().union(*trained))
    # float32: weights 4; per trained parameter gradient 4, two moments 8, average 4
    return 4 * sum(sizes.values()) + ever * (12 + 4 * (recipe.ema > 0))


def parameter_rows(sizes: dict[str, int]) -> list[tuple[str, str, str]]:
    """Parameters by top-level module, largest first, and their sum."""
    totals: dict[str, int] = {}
    for name, size in sizes.items():
        top = name.partition(".")[0]
        totals[top] = totals.get(top, 0) + size
    whole = sum(totals.values())
    rows = [(name, f"{size:,}", f"{size / whole:.1%}") for name, size in sorted(totals.items(), key=lambda i: -i[1])]
    return [*rows, ("all", f"{whole:,}", "")]


def _measure(recipe: "Recipe", device: Any) -> None:
    from diptych.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, folder, device=device)
        rows, total, flops = [], 0.0, 0.0
        for index, stage in enumerate(recipe.stages):
            trainer.place.step = sum(s.steps for s in recipe.stages[:index])
            trainer.place.data = 0
            trainer.enter(index)
            step, wait, tokens, count = _time_stage(trainer)
            total += stage.steps * (step + wait)
            flops += stage.steps * count
            rows.append((stage.name, f"{step:.3f} s", f"{wait:.3f} s", f"{stage.batch / (step + wait):.0f}",
                         f"{tokens / (step + wait):.0f}", common.human(count, "FLOP"),
                         common.human(count / step, "FLOP/s"), common.duration(stage.steps * (step + wait))))
    head = ("stage", "step", "waiting for data", "documents/s", "tokens/s", "per step", "speed", "time")
    print("\n" + common.table(rows, head))
    print(f"\ntime: {common.duration(total)} on this machine, {common.human(flops, 'FLOP')}; "
          f"peak memory {common.human(_peak_memory(device), 'B')}")


def _time_stage(trainer: Any) -> tuple[float, float, int, float]:
    """(seconds of a step, seconds it waits for its data, tokens of a step, FLOP of a step)."""
    from torch.utils.flop_counter import FlopCounterMode

    steps, waits, before = [], [], trainer.place.tokens
    with contextlib.closing(trainer.feed()) as feed, FlopCounterMode(display=False) as counter:
        start = time.perf_counter()
        trainer.step(next(feed))
        first = time.perf_counter() - start
    tokens = trainer.place.tokens - before
    # Counting is slow and a first step warms up: the timed steps come after it.
    with contextlib.closing(trainer.feed()) as feed:
        next(feed, None)
        for _ in range(TIMED_STEPS):
            start = time.perf_counter()
            packet = next(feed, None)
            if packet is None:  # a stage of very few steps
                break
            got = time.perf_counter()
            trainer.step(packet)
            _synchronize(trainer.device)
            waits.append(got - start)
            steps.append(time.perf_counter() - got)
    if not steps:
        return first, 0.0, tokens, float(counter.get_total_flops())
    return statistics.median(steps), statistics.median(waits), tokens, float(counter.get_total_flops())


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_memory(device: Any) -> int:
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else common.free_memory()


def _peak_memory(device: Any) -> int:
    import resource
    import sys

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
