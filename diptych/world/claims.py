"""Questions that the claims of a prompt decide, whatever picture is made after it: each has one answer for every
picture that is as the prompt says (UniRL, arXiv 2505.23380, asks a model such questions about its own drawings).
"""
from typing import NamedTuple

from diptych.world.language import NUMBERS, article, phrase
from diptych.world.questions import WORDINGS
from diptych.world.sample import find_world
from diptych.world.scene import WorldConfig
from diptych.world.spec import Item, Spec

ATTRIBUTES = ("color", "shape", "size", "texture")
SLOTS = WORDINGS["train"]


class Ask(NamedTuple):
    """`item`: number of the one item of the prompt that it is about."""

    kind: str
    text: str
    answer: str
    item: int | None = None


def questions(spec: Spec, world: WorldConfig | str = "mini") -> list[Ask]:
    """What the claims of a prompt decide: whether there is such an object, how many, which colour the only one of a
    shape has, where it is, how two of them stand; and one object that must not be there."""
    found: list[Ask] = []
    for n, item in enumerate(spec.items):
        words = item_words(item)
        found.append(Ask("exist", SLOTS["exist"][0].format(a=f"{article(words)} {words}"), "yes", n))
        if spec.closed and _alone(item, spec):
            many = phrase(color=item.color, shape=item.shape, size=item.size, texture=item.texture, count=2)
            found.append(Ask("count", SLOTS["count"][0].format(many=many), NUMBERS[item.count], n))
        if item.color and item.shape and item.count == 1 and _alone(Item(shape=item.shape), spec, item):
            found.append(Ask("color", SLOTS["color"][0].format(the=f"the {item.shape}"), item.color, n))
        if item.place and item.count == 1 and _alone(item, spec):
            found.append(Ask("place", SLOTS["place"][0].format(the=f"the {words}"), item.place, n))
    for a, name, b in spec.relations:
        pair = [spec.items[i] for i in (a, b)]
        if all(i.count == 1 and _alone(i, spec) for i in pair):
            one, other = (f"the {item_words(i)}" for i in pair)
            found.append(Ask("relation", SLOTS["holds"][0].format(a=one, name=name, b=other), "yes"))
    absent = _absent(spec, world)
    if absent is not None:
        words = item_words(absent)
        found.append(Ask("absent", SLOTS["exist"][0].format(a=f"{article(words)} {words}"), "no"))
    return found


def _stated(item: Item) -> dict[str, str]:
    return {n: v for n in ATTRIBUTES if (v := getattr(item, n)) is not None}


def item_words(item: Item) -> str:
    """ "large red circle" """
    return phrase(color=item.color, shape=item.shape, size=item.size, texture=item.texture)


def _may_match(a: Item, b: Item) -> bool:
    """Whether an object of b may fit the words of a."""
    return all(getattr(b, n) in (None, v) for n, v in _stated(a).items())


def _alone(words: Item, spec: Spec, own: Item | None = None) -> bool:
    """Whether nothing but the objects of its item (which surely do) fits the words."""
    own = words if own is None else own
    return not any(_may_match(words, other) for other in spec.items if other is not own)


def _absent(spec: Spec, world: WorldConfig | str) -> Item | None:
    """An object of another colour than the first item's, that no item may be."""
    first = next((i for i in spec.items if i.color and i.shape), None)
    if first is None or not spec.closed:
        return None
    names = find_world(world).colors
    start = names.index(first.color) if first.color in names else 0
    for k in range(1, len(names)):
        other = Item(color=names[(start + k) % len(names)], shape=first.shape)
        if not any(_may_match(other, item) for item in spec.items):
            return other
    return None
