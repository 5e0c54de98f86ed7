"""UniFork (arXiv 2506.17202): do reading and drawing ask different things of the upper layers, does a fork help?"""
from typing import cast

import torch
from torch import Tensor

from diptych import zoo
from diptych.analysis.alignment import mutual_neighbours, slope
from diptych.analysis.layers import watched
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.tokens import Modality
from diptych.replication.measures import a_row_each, held_out_losses, suites
from diptych.replication.study import Arm, Claim, Context, Study
from diptych.systems.base import Sampling, System
from diptych.systems.unifork import UniFork
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.world import tasks
from diptych.world.language import caption
from diptych.world.scene import Scene

TASKS = {"reading": "caption", "drawing": "draw"}
ATTRIBUTES = ("color", "shape", "place", "count")
WIDE = 544  # a feed-forward network of this width in 6 layers has what the fork has in 3 + 3 + 3, but for 0.1%
SAMPLING = Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),)),
                    codes=TokenSampling(temperature=0.7))


def measure(system: System, context: Context) -> dict[str, float | list[float]]:
    model = cast(UniFork, system)
    losses = held_out_losses(model, context, list(TASKS.values()), n=768)
    shown = suites(model, context, list(TASKS.values()), n=192, sampling=SAMPLING)
    found: dict[str, float | list[float]] = {
        "text loss": losses["caption/text"], "code loss": losses["draw/image"],
        "drawing: colors shown": shown["draw: colors shown"], "drawing: FID": shown["draw: FID"],
        "trunk, M parameters": sum(p.numel() for p in model.trunk.parameters()) / 1e6}
    for name, task in TASKS.items():
        found |= {f"{name}: {part}": shown[f"{task}: {part}"] for part in ATTRIBUTES}
        found[f"{name}: attributes"] = sum(shown[f"{task}: {part}"] for part in ATTRIBUTES) / len(ATTRIBUTES)
        own, fixed = profile(model, context, task)
        found |= {f"{name}: late slope": slope(own, 0.5), f"{name}: late slope, fixed features": slope(fixed, 0.5),
                  f"alignment: {name}": own, f"fixed features: {name}": fixed}
    for kind in ("", ", fixed features"):
        slopes = [cast(float, found[f"{name}: late slope{kind}"]) for name in TASKS]
        found[f"late slopes apart{kind}"] = slopes[0] - slopes[1]
    return found


