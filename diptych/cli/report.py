"""A self-contained HTML page: text, pictures as data, tables. Nothing is fetched when it is opened."""
import base64
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diptych.document import Image

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c1c1c;background:#fafaf8;
max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.8rem;margin-bottom:.2rem}h2{margin-top:2.5rem;border-top:1px solid #ddd;padding-top:1.2rem}
p.note{color:#555;max-width:46rem}.row{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
.card{background:#fff;border:1px solid #e2e2de;border-radius:6px;padding:.7rem}
.card .pictures{display:flex;gap:.4rem;align-items:center;flex-wrap:wrap}
.card p{margin:.35rem 0 0;max-width:22rem}img{image-rendering:pixelated;display:block;border:1px solid #ddd}
.good{color:#14702b}.bad{color:#b3261e}.quiet{color:#666;font-size:.9em}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;border-bottom:1px solid #e2e2de;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}pre{overflow-x:auto;font-size:.85rem}
"""


class Page:
    """Parts are HTML; everything that comes from outside goes through `text`."""

    def __init__(self, title: str, lead: str) -> None:
        self.title = title
        self.parts = [f"<h1>{text(title)}</h1><p class=note>{text(lead)}</p>"]

    def section(self, title: str, note: str = "") -> None:
        self.parts.append(f"<h2>{text(title)}</h2>" + (f"<p class=note>{text(note)}</p>" if note else ""))

    def row(self, cards: Iterable[str]) -> None:
        self.parts.append("<div class=row>" + "".join(cards) + "</div>")

    def table(self, rows: Sequence[Sequence[str]], head: Sequence[str]) -> None:
        top = "".join(f"<th>{text(c)}</th>" for c in head)
        body = "".join("<tr>" + "".join(_cell(c) for c in row) + "</tr>" for row in rows)
        self.parts.append(f"<table><tr>{top}</tr>{body}</table>")

    def pre(self, content: str) -> None:
        self.parts.append(f"<pre>{text(content)}</pre>")

    def write(self, path: Path) -> None:
        """The page appears complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        page = (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
                f"<title>{text(self.title)}</title><style>{STYLE}</style>{''.join(self.parts)}</html>\n")
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)


def text(content: object) -> str:
    return html.escape(str(content))


def card(pictures: Sequence[str], *lines: str) -> str:
    """Pictures side by side above lines; both are HTML."""
    return (f"<div class=card><div class=pictures>{''.join(pictures)}</div>"
            + "".join(f"<p>{line}</p>" for line in lines) + "</div>")


def picture(image: "Image", label: str, side: int = 128) -> str:
    """An image element `side` pixels high; `label` is what a screen reader says."""
    from diptych.document import encode_png

    data = base64.b64encode(encode_png(image)).decode()
    return f"<img src='data:image/png;base64,{data}' height={side} alt='{text(label)}' title='{text(label)}'>"


def verdict(right: bool | None, why: str = "") -> str:
    """Right, wrong, or not judged."""
    if right is None:
        return f"<span class=quiet>{text(why or 'not judged')}</span>"
    name, word = ("good", "right") if right else ("bad", "wrong")
    return f"<span class={name}>{word}{text(': ' + why) if why else ''}</span>"


def _cell(content: str) -> str:
    number = content[:1].isdigit() or content[:1] == "-"
    return f"<td{' class=number' if number else ''}>{text(content)}</td>"
