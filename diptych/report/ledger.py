"""The page of the ledger: all systems side by side, their drawings of the same prompts, and the claims measured.

`page_of(folder)` makes it from the entries of a folder alone: `world-NAME` (what `diptych league` measured), `claim-*`
(what `diptych replicate` found) and the reference, a bundled model of another budget. The same entries give the same
page.
"""
import base64
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diptych.benchmarks.prompts import prompts
from diptych.document import Document, Image, Text
from diptych.ledger import ENTRIES, Entry, read_entries
from diptych.ledger.report import format_metric
from diptych.report import page
from diptych.report.ledger_table import Line, clock, filters, table
from diptych.report.ledger_template import SCRIPT, STYLE
from diptych.report.ledger_words import FOOT, LEAD, MEANING, WORDS
from diptych.report.page import Section, text
from diptych.report.plot import plot
from diptych.systems.table import TABLE, Row

REFERENCE = "mini"
MARKS = {"reproduced": ("good", page.GOOD), "not reproduced": ("bad", page.BAD), "inconclusive": ("unsure", "?")}
EFFECT = "effect: "


def page_of(folder: str | Path = ENTRIES) -> str:
    """The whole page as HTML, from the entries of a folder."""
    folder = Path(folder)
    entries = read_entries(folder)
    asked, rows = prompts(), lines(entries, folder)
    measured = [line for line in rows if line.entry is not None and not line.reference]
    claims = [e for e in entries if e.kind == "claim"]
    verdicts = [v for e in claims for v in e.verdicts.values()]
    shown = {e.name for e in (*claims, *(line.entry for line in rows if line.entry))}
    others = [e for e in entries if e.name not in shown]
    sections = [Section("prompts", "The same prompts, the same seeds", WORDS["prompts"], prompt_list(asked)),
                Section("systems", "All systems", WORDS["systems"], filters(rows) + table(rows))]
    if measured:
        sections.append(Section("cost", "What a drawing costs", WORDS["cost"], plot(points(rows))))
    sections += [Section("claims", "Claims of the papers", WORDS["claims"], claim_cards(claims)),
                 Section("meaning", "What the numbers mean", "", meaning(measured)),
                 Section("more", "Everything else in the ledger", "", other_entries(others))]
    facts = {"systems": str(len(TABLE)), "trained in the league": str(len(measured)),
             "claims measured": f"{len(verdicts)}, {verdicts.count('reproduced')} reproduced"}
    return page.page("The ledger", LEAD, facts, sections, FOOT, style=STYLE, script=SCRIPT)


# -- what is shown ----------------------------------------------------------------------------------------------------

def lines(entries: Sequence[Entry], folder: Path) -> list[Line]:
    """All systems of the table and the reference, the best drawings first, what was not measured last."""
    named = {e.name: e for e in entries}
    claims = {name: tuple(e for e in entries if e.kind == "claim" and e.system == name) for name in TABLE}
    found = [_line(name, row.title, row, named.get(f"world-{name}"), folder, claims=claims[name])
             for name, row in TABLE.items()]
    if REFERENCE in named:
        entry = named[REFERENCE]
        found.append(_line(REFERENCE, REFERENCE, TABLE[entry.system], entry, folder, reference=True))

    def order(line: Line) -> tuple[float, str]:
        metric = line.metric("draw/test")
        return (math.inf if metric is None else -metric.value, line.title.lower())

    return sorted(found, key=order)


def _line(key: str, title: str, row: Row, entry: Entry | None, folder: Path, **more: Any) -> Line:
    strip = b""
    if entry is not None and entry.pictures is not None:
        wanted = tuple(words_of(d) for d in prompts())
        if entry.pictures.prompts != wanted:
            raise ValueError(f"expected the drawings of {entry.name} to be of the shared prompts, got others; "
                             f"fix: diptych league {key} --ledger --replace")
        strip = (folder / entry.pictures.file).read_bytes()
    return Line(key=key, title=title, row=row, entry=entry, strip=strip, **more)


