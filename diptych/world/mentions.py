"""What free words about a scene mention: objects with what is said of each, and the background. Unlike `parse_caption`
it reads any wording of the world's descriptions and prompts, in parts and out of order; what it does not know it leaves
out, and relations between objects are not read.

    "two red circles left of a large blue star at the top . the background is white"
    -> Item(count=2, color red, shape circle), Item(large blue star, place top); white
"""
import re

from diptych.world.language import NUMBERS, TEXTURE_WORDS, plural
from diptych.world.scene import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES
from diptych.world.spec import Item, Spec

MOST = 64  # objects that a text can mention: longer lists are cut
_TEXTURES = {words: name for name, words in TEXTURE_WORDS.items() if words}


def _any(words: object) -> str:
    return "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))  # type: ignore[call-overload]


_NOUNS = {form: None if noun == "object" else noun for noun in (*SHAPES, "object") for form in (noun, plural(noun))}
_ITEM = re.compile(
    rf"\b(?:(?P<count>an?|{_any(NUMBERS)})\s+)?(?:(?P<size>{_any(SIZES)})\s+)?(?:(?P<color>{_any(COLORS)})\s+)?"
    rf"(?:(?P<texture>{_any(_TEXTURES)})\s+)?(?P<noun>{_any(_NOUNS)})\b"
    rf"(?:\s*(?:at\s+the|:)\s+(?P<place>{_any(PLACES)})\b)?")
_BACKGROUND = re.compile(rf"\b(?P<before>{_any(BACKGROUNDS)})\s+background\b"
                         rf"|\bbackground\s*(?:is|:)\s*(?P<behind>{_any(BACKGROUNDS)})\b")


def mentioned(text: str) -> Spec:
    """The items and the background of a text, in its order. "the objects" alone is no item: something must be said."""
    words = " ".join(text.lower().split())
    items: list[Item] = []
    for found in _ITEM.finditer(words):
        part = found.groupdict()
        number = part["count"]
        count = NUMBERS.index(number) if number in NUMBERS else 1
        item = Item(count=count, color=part["color"], shape=_NOUNS[part["noun"]], size=part["size"],
                    texture=_TEXTURES.get(part["texture"] or ""), place=part["place"])
        if count and item != Item(count=count):
            items.append(item)
        if sum(i.count for i in items) >= MOST:
            break
    ground = _BACKGROUND.search(words)
    background = None if ground is None else ground["before"] or ground["behind"]
    return Spec(items=tuple(items), background=background, closed=False)
