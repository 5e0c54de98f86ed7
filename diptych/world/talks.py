"""Talks: several questions and references about one picture, for training and chat.

Single questions (`diptych.world.questions`) draw the answer first and then a scene that has it; a talk has one scene,
so here the wanted truth is drawn first and then a question of the same kinds and wordings that has it there. Pictures
are dear and words are cheap: a talk of six turns costs less than two single questions.
"""
from collections.abc import Callable
from typing import NamedTuple

from diptych.world.language import article, phrase, plural
from diptych.world.programs import SCENE, Attributes, Program, Undefined, answer, call, chain, degenerate
from diptych.world.questions import WORDINGS
from diptych.world.refer import REQUESTS, by_attributes, by_place, by_relation, minimal_attributes, name_of, refer
from diptych.world.sample import Stream, pairs, sample_scene
from diptych.world.scene import PLACES, RELATIONS, Object, Scene, WorldConfig, place

TURNS = 6
TRIES = 12  # proposals per turn; a scene may have no question of a kind with the wanted truth
KINDS = {"refer": 6.0, "exist": 2.0, "count": 2.5, "color": 1.0, "shape": 1.0, "size": 1.0, "place": 1.0, "at": 0.7,
         "holds": 1.5, "more": 0.5, "fewer": 0.5, "same number": 0.5, "bigger": 0.5, "smaller": 0.5, "same": 0.7,
         "and": 0.6, "or": 0.6, "not": 0.6, "all": 0.6}
_SELECTORS = (("color",), ("shape",), ("color", "shape"), ("color", "shape"), ("size", "shape"), ("size", "color"))


class Turn(NamedTuple):
    """`answer` of a question, or the `target` that a reference describes; `program` evaluates to either."""

    text: str
    program: Program
    kind: str
    answer: str | None = None
    target: Object | None = None


Draft = tuple[Program, str, dict[str, str]]  # program, wording, slots


def sample_talk(world: WorldConfig, rng: Stream, *, turns: int = TURNS, split: str = "train",
                template: str = "train", pointing: bool = True) -> tuple[Scene, list[Turn]]:
    """A scene and up to `turns` different turns (at least one); without `pointing` questions only."""
    low = min(max(2, world.min_objects), world.max_objects)
    if split == "counts":
        low = max(low, min((n for n, _ in world.held_out_counts), default=low))
    scene = sample_scene(world, rng, count=low + rng.below(world.max_objects - low + 1), split=split)
    without = (() if len(world.sizes) > 1 else ("size", "bigger", "smaller")) + (() if pointing else ("refer",))
    kinds = {k: w for k, w in KINDS.items() if k not in without}
    found: list[Turn] = []
    while not found:
        for _ in range(turns):
            turn = _turn(world, scene, rng, rng.weighted(kinds), split, template)
            if turn is not None and all(turn.text != t.text for t in found):
                found.append(turn)
    return scene, found


def _turn(world: WorldConfig, scene: Scene, rng: Stream, kind: str, split: str, template: str) -> Turn | None:
    if kind == "refer":
        target = rng.choice(scene.objects)
        way = by_relation if rng.chance(0.3) else refer
        found = way(scene, target, rng)
        text = found and rng.choice(REQUESTS[template]).format(found.text)
        return found and Turn(str(text), found.program, found.kind, None, target)
    truth = "yes" if rng.chance(0.5) else "no"
    for _ in range(TRIES):
        try:
            draft = _PROPOSE[kind](world, scene, rng, kind, split, truth == "yes")
            if draft is None:
                continue
            program, wording, slots = draft
            given = answer(program, scene)
            if given in ("yes", "no") and given != truth:
                continue
            if given == "one" and rng.chance(0.5):  # by far the most frequent number of whatever is there
                continue
            if degenerate(program, scene):
                continue
        except Undefined:
            continue
        return Turn(rng.choice(WORDINGS[template][wording]).format(**slots), program, kind, given)
    return None


def _selector(world: WorldConfig, scene: Scene, rng: Stream, split: str, present: bool) -> Attributes:
    """Attributes of an object that is there, or those with one of them changed, or any that may be named."""
    names = rng.choice(_SELECTORS if len(world.sizes) > 1 else _SELECTORS[:4])
    some = rng.choice(scene.objects)
    given = {"color": some.color, "shape": some.shape, "size": some.size}
    if not present:
        values = {"color": world.colors, "shape": world.shapes, "size": world.sizes}
        for name in (rng.choice(names),) if rng.chance(0.7) else names:
            given[name] = rng.choice(values[name])
        if (given["color"], given["shape"]) not in pairs(world, None, None, None if split == "pairs" else False):
            given["color"], given["shape"] = rng.choice(pairs(world))
    return {n: given[n] for n in names}


def _a(selector: Attributes) -> str:
    words = phrase(**selector)
    return f"{article(words)} {words}"


def _exists(selector: Attributes) -> Program:
    return call("exist", chain(**selector))


def _exist(world: WorldConfig, scene: Scene, rng: Stream, kind: str, split: str, yes: bool) -> Draft:
    selector = _selector(world, scene, rng, split, yes)
    return _exists(selector), kind, {"a": _a(selector)}


