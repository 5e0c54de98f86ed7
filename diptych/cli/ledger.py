"""Read the ledger: list and show its entries, compare two of them, make the page of all systems."""
import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from diptych.cli import common

if TYPE_CHECKING:
    from diptych.ledger import Difference, Entry


def add(parser: argparse.ArgumentParser) -> None:
    from diptych.ledger.entry import ENTRIES, Kind

    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    listed = verbs.add_parser("list", help="one line per entry")
    listed.add_argument("--kind", choices=get_args(Kind), help="(default: all)")
    shown = verbs.add_parser("show", help="everything an entry says")
    shown.add_argument("name", metavar="NAME")
    shown.add_argument("--json", action="store_true", help="as it is stored, with the resolved recipe")
    compared = verbs.add_parser("compare", help="differences of two entries that were measured alike")
    compared.add_argument("names", nargs=2, metavar="NAME")
    compared.add_argument("--varying", action="append", default=[], metavar="KEY",
                          help="what the comparison is about, such as recipe.model.seed: it may differ, with all below "
                          "it; can be given several times")
    page = verbs.add_parser("page", help="all systems on one page: scores, costs, drawings, claims")
    page.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="an .html file")
    for sub in (listed, shown, compared, page):
        sub.add_argument("--entries", type=Path, default=ENTRIES, metavar="FOLDER",
                         help="the folder of the entries (default: those of Diptych)")


def run(args: argparse.Namespace) -> int:
    if not args.entries.is_dir():
        raise ValueError(f"expected the folder of a ledger, got {args.entries}")
    return {"list": run_list, "show": run_show, "compare": run_compare, "page": run_page}[args.what](args)


def run_list(args: argparse.Namespace) -> int:
    from diptych.ledger import read_entries

    found = [e for e in read_entries(args.entries) if args.kind in (None, e.kind)]
    rows = [(e.name, e.kind, e.system, e.level, e.date, headline(e)) for e in found]
    print(common.table(rows, ("entry", "kind", "system", "level", "date", "")) if rows else "(none)")
    return 0


def headline(entry: "Entry", most: int = 4) -> str:
    """Verdicts of a claim, else the first figures that no figure stands above (`draw/test`, not `draw/test/count`)."""
    if entry.verdicts:
        values = list(entry.verdicts.values())
        return ", ".join(f"{values.count(v)} {v}" for v in dict.fromkeys(values))
    heads = [k for k in entry.metrics if k.rpartition("/")[0] not in entry.metrics]
    told = []
    for key in heads[:most]:
        metric = entry.metrics[key]
        value = f"{metric.value:.1%}" if metric.unit == "share" else f"{metric.value:.4g} {metric.unit}"
        told.append(f"{key} {value}")
    return ", ".join(t.rstrip() for t in told) + (", ..." if len(heads) > most else "")


def find(name: str, folder: Path) -> "Entry":
    from diptych.ledger import read_entry

    path = folder / f"{name}.json"
    if not path.is_file():
        raise common.unknown("an entry of the ledger", name, [p.stem for p in sorted(folder.glob("*.json"))])
    return read_entry(path)


def run_show(args: argparse.Namespace) -> int:
    entry = find(args.name, args.entries)
    print(json.dumps(entry.to_dict(), indent=1, ensure_ascii=False) if args.json else describe(entry))
    return 0


def describe(entry: "Entry") -> str:
    from diptych.ledger.report import format_cost, format_metric

    machine = entry.machine
    facts = [("system", entry.system), ("kind", f"{entry.kind}, {entry.level}"), ("date", entry.date),
             ("code", entry.code), ("machine", f"{machine.where}, torch {machine.torch}, Python {machine.python}"),
             ("seeds", ", ".join(map(str, entry.seeds))), ("cost", format_cost(entry.cost))]
    if entry.model is not None:
        model = entry.model
        active = [(model.trained, "trained"), (model.drawing, "to draw"), (model.answering, "to answer")]
        facts.append(("parameters", ", ".join([common.human(model.parameters),
                                               *(f"{common.human(n)} {words}" for n, words in active if n)])))
        facts.append(("training", format_cost(model.training)))
        facts.append(("starts from", ", ".join(f"{k}: {v}" for k, v in model.ingredients.items()) or "nothing"))
        facts += [(f"no {task}", why) for task, why in model.unable.items()]
    if entry.pictures is not None:
        facts.append(("drawings", f"{entry.pictures.file}, {sum(entry.pictures.right)} of {len(entry.pictures.right)} "
                                  "right"))
    out = [entry.name, "=" * len(entry.name), common.table([f for f in facts if f[1]])]
    if entry.note:
        out += ["", " ".join(entry.note.split())]
    out += ["", common.table([(k, format_metric(m), m.n or "") for k, m in entry.metrics.items()],
                             ("figure", "value [95% interval]", "n"))]
    if entry.verdicts:
        out += ["", common.table(list(entry.verdicts.items()), ("claim", "verdict"))]
    return "\n".join(out)


def run_compare(args: argparse.Namespace) -> int:
    from diptych.ledger import compare

    a, b = (find(name, args.entries) for name in args.names)
    rows = [difference(d) for d in compare(a, b, varying=args.varying)]
    print(common.table(rows, ("figure", a.name, b.name, "difference [95% interval]", "")))
    return 0


def difference(found: "Difference") -> tuple[str, str, str, str, str]:
    from diptych.ledger.report import format_metric

    share = found.a.unit == "share"

    def told(value: float) -> str:
        return f"{value * 100:+.1f}" if share else f"{value:+.4g}"

    between = "" if found.low is None or found.high is None else f" [{told(found.low)}, {told(found.high)}]"
    return (found.metric, format_metric(found.a), format_metric(found.b), told(found.value) + between,
            "clear" if found.clear else "")


def run_page(args: argparse.Namespace) -> int:
    if args.out.is_dir() or args.out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"expected an .html file for -o, got {args.out}")
    from diptych.report.ledger import page_of
    from diptych.report.page import write

    write(args.out, page_of(args.entries))
    print(args.out)
    return 0
