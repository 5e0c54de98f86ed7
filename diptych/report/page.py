"""Pieces of a report page as HTML. Whatever comes from outside goes through `text`, and only there."""
import base64
import html
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from diptych.benchmarks.suite import Outcome
from diptych.document import Image, encode_png
from diptych.ledger import Metric
from diptych.report.template import PAGE, STYLE

DERIVED = ("everything stated", "right at a guess")  # follow from other checks, which say more
WORDS = {"color": "colour", "edited": "the change", "preserved": "the rest", "plan read": "no plan to read",
         "plan right": "the plan", "plan kept": "not by the plan"}  # for checks whose names say too little
GOOD, BAD, UNSURE = "&#10003;", "&#10007;", "?"


class Section(NamedTuple):
    """`body` is HTML, the rest plain text."""

    key: str
    title: str
    note: str
    body: str


def page(title: str, lead: str, facts: Mapping[str, str], sections: Sequence[Section], foot: str, *,
         style: str = "", script: str = "") -> str:
    """The whole file. `foot` is HTML; `style` and `script` come on top of the look of every report."""
    links = "".join(f'<a href="#{text(s.key)}">{text(s.key.replace("-", " "))}</a>' for s in sections)
    body = "".join(f'<section id="{text(s.key)}"><h2>{text(s.title)}</h2>{_note(s.note)}{s.body}'
                   "</section>" for s in sections)
    items = "".join(f"<li>{text(name)} <b>{text(value)}</b></li>" for name, value in facts.items())
    code = f"<script>{script}</script>" if script else ""
    return Template(PAGE).substitute(title=text(title), lead=text(lead), facts=items, links=links, sections=body,
                                     foot=foot, style=STYLE + style, script=code)


def _note(words: str) -> str:
    return f'<p class="note">{text(words)}</p>' if words else ""


def write(path: Path, content: str) -> None:
    """The file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)


def text(content: object) -> str:
    return html.escape(str(content))


def prose(content: str) -> str:
    """What a model read or said, with punctuation as people write it."""
    return text(re.sub(r" ([,.?;:])", r"\1", content))


# -- pictures ---------------------------------------------------------------------------------------------------------

def picture(image: Image, alt: str, caption: str = "", marks: str = "") -> str:
    """`marks` are boxes from `boxes`, laid over the picture."""
    data = base64.b64encode(encode_png(image)).decode()
    height, width = image.size or (1, 1)
    shown = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{text(alt)}">'
    return _figure(shown + marks, caption)


def sheet(marks: str, caption: str = "") -> str:
    """An empty sheet with boxes."""
    return _figure(f'<span class="sheet frame">{marks}</span>', caption, framed=True)


def boxes(found: np.ndarray | None, kind: str = "mine", labels: Sequence[str] = ()) -> str:
    """Boxes xyxy in [0, 1] as outlines; `kind` is `mine` (what the model says) or `truth`."""
    rects = []
    for i, (x0, y0, x1, y1) in enumerate([] if found is None else np.clip(found, 0, 1).tolist()):
        label = f"<title>{text(labels[i])}</title>" if i < len(labels) else ""
        rects.append(f'<rect class="{kind}" x="{x0 * 100:.2f}" y="{y0 * 100:.2f}" width="{max(0, x1 - x0) * 100:.2f}" '
                     f'height="{max(0, y1 - y0) * 100:.2f}">{label}</rect>')
    return f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(rects)}</svg>'


def _figure(shown: str, caption: str, framed: bool = False) -> str:
    inner = shown if framed else f'<span class="frame">{shown}</span>'
    return f"<figure>{inner}{f'<figcaption>{text(caption)}</figcaption>' if caption else ''}</figure>"


# -- cards ------------------------------------------------------------------------------------------------------------

def cards(content: Iterable[str], least: str = "15rem") -> str:
    """A grid; `least` is the width that a card needs."""
    return f'<div class="cards" style="--least: {text(least)}">{"".join(content)}</div>'


def card(*content: str) -> str:
    return f'<article class="card">{"".join(content)}</article>'


def beside(figure: str, *content: str) -> str:
    """A picture with text to its right."""
    return card(f'<div class="beside">{figure}<div>{"".join(content)}</div></div>')


def pictures(*figures: str) -> str:
    """Side by side."""
    return f'<div class="pictures">{"".join(figures)}</div>'


ARROW = '<span class="arrow" aria-hidden="true">&#8594;</span>'


def asked(content: str) -> str:
    return f'<p class="asked">{prose(content)}</p>'


def answer(content: str) -> str:
    return f'<p class="answer">{prose(content) or "(nothing)"}</p>'


def questions(rows: Iterable[tuple[str, str, bool, str]]) -> str:
    """(question, answer, right, true answer) line by line."""
    lines = []
    for question, given, right, truth in rows:
        name, sign = ("good", GOOD) if right else ("bad", BAD)
        shown = text(given or "(nothing)") + ("" if right else f" <small>({text(truth)})</small>")
        lines.append(f'<div><span class="mark {name}">{sign}</span><dt>{prose(question)}</dt><dd>{shown}</dd></div>')
    return f'<dl class="qa">{"".join(lines)}</dl>'


def verdict(outcome: Outcome, why: str | None = None) -> str:
    """Right or wrong, with what is not right; `why` replaces that."""
    names = [name for name, value in outcome.checks.items() if not value and name not in DERIVED]
    failed = ", ".join(WORDS.get(name, name) for name in names)
    if why is not None:
        failed = "" if outcome.right else why
    if outcome.right:
        name, sign, words = "good", GOOD, f"right, except {failed}" if failed else "right"
    elif outcome.status == "abstained":
        name, sign, words = "unsure", UNSURE, "no clear shapes"
    elif outcome.status != "answered":
        name, sign, words = "bad", BAD, "no answer that can be read"
    else:
        name, sign, words = "bad", BAD, f"wrong: {failed}" if failed else "wrong"
    return mark(name, sign, words)


def mark(name: str, sign: str, words: str) -> str:
    return f'<p class="verdict {name}">{sign} {text(words)}</p>'


# -- figures ----------------------------------------------------------------------------------------------------------

def bar(metric: Metric) -> str:
    """A share on a line from 0 to 1: the interval as a band, the value as a tick."""
    low = metric.value if metric.low is None else metric.low
    high = metric.value if metric.high is None else metric.high
    return (f'<span class="bar"><i style="left: {low * 100:.1f}%; right: {(1 - high) * 100:.1f}%"></i>'
            f'<b style="left: {metric.value * 100:.1f}%"></b></span>')


def share(metric: Metric | None) -> str:
    """`96% 89 to 99`."""
    if metric is None:
        return "<small>not measured</small>"
    if metric.low is None or metric.high is None:
        return f"{metric.value:.0%}"
    return f"{metric.value:.0%} <small>{metric.low * 100:.0f} to {metric.high * 100:.0f}</small>"
