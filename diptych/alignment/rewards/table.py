"""The index of all rewards: a plain table, imported lazily, from which listings, tests and docs are made."""
import difflib
import importlib
from collections.abc import Callable
from typing import Any

from diptych.alignment.rewards.base import Facts, Reward

# name -> "module:Class"; the class states the facts
TABLE: dict[str, str] = {
    "exact": "diptych.alignment.rewards.world:Exact",
    "scene": "diptych.alignment.rewards.world:SceneScore",
    "colors": "diptych.alignment.rewards.world:Colors",
    "answer": "diptych.alignment.rewards.world:Answer",
    "box": "diptych.alignment.rewards.world:Box",
    "caption": "diptych.alignment.rewards.world:Caption",
    "reconstruction": "diptych.alignment.rewards.world:Reconstruction",
    "words": "diptych.alignment.rewards.world:Words",
    "clip-text": "diptych.alignment.rewards.similarity:TextSimilarity",
    "clip-image": "diptych.alignment.rewards.similarity:ImageSimilarity",
    "self-vqa": "diptych.alignment.rewards.questions:SelfQuestions",
    "point-judge": "diptych.alignment.rewards.judges:PointJudge",
    "pair-judge": "diptych.alignment.rewards.judges:PairJudge",
    "format": "diptych.alignment.rewards.judges:Format",
    "tagged": "diptych.alignment.rewards.judges:Tagged",
    "thought": "diptych.alignment.rewards.judges:Thought",
    "combined": "diptych.alignment.rewards.combine:Combined",
    "cached": "diptych.alignment.rewards.cache:Cached",
}


def find(name: str) -> type[Reward]:
    """The class of a reward by its name."""
    if name not in TABLE:
        near = difflib.get_close_matches(name, TABLE, 1, 0.0)
        raise ValueError(f"expected a reward out of {', '.join(TABLE)}, got {name!r}; fix: did you mean {near[0]!r}?")
    module, _, attribute = TABLE[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def make(name: str, **options: Any) -> Reward:
    """A reward with its options: `make("scene", gated=False)`, `make("clip-text")`, `make("self-vqa", model=system)`.
    """
    build: Callable[..., Reward] = find(name)
    return build(**options)


def markdown() -> str:
    """The table of the docs, as the code states it."""
    names = ("name", "measures", "range", "better", "ties", "needs", "cost per answer", "fixed")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name in TABLE:
        facts = find(name).FACTS
        lines.append(f"| `{name}` | {facts.about} | {_number(facts.low)} to {_number(facts.high)} "
                     f"| {'higher' if facts.sign > 0 else 'lower'} | {_yes(facts.ties)} "
                     f"| {', '.join(facts.needs) or '-'} | {_cost(facts)} | {_yes(facts.fixed)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _cost(facts: Facts) -> str:
    if facts.calls:
        return f"{facts.calls:g} network calls"
    return f"{1000 * facts.seconds:g} ms" if facts.seconds else "that of its parts"
