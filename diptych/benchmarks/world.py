"""Suites on the world: the true scene is known, so every verdict is exact and no network takes part in it."""
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from diptych.benchmarks import stories, unified
from diptych.benchmarks.suite import Outcome, Suite
from diptych.document import Boxes, Document, Image, Text
from diptych.world import language, tasks
from diptych.world.assign import assign
from diptych.world.perceive import LABELS_ONLY, Percept, perceive
from diptych.world.sample import find_world
from diptych.world.scene import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, TEXTURES, UNITS, VERSION, Object, Scene
from diptych.world.spec import Item, Spec
from diptych.world.verify import (
    Verdict,
    iou,
    parse_label,
    verify,
    verify_edit,
    verify_layout,
    verify_percept,
)

SPLITS = ("test", "pairs", "counts")
ANSWERS = frozenset(("yes", "no", *language.NUMBERS, *COLORS, *SHAPES, *SIZES, *PLACES, *TEXTURES, *BACKGROUNDS,
                     *language.TEXTURE_WORDS.values()))
# what "right in count, shape, colour and place" asks of a verdict; sizes and backgrounds are in "everything stated"
DRAWN = ("count", "shape", "color", "place", "relation", "extra")
NAMES = {"extra": "nothing else"}  # names of the verifier's parts as figures
SHOWN = 24 / 64**2  # half of the smallest object of the mini world, more than the rim of one that is blurred
FEW = 3  # objects; drawings are reported up to so many


def read(task: str, index: int, split: str, template: str, world: str) -> Document:
    return tasks.document(task, index, split=split, template=template, world=world)


# -- text -------------------------------------------------------------------------------------------------------------

def score_caption(true: Document, made: Document) -> Outcome:
    """Every object with every attribute and its place, and the background; in any order."""
    scene, text = Scene.from_dict(true.meta["scene"]), said(made)
    wanted = language.caption_spec(scene)
    found = language.parse_caption(text)
    names = ["color", "shape", "size", "place"]
    if len(find_world(true.meta["world"]).textures) > 1:
        names.append("texture")
    items: Sequence[Item] = found.items if found else ()
    alike = np.array([[sum(getattr(w, n) == getattr(f, n) for n in names) for f in items] for w in wanted.items])
    chosen = assign(alike.reshape(len(wanted.items), len(items)))
    checks = {"count": len(items) == len(wanted.items)}
    for name in names:
        checks[name] = all(j >= 0 and getattr(w, name) == getattr(items[j], name)
                           for w, j in zip(wanted.items, chosen, strict=True))
    checks["background"] = found is not None and found.background == scene.background
    return Outcome(right=found is not None and language.same_claims(found, wanted), checks=checks,
                   status="unparsed" if found is None else "answered", groups=(objects(scene),), answer=text)


def score_question(true: Document, made: Document) -> Outcome:
    text = said(made).strip()
    right = text == true.meta["answer"]
    return Outcome(right=right, groups=(f"family={true.meta['family']}",), answer=text,
                   status="answered" if right or text in ANSWERS else "unparsed")


def score_refer(true: Document, made: Document) -> Outcome:
    """Exactly one box is asked for; of several, none counts."""
    [answer], [[box]] = made.of(Boxes), [p.boxes for p in true.of(Boxes)]
    found = np.zeros((0, 4)) if answer.boxes is None else answer.boxes
    overlap = float(iou(found.astype(np.float64), box[None].astype(np.float64))[0, 0]) if len(found) == 1 else 0.0
    return Outcome(right=overlap > 0.5, checks={"IoU > 0.75": overlap > 0.75}, numbers={"IoU": overlap},
                   status="answered" if len(found) else "unparsed", groups=(f"family={true.meta['family']}",),
                   answer="; ".join(" ".join(f"{v:.3f}" for v in b) for b in found))


# -- pictures ---------------------------------------------------------------------------------------------------------

def score_draw(true: Document, made: Document) -> Outcome:
    return _drawing(true, drawn(made))


def _drawing(true: Document, pixels: np.ndarray, **checks: bool) -> Outcome:
    scene, spec, world = Scene.from_dict(true.meta["scene"]), Spec.from_dict(true.meta["spec"]), true.meta["world"]
    verdict = verify(pixels, spec, world)
    right = not verdict.abstained and _as_drawn(verdict)
    # how much of what is not right the verifier just could not tell
    guess = _as_drawn(verify_percept(perceive(pixels, world, limits=LABELS_ONLY), spec)) if verdict.abstained else right
    parts = {NAMES.get(n, n): v == 1 for n, v in verdict.scores.items()}
    groups = [objects(scene), *_FEW] if len(scene.objects) <= FEW else [objects(scene)]
    colors = colors_shown(pixels, spec)
    return Outcome(right=right, status=_status(verdict.percept), groups=tuple(groups), answer=seen(verdict.percept),
                   numbers={} if colors is None else {"colors shown": colors},
                   checks={**checks, "everything stated": verdict.exact, "right at a guess": guess, **parts})


