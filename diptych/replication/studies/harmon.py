"""Harmon (arXiv 2503.21979): what a masked-autoregressive encoder knows of pictures, and whether one encoder for both
tasks serves both."""
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych import zoo
from diptych.parts.vq import VQTokenizer
from diptych.replication import measures
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import System
from diptych.systems.harmon import Harmon
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.training.setup import build_system

WORLD = "few"
STEPS, BATCH = 420, 32  # documents of each task per step, on average

ABOUT = f"""
Harmon's only eye is the encoder of MAR, a masked autoregressive model of latents. Its authors find by linear probing
that such an encoder, trained to draw, knows more of pictures than that of a VQ tokenizer, and that one encoder for both
tasks serves each of them.

Read-out: a ridge regression of frozen features names colour, shape and place of one object; the mean of the three is
compared. MAR's features are those that the language model gets, all tokens and buffers of the encoder that learnt to
draw only (3,072 numbers). The VQ tokenizer is the zoo's, before its code (4,096 numbers), and its code vectors beside
it (512). Its encoder has about as many parameters as MAR's, and was not trained as long but longer: 112,000 pictures in
3,500 steps, MAR {STEPS * BATCH:,} in {STEPS}. MAR does not start from pixels, but from latents of the zoo's KL codec,
which has the network and training of that tokenizer. Therefore two more controls: the latents themselves, and an
encoder that has learnt nothing, which shows what more and nonlinear features are worth.

Sharing: one encoder trained on drawings, captions and questions against one that only reads and one that only draws,
each with as many steps and documents of its own tasks, so that who learns both sees twice as many in all. Measured on
held-out documents: the text loss per word, and of hidden tokens the squared error of the noise, which is the same for
all arms. Not measured: reading VQ codes in place of MAR's features, as no other part of the system could stay the same.
"""

RECIPE = Recipe(
    system="harmon",
    size="small",
    config={"block": {"width": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "hidden": 320}, "depth": 4,
            "mar": {"width": 128, "layers": 3, "heads": 4}, "head": {"width": 192, "layers": 2}},
    init={"codec": "zoo/codec"},
    data=(Source(world=WORLD, tasks={"draw": 2, "caption": 1, "question": 1}),),
    stages=(Stage(steps=STEPS, batch=2 * BATCH, lr=3e-3, warmup=20, schedule="cosine", floor=0.02, freeze=("codec",)),),
    optimizer=Optimizer(kind="muon", weight_decay=0.02),
    ema=0.98,
    precision="bf16",
    log_every=20,
    save_every=STEPS,
    threads=2,
    workers=1,
)

LOSSES = {"draw": ("drawings: error of the noise", "image"), "caption": ("captions: text loss", "text"),
          "question": ("questions: text loss", "text")}
NAMED = ("color", "shape", "place")


def mar_features(model: Harmon) -> Callable[[Tensor], Tensor]:
    """All states of the encoder with nothing hidden, as the language model reads them: (n, buffers + tokens, width)."""
    def features(images: Tensor) -> Tensor:
        x = latents(model, images)
        return model.mar.encode(x, torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device), model.grid(images))
    return features


def latents(model: Harmon, images: Tensor) -> Tensor:
    return torch.stack(model.encode(list(images.to(model.device))))


def rivals(model: Harmon, context: Context) -> dict[str, Callable[[Tensor], Tensor]]:
    vq: VQTokenizer = zoo.load("vq")
    fresh = cast(Harmon, build_system(context.recipe))
    return {"the zoo's VQ": lambda images: vq.encoder(F.pixel_unshuffle(images, vq.config.patch)),
            "its code vectors": lambda images: vq.code_vectors(vq.encode(images)),
            "the latents": lambda images: latents(model, images),
            "an untrained encoder": mar_features(fresh)}


def measure(system: System, context: Context) -> Measured:
    model, learnt = cast(Harmon, system), context.recipe.data[0].tasks
    found: dict[str, float] = {}
    for task, (name, term) in LOSSES.items():
        if task in learnt:
            found[name] = measures.held_out_losses(model, context, [task], n=512, world=WORLD)[f"{task}/{term}"]
    if "question" in learnt:
        told = measures.suites(model, context, ["question", "caption"], n=200, world=WORLD)
        found |= {"questions right": told["question"],
                  "captions: attributes": sum(told[f"caption: {name}"] for name in NAMED) / len(NAMED)}
    found |= measures.readout(mar_features(model), context, world=WORLD)
    if set(learnt) == {"draw"}:
        for name, features in rivals(model, context).items():
            other = measures.readout(features, context, world=WORLD)
            found |= {f"{key} of {name}": value for key, value in other.items()}
            found[f"readout above {name}"] = found["readout"] - other["readout"]
    return found


def _above(rival: str, text: str, margin: float = 0.0) -> Claim:
    return Claim(text=text, metric=f"readout above {rival}", treatment="drawing", margin=margin)


SHARES = ("readout", *(f"readout: {name}" for name in NAMED), "questions right", "captions: attributes")
RIVALS = ("the zoo's VQ", "its code vectors", "the latents", "an untrained encoder")

STUDY = Study(
    name="harmon",
    title="Harmon: what a masked-autoregressive encoder knows, and one encoder for both tasks",
    about=ABOUT,
    recipe=RECIPE,
    arms=(Arm(name="both", about="one encoder for drawings, captions and questions"),
          Arm(name="drawing", about="an encoder that only draws", control=True,
              changes={"data.0.tasks": {"draw": 1}, "stages.0.batch": BATCH}),
          Arm(name="reading", about="an encoder that only reads", control=True,
              changes={"data.0.tasks": {"caption": 1, "question": 1}, "stages.0.batch": BATCH})),
    claims=(
        _above("the zoo's VQ", "MAR features say over five points more than those of a VQ tokenizer trained for longer",
               0.05),
        _above("the latents", "they say more than the latents they are made of"),
        _above("an untrained encoder", "they say more than those of an untrained encoder"),
        Claim(text="an encoder that also draws reads better: captions", metric="captions: text loss", better="lower",
              treatment="both", control="reading"),
        Claim(text="an encoder that also draws reads better: questions", metric="questions: text loss", better="lower",
              treatment="both", control="reading"),
        Claim(text="an encoder that also reads draws better", metric="drawings: error of the noise", better="lower",
              treatment="both", control="drawing"),
    ),
    measure=measure,
    quick={"stages.0.batch": 4},
    units=dict.fromkeys((*SHARES, *(f"readout above {r}" for r in RIVALS),
                         *(f"{key} of {r}" for key in SHARES[:4] for r in RIVALS)), "share"),
)
