"""FUDOKI (arXiv 2505.20147): discrete flow along a metric against masks, its self-correction and best of N."""
import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from diptych.document import Document, Image
from diptych.objectives.discrete_flow import Chance, MetricPath
from diptych.replication import measures
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import Sampling, System
from diptych.systems.fudoki import CODEBOOK, Fudoki
from diptych.systems.works import Grid
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.world import tasks
from diptych.world.spec import Spec
from diptych.world.verify import verify

WORLD = "plain"  # one large object on white
STEPS, BATCH, CODES = 1920, 16, 128
EVALUATIONS, FEWER_OR_MORE = 16, (4, 8, 32)
PROMPTS, DRAWINGS = 32, 8  # of each prompt; the best of them is taken
BROKEN, START, REPAIRS = 0.2, 0.5, 96  # share of codes replaced at that time, in so many pictures
CLOSE = 0.1  # of the mean distance between codes: nearer ones look alike
ATTRIBUTES = ("color", "shape", "count", "place")

ABOUT = f"""
One network with one sampler draws 64 codes at once along two paths: the metric path, on which codes are noised into
others that are near in the codebook, and the mixture with a mask token, from which a code comes but once. Same
documents, steps and evaluations. c of the metric path is calibrated for the codebook (the paper's is 3): at t = 0.5
codes have lost 90% of the distance that noise has. Codes are those of the zoo's tokenizer with a codebook of {CODES}
in place of 1,024, trained for this world and shared by all: so few can be learnt in minutes.

Score: the mean of what the verifier checks in a drawing of a held-out prompt (colours, shapes, counts, places, ...).
Colours shown and the Frechet distance tell more where drawings have no shapes yet.
Best of N: the expected score of the best of N out of {DRAWINGS} drawings of a prompt, chosen by the exact verifier; the
gain is that of {DRAWINGS} over one.

Self-correction: in held-out pictures {BROKEN:.0%} of the codes are replaced by random others, and sampling goes on from
t = {START} under the true prompt. Either all other codes are those of the picture, or they are noised as the path
has them at that time. Repaired is a replaced code that ends within {CLOSE:.0%} of the mean distance to the true one,
among those that were not so near by chance; kept is one that was not replaced and ends there. Damage undone: how much
of the squared error of pixels that the replacement made is gone. That masked codes stay is measured, not assumed: the
answer is the network's last guess at every code.

Not measured: texts, and an autoregressive start. Losses are not compared, as each path asks for other things.
"""

OPTIMIZER = Optimizer(kind="muon", weight_decay=0.01, betas=(0.9, 0.98))
BOOK = {"quantizer": {"codebook": {"values": CODES}}}
DRAWINGS_OF_WORLD = (Source(world=WORLD, tasks={"draw": 1}),)

TOKENIZER = Recipe(
    system="code-tokenizer",
    size="small",
    config={"codec": BOOK},
    init={f"codec.{part}": f"zoo/vq#{part}" for part in ("encoder", "decoder", "quant_conv", "post_quant_conv")},
    data=DRAWINGS_OF_WORLD,
    stages=(Stage(steps=300, batch=32, lr=2e-3, warmup=10, schedule="cosine", floor=0.02),),
    optimizer=OPTIMIZER, ema=0.98, precision="bf16", log_every=20, save_every=300, threads=2, workers=1)

RECIPE = Recipe(
    system="fudoki",
    size="small",
    config={"network": {"depth": 4, "codec": BOOK,
                        "block": {"width": 128, "heads": 4, "kv_heads": 4, "head_dim": 32, "hidden": 352}}},
    init={"network.codec": "@codes#codec"},
    data=DRAWINGS_OF_WORLD,
    stages=(Stage(steps=STEPS, batch=BATCH, lr=3e-3, warmup=80, schedule="cosine", floor=0.02,
                  freeze=("network.codec", "network.vision", "network.aligner", "network.head")),),
    optimizer=OPTIMIZER, ema=0.995, precision="bf16", log_every=20, save_every=STEPS, threads=2, workers=1)


# -- drawing ----------------------------------------------------------------------------------------------------------

def held_out(count: int) -> list[Document]:
    return [tasks.document("draw", i, split="test", world=WORLD) for i in range(count)]


def draw(model: Fudoki, documents: Sequence[Document], evaluations: int, round: int = 0) -> list[Document]:
    """A drawing of each; other rounds draw others."""
    sampling = replace(model.default_sampling(), evaluations=evaluations)
    seeds = [round * len(documents) + i for i in range(len(documents))]
    return model.generate([d.prompt() for d in documents], sampling, seeds=seeds)


def scores(documents: Sequence[Document], made: Sequence[Document]) -> list[dict[str, float]]:
    """What the verifier says of every drawing."""
    verdicts = [verify(m.of(Image)[0].pixels, Spec.from_dict(d.meta["spec"]), WORLD)
                for d, m in zip(documents, made, strict=True)]
    return [{**v.scores, "score": v.mean, "everything right": float(v.exact)} for v in verdicts]


def best_of(values: Tensor) -> list[float]:
    """Expected best of 1, 2, ... n out of n values (prompts, n), mean over prompts."""
    mean, n = values.sort(1).values.mean(0), values.shape[1]
    return [sum(math.comb(j, k - 1) * float(mean[j]) for j in range(n)) / math.comb(n, k) for k in range(1, n + 1)]


