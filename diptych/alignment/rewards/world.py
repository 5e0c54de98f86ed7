"""Rewards of the world: exact verdicts without a network, from the verifiers that suites use.

    exact           what the suite of the task calls right, 0 or 1
    scene           partial credit for a drawing, as Flow-GRPO grades GenEval (arXiv 2505.05470)
    colors          whether a drawing shows the colours that were asked for: right long before its shapes are
    answer          share of questions of a document that are answered exactly
    box             overlap of boxes with the true ones
    caption         recall of what is true of a scene, in any wording
    reconstruction  likeness of the scene in a picture to the scene it was made after (UAE, arXiv 2509.09666)
    words           length of what was said: a price, lower is better

`asked` needs the `meta` of the world's documents; emptied targets are rebuilt from it where the truth is needed.
"""
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np

from diptych.alignment.rewards.base import Facts, Failure, Rating, Reward
from diptych.benchmarks.world import ANSWERS, SUITES, colors_shown, drawn, find_suite, said
from diptych.document import Boxes, Document, Image, Text
from diptych.world import tasks
from diptych.world.assign import assign
from diptych.world.mentions import mentioned
from diptych.world.perceive import Percept, perceive
from diptych.world.render import box_of
from diptych.world.scene import Object, Scene, place
from diptych.world.spec import Item, Spec
from diptych.world.verify import verify_boxes, verify_percept

NEAR = 0.25  # of the side: objects that far apart or farther have nothing of their place in common
LONGEST = 1000  # words
GRADED = ("color", "size", "texture", "place")  # parts that count once the number of objects is right


class WorldReward(Reward):
    """Judges pair by pair; `judge` may raise `Untold`."""

    def judge(self, asked: Document, made: Document) -> Rating:
        raise TypeError("abstract")

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        out: list[Rating | Failure] = []
        for a, m in zip(asked, made, strict=True):
            try:
                out.append(self.judge(a, m))
            except Untold as reason:
                out.append(Failure(str(reason)))
        return out


class Untold(Exception):
    """The documents do not hold what this reward judges."""


def whole(asked: Document) -> Document:
    """With the content of its targets: that of the data, or rebuilt."""
    if not any(p.empty for p in asked.targets):
        return asked
    meta = _meta(asked, "task", "index", "split", "world")
    true = tasks.document(meta["task"], meta["index"], split=meta["split"], world=meta["world"])
    pieces = (t.replace(role=p.role) if p.target and p.empty else p for p, t in zip(asked, true, strict=True))
    return Document(tuple(pieces), asked.task, asked.meta)


def _meta(asked: Document, *names: str) -> dict[str, Any]:
    lacking = [n for n in names if n not in asked.meta]
    if lacking:
        raise ValueError(f"expected {', '.join(names)} in the meta of a document of the world, got none of "
                         f"{', '.join(lacking)}; fix: documents of diptych.world.tasks have them")
    return dict(asked.meta)


def _picture(made: Document) -> np.ndarray:
    if not made.of(Image):
        raise Untold("no picture to judge")
    return drawn(made)


class Exact(WorldReward):
    FACTS = Facts(name="exact", about="right as the suite of the task says, 0 or 1", low=0.0, high=1.0,
                  needs=("truth",), seconds=0.005)

    @property
    def measures(self) -> frozenset[str]:
        return frozenset({"exact", *(f"suite/{name}" for name in SUITES)})

    def judge(self, asked: Document, made: Document) -> Rating:
        outcome = find_suite(asked.task).score(whole(asked), made)
        parts = {name: float(held) for name, held in outcome.checks.items()}
        return Rating(float(outcome.right), parts | {outcome.status: 1.0})


