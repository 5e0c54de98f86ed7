"""Programs: small trees that are run on a scene and printed as text.

    count(filter(scene, color=red))
    query(unique(relate(unique(filter(scene, shape=star)), relation=left of)), attribute=color)

A program has no value (it raises Undefined) where the truth is not certain: `unique` on a set of another size than
one, a relation or a comparison within its margin.

    scene                                set of all objects
    filter(set, ATTRIBUTE=value)         color, shape, size, texture or place
    relate(object, relation=NAME)        objects that are NAME of it; undefined if one is ambiguous
    same(object, attribute=NAME)         the other objects that share it
    extreme(set, side=SIDE)              the leftmost, rightmost, topmost or bottommost object, by a margin
    union, intersect, minus(set, set)    unique(set)  count(set)  exist(set)
    query(object, attribute=NAME)        holds(object, object, relation=NAME)  bigger(object, object)
    equal, greater, less(value, value)   and, or(truth, truth)  not(truth)
"""
from typing import Any, NamedTuple

from diptych.world.language import NUMBERS, TEXTURE_WORDS
from diptych.world.scene import RELATIONS, Object, Scene, place, relation

Attributes = dict[str, Any]  # name -> value
ATTRIBUTES = ("color", "shape", "size", "texture")
SIDES = {"left": (1, 0), "right": (-1, 0), "top": (0, 1), "bottom": (0, -1)}
EXTREME_MARGIN = 0.08  # of the side, to the second
AREA_RATIO = 1.35  # "bigger" needs at least this

# name -> (number of inputs, name of the argument)
OPERATORS: dict[str, tuple[int, str | None]] = {
    "scene": (0, None), "filter": (1, "attribute value"), "relate": (1, "relation"), "same": (1, "attribute"),
    "extreme": (1, "side"), "union": (2, None), "intersect": (2, None), "minus": (2, None), "unique": (1, None),
    "count": (1, None), "exist": (1, None), "query": (1, "attribute"), "holds": (2, "relation"), "bigger": (2, None),
    "equal": (2, None), "greater": (2, None), "less": (2, None), "and": (2, None), "or": (2, None), "not": (1, None)}


class Undefined(ValueError):
    """The program has no certain value on this scene."""


class Program(NamedTuple):
    op: str
    inputs: tuple["Program", ...] = ()
    key: str | None = None
    value: str | None = None

    def __str__(self) -> str:
        arguments = [str(p) for p in self.inputs]
        if self.key is not None:
            arguments.append(f"{self.key}={self.value}")
        return f"{self.op}({', '.join(arguments)})" if arguments else self.op


SCENE = Program("scene")


def call(op: str, *inputs: Program, **argument: str) -> Program:
    """`call("filter", SCENE, color="red")`."""
    key, value = next(iter(argument.items())) if argument else (None, None)
    count, wanted = OPERATORS.get(op, (None, None))
    if count is None:
        raise ValueError(f"expected an operator out of {', '.join(OPERATORS)}, got {op!r}")
    if len(inputs) != count or len(argument) > 1 or (wanted is None) != (key is None):
        raise ValueError(f"expected {op} with {count} inputs and {wanted or 'no'} argument, "
                         f"got {len(inputs)} inputs and {argument or 'no argument'}")
    allowed = (*ATTRIBUTES, "place") if wanted == "attribute value" else (wanted,)
    if key is not None and key not in allowed:
        raise ValueError(f"expected the argument of {op} to be {' or '.join(map(str, allowed))}, got {key!r}")
    return Program(op, inputs, key, value)


def chain(start: Program = SCENE, **attributes: str | None) -> Program:
    """Filters one after the other; attributes that are None are left out."""
    for key, value in attributes.items():
        if value is not None:
            start = Program("filter", (start,), key, value)
    return start


def the(**attributes: str | None) -> Program:
    """The only object with these attributes."""
    return Program("unique", (chain(SCENE, **attributes),))


def parse(text: str) -> Program:
    """Inverse of `str(program)`."""
    program, rest = _parse(text.strip())
    if rest.strip():
        raise ValueError(f"expected the end of the program, got {rest!r}")
    return program


def _parse(text: str) -> tuple[Program, str]:
    end = next((i for i, c in enumerate(text) if c in "(),"), len(text))
    op, rest = text[:end].strip(), text[end:]
    inputs: list[Program] = []
    argument: dict[str, str] = {}
    if rest.startswith("("):
        rest = rest[1:]
        while True:
            stop = next((i for i, c in enumerate(rest) if c in "(),"), len(rest))
            if "=" in rest[:stop]:
                key, value = rest[:stop].split("=", 1)
                argument[key.strip()] = value.strip()
                rest = rest[stop:]
            else:
                node, rest = _parse(rest.lstrip())
                inputs.append(node)
            rest = rest.lstrip()
            if not rest or rest[0] not in ",)":
                raise ValueError(f"expected ',' or ')' in a program, got {rest[:20]!r}")
            closed, rest = rest[0] == ")", rest[1:]
            if closed:
                break
    return call(op, *inputs, **argument), rest