def drawings(model: Fudoki, context: Context) -> dict[str, float | list[float]]:
    documents = held_out(context.items(PROMPTS))
    drawn = [draw(model, documents, EVALUATIONS, n) for n in range(2 if context.quick else DRAWINGS)]
    rounds = [scores(documents, made) for made in drawn]
    pairs = [pair for made in drawn for pair in zip(documents, made, strict=True)]
    best = best_of(torch.tensor([[s["score"] for s in drawn] for drawn in rounds]).T)
    found: dict[str, float | list[float]] = {
        "score": best[0], "gain of the best": best[-1] - best[0], "score by drawings": best,
        "everything right": _mean(rounds, "everything right"), **{name: _mean(rounds, name) for name in ATTRIBUTES},
        **measures.drawings(pairs)}
    for evaluations in FEWER_OR_MORE:
        found[f"score in {evaluations} evaluations"] = _mean(
            [scores(documents, draw(model, documents, evaluations))], "score")
    return found


def _mean(rounds: Sequence[Sequence[dict[str, float]]], name: str) -> float:
    values = [s[name] for drawn in rounds for s in drawn if name in s]
    return sum(values) / max(len(values), 1)


# -- repairing --------------------------------------------------------------------------------------------------------

def going_on(model: Fudoki, document: Document, x: Tensor, grid: Grid,
             generator: torch.Generator) -> Generator[Any, Any, Tensor]:
    """Codes at the end of sampling from codes x (n,) at `START`."""
    sampling = Sampling(evaluations=round(EVALUATIONS * (1 - START)), start=START)
    s = model.before(document, 1)
    model.write_drawn(s.writer, 0, grid)
    chance = Chance.draw(sampling.evaluations, len(x), generator)
    return (yield from model.walk("image", {"full": s}, x, chance, sampling.codes, sampling, None))


@torch.no_grad()
def repairs(model: Fudoki, context: Context) -> dict[str, float]:
    path, count = model.path("image"), context.items(REPAIRS)
    ruler = MetricPath(model.codec.get_parameter(CODEBOOK))
    near = CLOSE * float(ruler.distance(torch.arange(ruler.values, device=model.device)).mean())
    documents = held_out(count)
    pictures = [model.views(torch.from_numpy(d.of(Image)[0].pixels))[1].to(model.device) for d in documents]
    grid, true = model.grid(pictures[0]), torch.stack(model.encode(pictures))
    g = torch.Generator().manual_seed(0)
    u = torch.rand((3, *true.shape), generator=g, dtype=torch.float64).to(model.device)
    replaced = u[0] < BROKEN
    other = (true + 1 + (u[1] * (ruler.values - 1)).long()) % ruler.values
    noised = path.corrupt(true.flatten(), START, u[2].flatten()).view_as(true)

    def alike(codes: Tensor) -> Tensor:
        return ruler.distance(true.flatten()).gather(1, codes.flatten()[:, None]).view_as(codes) < near

    damaged, found = replaced & ~alike(other), {}
    for name, rest in (("", true), (", the others noised", noised)):
        broken = torch.where(replaced, other, rest)
        programs = {i: going_on(model, d, broken[i], grid, torch.Generator().manual_seed(i))
                    for i, d in enumerate(documents)}
        after = torch.stack(model.finish(cast(Any, programs)))  # type: ignore[arg-type]
        found |= {f"repaired{name}": float(alike(after)[damaged].double().mean()),
                  f"changed{name}": float((after != other)[damaged].double().mean()),
                  f"kept{name}": float(alike(after)[~replaced].double().mean())}
        if rest is true:
            clean, before, now = (model.decode(x, grid) for x in (true, broken, after))
            found["damage undone"] = 1 - float((now - clean).square().mean() / (before - clean).square().mean())
    return found


def measure(system: System, context: Context) -> Measured:
    model = cast(Fudoki, system)
    return {**drawings(model, context), **repairs(model, context)}


STUDY = Study(
    name="fudoki",
    title="FUDOKI: flow along a metric, and what it can take back",
    about=ABOUT,
    recipe=RECIPE,
    shared={"codes": TOKENIZER},
    arms=(Arm(name="metric", about="codes noised into near ones"),
          Arm(name="masked", about="codes masked, and drawn once", changes={"config.path": "masked"}, control=True)),
    claims=(
        Claim(text="what is compared can draw: masks score over 30%", metric="score", treatment="masked", margin=0.3),
        Claim(text="the metric path repairs more than half of the replaced codes", metric="repaired",
              treatment="metric", margin=0.5),
        Claim(text="the metric path repairs more than half of them among noised codes",
              metric="repaired, the others noised", treatment="metric", margin=0.5),
        Claim(text="it repairs at least 25 points more of them than masks do", metric="repaired", treatment="metric",
              control="masked", margin=0.25),
        Claim(text="masks leave over 95% of the replaced codes as they are", metric="changed", treatment="masked",
              better="lower", margin=-0.05),
        Claim(text="the metric path draws better in equal evaluations (16)", metric="score", treatment="metric",
              control="masked"),
        Claim(text="the best of 8 drawings scores over 5 points above one", metric="gain of the best",
              treatment="metric", margin=0.05),
        Claim(text="the best of 8 gains more along the metric path than with masks", metric="gain of the best",
              treatment="metric", control="masked"),
    ),
    measure=measure,
    quick={"stages.0.batch": 4},
    units={name: "share" for name in ("score", "draw: colors shown", "everything right", *ATTRIBUTES, "repaired",
                                      "changed", "kept", "repaired, the others noised", "damage undone")},
)