@torch.no_grad()
def profile(model: UniFork, context: Context, task: str, size: int = 64) -> tuple[list[float], list[float]]:
    """By depth, before the first layer and behind each: the neighbours that held-out documents share among the mean
    states of their picture tokens and the mean states of their text tokens at that depth; and, beside, those shared
    with the zoo's embedding of a full caption, which is the same for all depths and models."""
    states: list[tuple[list[Tensor], list[Tensor]]] = []
    meant: list[Tensor] = []
    total, clip = context.items(512), zoo.load("clip").to(model.device)
    for start in range(0, total, size):
        documents = [tasks.document(task, i, split="test", world="few") for i in range(start, min(start + size, total))]
        batch = a_row_each(model, documents).to(model.device)
        codes = model.encode(batch.pictures)
        with watched(model.trunk) as passes:
            model.forward_page(batch.page, batch.views, torch.cat([codes[i] for i, _ in batch.codes]))
        tokens = batch.page.tokens
        words = (tokens.modality == Modality.TEXT) & tokens.valid() & (batch.page.ids < model.config.vocabulary_size)
        said = words & tokens.target if task == "caption" else words  # what is asked for says nothing of the picture
        states.append((passes[0].pooled(tokens.modality == Modality.CODE), passes[0].pooled(said)))
        meant.append(clip.encode_text([caption(Scene.from_dict(d.meta["scene"])) for d in documents]))
    pictures, texts = ([torch.cat(parts) for parts in zip(*side, strict=True)] for side in zip(*states, strict=True))
    k, fixed = min(10, total // 2), torch.cat(meant)
    return ([mutual_neighbours(p, t, k) for p, t in zip(pictures, texts, strict=True)],
            [mutual_neighbours(p, fixed, k) for p in pictures])


RECIPE = Recipe(
    system="unifork", size="small",
    config={"block": {"width": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "hidden": 320}, "depth": 6, "shared": 3,
            "head": {"hidden_width": 128, "width": 128, "inner": 128, "heads": 4, "layers": 1}},
    init={"codec": "zoo/rq"}, data=(Source(world="few", tasks={"caption": 1, "draw": 1}),),
    stages=(Stage(name="both", steps=280, batch=48, lr=2.5e-3, warmup=20, schedule="linear", decay=0.6, floor=0.05,
                  freeze=("codec",)),),
    optimizer=Optimizer(kind="muon", weight_decay=0.01, betas=(0.9, 0.98)), ema=0.98, precision="bf16", log_every=20,
    save_every=1000, threads=2, workers=1)


def _better(metric: str, what: str, better: str = "lower") -> list[Claim]:
    """The fork against both dense controls."""
    return [Claim(text=f"{what} than the dense trunk {at}", metric=metric, treatment="fork", control=control,
                  better="lower" if better == "lower" else "higher")
            for control, at in (("wide", "of as many parameters"), ("dense", "of as many FLOPs"))]


STUDY = Study(
    name="unifork", title="UniFork: the upper layers of reading and drawing",
    about="A trunk of 6 layers reads captions out of residual codes (16 cells of 4) and draws by them. The fork shares "
          "3 layers; its dense controls share all 6, with as many FLOPs per token (two thirds of the parameters), or "
          "with as many parameters (wider feed-forward networks, 1.5 times the FLOPs of a layer); `separate` "
          "shares embeddings only. Alignment: for 512 held-out documents of a task, in the order in which the task "
          "has them, the 10 nearest neighbours by the mean state of the picture tokens, and how many of them are "
          "neighbours by the mean state of the text tokens of the same layer. Late slopes are fitted to the second "
          "half of the depth. \"As good as\" means a loss at most 1% higher. Beside it, without a claim: alignment "
          "with the zoo's embedding of a full caption.",
    recipe=RECIPE, measure=measure,
    arms=(
        Arm(name="wide", about="all 6 layers shared, as many parameters as the fork", control=True,
            changes={"config.shared": 6, "config.block.hidden": WIDE}),
        Arm(name="dense", about="all 6 layers shared, as many FLOPs as the fork", control=True,
            changes={"config.shared": 6}),
        Arm(name="fork", about="3 layers shared, 3 for each task", changes={"config.shared": 3}),
        Arm(name="separate", about="6 layers for each task", control=True, changes={"config.shared": 0})),
    claims=(
        *_better("text loss", "the fork reads better (held-out text loss)"),
        *_better("code loss", "the fork draws better (held-out code loss)"),
        *_better("drawing: colors shown", "the fork's drawings keep more of the colours asked for", "higher"),
        *(Claim(text=f"the fork {does} as well as two separate models ({metric} at most 1% higher)", metric=metric,
                treatment="fork", control="separate", better="lower", ratio=True, margin=0.99)
          for does, metric in (("reads", "text loss"), ("draws", "code loss"))),
        Claim(text="separate models: alignment rises more (falls less) late in reading than in drawing",
              metric="late slopes apart", treatment="separate"),
        Claim(text="fork: alignment rises late in reading", metric="reading: late slope", treatment="fork"),
        Claim(text="fork: alignment falls late in drawing", metric="drawing: late slope", treatment="fork",
              better="lower"),
        Claim(text="the fork's two tasks go further apart late than the dense trunk's", metric="late slopes apart",
              treatment="fork", control="dense")),
    quick={"threads": 1, "workers": 0},
    units={"drawing: colors shown": "share",
           **{f"{name}: {part}": "share" for name in TASKS for part in (*ATTRIBUTES, "attributes")}})
