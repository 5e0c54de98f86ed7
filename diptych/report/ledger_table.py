"""The table of the ledger page: one row per system with its figures, below them its drawings and what it is."""
import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diptych.ledger import LEVELS, Entry, Metric
from diptych.report import page
from diptych.report.ledger_words import LEVEL_WORDS, WORDS
from diptych.report.page import text
from diptych.systems.table import FAMILIES, Row

SUITES = {"draw": "Draw", "edit": "Edit", "caption": "Caption", "question": "Question", "refer": "Refer"}
SPLITS = {"test": "test", "pairs": "held out"}
COLORS_SHOWN = "draw/test/mean colors shown"
# tasks of a recipe that teach what a suite asks
TEACHERS = {"question": ("question", "talk"), "refer": ("refer", "talk"), "draw": ("draw", "plan")}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table: a system, measured or not, with the claims about it. `strip`: its drawings as PNG."""

    key: str
    title: str
    row: Row
    entry: Entry | None = None
    strip: bytes = b""
    claims: tuple[Entry, ...] = ()
    reference: bool = False

    def metric(self, name: str) -> Metric | None:
        return None if self.entry is None else self.entry.metrics.get(name)


@dataclass(frozen=True, kw_only=True)
class Column:
    """Of the table: a heading with the keys to sort by. `first`: the order of the first click."""

    title: str
    keys: Mapping[str, str] = field(default_factory=dict)  # sort key -> words of its button
    first: str = "desc"


COLUMNS = (
    Column(title="System", keys={"name": "System"}, first="asc"), Column(title="Evidence", keys={"level": "Evidence"}),
    *(Column(title=title, keys={f"{suite}-test": title, f"{suite}-pairs": SPLITS["pairs"],
                                **({"colors": "colours"} if suite == "draw" else {})})
      for suite, title in SUITES.items()),
    Column(title="Parameters", keys={"parameters": "Parameters"}, first="asc"),
    Column(title="GFLOP per picture", keys={"picture": "GFLOP per picture"}, first="asc"),
    Column(title="GFLOP per answer", keys={"answer": "GFLOP per answer"}, first="asc"),
    Column(title="TFLOP to train", keys={"training": "TFLOP to train"}, first="asc"),
    Column(title="Time to train", keys={"seconds": "Time to train"}, first="asc"))


# -- what it sorts by ------------------------------------------------------------------------------------------------

def sort_values(line: Line) -> dict[str, str]:
    """What the script sorts and filters by; empty where there is nothing."""
    model = line.entry.model if line.entry else None
    training = model.training if model else None
    found: dict[str, object] = {"name": line.title, "of-family": "|".join(line.row.family),
                                "of-level": "|".join(levels(line))}
    found["level"] = sum(2**LEVELS.index(level) for level in levels(line))  # the highest decides, then the next
    for suite in SUITES:
        for split in SPLITS:
            found[f"{suite}-{split}"] = _value(line.metric(f"{suite}/{split}"))
    found["colors"] = _value(line.metric(COLORS_SHOWN))
    found["parameters"] = model.parameters if model else None
    found["picture"] = _value(line.metric("draw/test/mean GFLOP"))
    found["answer"] = _value(line.metric("question/test/mean GFLOP"))
    found["training"] = training.flops if training else None
    found["seconds"] = training.seconds if training else None
    return {key: "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
            for key, value in found.items()}


def _value(metric: Metric | None) -> float | None:
    return None if metric is None else metric.value


def levels(line: Line) -> list[str]:
    """Those of the table of systems, and E2 where a claim was measured."""
    found = {*line.row.levels, *(e.level for e in line.claims)} if not line.reference else {"E1"}
    return [level for level in LEVELS if level in found]


# -- the table -------------------------------------------------------------------------------------------------------

def filters(rows: Sequence[Line]) -> str:
    families = [f for f in FAMILIES if any(f in line.row.family for line in rows)]
    kinds = [level for level in LEVELS if any(level in levels(line) for line in rows)]
    groups = (("family", "Draws by", [(f, f) for f in families]),
              ("level", "Evidence", [(k, f"{k} {LEVEL_WORDS[k]}") for k in kinds]))
    out = []
    for key, title, values in groups:
        buttons = "".join(f'<button type="button" data-filter="{key}" data-value="{text(value)}" '
                          f'aria-pressed="{"false" if value else "true"}">{text(words)}</button>'
                          for value, words in [("", "all"), *values])
        out.append(f"<fieldset><legend>{title}</legend>{buttons}</fieldset>")
    return f'<div class="filters">{"".join(out)}<p class="count" id="count" role="status">{len(rows)} rows</p></div>'


def table(rows: Sequence[Line]) -> str:
    heads = []
    for column in COLUMNS:
        buttons = "".join(
            f'<button type="button" data-sort="{key}" data-first="{column.first}"'
            f'{_button_class(key, number)}{_button_label(column, words, number)}>{text(words)}</button>'
            for number, (key, words) in enumerate(column.keys.items()))
        on = "descending" if "draw-test" in column.keys else "none"
        heads.append(f'<th scope="col" role="columnheader" aria-sort="{on}">{buttons}</th>')
    return (f'<table class="league" id="league" role="table" data-sort="draw-test" data-dir="desc"><caption class='
            f'"hidden">{text(WORDS["caption"])}</caption><thead><tr role="row">{"".join(heads)}</tr></thead>'
            f'{"".join(body(line) for line in rows)}</table>')


def _button_class(key: str, number: int) -> str:
    names = ["minor"] * (number > 0) + ["on"] * (key == "draw-test")
    return f' class="{" ".join(names)}"' if names else ""


def _button_label(column: Column, words: str, number: int) -> str:
    shown = f"{words} pairs" if words in SPLITS.values() else words
    return f' aria-label="{text(column.title)}, {text(shown)}"' if number else ""


def body(line: Line) -> str:
    data = "".join(f' data-{key}="{text(value)}"' for key, value in sort_values(line).items())
    strip = ""
    if line.strip:
        strip = f' style="--strip: url(data:image/png;base64,{base64.b64encode(line.strip).decode()})"'
    where = f"arXiv <a href=\"https://arxiv.org/abs/{line.row.paper}\">{line.row.paper}</a>, {line.row.year}"
    about = f"the bundled {text(line.row.title)}, trained far longer" if line.reference else where
    cells = [f'<th scope="row" role="rowheader"><b>{text(line.title)}</b>'
             f'<small>{text(", then ".join(line.row.family))}<br>{about}</small></th>',
             f'<td class="evidence" role="cell">{evidence(line)}</td>']
    cells += [_cell(title, score(line, suite)) for suite, title in SUITES.items()]
    cells += [_cell(column.title, shown) for column, shown in zip(COLUMNS[-5:], costs(line), strict=True)]
    kind = ' class="reference"' if line.reference else ""
    return (f'<tbody id="system-{text(line.key)}"{kind}{data}{strip}><tr class="figures" role="row">{"".join(cells)}'
            f'</tr><tr class="more" role="row"><td role="cell" colspan="{len(COLUMNS)}"><div class="told">'
            f"{drawings(line)}<div>{told(line)}</div></div></td></tr></tbody>")


def _cell(label: str, shown: str) -> str:
    return f'<td class="number" role="cell" data-label="{text(label)}">{shown}</td>'


def evidence(line: Line) -> str:
    badges = "".join(f'<span class="badge" title="{text(LEVEL_WORDS[k])}">{k}</span>' for k in levels(line))
    out = f'<span class="levels">{badges}</span>'
    for entry in line.claims:
        verdicts = list(entry.verdicts.values())
        good = verdicts.count("reproduced")
        out += (f'<a class="claims-of" href="#{text(entry.name)}">{good} of {len(verdicts)} '
                f"claim{'s' if len(verdicts) > 1 else ''} reproduced</a>")
    return out


def score(line: Line, suite: str) -> str:
    if line.entry is None:
        return '<small><span aria-hidden="true">&#8211;</span><span class="hidden">no run</span></small>'
    refused = line.entry.model.unable.get(suite) if line.entry.model else None
    if refused is not None:
        return f'<small title="{text(refused)}">cannot</small>'
    out = []
    for split, words in SPLITS.items():
        metric = line.metric(f"{suite}/{split}")
        if metric is None:
            continue
        given = "" if taught(line.entry, suite) else ' title="the recipe trains none of it: it comes with the weights"'
        out.append(f'<span class="score"><b class="value{" untaught" if given else ""}"{given}>{metric.value:.0%}</b>'
                   f'<small><span class="hidden">{words}, 95% interval </span>{_range(metric)}</small>'
                   f"{page.bar(metric)}</span>")
    colors = line.metric(COLORS_SHOWN)
    if suite == "draw" and colors is not None:
        out.append(f'<small title="{text(WORDS["colors"])}">colours {colors.value:.0%}</small>')
    return "".join(out) or "<small>not measured</small>"


def _range(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return ""
    return f"{metric.low * 100:.0f} to {metric.high * 100:.0f}"


def tasks_of(entry: Entry) -> list[str]:
    """What the recipe trains, the tasks of all its stages."""
    recipe = entry.recipe["model"]
    own = [source["tasks"] for source in recipe["data"]]
    found = [name for stage in recipe["stages"] for tasks in ([stage["tasks"]] if stage["tasks"] else own)
             for name, weight in tasks.items() if weight]
    return list(dict.fromkeys(found))


def taught(entry: Entry, suite: str) -> bool:
    return any(task in tasks_of(entry) for task in TEACHERS.get(suite, (suite,)))


def costs(line: Line) -> list[str]:
    """The cells of the last five columns."""
    if line.entry is None:
        return [""] * 5
    model = line.entry.model
    out = []
    if model is None:
        out.append("")
    else:
        parts = [(model.trained, "trained"), (model.drawing, "to draw"), (model.answering, "to answer")]
        small = "".join(f"<small>{amount(n)} {words}</small>" for n, words in parts if n is not None)
        out.append(amount(model.parameters) + small)
    for suite in ("draw", "question"):
        metric = line.metric(f"{suite}/test/mean GFLOP")
        out.append("" if metric is None else f"{metric.value:.3g}")
    training = model.training if model else None
    out.append("" if training is None or training.flops is None else f"{training.flops / 1e12:,.0f}")
    out.append("" if training is None or training.seconds is None else clock(training.seconds))
    return out


def drawings(line: Line) -> str:
    if line.entry is None:
        return f'<p class="none">No run yet. <code>diptych league {text(line.key)} --ledger</code> makes one.</p>'
    pictures = line.entry.pictures
    if pictures is None:
        return '<p class="none">No drawings.</p>'
    tiles = []
    for number, (words, right) in enumerate(zip(pictures.prompts, pictures.right, strict=True)):
        kind, sign = ("good", page.GOOD) if right else ("bad", page.BAD)
        label = text(f"{words}: {'right' if right else 'not right'}")
        tiles.append(f'<li><span class="tile" role="img" aria-label="{label}" title="{label}" style="--i: {number}">'
                     f'<i class="{kind}" aria-hidden="true">{sign}</i></span></li>')
    return f'<ol class="tiles">{"".join(tiles)}</ol>'


def told(line: Line) -> str:
    row, out = line.row, []
    if row.coupling:
        out.append(f"<p><b>{text(_sentence(row.coupling))}</b> {text(_sentence(row.objective))}</p>")
    if line.entry is not None and line.entry.model is not None:
        model, stages = line.entry.model, line.entry.recipe["model"]["stages"]
        steps = sum(s["steps"] for s in stages)
        batches = " and ".join(str(b) for b in sorted({s["batch"] for s in stages}))
        out.append(f"<p>{model.training.documents or 0:,} documents, {steps:,} steps of {batches}: "
                   f"{text(', '.join(tasks_of(line.entry)))}. {text(origins(model.ingredients))}</p>")
        machine = line.entry.machine
        out.append(f"<p>{text(machine.where)}; torch {text(machine.torch)}; {line.entry.date}.</p>")
        out += [f"<p>Cannot do {text(suite)}: {text(why)}</p>" for suite, why in model.unable.items()]
    return "".join(out)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."


def origins(ingredients: Mapping[str, str]) -> str:
    """`Starts from zoo/codec, zoo/clip.`"""
    names = dict.fromkeys(source.partition("#")[0].removesuffix("/model") for source in ingredients.values())
    return f"Starts from {', '.join(names)}." if names else "Starts from nothing."


def amount(count: float) -> str:
    """7600000 -> `7.6M`."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{name}"
    return f"{count:.3g}"


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
