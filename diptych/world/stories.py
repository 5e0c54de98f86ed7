"""Stories in four pictures: a premise with a law, then one sentence per later picture that names what happens.

    grow, shrink    an object passes through four sizes      move       around the border, one place per picture
    recolor         through three colors named before        transform  through three shapes named before
    vanish          one by one from left to right            appear     one by one
    spread          the color of the leftmost object infects the next one to the right
    background      from one background to the next
"""
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from diptych.world.language import article, caption_spec, conjunction, grouped, item_phrase
from diptych.world.refer import by_attributes, minimal_attributes
from diptych.world.sample import Stream, Unsatisfiable, admissible, fits, pairs, room, sample_scene
from diptych.world.scene import PLACES, SIZES, STEP, UNITS, Object, Scene, WorldConfig, place
from diptych.world.spec import Item, Spec

LENGTH = 4  # pictures
LAWS = ("grow", "shrink", "move", "recolor", "transform", "vanish", "appear", "spread", "background")
COUNTS = {1: 0.35, 2: 0.4, 3: 0.25}  # objects, where the law leaves it open
CLOCKWISE = ("top left", "top", "top right", "right", "bottom right", "bottom", "bottom left", "left")
LEVEL_MARGIN = 0.06  # of the side: between neighbours of "from left to right"
TRIES, PATIENCE = 600, 60

PREMISES = {"train": ("a story in four pictures : {scene} . {law}", "draw four pictures : {scene} . {law}"),
            "held_out": ("show what happens in four steps : {scene} . {law}",)}
EVENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {"grow": ("{the} grows", "{the} gets bigger"), "shrink": ("{the} shrinks", "{the} gets smaller"),
              "move": ("{the} moves to the {new}",), "recolor": ("{the} turns {new}",),
              "spread": ("{the} turns {new}",), "transform": ("{the} turns into {new}",),
              "vanish": ("{the} disappears", "{the} is gone"), "appear": ("{new} appears",),
              "background": ("the background turns {new}",)},
    "held_out": {"grow": ("now {the} is bigger",), "shrink": ("now {the} is smaller",),
                 "move": ("now {the} is at the {new}",), "recolor": ("now {the} is {new}",),
                 "spread": ("now {the} is {new}",), "transform": ("now {the} is {new}",),
                 "vanish": ("now {the} is not there",), "appear": ("now there is {new}",),
                 "background": ("now the background is {new}",)}}


class Story(NamedTuple):
    scenes: tuple[Scene, ...]
    premise: str
    events: tuple[str, ...]
    law: str
    spec: Spec  # what the premise claims about the first picture


class Draft(NamedTuple):
    scenes: list[Scene]
    sentence: str  # the law, as the premise states it
    changed: list[tuple[int | None, str]]  # per event: the object (in the picture before) and the new value


def sample_story(world: WorldConfig, rng: Stream, *, law: str | None = None, split: str = "train",
                 template: str = "train") -> Story:
    if law is not None and law not in LAWS:
        raise ValueError(f"expected a law out of {', '.join(LAWS)}, got {law!r}")
    wanted = law or rng.choice(laws(world))
    for attempt in range(TRIES):
        if attempt % PATIENCE == PATIENCE - 1:  # the split may have no story of this law
            wanted = law or rng.choice(laws(world))
        try:
            draft = _BUILD[wanted](world, rng, split)
        except Unsatisfiable:
            continue
        if draft is None or not all(admissible(s, world, split, first=i == 0) for i, s in enumerate(draft.scenes)):
            continue
        if not all(fits(s, world) for s in draft.scenes):
            continue
        events = _tell(draft, wanted, rng, template)
        if events is not None:
            text, spec = _opening(draft.scenes[0], rng)
            premise = rng.choice(PREMISES[template]).format(scene=text, law=draft.sentence)
            return Story(tuple(draft.scenes), premise, events, wanted, spec)
    raise Unsatisfiable(f"expected a story ({law or 'any law'}) for split {split}, got none in {TRIES} tries")


def laws(world: WorldConfig) -> tuple[str, ...]:
    """Those the world has room for."""
    crowd, sized = world.max_objects >= LENGTH, len(world.sizes) > 1
    impossible = {"grow": not sized, "shrink": not sized, "vanish": not crowd, "appear": not crowd, "spread": not crowd,
                  "background": len(world.backgrounds) < 3, "transform": len(world.shapes) < LENGTH}
    return tuple(name for name in LAWS if not impossible.get(name))


