"""What a training or a generation will take, and what fits: counted, and measured on a short part of it."""
import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cli import common

if TYPE_CHECKING:
    from diptych.document import Document
    from diptych.systems.base import System
    from diptych.training.plan import Plan
    from diptych.training.recipe import Recipe

# What needs more than this share of the free memory is not built just to be measured.
MEMORY_SHARE = 0.5
GENERATIONS = {"draw": "draw", "edit": "edit", "caption": "caption", "ask": "question"}  # verb -> task of the world
OF_GENERATIONS = ("number", "words", "size", "steps", "guidance", "model", "dtype", "seed")
WORDS = 24  # tokens of an answer whose length nobody has said


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="RECIPE|" + "|".join(GENERATIONS),
                        help="a training: a YAML file or the name of a recipe (`diptych ls recipes`); or what --model "
                             "shall do")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to a recipe, such as size=paper")
    parser.add_argument("--no-measure", action="store_true", help="count only, run no step of a training")
    group = parser.add_argument_group("of a generation")
    group.add_argument("--number", type=common.positive, default=8, metavar="N",
                       help="documents at once, beside one alone (default: %(default)s)")
    group.add_argument("--words", type=common.positive, default=WORDS, metavar="N",
                       help="tokens of an answer (default: %(default)s)")
    group.add_argument("--size", type=common.picture_size, metavar="SIDE|WxH",
                       help="pixels of a drawing (default: the model's own)")
    common.add_sampling(parser)
    common.add_model(parser)


def run(args: argparse.Namespace) -> int:
    if args.what in GENERATIONS and not Path(args.what).is_file():
        if args.overrides:
            raise ValueError(f"expected nothing behind {args.what}, got {args.overrides[0]!r}; "
                             "fix: what a model does is changed by options (see --help)")
        return _generation(args)
    plain = argparse.ArgumentParser()
    add(plain)
    usual = plain.parse_args([args.what])
    idle = [name for name in OF_GENERATIONS if getattr(args, name) != getattr(usual, name)]
    if idle:
        raise ValueError(f"expected --{idle[0]} with {', '.join(GENERATIONS)}, got it with the recipe {args.what}; "
                         "fix: change a recipe by KEY=VALUE")
    return _training(args)


# -- a training -------------------------------------------------------------------------------------------------------

def _training(args: argparse.Namespace) -> int:
    path = common.find_recipe(args.what)
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
    print(_fits(made, recipe, free))
    if args.no_measure:
        return 0
    if not made.counted or needed > MEMORY_SHARE * free:
        print("time: not measured, because that is too much for this machine")
        return 0
    _rehearse(recipe, device)
    return 0


def _fits(made: "Plan", recipe: "Recipe", free: int) -> str:
    """How many documents a micro-batch can have, by what was counted for one."""
    fixed = sum(size for use, size in made.memory.items() if use != "activations")
    if fixed > free:
        return f"fits: no; weights, gradients and optimizer take {common.human(fixed - free, 'B')} more than is free"
    micro = max(s.batch for s in recipe.stages) / recipe.accumulate
    if not made.memory["activations"]:
        return "fits: weights, gradients and optimizer do; activations were not counted"
    most = int((free - fixed) / (made.memory["activations"] / micro))
    if most < 1:
        return "fits: no; one document at a time is too much already"
    return (f"fits: up to about {most} documents per micro-batch (this recipe: {micro:g})" if most >= micro else
            f"fits: not with {micro:g} documents per micro-batch, but with {most}; "
            f"fix: accumulate={-(-int(recipe.accumulate * micro) // most)}")


def parameter_rows(sizes: dict[str, int]) -> list[tuple[str, str, str]]:
    """Parameters by top-level module, largest first, and their sum."""
    totals: dict[str, int] = {}
    for name, size in sizes.items():
        top = name.partition(".")[0]
        totals[top] = totals.get(top, 0) + size
    whole = sum(totals.values())
    rows = [(name, f"{size:,}", f"{size / whole:.1%}") for name, size in sorted(totals.items(), key=lambda i: -i[1])]
    return [*rows, ("all", f"{whole:,}", "")]


