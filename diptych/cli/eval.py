"""Measure a model on exact suites, or a picture tokenizer by what it loses: every figure with its number of items and
its 95% interval."""
import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cli import common
from diptych.parts.resources import bundled_models

if TYPE_CHECKING:
    from diptych.benchmarks.results import Results
    from diptych.systems.base import System

SUITES = "caption,question,refer,draw,edit"
RECONSTRUCT = "reconstruct"
TOKENIZERS = ("codec", "vq", "rq", "bits")  # of the zoo


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=common.DEFAULT_MODEL, metavar="MODEL",
                        help="a bundled model, the folder of a trained one, or a tokenizer of the zoo "
                        f"({', '.join(TOKENIZERS)}) "
                        "(default: %(default)s)")
    parser.add_argument("--suites", type=names, default=names(SUITES), metavar="A,B",
                        help=f"what to measure; `all` for every suite with pictures; `{RECONSTRUCT}` for pictures "
                        f"through the model's own tokenizer and back (default: {SUITES})")
    parser.add_argument("--splits", type=names, default=("test",), metavar="A,B",
                        help="test, pairs (held-out combinations), counts (held-out numbers) (default: test)")
    parser.add_argument("--n", type=common.positive, default=500, metavar="N",
                        help="items per suite and split (default: %(default)s)")
    parser.add_argument("--wording", choices=("train", "held_out"), default="train",
                        help="held_out: ask in words that occur in no training document")
    parser.add_argument("--world", default="mini", help="where the items come from (default: %(default)s)")
    parser.add_argument("--pictures", metavar="FOLDER", help=f"with {RECONSTRUCT}: captioned pictures of one size "
                        "instead of the world")
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
    common.add_dtype(parser)
    common.add_device(parser)
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same figures (default: 0)")


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def run(args: argparse.Namespace) -> int:
    if args.model in TOKENIZERS or args.suites == (RECONSTRUCT,):
        return run_reconstruct(args)
    if args.pictures is not None:
        raise ValueError(f"expected --pictures with --suites {RECONSTRUCT}, got {','.join(args.suites)}")
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


def run_reconstruct(args: argparse.Namespace) -> int:
    """Pictures through a tokenizer and back."""
    if args.resume is not None or args.controls or args.wording != "train":
        raise ValueError(f"expected no --resume, --controls or --wording with {RECONSTRUCT}, which asks nothing")
    recipe = find_own_recipe(args) if args.ledger and args.model not in TOKENIZERS else None
    device = common.set_up_device(args)
    from diptych import zoo
    from diptych.benchmarks import reconstruction
    from diptych.benchmarks.results import write_json
    from diptych.config import to_dict
    from diptych.ledger import Cost, Entry, entry, write_entry
    from diptych.ledger.report import format_metric
    from diptych.systems.table import name_of
    from diptych.world.sample import find_world

    if args.model in TOKENIZERS:
        file = zoo.path(args.model)
        tokenizer, system = zoo.load(args.model).to(device), f"zoo/{args.model}"
        recipe = json.loads(file.with_suffix(".json").read_text())
    else:
        model = common.load_model(args)
        tokenizer, system = reconstruction.tokenizer_of(model), name_of(type(model))
    start, metrics = time.perf_counter(), dict[str, Any]()
    splits = ("folder",) if args.pictures else args.splits
    for split in splits:
        images = (reconstruction.folder_pictures(args.pictures, args.n) if args.pictures else
                  reconstruction.world_pictures(find_world(args.world), args.n, split=split, seed=args.seed))
        found = reconstruction.measure(tokenizer, images, scenes=not args.pictures, batch=args.batch)
        for name, metric in found.items():
            metrics[f"{RECONSTRUCT}/{split}/{name}"] = metric
            print(f"{split:8} {name:20} {format_metric(metric)}  n={metric.n}")
    cost = Cost(seconds=time.perf_counter() - start, documents=args.n * len(splits))
    if args.out is not None:
        write_json(args.out, {"metrics": {k: to_dict(m) for k, m in metrics.items()}, "cost": to_dict(cost)})
    if args.ledger:
        asked = {"suites": RECONSTRUCT, "splits": list(splits), "n": args.n, "world": args.world,
                 "pictures": args.pictures}
        made = Entry(name=args.ledger, kind="quality", system=system, level="E1", seeds=(args.seed,), cost=cost,
                            recipe={"model": recipe, "evaluation": asked}, metrics=metrics)
        print(f"\n{write_entry(made, entry.ENTRIES, replace=args.replace)}")
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
    from diptych.systems.table import name_of

    made = results.entry(args.ledger, system=name_of(type(system)), recipe=recipe)
    path = write_entry(made, entry.ENTRIES, replace=args.replace)
    if args.ledger == args.model and args.model in bundled_models():
        from diptych.zoo.models import note_quality

        note_quality(common.find_model(args.model), made)
    return path