def colors_shown(pixels: np.ndarray, spec: Spec) -> float | None:
    """2 |asked & shown| / (|asked| + |shown|) over the colours that cover at least `SHOWN` of the pixels (3, h, w),
    every pixel counted for the nearest colour or background: what a drawing has right long before its shapes can be
    perceived. About 0.97 for true pictures, whose rims mix colours; None if no colour is asked for."""
    asked = {item.color for item in spec.items if item.color}
    palette = {**COLORS, **BACKGROUNDS}
    points = np.array(list(palette.values()), np.float32)[:, :, None]
    seen = (pixels.reshape(3, -1)[None] + 1) * 127.5
    counts = np.bincount(np.square(seen - points).sum(1).argmin(0), minlength=len(palette))
    least = SHOWN * seen.shape[2]
    shown = {name for name, count in zip(palette, counts, strict=True) if name in COLORS and count >= least}
    return 2 * len(asked & shown) / (len(asked) + len(shown)) if asked else None


def _as_drawn(verdict: Verdict) -> bool:
    return all(verdict.scores.get(n, 1.0) == 1 for n in DRAWN)


def score_edit(true: Document, made: Document) -> Outcome:
    verdict = verify_edit(true.of(Image)[0].pixels, drawn(made), Scene.from_dict(true.meta["scene"]),
                          Scene.from_dict(true.meta["after"]), true.meta["world"])
    numbers = {} if verdict.difference is None or not math.isfinite(verdict.difference) else {
        "largest difference elsewhere": verdict.difference}
    return Outcome(right=verdict.exact, status=_status(verdict.percept), numbers=numbers,
                   checks={NAMES.get(n, n): v == 1 for n, v in verdict.scores.items()},
                   groups=(f"kind={true.meta['edit']}",), answer=seen(verdict.percept))


def score_layout(true: Document, made: Document) -> Outcome:
    """Every box holds the object of its label, and there is nothing else, on the background that was asked for."""
    scene, [layout] = Scene.from_dict(true.meta["scene"]), true.of(Boxes)
    verdict = verify_layout(drawn(made), layout.boxes, layout.labels, true.meta["world"])
    percept = verdict.percept
    checks = {"boxes": all(v >= 0.5 for v in verdict.ious), "background": percept.background == scene.background,
              "nothing else": len(percept.objects) + len(percept.unknown) <= len(layout.boxes)}
    return Outcome(right=percept.certain and all(checks.values()), checks=checks, numbers={"IoU": verdict.mean_iou},
                   status=_status(percept), groups=(objects(scene),), answer=seen(percept))


def score_plan(true: Document, made: Document) -> Outcome:
    """The drawing counts; whether the plan itself is right, and whether the drawing keeps to it, are checks."""
    spec = Spec.from_dict(true.meta["spec"])
    [plan], pixels = made.of(Boxes), drawn(made)
    planned = planned_objects(plan)
    checks = {"plan read": planned is not None, "plan right": False, "plan kept": False}
    if planned is not None and plan.boxes is not None:
        imagined = Percept(objects=planned, confidence=(1.0,) * len(planned), background=spec.background)
        checks["plan right"] = verify_percept(imagined, spec).exact
        checks["plan kept"] = verify_layout(pixels, plan.boxes, plan.labels, true.meta["world"]).all_right
    return _drawing(true, pixels, **checks)


def planned_objects(plan: Boxes) -> tuple[Object, ...] | None:
    """The boxes as objects, or None where a box has no area or no full label ("large red circle")."""
    if plan.boxes is None or not len(plan.boxes) or len(plan.labels) != len(plan.boxes):
        return None
    found = []
    for number, (box, label) in enumerate(zip(plan.boxes.tolist(), plan.labels, strict=True)):
        try:
            item = parse_label(label)
        except ValueError:  # words of no label
            return None
        if item.color is None or item.shape is None or item.size is None or box[0] >= box[2] or box[1] >= box[3]:
            return None
        x, y = (round((low + high) / 2 * UNITS) for low, high in ((box[0], box[2]), (box[1], box[3])))
        found.append(Object(id=number, shape=item.shape, color=item.color, size=item.size, x=x, y=y,
                            radius=SIZES[item.size][0], texture=item.texture or "solid"))
    return tuple(found)


