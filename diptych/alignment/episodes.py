"""Episodes: what is asked first, and what is asked about the answer.

An episode is a chain of documents. The first comes from the data, each further one is made of the one before it, as the
model filled it, by a rule of `FOLLOW`:

    answer     a picture that was drawn -> a question about it, which the prompt decides     (UniRL, arXiv 2505.23380)
    redraw     a picture that was described -> a drawing after that description alone          (UAE, arXiv 2509.09666)
    redraw-unplaced  the same, where the drawing is not told the places that the description names: a control
    describe   a picture that was drawn -> its description

A rule sees only what a user would: nothing of a picture reaches a redrawing but its words.
"""
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diptych.alignment.rewards.questions import questions
from diptych.benchmarks import unified
from diptych.data.order import hash64
from diptych.document import Document, Image, Text
from diptych.world.language import CAPTION_REQUESTS
from diptych.world.sample import find_world
from diptych.world.scene import PLACES

PLACED = re.compile(f" at the ({'|'.join(sorted(PLACES, key=len, reverse=True))})")
Follow = Callable[[Document, int], Document]  # what was made, a number to choose by -> what is asked next


def _drawn(made: Document) -> Image:
    pictures = [p for p in made.of(Image) if p.target and p.pixels is not None]
    if not pictures:
        raise ValueError(f"expected a document with a drawing to follow it up, got one of task {made.task!r} without; "
                         "fix: answer and describe follow drawings, redraw follows captions")
    return replace(pictures[-1], role="user", target=False)


def _facts(made: Document, task: str, **more: Any) -> dict[str, Any]:
    kept = {k: made.meta[k] for k in ("split", "index", "world", "scene", "spec") if k in made.meta}
    return {"task": task, **kept, **more}


def answer(made: Document, number: int) -> Document:
    """A question that the claims of the prompt decide, about the picture that was drawn after it. As the published
    ones it wants more than yes or no where there is such a question: where something is, if the prompt says so, else
    its colour, or how many there are, where there may be several."""
    several = find_world(made.meta.get("world", "mini")).max_objects > 1
    found = questions(made)
    wide = [ask for ask in found if ask.kind == "color" or (ask.kind == "count" and several)]
    chosen = [ask for ask in found if ask.kind == "place"] or wide or found
    ask = chosen[number % len(chosen)]
    pieces = (_drawn(made), Text(text=ask.text), Text(text=ask.answer, role="assistant", target=True))
    return Document(pieces, "question", _facts(made, "question", family=ask.kind, answer=ask.answer))


def redraw(made: Document, number: int) -> Document:
    """A drawing after the words that were said of a picture: the second half of Unified-Bench."""
    return unified.redraw(made)


def redraw_unplaced(made: Document, number: int) -> Document:
    """As `redraw`, without "at the top left" and the like: what a description says of places is of no use."""
    drawing = unified.redraw(made)
    wish = PLACED.sub("", drawing.of(Text)[0].text or "")
    return replace(drawing, pieces=(Text(text=wish), *drawing.pieces[1:]))


def describe(made: Document, number: int) -> Document:
    """The description of a picture that was drawn."""
    asks = CAPTION_REQUESTS["train"]
    pieces = (_drawn(made), Text(text=asks[number % len(asks)]), Text(text=None, role="assistant", target=True))
    return Document(pieces, "caption", _facts(made, "caption"))


FOLLOW: dict[str, Follow] = {"answer": answer, "redraw": redraw, "redraw-unplaced": redraw_unplaced,
                             "describe": describe}


def follow_up(rule: str, made: Sequence[Document], groups: Tensor, seed: int) -> list[Document]:
    """The next document of several episodes; those of one group (n,) are asked the same."""
    numbers = [hash64(seed, int(g), 0) >> 1 for g in groups]
    return [FOLLOW[rule](document, number) for document, number in zip(made, numbers, strict=True)]


def to_go(values: Tensor) -> Tensor:
    """Rewards (links, n) -> what each link is credited with: its own and all that come after it. NaN where one of them
    is unknown."""
    return torch.flip(torch.cumsum(torch.flip(values, (0,)), 0), (0,))
