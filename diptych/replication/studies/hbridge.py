"""HBridge (arXiv 2511.20520): is a bridge of the middle layers as good as one of all layers, and do tokens that
reconstruct semantic features help? Both experts are those of the zoo's `mini`; the reader is frozen.
"""
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from diptych.analysis.alignment import mutual_neighbours
from diptych.analysis.layers import watched
from diptych.analysis.sharing import sharing
from diptych.document import Document
from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.tokens import Modality
from diptych.replication.measures import a_row_each, held_out_losses, suites
from diptych.replication.study import Arm, Claim, Context, Study
from diptych.systems.base import Sampling, System
from diptych.systems.hbridge import HBridge
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.world import tasks

WORLD, DEPTH = "mini", 6
INSIDE = ("vision", "connector", "embed", "trunk", "latent_in", "latent_out", "time")  # of the bundled model
LATE = DEPTH // 2 + 1  # the depth that the second half begins behind
PARTS = ("attention_norm", "attention", "mlp_norm", "mlp")
READER = ("vision", "connector", "embed", "trunk.norm.0", *(f"trunk.layers.*.{part}.0" for part in PARTS))
ATTRIBUTES = ("color", "shape", "place", "count")
SAMPLING = Sampling(evaluations=10, guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),)))


def measure(system: System, context: Context) -> dict[str, float | list[float]]:
    model = cast(HBridge, system)
    losses = held_out_losses(model, context, ["draw"], n=384, world=WORLD)
    reading = held_out_losses(model, context, ["caption"], n=64, world=WORLD)
    drawn = suites(model, context, ["draw"], n=256, world=WORLD, sampling=SAMPLING)
    attributes = {name: drawn[f"draw: {name}"] for name in ATTRIBUTES}
    curve = semantics(model, context)
    found: dict[str, float | list[float]] = {
        "flow loss": losses["draw/image"], "what words bring": words(model, context),
        "captions: text loss": reading["caption/text"],
        "attributes": sum(attributes.values()) / len(attributes), **attributes, "drawings right": drawn["draw"],
        "colors shown": drawn["draw: colors shown"], "FID": drawn["draw: FID"],
        "drawing, GFLOP": drawn["draw: mean GFLOP"], "joint attention, MFLOP": joint_attention(model),
        "features in the noise": sum(curve[LATE:]) / len(curve[LATE:]), "features in the noise, by depth": curve}
    return found | ({"semantic loss": losses["draw/semantic"]} if "draw/semantic" in losses else {})


def words(model: HBridge, context: Context) -> float:
    """By what share the flow loss is lower where the prompt can be read; noise and times are the same."""
    kept = model.config
    found = []
    try:
        for rate in (0.0, 1.0):
            model.config = replace(kept, drop_text=rate)
            found.append(held_out_losses(model, context, ["draw"], n=256, world=WORLD)["draw/image"])
    finally:
        model.config = kept
    return 1 - found[0] / found[1]


def joint_attention(model: HBridge, count: int = 16) -> float:
    """MFLOP per noised copy of a held-out drawing, forward, of what the experts' attention to each other takes."""
    batch = a_row_each(model, _drawings(range(count)))
    return sharing(model.trunk, batch.page.tokens, model.mask).attention / sum(n for _, n in batch.latents) / 1e6


