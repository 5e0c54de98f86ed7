"""Train every system on equally many documents, measure all on the same items, and let all draw the same prompts."""
import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.cli import common

if TYPE_CHECKING:
    from diptych.ledger import Entry
    from diptych.training.recipe import Recipe

REFERENCE = "mini"  # trained far longer and measured by `diptych eval`; here it only draws


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="systems that have a recipe of their name, and "
                        f"`{REFERENCE}`, the bundled model as a reference (default: all of them)")
    parser.add_argument("--documents", type=common.positive, metavar="N",
                        help="training documents of every system (default: 16000)")
    parser.add_argument("--batch", type=common.positive, metavar="N", help="documents per step (default: 32)")
    parser.add_argument("--n", type=common.positive, metavar="N", help="items per suite and split (default: 100)")
    parser.add_argument("--run", type=Path, default=Path("runs/league"), metavar="FOLDER",
                        help="where trainings and results go, one folder each; what is there is not done again "
                        "(default: %(default)s)")
    parser.add_argument("--ledger", action="store_true", help="also copy the entries world-NAME and their drawings "
                        "into the ledger")
    parser.add_argument("--replace", action="store_true", help="with --ledger: existing entries are replaced")
    common.add_device(parser)


def run(args: argparse.Namespace) -> int:
    names = args.names or [*own_recipes(), REFERENCE]
    if len(set(names)) < len(names):
        raise ValueError(f"expected different names, got {', '.join(names)}")
    recipes = {name: recipe_of(name) for name in names if name != REFERENCE}
    from diptych.replication import league

    league.check_ingredients(recipes)
    if args.ledger and not args.replace:
        check_new(recipes, args.run)
    documents = args.documents or league.BUDGET
    recipes = {name: league.scaled(recipe, documents, args.batch or league.BATCH) for name, recipe in recipes.items()}
    if len(names) > 1:
        return several(args, names)
    entry = reference(args) if names == [REFERENCE] else one(args, *recipes.items())
    print(summary([entry]))
    return 0


def own_recipes() -> list[str]:
    """Systems of the table with a recipe of their name."""
    from diptych.systems.table import TABLE

    return [name for name in TABLE if name in common.recipes()]


def recipe_of(name: str) -> "Recipe":
    from diptych.training.recipe import load_recipe

    if name not in own_recipes():
        raise common.unknown("a system with a recipe of its name", name, [*own_recipes(), REFERENCE])
    return load_recipe(common.recipes()[name])


def check_new(names: Iterable[str], run: Path) -> None:
    """Before hours of work rather than after. What this run itself has put into the ledger is fine."""
    from diptych.ledger import entry

    files = {name: f"world-{name}.json" for name in names}
    there = [Path(file).stem for name, file in files.items() if (entry.ENTRIES / file).exists()
             and not ((own := run / name / file).exists() and own.read_text() == (entry.ENTRIES / file).read_text())]
    if there:
        raise ValueError(f"expected new entries, got {', '.join(there)} in the ledger; fix: --replace")


def one(args: argparse.Namespace, item: "tuple[str, Recipe]") -> "Entry":
    from diptych.ledger import entry as ledger
    from diptych.replication import league

    name, recipe = item
    device = str(common.set_up_device(args))
    made = league.run(name, recipe, args.run / name, n=args.n or league.ITEMS, device=device)
    if args.ledger:
        print(league.publish(made, args.run / name, ledger.ENTRIES, replace=args.replace))
    return made


def reference(args: argparse.Namespace) -> "Entry":
    """The entry of the bundled model gets its facts and drawings; its scores stay as they are."""
    from diptych.ledger import entry as ledger
    from diptych.ledger import read_entry
    from diptych.replication import league
    from diptych.training.recipe import load_recipe
    from diptych.zoo.models import training_cost

    model, folder = common.find_model(REFERENCE), args.run / REFERENCE
    device = str(common.set_up_device(args))
    made = league.reference(read_entry(ledger.ENTRIES / f"{REFERENCE}.json"), model,
                            load_recipe(model / "recipe.yaml"), training_cost(model), folder, device=device)
    if args.ledger:
        print(league.publish(made, folder, ledger.ENTRIES, replace=True))
    return made


def several(args: argparse.Namespace, names: list[str]) -> int:
    """Each in a process of its own: what one leaves behind (compiled code, memory) must not slow the next down."""
    options = [f"--{key}={value}" for key in ("documents", "batch", "n", "run", "device", "threads")
               if (value := getattr(args, key)) is not None]
    options += [f"--{key}" for key in ("ledger", "replace") if getattr(args, key)]
    failed = []
    for number, name in enumerate(names, 1):
        print(f"{name} ({number} of {len(names)})", flush=True)
        if child([name, *options]):
            failed.append(name)
    if failed:
        raise ValueError(f"expected all systems to finish, got errors (above) from {', '.join(failed)}; fix: the same "
                         "command again does only what is missing")
    return 0


def child(options: list[str]) -> int:
    """The exit code of `diptych league OPTIONS`; an interruption waits until it has saved its work."""
    from diptych.training.progress import interruptible

    process = subprocess.Popen([sys.executable, "-m", "diptych", "league", *options])
    asked: list[bool] = []

    def stop() -> None:
        asked.append(True)
        process.terminate()

    with interruptible(stop):
        code = process.wait()
    if asked:
        raise KeyboardInterrupt
    return code


def summary(entries: "list[Entry]") -> str:
    """The headline of every suite on the test split."""
    from diptych.replication.league import SUITES

    def share(entry: "Entry", suite: str) -> str:
        metric = entry.metrics.get(f"{suite}/test")
        return "cannot" if metric is None else f"{metric.value:.1%}"

    rows = [(e.name, *(share(e, s) for s in SUITES), common.duration((e.model and e.model.training.seconds) or 0))
            for e in entries]
    return common.table(rows, ("entry", *SUITES, "training"))