class SceneScore(WorldReward):
    """For every kind of object that was asked for (a shape), 1 - |n - n*| / n*, not below 0, and if n = n* the shares
    of its objects with the stated colour, size, texture and place, which otherwise count as 0; relations once all
    numbers are right; the background, and the share of what is there that was asked for. The value is the mean.
    With `gated` False attributes count whatever the number is. A shape that nothing asks for is any object."""

    FACTS = Facts(name="scene", about="partial credit for a drawing: numbers, then attributes and places",
                  low=0.0, high=1.0, ties=False, needs=("truth",), seconds=0.004)

    def __init__(self, gated: bool = True) -> None:
        self.gated = gated

    def options(self) -> dict[str, Any]:
        return {"gated": self.gated}

    def judge(self, asked: Document, made: Document) -> Rating:
        meta = _meta(asked, "spec", "world")
        percept = perceive(_picture(made), meta["world"])
        credits = self.credits(percept, Spec.from_dict(meta["spec"]))
        parts = {n: sum(v) / len(v) for n, v in credits.items()}
        every = [v for values in credits.values() for v in values]
        return Rating(sum(every) / len(every), parts | {"abstained": float(not percept.certain)})

    def credits(self, percept: Percept, spec: Spec) -> dict[str, list[float]]:
        """Name of a part -> one number per kind of object, or one."""
        out: dict[str, list[float]] = {"count": []}
        for shape in dict.fromkeys(item.shape for item in spec.items):
            items = tuple(item for item in spec.items if item.shape == shape)
            wanted = sum(item.count for item in items)
            own = tuple(o for o in percept.objects if shape in (None, o.shape))
            out["count"].append(max(0.0, 1 - abs(len(own) - wanted) / wanted))
            verdict = verify_percept(replace(percept, objects=own, confidence=(1.0,) * len(own), unknown=()),
                                     Spec(items=items, closed=False))
            for name in GRADED:
                if name in verdict.scores:
                    counts = not self.gated or len(own) == wanted
                    out.setdefault(name, []).append(verdict.scores[name] if counts else 0.0)
        whole = verify_percept(percept, spec).scores
        numbers = all(v == 1 for v in out["count"])
        if "relation" in whole:
            out["relation"] = [whole["relation"] if numbers or not self.gated else 0.0]
        out |= {name: [whole[name]] for name in ("background", "extra") if name in whole}
        return out


class Colors(WorldReward):
    FACTS = Facts(name="colors", about="F1 of the colours that a drawing shows and those asked for", low=0.0, high=1.0,
                  needs=("truth",), seconds=0.001)

    def judge(self, asked: Document, made: Document) -> Rating:
        shown = colors_shown(_picture(made), Spec.from_dict(_meta(asked, "spec")["spec"]))
        if shown is None:
            raise Untold("no colour was asked for")
        return Rating(shown)


class Answer(WorldReward):
    """The last text of a `question` or `read`, or every turn of a `talk` or `quiz`, boxes among them (IoU above 0.5).
    Equal up to spaces at the ends, as the suite has it."""

    FACTS = Facts(name="answer", about="share of the questions of a document that are answered exactly", low=0.0,
                  high=1.0, needs=("truth",), seconds=0.00005)

    @property
    def measures(self) -> frozenset[str]:
        return frozenset({"answer", "suite/question", "suite/read"})

    def judge(self, asked: Document, made: Document) -> Rating:
        if "turns" not in asked.meta:
            text = said(made).strip()
            known = text in ANSWERS or text == _meta(asked, "answer")["answer"]
            return Rating(float(text == asked.meta["answer"]), {"parsed": float(known)})
        scene, right = Scene.from_dict(asked.meta["scene"]), []
        for turn, piece in zip(asked.meta["turns"], made.targets, strict=True):
            if isinstance(piece, Boxes):
                found = np.zeros((0, 4)) if piece.boxes is None else piece.boxes
                right.append(verify_boxes(found, _true_box(scene, turn["target"])).exact)
            else:
                right.append(isinstance(piece, Text) and (piece.text or "").strip() == turn["answer"])
        return Rating(sum(right) / len(right), {"turns": float(len(right))})


def _true_box(scene: Scene, target: int) -> np.ndarray:
    return np.array([box_of(scene.by_id[target], scene.canvas)])


class Box(WorldReward):
    """Sum of the overlaps at the best one-to-one assignment, divided by the larger of both numbers of boxes: one too
    many costs as much as one too few."""

    FACTS = Facts(name="box", about="IoU of the boxes with the true ones, extra boxes count as misses", low=0.0,
                  high=1.0, needs=("truth",), seconds=0.0001)

    def judge(self, asked: Document, made: Document) -> Rating:
        true, found = ([p for p in d.of(Boxes) if p.target] for d in (whole(asked), made))
        if not true:
            raise Untold("no boxes were asked for")
        values, hits = [], []
        for wanted, has in zip(true, found, strict=True):
            verdict = verify_boxes(has.boxes, wanted.boxes)
            most = max(len(has.boxes), len(wanted.boxes))
            values.append(sum(verdict.ious) / most if most else 1.0)
            hits.append(verdict.exact)
        return Rating(sum(values) / len(values), {"exact": sum(hits) / len(hits)})


