"""MILR (arXiv 2509.22761): does moving hidden states at test time find better pictures than drawing as often anew?"""
from dataclasses import replace

from diptych.alignment.latent_search import Found, Settings, measure, search
from diptych.alignment.rewards.asking import AskSystem
from diptych.alignment.rewards.base import Reward
from diptych.alignment.rewards.questions import SelfQuestions
from diptych.alignment.rewards.table import make
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import System
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.world import tasks

WORLD = "bare"  # one large object on white, near the middle of one of nine places
STEPS, BATCH = 400, 32
PROMPTS, PICTURES = 48, 8  # of each prompt at most
# The paper moves 20% of plans of some fifty words and 2% of 576 codes; plans here have eight words, pictures 64 codes.
SETTINGS = Settings(text_share=0.5, picture_share=0.125, rate=0.03, steps=PICTURES - 1)
FAR = 0.2  # a rate at which plans change often
SEARCHES = {
    "one picture": replace(SETTINGS, mode="again", steps=0),
    "best of N": replace(SETTINGS, mode="again"),
    "best of N plans": replace(SETTINGS, mode="plans"),
    "random steps": replace(SETTINGS, mode="both", direction="random"),
    "MILR text": replace(SETTINGS, mode="text"),
    "MILR image": replace(SETTINGS, mode="image"),
    "MILR": replace(SETTINGS, mode="both"),
    "MILR, far": replace(SETTINGS, mode="both", rate=FAR)}
JUDGES = {"oracle": tuple(SEARCHES), "self": ("one picture", "best of N", "MILR")}
CODES = TokenSampling(temperature=0.7)
GUIDANCE = Guidance(branches=(Branch(context="no_text", scale=1.5),))
PLAN, ANSWER = 24, 4  # words at most
BOOK = 64  # codes of the tokenizer

ABOUT = f"""
A small model plans a box with its label, then draws 64 codes; it also learns to answer questions about pictures. Then
it stays as it is. The tokenizer of pictures is the zoo's with a codebook of {BOOK} for this world, shared by all.

For {PROMPTS} held-out prompts every search may draw {PICTURES} pictures, the first of which is the same for all, and
ends at the first with a reward above -0.1; the result is the picture of the highest reward. There are two rewards: the
verifier's partial credit ("oracle"), and the model's own answers about its picture ("self"). The figure is another one:
whether the picture is right in everything the suite asks. The oracle has the same eyes, so only searches by one reward
are compared with each other.

MILR moves the states of half of the plan's words and of an eighth of the codes (the first row) by Adam at
{SETTINGS.rate}, the paper's rate, at which plans of so narrow a model seldom change. Its controls have as many
pictures: all drawn anew under one greedy plan (best of N), drawn anew under plans that are sampled, and steps of the
same length that go anywhere. Codes are sampled in all of them, so whatever MILR gains over one picture is partly what
drawing again gains. Plans were right almost always when this was tried out, on training prompts: there is little to
find in them.

Reported without a claim: MILR at a rate of {FAR}, at which plans often change; pictures drawn and tokens decided per
prompt, pictures per right one, what the last picture is worth (the published result) and how many numbers were moved.
"""

OPTIMIZER = Optimizer(kind="muon", weight_decay=0.01, betas=(0.9, 0.98))
TOKENIZER = Recipe(
    system="code-tokenizer",
    size="small",
    config={"codec": {"quantizer": {"codebook": {"values": BOOK}}}},
    init={f"codec.{part}": f"zoo/vq#{part}" for part in ("encoder", "decoder", "quant_conv", "post_quant_conv")},
    data=(Source(world=WORLD, tasks={"draw": 1}),),
    stages=(Stage(steps=160, batch=32, lr=2e-3, warmup=10, schedule="cosine", floor=0.02),),
    optimizer=OPTIMIZER, ema=0.98, precision="bf16", log_every=20, save_every=160, threads=2, workers=1)

RECIPE = Recipe(
    system="janus",
    size="small",
    config={"block": {"width": 128, "heads": 4, "kv_heads": 4, "head_dim": 32, "hidden": 320}, "depth": 4,
            "codec": TOKENIZER.config["codec"], "variant": "paper"},
    init={"codec": "@codes#codec", "vision": "zoo/clip#vision"},
    data=(Source(world=WORLD, tasks={"plan": 6, "question": 2}),),
    stages=(Stage(steps=STEPS, batch=BATCH, lr=3e-3, warmup=20, schedule="cosine", floor=0.02,
                  freeze=("codec", "vision")),),
    optimizer=OPTIMIZER,
    ema=0.98,
    precision="bf16",
    log_every=20,
    save_every=STEPS,
    threads=2,
    workers=1,
)

EMU3 = {"system": "emu3", "init": {"codec": "@codes#codec"}, "stages.0.freeze": ["codec"],
        "config": {key: value for key, value in RECIPE.config.items() if key != "variant"}}


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
    asked = [tasks.document("plan", i, split="test", world=WORLD) for i in range(context.items(PROMPTS))]
    seeds = range(len(asked))
    usual = replace(system.default_sampling(), codes=CODES, guidance=GUIDANCE, text=TextSampling(max_tokens=PLAN))
    asker = AskSystem(system, sampling=replace(usual, text=TextSampling(max_tokens=ANSWER)))
    rewards: dict[str, Reward] = {"oracle": make("scene"), "self": SelfQuestions(asker)}
    out: dict[str, float] = {}
    for judge, names in JUDGES.items():
        for name in names:
            settings = SEARCHES[name]
            if context.quick:
                settings = replace(settings, steps=min(settings.steps, 2))
            found = search(system, asked, rewards[judge], settings, sampling=usual, seeds=seeds)
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
                  beats("MILR", "random steps", "the reward's direction beats steps that go anywhere"),
                  beats("MILR", "MILR text", "moving both loses at most 5 points against moving the plan alone", -0.05),
                  beats("MILR", "MILR image", "moving both loses at most 5 points against moving codes alone", -0.05)]
    return found


STUDY = Study(
    name="milr",
    title="MILR: moving hidden states at test time, or drawing again",
    about=ABOUT,
    recipe=RECIPE,
    shared={"codes": TOKENIZER},
    arms=(Arm(name="janus", about="features to read and codes to draw with, two heads"),
          Arm(name="emu3", about="one vocabulary of words and codes, one head", changes=EMU3)),
    claims=tuple(claim for arm in ("janus", "emu3") for judge in JUDGES for claim in _claims(arm, judge)),
    measure=measure_searches,
    quick={"stages.0.batch": 4, "threads": 1, "workers": 0},
    units={f"{judge}: {name}{what}": "share" for judge, names in JUDGES.items() for name in names
           for what in ("", ", the last")},
)
