"""Referring expressions: the shortest words that fit one object and no other.

Searched in this order: subsets of the attributes by size, then a relation to an object that is unique by its
attributes, then the outermost of its kind, then the place. No object may be ambiguous under the description.
"""
from itertools import combinations
from typing import NamedTuple

from diptych.world.language import phrase
from diptych.world.programs import SIDES, Attributes, Program, Undefined, call, chain, run
from diptych.world.sample import Stream, Unsatisfiable, pairs, sample_scene
from diptych.world.scene import RELATIONS, Object, Scene, WorldConfig, place
from diptych.world.spec import Item

SIDE_WORDS = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}
SUBSETS = tuple(s for n in (1, 2, 3, 4) for s in combinations(("shape", "color", "size", "texture"), n))


class Reference(NamedTuple):
    """`text` is a noun phrase with article, `program` evaluates to the object, `kind` says how it was found."""

    text: str
    program: Program
    kind: str


def minimal_attributes(scene: Scene, obj: Object, without: str | None = None) -> list[Attributes]:
    """All smallest attribute subsets that fit only this object; `without` is an attribute that must not be named."""
    found: list[Attributes] = []
    for names in SUBSETS:
        if without in names:
            continue
        if found and len(names) > len(found[0]):
            break
        if unique_by(scene, obj, names):
            found.append({n: getattr(obj, n) for n in names})
    return found


def unique_by(scene: Scene, obj: Object, names: tuple[str, ...]) -> bool:
    return not any(o.id != obj.id and all(getattr(o, n) == getattr(obj, n) for n in names) for o in scene.objects)


def by_attributes(attributes: Attributes) -> Reference:
    order: Attributes = {k: attributes[k] for k in ("size", "color", "texture", "shape") if k in attributes}
    return Reference(f"the {phrase(**order)}", call("unique", chain(**order)), "attributes")


def name_of(scene: Scene, obj: Object, rng: Stream) -> Reference | None:
    """By attributes alone: the shortest, or as often the usual "the red circle" where that is unique too."""
    if rng.chance(0.5) and unique_by(scene, obj, ("color", "shape")):
        return by_attributes({"color": obj.color, "shape": obj.shape})
    options = minimal_attributes(scene, obj)
    return by_attributes(rng.choice(options)) if options else None


def by_relation(scene: Scene, obj: Object, rng: Stream, without: str | None = None) -> Reference | None:
    """ "the circle left of the blue square", with the fewest attributes of the object itself. """
    for names in ((), ("shape",), ("color",), ("color", "shape")):
        if without in names:
            continue
        own: Attributes = {n: getattr(obj, n) for n in names}
        for landmark in rng.shuffled(scene.objects):
            marks = minimal_attributes(scene, landmark) if landmark.id != obj.id else []
            if not marks:
                continue
            mark = by_attributes(rng.choice(marks))
            for name in rng.shuffled(RELATIONS):
                program = call("unique", chain(call("relate", mark.program, relation=name), **own))
                if _gives(program, scene, obj):
                    return Reference(f"the {phrase(**own)} {name} {mark.text}", program, "relation")
    return None


def by_extreme(scene: Scene, obj: Object, rng: Stream) -> Reference | None:
    """ "the leftmost circle". """
    own: Attributes = {"shape": obj.shape}
    for side in rng.shuffled(tuple(SIDES)):
        program = call("extreme", chain(**own), side=side)
        if _gives(program, scene, obj):
            return Reference(f"the {SIDE_WORDS[side]} {phrase(**own)}", program, "extreme")
    return None


def by_place(scene: Scene, obj: Object, without: str | None = None) -> Reference | None:
    """ "the red circle at the top left", with the fewest attributes besides the place. """
    where = place(obj, scene.canvas)
    for names in (("shape",), ("color",), ("color", "shape"), ("size", "color", "shape")):
        if without in names:
            continue
        own: Attributes = {n: getattr(obj, n) for n in names}
        program = call("unique", chain(place=where, **own))
        if _gives(program, scene, obj):
            return Reference(f"the {phrase(**own)} at the {where}", program, "place")
    return None


def refer(scene: Scene, obj: Object, rng: Stream) -> Reference | None:
    """The first unique description in the order of the module, or None."""
    options = minimal_attributes(scene, obj)
    if options:
        return by_attributes(rng.choice(options))
    return by_relation(scene, obj, rng) or by_extreme(scene, obj, rng) or by_place(scene, obj)


def _gives(program: Program, scene: Scene, obj: Object) -> bool:
    try:
        return run(program, scene).id == obj.id
    except Undefined:
        return False


# -- the task ---------------------------------------------------------------------------------------------------------

KINDS = {"one attribute": 0.25, "two attributes": 0.3, "relation": 0.2, "extreme": 0.1, "place": 0.15}
TRIES, PATIENCE = 500, 50
REQUESTS = {"train": ("where is {} ?", "find {}", "show me {}"), "held_out": ("point at {}",)}


def sample_reference(world: WorldConfig, rng: Stream, *, kind: str | None = None,
                     split: str = "train") -> tuple[Scene, Object, Reference]:
    """(scene, object, description). Other objects share the named attributes, so that every word is needed."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"expected a kind of reference out of {', '.join(KINDS)}, got {kind!r}")
    wanted = kind or rng.weighted(KINDS)
    for attempt in range(TRIES):
        if attempt % PATIENCE == PATIENCE - 1:
            wanted = kind or rng.weighted(KINDS)
        try:
            found = _attempt(world, rng, wanted, split)
        except Unsatisfiable:
            continue
        if found is not None:
            return found
    raise Unsatisfiable(f"expected a reference by {kind or 'any kind'} for split {split}, got none in {TRIES} tries")


def _attempt(world: WorldConfig, rng: Stream, kind: str, split: str) -> tuple[Scene, Object, Reference] | None:
    color, shape = rng.choice(pairs(world, None, None, split == "pairs" and rng.chance(0.5)))
    target = Item(color=color, shape=shape)
    if kind == "one attribute":
        wants = [target]
    elif kind == "two attributes":
        same_shape = rng.choice([c for c, _ in pairs(world, None, shape) if c != color])
        same_color = rng.choice([s for _, s in pairs(world, color, None) if s != shape])
        wants = [target, Item(color=same_shape, shape=shape), Item(color=color, shape=same_color)]
    else:
        wants = [Item(count=2, color=color, shape=shape)]
    low = max(sum(i.count for i in wants), 2, world.min_objects)
    if low > world.max_objects:
        return None
    scene = sample_scene(world, rng, wants=wants, count=low + rng.below(world.max_objects - low + 1), split=split)
    obj = scene.objects[0]
    if kind in ("one attribute", "two attributes"):
        options = minimal_attributes(scene, obj)
        length = 1 if kind == "one attribute" else 2
        found = by_attributes(rng.choice(options)) if options and len(options[0]) == length else None
    else:
        found = {"relation": lambda: by_relation(scene, obj, rng), "extreme": lambda: by_extreme(scene, obj, rng),
                 "place": lambda: by_place(scene, obj)}[kind]()
    return found and (scene, obj, found)