def _count(world: WorldConfig, scene: Scene, rng: Stream, kind: str, split: str, yes: bool) -> Draft:
    if rng.chance(0.15):
        return call("count", SCENE), kind, {"many": "objects"}
    selector = _selector(world, scene, rng, split, rng.chance(0.8))
    return call("count", chain(**selector)), kind, {"many": phrase(count=2, **selector)}


def _attribute(world: WorldConfig, scene: Scene, rng: Stream, kind: str, split: str, yes: bool) -> Draft | None:
    target, way = rng.choice(scene.objects), rng.random()
    if way < 0.5:
        options = minimal_attributes(scene, target, kind)
        found = by_attributes(rng.choice(options)) if options else None
    else:
        found = by_relation(scene, target, rng, kind) if way < 0.75 else by_place(scene, target, kind)
    return found and (call("query", found.program, attribute=kind), kind, {"the": found.text})


def _compare_counts(world: WorldConfig, scene: Scene, rng: Stream, kind: str, split: str, yes: bool) -> Draft:
    by = rng.choice(("color", "shape"))
    first = getattr(rng.choice(scene.objects), by)
    second = rng.choice([v for v in (world.colors if by == "color" else world.shapes) if v != first])
    a, b = rng.shuffled((first, second))
    op = {"more": "greater", "fewer": "less", "same number": "equal"}[kind]
    program = call(op, *(call("count", chain(SCENE, **{by: v})) for v in (a, b)))
    return program, kind, {"a": phrase(count=2, **{by: a}), "b": phrase(count=2, **{by: b})}


def _compare_two(world: WorldConfig, scene: Scene, rng: Stream, kind: str, split: str, yes: bool) -> Draft | None:
    name = rng.choice(("color", "shape", "size") if len(world.sizes) > 1 else ("color", "shape"))
    name = name if kind == "same" else "size"
    options = [minimal_attributes(scene, o, name) for o in rng.shuffled(scene.objects)[:2]]
    if len(options) < 2 or not all(options):
        return None
    a, b = (by_attributes(rng.choice(o)) for o in options)
    if kind == "same":
        program = call("equal", *(call("query", r.program, attribute=name) for r in (a, b)))
    else:
        program = call("bigger", *((a.program, b.program) if kind == "bigger" else (b.program, a.program)))
    return program, kind, {"a": a.text, "b": b.text, "name": name}


def _holds(world: WorldConfig, scene: Scene, rng: Stream, kind: str, split: str, yes: bool) -> Draft | None:
    names = [name_of(scene, o, rng) for o in rng.shuffled(scene.objects)[:2]]
    if len(names) < 2 or names[0] is None or names[1] is None:
        return None
    name = rng.choice(RELATIONS)
    program = call("holds", names[0].program, names[1].program, relation=name)
    return program, kind, {"a": names[0].text, "name": name, "b": names[1].text}


def _place(world: WorldConfig, scene: Scene, rng: Stream, kind: str, split: str, yes: bool) -> Draft | None:
    target = rng.choice(scene.objects)
    options = minimal_attributes(scene, target)
    if not options:
        return None
    attributes = rng.choice(options)
    found = by_attributes(attributes)
    if kind == "place":
        return call("query", found.program, attribute="place"), kind, {"the": found.text}
    here = place(target, scene.canvas)
    asked = str(here) if yes else rng.choice([p for p in PLACES if p != here])
    program = call("exist", call("filter", chain(**attributes), place=asked))
    return program, kind, {"the": found.text, "place": asked}


def _both(world: WorldConfig, scene: Scene, rng: Stream, kind: str, split: str, yes: bool) -> Draft | None:
    a, b = (_selector(world, scene, rng, split, rng.chance(0.7 if (kind == "and") == yes else 0.3)) for _ in range(2))
    if a == b:
        return None
    return call(kind, _exists(a), _exists(b)), kind, {"a": _a(a), "b": _a(b)}


def _not(world: WorldConfig, scene: Scene, rng: Stream, kind: str, split: str, yes: bool) -> Draft:
    some = rng.choice(scene.objects)
    color = some.color if rng.chance(0.7) else rng.choice(pairs(world, None, some.shape))[0]
    others = call("exist", call("minus", chain(shape=some.shape), chain(color=color)))
    if kind == "not":
        return others, kind, {"a": _a({"shape": some.shape}), "b": color}
    program = call("and", _exists({"shape": some.shape}), call("not", others))
    return program, kind, {"a": plural(some.shape), "b": color}


Propose = Callable[[WorldConfig, Scene, Stream, str, str, bool], Draft | None]
_PROPOSE: dict[str, Propose] = {
    "exist": _exist, "count": _count, "color": _attribute, "shape": _attribute, "size": _attribute, "place": _place,
    "at": _place, "holds": _holds, "more": _compare_counts, "fewer": _compare_counts, "same number": _compare_counts,
    "bigger": _compare_two, "smaller": _compare_two, "same": _compare_two, "and": _both, "or": _both, "not": _not,
    "all": _not}
