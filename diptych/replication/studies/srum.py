"""SRUM (arXiv 2510.12784): a model's own judgement of regions as weights on its own drawings, beside plain fine-tuning
on the same drawings."""
import math
from typing import Any

from diptych.alignment.recipe import Align, Ask
from diptych.alignment.regions import by_questions
from diptych.alignment.self_reward import oracle
from diptych.replication import measures
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import System
from diptych.training.recipe import Optimizer
from diptych.world import tasks

ITERATIONS, PROMPTS = 100, 16

ABOUT = f"""
SRUM lets a unified model judge its own drawings, region by region and as a whole, and trains it on them with these
judgements as weights on the flow matching loss. Its authors report a gain where plain fine-tuning on the same drawings
gains little, most where numbers and places are asked for.

The model is the bundled `mini`, asked to draw at once. {ITERATIONS} steps of {PROMPTS} own drawings, all made by
the model as it was. Its words are few, so it judges in the grammar of the world: it points at objects of the prompt
and answers questions that the prompt decides (`alignment.regions`); weights are those of the released code. Beside it:
the exact verifier as the judge, only regions, only the whole, and scores of 1 and -1 alone. How well the self-judge
agrees with the verifier is measured too, for it bounds what can be gained.
"""

RECIPE = Align(
    model="mini", method="own", offline=True, tasks={"draw": Ask(watch=("scene", "exact"))}, group=1, prompts=PROMPTS,
    iterations=ITERATIONS, lr=1e-4, freeze=("codec", "vision"), save_every=25, keep=1,
    optimizer=Optimizer(weight_decay=0.0, betas=(0.9, 0.95)))


def measure(system: System, context: Context) -> Measured:
    found = measures.suites(system, context, ["draw"], n=300, world="mini")
    found["reading: question"] = measures.suites(system, context, ["question"], n=200, world="mini")["question"]
    if context.arm.name == "start":
        found["the judge: agreement with the verifier"] = agreement(system, context.items(200))
    return found


def agreement(system: System, count: int) -> float:
    """Rank correlation of the self-judge's mark of a drawing with the verifier's."""
    asked = [tasks.document("draw", n, split="test") for n in range(count)]
    made = system.generate([a.prompt() for a in asked], seeds=list(range(count)))
    pairs = [(own, true) for own, m in zip(by_questions(system, made), made, strict=True)
             if own.overall is not None and (true := oracle(m)).overall is not None]
    return spearman([_mark(own) for own, _ in pairs], [_mark(true) for _, true in pairs])


def _mark(judged: Any) -> float:
    scores = [r.score for r in judged.regions] + [judged.overall]
    return sum(scores) / len(scores)


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of ranks, equal values sharing the mean of theirs; 0 where one side says nothing."""
    x, y = _ranks(a), _ranks(b)
    mean = (len(x) + 1) / 2
    top = sum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    down = math.sqrt(sum((p - mean) ** 2 for p in x) * sum((q - mean) ** 2 for q in y))
    return top / down if down else 0.0


def _ranks(values: list[float]) -> list[float]:
    order = sorted(values)
    first = {v: n for n, v in reversed(list(enumerate(order)))}
    last = dict(zip(order, range(len(order)), strict=True))
    return [(first[v] + last[v]) / 2 + 1 for v in values]


STUDY = Study(
    name="srum",
    title="SRUM: own drawings weighed by the model's own judgement of their regions",
    about=ABOUT,
    recipe=RECIPE,
    arms=(Arm(name="start", about="the model as it was", control=True, changes={"iterations": 0}),
          Arm(name="sft", about="the same drawings, all alike", control=True),
          Arm(name="srum", about="weights by the model's own judgement", changes={"regions": {"judge": "questions"}}),
          Arm(name="verifier", about="weights by the exact verifier", changes={"regions": {"judge": "oracle"}}),
          Arm(name="regions only", about="without the whole",
              changes={"regions": {"judge": "questions", "parts": "regions"}}),
          Arm(name="whole only", about="without regions",
              changes={"regions": {"judge": "questions", "parts": "whole"}}),
          Arm(name="sparse", about="scores of 1 and -1",
              changes={"regions": {"judge": "questions", "sparse": True}})),
    claims=(
        Claim(text="judged regions help where plain fine-tuning does not", metric="draw", treatment="srum",
              control="sft"),
        Claim(text="drawings get better than they were", metric="draw", treatment="srum", control="start"),
        Claim(text="an exact judge helps more than the model itself", metric="draw", treatment="verifier",
              control="srum"),
        Claim(text="numbers get better", metric="draw: count", treatment="srum", control="sft"),
        Claim(text="graded scores help more than sparse ones", metric="draw", treatment="srum", control="sparse"),
        Claim(text="reading is not lost (two points at most)", metric="reading: question", treatment="srum",
              control="start", margin=-0.02),
        Claim(text="the model's judgement agrees with the verifier's", metric="the judge: agreement with the verifier",
              treatment="start", margin=0.3),
    ),
    measure=measure,
    quick={"prompts": 2},
    units=dict.fromkeys(("draw", "draw: count", "reading: question", "draw: colors shown"), "share"),
)
