"""Flow-GRPO (arXiv 2505.05470): reinforcement learning of a model that draws by flow, beside a control that copies the
best of the same pictures."""
from dataclasses import replace

from diptych.alignment.recipe import Align, Ask, Grpo
from diptych.alignment.surrogate import Clip
from diptych.objectives.guidance import Guidance
from diptych.replication import measures
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import System
from diptych.training.recipe import Optimizer

ITERATIONS, PROMPTS, GROUP = 30, 8, 8

ABOUT = f"""
Flow-GRPO turns the deterministic sampler of a flow into a stochastic one with known transition densities, draws a group
of pictures for a prompt in few steps, and raises the probability of the steps that led to better ones. Its authors
report that the reward rises far, that a distance to the start model keeps pictures from falling apart, and that few
steps in training are enough for a sampler of many.

The model is the bundled `mini`, asked to draw at once, without placing boxes first: the task it does worst. {PROMPTS}
prompts with {GROUP} pictures each in every one of {ITERATIONS} iterations, drawn in ten stochastic steps without
guidance (the paper has guidance there, at twice the cost). The reward is the partial credit of the exact verifier for
objects, colours and places ("scene"). Measured on other prompts: whether everything is right, which is not the reward,
drawn in ten steps without noise or guidance ("plainly"), and as the model always draws (25 steps, its own guidance);
and the distance of all drawings from true pictures in the vectors of the zoo's contrastive encoder. The control
fine-tunes on the best of every group of as many pictures, with the loss the model was trained with and a tenth of the
rate, for at the same one it forgets how to draw.
"""

RECIPE = Align(
    model="mini", tasks={"draw": Ask(reward="scene", watch=("exact",))}, group=GROUP, prompts=PROMPTS,
    iterations=ITERATIONS, updates=2, micro=16, lr=1e-4, freeze=("codec", "vision"),
    sampling={"evaluations": 10, "stochastic": 0.7, "guidance": {"branches": []}},
    grpo=Grpo(spread="batch", clips={"flow": Clip(low=1e-3, high=1e-3)}),
    optimizer=Optimizer(weight_decay=0.0, betas=(0.9, 0.99)), save_every=10, keep=1)


def measure(system: System, context: Context) -> Measured:
    plain = replace(system.default_sampling(), evaluations=10, guidance=Guidance())
    plainly = measures.suites(system, context, ["draw"], n=300, world="mini", sampling=plain)
    reading = measures.suites(system, context, ["question"], n=200, world="mini")
    return measures.suites(system, context, ["draw"], n=300, world="mini") | {
        "plainly: draw": plainly["draw"], "plainly: FID": plainly["draw: FID"],
        "reading: question": reading["question"]}


STUDY = Study(
    name="flow-grpo",
    title="Flow-GRPO: reinforcement learning of a flow against copying the best samples",
    about=ABOUT,
    recipe=RECIPE,
    arms=(Arm(name="start", about="the model as it was", control=True, fixed=True,
              changes={"iterations": 0}),
          Arm(name="best of group", about="fine-tuned on the best of every group", control=True,
              changes={"method": "best", "lr": 1e-5}),
          Arm(name="grpo", about="Flow-GRPO without a distance to the start"),
          Arm(name="grpo, kl", about="with the exact distance to the start, weight 0.04",
              changes={"grpo.beta": 0.04})),
    claims=(
        Claim(text="drawings get better", metric="plainly: draw", treatment="grpo", control="start"),
        Claim(text="more than by copying the best samples", metric="plainly: draw", treatment="grpo",
              control="best of group"),
        Claim(text="with the distance they get better, too", metric="plainly: draw", treatment="grpo, kl",
              control="start"),
        Claim(text="also with more steps and the guidance that training did without", metric="draw", treatment="grpo",
              control="start"),
        Claim(text="the look of drawings does not fall apart (at most a tenth more distance)", metric="draw: FID",
              better="lower", treatment="grpo", control="start", ratio=True, margin=0.9),
        Claim(text="reading is not lost (two points at most)", metric="reading: question", treatment="grpo",
              control="start", margin=-0.02),
    ),
    measure=measure,
    quick={"prompts": 2, "group": 2, "sampling.evaluations": 3},
    units=dict.fromkeys(("draw", "plainly: draw", "reading: question", "draw: colors shown"), "share"),
)
