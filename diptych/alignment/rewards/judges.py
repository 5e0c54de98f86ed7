"""Reward models: a vision-language model is asked for a score or for the better of two (UnifiedReward, arXiv
2503.05236), or what it thinks before it says so (UnifiedReward-Think, arXiv 2505.03318).

    PointJudge    one answer at a time; the range is that of the template
    PairJudge     every answer against others to the same; the share of comparisons it wins, a tie counts half
    Format        1 where thoughts and answer stand in their tags
    Tagged        1 where the answer in its tags is the true one
    Thought       the sum of both, as UnifiedReward-Think is trained

A model prefers a place: pairs are shown in both orders, and verdicts that disagree are a tie.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diptych.alignment.rewards import verdicts
from diptych.alignment.rewards.asking import Asker, Reply, asker, question
from diptych.alignment.rewards.base import Facts, Failure, Rating, Reward, groups
from diptych.benchmarks.world import said
from diptych.document import Document, Image, Text
from diptych.systems.base import System
from diptych.world import judging


@dataclass(frozen=True, kw_only=True)
class Template:
    """What a judge is asked. `of`: drawings, stories in pictures, or answers about given pictures. `text` has places
    {prompt} and, for answers, {answer} or {first} and {second}. `low`, `high`: the range that the text states; `read`:
    reply -> score, or 1, 2 or 0 for a tie, None where it does not say."""

    name: str
    of: Literal["drawings", "stories", "answers"]
    text: str
    read: Callable[[str], float | None]
    low: float = 0.0
    high: float = 1.0

    def ask(self, asked: Document, *made: Document) -> Document:
        """The question about one answer or two."""
        words = [p.text or "" for p in asked.of(Text) if not p.target]
        places = {"prompt": words[-1] if words else ""}
        if self.of == "drawings":
            return question(self.text.format(**places), [_drawings(m)[-1] for m in made])
        if self.of == "stories":
            return question(self.text.format(**places), [p for m in made for p in _drawings(m)])
        places |= {"answer": said(made[0])} if len(made) == 1 else {"first": said(made[0]), "second": said(made[1])}
        shown = [p for p in asked.of(Image) if not p.target]
        return question(self.text.format(**places), shown)


def _drawings(made: Document) -> list[Image]:
    drawn = [p for p in made.of(Image) if p.target]
    if not drawn:
        raise ValueError("expected a drawing to judge, got a document without; fix: a template of answers")
    return drawn


_DRAWN = "You are shown {0} for this description: \"{{prompt}}\". Judge how well {1} what is described, and how good " \
         "{2}. "
_ONE, _TWO = _DRAWN.format("a picture drawn", "it shows", "it looks"), _DRAWN.format(
    "two pictures drawn", "each shows", "each looks")
_REPLIED = "You are shown a picture and {0} to this question about it: \"{{prompt}}\". Judge accuracy, completeness, " \
           "clarity and relevance. "


def _thought(text: str) -> int | None:
    """The verdict in its tags, of a reply that has both."""
    return verdicts.pair(verdicts.answer(text)) if verdicts.well_formed(text) else None


def _of_world(kind: str, mode: str) -> Template:
    """As the documents of the task of this name ask: for judges that were trained on the world."""
    of: dict[str, Literal["drawings", "stories", "answers"]] = {"draw": "drawings", "story": "stories",
                                                                "answer": "answers"}
    text, name = judging.REQUESTS[kind][mode], f"world-{kind}-{mode}"
    if mode == "point":
        low, high = judging.LOW, judging.HIGH
        return Template(name=name, of=of[kind], text=text, low=low, high=high,
                        read=lambda t: verdicts.point(t, low, high))
    return Template(name=name, of=of[kind], text=text, read=verdicts.pair if mode == "pair" else _thought)


TEMPLATES: dict[str, Template] = {t.name: t for t in (
    Template(name="draw-point", of="drawings", low=1, high=5, read=lambda t: verdicts.point(t, 1, 5),
             text=_ONE + "List the key elements as \"element (type): 0 or 1\". Then end with \"Final Score: \" and a "
                         "number from 1 to 5."),
    Template(name="draw-pair", of="drawings", read=verdicts.pair,
             text=_TWO + "End with \"Image 1 is better\", \"Image 2 is better\" or \"Both images are equally good\"."),
    Template(name="draw-think", of="drawings", read=_thought,
             text=_TWO + "Between <think> and </think> give each picture 1 to 10 for semantic consistency, aesthetics "
                         "and authenticity, with reasons, then \"Total score:\" with both sums. Then say \"Image 1 is "
                         "better\" or \"Image 2 is better\" between <answer> and </answer>."),
    Template(name="answer-point", of="answers", low=0, high=100, read=lambda t: verdicts.point(t, 0, 100),
             text=_REPLIED.format("an answer") + "The answer: \"{answer}\". End with \"Final Score: \" and a number "
                                                  "from 0 to 100."),
    Template(name="answer-pair", of="answers", read=verdicts.pair,
             text=_REPLIED.format("two answers") + "Answer 1: \"{first}\". Answer 2: \"{second}\". End with \"Overall "
                                                    "Judgment: Answer X is better.\""),
    *(_of_world(kind, mode) for kind in judging.KINDS for mode in judging.MODES),
)}


def find_template(name: str | Template) -> Template:
    if isinstance(name, Template):
        return name
    if name not in TEMPLATES:
        raise ValueError(f"expected a template out of {', '.join(TEMPLATES)}, got {name!r}")
    return TEMPLATES[name]


class _Judge(Reward):
    def __init__(self, model: System | Asker | str | Path, template: str | Template) -> None:
        self.ask, self.template = asker(model), find_template(template)

    def options(self) -> dict[str, Any]:
        return {"judge": self.ask.name, "template": self.template.name, "text": self.template.text}

    @property
    def measures(self) -> frozenset[str]:
        return frozenset({f"{self.facts.name} {self.ask.name}"})

    def read(self, reply: Reply) -> float | Failure:
        if isinstance(reply, Failure):
            return reply
        found = self.template.read(reply)
        return Failure(f"a reply of another form: {reply[-80:]!r}") if found is None else found


class PointJudge(_Judge):
    FACTS = Facts(name="point-judge", about="the score that a reward model gives", low=1.0, high=5.0, needs=("model",),
                  calls=1)

    def __init__(self, model: System | Asker | str | Path, template: str | Template = "draw-point") -> None:
        super().__init__(model, template)

    @property
    def facts(self) -> Facts:
        return replace(self.FACTS, low=self.template.low, high=self.template.high, fixed=self.ask.fixed)

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        replies = self.ask([self.template.ask(a, m) for a, m in zip(asked, made, strict=True)])
        scores = [self.read(r) for r in replies]
        return [s if isinstance(s, Failure) else Rating(float(s)) for s in scores]


class PairJudge(_Judge):
    """`opponents`: how many others each answer meets in a group of answers to the same (None: all of them).
    `undecided`: whether a tie, or two orders that disagree, is half a win for both, or no comparison at all."""

    FACTS = Facts(name="pair-judge", about="share of comparisons with other answers that a reward model lets it win",
                  low=0.0, high=1.0, needs=("model", "group"), calls=2, fixed=False)

    def __init__(self, model: System | Asker | str | Path, template: str | Template = "draw-pair",
                 opponents: int | None = None, undecided: Literal["half", "dropped"] = "half") -> None:
        super().__init__(model, template)
        if opponents is not None and opponents < 1:
            raise ValueError(f"expected at least 1 opponent, got {opponents}")
        if undecided not in ("half", "dropped"):
            raise ValueError(f"expected undecided half or dropped, got {undecided!r}")
        self.opponents, self.undecided = opponents, undecided

    def options(self) -> dict[str, Any]:
        return super().options() | {"opponents": self.opponents, "undecided": self.undecided}

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        meetings = [pair for group in groups(asked) for pair in _meetings(group, self.opponents)]
        outcomes = self.compare([(asked[i], made[i], made[j]) for i, j in meetings])
        points: dict[int, list[float]] = {i: [] for i in range(len(made))}
        for (i, j), outcome in zip(meetings, outcomes, strict=True):
            if outcome is not None and not (outcome == 0.5 and self.undecided == "dropped"):
                points[i].append(outcome)
                points[j].append(1 - outcome)
        return [Rating(sum(p) / len(p), {"meetings": float(len(p)), "ties": p.count(0.5) / len(p)}) if p else
                Failure("no verdict: no other answer to the same, or no comparison that was decided")
                for p in points.values()]

    def compare(self, rows: Sequence[tuple[Document, Document, Document]]) -> list[float | None]:
        """What was asked and two answers -> 1 where the first wins, 0 the second, 0.5 a tie or two verdicts that
        disagree; None where neither order has a verdict."""
        asked = [self.template.ask(a, *order) for a, x, y in rows for order in ((x, y), (y, x))]
        found = [self.read(r) for r in (self.ask(asked) if asked else [])]
        out: list[float | None] = []
        for forth, back in zip(found[::2], found[1::2], strict=True):
            # of the first answer, in either place
            said = [{0: 0.5, own: 1.0}.get(int(v), 0.0) for v, own in ((forth, 1), (back, 2))
                    if not isinstance(v, Failure)]
            out.append(sum(said) / len(said) if said else None)
        return [0.5 if v is not None and 0 < v < 1 else v for v in out]


def _meetings(group: Sequence[int], opponents: int | None) -> list[tuple[int, int]]:
    """Pairs of a group, each once: all, or everyone with the next so many in a circle."""
    count = len(group)
    most = count - 1 if opponents is None else min(opponents, count - 1)
    found = {tuple(sorted((i, (i + d) % count))) for i in range(count) for d in range(1, most + 1)}
    return [(group[i], group[j]) for i, j in sorted(found)]


class Format(Reward):
    FACTS = Facts(name="format", about="thoughts and answer of a text in their tags, 0 or 1", low=0.0, high=1.0,
                  seconds=0.00005)

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        return [Rating(float(verdicts.well_formed(said(m)))) for m in made]


class Tagged(Reward):
    """The true answer is `answer` in the meta of what was asked, or the text of its target."""

    FACTS = Facts(name="tagged", about="the answer in its tags (or a whole text without) is the true one, 0 or 1",
                  low=0.0, high=1.0, needs=("truth",), seconds=0.00005)

    def __init__(self, lenient: bool = False) -> None:
        self.lenient = lenient

    def options(self) -> dict[str, Any]:
        return {"lenient": self.lenient}

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        out: list[Rating | Failure] = []
        for a, m in zip(asked, made, strict=True):
            true = a.meta.get("answer") or next((p.text for p in a.of(Text) if p.target), None)
            right = None if true is None else verdicts.accurate(said(m), true, lenient=self.lenient)
            out.append(Failure("no true answer to compare with") if right is None else Rating(float(right)))
        return out


class Thought(Reward):
    """`parts` also has "supported": whether the totals in the thoughts speak for the verdict, which is not rewarded."""

    FACTS = Facts(name="thought", about="one for thoughts and answer in their tags, one for the true answer", low=0.0,
                  high=2.0, needs=("truth",), seconds=0.0001)

    def __init__(self, lenient: bool = False) -> None:
        self.form, self.truth = Format(), Tagged(lenient)

    def options(self) -> dict[str, Any]:
        return self.truth.options()

    @property
    def measures(self) -> frozenset[str]:
        return frozenset({"thought", *self.form.measures, *self.truth.measures})

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        out: list[Rating | Failure] = []
        for form, truth, m in zip(self.form.rate(asked, made), self.truth.rate(asked, made), made, strict=True):
            if isinstance(form, Failure) or isinstance(truth, Failure):
                out.append(truth if isinstance(truth, Failure) else form)
                continue
            parts = {"format": form.value, "accuracy": truth.value,
                     "supported": float(verdicts.supported(said(m)) is True)}
            out.append(Rating(form.value + truth.value, parts))
        return out
