"""Candidates to be judged, with exact labels: pictures, answers and stories with as many defects as were put in
(after UnifiedReward, arXiv 2503.05236, and UnifiedReward-Think, arXiv 2505.03318).

Every candidate has 0 to 3 defects, each in one of three dimensions; a dimension scores 3 minus its defects, and of two
candidates the one with fewer defects is better. Pairs never tie.

    draw     text   an attribute that the words state is another one in the picture
             look   blur or noise, one step stronger per defect
             form   an object is torn in two, or bitten into
    answer   first, next   this half of a double question is answered wrongly
             form          a word is said twice
    story    text   an attribute is wrong in all four pictures
             time   a picture in which something flickers
             form   an object of one picture is torn, or bitten into

The replies are those that the released judges give, in the words of the world: "image 1 is better"; scores per
dimension and what they come to, "text 3 ; look 2 ; form 3 ; final score : 3"; and, with thoughts, a line of scores per
dimension, the totals, and the verdict in its tags. Who taught the released judge to think erred in places but not in
the verdict: so do the scores of the thoughts here.

A judge must see before it compares: of a drawing alone, an inspection tells look, form and words.
"""
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diptych.document import Document, Image, Text
from diptych.world.degrade import blur
from diptych.world.language import NUMBERS, caption, caption_spec, draw_prompt
from diptych.world.render import box_of, render
from diptych.world.sample import Stream, Unsatisfiable, admissible, draw_radius, fits, pairs, sample_scene
from diptych.world.scene import BACKGROUNDS, PLACES, UNITS, Object, Scene, WorldConfig
from diptych.world.spec import Spec
from diptych.world.stories import sample_story
from diptych.world.talks import Turn, sample_talk

KINDS = ("draw", "answer", "story")  # what is judged
MODES = ("pair", "point", "think")  # a verdict, a score, a verdict behind thoughts
MOST = 3  # defects of a candidate
LOW, HIGH = 1, 1 + MOST  # of a score: HIGH minus the defects
DIMENSIONS = {"draw": ("text", "look", "form"), "answer": ("first", "next", "form"), "story": ("text", "time", "form")}
NAMES = {"draw": "image", "answer": "answer", "story": "video"}  # of candidates, in verdicts
BLUR, NOISE = (0.9, 1.7, 3.0), (20.0, 45.0, 90.0)  # sigma in pixels, deviation in 8-bit levels, by number of defects
SLIP = 0.1  # of a score in thoughts: how often it is one off
TRIES = 200

_THINK = "think , "
_GOOD, _BEST = "how good is the {} for : {{prompt}} ?", "which {} is better for : {{prompt}} ?"
_TWO = "{prompt} answer 1 : {first} . answer 2 : {second} . "
REQUESTS: dict[str, dict[str, str]] = {
    "draw": {"pair": _BEST.format("image"), "point": _GOOD.format("image"), "think": _THINK + _BEST.format("image")},
    "answer": {"pair": _TWO + "which answer is better ?", "point": "{prompt} answer : {answer} . how good is it ?",
               "think": _TWO + _THINK + "which answer is better ?"},
    "story": {"pair": _BEST.format("video"), "point": _GOOD.format("video"), "think": _THINK + _BEST.format("video")}}
INSPECTED, INSPECT = ("look", "form", "words"), "tell the {} of the image"
HELD_OUT = "please tell me : {}"  # around a request that training never words so

Defects = tuple[int, int, int]


class Candidate(NamedTuple):
    """Pictures of a drawing or a story, or the `text` of an answer."""

    pictures: tuple[np.ndarray, ...]
    text: str
    defects: Defects

    @property
    def scores(self) -> Defects:
        a, b, c = (MOST - d for d in self.defects)
        return a, b, c


class Case(NamedTuple):
    """`given`: what an answer is about. `scene`: what is described, or the first of a story."""

    scene: Scene
    prompt: str
    given: tuple[np.ndarray, ...]
    candidates: tuple[Candidate, ...]

    @property
    def better(self) -> int:
        """1 or 2, of a pair."""
        first, second = (sum(c.defects) for c in self.candidates)
        return 1 if first < second else 2


def sample_case(world: WorldConfig, rng: Stream, kind: str, *, count: int = 2, split: str = "train",
                template: str = "train") -> Case:
    """One candidate with any number of defects, or two with different numbers, the better one in either place."""
    if kind not in KINDS or count not in (1, 2):
        raise ValueError(f"expected a kind out of {', '.join(KINDS)} and 1 or 2 candidates, got {kind!r} and {count}")
    totals = rng.shuffled(range(MOST + 1))[:count]
    for _ in range(TRIES):
        try:
            case = _BUILD[kind](world, rng, totals, split, template)
        except Unsatisfiable:
            continue
        if case is not None:
            return case
    raise Unsatisfiable(f"expected a {kind} to judge in split {split}, got none in {TRIES} tries")


