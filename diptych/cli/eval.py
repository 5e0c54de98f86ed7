"""Measure a model on exact suites: every figure with its number of items and its 95% interval."""
import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cli import common

if TYPE_CHECKING:
    from diptych.benchmarks.results import Results
    from diptych.systems.base import System

SUITES = "caption,question,refer,draw,edit"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=common.DEFAULT_MODEL, metavar="MODEL",
                        help="a bundled model, or the folder of a trained one (default: %(default)s)")
    parser.add_argument("--suites", type=names, default=names(SUITES), metavar="A,B",
                        help=f"what to measure; `all` for every suite with pictures (default: {SUITES})")
    parser.add_argument("--splits", type=names, default=("test",), metavar="A,B",
                        help="test, pairs (held-out combinations), counts (held-out numbers) (default: test)")
    parser.add_argument("--n", type=common.positive, default=500, metavar="N",
                        help="items per suite and split (default: %(default)s)")
    parser.add_argument("--wording", choices=("train", "held_out"), default="train",
                        help="held_out: ask in words that occur in no training document")
    parser.add_argument("--world", default="mini", help="where the items come from (default: %(default)s)")
    parser.add_argument("--controls", action="store_true", help="also measure answers that know nothing")
    parser.add_argument("--out", type=Path, metavar="JSON", help="all figures and every single verdict")
    parser.add_argument("--resume", type=Path, metavar="JSONL",
                        help="keep finished items in this file, and go on from it if it exists")
    parser.add_argument("--ledger", metavar="NAME", help="write the figures as an entry of the ledger")
    parser.add_argument("--replace", action="store_true", help="with --ledger: an existing entry is replaced")
    parser.add_argument("--recipe", metavar="RECIPE",
                        help="with --ledger: what the model was trained by (default: found beside the model)")
    parser.add_argument("--batch", type=common.positive, default=64, metavar="N", help="items asked together")
    common.add_sampling(parser)
    common.add_device(parser)
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same figures (default: 0)")


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def run(args: argparse.Namespace) -> int:
    from diptych.benchmarks.world import PICTURED, find_suites

    suites = find_suites(PICTURED if args.suites == ("all",) else args.suites)  # wrong names before the model is loaded
    recipe = find_own_recipe(args) if args.ledger else None
    system = common.load_model(args)
    from diptych.benchmarks.evaluate import evaluate

    def measure(filler: Any, chosen: Any, **more: Any) -> "Results":
        return evaluate(filler, chosen, n=args.n, seed=args.seed, batch=args.batch, splits=args.splits,
                        template=args.wording, world=args.world, **more)

    results = measure(system, suites, sampling=common.sampling_of(system, args), resume_file=args.resume)
    print(results.table())
    cost = results.cost
    print(f"\n{args.model}: {common.human(cost.documents or 0)} documents in {common.duration(cost.seconds or 0)}, "
          f"{common.human(cost.flops or 0, 'FLOP')}")
    if args.controls:
        from diptych.benchmarks.controls import Control

        for name in dict.fromkeys(c for suite in suites for c in suite.controls):
            print(f"\ncontrol: {name}")
            chosen = [s for s in suites if name in s.controls]
            print(measure(Control(name), chosen, progress=False).table(detail=False))
    if args.out is not None:
        results.write(args.out)
        print(f"\n{args.out}")
    if recipe is not None:
        print(f"\n{write(args, results, system, recipe)}")
    return 0


def find_own_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The resolved recipe of the model."""
    from diptych.config import to_dict
    from diptych.training.recipe import load_recipe

    folder = common.find_model(args.model)
    known = common.recipes()
    places = [folder / "recipe.yaml", folder.parent / "recipe.yaml"]
    places += [known[folder.name]] if folder.name in known else []
    found = common.find_recipe(args.recipe) if args.recipe else next((p for p in places if p.is_file()), None)
    if found is None:
        raise ValueError(f"expected the recipe of {args.model} beside it, got none; fix: name it with --recipe")
    return to_dict(load_recipe(found))


def write(args: argparse.Namespace, results: "Results", system: "System", recipe: dict[str, Any]) -> Path:
    from diptych.ledger import entry, write_entry
    from diptych.systems.table import TABLE

    own = type(system).__name__
    name = next((n for n, row in TABLE.items() if row.home.endswith(f":{own}")), own)
    made = results.entry(args.ledger, system=name, recipe=recipe)
    return write_entry(made, entry.ENTRIES, replace=args.replace)