class Caption(WorldReward):
    """Colour, shape, size and place of every object (texture where it is not solid) and the background are facts. Every
    object is given one of the mentioned ones, such that most facts agree. "recall": share of facts that agree;
    "precision": share of what was mentioned that agrees; "f1" of the two."""

    FACTS = Facts(name="caption", about="share of the facts of a scene that a text mentions", low=0.0, high=1.0,
                  ties=False, needs=("truth",), seconds=0.0001)
    PARTS: ClassVar[tuple[str, ...]] = ("color", "shape", "size", "texture", "place", "background")

    def __init__(self, measure: Literal["recall", "precision", "f1"] = "recall") -> None:
        if measure not in ("recall", "precision", "f1"):
            raise ValueError(f"expected measure recall, precision or f1, got {measure!r}")
        self.measure = measure

    def options(self) -> dict[str, Any]:
        return {"measure": self.measure}

    def judge(self, asked: Document, made: Document) -> Rating:
        scene, spec = Scene.from_dict(_meta(asked, "scene")["scene"]), mentioned(said(made))
        objects = [_facts_of(o, scene) for o in scene.objects]
        told = [_stated(item) for item in spec.items for _ in range(item.count)]
        alike = np.array([[sum(t.get(n) == v for n, v in o.items()) for t in told] for o in objects])
        chosen = assign(alike.reshape(len(objects), len(told)))
        hits = [name for o, j in zip(objects, chosen, strict=True) if j >= 0
                for name, value in o.items() if told[j].get(name) == value]
        hits += ["background"] * (spec.background == scene.background)
        facts = [*(name for o in objects for name in o), "background"]
        stated = sum(map(len, told)) + (spec.background is not None)
        parts = {n: hits.count(n) / facts.count(n) for n in self.PARTS if n in facts}
        recall, precision = len(hits) / len(facts), len(hits) / stated if stated else 0.0
        total = recall + precision
        parts |= {"recall": recall, "precision": precision, "f1": 2 * recall * precision / total if total else 0.0,
                  "mentioned": float(len(told))}
        return Rating(parts[self.measure], parts)


def _facts_of(o: Object, scene: Scene) -> dict[str, str]:
    texture = {} if o.texture == "solid" else {"texture": o.texture}
    return {"color": o.color, "shape": o.shape, "size": o.size, "place": str(place(o, scene.canvas)), **texture}


def _stated(item: Item) -> dict[str, str]:
    return {n: v for n in ("color", "shape", "size", "texture", "place") if (v := getattr(item, n)) is not None}


class Reconstruction(WorldReward):
    """2 * likeness of the best one-to-one pairs / (objects here + objects there), averaged with the background (weight
    one object). Likeness of a pair: mean of colour, shape, size, texture (equal or not) and closeness of the centres
    1 - d / 0.25, not below 0. The scene to be like is that of the meta, else what the asked picture shows."""

    FACTS = Facts(name="reconstruction", about="likeness of the scene drawn to the scene it was drawn after", low=0.0,
                  high=1.0, ties=False, needs=("truth",), seconds=0.004)

    def judge(self, asked: Document, made: Document) -> Rating:
        world = _meta(asked, "world")["world"]
        seen = perceive(_picture(made), world)
        if "scene" in asked.meta:
            scene = Scene.from_dict(asked.meta["after" if asked.task == "edit" else "scene"])
            wanted, ground = scene.objects, scene.background
        else:
            pictures = [p.pixels for p in asked.of(Image) if not p.empty]
            if not pictures:
                raise Untold("no scene and no picture to compare with")
            original = perceive(pictures[0], world)
            wanted, ground = original.objects, original.background
        value, parts = likeness(wanted, seen, ground)
        return Rating(value, parts | {"abstained": float(not seen.certain)})


def likeness(wanted: Sequence[Object], seen: Percept, ground: str | None) -> tuple[float, dict[str, float]]:
    """How alike a perceived scene is to these objects on this background, in [0, 1], and what the number is made of."""
    pairs = np.array([[_alike(w, f) for f in seen.objects] for w in wanted]).reshape(len(wanted), len(seen.objects))
    chosen = assign(pairs)
    found = sum(float(pairs[i, j]) for i, j in enumerate(chosen) if j >= 0)
    there = len(seen.objects) + len(seen.unknown)
    same = float(seen.background == ground)
    if wanted and not seen.objects:  # a bare canvas shows nothing of the scene, not even its background
        same = 0.0
    parts = {"objects": 2 * found / (len(wanted) + there) if wanted or there else 1.0, "background": same}
    return (2 * found + 2 * same) / (len(wanted) + there + 2), parts


def _alike(a: Object, b: Object) -> float:
    near = max(0.0, 1 - math.dist(a.center, b.center) / NEAR)
    return (sum(x == y for x, y in zip(a.attributes(), b.attributes(), strict=True)) + near) / 5


class Words(WorldReward):
    FACTS = Facts(name="words", about=f"number of words said, {LONGEST} at most", low=0.0, high=float(LONGEST), sign=-1,
                  seconds=0.00005)

    def judge(self, asked: Document, made: Document) -> Rating:
        count = sum(len((p.text or "").split()) for p in made.targets if isinstance(p, Text))
        return Rating(float(min(count, LONGEST)))
