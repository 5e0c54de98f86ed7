"""Visual DPO (arXiv 2305.18290 for codes, 2311.12908 for flows): is preferring the best of own drawings over the worst
better than copying the best?"""
import json

from diptych.alignment.recipe import Align, Ask
from diptych.replication import measures
from diptych.replication.studies.unirl import FAMILIES as CODED
from diptych.replication.studies.unirl import as_trained
from diptych.replication.study import Arm, Claim, Context, Family, Measured, Study
from diptych.systems.base import System
from diptych.training.recipe import Optimizer

ITERATIONS, PROMPTS, GROUP = 30, 8, 8
LAST = 5  # iterations that say how well pairs are told apart

ABOUT = f"""
Direct preference optimisation of drawings: of {GROUP} to every prompt the best is preferred over the worst, by the
partial credit of the exact verifier. Of codes (the bundled `janus-grid`, code by code; `show-o-grid`, masked) the
likelihood is the sum over the decisions that made the drawing; of flows (`mini`) it is minus half the squared error at
a time and noise that both of a pair share. {ITERATIONS} steps from {PROMPTS} prompts each; the reference is the model
as it was. The control copies the best of every group, with the loss of training, from as many drawings. A third arm has
a hundredth of the weight of the reference, at which likelihoods of both should fall.

Drawing is made loose, for as the models draw by themselves there is little to prefer: codes at temperature 1.3 one by
one, masked ones at temperature 1 in four steps, flows in ten without guidance. Measured on other prompts, drawn in the
same way: whether everything is right, which is not the reward; the loss of held-out true drawings, which says how far
the model has gone from them; and the share of pairs of the last {LAST} steps that the model tells apart by its implicit
reward. Not measured: true pictures over own ones (the pairs of VARGPT-v1.1), and bits of scales.
"""

ALIGN = Align(
    model="janus-grid", world="grid", method="dpo", tasks={"draw": Ask(reward="scene", watch=("exact",))}, group=GROUP,
    prompts=PROMPTS, iterations=ITERATIONS, micro=16, lr=1e-4, freeze=("codec", "vision"),
    optimizer=Optimizer(weight_decay=0.0), save_every=10, keep=1)
BETA = {"janus": 0.1, "show-o": 0.1, "bagel": 100.0}
SLOW = {"janus": 2e-5, "show-o": 2e-5, "bagel": 1e-5}  # of the control: at the rate of dpo it forgets how to draw
MINI = {"model": "mini", "world": "mini", "sampling": {"evaluations": 10, "guidance": {"branches": []}}}
FAMILIES = (*CODED, Family("bagel", MINI))


def measure(system: System, context: Context) -> Measured:
    world = context.recipe.world
    found = measures.suites(system, context, ["draw"], n=300, world=world, sampling=as_trained(system, context))
    losses = measures.held_out_losses(system, context, ["draw"], n=256, world=world)
    lines = context.folder / "run" / "metrics.jsonl"
    told = [json.loads(line) for line in lines.read_text("utf-8").splitlines()] if lines.is_file() else []
    out = {"drawings right": found["draw"], "loss of true drawings": losses["draw/image"]}
    if context.recipe.method == "dpo":
        apart = [line["accuracy"] for line in told[-LAST:] if "accuracy" in line]
        out["pairs told apart"] = sum(apart) / len(apart) if apart else 0.5  # of no pair as many as by chance
    return out


def _arms(of: Family) -> list[Arm]:
    beta = BETA[of.name]
    return [of.arm("start", "as it was", {"iterations": 0}, fixed=True),
            of.arm("best of group", "fine-tuned on the best of every group", {"method": "best", "lr": SLOW[of.name]}),
            of.arm("dpo", f"beta {beta:g}", {"dpo.beta": beta}, control=False),
            of.arm("dpo, loose", f"beta {beta / 100:g}", {"dpo.beta": beta / 100})]


def _claims(of: Family) -> list[Claim]:
    return [of.claim("drawings get better", "drawings right", "dpo", "start"),
            of.claim("more than by copying the best", "drawings right", "dpo", "best of group"),
            of.claim("two thirds of pairs are told apart", "pairs told apart", "dpo", margin=2 / 3),
            of.claim("held closely to the start it stays nearer to true drawings", "loss of true drawings", "dpo",
                     "dpo, loose", better="lower")]


STUDY = Study(
    name="dpo-visual",
    title="DPO of drawings: the best over the worst, or the best alone",
    about=ABOUT,
    recipe=ALIGN,
    arms=tuple(arm for of in FAMILIES for arm in _arms(of)),
    claims=tuple(claim for of in FAMILIES for claim in _claims(of)),
    measure=measure,
    quick={"prompts": 2, "group": 2},
    units=dict.fromkeys(("drawings right", "pairs told apart"), "share"),
)
