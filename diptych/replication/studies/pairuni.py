"""PairUni (arXiv 2510.25682): do questions and drawings that belong together pull the weights of a model in more common
directions, and does learning them in pairs help?"""
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from diptych.alignment.pairs import Kind, Pairs, PairSource
from diptych.alignment.recipe import Align, Ask, Grpo
from diptych.replication import measures
from diptych.replication.studies.unirl import FAMILIES, WORLD, as_trained
from diptych.replication.study import Arm, Claim, Context, Family, Measured, Study
from diptych.systems.base import System
from diptych.systems.packed import Packed
from diptych.training.recipe import Optimizer

ITERATIONS, PROMPTS, GROUP = 100, 8, 8
POOL = Pairs(pool=256, clusters=64)
COSINES = 96  # pairs whose gradients are compared

ABOUT = f"""
PairUni trains both tasks of a model on pairs, a question and a drawing of one picture ("aligned") or of two that are
alike ("retrieved"), with advantages weighed by the likeness. Its authors report gradients of the two tasks that agree
about twice as well as those of random pairs, and better results of both; the weights themselves matter little.

Small models of two families, the bundled `janus-grid` and `show-o-grid`. First, without any training: the cosine of the
gradients of both tasks on the trunk, one pair at a time, median of {COSINES} pairs of each kind. Then {ITERATIONS}
steps of GRPO from {PROMPTS // 2} pairs with {GROUP} answers and {GROUP} drawings each, as pairs of both kinds, as the
same documents with partners by chance, and as pairs without weights. The reward of drawings is the partial credit of
the exact verifier, and what is measured is whether all of it is right. As by themselves the models draw nine of ten
rightly, they draw loosely here, in training and when they are measured: Janus at temperature 1.3, Show-o in four steps.
"""

ALIGN = Align(
    model="janus-grid", world=WORLD, tasks={"question": Ask(reward="answer"), "draw": Ask(reward="scene")}, pairs=POOL,
    group=GROUP, prompts=PROMPTS, iterations=ITERATIONS, micro=32, lr=2e-4,
    grpo=Grpo(),
    optimizer=Optimizer(weight_decay=0.01, betas=(0.9, 0.99)), save_every=10, keep=1)


def agreement(system: Packed, kind: Kind, count: int, seed: int) -> float:
    """The median cosine of the gradients of both sides of `count` pairs, over all weights of the trunk."""
    source = PairSource(replace(POOL, kind=kind), WORLD, seed=seed)
    weights = [p for p in system.trunk.parameters() if p.requires_grad]

    def gradient(index: int) -> Tensor:
        batch = system.collate([source.document(index)]).to(system.device)
        losses = system.loss(batch, torch.Generator(system.device).manual_seed(index))
        found = torch.autograd.grad(losses.total(), weights, allow_unused=True)
        return torch.cat([torch.zeros(w.numel()) if g is None else g.flatten().float()
                          for w, g in zip(weights, found, strict=True)])

    cosines = [torch.nn.functional.cosine_similarity(gradient(2 * k), gradient(2 * k + 1), dim=0) for k in range(count)]
    return float(torch.stack(cosines).median())


def measure(system: System, context: Context) -> Measured:
    shown = measures.suites(system, context, ["draw", "question"], n=300, world=WORLD,
                            sampling=as_trained(system, context))
    found = {"drawings right": shown["draw"], "questions right": shown["question"],
             "both": (shown["draw"] + shown["question"]) / 2}
    if context.arm.name.endswith("start"):
        for p in (model := cast(Packed, system)).trunk.parameters():
            p.requires_grad_(True)
        kinds: tuple[Kind, ...] = ("aligned", "retrieved", "random")
        found |= {f"gradients agree: {kind}": agreement(model, kind, context.items(COSINES), context.seed)
                  for kind in kinds}
    return found


def _arms(of: Family) -> list[Arm]:
    return [of.arm("start", "as it was", {"iterations": 0}),
            of.arm("random", "partners by chance", {"pairs.kind": "random"}),
            of.arm("no weights", "pairs, all of weight 1", {"pairs.weight": "none"}, control=False),
            of.arm("pairs", "aligned and retrieved pairs, weighed", control=False)]


def _claims(of: Family) -> list[Claim]:
    return [
        of.claim("gradients of aligned pairs agree better than those of random ones", "gradients agree: aligned",
                 "start", "start", against="gradients agree: random"),
        of.claim("... and those of retrieved pairs", "gradients agree: retrieved", "start", "start",
                 against="gradients agree: random"),
        of.claim("both tasks together gain", "both", "pairs", "start"),
        of.claim("... more than from random pairs", "both", "pairs", "random"),
        of.claim("weights matter little (within two points)", "both", "pairs", "no weights", margin=-0.02)]


STUDY = Study(
    name="pairuni",
    title="PairUni: questions and drawings in pairs",
    about=ABOUT,
    recipe=ALIGN,
    arms=tuple(arm for of in FAMILIES for arm in _arms(of)),
    claims=tuple(claim for of in FAMILIES for claim in _claims(of)),
    measure=measure,
    quick={"prompts": 2, "group": 2, "pairs.pool": 32, "pairs.clusters": 8},
    units=dict.fromkeys(("drawings right", "questions right", "both"), "share"),
)
