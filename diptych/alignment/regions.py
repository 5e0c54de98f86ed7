"""How the tokens of a model's own drawings are weighed when it learns from them (SRUM, arXiv 2510.12784).

The judge is the model as it was. A published model writes its judgement in the words of `self_reward.judge`; models of
the world answer in its grammar instead: of every object of the prompt they say where it is (its region), and questions
that the prompt decides give the scores, 2 m - 1 with m the share that is answered as the prompt has it. Whether and in
which colour an object is there scores its region; numbers, places and relations score the whole. `oracle` is the
world's verifier on the regions that its perception finds.
"""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from diptych.alignment.answer_cache import AnswerCache
from diptych.alignment.reward_map import LAMBDA, Mode, Region
from diptych.alignment.rewards.asking import AskSystem, question
from diptych.alignment.rewards.base import Failure
from diptych.alignment.rewards.questions import questions
from diptych.alignment.self_reward import Judged, emphasis, judge, oracle, own_boxes, seen_boxes
from diptych.document import Document, Image, Text
from diptych.systems.base import System
from diptych.systems.packed import Packed
from diptych.world.claims import Ask, item_words
from diptych.world.refer import REQUESTS
from diptych.world.spec import Spec

OF_A_REGION = ("exist", "color")  # kinds of questions


@dataclass(frozen=True, kw_only=True)
class Regions:
    """`judge`: "questions", "words" (as published) or "oracle". `parts`: the scores of the regions, of the whole, or
    both; `sparse` makes every score 1 or -1."""

    judge: Literal["questions", "words", "oracle"] = "questions"
    mode: Mode = "released"
    strength: float = LAMBDA
    parts: Literal["both", "regions", "whole"] = "both"
    sparse: bool = False

    def weigh(self, model: System, system: System, made: Sequence[Document], cache: AnswerCache | None = None
              ) -> list[tuple[Document, Tensor]]:
        """The drawings with a judgement by `model` that says something, and factors (n,) on the errors of their tokens.
        Judgements that are in the `cache` are not made again."""
        if not isinstance(system, Packed):
            raise ValueError(f"expected a system that weighs the tokens of a picture, got {type(system).__name__}")
        judged = cache.judged(made, self.judge, lambda: self.judged(model, made)) if cache else self.judged(model, made)
        found = [self._cut(j) for j in judged]
        return [(m, emphasis(system, m, j, mode=self.mode, strength=self.strength))
                for m, j in zip(made, found, strict=True) if j.usable]

    def judged(self, model: System, made: Sequence[Document]) -> list[Judged]:
        if self.judge == "oracle":
            return [oracle(m) for m in made]
        if self.judge == "questions":
            return by_questions(model, made)
        return judge(model, made, [seen_boxes(m) for m in made])

    def _cut(self, judged: Judged) -> Judged:
        def sharp(score: float) -> float:
            return (1.0 if score > 0 else -1.0) if self.sparse else score

        if judged.overall is None:
            return judged
        if self.parts == "whole":
            return replace(judged, regions=(), overall=sharp(judged.overall))
        regions = tuple(replace(r, score=sharp(r.score)) for r in judged.regions)
        return replace(judged, regions=regions, overall=sharp(judged.overall) if self.parts == "both" else 1.0)


def by_questions(model: System, made: Sequence[Document]) -> list[Judged]:
    """Judgements by a model of the world. Only objects that the prompt has one of get a region; a drawing of which no
    question concerns the whole is as good as its regions."""
    ask = AskSystem(model, fixed=False)
    rows = [(n, q) for n, m in enumerate(made) for q in questions(m)]
    replies = ask([question(q.text, _drawings(made[n])) for n, q in rows])
    found: list[list[tuple[Ask, bool]]] = [[] for _ in made]
    for (n, q), reply in zip(rows, replies, strict=True):
        if not isinstance(reply, Failure):
            found[n].append((q, reply.strip() == q.answer))
    specs = [Spec.from_dict(m.meta["spec"]) for m in made]
    places = [(n, k) for n, spec in enumerate(specs) for k, item in enumerate(spec.items) if item.count == 1]
    wanted = [REQUESTS["train"][0].format(f"the {item_words(specs[n].items[k])}") for n, k in places]
    boxes = own_boxes(model, [made[n] for n, _ in places], wanted, 1)
    regions: list[list[Region]] = [[] for _ in made]
    for (n, k), own in zip(places, boxes, strict=True):
        score = _score([held for q, held in found[n] if q.item == k and q.kind in OF_A_REGION])
        if own and score is not None:
            regions[n].append(Region(box=own[0], score=score, name=item_words(specs[n].items[k])))
    out = []
    for n, m in enumerate(made):
        whole = _score([held for q, held in found[n] if q.kind not in OF_A_REGION])
        whole = _score([held for _, held in found[n]]) if whole is None else whole
        words = next((p.text or "" for p in m.of(Text) if not p.target), "")
        out.append(Judged(prompt=words, regions=tuple(_by_area(regions[n])), overall=whole))
    return out


def _drawings(made: Document) -> list[Image]:
    return [p for p in made.of(Image) if p.target][-1:]


def _by_area(regions: Sequence[Region]) -> list[Region]:
    return sorted(regions, key=lambda r: -(r.box[2] - r.box[0]) * (r.box[3] - r.box[1]))


def _score(held: Sequence[bool]) -> float | None:
    """A whole of exactly 0 would be taken for one that could not be read."""
    return (2 * sum(held) / len(held) - 1 or 1e-6) if held else None
