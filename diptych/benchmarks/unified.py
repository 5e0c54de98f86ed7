"""Unified-Bench (UAE, arXiv 2509.09666): a model describes a picture, and the same model draws it again from its words.

The figure of the paper is the mean cosine of both pictures, times 100, in four published encoders. Here the encoder is
the zoo's `clip`, which knows the world, so figures are not comparable with the paper's; beside it is what no encoder
can blur, whether the drawing shows the same scene. Nothing of the picture reaches the drawing but the words.
"""
from dataclasses import replace

import numpy as np

from diptych.document import Document, Image, Text
from diptych.world import tasks
from diptych.world.language import DRAW_REQUESTS


def read(index: int, split: str, template: str, world: str) -> Document:
    """A captioned picture, and the picture again: what is to be drawn after the caption."""
    document = tasks.document("caption", index, split=split, template=template, world=world)
    picture = document.of(Image)[0]
    again = replace(picture, role="assistant", target=True)
    return Document((*document.pieces, again), document.task, document.meta)


def prompt(document: Document) -> Document:
    """What is asked first: the caption."""
    return Document(document.pieces[:-1], document.task, document.meta).prompt()


def redraw(made: Document) -> Document:
    """A drawing after the words that were said of a picture, of the size of that picture; its `meta` names the task
    that they come from as `source`."""
    said = [p.text for p in made.targets if isinstance(p, Text) and p.text is not None]
    shown = [p for p in made.of(Image) if not p.target]
    if not said or not shown:
        raise ValueError(f"expected a described picture to draw again, got a document of task {made.task!r}; "
                         "fix: redraw follows captions")
    wish = DRAW_REQUESTS["train"][0].format(said[-1])
    pieces = (Text(text=wish), Image(size=shown[-1].size, role="assistant", target=True))
    kept = {k: made.meta[k] for k in ("split", "index", "world", "scene", "spec") if k in made.meta}
    return Document(pieces, "draw", {"task": "draw", "source": made.task, **kept})


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine x 100 of two pictures (3, h, w) in [-1, 1], in the vectors of the zoo's `clip`."""
    import torch

    from diptych.benchmarks.reconstruction import clip_features

    one, other = clip_features(torch.from_numpy(np.stack([a, b])))
    return 100 * float(torch.nn.functional.cosine_similarity(one, other, dim=0))
