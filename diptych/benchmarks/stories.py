"""Are the four pictures of a story right? The first one must show what the premise says. Every later one must be the
picture before it, as the model drew it, with what the law demands and nothing else: a story that starts in another
place than the reference is as good. Laws are those of `world.stories`.
"""
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diptych.document import Document, Image, Text
from diptych.world.language import parse_caption
from diptych.world.perceive import Percept, perceive
from diptych.world.sample import find_world
from diptych.world.scene import PLACES, SIZES, UNITS, Object, Scene, WorldConfig, place
from diptych.world.spec import Item, Spec
from diptych.world.stories import CLOCKWISE, EVENTS, growth
from diptych.world.verify import parse_label, verify_edit, verify_percept

GROWN = 1.04  # least growth of the radius from picture to picture; the steps of the world are 1.13 and more


@dataclass(frozen=True, kw_only=True)
class StoryVerdict:
    """`sentences`: whether what is said before a picture is what the law demands of it."""

    pictures: tuple[bool, ...]
    sentences: tuple[bool, ...]
    percepts: tuple[Percept, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a law demands of the next picture. `target` is an id of the scene before, `word` the new value."""

    after: Scene
    target: int | None = None
    word: str = ""


def judge(true: Document, made: Document) -> StoryVerdict:
    world, law = find_world(true.meta["world"]), true.meta["family"]
    scenes = [Scene.from_dict(s) for s in true.meta["scenes"]]
    shown: list[np.ndarray] = [p.pixels for p in made.of(Image)]
    events = [p.text or "" for p in made.of(Text)[1:]]
    percepts = [perceive(p, world) for p in shown]
    pictures = [verify_percept(percepts[0], Spec.from_dict(true.meta["spec"])).exact]
    sentences = []
    for k in range(1, len(shown)):
        before = percepts[k - 1]
        said = parse_event(law, events[k - 1])
        step = None
        if before.certain and before.background is not None:
            now = before.scene().replace(objects=tuple(o.replace(id=i) for i, o in enumerate(before.objects)))
            step = next_step(law, k, now, scenes, world, said)
        sentences.append(step is not None and said is not None and agrees(said, now, step))
        pictures.append(step is not None and _right(law, shown[k - 1], shown[k], now, step, percepts[k], world))
    return StoryVerdict(pictures=tuple(pictures), sentences=tuple(sentences), percepts=tuple(percepts))


def _right(law: str, before: np.ndarray, after: np.ndarray, now: Scene, step: Step, percept: Percept,
           world: WorldConfig) -> bool:
    if not verify_edit(before, after, now, step.after, world).exact:
        return False
    if law not in ("grow", "shrink") or step.target is None:
        return True
    old, wanted = now.by_id[step.target], step.after.by_id[step.target]
    new = min((o for o in percept.objects if o.attributes() == wanted.attributes()),
              key=lambda o: math.dist(o.center, wanted.center))
    ratio = new.radius / old.radius
    return ratio >= GROWN if law == "grow" else ratio <= 1 / GROWN


def parse_event(law: str, text: str) -> tuple[str, str] | None:
    """(the object's phrase, the new value) of a sentence of this law; "" where it names none."""
    for template in EVENTS["train"][law] + EVENTS["held_out"][law]:
        pattern = re.escape(template).replace(r"\{the\}", "the (?P<the>.+)").replace(r"\{new\}", "(?P<new>.+)")
        if found := re.fullmatch(pattern, " ".join(text.split())):
            parts = found.groupdict()
            return parts.get("the") or "", parts.get("new") or ""
    return None


def agrees(said: tuple[str, str], now: Scene, step: Step) -> bool:
    """The sentence names the one object that changes, and its new value."""
    phrase, word = said
    if phrase or step.target is not None:
        try:
            item = parse_label(phrase)
        except ValueError:  # words that name no object
            return False
        if [o.id for o in now.objects if item.matches(o)] != [step.target]:
            return False
    return word == step.word


# -- laws -------------------------------------------------------------------------------------------------------------

def next_step(law: str, k: int, now: Scene, scenes: Sequence[Scene], world: WorldConfig,
              said: tuple[str, str] | None) -> Step | None:
    """What picture `k` has to show after a picture of `now`, or None if the law cannot be applied to that."""
    if law == "background":
        word = scenes[k].background
        return Step(after=now.replace(background=word), word=word)
    if law == "appear":  # which object comes is the model's choice: what it says counts
        item = _item(said[1]) if said else None
        return None if item is None or said is None else Step(after=_with_new(now, item), word=said[1])
    row = sorted(now.objects, key=lambda o: o.x)
    if law == "vanish":
        return None if not row else Step(target=row[0].id, after=now.replace(
            objects=tuple(o for o in now.objects if o.id != row[0].id)))
    if law == "spread":
        return None if len(row) <= k else _changed(now, row[k], row[0].color, color=row[0].color)
    [old] = [o for o in scenes[k - 1].objects if scenes[k].by_id.get(o.id) != o]
    new, same = scenes[k].by_id[old.id], [o for o in now.objects if (o.color, o.shape) == (old.color, old.shape)]
    if not same:
        return None
    target = min(same, key=lambda o: math.dist(o.center, old.center))
    if law in ("grow", "shrink"):
        stages = growth(world)
        size, radius = (stages if law == "grow" else stages[::-1])[k]
        return _changed(now, target, "", size=size, radius=radius)
    if law == "recolor":
        return _changed(now, target, new.color, color=new.color)
    if law == "transform":
        word = f"{'an' if new.shape[0] in 'aeiou' else 'a'} {new.shape}"
        return _changed(now, target, word, shape=new.shape)
    start = place(target, now.canvas)
    if start not in CLOCKWISE:
        return None
    way = [CLOCKWISE.index(place(scenes[i].by_id[old.id]) or "") for i in (k - 1, k)]
    word = CLOCKWISE[(CLOCKWISE.index(start) + way[1] - way[0]) % len(CLOCKWISE)]
    x, y = _middle(word)
    return _changed(now, target, word, x=x, y=y)


def _changed(now: Scene, target: Object, word: str, **changes) -> Step:
    objects = tuple(o.replace(**changes) if o.id == target.id else o for o in now.objects)
    return Step(after=now.replace(objects=objects), target=target.id, word=word)


def _item(phrase: str) -> Item | None:
    """"a large red circle at the top left", read as a caption of one object is."""
    spec = parse_caption(f"{phrase} , on a white background")
    return spec.items[0] if spec is not None and len(spec.items) == 1 else None


def _with_new(now: Scene, item: Item) -> Scene:
    """`item` states everything: it was read from a whole phrase."""
    x, y = _middle(item.place or "")
    new = Object(id=len(now.objects), shape=item.shape or "", color=item.color or "", size=item.size or "", x=x, y=y,
                 radius=SIZES[item.size or ""][0], texture=item.texture or "solid")
    return now.replace(objects=(*now.objects, new))


def _middle(name: str) -> tuple[int, int]:
    row, column = divmod(PLACES.index(name), 3)
    return (2 * column + 1) * UNITS // 6, (2 * row + 1) * UNITS // 6
