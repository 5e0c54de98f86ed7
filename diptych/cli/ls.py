"""Lists: systems, zoo, recipes, ledger."""
import argparse

from diptych.cli import common

PARTS = ("systems", "zoo", "recipes", "ledger")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=PARTS, help="one list (default: all)")


def run(args: argparse.Namespace) -> int:
    lists = {"systems": systems, "zoo": zoo, "recipes": recipes, "ledger": ledger}
    for name in PARTS if args.what is None else [args.what]:
        print(f"{name}\n{'=' * len(name)}\n{lists[name]() or '(none)'}\n")
    return 0


def systems() -> str:
    from diptych.systems import table

    rows = [(name, row.paper, row.year, " ".join(row.levels), row.about) for name, row in table.TABLE.items()]
    return common.table(rows, ("name", "arXiv", "year", "evidence", "about"))


def zoo() -> str:
    from diptych.cli.zoo import rows

    return common.table(rows(), ("name", "size", "weights"))


def recipes() -> str:
    from diptych.config import read_yaml

    found = [(name, read_yaml(path)) for name, path in common.recipes().items()]
    rows = [(name, data.get("system", ""), data.get("size", ""), " ".join(str(data.get("about", "")).split())[:90])
            for name, data in found]
    return common.table(rows, ("name", "system", "size", "about")) if rows else ""


def ledger() -> str:
    from diptych.ledger import read_entries, render_table

    entries = read_entries()
    return render_table(entries).rstrip() if entries else ""
