"""SRUM (arXiv 2510.12784): a model's own judgement of regions as weights on its own drawings, beside plain fine-tuning
on the same drawings."""
import math
from dataclasses import replace
from typing import Any

from diptych import config
from diptych.alignment.recipe import Align, Ask
from diptych.alignment.regions import by_questions
from diptych.alignment.self_reward import oracle
from diptych.objectives.guidance import Guidance
from diptych.replication import measures
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import Sampling, System
from diptych.training.recipe import Optimizer
from diptych.world import tasks

ITERATIONS, PROMPTS = 100, 16
DRAWN = {"evaluations": 10}  # steps of a drawing, with the model's own guidance

ABOUT = f"""
SRUM lets a unified model judge its own drawings, region by region and as a whole, and trains it on them with these
judgements as weights on the flow matching loss. Its authors report a gain where plain fine-tuning on the same drawings
gains little, most where numbers and places are asked for.

The model is the bundled `mini`, asked to draw at once, in {DRAWN["evaluations"]} steps with its own guidance. It draws
{ITERATIONS * PROMPTS:,} prompts as it was, once for all arms of a seed, and judges them once; every arm makes
{ITERATIONS} steps of {PROMPTS} of these drawings. Its words are few, so it judges in the grammar of the world: it
points at objects of the prompt and answers questions that the prompt decides (`alignment.regions`). Weights are those
of the released code, where a bad region counts as much as the background; "signed" are those of the paper, which push
away from it, held where the loss keeps a bound. Beside them: the exact verifier as the judge, only regions, only the
whole, and scores of 1 and -1 alone. How well the self-judge agrees with the verifier is measured too, for it bounds
what can be gained. "Plainly" is without guidance. One family only: the models of codes here cannot point at what they
see.
"""

RECIPE = Align(
    model="mini", method="own", offline=True, tasks={"draw": Ask(watch=("scene", "exact"))}, group=1, prompts=PROMPTS,
    sampling=DRAWN, iterations=ITERATIONS, lr=3e-5, freeze=("codec", "vision"), save_every=25, keep=1,
    optimizer=Optimizer(weight_decay=0.0, betas=(0.9, 0.95)))


def measure(system: System, context: Context) -> Measured:
    way = config.merge(system.default_sampling(), DRAWN, "sampling")
    found = measures.suites(system, context, ["draw"], n=300, world="mini", sampling=way)
    plainly = measures.suites(system, context, ["draw"], n=300, world="mini",
                              sampling=replace(way, guidance=Guidance()))
    found["plainly: draw"] = plainly["draw"]
    found["reading: question"] = measures.suites(system, context, ["question"], n=200, world="mini")["question"]
    if context.arm.name == "start":
        found["the judge: agreement with the verifier"] = agreement(system, way, context.items(200))
    return found


def agreement(system: System, way: Sampling, count: int) -> float:
    """Rank correlation of the self-judge's mark of a drawing with the verifier's."""
    asked = [tasks.document("draw", n, split="test") for n in range(count)]
    made = system.generate([a.prompt() for a in asked], way, seeds=list(range(count)))
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
    arms=(Arm(name="start", about="the model as it was", control=True, fixed=True,
              changes={"iterations": 0}),
          Arm(name="sft", about="the same drawings, all alike", control=True),
          Arm(name="srum", about="weights by the model's own judgement", changes={"regions": {"judge": "questions"}}),
          Arm(name="signed", about="the weights of the paper, which push away from what is bad",
              changes={"regions": {"judge": "questions", "mode": "paper_signed"}}),
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
        Claim(text="... also drawn without guidance", metric="plainly: draw", treatment="srum", control="start"),
        Claim(text="an exact judge helps more than the model itself", metric="draw", treatment="verifier",
              control="srum"),
        Claim(text="numbers get better", metric="draw: count", treatment="srum", control="sft"),
        Claim(text="graded scores help more than sparse ones", metric="draw", treatment="srum", control="sparse"),
        Claim(text="regions and the whole help more than regions alone", metric="draw", treatment="srum",
              control="regions only"),
        Claim(text="... and than the whole alone", metric="draw", treatment="srum", control="whole only"),
        Claim(text="pushing away from what is bad helps more than weighing it as the background", metric="draw",
              treatment="signed", control="srum"),
        Claim(text="reading is not lost (two points at most)", metric="reading: question", treatment="srum",
              control="start", margin=-0.02),
        Claim(text="the model's judgement agrees with the verifier's", metric="the judge: agreement with the verifier",
              treatment="start", margin=0.3),
    ),
    measure=measure,
    quick={"prompts": 2},
    units=dict.fromkeys(("draw", "plainly: draw", "draw: count", "reading: question", "draw: colors shown"), "share"),
)