# -- words ------------------------------------------------------------------------------------------------------------

def request(case: Case, kind: str, mode: str, template: str = "train") -> str:
    words = [c.text for c in case.candidates]
    places = {"answer": words[0]} if len(words) == 1 else {"first": words[0], "second": words[1]}
    asked = REQUESTS[kind][mode].format(prompt=case.prompt, **places)
    return HELD_OUT.format(asked) if template == "held_out" else asked


def verdict(kind: str, better: int) -> str:
    return f"{NAMES[kind]} {better} is better"


def rating(kind: str, candidate: Candidate) -> str:
    """Scores by dimension, and what they come to."""
    scores = " ; ".join(f"{name} {score}" for name, score in zip(DIMENSIONS[kind], candidate.scores, strict=True))
    return f"{scores} ; final score : {HIGH - sum(candidate.defects)}"


def thoughts(case: Case, kind: str, rng: Stream) -> str:
    """Scores with slips, whose totals still speak for the verdict, which stands in its tags."""
    true = [c.scores for c in case.candidates]
    while True:
        told = [[_slipped(s, rng) for s in scores] for scores in true]
        first, second = map(sum, told)
        if first != second and (1 if first > second else 2) == case.better:
            break
    lines = [f"{name} {a} {b}" for name, a, b in zip(DIMENSIONS[kind], *told, strict=True)]
    totals = " ; ".join(f"{NAMES[kind]} {n} : {total}" for n, total in ((1, first), (2, second)))
    return (f"<think> {' ; '.join(lines)} ; total score : {totals} </think> "
            f"<answer> {verdict(kind, case.better)} </answer>")


def _slipped(score: int, rng: Stream) -> int:
    if not rng.chance(SLIP):
        return score
    return min(max(score + rng.choice((-1, 1)), 0), MOST)


