"""Descriptions of scenes, with what exactly they claim, and the way back from a canonical caption to its claims.

All text is lower case with single spaces; punctuation marks are words of their own. Every description is true with
the margins of the three-valued predicates.
"""
from collections.abc import Sequence

from diptych.world.sample import Stream
from diptych.world.scene import BACKGROUNDS, COLORS, PLACES, RELATIONS, SHAPES, SIZES, Object, Scene, place, relation
from diptych.world.spec import Item, Spec

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
TEXTURE_WORDS = {"solid": "", "hstripe": "horizontally striped", "vstripe": "vertically striped",
                 "checker": "checkered", "outline": "outlined"}
LEVELS = ("short", "long", "structured")
TEMPLATES = ("train", "held_out")

# Wordings; those under "held_out" never occur in training.
CAPTION_REQUESTS = {"train": ("describe the picture", "what is in the picture ?", "caption this image",
                              "describe every object"),
                    "held_out": ("tell me what you see", "give a full description of this image")}
DRAW_REQUESTS = {"train": ("{}", "draw {}", "paint {}", "please draw {}", "a picture of {}",
                           "an image with {}", "make a picture that shows {}"),
                 "held_out": ("create a drawing of {}", "i would like to see {}")}
PLAN_REQUESTS = {"train": ("plan first , then draw {}", "plan the places , then draw {}", "first plan , then paint {}"),
                 "held_out": ("think about the layout before you draw {}",)}
LAYOUT_REQUESTS = {"train": ("draw this layout", "draw the objects in these boxes", "paint these boxes"),
                   "held_out": ("fill this layout with the objects",)}
BACKGROUND_PHRASES = {"train": ("{} on a {} background", "{} , on a {} background", "{} . the background is {}"),
                      "held_out": ("{} in front of a {} background",)}


# -- words ------------------------------------------------------------------------------------------------------------

def article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def phrase(*, color: str | None = None, shape: str | None = None, size: str | None = None, texture: str | None = None,
           count: int = 1) -> str:
    """The words of a description without article: "large red circle", "blue objects"."""
    noun = shape or "object"
    words = (size, color, TEXTURE_WORDS[texture] if texture else None, noun if count == 1 else plural(noun))
    return " ".join(w for w in words if w)


def item_phrase(item: Item) -> str:
    """With article or number and place: "two large red circles", "a blue square at the top left"."""
    words = phrase(color=item.color, shape=item.shape, size=item.size, texture=item.texture, count=item.count)
    text = f"{article(words)} {words}" if item.count == 1 else f"{NUMBERS[item.count]} {words}"
    return text if item.place is None else f"{text} at the {item.place}"