def score_story(true: Document, made: Document) -> Outcome:
    judged = stories.judge(true, made)
    checks = {f"picture {i + 1}": right for i, right in enumerate(judged.pictures)}
    checks["sentences"] = all(judged.sentences)
    return Outcome(right=all(judged.pictures), status=_status(*judged.percepts), checks=checks,
                   groups=(f"law={true.meta['family']}",), answer=" | ".join(p.text or "" for p in made.of(Text)[1:]))


def score_unified(true: Document, made: Document) -> Outcome:
    """What was drawn after the model's own description, against the picture that it described."""
    from diptych.alignment.rewards.world import Caption

    told = Caption().judge(true, made)
    facts = {f"{name} told": value for name, value in told.parts.items() if name in ("size", "place", "background")}
    [shown, again], words = made.of(Image), len(said(made).split())
    outcome = _drawing(true, again.pixels)
    return replace(outcome, answer=f"{said(made)} | {outcome.answer}", numbers={
        **outcome.numbers, "CLIP similarity": unified.similarity(shown.pixels, again.pixels), "words": float(words),
        "facts told": told.parts["recall"], **facts})


# -- reading answers --------------------------------------------------------------------------------------------------

def said(document: Document) -> str:
    return document.of(Text)[-1].text or ""


def drawn(document: Document) -> np.ndarray:
    return document.of(Image)[-1].pixels


def objects(scene: Scene) -> str:
    return f"objects={len(scene.objects)}"


def seen(percept: Percept) -> str:
    """What the verifier saw, for whoever reads the results."""
    found = [language.label(o) for o in percept.objects]
    found += [f"? {u.guess or 'thing'} ({u.reason})" for u in percept.unknown]
    return f"{', '.join(found) or 'nothing'} on {percept.background or 'unknown'}"


def _status(*percepts: Percept):
    return "answered" if all(p.certain for p in percepts) else "abstained"


def _suite(name: str, about: str, right: str, score, **more) -> Suite:
    return Suite(**{"name": name, "about": about, "right": right, "score": score, "read": partial(read, name),
                    "splits": SPLITS, "judge": f"world {VERSION}", **more})


_PICTURE = ("abstained",)
_FEW = (f"objects<={FEW}",)
SUITES: dict[str, Suite] = {s.name: s for s in (
    _suite("caption", "describe every object and the background", "all objects with all attributes and places",
           score_caption, controls=("other",), coverage="one canonical form of description"),
    _suite("question", "answer a question in one word", "the exact answer", score_question,
           controls=("majority", "other"), coverage="six families, answers balanced within each"),
    _suite("read", "answer a question about a description, without a picture", "the exact answer", score_question,
           controls=("majority", "other"), coverage="as question; descriptions in one canonical form"),
    _suite("refer", "give the box of the object that a phrase names", "IoU of the one box above 0.5", score_refer,
           controls=("middle", "other")),
    _suite("draw", "draw what words say", "right in count, shape, colour, place and relation, with nothing else",
           score_draw, statuses=_PICTURE, reported=_FEW, controls=("blank", "other")),
    _suite("edit", "change a picture as an instruction says", "the change made and the rest unchanged", score_edit,
           statuses=_PICTURE, controls=("copy",)),
    _suite("layout", "draw objects into given boxes", "every box holds its object, nothing else, right background",
           score_layout, statuses=_PICTURE, controls=("blank", "other")),
    _suite("plan", "first say the boxes, then draw", "the drawing right, as in draw", score_plan, protocol="chained",
           statuses=_PICTURE, reported=_FEW, controls=("blank", "other")),
    _suite("story", "four pictures and what happens between them", "all four pictures right", score_story,
           protocol="chained", statuses=_PICTURE, controls=("blank", "other")),
    _suite("unified", "describe a picture, then draw it again from these words alone (Unified-Bench)",
           "right in count, shape, colour and place, with nothing else", score_unified, protocol="chained",
           read=unified.read, prompt=unified.prompt, follow=unified.redraw, statuses=_PICTURE, reported=_FEW,
           controls=("blank", "other"), coverage="similarity in one encoder, the zoo's clip"),
)}

PICTURED = tuple(name for name in SUITES if name != "read")  # what a model that sees and draws is measured on


def find_suite(name: str) -> Suite:
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, 1, 0.5)
        hint = f"; fix: did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected a suite out of {', '.join(SUITES)}, got {name!r}{hint}")
    return SUITES[name]


def find_suites(names: Iterable[str | Suite]) -> list[Suite]:
    found = [n if isinstance(n, Suite) else find_suite(n) for n in names]
    if not found or len({s.name for s in found}) < len(found):
        raise ValueError(f"expected different suites, got {', '.join(s.name for s in found) or 'none'}")
    return found
