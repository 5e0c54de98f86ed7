"""UniGame (arXiv 2511.19413): does a model that plays against a perturber of its own features, and learns from its own
hard drawings, answer better, stand attacks better and agree more with itself than by fine-tuning on the same questions?
On two families: codes drawn one by one (the bundled `janus-grid`), and latents drawn by flow (`mini`).
"""
from collections.abc import Sequence
from typing import Any, cast

from diptych.alignment import adversary
from diptych.alignment.adversary import Game, Mining
from diptych.alignment.game import Contest, Digging, Rival, attack
from diptych.alignment.rewards.questions import SelfQuestions
from diptych.alignment.rewards.world import SceneScore
from diptych.document import Document
from diptych.replication.measures import suites
from diptych.replication.study import Arm, Claim, Context, Family, Measured, Study
from diptych.systems.base import System
from diptych.systems.packed import Packed
from diptych.training.recipe import Lora, Optimizer
from diptych.world import tasks

ITERATIONS, BATCH, HARD = 40, 16, 6
ATTACK_STEPS, ASKED, DRAWN = 40, 300, 64
RIVAL = Rival(relative=True, hidden=128, eps_max=0.5, eps_start=0.25, lr=3e-2)

RECIPE = Contest(
    model="mini", game=Game(), rival=RIVAL, batch=BATCH, iterations=ITERATIONS, lr=2e-4,
    digging=Digging(every=4, count=2, by="caption", similarity="scene", batch=HARD,
                    mining=Mining(tau=0.75, quantile=0.25), sampling={"plan": False}),
    lora=Lora(layers=("trunk",), rank=16, alpha=32.0), optimizer=Optimizer(weight_decay=0.0, betas=(0.9, 0.99)),
    save_every=1000, keep=1)

FAMILIES = (Family("janus", {"model": "janus-grid", "world": "grid"}),
            Family("bagel", {"digging.sampling": {"evaluations": 8, "plan": False}}))


# -- measuring --------------------------------------------------------------------------------------------------------

def measure(system: System, context: Context) -> Measured:
    model, world = cast(Packed, system), context.recipe.world
    questions = [tasks.document("question", i, world=world) for i in range(context.items(256))]
    rival = attack(model, questions, RIVAL, steps=2 if context.quick else ATTACK_STEPS, seed=context.seed)
    clean = suites(model, context, ["question"], n=ASKED, world=world)["question"]
    with adversary.perturbed(model, rival, "see"):
        attacked = suites(model, context, ["question"], n=ASKED, world=world)["question"]
    asked = [tasks.document("draw", i, split="test", world=world) for i in range(context.items(DRAWN))]
    made = model.generate([d.prompt() for d in asked], seeds=list(range(len(asked))))
    return {"questions right": clean, "questions right under attack": attacked, "lost to the attack": clean - attacked,
            "agreement with itself": mean_of(SelfQuestions(model, most=3), asked, made),
            "scene score of drawings": mean_of(SceneScore(), asked, made)}


def mean_of(reward: Any, asked: Sequence[Document], made: Sequence[Document]) -> float:
    """Of those that the reward can judge."""
    values = [score.value for score in reward(asked, made) if score.value == score.value]
    if not values:
        raise ValueError(f"expected {reward.facts.name} to judge some of {len(asked)} drawings, got none")
    return sum(values) / len(values)


# -- the study --------------------------------------------------------------------------------------------------------

def _arms(of: Family) -> list[Arm]:
    return [
        of.arm("start", "the model as it was", {"iterations": 0}),
        of.arm("sft", "the second step of an iteration repeats questions that were asked before", {"hard": "seen"}),
        of.arm("random", "noise of the largest radius in the perturber's place", {"rival.kind": "random"}),
        of.arm("features", "no drawings: the second step learns the questions as they are perturbed",
               {"hard": "features"}),
        of.arm("unigame", "the whole game", control=False)]


def _claims(of: Family) -> list[Claim]:
    what = {"sft": "fine-tuning", "random": "random perturbations", "features": "no drawings"}
    figures = (("questions right under attack", "more answers hold under attack"),
               ("agreement with itself", "it agrees more with its own drawings"))
    return [
        of.claim("more questions are answered rightly than by fine-tuning", "questions right", "unigame", "sft"),
        *(of.claim(f"{text} than with {what[control]}", metric, "unigame", control)
          for metric, text in figures for control in what),
        of.claim("drawing is not lost (at most two points)", "scene score of drawings", "unigame", "start",
                 margin=-0.02)]


ABOUT = f"""
A model answers questions about pictures; a perturber of their features learns to make that hard; the model draws what
it would be asked about under that perturber; drawings that are right and hard to answer about go to a buffer, from
which it learns. Every arm has {ITERATIONS} iterations of two steps of a LoRA: the first on {BATCH} new questions as
they are, the second on {HARD} others, in which the arms differ. A drawing is asked for by a full caption of the
question's picture and kept only if the exact verifier finds three quarters of it, so that the answer stays true more
often than not. Radii are shares of the norm of a feature: the perturber's begins at {RIVAL.eps_start} and stays below
{RIVAL.eps_max}.

The attack is a fresh perturber with that largest radius, which learns for {ATTACK_STEPS} steps against the finished
model on training questions; questions are held-out ones. Agreement: the model draws held-out prompts and answers
questions about its own drawings; the prompt decides what is right. The models are the bundled `janus-grid`, as Janus,
which answers six of ten questions of its small world, and `mini`, as BAGEL, which answers nearly every question of its
own already: what that can gain is under attack.
"""

STUDY = Study(
    name="unigame", title="UniGame: a model that plays against its own features",
    about=ABOUT, recipe=RECIPE, measure=measure,
    arms=tuple(arm for of in FAMILIES for arm in _arms(of)),
    claims=tuple(claim for of in FAMILIES for claim in _claims(of)),
    quick={"batch": 2, "digging.batch": 2, "digging.count": 1, "digging.mining.tau": 0.0},
    units={name: "share" for name in ("questions right", "questions right under attack", "lost to the attack",
                                      "agreement with itself", "scene score of drawings")})
