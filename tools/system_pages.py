"""Write a page about every system of the table: docs/systems/NAME.md with its mask, docs/systems/README.md, and
docs/claims/README.md with the verdicts on all claims.

    python tools/system_pages.py [NAME ...]

What a page says of the mechanism is the docstring of the system's file, and of published checkpoints that of its
adapter; sizes are counted on the meta device; evidence comes from the table, the golden folders of the tests and the
ledger. Run it when one of these changes.
"""
import argparse
import ast
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diptych import replication  # noqa: E402
from diptych.ledger import Entry, read_entries  # noqa: E402
from diptych.ledger.report import format_metric  # noqa: E402
from diptych.replication.page import MARKS  # noqa: E402
from diptych.systems import table  # noqa: E402

PAGES = ROOT / "docs" / "systems"
SIZES = {"tiny": "tests", "small": "the world on a laptop", "paper": "as published"}
SIZE_ROW = re.compile(r"^\| `(tiny|small|paper)\(\)` \| .* \| ([\d,]+) \|$", re.MULTILINE)


def count(name: str) -> dict[str, str]:
    """Parameters by size; a name without a published size is left out."""
    import torch

    cls, out = table.find(name), {}
    for size in SIZES:
        with torch.device("meta"):
            out[size] = f"{cls(getattr(cls, size)()).num_parameters():,}"
    return out


def counted(page: str) -> dict[str, str]:
    """The counts of a page that is there."""
    return dict(SIZE_ROW.findall(page))


def page(name: str, counts: Mapping[str, str]) -> str:
    row, cls = table.TABLE[name], table.find(name)
    module = sys.modules[cls.__module__]
    home = cls.__module__.replace(".", "/") + ".py"
    text = [f"# {row.title}", "",
            f"arXiv [{row.paper}](https://arxiv.org/abs/{row.paper}), {row.year} - {row.about}.", "",
            f"`{home}`, class `{cls.__name__}`. Evidence: {', '.join(row.levels)} ([what that means](../README.md)).",
            "", "## How it works", "", markdown(inspect.getdoc(module) or ""), "",
            f"![Who attends to whom](../pictures/mask-{name}.png)", "",
            "Rows ask, columns answer; packed documents that caption, draw and edit. Blue text, green features, orange "
            "latents,", "light orange noised latents, violet codes.", "", "## Sizes", "",
            "| size | for | parameters |", "|---|---|---|",
            *(f"| `{size}()` | {SIZES[size]} | {counts[size]} |" for size in SIZES if size in counts), ""]
    text += ["## Use", "", "```"]
    text += [f"diptych train recipes/{path.name}" for path in sorted((ROOT / "recipes").glob("*.yaml"))
             if yaml.safe_load(path.read_text())["system"] == name]
    text.append(f"diptych show {name} --size paper")
    if (ROOT / "tests" / "goldens" / name).is_dir():
        text.append(f"diptych parity {name} tests/goldens/{name}")
    text += ["```", ""]
    adapter = ROOT / "diptych" / "adapters" / (cls.__module__.rpartition(".")[2] + ".py")
    if adapter.is_file():
        text += ["## Published checkpoints", "", markdown(ast.get_docstring(ast.parse(adapter.read_text())) or ""), ""]
    entries = [e for e in read_entries() if e.system == name]
    for entry in (e for e in entries if e.verdicts):
        study = entry.name.removeprefix("claim-")
        text += ["## Claims", "", *HEAD, *(f"| {' | '.join(row)} |" for row in verdicts(entry)), "",
                 f"Against controls at equal budget, {len(entry.seeds)} seeds: [how it was measured]"
                 f"(../claims/{study}.md), `diptych replicate {study}`.", ""]
    if any(not e.verdicts for e in entries):
        text += ["## Measured", ""]
        for entry in (e for e in entries if not e.verdicts):
            heads = [f"{key} {format_metric(metric)}" for key, metric in entry.metrics.items() if key.count("/") == 1]
            text.append(f"- `{entry.name}` ({entry.level}): {'; '.join(heads) or 'see the entry'}")
        text.append("")
    return "\n".join(text)


HEAD = ("| claim | effect (95% interval) | verdict |", "|---|---|---|")


def verdicts(entry: Entry) -> list[tuple[str, str, str]]:
    """Claim, effect and verdict of an entry that has claims."""
    return [(claim, format_metric(entry.metrics[f"effect: {claim}"]), MARKS[verdict])
            for claim, verdict in entry.verdicts.items()]


def title(entry: Entry) -> str:
    """Of the system that a study is about, or of the method."""
    row = table.TABLE.get(entry.system)
    return row.title if row else replication.find(entry.system).title.partition(":")[0]


def claims() -> str:
    """All claims of all studies, by system or method."""
    rows = []
    for entry in sorted((e for e in read_entries() if e.verdicts), key=lambda e: title(e).lower()):
        study = entry.name.removeprefix("claim-")
        rows += [f"| [{title(entry)}]({study}.md) | {' | '.join(row)} |" for row in verdicts(entry)]
    about = """# Claims

What papers claim, measured on the world at small scale: control and treatment with the same budget and the same seeds,
the rule fixed before the numbers were known ([how](../replication.md)). Whatever came out stands here.
"""
    return "\n".join([about, "| system " + HEAD[0], "|---" + HEAD[1], *rows, ""])


def markdown(docstring: str) -> str:
    """The docstring as it stands; what is indented becomes code in Markdown where an empty line stands before it."""
    out: list[str] = []
    for line in docstring.splitlines():
        indented = line.startswith("    ")
        if line and out and out[-1] and indented != out[-1].startswith("    ") and not out[-1].startswith("-"):
            out.append("")
        out.append(line)
    return "\n".join(out)


def index() -> str:
    rows = [f"| [{row.title}]({name}.md) | {row.year} | {', '.join(row.levels)} | {row.about} |"
            for name, row in sorted(table.TABLE.items(), key=lambda item: item[1].title.lower())]
    return "\n".join(["# Systems", "", "One page each, made from the docstring of its file by `tools/system_pages.py`.",
                      "", "| system | year | evidence | |", "|---|---|---|---|", *rows, ""])


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="(default: every system)")
    names = parser.parse_args().names or list(table.TABLE)
    from diptych.cli.show import mask_picture

    for name in names:
        write(PAGES / f"{name}.md", page(name, count(name)))
        picture = mask_picture(table.find(name)).convert("P", palette=1, colors=32)
        picture.save(ROOT / "docs" / "pictures" / f"mask-{name}.png", optimize=True)
        print(PAGES / f"{name}.md")
    write(PAGES / "README.md", index())
    write(ROOT / "docs" / "claims" / "README.md", claims())


if __name__ == "__main__":
    main()