def words_of(document: Document) -> str:
    return str(document.of(Text)[0].text)


def points(rows: Iterable[Line]) -> list[dict[str, Any]]:
    """Of the plot: every row with drawings that were measured."""
    found = []
    for line in rows:
        cost, right = line.metric("draw/test/mean GFLOP"), line.metric("draw/test")
        if cost is not None and right is not None:
            found.append({"key": line.key, "title": line.title, "cost": cost.value, "right": right,
                          "reference": line.reference})
    return found


# -- prompts ----------------------------------------------------------------------------------------------------------

def prompt_list(asked: Sequence[Document]) -> str:
    items = []
    for document in asked:
        words = words_of(document)
        data = base64.b64encode(page.encode_png(document.of(Image)[-1])).decode()
        items.append(f'<li><img src="data:image/png;base64,{data}" width="64" height="64" alt="">'
                     f"<span>{page.prose(words)}</span></li>")
    return f'<ol class="tiles prompts">{"".join(items)}</ol>'


# -- claims, words, the rest ------------------------------------------------------------------------------------------

def claim_cards(claims: Sequence[Entry]) -> str:
    if not claims:
        return f'<p class="none">{WORDS["no claims"]}</p>'
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("claim", "effect, 95% interval", "verdict"))
    out = []
    for entry in claims:
        row, known = TABLE.get(entry.system), {}
        known = {k.removeprefix(EFFECT): m for k, m in entry.metrics.items() if k.startswith(EFFECT)}
        title = f'<a href="#system-{text(entry.system)}">{text(row.title)}</a>' if row else text(entry.system)
        rows = []
        for claim, verdict in entry.verdicts.items():
            kind, sign = MARKS.get(verdict, ("unsure", "?"))
            effect = format_metric(known[claim]) if claim in known else ""
            rows.append(f'<tr><td>{text(claim)}</td><td class="number">{text(effect)}</td>'
                        f'<td><span class="mark {kind}">{sign} {text(verdict)}</span></td></tr>')
        cost = entry.cost
        seeds = f"{len(entry.seeds)} seed{'s' if len(entry.seeds) != 1 else ''}"
        took = f", {cost.documents:,} documents" if cost.documents else ""
        took += f", {clock(cost.seconds)}" if cost.seconds else ""
        out.append(f'<article class="card claim" id="{text(entry.name)}"><div><h3>{title}</h3>'
                   f"<p>{text(' '.join(entry.note.split()))} ({seeds}{took})</p></div>"
                   f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
                   "</div></article>")
    return f'<div class="cards" style="--least: 26rem">{"".join(out)}</div>'


def meaning(measured: Sequence[Line]) -> str:
    budgets = sorted({line.entry.model.training.documents or 0 for line in measured
                      if line.entry is not None and line.entry.model is not None})
    items = sorted({line.entry.recipe["evaluation"]["n"] for line in measured if line.entry is not None})
    facts = {"documents": " or ".join(f"{b:,}" for b in budgets) or "so many",
             "items": " or ".join(map(str, items)) or "so many"}
    points = "".join(f"<li>{text(words.format(**facts))}</li>" for words in MEANING)
    return f'<ul class="words">{points}</ul>'


def other_entries(entries: Sequence[Entry]) -> str:
    rows = []
    for entry in entries:
        heads = [f"{text(k)} {text(format_metric(m))}" for k, m in entry.metrics.items() if k.count("/") <= 1]
        rows.append(f"<tr><td>{text(entry.name)}</td><td>{text(entry.kind)}</td><td>{text(entry.system)}</td>"
                    f"<td>{'<br>'.join(heads[:8])}</td><td>{entry.date}</td></tr>")
    if not rows:
        return '<p class="none">Nothing else.</p>'
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("entry", "kind", "system", "figures", "date"))
    return (f"<details><summary>{len(rows)} entries</summary><div class=\"scroll\"><table class=\"others\"><thead><tr>"
            f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>")