def swapped(document: Document) -> Document:
    """A pair with its candidates in the other order, its target emptied: the other one is better then."""
    kind, better = document.task.partition("-")[0], document.meta.get("better")
    if kind not in KINDS or better not in (1, 2):
        raise ValueError(f"expected a pair to be judged, got a document of task {document.task!r}")
    images, (asked, reply) = document.of(Image), document.of(Text)
    if kind == "answer":
        first, second = document.meta["said"]
        here, there = (_TWO.format(prompt="", first=a, second=b) for a, b in ((first, second), (second, first)))
        asked = asked.replace(text=str(asked.text).replace(here, there))
    else:
        images = [*images[len(images) // 2:], *images[:len(images) // 2]]
    meta = {**document.meta, "better": 3 - better, "answer": verdict(kind, 3 - better),
            "scores": document.meta["scores"][::-1]}
    meta |= {"said": meta["said"][::-1]} if "said" in meta else {}
    return Document((*images, asked, reply.emptied()), document.task, meta)


# -- drawings ---------------------------------------------------------------------------------------------------------

def _draw(world: WorldConfig, rng: Stream, totals: Sequence[int], split: str, template: str) -> Case | None:
    scene = sample_scene(world, rng, split=split)
    prompt, spec = (caption(scene), caption_spec(scene)) if rng.chance(0.5) else draw_prompt(scene, rng, template)
    slots = stated(scene, spec, world)
    out = []
    for total in totals:
        defects = _share_out(rng, total, (len(slots), MOST, 2 * len(scene.objects)))
        shown = altered([scene], rng.shuffled(slots)[:defects[0]], world, rng, split) if defects else None
        if shown is None or defects is None:
            return None
        pixels = render(shown[0], world.pixels)
        for n, obj in _spots(shown, rng, defects[2]):
            pixels = (torn if n else bitten)(pixels, obj, shown[0])
        out.append(Candidate((degraded(pixels, defects[1], rng),), "", defects))
    return Case(scene, prompt, (), tuple(out))


class Inspection(NamedTuple):
    """A drawing that may be blurred, noisy, torn and bitten into; what is asked for, in any order, and said of it."""

    scene: Scene
    picture: np.ndarray
    defects: Defects
    asked: str
    said: str


def inspection(world: WorldConfig, rng: Stream, *, split: str = "train", template: str = "train") -> Inspection:
    scene = sample_scene(world, rng, split=split)
    look, form = rng.below(MOST + 1), rng.below(min(MOST, 2 * len(scene.objects)) + 1)
    pixels = render(scene, world.pixels)
    for n, obj in _spots([scene], rng, form):
        pixels = (torn if n else bitten)(pixels, obj, scene)
    said = {"look": f"look {MOST - look}", "form": f"form {MOST - form}", "words": caption(scene)}
    names = rng.shuffled(INSPECTED)[:1 + rng.below(len(INSPECTED))]
    asked = INSPECT.format(" and ".join(names))
    return Inspection(scene, degraded(pixels, look, rng), (0, look, form),
                      HELD_OUT.format(asked) if template == "held_out" else asked,
                      " ; ".join(said[name] for name in names))


Slot = tuple[int | None, str]  # object (None: the background), attribute


def stated(scene: Scene, spec: Spec, world: WorldConfig) -> list[Slot]:
    """What may be changed such that the words are wrong about it."""
    kinds = [(o.color, o.shape) for o in scene.objects]
    slots: list[Slot] = [(o.id, name) for o in scene.objects for name in ("color", "shape")]
    if len(world.sizes) > 1 and all(i.size for i in spec.items):
        # of two that only their size tells apart, both changed would be none
        slots += [(o.id, "size") for o in scene.objects if kinds.count((o.color, o.shape)) == 1]
    return slots + ([(None, "background")] if spec.background and len(world.backgrounds) > 1 else [])


def altered(scenes: Sequence[Scene], slots: Sequence[Slot], world: WorldConfig, rng: Stream,
            split: str) -> list[Scene] | None:
    """The scenes with new values at the slots, the same in all of them; None where the split or the room forbids it.
    New colours and shapes are such as no object has, so that no other object can stand in for a changed one."""
    changes: dict[int, dict[str, object]] = {}
    ground: str | None = None
    for target, name in slots:
        objects = [o for s in scenes for o in s.objects]
        if target is None:
            ground = rng.choice([b for b in world.backgrounds if all(b != s.background for s in scenes)] or ["none"])
            continue
        taken = {getattr(o, name) for o in objects if name != "size" or o.id == target}
        taken |= {c.get(name) for c in changes.values() if name != "size"}
        options = [v for v in {"color": world.colors, "shape": world.shapes, "size": world.sizes}[name]
                   if v not in taken]
        if not options:
            return None
        new = rng.choice(options)
        changes.setdefault(target, {})[name] = new
        if name == "size":
            changes[target]["radius"] = draw_radius(rng, new)
    if ground == "none":
        return None
    allowed = pairs(world, None, None, None if split == "pairs" else False)
    out = []
    for scene in scenes:
        objects = tuple(o.replace(**changes.get(o.id, {})) for o in scene.objects)
        new_scene = Scene(objects=objects, background=ground or scene.background, canvas=scene.canvas)
        held = all((o.color, o.shape) in allowed for o in objects) if split == "train" else True
        if not held or not fits(new_scene, world) or (split == "train" and not admissible(new_scene, world, split)):
            return None
        out.append(new_scene)
    return out


def _share_out(rng: Stream, total: int, room: Defects) -> Defects | None:
    """So many defects over the dimensions, at most `room` in each."""
    found = [0, 0, 0]
    for _ in range(total):
        open_ = [i for i in range(3) if found[i] < min(room[i], MOST)]
        if not open_:
            return None
        found[rng.choice(open_)] += 1
    return found[0], found[1], found[2]


def _spots(scenes: Sequence[Scene], rng: Stream, count: int) -> list[tuple[int, Object]]:
    """Different pairs of a way to spoil an object (0, 1) and the object."""
    return rng.shuffled([(way, o) for s in scenes for o in s.objects for way in (0, 1)])[:count]


def degraded(pixels: np.ndarray, steps: int, rng: Stream) -> np.ndarray:
    """Blurred or noisy by so many steps, in 8-bit levels again."""
    if not steps:
        return pixels
    if rng.chance(0.5):
        out = blur(pixels, BLUR[steps - 1])
    else:  # raw words, as in `Stream`: they are the same for every version of numpy
        words = np.random.Philox(key=int(rng.random() * 2**53)).random_raw(pixels.size) >> np.uint64(11)
        uniform = words.reshape(pixels.shape) * 2.0**-52 - 1
        out = pixels + uniform * (math.sqrt(3) * NOISE[steps - 1] / 127.5)
    levels = np.rint((np.clip(out, -1, 1) + 1) * 127.5)
    return levels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def torn(pixels: np.ndarray, obj: Object, scene: Scene) -> np.ndarray:
    """The lower half of an object moved sideways by a third of its width, towards the middle of the picture."""
    x0, y0, x1, y1 = _pixel_box(pixels, obj, scene)
    middle, shift = (y0 + y1) // 2, max((x1 - x0) // 3, 2) * (1 if obj.x * 2 < UNITS else -1)
    out = pixels.copy()
    half = pixels[:, middle:y1, x0:x1]
    out[:, middle:y1, x0:x1] = _ground(scene)
    left, right = max(x0 + shift, 0), min(x1 + shift, pixels.shape[2])
    out[:, middle:y1, left:right] = half[:, :, left - x0 - shift:right - x0 - shift]
    return out


def bitten(pixels: np.ndarray, obj: Object, scene: Scene) -> np.ndarray:
    """A disc of background over the right side of an object."""
    x0, y0, x1, y1 = _pixel_box(pixels, obj, scene)
    rows, columns = np.ogrid[:pixels.shape[1], :pixels.shape[2]]
    near = (rows + 0.5 - (y0 + y1) / 2) ** 2 + (columns + 0.5 - x1) ** 2 <= (0.5 * (x1 - x0)) ** 2
    inside = (columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1)
    return np.where(near & inside, _ground(scene), pixels).astype(np.float32)


def _pixel_box(pixels: np.ndarray, obj: Object, scene: Scene) -> tuple[int, int, int, int]:
    height, width = pixels.shape[1:]
    x0, y0, x1, y1 = box_of(obj, scene.canvas)
    return math.floor(x0 * width), math.floor(y0 * height), math.ceil(x1 * width), math.ceil(y1 * height)


def _ground(scene: Scene) -> np.ndarray:
    return (np.array(BACKGROUNDS[scene.background], np.float32) / np.float32(127.5) - 1)[:, None, None]


# -- answers ----------------------------------------------------------------------------------------------------------

def _answer(world: WorldConfig, rng: Stream, totals: Sequence[int], split: str, template: str) -> Case | None:
    scene, turns = sample_talk(world, rng, split=split, template=template, pointing=False)
    if len(turns) < 2:
        return None
    asked = turns[:2]
    out = []
    for total in totals:
        defects = _share_out(rng, total, (1, 1, 1))
        if defects is None:
            return None
        said = [_wrong(t, world, rng) if d else str(t.answer) for t, d in zip(asked, defects, strict=False)]
        if defects[2]:
            n = rng.below(2)
            said[n] = f"{said[n]} {said[n]}"
        out.append(Candidate((), " , ".join(said), defects))
    return Case(scene, " ".join(t.text for t in asked), (render(scene, world.pixels),), tuple(out))


def _wrong(turn: Turn, world: WorldConfig, rng: Stream) -> str:
    """Another answer of the same kind."""
    sets = (("yes", "no"), NUMBERS[:world.max_objects + 1], world.colors, world.shapes, world.sizes, PLACES)
    options = next(s for s in sets if turn.answer in s)
    return rng.choice([o for o in options if o != turn.answer])


# -- stories ----------------------------------------------------------------------------------------------------------

def _story(world: WorldConfig, rng: Stream, totals: Sequence[int], split: str, template: str) -> Case | None:
    story = sample_story(world, rng, split=split, template=template)
    scenes = story.scenes
    slots: list[Slot] = [(o.id, name) for o in scenes[0].objects for name in ("color", "shape")
                         if all(o.id in s.by_id and getattr(s.by_id[o.id], name) == getattr(o, name) for s in scenes)]
    if len(world.backgrounds) > 1 and all(s.background == scenes[0].background for s in scenes):
        slots.append((None, "background"))
    out = []
    for total in totals:
        # one that is wrong throughout cannot flicker as well
        defects = _share_out(rng, total, (max(len(slots) - 1, 0), len(scenes) - 1, MOST)) if slots else None
        if defects is None:
            return None
        chosen = rng.shuffled(slots)
        shown = altered(scenes, chosen[:defects[0]], world, rng, split)
        for k in rng.shuffled(range(1, len(scenes)))[:defects[1]] if shown else ():
            other = altered([shown[k]], [rng.choice(chosen[defects[0]:])], world, rng, split) if shown else None
            shown = [*shown[:k], *other, *shown[k + 1:]] if shown and other else None
        if shown is None:
            return None
        pictures = [render(s, world.pixels) for s in shown]
        spoilt = rng.shuffled([k for k, s in enumerate(shown) if s.objects])[:defects[2]]
        if len(spoilt) < defects[2]:
            return None
        for k in spoilt:
            [(way, obj)] = _spots([shown[k]], rng, 1)
            pictures[k] = (torn if way else bitten)(pictures[k], obj, shown[k])
        out.append(Candidate(tuple(pictures), "", defects))
    return Case(scenes[0], story.premise, (), tuple(out))


_BUILD: dict[str, Callable[[WorldConfig, Stream, Sequence[int], str, str], Case | None]] = {
    "draw": _draw, "answer": _answer, "story": _story}
