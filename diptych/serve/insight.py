"""What is inside a model, for people to look at: who attends to whom, and how much pictures and words agree by layer.

Both are made from documents of the world, once per model, and kept. The network runs in the engine's thread, a few
documents at a time, so that requests come in between.
"""
import asyncio
import base64
from itertools import groupby
from typing import Any

import numpy as np

from diptych.analysis.profile import Sides, curve, sides
from diptych.data.images import fit_to_model
from diptych.document import Document, Image, Text, encode_png
from diptych.parts.tokens import Modality, Mode
from diptych.serve.errors import ApiError, public
from diptych.serve.models import Served
from diptych.systems.batch import Batch
from diptych.world import tasks

TASKS = {"caption": "reads a picture and describes it", "draw": "draws from words", "edit": "changes a picture"}
SHOWN = 2  # which document of a task
COMPARED = ("caption", "draw")
DOCUMENTS, TOGETHER, NEIGHBOURS = 128, 16, 10
LONGEST = 1024  # tokens of a mask that is shown


class Insights:
    """What was found so far, by model."""

    def __init__(self) -> None:
        self.masks: dict[tuple[str, str], dict[str, Any]] = {}
        self.curves: dict[str, dict[str, Any]] = {}
        self.turns: dict[str, asyncio.Lock] = {}

    async def attention(self, served: Served, task: str) -> dict[str, Any]:
        """The mask of one document of a task, as the model's own sequence has it."""
        if task not in TASKS:
            raise ApiError(404, f"expected one of {', '.join(TASKS)}, got {task[:80]!r}", param="task")
        if (served.name, task) not in self.masks:
            self.masks[served.name, task] = await asyncio.to_thread(attention, served, task)
        return self.masks[served.name, task]

    async def alignment(self, served: Served) -> dict[str, Any]:
        """The curves of all tasks; whoever asks meanwhile waits for the same."""
        async with self.turns.setdefault(served.name, asyncio.Lock()):
            if served.name not in self.curves:
                found = [await _curve(served, task) for task in COMPARED]
                self.curves[served.name] = {
                    "object": "alignment", "model": served.name, "documents": DOCUMENTS, "neighbours": NEIGHBOURS,
                    "chance": NEIGHBOURS / (DOCUMENTS - 1), "curves": found}
            return self.curves[served.name]


def attention(served: Served, task: str) -> dict[str, Any]:
    """`tokens` are runs of one kind, `mask` the rows of queries over keys as bits, highest first, in base64."""
    document = _document(served, task, SHOWN)
    system = served.system
    batch = Batch.of([system.write(system.samples(document)[-1])], [[0]])
    tokens = batch.page.tokens
    count = int(tokens.valid()[0].sum())
    if count > LONGEST:
        raise ApiError(400, f"expected at most {LONGEST} tokens to show, got {count}")
    mask = system.mask.dense(tokens)[0, :count, :count].numpy()
    kinds = zip(*(vector[0, :count].tolist() for vector in (tokens.modality, tokens.mode, tokens.segment)), strict=True)
    runs = [{"kind": Modality(kind).name.lower(), "noised": mode == Mode.NOISE, "count": len(list(same))}
            for (kind, mode, _), same in groupby(kinds)]
    return {"object": "attention", "model": served.name, "task": task, "about": TASKS[task], "count": count,
            "tokens": runs, "pieces": [_piece(p) for p in document],
            "mask": base64.b64encode(np.packbits(mask.astype(bool)).tobytes()).decode()}


async def _curve(served: Served, task: str) -> dict[str, Any]:
    parts: list[Sides] = []
    try:
        for start in range(0, DOCUMENTS, TOGETHER):
            documents = [_document(served, task, i) for i in range(start, start + TOGETHER)]
            parts.append(await asyncio.wrap_future(served.engine.between(lambda d=documents: sides(served.system, d))))
    except Exception as error:
        known = public(error)
        if known is None:
            raise
        return {"task": task, "values": None, "error": known.detail}
    return {"task": task, "values": [round(v, 4) for v in curve(parts, NEIGHBOURS)], "error": None}


def _document(served: Served, task: str, index: int) -> Document:
    """A document of the world with its answer, its pictures as large as the model takes them."""
    found = tasks.document(task, index, split="test")
    if not served.system.draws and any(isinstance(p, Image) for p in found.targets):
        raise ApiError(400, f"expected a model that draws, got {served.name!r}, which only reads pictures")
    pieces = [fit_to_model(p, served.system.config) if isinstance(p, Image) else p for p in found]
    return Document(tuple(pieces), found.task, found.meta)


def _piece(piece: Any) -> dict[str, Any]:
    told = {"kind": piece.kind, "target": piece.target}
    if isinstance(piece, Image):
        return told | {"b64_json": base64.b64encode(encode_png(piece)).decode()}
    return told | {"text": piece.text} if isinstance(piece, Text) else told