def _opening(scene: Scene, rng: Stream) -> tuple[str, Spec]:
    """The first picture in words: colors, shapes and places, so that the later ones follow."""
    if rng.chance(0.5):
        items = [Item(color=i.color, shape=i.shape, size=i.size, place=i.place) for i in caption_spec(scene).items]
    else:
        items = [Item(count=i.count, color=i.color, shape=i.shape) for i, _ in grouped(rng.shuffled(scene.objects))]
    text = f"{conjunction([item_phrase(i) for i in items])} on a {scene.background} background"
    return text, Spec(items=tuple(items), background=scene.background)


def _tell(draft: Draft, law: str, rng: Stream, template: str) -> tuple[str, ...] | None:
    """One sentence per event; the object is named by what is unique in the picture before."""
    events = []
    wording = rng.choice(EVENTS[template][law])
    for before, (target, new) in zip(draft.scenes, draft.changed, strict=False):
        the = ""
        if target is not None:
            options = minimal_attributes(before, before.by_id[target])
            if not options:
                return None
            the = by_attributes(rng.choice(options)).text
        events.append(wording.format(the=the, new=new))
    return tuple(events)


# -- laws -------------------------------------------------------------------------------------------------------------

def _count(world: WorldConfig, rng: Stream, split: str) -> int:
    if split == "counts":
        low = min(n for n, _ in world.held_out_counts)
        return min(low + rng.below(2), world.max_objects)
    return max(world.min_objects, min(rng.weighted(COUNTS), world.max_objects))


def _with(scene: Scene, target: int, **changes: Any) -> Scene:
    objects = tuple(o.replace(**changes) if o.id == target else o for o in scene.objects)
    return Scene(objects=objects, background=scene.background, canvas=scene.canvas)


def _named(scene: Scene, obj: Object, rng: Stream, without: str | None = None) -> str | None:
    options = minimal_attributes(scene, obj, without)
    return by_attributes(rng.choice(options)).text if options else None