@torch.no_grad()
def semantics(model: HBridge, context: Context, size: int = 64) -> list[float]:
    """By depth, the neighbours that pictures share among the painter's noised states (means over the cells of their
    copies, all arms at the same times and noise) and among the tower's features (means over the picture)."""
    states: list[list[Tensor]] = []
    features: list[Tensor] = []
    total = context.items(512)
    for start in range(0, total, size):
        batch = a_row_each(model, _drawings(range(start, min(start + size, total)))).to(model.device)
        with watched(model.trunk) as passes:
            model.loss(batch, torch.Generator(model.device).manual_seed(start))
        states.append(passes[0].pooled(passes[0].tokens.modality == Modality.LATENT))
        views = torch.stack([model.views(picture)[0] for picture in batch.pictures])
        features.append(model.vision.encode(views).float().mean(1))
    meant, k = torch.cat(features), min(10, total // 2)
    return [mutual_neighbours(torch.cat(parts), meant, k) for parts in zip(*states, strict=True)]


def _drawings(indices: Sequence[int]) -> list[Document]:
    return [tasks.document("draw", i, split="test", world=WORLD) for i in indices]


RECIPE = Recipe(
    system="hbridge", size="small",
    config={**{expert: {"width": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "hidden": 640, "qkv_bias": True,
                        "qk_norm": True, "modulated": False} for expert in ("reader", "painter")},
            "depth": DEPTH, "front": 0, "apart": [1, 2], "semantic_tokens": 4, "noised_copies": 2,
            "spread_tables": True},
    init={"codec": "zoo/codec", **{part: f"zoo/mini#{part}" for part in INSIDE}},
    data=(Source(world=WORLD, tasks={"draw": 1}),),
    stages=(Stage(name="bridge", steps=200, batch=16, lr=5e-4, warmup=20, schedule="linear", floor=0.05,
                  freeze=("codec", *READER)),),
    optimizer=Optimizer(kind="adamw", weight_decay=0.01, betas=(0.9, 0.98)), ema=0.97, precision="bf16", log_every=20,
    save_every=1000, threads=2, workers=1)

ABOUT = """
Both experts come from the zoo's `mini`, whose 6 layers were all joined when it was trained. The reader is frozen; the
bridge is cut to 3 of the layers, or left as it is, and the painter learns on with what remains. That favours leaving
it: what is found equal is equal in spite of it. In all arms the painter also has to do without the marks around a
picture looking at it, since they belong to the reader. Unlike the paper's, these experts have one width and need no
maps between their heads. The paper leaves 16 of 28 layers bridged (43% less); here it is half. "At no loss" is a
held-out flow loss at most 2% higher (words alone take a quarter off that of `mini`), and at most 5 points less of
what is asked for in drawings (mean of colour, shape, place and count). What words bring: by how much the loss is
lower with the prompt than without. Four learnt tokens stand for the features of the picture in quarters. Alignment:
for 512 held-out drawings the 10 nearest neighbours by the mean state of their noised latents, and how many of them
are neighbours by the mean feature of the finished picture; late means the second half of the depth.
"""

STUDY = Study(
    name="hbridge", title="HBridge: bridging the middle layers, and tokens that mean the picture",
    about=ABOUT,
    recipe=RECIPE, measure=measure,
    arms=(
        Arm(name="all", about="every layer bridged", changes={"config.apart": [0, 0]}, control=True),
        Arm(name="middle", about="the second to fourth of 6 layers bridged", changes={"config.apart": [1, 2]}),
        Arm(name="first", about="the first three layers bridged", changes={"config.apart": [0, 3]}, control=True),
        Arm(name="last", about="the last three layers bridged", changes={"config.apart": [3, 0]}, control=True),
        Arm(name="plain", about="as middle, without semantic tokens", control=True,
            changes={"config.apart": [1, 2], "config.semantic_tokens": 0})),
    claims=(
        Claim(text="bridging the middle takes over 40% less joint attention than bridging all", ratio=True,
              metric="joint attention, MFLOP", treatment="middle", control="all", better="lower", margin=1 / 0.6),
        Claim(text="... and its flow loss is at most 2% higher", ratio=True, metric="flow loss", treatment="middle",
              control="all", better="lower", margin=0.98),
        Claim(text="... and its drawings keep what is asked for (at most 5 points lost)", metric="attributes",
              treatment="middle", control="all", margin=-0.05),
        Claim(text="... and at least nine tenths of what words bring are left", ratio=True, metric="what words bring",
              treatment="middle", control="all", margin=0.9),
        Claim(text="the middle is a better place than the first layers: lower flow loss", metric="flow loss",
              treatment="middle", control="first", better="lower"),
        Claim(text="the middle is a better place than the last layers: lower flow loss", metric="flow loss",
              treatment="middle", control="last", better="lower"),
        Claim(text="semantic tokens: lower flow loss", metric="flow loss", treatment="middle", control="plain",
              better="lower"),
        Claim(text="semantic tokens: drawings keep more of what is asked for", metric="attributes",
              treatment="middle", control="plain"),
        Claim(text="semantic tokens: late states of the noise are more aligned with features of the picture",
              metric="features in the noise", treatment="middle", control="plain")),
    quick={"threads": 1, "workers": 0},
    units={name: "share" for name in ("attributes", "drawings right", "colors shown", "what words bring",
                                      "features in the noise", *ATTRIBUTES)})
