"""The bundled ingredients: what there is, how good it is, how to make it again."""
import argparse
from pathlib import Path

from diptych.cli import common


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    verbs.add_parser("list", help="names, sizes and whether the weights are here")
    card = verbs.add_parser("card", help="data, cost and measured quality of one ingredient")
    card.add_argument("name")
    build = verbs.add_parser("build", help="train an ingredient again")
    build.add_argument("name", help="an ingredient, or a bundled model such as mini")
    build.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="where to write (default: into the package)")
    build.add_argument("--steps", type=common.positive, help="training steps (default: the ingredient's recipe)")
    build.add_argument("--seed", type=int, default=0)
    build.add_argument("--fresh", action="store_true", help="do not continue an interrupted build")
    common.add_device(build)


def run(args: argparse.Namespace) -> int:
    return {"list": _list, "card": _card, "build": _build}[args.action](args)


def rows() -> list[tuple[str, str, str]]:
    """(name, size, where) of every ingredient."""
    from diptych import zoo

    found = []
    for name in zoo.names():
        try:
            path = zoo.path(name)
        except FileNotFoundError:
            found.append((name, "-", f"not built; fix: diptych zoo build {name}"))
        else:
            found.append((name, common.human(path.stat().st_size, "B"), str(path)))
    return found


def _list(args: argparse.Namespace) -> int:
    print(common.table(rows(), ("name", "size", "weights")))
    return 0


def _card(args: argparse.Namespace) -> int:
    from diptych import zoo

    print(zoo.path(args.name).with_suffix(".md").read_text(encoding="utf-8").rstrip())
    return 0


def _build(args: argparse.Namespace) -> int:
    device = common.set_up_device(args)
    from diptych.zoo import build, models

    if args.name in models.MODELS:
        folder = models.build(args.name, common.find_recipe(models.MODELS[args.name].removesuffix(".yaml")), args.out, device=str(device))
        print((folder / "card.md").read_text(encoding="utf-8").rstrip())
        print(f"\nwritten: {folder}")
        return 0
    path = build.build(args.name, args.out, args.steps, args.seed, resume=not args.fresh, device=str(device))
    print(path.with_suffix(".md").read_text(encoding="utf-8").rstrip())
    print(f"\nwritten: {path}")
    return 0
