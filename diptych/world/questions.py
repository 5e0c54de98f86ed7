"""Questions with balanced answers: first the family and the wanted answer are drawn, then a scene that has it.

    exist       is there a red circle ?                              yes, no
    count       how many red objects are there ?                     zero .. max_objects
    attribute   what color is the star ?                             a color, shape or size
    compare     are there more circles than squares ?                yes, no
    spatial     is the star left of the heart ? which part ...       yes, no, a place
    logic       is there a circle that is not red ?                  yes, no

Training questions never name a held-out combination: they would all be answered with no.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

from diptych.world.language import NUMBERS, TEXTURE_WORDS, article, phrase, plural
from diptych.world.programs import SCENE, Attributes, Program, Undefined, answer, call, chain, degenerate
from diptych.world.refer import by_attributes, by_place, by_relation, minimal_attributes, name_of
from diptych.world.sample import Avoid, Stream, Unsatisfiable, pairs, sample_scene
from diptych.world.scene import PLACES, RELATIONS, Scene, WorldConfig, place, relation
from diptych.world.spec import Item

FAMILIES = ("exist", "count", "attribute", "compare", "spatial", "logic")
TRIES, PATIENCE = 500, 50

WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "exist": ("is there {a} ?", "does the picture contain {a} ?", "can you see {a} ?"),
        "count": ("how many {many} are there ?", "how many {many} can you see ?", "count the {many}"),
        "color": ("what color is {the} ?", "what is the color of {the} ?"),
        "shape": ("what shape is {the} ?", "what is the shape of {the} ?"),
        "size": ("what size is {the} ?", "how big is {the} ?"),
        "texture": ("what texture is {the} ?",),
        "more": ("are there more {a} than {b} ?",), "fewer": ("are there fewer {a} than {b} ?",),
        "same number": ("are there as many {a} as {b} ?", "are there the same number of {a} and {b} ?"),
        "bigger": ("is {a} bigger than {b} ?",), "smaller": ("is {a} smaller than {b} ?",),
        "same": ("do {a} and {b} have the same {name} ?", "is the {name} of {a} and {b} the same ?"),
        "holds": ("is {a} {name} {b} ?",), "at": ("is {the} at the {place} ?",),
        "place": ("in which part of the picture is {the} ?", "which part of the picture contains {the} ?"),
        "and": ("is there {a} and {b} ?", "can you see both {a} and {b} ?"),
        "or": ("is there {a} or {b} ?", "can you see {a} or {b} ?"),
        "not": ("is there {a} that is not {b} ?",), "all": ("are all {a} {b} ?",)},
    "held_out": {
        "exist": ("does this image show {a} ?",), "count": ("what is the number of {many} ?",),
        "color": ("which color does {the} have ?",), "shape": ("which shape does {the} have ?",),
        "size": ("which size does {the} have ?",), "texture": ("which texture does {the} have ?",),
        "more": ("does the picture contain more {a} than {b} ?",),
        "fewer": ("does the picture contain fewer {a} than {b} ?",),
        "same number": ("is the number of {a} and {b} the same ?",), "bigger": ("does {a} look bigger than {b} ?",),
        "smaller": ("does {a} look smaller than {b} ?",), "same": ("are {a} and {b} of the same {name} ?",),
        "holds": ("can you see {a} {name} {b} ?",), "at": ("can you see {the} at the {place} ?",),
        "place": ("at which place is {the} ?",), "and": ("does this image show {a} and also {b} ?",),
        "or": ("does this image show {a} or {b} or both ?",), "not": ("does this image show {a} that is not {b} ?",),
        "all": ("is it true that all {a} are {b} ?",)}}


class Question(NamedTuple):
    text: str
    program: Program
    answer: str
    family: str
    scene: Scene


Draft = tuple[Scene, Program, str, dict[str, str], str]  # scene, program, wording, slots, wanted answer
Build = Callable[[WorldConfig, Stream, str, str, float], Draft | None]


def sample_question(world: WorldConfig, rng: Stream, *, family: str | None = None, split: str = "train",
                    template: str = "train") -> Question:
    """A question of the family, or of any: families that a world has none of (scenes of one object and their
    attributes, which no other object tells apart) are left for others."""
    if family is None:
        families = [rng.choice(FAMILIES)]
        while True:
            try:
                return sample_question(world, rng, family=families[-1], split=split, template=template)
            except Unsatisfiable:
                left = [f for f in FAMILIES if f not in families]
                if not left:
                    raise
                families.append(rng.choice(left))
    if family not in FAMILIES:
        raise ValueError(f"expected a question family out of {', '.join(FAMILIES)}, got {family!r}")
    kind, wanted = "", 0.0
    for attempt in range(TRIES):
        # kept over many tries so that hard answers are not under-represented; given up where the split has none
        if attempt % PATIENCE == 0:
            kind, wanted = rng.choice(_kinds(world)[family]), rng.random()
        try:
            draft = _BUILD[kind](world, rng, split, kind, wanted)
            if draft is None:
                continue
            scene, program, wording, slots, expected = draft
            given = answer(program, scene)
            if degenerate(program, scene):
                continue
        except (Undefined, Unsatisfiable):
            continue
        assert given == expected, (given, expected, str(program))
        text = rng.choice(WORDINGS[template][wording]).format(**slots)
        return Question(text, program, given, family, scene)
    raise Unsatisfiable(f"expected a {family} question for split {split}, got none in {TRIES} tries")


# -- building blocks --------------------------------------------------------------------------------------------------

def _pair(world: WorldConfig, rng: Stream, split: str) -> tuple[str, str]:
    """A (color, shape) that may be named in this split; half of the time a held-out one in the split of pairs."""
    return rng.choice(pairs(world, None, None, split == "pairs" and rng.chance(0.5)))


def _selector(world: WorldConfig, rng: Stream, split: str) -> Attributes:
    """One or two attributes to select objects by."""
    color, shape = _pair(world, rng, split)
    names = rng.choice(_SELECTORS if len(world.sizes) > 1 else _SELECTORS[:4])
    given = {"color": color, "shape": shape, "size": rng.choice(world.sizes)}
    return {n: given[n] for n in names}


_SELECTORS = (("color",), ("shape",), ("color", "shape"), ("color", "shape"), ("size", "shape"), ("size", "color"))


def _matches(selector: Attributes) -> Avoid:
    color, shape, size = (selector.get(n) for n in ("color", "shape", "size"))
    return lambda c, s, z: color in (None, c) and shape in (None, s) and size in (None, z)


def _near(world: WorldConfig, rng: Stream, selector: Attributes) -> tuple[Item, ...]:
    """Usually one object that has all but one of the attributes: only looking at both tells them apart."""
    if len(selector) == 1 or rng.chance(0.3):
        return ()
    dropped = rng.choice(tuple(selector))
    values = {"color": world.colors, "shape": world.shapes, "size": world.sizes}[dropped]
    other = rng.choice([v for v in values if v != selector[dropped]])
    return (Item(**{**selector, dropped: other}),)


def _a(selector: Attributes) -> str:
    words = phrase(**selector)
    return f"{article(words)} {words}"


def _exists(selector: Attributes) -> Program:
    return call("exist", chain(**selector))


def _count_for(world: WorldConfig, rng: Stream, low: int) -> int:
    low = max(low, world.min_objects)
    return low + rng.below(world.max_objects - low + 1)


def _scene(world: WorldConfig, rng: Stream, split: str, wants: Sequence[Item], avoid: Avoid | None = None,
           total: int | None = None) -> Scene | None:
    number = sum(i.count for i in wants)
    if number > world.max_objects:
        return None
    total = total or _count_for(world, rng, max(number, 1))
    return sample_scene(world, rng, wants=wants, count=total, avoid=avoid, split=split)


# -- one builder per kind ---------------------------------------------------------------------------------------------

def _exist(world: WorldConfig, rng: Stream, split: str, kind: str, wanted: float) -> Draft | None:
    selector, yes = _selector(world, rng, split), wanted < 0.5
    wants = (Item(**selector),) if yes else _near(world, rng, selector)
    scene = _scene(world, rng, split, wants, None if yes else _matches(selector))
    return scene and (scene, _exists(selector), "exist", {"a": _a(selector)}, "yes" if yes else "no")


def _count(world: WorldConfig, rng: Stream, split: str, kind: str, wanted: float) -> Draft | None:
    number = int(wanted * (world.max_objects + 1))
    selector: Attributes = _selector(world, rng, split)
    if number >= world.min_objects and number and rng.chance(0.25):
        scene = _scene(world, rng, split, (), None, number)
        return scene and (scene, call("count", SCENE), "count", {"many": "objects"}, NUMBERS[number])
    if split == "counts" and rng.chance(0.5):
        number, shape = rng.choice(world.held_out_counts)
        selector = {"shape": shape}
    wants = (Item(count=number, **selector),) if number else _near(world, rng, selector)
    scene = _scene(world, rng, split, wants, _matches(selector))
    many = {"many": phrase(count=2, **selector)}
    return scene and (scene, call("count", chain(**selector)), "count", many, NUMBERS[number])


def _attribute(world: WorldConfig, rng: Stream, split: str, kind: str, wanted: float) -> Draft | None:
    values = {"color": world.colors, "shape": world.shapes, "size": world.sizes, "texture": world.textures}[kind]
    value = values[int(wanted * len(values))]
    asked: Attributes = {kind: value}
    item = Item(**asked)
    if kind in ("color", "shape") and split == "pairs" and rng.chance(0.5):
        color, shape = rng.choice(pairs(world, None, None, True))
        item, value = Item(color=color, shape=shape), color if kind == "color" else shape
    scene = _scene(world, rng, split, (item,), None)
    if scene is None:
        return None
    target, way = scene.objects[0], rng.random()
    if way < 0.5:
        options = minimal_attributes(scene, target, kind)
        found = by_attributes(rng.choice(options)) if options else None
    else:
        found = by_relation(scene, target, rng, kind) if way < 0.75 else by_place(scene, target, kind)
    value = TEXTURE_WORDS.get(value) or value
    return found and (scene, call("query", found.program, attribute=kind), kind, {"the": found.text}, value)


def _compare_counts(world: WorldConfig, rng: Stream, split: str, kind: str, wanted: float) -> Draft | None:
    by = rng.choice(("color", "shape"))
    a, b = rng.shuffled(world.colors if by == "color" else world.shapes)[:2]
    test = {"more": int.__gt__, "fewer": int.__lt__, "same number": int.__eq__}[kind]
    sums = [(m, n) for m in range(world.max_objects + 1) for n in range(world.max_objects + 1)
            if 1 <= m + n <= world.max_objects and test(m, n) == (wanted < 0.5)]
    if not sums:  # in a world of one object there are never as many of this as of that
        return None
    m, n = rng.choice(sums)
    wants = tuple(Item(count=k, **{by: v}) for k, v in ((m, a), (n, b)) if k)
    scene = _scene(world, rng, split, wants, lambda c, s, z: (c if by == "color" else s) in (a, b))
    op = {"more": "greater", "fewer": "less", "same number": "equal"}[kind]
    program = call(op, *(call("count", chain(SCENE, **{by: v})) for v in (a, b)))
    slots = {"a": phrase(count=2, **{by: a}), "b": phrase(count=2, **{by: b})}
    return scene and (scene, program, kind, slots, "yes" if wanted < 0.5 else "no")


def _compare_sizes(world: WorldConfig, rng: Stream, split: str, kind: str, wanted: float) -> Draft | None:
    low, high = sorted(rng.shuffled(range(len(world.sizes)))[:2])
    yes = wanted < 0.5
    order = (high, low) if yes == (kind == "bigger") else (low, high)
    return _two(world, rng, split, [Item(size=world.sizes[i]) for i in order], "size", kind, yes)


def _compare_attribute(world: WorldConfig, rng: Stream, split: str, kind: str, wanted: float) -> Draft | None:
    name, yes = rng.choice(("color", "shape", "size") if len(world.sizes) > 1 else ("color", "shape")), wanted < 0.5
    values = {"color": world.colors, "shape": world.shapes, "size": world.sizes}[name]
    first, second = rng.shuffled(values)[:2]
    return _two(world, rng, split, [Item(**{name: first}), Item(**{name: first if yes else second})], name, kind, yes)


def _two(world: WorldConfig, rng: Stream, split: str, wants: list[Item], name: str, kind: str,
         yes: bool) -> Draft | None:
    """A question about two objects that are named without the attribute it asks for."""
    scene = _scene(world, rng, split, wants, None)
    options = [minimal_attributes(scene, o, name) for o in scene.objects[:2]] if scene is not None else []
    if scene is None or not all(options):
        return None
    a, b = (by_attributes(rng.choice(o)) for o in options)
    if kind == "same":
        program = call("equal", *(call("query", r.program, attribute=name) for r in (a, b)))
    else:
        program = call("bigger", *((a.program, b.program) if kind == "bigger" else (b.program, a.program)))
    return scene, program, kind, {"a": a.text, "b": b.text, "name": name}, "yes" if yes else "no"


def _holds(world: WorldConfig, rng: Stream, split: str, kind: str, wanted: float) -> Draft | None:
    scene = _scene(world, rng, split, (Item(), Item()), None)
    if scene is None:
        return None
    (a, first), (b, second) = [(o, name_of(scene, o, rng)) for o in scene.objects[:2]]
    truth = "yes" if wanted < 0.5 else "no"
    names = [n for n in RELATIONS if relation(a, n, b) == truth]
    if first is None or second is None or not names:
        return None
    name = rng.choice(names)
    program = call("holds", first.program, second.program, relation=name)
    return scene, program, "holds", {"a": first.text, "name": name, "b": second.text}, truth


def _place(world: WorldConfig, rng: Stream, split: str, kind: str, wanted: float) -> Draft | None:
    where = PLACES[int(wanted * len(PLACES))] if kind == "place" else None
    scene = _scene(world, rng, split, (Item(place=where),), None)
    found = name_of(scene, scene.objects[0], rng) if scene is not None else None
    if scene is None or found is None:
        return None
    here = place(scene.objects[0], scene.canvas)
    query = call("query", found.program, attribute="place")
    if kind == "place":
        return scene, query, "place", {"the": found.text}, str(here)
    asked = str(here) if wanted < 0.5 else rng.choice([p for p in PLACES if p != here])
    program = call("exist", call("filter", chain(**_attributes_of(found.program)), place=asked))
    return scene, program, "at", {"the": found.text, "place": asked}, "yes" if wanted < 0.5 else "no"


def _attributes_of(program: Program) -> Attributes:
    """The filters of a description by attributes."""
    out: Attributes = {}
    node = program.inputs[0]
    while node.op == "filter":
        out[str(node.key)], node = node.value, node.inputs[0]
    return dict(reversed(out.items()))


def _two_exist(world: WorldConfig, rng: Stream, split: str, kind: str, wanted: float) -> Draft | None:
    (color, shape), other_shape = _pair(world, rng, split), rng.choice(world.shapes)
    a: Attributes = {"color": color, "shape": shape}
    b: Attributes = {"shape": other_shape}
    if rng.chance(0.6):
        b = {"color": rng.choice(pairs(world, None, other_shape))[0], **b}
    if other_shape == shape:
        return None
    yes, one = wanted < 0.5, rng.chance(2 / 3)
    first = rng.choice((a, b))
    present = {("and", True): (a, b), ("and", False): (first,) if one else (),
               ("or", True): (first,) if one else (a, b), ("or", False): ()}[kind, yes]
    missing = [m for m in (_matches(s) for s in (a, b) if s not in present)]
    scene = _scene(world, rng, split, [Item(**s) for s in present], lambda c, s, z: any(m(c, s, z) for m in missing))
    return scene and (scene, call(kind, _exists(a), _exists(b)), kind, {"a": _a(a), "b": _a(b)}, "yes" if yes else "no")


def _not(world: WorldConfig, rng: Stream, split: str, kind: str, wanted: float) -> Draft | None:
    (color, shape), yes = _pair(world, rng, split), wanted < 0.5
    others = [c for c, _ in pairs(world, None, shape) if c != color]
    fits, differs = Item(color=color, shape=shape), Item(color=rng.choice(others), shape=shape)
    others_exist = call("exist", call("minus", chain(shape=shape), chain(color=color)))
    if kind == "all":
        wants = (fits, fits) if yes else (fits, differs)
        program = call("and", _exists({"shape": shape}), call("not", others_exist))
    else:
        wants = ((differs, fits) if rng.chance(0.5) else (differs,)) if yes else ((fits,) if rng.chance(0.75) else ())
        program = others_exist
    slots = {"a": plural(shape) if kind == "all" else _a({"shape": shape}), "b": color}
    clean = yes == (kind == "all")  # every object of the shape must have the color
    scene = _scene(world, rng, split, wants, (lambda c, s, z: s == shape and c != color) if clean else None)
    return scene and (scene, program, kind, slots, "yes" if yes else "no")


def _kinds(world: WorldConfig) -> dict[str, tuple[str, ...]]:
    sized = len(world.sizes) > 1
    textured = ("texture",) if len(world.textures) > 1 else ()
    return {"exist": ("exist",), "count": ("count",),
            "attribute": ("color", "shape", *(("size",) if sized else ()), *textured),
            "compare": ("more", "fewer", "same number", "same", *(("bigger", "smaller") if sized else ())),
            "spatial": ("holds", "holds", "at", "place"), "logic": ("and", "or", "not", "all")}


_BUILD: dict[str, Build] = {
    "exist": _exist, "count": _count, "color": _attribute, "shape": _attribute, "size": _attribute,
    "texture": _attribute, "more": _compare_counts, "fewer": _compare_counts, "same number": _compare_counts,
    "bigger": _compare_sizes, "smaller": _compare_sizes, "same": _compare_attribute, "holds": _holds, "at": _place,
    "place": _place, "and": _two_exist, "or": _two_exist, "not": _not, "all": _not}
