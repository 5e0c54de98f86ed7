"""The bundled ingredients and models: what there is, how good it is, how to make it again."""
import argparse
from pathlib import Path

from diptych.cli import common
from diptych.parts.resources import bundled_models


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    verbs.add_parser("list", help="names, sizes and whether the weights are here")
    card = verbs.add_parser("card", help="data, cost and measured quality of one ingredient")
    card.add_argument("name")
    build = verbs.add_parser("build", help="train an ingredient or a bundled model again")
    build.add_argument("name", help="an ingredient, or a bundled model such as mini")
    build.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="where to write (default: into the package)")
    build.add_argument("--run", type=Path, metavar="FOLDER", help="models: where checkpoints go (default: runs/NAME)")
    build.add_argument("--steps", type=common.positive, help="ingredients: training steps (default: the recipe's)")
    build.add_argument("--seed", type=int, default=0, help="ingredients (default: %(default)s)")
    build.add_argument("--fresh", action="store_true", help="ingredients: do not continue an interrupted build")
    common.add_device(build)


def run(args: argparse.Namespace) -> int:
    return {"list": _list, "card": _card, "build": _build}[args.action](args)


def rows() -> list[tuple[str, str, str]]:
    """(name, size, where) of every ingredient and bundled model."""
    from diptych import zoo
    from diptych.zoo.models import MODELS

    found = []
    for name in zoo.names():
        try:
            path = zoo.path(name)
        except FileNotFoundError:
            found.append((name, "-", f"not built; fix: diptych zoo build {name}"))
        else:
            found.append((name, common.human(path.stat().st_size, "B"), str(path)))
    bundled = bundled_models()
    for name in dict.fromkeys([*MODELS, *bundled]):
        if name in bundled:
            size = sum(p.stat().st_size for p in bundled[name].iterdir())
            found.append((name, common.human(size, "B"), str(bundled[name])))
        else:
            found.append((name, "-", f"not built; fix: diptych zoo build {name}"))
    return found


def _list(args: argparse.Namespace) -> int:
    print(common.table(rows(), ("name", "size", "weights")))
    return 0


def _card(args: argparse.Namespace) -> int:
    from diptych import zoo

    bundled = bundled_models()
    path = bundled[args.name] / "card.md" if args.name in bundled else zoo.path(args.name).with_suffix(".md")
    print(path.read_text(encoding="utf-8").rstrip())
    return 0


def _build(args: argparse.Namespace) -> int:
    device = common.set_up_device(args)
    from diptych.zoo import build, models

    if args.name in models.MODELS:
        recipe = common.find_recipe(models.MODELS[args.name])
        path = models.build(args.name, recipe, args.out, args.run, device=str(device))
        card = path / "card.md"
    else:
        path = build.build(args.name, args.out, args.steps, args.seed, resume=not args.fresh, device=str(device))
        card = path.with_suffix(".md")
    print(card.read_text(encoding="utf-8").rstrip())
    print(f"\nwritten: {path}")
    return 0
