"""What a recipe will take: parameters, memory and time, measured on a few real steps where they fit."""
import argparse
from typing import TYPE_CHECKING, Any

from diptych.cli import common

if TYPE_CHECKING:
    from diptych.training.recipe import Recipe

# What needs more than this share of the free memory is not built just to be measured.
MEMORY_SHARE = 0.5


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe (`diptych ls recipes`)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes, such as size=paper")
    parser.add_argument("--no-measure", action="store_true", help="count only, run no step")
    common.add_device(parser)


def run(args: argparse.Namespace) -> int:
    path = common.find_recipe(args.recipe)
    device = common.set_up_device(args)
    from diptych.training.plan import plan
    from diptych.training.recipe import load_recipe

    recipe = load_recipe(path, args.overrides)
    print(f"{path}: {recipe.system} {recipe.size}, {recipe.steps} steps in {len(recipe.stages)} stage(s)")
    if recipe.about:
        print(" ".join(recipe.about.split()))
    made = plan(recipe, device, probe=not args.no_measure)
    print("\n" + common.table(parameter_rows(made.parameters), ("module", "parameters", "share")) + "\n")
    print(common.table([(s.name, s.steps, s.batch, stage.lr, common.human(s.trained))
                        for s, stage in zip(made.stages, recipe.stages, strict=True)],
                       ("stage", "steps", "batch", "lr", "trains")))
    uses = {use: size for use, size in made.memory.items() if size or use != "activations"}
    print("\n" + common.table([(use, common.human(size, "B")) for use, size in uses.items()], ("memory", "")))
    needed, free = sum(uses.values()), _free_memory(device)
    print(f"\nin all {common.human(needed, 'B')}, {common.human(free, 'B')} free on {device}"
          + ("" if "activations" in uses else "; activations come on top"))
    if made.flops is not None:
        print(f"{common.human(made.flops, 'FLOP')}{'' if made.counted else ' (an estimate)'}; a matrix product reaches "
              f"{common.human(made.peak, 'FLOP/s')} here")
    if args.no_measure:
        return 0
    if not made.counted or needed > MEMORY_SHARE * free:
        print("time: not measured, because that is too much for this machine")
        return 0
    _measure(recipe, device)
    return 0


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
    from diptych.training.plan import measure

    found = measure(recipe, device)
    rows = [(t.stage.name, f"{t.seconds:.3f} s", f"{t.waiting:.3f} s", f"{t.stage.batch / (t.seconds + t.waiting):.0f}",
             f"{t.tokens / (t.seconds + t.waiting):.0f}", common.human(t.flops, "FLOP"),
             common.human(t.flops / t.seconds, "FLOP/s"), common.duration(t.whole)) for t in found]
    head = ("stage", "step", "waiting for data", "documents/s", "tokens/s", "per step", "speed", "time")
    print("\n" + common.table(rows, head))
    print(f"\ntime: {common.duration(sum(t.whole for t in found))} on this machine; "
          f"peak memory {common.human(_peak_memory(device), 'B')}")


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
