"""Self-VQA: the model answers questions about what it drew (UniRL, arXiv 2505.23380). The questions and their answers
follow from the prompt's claims alone, so no true picture is needed; what the model believes is not what is there, so
the world's verifier belongs beside it.
"""
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from diptych.alignment.rewards.asking import Asker, asker, question
from diptych.alignment.rewards.base import Facts, Failure, Rating, Reward
from diptych.document import Document, Image
from diptych.systems.base import System
from diptych.world import claims
from diptych.world.claims import Ask
from diptych.world.spec import Spec


def questions(asked: Document) -> list[Ask]:
    """What the claims of a prompt of the world decide, see `world.claims`."""
    if "spec" not in asked.meta:
        raise ValueError("expected the claims of the prompt in the meta, got none; fix: documents of "
                         "diptych.world.tasks have them, or pass questions of your own")
    return claims.questions(Spec.from_dict(asked.meta["spec"]), asked.meta.get("world", "mini"))


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
