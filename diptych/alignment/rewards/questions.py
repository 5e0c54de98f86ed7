"""Self-VQA: the model answers questions about what it drew (UniRL, arXiv 2505.23380). The questions and their answers
follow from the prompt's claims alone, so no true picture is needed; what the model believes is not what is there, so
the world's verifier belongs beside it.
"""
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from diptych.alignment.rewards.asking import Asker, asker, question
from diptych.alignment.rewards.base import Facts, Failure, Rating, Reward
from diptych.document import Document, Image
from diptych.systems.base import System
from diptych.world.language import NUMBERS, article, phrase
from diptych.world.questions import WORDINGS
from diptych.world.sample import find_world
from diptych.world.spec import Item, Spec

ATTRIBUTES = ("color", "shape", "size", "texture")
SLOTS = WORDINGS["train"]


class Ask(NamedTuple):
    """`item`: number of the one item of the prompt that it is about."""

    kind: str
    text: str
    answer: str
    item: int | None = None


def questions(asked: Document) -> list[Ask]:
    """What the claims of a prompt of the world decide: whether there is such an object, how many, which colour the only
    one of a shape has, where it is, how two of them stand; and one object that must not be there."""
    if "spec" not in asked.meta:
        raise ValueError("expected the claims of the prompt in the meta, got none; fix: documents of "
                         "diptych.world.tasks have them, or pass questions of your own")
    spec = Spec.from_dict(asked.meta["spec"])
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
    absent = _absent(spec, asked.meta.get("world", "mini"))
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


def _absent(spec: Spec, world: str) -> Item | None:
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


class SelfQuestions(Reward):
    """The share of right answers, each equal up to spaces at the ends; `parts` has the share of each kind. `most`
    questions per drawing: the first ones, beginning at another one for every prompt (UniRL asks one)."""

    FACTS = Facts(name="self-vqa", about="share of questions about its own drawing that the model answers rightly",
                  low=0.0, high=1.0, needs=("truth", "model"), calls=4, fixed=False)

    def __init__(self, model: System | Asker, ask: Callable[[Document], list[Ask]] = questions,
                 most: int | None = None) -> None:
        if most is not None and most < 1:
            raise ValueError(f"expected at least 1 question, got {most}")
        self.model, self.ask, self.most = asker(model, fixed=False), ask, most

    @property
    def facts(self) -> Facts:
        return self.FACTS if self.most is None else replace(self.FACTS, calls=float(self.most))

    def options(self) -> dict[str, Any]:
        return {"model": self.model.name, "most": self.most}

    def chosen(self, asked: Document) -> list[Ask]:
        found = self.ask(asked)
        if self.most is None or len(found) <= self.most:
            return found
        start = int(asked.meta.get("index", 0)) % len(found)
        return [*found[start:], *found[:start]][:self.most]

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        rows: list[tuple[int, Ask, Document]] = []
        for i, (a, m) in enumerate(zip(asked, made, strict=True)):
            drawn = [p for p in m.of(Image) if p.target]
            rows += [(i, q, question(q.text, drawn[-1:])) for q in (self.chosen(a) if drawn else ())]
        replies = self.model([document for *_, document in rows]) if rows else []
        right: dict[int, list[tuple[str, bool]]] = {i: [] for i in range(len(made))}
        lost: dict[int, str] = {}
        for (i, q, _), reply in zip(rows, replies, strict=True):
            if isinstance(reply, Failure):
                lost[i] = reply.reason
            else:
                right[i].append((q.kind, reply.strip() == q.answer))
        return [Failure(lost[i]) if i in lost else _share(found) for i, found in right.items()]


def _share(found: Sequence[tuple[str, bool]]) -> Rating | Failure:
    if not found:
        return Failure("no drawing, or nothing to ask about it")
    parts = {kind: [held for k, held in found if k == kind] for kind in dict.fromkeys(k for k, _ in found)}
    return Rating(sum(held for _, held in found) / len(found), {k: sum(v) / len(v) for k, v in parts.items()})
