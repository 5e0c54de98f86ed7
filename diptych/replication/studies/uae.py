"""UAE (arXiv 2509.09666): does a model that is rewarded for drawing a picture again from its own words say more about
it, and is that because the drawing needs it?"""
from dataclasses import replace
from typing import Any

from diptych.alignment.recipe import Align, Ask, Grpo, Link
from diptych.objectives.guidance import Guidance
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.replication import measures
from diptych.replication.studies.milr import RECIPE as JANUS
from diptych.replication.studies.milr import TOKENIZER, WORLD
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import System
from diptych.training.recipe import Optimizer, Recipe, Source

ITERATIONS, PROMPTS, GROUP = 30, 8, 8
LONG = 0.1  # share of full captions among those that the models learn
WORDS = 20  # of a caption at most; a full one has 15

ABOUT = f"""
UAE takes describing a picture and drawing it as the two halves of an auto-encoder: a model is rewarded for captions
from which it draws the picture again. Its authors report that captions grow and say more, without being asked to, and
that drawings gain.

A small Janus (64 codes, one object at one of nine places) has learnt to draw after full captions and after short ones,
to answer questions, and to caption: nine of ten captions are short ("a red circle"), one is full ("a large red circle
at the top left , on a white background"). Then {ITERATIONS} steps from {PROMPTS} pictures with {GROUP} captions each,
every one drawn again from its words alone. The reward is the likeness of both scenes for the exact verifier; only the
caption learns ("captions"), or caption and drawing ("both", the paper's form for one autoregressive model). The control
fine-tunes on as many own captions, all alike. Measured by Unified-Bench on held-out pictures: the similarity of picture
and drawing in the zoo's contrastive encoder, which is not the reward, and which facts the captions tell.

The confound: captions may grow because the drawing half was taught long prompts, whatever they say. A second model is
the same but for its drawing half, which has seen short prompts only and puts objects anywhere: there full captions are
of no use, and should not become more frequent.
"""


def _taught(*prompts: str) -> Recipe:
    drawing = {name: 6 / len(prompts) for name in prompts}
    return replace(JANUS, data=(Source(world=WORLD, tasks={
        **drawing, "caption-short": 3 * (1 - LONG), "caption": 3 * LONG, "question": 1}),))


PLAINLY = {"guidance": {"branches": []}, "codes": {"temperature": 1.0},
           "text": {"temperature": 1.0, "max_tokens": WORDS}}
ALIGN = Align(
    model="@long", world=WORLD, tasks={"caption-short": Ask(watch=("caption", "words"), then=(
        Link(follow="redraw", reward="reconstruction", learn=False),))},
    group=GROUP, prompts=PROMPTS, iterations=ITERATIONS, micro=32, lr=2e-4, freeze=("codec",), sampling=PLAINLY,
    grpo=Grpo(beta=1e-6), optimizer=Optimizer(weight_decay=0.0), save_every=10, keep=1)


def measure(system: System, context: Context) -> Measured:
    sampling = replace(system.default_sampling(), guidance=Guidance(), codes=TokenSampling(temperature=1.0),
                       text=TextSampling(temperature=1.0, max_tokens=WORDS))
    shown = measures.suites(system, context, ["unified", "draw-long", "question"], n=300, world=WORLD,
                            sampling=sampling)
    return {"similarity": shown["unified: mean CLIP similarity"], "drawn again rightly": shown["unified"],
            "words": shown["unified: mean words"], "facts told": shown["unified: mean facts told"],
            "places told": shown["unified: mean place told"], "drawings right": shown["draw-long"],
            "questions right": shown["question"]}


def _arms(model: str) -> list[Arm]:
    def arm(name: str, about: str, control: bool = True, **changes: Any) -> Arm:
        return Arm(name=f"{model}: {name}", about=about, control=control, changes={"model": f"@{model}", **changes})

    link = {"follow": "redraw", "reward": "reconstruction"}
    both = {"caption-short": {"watch": ["caption", "words"], "then": [link]}}
    found = [arm("start", "as it was", iterations=0), arm("captions", "captions learn", control=False)]
    if model == "long":
        found += [arm("own captions", "fine-tuned on as many own captions", method="own"),
                  arm("both", "captions and drawings learn", control=False, tasks=both)]
    return found


STUDY = Study(
    name="uae",
    title="UAE: captions that a picture can be drawn from",
    about=ABOUT,
    recipe=ALIGN,
    shared={"codes": TOKENIZER, "long": _taught("draw-long", "draw-short"), "short": _taught("draw-short")},
    arms=tuple(arm for model in ("long", "short") for arm in _arms(model)),
    claims=(
        Claim(text="captions grow by half or more without being asked to", metric="words", treatment="long: captions",
              control="long: start", ratio=True, margin=1.5),
        Claim(text="they tell more of what is there", metric="facts told", treatment="long: captions",
              control="long: own captions"),
        Claim(text="pictures drawn again are more alike", metric="similarity", treatment="long: captions",
              control="long: start"),
        Claim(text="... also than after fine-tuning on own captions", metric="similarity", treatment="long: captions",
              control="long: own captions"),
        Claim(text="where the drawing learns, too, they are more alike still", metric="similarity",
              treatment="long: both", control="long: captions"),
        Claim(text="where it learns, drawings after full captions get better", metric="drawings right",
              treatment="long: both", control="long: start"),
        Claim(text="questions are answered no worse (two points at most)", metric="questions right",
              treatment="long: captions", control="long: start", margin=-0.02),
        Claim(text="captions do not grow where the drawing half cannot use them (by less than a tenth)",
              metric="words", treatment="short: captions", control="short: start", better="lower", ratio=True,
              margin=1 / 1.1),
    ),
    measure=measure,
    quick={"prompts": 2, "group": 2},
    quick_shared={"stages.0.batch": 4, "threads": 1, "workers": 0},
    units=dict.fromkeys(("drawn again rightly", "facts told", "places told", "drawings right", "questions right"),
                        "share"),
    system="janus",
)