def growth(world: WorldConfig) -> list[tuple[str, int]]:
    """(size word, radius) of the four stages: the ends of the world's sizes, evenly."""
    ends = [(s, r) for s in sorted(world.sizes, key=lambda s: SIZES[s]) for r in SIZES[s]]
    return [ends[i * (len(ends) - 1) // (LENGTH - 1)] for i in range(LENGTH)]


def _grow(world: WorldConfig, rng: Stream, split: str, shrink: bool = False) -> Draft | None:
    stages = growth(world)
    scene = sample_scene(world, rng, wants=(Item(size=stages[-1][0]),), count=_count(world, rng, split), split=split)
    obj = scene.objects[0]
    name = _named(scene, obj, rng, "size")
    if name is None:
        return None
    scenes = [_with(scene, obj.id, size=size, radius=radius) for size, radius in (stages[::-1] if shrink else stages)]
    return Draft(scenes, f"{name} {'shrinks' if shrink else 'grows'} step by step", [(obj.id, "")] * (LENGTH - 1))


def _shrink(world: WorldConfig, rng: Stream, split: str) -> Draft | None:
    return _grow(world, rng, split, shrink=True)


def _move(world: WorldConfig, rng: Stream, split: str) -> Draft | None:
    start, step = rng.below(len(CLOCKWISE)), rng.choice((1, -1))
    path = [CLOCKWISE[(start + step * k) % len(CLOCKWISE)] for k in range(LENGTH)]
    number = _count(world, rng, split)
    # the others start in places off the path, otherwise nearly every draw would collide
    free = rng.shuffled([p for p in PLACES if p not in path])
    wants = [Item(place=p) for p in (path[0], *free)][:number]
    if len(wants) < number:
        return None
    scene = sample_scene(world, rng, wants=wants, split=split)
    obj = scene.objects[0]
    columns, rows = room(world, obj.shape, obj.radius, obj.rotation, scene.canvas)
    # one coordinate per column and row: the object comes back to where it was
    xs, ys = ([STEP * (t[0] + rng.below(t[1] - t[0] + 1)) if t else None for t in axis] for axis in (columns, rows))
    spots = [(xs[PLACES.index(p) % 3], ys[PLACES.index(p) // 3]) for p in path]
    name = _named(scene, obj, rng)
    if name is None or any(x is None or y is None for x, y in spots):
        return None
    scenes = [_with(scene, obj.id, x=x, y=y) for x, y in spots]
    way = "clockwise" if step == 1 else "counterclockwise"
    return Draft(scenes, f"{name} moves {way} along the border", [(obj.id, p) for p in path[1:]])


def _recolor(world: WorldConfig, rng: Stream, split: str) -> Draft | None:
    return _through(world, rng, split, "color")


def _transform(world: WorldConfig, rng: Stream, split: str) -> Draft | None:
    return _through(world, rng, split, "shape")


def _through(world: WorldConfig, rng: Stream, split: str, name: str) -> Draft | None:
    scene = sample_scene(world, rng, count=_count(world, rng, split), split=split)
    obj = rng.choice(scene.objects)
    held_out = None if split == "pairs" else False
    options = ([c for c, _ in pairs(world, None, obj.shape, held_out)] if name == "color"
               else [s for _, s in pairs(world, obj.color, None, held_out)])
    values = rng.shuffled([v for v in options if v != getattr(obj, name)])[:LENGTH - 1]
    who = _named(scene, obj, rng)
    if who is None or len(values) < LENGTH - 1:
        return None
    scenes = [scene, *(_with(scene, obj.id, **{name: v}) for v in values)]
    words = values if name == "color" else [f"{article(v)} {v}" for v in values]
    turns = "turns" if name == "color" else "turns into"
    return Draft(scenes, f"{who} {turns} " + " , then ".join(words), [(obj.id, w) for w in words])


def _row(world: WorldConfig, rng: Stream, split: str) -> tuple[Scene, list[Object]] | None:
    """Four objects that are clearly ordered from left to right."""
    scene = sample_scene(world, rng, count=LENGTH, split=split)
    row = sorted(scene.objects, key=lambda o: o.x)
    clear = all(b.x - a.x >= LEVEL_MARGIN * UNITS for a, b in pairwise(row))
    return (scene, row) if clear else None


def _without(scene: Scene, ids: Sequence[int]) -> Scene:
    objects = tuple(o for o in scene.objects if o.id not in ids)
    return Scene(objects=objects, background=scene.background, canvas=scene.canvas)


def _vanish(world: WorldConfig, rng: Stream, split: str) -> Draft | None:
    made = _row(world, rng, split)
    if made is None:
        return None
    scene, row = made
    order = [o.id for o in row]
    scenes = [_without(scene, order[:k]) for k in range(LENGTH)]
    return Draft(scenes, "the objects disappear one by one from left to right", [(i, "") for i in order[:-1]])


def _appear(world: WorldConfig, rng: Stream, split: str) -> Draft | None:
    scene = sample_scene(world, rng, count=LENGTH, split=split)
    order = [o.id for o in scene.objects]
    scenes = [_without(scene, order[k + 1:]) for k in range(LENGTH)]
    items = (Item(color=o.color, shape=o.shape, size=o.size, texture=o.texture, place=place(o, scene.canvas))
             for o in scene.objects[1:])
    return Draft(scenes, "new objects appear one by one", [(None, item_phrase(i)) for i in items])


def _spread(world: WorldConfig, rng: Stream, split: str) -> Draft | None:
    made = _row(world, rng, split)
    if made is None:
        return None
    scene, row = made
    color = row[0].color
    if any(o.color == color for o in row[1:]):
        return None
    scenes = [scene]
    for obj in row[1:]:
        scenes.append(_with(scenes[-1], obj.id, color=color))
    sentence = "the color of the leftmost object spreads from left to right"
    return Draft(scenes, sentence, [(o.id, color) for o in row[1:]])


def _background(world: WorldConfig, rng: Stream, split: str) -> Draft | None:
    scene = sample_scene(world, rng, count=_count(world, rng, split), split=split)
    step, cycle = rng.choice((1, -1)), world.backgrounds
    start = cycle.index(scene.background)
    values = [cycle[(start + step * k) % len(cycle)] for k in range(LENGTH)]
    scenes = [Scene(objects=scene.objects, background=b, canvas=scene.canvas) for b in values]
    return Draft(scenes, "the background turns " + " , then ".join(values[1:]), [(None, b) for b in values[1:]])


_BUILD = {"grow": _grow, "shrink": _shrink, "move": _move, "recolor": _recolor, "transform": _transform,
          "vanish": _vanish, "appear": _appear, "spread": _spread, "background": _background}