# -- running ----------------------------------------------------------------------------------------------------------

def run(program: Program, scene: Scene) -> Any:
    """A tuple of objects, an object, an int, a bool or an attribute; raises Undefined."""
    op, inputs, _, value = program
    if op == "scene":
        return scene.objects
    args = [run(p, scene) for p in inputs]
    if op in ("and", "or"):
        return (args[0] and args[1]) if op == "and" else (args[0] or args[1])
    return _RUN[op](scene, program.key if op == "filter" else value, value, *args)


def answer(program: Program, scene: Scene) -> str:
    """The value as text: yes, no, a number word or an attribute."""
    value = run(program, scene)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return NUMBERS[value]
    if isinstance(value, str):
        return TEXTURE_WORDS.get(value) or value
    raise ValueError(f"expected a program whose value is a truth, a number or an attribute, got {program}")


def attribute(obj: Object, name: str, scene: Scene) -> str:
    if name == "place":
        where = place(obj, scene.canvas, 0.02)
        if where is None:
            raise Undefined("a centre lies on the border of two places")
        return where
    return getattr(obj, name)


def _filter(scene: Scene, name: str, value: str, objects: tuple[Object, ...]) -> tuple[Object, ...]:
    return tuple(o for o in objects if attribute(o, name, scene) == value)


def _unique(scene: Scene, _a: Any, _b: Any, objects: tuple[Object, ...]) -> Object:
    if len(objects) != 1:
        raise Undefined(f"unique of {len(objects)} objects")
    return objects[0]


def _certain(a: Object, name: str, b: Object) -> bool:
    truth = relation(a, name, b)
    if truth == "ambiguous":
        raise Undefined(f"{name} is ambiguous")
    return truth == "yes"


def _relate(scene: Scene, name: str, _b: Any, obj: Object) -> tuple[Object, ...]:
    if name not in RELATIONS:
        raise ValueError(f"expected a relation out of {', '.join(RELATIONS)}, got {name!r}")
    return tuple(o for o in scene.objects if o.id != obj.id and _certain(o, name, obj))


def _extreme(scene: Scene, side: str, _b: Any, objects: tuple[Object, ...]) -> Object:
    along_x, along_y = SIDES[side]
    ordered = sorted(objects, key=lambda o: o.x * along_x + o.y * along_y)
    if len(ordered) < 2:
        raise Undefined("extreme needs two objects")
    first, second = ordered[:2]
    gap = (second.x - first.x) * along_x / scene.canvas[0] + (second.y - first.y) * along_y / scene.canvas[1]
    if gap < EXTREME_MARGIN:
        raise Undefined("two objects are nearly level")
    return first


def _bigger(scene: Scene, _a: Any, _b: Any, first: Object, second: Object) -> bool:
    ratio = (first.radius / second.radius) ** 2
    if 1 / AREA_RATIO < ratio < AREA_RATIO:
        raise Undefined("the sizes are too close")
    return ratio >= AREA_RATIO


_RUN: dict[str, Any] = {
    "filter": _filter, "unique": _unique, "relate": _relate, "extreme": _extreme, "bigger": _bigger,
    "same": lambda scene, name, _, obj: tuple(
        o for o in scene.objects if o.id != obj.id and getattr(o, name) == getattr(obj, name)),
    "union": lambda scene, _a, _b, x, y: x + tuple(o for o in y if o not in x),
    "intersect": lambda scene, _a, _b, x, y: tuple(o for o in x if o in y),
    "minus": lambda scene, _a, _b, x, y: tuple(o for o in x if o not in y),
    "count": lambda scene, _a, _b, x: len(x), "exist": lambda scene, _a, _b, x: bool(x),
    "query": lambda scene, name, _, obj: attribute(obj, name, scene),
    "holds": lambda scene, name, _, x, y: _certain(x, name, y),
    "equal": lambda scene, _a, _b, x, y: x == y, "greater": lambda scene, _a, _b, x, y: x > y,
    "less": lambda scene, _a, _b, x, y: x < y, "not": lambda scene, _a, _b, x: not x}


# -- degenerate programs ----------------------------------------------------------------------------------------------

def degenerate(program: Program, scene: Scene) -> bool:
    """Whether a step inside a `unique` is decoration: without it the program has the same answer."""
    value = run(program, scene)
    for shorter in _without(program, False):
        try:
            if run(shorter, scene) == value:
                return True
        except Undefined:
            continue
    return False


def _without(program: Program, inside: bool) -> list[Program]:
    """Every program with one filter or relate under a `unique` left out."""
    out = []
    if inside and program.op == "filter":
        out.append(program.inputs[0])
    if inside and program.op == "relate":
        out.append(SCENE)
    inside = program.op == "unique" or (inside and program.op in ("filter", "intersect"))
    for i, child in enumerate(program.inputs):
        for shorter in _without(child, inside):
            out.append(program._replace(inputs=(*program.inputs[:i], shorter, *program.inputs[i + 1:])))
    return out
