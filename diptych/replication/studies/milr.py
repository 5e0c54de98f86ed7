"""MILR (arXiv 2509.22761): does moving hidden states at test time find better pictures than drawing as often anew?"""
from dataclasses import replace
from typing import Any

from diptych.alignment.latent_search import Found, Settings, measure, search
from diptych.alignment.recipe import Align, Ask
from diptych.alignment.rewards.asking import AskSystem
from diptych.alignment.rewards.base import Reward
from diptych.alignment.rewards.questions import SelfQuestions
from diptych.alignment.rewards.table import make
from diptych.objectives.guidance import Guidance
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import System
from diptych.world import tasks

PROMPTS, PICTURES = 48, 8  # of each prompt at most
# The paper moves 20% of plans of some fifty words and 2% of 576 codes; plans here have about eight words, pictures 36
# codes, and the first row of these is a sixth.
SETTINGS = Settings(text_share=0.5, picture_share=1 / 6, rate=0.03, steps=PICTURES - 1)
FAR = 0.2  # a rate at which plans change often
DRAWN = {
    "one picture": replace(SETTINGS, mode="again", steps=0),
    "best of N": replace(SETTINGS, mode="again"),
    "best of N plans": replace(SETTINGS, mode="plans")}
SEARCHES: dict[str, dict[str, Settings]] = {
    "janus": {**DRAWN,
              "random steps": replace(SETTINGS, mode="both", direction="random"),
              "MILR text": replace(SETTINGS, mode="text"),
              "MILR image": replace(SETTINGS, mode="image"),
              "MILR": replace(SETTINGS, mode="both"),
              "MILR, far": replace(SETTINGS, mode="both", rate=FAR)},
    "bagel": {**DRAWN,  # its pictures are no codes, so there is but the plan to move
              "random steps": replace(SETTINGS, mode="text", direction="random"),
              "MILR": replace(SETTINGS, mode="text"),
              "MILR, far": replace(SETTINGS, mode="text", rate=FAR)}}
BY_ITSELF = ("one picture", "best of N", "MILR")  # searches by the model's own judgement
PLAN, ANSWER = 64, 8  # words at most
HEAT = 1.3  # of codes: at the model's own 0.7 nearly every first picture is right

ABOUT = f"""
Two models as they are: "janus" is the bundled `janus-grid`, which plans a box with its label and draws 36 codes, here
at temperature {HEAT} so that it errs; "bagel" the bundled `mini`, which plans boxes and draws by flow, here in ten
evaluations without guidance, so that it errs. Of the first plan and codes can be moved, of the second the plan.

For {PROMPTS} held-out prompts, others for every seed, every search may draw {PICTURES} pictures, the first of which is
the same for all, and ends at the first with a reward above -0.1; the result is the picture of the highest reward. There
are two rewards: the verifier's partial credit ("oracle"), and the model's own answers about its picture ("self"). The
figure is another one: whether the picture is right in everything the suite asks. The oracle has the same eyes, so only
searches by one reward are compared with each other.

MILR moves the states of half of the plan's words and of a sixth of the codes (the first row) by Adam at
{SETTINGS.rate}, the paper's rate, at which plans of narrow models seldom change. Its controls have as many pictures:
all drawn anew under one greedy plan (best of N), drawn anew under plans that are sampled, and steps of the same length
that go anywhere. Pictures are drawn by chance in all of them, so whatever MILR gains over one picture is partly what
drawing again gains.

Reported without a claim: MILR at a rate of {FAR}, at which plans often change; pictures drawn and tokens decided per
prompt, pictures per right one, what the last picture is worth (the published result) and how many numbers were moved.
"""

RECIPE = Align(model="janus-grid", world="grid", tasks={"plan": Ask(reward="scene")}, iterations=0, lr=1e-4)
BAGEL: dict[str, Any] = {"model": "mini", "world": "mini"}


def figures(found: list[Found], name: str) -> dict[str, float]:
    """Of one search: the share of right pictures, and what it took."""
    exact, count = make("exact"), len(found)
    right = sum(score.value for score in measure(found, exact))
    drawn = sum(f.budget.pictures for f in found)
    return {name: right / count, f"{name}, the last": sum(s.value for s in measure(found, exact, last=True)) / count,
            f"{name}, reward": sum(max((r for r in f.rewards if r == r), default=-1.0) for f in found) / count,
            f"{name}, pictures": drawn / count, f"{name}, pictures per right one": drawn / max(right, 1),
            f"{name}, tokens": sum(f.budget.drawn for f in found) / count,
            f"{name}, numbers moved": sum(f.budget.floats for f in found) / count}


def measure_searches(system: System, context: Context) -> Measured:
    first, count = context.seed * PROMPTS, context.items(PROMPTS)
    world, searches = context.recipe.world, SEARCHES[context.arm.name]
    asked = [tasks.document("plan", first + i, split="test", world=world) for i in range(count)]
    own = system.default_sampling()
    if context.arm.name == "bagel":
        own = replace(own, evaluations=10, guidance=Guidance())
    usual = replace(own, text=TextSampling(max_tokens=PLAN), codes=TokenSampling(temperature=HEAT))
    asker = AskSystem(system, sampling=replace(own, text=TextSampling(max_tokens=ANSWER)))
    rewards: dict[str, tuple[Reward, tuple[str, ...]]] = {
        "oracle": (make("scene"), tuple(searches)), "self": (SelfQuestions(asker), BY_ITSELF)}
    out: dict[str, float] = {}
    for judge, (reward, names) in rewards.items():
        for name in names:
            settings = searches[name]
            if context.quick:
                settings = replace(settings, steps=min(settings.steps, 2))
            found = search(system, asked, reward, settings, sampling=usual, seeds=range(first, first + count))
            out |= figures(found, f"{judge}: {name}")
    return out


def _claims(arm: str, judge: str) -> list[Claim]:
    """MILR against one picture and its controls, by one reward and in one family."""
    where = f"({arm}, {judge} reward)"

    def beats(treatment: str, control: str, text: str, margin: float = 0.0) -> Claim:
        return Claim(text=f"{text} {where}", metric=f"{judge}: {treatment}", against=f"{judge}: {control}",
                     treatment=arm, control=arm, margin=margin)

    found = [beats("MILR", "one picture", "MILR finds more right pictures than one drawing"),
             beats("MILR", "best of N", "MILR beats best of N at as many pictures")]
    if judge == "oracle":
        found += [beats("MILR", "best of N plans", "MILR beats best of N plans at as many pictures"),
                  beats("MILR", "random steps", "the reward's direction beats steps that go anywhere")]
        if "MILR image" in SEARCHES[arm]:
            found += [
                beats("MILR", "MILR text", "moving both loses at most 5 points against moving the plan alone", -0.05),
                beats("MILR", "MILR image", "moving both loses at most 5 points against moving codes alone", -0.05)]
    return found


STUDY = Study(
    name="milr",
    title="MILR: moving hidden states at test time, or drawing again",
    about=ABOUT,
    recipe=RECIPE,
    arms=(Arm(name="janus", about="plan and codes can be moved"),
          Arm(name="bagel", about="the plan can be moved", changes=BAGEL)),
    claims=tuple(claim for arm in SEARCHES for judge in ("oracle", "self") for claim in _claims(arm, judge)),
    measure=measure_searches,
    units={f"{judge}: {name}{what}": "share" for judge in ("oracle", "self") for name in SEARCHES["janus"]
           for what in ("", ", the last")},
)
