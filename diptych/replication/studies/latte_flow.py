"""LaTtE-Flow (arXiv 2506.06952): layers shared out over time draw at a part of the cost.

The reader is the zoo's vision-language model, frozen, as the paper freezes Qwen2-VL. All arms see the same documents,
noise and times; they differ in which of its six layers have a twin that draws, and when.
"""
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from diptych.objectives import flow
from diptych.parts.resources import SHIPPED
from diptych.replication.measures import change_of_answers, held_out_losses, suites
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import Sampling, System
from diptych.systems.latte_flow import LatteFlow
from diptych.systems.works import Look, Read, Reader
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.world import tasks

WORLD, DEPTH, STEPS = "one", 6, 600
EVALUATIONS = 12  # of the network per drawing: every group of every arm gets as many
ATTRIBUTES = ("count", "color", "shape", "place", "background")
TIMES = [(k + 0.5) / 12 for k in range(12)]
READER = ["embed", "connector", "trunk.norm.0", *(
    f"trunk.layers.{n}.{part}.0" for n in range(DEPTH) for part in ("attention_norm", "attention", "mlp_norm", "mlp"))]

RECIPE = Recipe(
    system="latte-flow", size="small",
    config={"block": {"heads": 6, "kv_heads": 2, "head_dim": 32, "hidden": 448}, "depth": DEPTH, "noised_copies": 2},
    init={"codec": "zoo/codec", "vision": "zoo/clip#vision", **{part: f"zoo/vlm#{part}" for part in READER}},
    data=(Source(world=WORLD, tasks={"draw": 1}),),
    stages=(Stage(name="draw", steps=STEPS, batch=32, lr=2.5e-3, warmup=30, schedule="cosine", floor=0.02,
                  freeze=("codec", "vision", *READER)),),
    optimizer=Optimizer(kind="muon", weight_decay=0.01, betas=(0.9, 0.98)), ema=0.98, precision="bf16", log_every=20,
    save_every=STEPS, threads=2, workers=1)


def measure(system: System, context: Context) -> Measured:
    model = cast(LatteFlow, system)
    sampling = replace(model.default_sampling(), evaluations=EVALUATIONS)
    found: dict[str, Any] = {**held_out_losses(model, context, ["draw"], n=384, world=WORLD),
                             **suites(model, context, ["draw"], n=160, world=WORLD, sampling=sampling)}
    found["attributes"] = sum(found[f"draw: {name}"] for name in ATTRIBUTES) / len(ATTRIBUTES)
    found["layer evaluations"] = layer_evaluations(model)
    found["largest change of an answer's log-prob"] = change_of_answers(model, context, SHIPPED / "vlm")
    found["flow loss by time"] = loss_by_time(model, context)
    return found


def layer_evaluations(model: LatteFlow) -> float:
    """How many layers the latents of one picture go through, counted where their states enter the networks."""
    rows: list[int] = []

    def count(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        rows.append(len(given[0]))

    twins = [own for layer in model.trunk.layers for own in [*cast(nn.ModuleList, layer.mlp)][1:]
             if not isinstance(own, nn.Identity)]
    hooks = [twin.register_forward_hook(count) for twin in twins]
    document = tasks.document("draw", 0, split="test", world=WORLD)
    model.generate([document], Sampling(evaluations=EVALUATIONS))  # in one context: no guidance
    for hook in hooks:
        hook.remove()
    height, width = model.config.picture
    return sum(rows) / (height // model.stride * (width // model.stride))


@torch.no_grad()
def loss_by_time(model: LatteFlow, context: Context) -> Sequence[float]:
    """Flow loss at fixed times on held-out documents, with the velocities that drawing asks for."""
    documents = [tasks.document("draw", i, split="test", world=WORLD) for i in range(context.items(64))]
    readers, reads = [Reader() for _ in documents], []
    for reader, document in zip(readers, documents, strict=True):
        w = model.writer(reader)
        w.text(model.spell(document.pieces[0]))
        reads.append(Read(reader, w))
    model.run(reads)
    pictures = [torch.from_numpy(cast(Any, d.pieces[1]).pixels).to(model.device) for d in documents]
    codes, grid = torch.stack(model.encode(pictures)).float(), model.grid(pictures[0])
    noise = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0)).to(codes)
    found = []
    for t in TIMES:
        noised = flow.interpolate(codes, noise, torch.tensor(t))
        answers = model.run([Look([reader], x, t, grid) for reader, x in zip(readers, noised, strict=True)])
        found.append(float(flow.squared_error(torch.stack([v for [v] in answers]), codes, noise).mean()))
    return found


LOSS, COST = "draw/image", "layer evaluations"
STUDY = Study(
    name="latte-flow", title="LaTtE-Flow: a part of the layers per step",
    about="Does a flow model whose layers are shared out over time draw nearly as well as one that runs all of them at "
          "every step, and better than one of the same cost without timestep experts? Zoo reader of six layers, "
          f"frozen; {STEPS} steps of 32 prompts with two noised copies each, so that a layer of three groups learns "
          "from a third of the copies that a layer of the controls learns from.",
    recipe=RECIPE,
    arms=(Arm(name="whole", about="all six layers at every step", control=True, changes={"config.groups": 1}),
          Arm(name="experts", about="three groups of two layers, one for each third of the time",
              changes={"config.groups": 3}),
          Arm(name="single", about="six groups of one layer", changes={"config.groups": 6}),
          Arm(name="truncated", about="the first two layers at every step: the cost of experts without times",
              changes={"config.groups": 1, "config.twins": 2})),
    claims=(
        Claim(text="Three groups need a third of the layer evaluations (more than 2.9 times fewer)", metric=COST,
              treatment="experts", control="whole", better="lower", ratio=True, margin=2.9),
        Claim(text="Six groups need a sixth (more than 5.8 times fewer)", metric=COST, treatment="single",
              control="whole", better="lower", ratio=True, margin=5.8),
        Claim(text="Near quality: the held-out flow loss of three groups is less than 5% above that of all layers",
              metric=LOSS, treatment="experts", control="whole", better="lower", ratio=True, margin=1 / 1.05),
        Claim(text="What is compared can draw: with all layers over half of the colours shown are those asked for",
              metric="draw: colors shown", treatment="whole", margin=0.5),
        Claim(text="Near quality: with three groups less than 10 points of that are lost", metric="draw: colors shown",
              treatment="experts", control="whole", margin=-0.1),
        Claim(text="Faster learning: after equal steps their held-out flow loss is lower than that of all layers",
              metric=LOSS, treatment="experts", control="whole", better="lower", ratio=True, margin=1.0),
        Claim(text="Timestep experts beat the same cost without them by more than 2% of the held-out flow loss",
              metric=LOSS, treatment="experts", control="truncated", better="lower", ratio=True, margin=1.02),
        Claim(text="... and in colours shown", metric="draw: colors shown", treatment="experts", control="truncated"),
        Claim(text="Larger groups draw better: three groups have a lower held-out flow loss than six", metric=LOSS,
              treatment="experts", control="single", better="lower", ratio=True, margin=1.0),
        Claim(text="Answers stay those of the reader (log-probs within 0.001)",
              metric="largest change of an answer's log-prob", treatment="experts", better="lower", margin=-1e-3)),
    measure=measure, quick={"stages.0.batch": 8, "threads": 1, "workers": 0},
    units={name: "share" for name in ("draw", "draw: colors shown", "attributes", *(f"draw: {n}" for n in ATTRIBUTES))})