def conjunction(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else " , ".join(phrases[:-1]) + " and " + phrases[-1]


def label(obj: Object) -> str:
    """Of a box: "large red circle"."""
    return phrase(color=obj.color, shape=obj.shape, size=obj.size, texture=obj.texture)


def reading_order(scene: Scene) -> list[Object]:
    """By the 3x3 cells row by row, then from left to right."""
    width, height = scene.canvas
    return sorted(scene.objects, key=lambda o: (min(o.y * 3 // height, 2), min(o.x * 3 // width, 2), o.x, o.y))


# -- captions ---------------------------------------------------------------------------------------------------------

def caption_spec(scene: Scene) -> Spec:
    """Everything the canonical caption claims: one item per object in reading order, and the background."""
    items = (Item(color=o.color, shape=o.shape, size=o.size, texture=o.texture, place=place(o, scene.canvas))
             for o in reading_order(scene))
    return Spec(items=tuple(items), background=scene.background)


def caption(scene: Scene) -> str:
    """The canonical long caption: a function of what is in the picture.

    "a large red circle at the top left , a medium blue star at the center , on a white background". Solid objects
    are those without a texture word.
    """
    return " , ".join([*map(item_phrase, caption_spec(scene).items), f"on a {scene.background} background"])


def parse_caption(text: str) -> Spec | None:
    """The claims of a canonical caption, or None where the text is not one. Tolerates case and joined commas."""
    *parts, last = (p.split() for p in text.lower().replace(".", " ").split(","))
    if len(last) != 4 or last[:2] != ["on", "a"] or last[3] != "background" or last[2] not in BACKGROUNDS or not parts:
        return None
    items = [_parse_item(words) for words in parts]
    return None if None in items else Spec(items=tuple(i for i in items if i is not None), background=last[2])


def _parse_item(words: list[str]) -> Item | None:
    text = " ".join(words)
    head, found, where = text.partition(" at the ")
    if not found or where not in PLACES or words[0] not in ("a", "an"):
        return None
    *middle, shape = head.split()[1:] or [""]
    if len(middle) < 2 or middle[0] not in SIZES or middle[1] not in COLORS or shape not in SHAPES:
        return None
    textures = {w: t for t, w in TEXTURE_WORDS.items()}
    texture = textures.get(" ".join(middle[2:]))
    if texture is None:
        return None
    return Item(color=middle[1], shape=shape, size=middle[0], texture=texture, place=where)


def same_claims(a: Spec, b: Spec) -> bool:
    """Equal up to the order of the items; relations are compared only if the items are in the same order."""
    if a.background != b.background or sorted(map(repr, a.items)) != sorted(map(repr, b.items)):
        return False
    return a.items != b.items or set(a.relations) == set(b.relations)


# -- descriptions of other levels and prompts for drawing -------------------------------------------------------------

def grouped(objects: Sequence[Object], *, sizes: bool = False) -> list[tuple[Item, list[Object]]]:
    """Objects that share their stated attributes become one item."""
    groups: dict[tuple[str, str, str | None, str], list[Object]] = {}
    for o in objects:
        groups.setdefault((o.color, o.shape, o.size if sizes else None, o.texture), []).append(o)
    return [(Item(count=len(g), color=c, shape=s, size=z, texture=t), g) for (c, s, z, t), g in groups.items()]


def brief(scene: Scene, rng: Stream) -> tuple[str, Spec]:
    """What there is and how many, without sizes, places and background, and its claims: "two red circles and a star".
    """
    items = [item for item, _ in grouped(rng.shuffled(scene.objects))]
    return conjunction([item_phrase(i) for i in items]), Spec(items=tuple(_open(i) for i in items))


def describe(scene: Scene, level: str, rng: Stream, template: str = "train") -> tuple[str, Spec]:
    """A description and its claims: "short" (what and how many), "long" (everything), "structured" (line format)."""
    if level == "short":
        text, spec = brief(scene, rng)
        head = {"train": ("{}", "a picture with {}", "the picture shows {}"), "held_out": ("you can see {}",)}[template]
        return rng.choice(head).format(text), spec
    spec = caption_spec(scene)
    if level == "structured":
        lines = [f"{label(o)} : {place(o, scene.canvas)}" for o in reading_order(scene)]
        return " ; ".join([*lines, f"background : {scene.background}"]), spec
    if level != "long":
        raise ValueError(f"expected level to be one of {', '.join(LEVELS)}, got {level!r}")
    spec = Spec(items=tuple(rng.shuffled(spec.items)), background=spec.background)
    sentences = [rng.choice(_SENTENCES[template]).format(item_phrase(i)) for i in spec.items]
    return " . ".join([*sentences, f"the background is {spec.background}"]), spec


_SENTENCES = {"train": ("there is {}", "it shows {}", "{}"), "held_out": ("you can see {}",)}




def _open(item: Item) -> Item:
    """The claim of a wording without a texture word: any texture."""
    if item.texture != "solid":
        return item
    return Item(count=item.count, color=item.color, shape=item.shape, size=item.size, place=item.place)


PROMPT_STYLES = {"short": 0.3, "sized": 0.2, "placed": 0.25, "relation": 0.25}  # shares among prompts


def draw_prompt(scene: Scene, rng: Stream, template: str = "train") -> tuple[str, Spec]:
    """The objects of a drawing prompt and what they claim, without the request around them (see `request`)."""
    style = rng.weighted(PROMPT_STYLES)
    made = _related(scene, rng) if style == "relation" else None
    if made is None:
        sizes = style == "sized" or (style != "short" and rng.chance(0.5))
        if style == "placed":
            items = [Item(color=o.color, shape=o.shape, size=o.size if sizes else None, texture=o.texture,
                          place=place(o, scene.canvas)) for o in rng.shuffled(scene.objects)]
        else:
            items = [item for item, _ in grouped(rng.shuffled(scene.objects), sizes=sizes)]
        made = conjunction([item_phrase(i) for i in items]), items, ()
    text, items, relations = made
    background = scene.background if rng.chance(0.5) else None
    if background is not None:
        text = rng.choice(BACKGROUND_PHRASES[template]).format(text, background)
    return text, Spec(items=tuple(_open(i) for i in items), relations=tuple(relations), background=background)


def _related(scene: Scene, rng: Stream) -> tuple[str, list[Item], tuple[tuple[int, str, int], ...]] | None:
    """ "two red circles left of a blue square , and a green star": one relation that holds for every pair, or None."""
    groups = rng.shuffled(grouped(rng.shuffled(scene.objects), sizes=rng.chance(0.3)))
    for i, (_, subjects) in enumerate(groups):
        for j, (other, objects) in enumerate(groups):
            if i == j or other.count > 1:
                continue
            for name in RELATIONS:
                if all(relation(a, name, b) == "yes" for a in subjects for b in objects):
                    rest = [item for k, (item, _) in enumerate(groups) if k not in (i, j)]
                    items = [groups[i][0], other, *rest]
                    text = f"{item_phrase(items[0])} {name} {item_phrase(items[1])}"
                    if rest:
                        text = f"{text} , and {conjunction([item_phrase(r) for r in rest])}"
                    return text, items, ((0, name, 1),)
    return None


def request(table: dict[str, tuple[str, ...]], text: str, rng: Stream, template: str = "train") -> str:
    """Wrap a text into one of the requests of a table."""
    return rng.choice(table[template]).format(text)
