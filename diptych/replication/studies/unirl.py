"""UniRL (arXiv 2505.23380): does asking a model about its own drawings make both its halves better, without pictures
from outside?"""
from typing import Any

from diptych import config
from diptych.alignment.recipe import Align, Ask, Grpo, Link
from diptych.alignment.rewards.questions import SelfQuestions
from diptych.alignment.rewards.table import make
from diptych.replication import measures
from diptych.replication.study import Arm, Claim, Context, Family, Measured, Study
from diptych.systems.base import Sampling, System
from diptych.training.recipe import Optimizer
from diptych.world import tasks

WORLD = "grid"
ITERATIONS, PROMPTS, GROUP = 100, 8, 8
LR, SLOW = 2e-4, 2e-5
ANSWER = 8  # words of an answer at most
# as the models draw by themselves (temperature 0.7, masked codes in twelve steps) nine of ten are right already
LOOSE: dict[str, dict[str, Any]] = {"janus": {"codes": {"temperature": 1.3}},
                                    "show-o": {"codes": {"temperature": 1.0}, "evaluations": 4}}
READY = {"janus": ("codec", "vision"), "show-o": ("codec",)}  # never trained

ABOUT = f"""
UniRL lets a model draw and asks it about its drawing what the prompt decides; whether the answer is right trains the
answer and, in its policy gradient, the drawing. No picture comes from outside. Its authors report better drawings and
halves that fail less often one without the other.

Two small models of different families draw 36 codes of one object. As the bundled `janus-grid` and
`show-o-grid` draw by themselves, nine drawings of ten are right and there is nothing to ask; so they draw loosely here,
Janus code by code at temperature 1.3, Show-o masked codes at temperature 1 in four steps, in training and where
"drawings right" is measured ("as by itself": at the model's own temperature and steps). They make {ITERATIONS} steps
from {PROMPTS} prompts with {GROUP} drawings each and one question about each drawing, which wants more than yes or no:
where the object is, if the prompt says so, else its colour. Controls at as many drawings: only the answer learns
("answers only"), and fine-tuning on the best of every group ("best of group", at a tenth of the rate, for at the same
one it forgets how to draw). Right is what the exact verifier says of other prompts; what the model itself says of its
drawings (by all questions that a prompt decides) is another figure, and a gap that opens between both means that the
model pleases itself; so does a share of right answers about drawings of other prompts that grows. "Imbalance" is the
share of right drawings about which the model's answers are not all right. "Questions right": those that prompts decide
("check"), asked about true pictures.

The supervised form teaches true answers about own drawings, with a gradient that reaches the drawing by
straight-through samples of its codes ("through"); its control is the same without that gradient ("taught answers"). It
needs a model that reads pictures by the codes it draws, so only Show-o has it.
"""

ALIGN = Align(
    model="janus-grid", world=WORLD,
    tasks={"draw": Ask(watch=("scene",), then=(Link(follow="answer", reward="answer"),))},
    group=GROUP, prompts=PROMPTS, iterations=ITERATIONS, micro=32, lr=LR,
    grpo=Grpo(beta=0.04),
    optimizer=Optimizer(weight_decay=0.01, betas=(0.9, 0.99)), save_every=10, keep=1)


def start_of(family: str) -> dict[str, Any]:
    """The model that all arms of a family start from, and how it draws there."""
    return {"model": f"{family}-grid", "freeze": list(READY[family]),
            "sampling": {"text": {"temperature": 1.0, "max_tokens": ANSWER}, **LOOSE[family]}}


def loosely(system: System, family: str) -> Sampling:
    """Drawing so that a bundled model of this family errs."""
    return config.merge(system.default_sampling(), LOOSE[family], "sampling")


def as_trained(system: System, context: Context) -> Sampling:
    """Drawing as in the training of this arm, and the likeliest words."""
    drawing = {k: v for k, v in context.recipe.sampling.items() if k != "text"}
    return config.merge(system.default_sampling(), {**drawing, "text": {"max_tokens": ANSWER}}, "sampling")


def measure(system: System, context: Context) -> Measured:
    sampling = as_trained(system, context)
    found = measures.suites(system, context, ["draw"], n=300, world=WORLD, sampling=sampling)
    own_way = measures.suites(system, context, ["draw"], n=300, world=WORLD)
    checked = [tasks.document("check", n, split="test", world=WORLD) for n in range(context.items(300))]
    answered = make("answer")(checked, system.generate([d.prompt() for d in checked], sampling))
    asked = [tasks.document("draw", n, split="test", world=WORLD) for n in range(context.items(200))]
    made = system.generate([a.prompt() for a in asked], sampling, seeds=list(range(len(asked))))
    own = [s.value for s in SelfQuestions(system)(asked, made)]
    swapped = [s.value for s in SelfQuestions(system)(asked, [*made[1:], made[0]])]
    right = [s.value == 1.0 for s in make("exact")(asked, made)]
    known = [v for v, r in zip(own, right, strict=True) if r]
    return {"drawings right": found["draw"], "drawings right, as by itself": own_way["draw"],
            "questions right": sum(s.value for s in answered) / len(answered),
            "drawings, by the model itself": sum(own) / len(own),
            "drawings of others, by the model itself": sum(swapped) / len(swapped),
            "imbalance": sum(v < 1.0 for v in known) / max(len(known), 1)}


FAMILIES = tuple(Family(name, start_of(name)) for name in LOOSE)


def _arms(of: Family) -> list[Arm]:
    asked = {"follow": "answer", "reward": "answer"}
    fixed = {"tasks": {"draw": {"watch": ["scene"], "learn": False, "then": [asked]}}}
    found = [of.arm("start", "as it was", {"iterations": 0}, fixed=True),
             of.arm("answers only", "the answer learns, the drawing does not", fixed),
             of.arm("best of group", "fine-tuned on the best of every group", {"method": "best", "lr": SLOW}),
             of.arm("grpo", "drawings and answers learn", control=False)]
    if of.name == "show-o":
        through = {"method": "through"}
        found += [of.arm("taught answers", "true answers about own drawings", {**through, **fixed}),
                  of.arm("through", "the same, with a gradient to the drawing", through, control=False)]
    return found


def _claims(of: Family) -> list[Claim]:
    right, apart = "drawings right", "imbalance"
    found = [of.claim("drawings get better without pictures from outside", right, "grpo", "start"),
             of.claim("... also as the model draws by itself", "drawings right, as by itself", "grpo", "start"),
             of.claim("more than where only answers learn", right, "grpo", "answers only"),
             of.claim("more than by copying the best samples", right, "grpo", "best of group"),
             of.claim("reading is not lost (two points at most)", "questions right", "grpo", "start", margin=-0.02),
             of.claim("the halves fail less often one without the other", apart, "grpo", "start", better="lower")]
    if of.name == "show-o":
        found += [of.claim("true answers make drawings better where their gradient reaches them", right, "through",
                           "taught answers"),
                  of.claim("... and the halves fail less often one without the other", apart, "through",
                           "taught answers", better="lower")]
    return found


STUDY = Study(
    name="unirl",
    title="UniRL: asked about its own drawings",
    about=ABOUT,
    recipe=ALIGN,
    arms=tuple(arm for of in FAMILIES for arm in _arms(of)),
    claims=tuple(claim for of in FAMILIES for claim in _claims(of)),
    measure=measure,
    quick={"prompts": 2, "group": 2},
    units=dict.fromkeys(("drawings right", "drawings right, as by itself", "questions right", "imbalance",
                         "drawings, by the model itself", "drawings of others, by the model itself"), "share"),
)