def _rehearse(recipe: "Recipe", device: Any) -> None:
    import torch

    from diptych.training.rehearse import rehearse

    found = rehearse(recipe, str(device), threads=torch.get_num_threads())
    rows = [(t.stage, f"{t.seconds:.3f} s", f"{t.waiting:.3f} s", f"{t.batch / (t.seconds + t.waiting):.0f}",
             f"{t.tokens / (t.seconds + t.waiting):.0f}", common.human(t.flops, "FLOP"),
             common.human(t.flops / t.seconds, "FLOP/s"), common.duration(t.whole)) for t in found.timings]
    head = ("stage", "step", "waiting for data", "documents/s", "tokens/s", "per step", "speed", "time")
    print("\n" + common.table(rows, head))
    more = [f"{common.duration(found.start)} to start"]
    if found.samples:
        more.append(f"{found.samples} looks at samples of {common.duration(found.sample)}")
    more.append(f"{found.saves} checkpoints of {common.duration(found.save)}")
    print(f"\ntime: {common.duration(found.seconds)} on this machine, with {', '.join(more)}")
    where = "of the GPU" if device.type == "cuda" else "of the training process"
    print(f"memory: {common.human(found.memory, 'B')} {where} at its peak")


# -- a generation -----------------------------------------------------------------------------------------------------

def _generation(args: argparse.Namespace) -> int:
    folder = common.find_model(args.model)
    device = common.set_up_device(args)
    import dataclasses

    from diptych.engine.forecast import forecast, stored_size
    from diptych.training.memory import peak_memory

    free, (count, stored) = _free_memory(device), stored_size(folder)
    sizes = {"float32": 4 * count, "bfloat16": 2 * count, "int8": 3 * count, "stored": stored}
    if sizes[args.dtype] > free:
        fitting, needed = [name for name, size in sizes.items() if size < free], common.human(sizes[args.dtype], "B")
        print(f"fits: no; {common.human(count)} parameters in {args.dtype} take {needed}, "
              f"{common.human(free, 'B')} are free on {device}"
              + (f"; fix: --dtype {' or '.join(fitting)}" if fitting else ""))
        return 0
    system = common.load_model(args)
    sampling = common.sampling_of(system, args)
    if args.size is not None:
        sampling = dataclasses.replace(sampling, size=args.size)
    rows, memory = [], {}
    for number in sorted({1, max(2, args.number)}):
        found = forecast(system, [document(system, args.what, n) for n in range(number)], sampling, words=args.words,
                         seed=args.seed)
        memory[number] = peak_memory(device)
        rows.append((number, common.duration(found.seconds), f"{number / found.seconds:.3g}",
                     common.human(memory[number], "B")))
        kinds = found.kinds
    print(f"{args.model}: {args.what}, {args.dtype} on {device}\n")
    print(common.table([(name, count, common.duration(seconds)) for name, count, seconds in kinds],
                       ("work", "times", f"time for {number}")) + "\n")
    print(common.table(rows, ("at once", "time", "per second", "memory at the peak")))
    (one, low), (many, high) = memory.items()
    each = (high - low) / (many - one)
    print(f"\n{common.human(free, 'B')} free on {device}" + (
        f"; fits: about {int((free - low) / each) + 1} at once" if each * many > low / 100 else
        "; fits: more at once than were tried, they take next to nothing"))
    return 0


def document(system: "System", verb: str, index: int) -> "Document":
    """One for the model to fill, of the world's held-out part, its pictures as the model wants them."""
    from diptych.data.images import fit_to_model
    from diptych.document import Document, Image
    from diptych.world import tasks

    made = tasks.document(GENERATIONS[verb], index, split="test").prompt()
    pieces = [fit_to_model(p, system.config) if isinstance(p, Image) and not p.target else
              p.replace(size=None) if isinstance(p, Image) else p for p in made]
    return Document(tuple(pieces), made.task)


def _free_memory(device: Any) -> int:
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else common.free_memory()
