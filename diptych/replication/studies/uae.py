"""UAE (arXiv 2509.09666): does a model that is rewarded for drawing a picture again from its own words say more about
it, and is that because the drawing needs it?"""
from dataclasses import replace
from typing import Any

from diptych.alignment.recipe import Align, Ask, Grpo, Link
from diptych.objectives.next_token import TextSampling
from diptych.replication import measures
from diptych.replication.study import Arm, Claim, Context, Family, Measured, Study
from diptych.systems.base import System
from diptych.training.recipe import Optimizer

WORLD = "grid"
ITERATIONS, PROMPTS, GROUP = 30, 8, 8
WORDS = 24  # of a caption at most; a full one has 15
SAID = {"temperature": 1.0, "max_tokens": WORDS}
FAMILIES = tuple(Family(name, {"model": f"{name}-grid"}) for name in ("janus", "show-o"))

ABOUT = f"""
UAE takes describing a picture and drawing it as the two halves of an auto-encoder: a model is rewarded for captions
from which it draws the picture again. Its authors report that captions grow and say more, without being asked to, and
that drawings gain.

The bundled `janus-grid` and `show-o-grid` (36 codes, one object at one of nine places) have learnt to draw after full
captions and after short ones, to answer questions, and to caption: nine of ten captions are short ("a red circle"), one
is full ("a large red circle at the top left , on a white background"). Then {ITERATIONS} steps from {PROMPTS} pictures
with {GROUP} captions each, every one drawn again from its words alone. The reward is the likeness of both scenes for
the exact verifier; only the caption learns ("captions"), or caption and drawing ("both", the paper's form for one model
that says and draws in tokens). The control fine-tunes on as many own captions, all alike. Measured by Unified-Bench on
held-out pictures, with captions drawn at temperature 1: whether all of the scene is right in the picture drawn again,
the similarity of both in the zoo's contrastive encoder, and which facts the captions tell. The claims about right
pictures were added when the figures of two seeds were known, for the encoder turned out hardly to see places.

The confound: captions may grow because GRPO favours long ones, or what the drawing half was taught with, whatever they
say. So an arm has the same reward where the drawing is never told the places that its caption names: there full
captions are of no more use than short ones, and should not become more frequent.
"""

CAPTION = {"watch": ["caption", "words"]}
ALIGN = Align(
    model="janus-grid", world=WORLD, tasks={"caption-short": Ask(watch=("caption", "words"), then=(
        Link(follow="redraw", reward="reconstruction", learn=False),))},
    group=GROUP, prompts=PROMPTS, iterations=ITERATIONS, micro=32, lr=2e-4, freeze=("codec",),
    sampling={"text": SAID}, grpo=Grpo(beta=1e-6), optimizer=Optimizer(weight_decay=0.0), save_every=10, keep=1)


def measure(system: System, context: Context) -> Measured:
    own = system.default_sampling()
    shown = measures.suites(system, context, ["unified"], n=300, world=WORLD,
                            sampling=replace(own, text=TextSampling(temperature=1.0, max_tokens=WORDS)))
    shown |= measures.suites(system, context, ["question", "draw"], n=300, world=WORLD,
                             sampling=replace(own, text=TextSampling(max_tokens=8)))
    return {"similarity": shown["unified: mean CLIP similarity"], "drawn again rightly": shown["unified"],
            "words": shown["unified: mean words"], "facts told": shown["unified: mean facts told"],
            "places told": shown["unified: mean place told"], "drawings right": shown["draw"],
            "questions right": shown["question"]}


def _task(**link: Any) -> dict[str, Any]:
    return {"tasks": {"caption-short": {**CAPTION, "then": [{"reward": "reconstruction", **link}]}}}


def _arms(of: Family) -> list[Arm]:
    return [of.arm("start", "as it was", {"iterations": 0}, fixed=True),
            of.arm("own captions", "fine-tuned on as many own captions", {"method": "own"}),
            of.arm("captions", "captions learn", control=False),
            of.arm("unplaced", "captions learn, the drawing is not told places",
                   _task(follow="redraw-unplaced", learn=False)),
            of.arm("both", "captions and drawings learn", _task(follow="redraw"), control=False)]


def _claims(of: Family) -> list[Claim]:
    return [of.claim("captions grow by half or more without being asked to", "words", "captions", "start", ratio=True,
                     margin=1.5),
            of.claim("they tell more of what is there", "facts told", "captions", "own captions"),
            of.claim("more pictures are drawn again rightly", "drawn again rightly", "captions", "start"),
            of.claim("... also than after fine-tuning on own captions", "drawn again rightly", "captions",
                     "own captions"),
            of.claim("pictures drawn again are more alike to the encoder", "similarity", "captions", "start"),
            of.claim("where the drawing learns, too, more are drawn again rightly", "drawn again rightly", "both",
                     "captions"),
            of.claim("... and they are more alike to the encoder", "similarity", "both", "captions"),
            of.claim("and other drawings get better", "drawings right", "both", "start"),
            of.claim("questions are answered no worse (two points at most)", "questions right", "captions", "start",
                     margin=-0.02),
            of.claim("captions grow more than where the drawing is not told places", "words", "captions", "unplaced")]


STUDY = Study(
    name="uae",
    title="UAE: captions that a picture can be drawn from",
    about=ABOUT,
    recipe=ALIGN,
    arms=tuple(arm for of in FAMILIES for arm in _arms(of)),
    claims=tuple(claim for of in FAMILIES for claim in _claims(of)),
    measure=measure,
    quick={"prompts": 2, "group": 2},
    units=dict.fromkeys(("drawn again rightly", "facts told", "places told", "drawings right", "questions right"),
                        "share"),
)
