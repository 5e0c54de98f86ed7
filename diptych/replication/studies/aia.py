"""AIA (arXiv 2511.22663): does a loss that makes layers look across modalities as specialists do, help a unified model
to read and to draw? On two families: one that reads features and draws codes, and one in whose single vocabulary
pictures are read and drawn as codes.
"""
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from diptych.alignment.attention import KINDS, AttentionLoss, Kind, Specialists, curves
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.replication.measures import held_out_losses, suites
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import Sampling, System
from diptych.systems.packed import Packed
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.world import tasks

WORLD, DEPTH = "few", 6
STAGES = 3
BEFORE, ALONE, AFTER, BATCH = 300, 150, 80, 32  # steps: of what all start from, of specialists, of the arms
TASKS: dict[Kind, str] = {"draw": "draw", "read": "question"}
ATTRIBUTES = ("color", "shape", "place", "count")
SAMPLING = Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),)),
                    codes=TokenSampling(temperature=0.7))
OPTIMIZER = Optimizer(kind="muon", weight_decay=0.01, betas=(0.9, 0.98))

BLOCK = {"block.width": 128, "block.heads": 4, "block.head_dim": 32, "block.hidden": 320, "depth": DEPTH}
CONFIG: dict[str, dict[str, Any]] = {"janus": {**BLOCK, "block.kv_heads": 4}, "emu3": {**BLOCK, "block.kv_heads": 2}}
# ready ingredients, and what is learnt; the first are never trained
READY = {"janus": {"codec": "zoo/vq", "vision": "zoo/clip#vision"}, "emu3": {"codec": "zoo/vq"}}
LEARNT = {"janus": ("embed", "trunk", "head", "aligner", "code_embed", "code_aligner", "code_head"),
          "emu3": ("embed", "trunk", "head")}


# -- what is trained --------------------------------------------------------------------------------------------------

def recipe(family: str, steps: int, shares: dict[str, float], **changes: Any) -> Recipe:
    return Recipe(**{
        "system": family, "size": "small", "config": CONFIG[family], "init": READY[family],
        "data": (Source(world=WORLD, tasks=shares),), "optimizer": OPTIMIZER, "ema": 0.97, "precision": "bf16",
        "stages": (Stage(steps=steps, batch=BATCH, lr=2.5e-3, warmup=15, schedule="linear", decay=0.6, floor=0.05,
                         freeze=tuple(READY[family])),),
        "log_every": 20, "save_every": 1000, "threads": 2, "workers": 1, **changes})


def post(family: str) -> dict[str, Any]:
    """What makes the recipe of the arms one of this family, going on from its own start."""
    begun = {part: f"@{family}#{part}" for part in LEARNT[family]}
    return {"system": family, "config": CONFIG[family], "init": {**READY[family], **begun},
            "stages.0.freeze": list(READY[family])}


def attention(family: str, **how: Any) -> dict[str, Any]:
    """The loss at a fiftieth of the main one's magnitude, as the paper found best, after these specialists."""
    places = {kind: f"@{family}-{kind}s" for kind in KINDS}
    return {"objective": {"name": "attention", "options": {
        "specialists": {**places, "world": WORLD, **how}, "ratios": {kind: {} for kind in KINDS}}}}


BOTH = {"draw": 1.0, "question": 1.0}
SHARED = {name: made for family in CONFIG for name, made in (
    (family, recipe(family, BEFORE, BOTH)),
    *((f"{family}-{kind}s", recipe(family, ALONE, {TASKS[kind]: 1.0})) for kind in KINDS))}


# -- measuring --------------------------------------------------------------------------------------------------------

def measure(system: System, context: Context) -> Measured:
    model = cast(Packed, system)
    losses = held_out_losses(model, context, list(TASKS.values()), n=256, world=WORLD)
    shown = suites(model, context, list(TASKS.values()), n=200, world=WORLD, sampling=SAMPLING)
    found: dict[str, Any] = {
        "questions right": shown["question"], "drawings: attributes": sum(
            shown[f"draw: {name}"] for name in ATTRIBUTES) / len(ATTRIBUTES),
        "drawings right": shown["draw"], "drawings: colors shown": shown["draw: colors shown"],
        "drawings: FID": shown["draw: FID"], "text loss": losses["question/text"], "code loss": losses["draw/image"]}
    return found | looks(model, context) | overhead(model, context)


def looks(model: Packed, context: Context) -> dict[str, Any]:
    """How much attention goes across modalities on held-out documents, layer by layer, and how far their mean is from
    the stages of the specialists."""
    family = context.recipe.system
    draw, read = (str(context.shared(f"{family}-{kind}s")) for kind in KINDS)
    wanted = Specialists(draw=draw, read=read, stages=STAGES, world=WORLD,
                         documents=context.items(64)).schedules(model.device)
    found: dict[str, Any] = {}
    means: list[Tensor] = []
    for kind in KINDS:
        documents = [tasks.document(TASKS[kind], i, split="test", world=WORLD) for i in range(context.items(96))]
        own = curves(model, documents)[kind]
        means.append(own.mean(1))
        target = wanted[kind].at(len(own))[0]
        found[f"distance to {kind}"] = float((means[-1] - target).abs().mean())
        found[f"distance to {kind}, document by document"] = float((own - target[:, None]).abs().mean())
        found |= {f"looks to {kind}": means[-1].tolist(), f"specialist to {kind}": target.tolist()}
    return found | {"distance": (found["distance to draw"] + found["distance to read"]) / 2,
                    "curves: correlation": float(torch.corrcoef(torch.stack(means))[0, 1])}


def overhead(model: Packed, context: Context, size: int = 16) -> dict[str, float]:
    """A step's time with the loss, in times of that without: the least of several in turns."""
    documents = [tasks.document(task, i, world=WORLD) for i in range(context.items(size)) for task in TASKS.values()]
    batch = model.collate(documents).to(model.device)
    frozen = [p for part in context.recipe.stages[0].freeze for p in model.get_submodule(part).parameters()]
    for p in frozen:
        p.requires_grad_(False)
    ways: Sequence[Any] = (lambda *given: model.loss(*given[1:]), AttentionLoss())
    least = [float("inf"), float("inf")]
    for _ in range(2 if context.quick else 7):
        for n, way in enumerate(ways):
            model.zero_grad()
            start = time.perf_counter()
            way(model, batch, torch.Generator(model.device).manual_seed(0)).total().backward()
            least[n] = min(least[n], time.perf_counter() - start)
    model.zero_grad()
    return {"time of a step, times": least[1] / least[0]}


# -- the study --------------------------------------------------------------------------------------------------------

def arms(family: str) -> tuple[Arm, ...]:
    own = post(family)
    return (
        Arm(name=family, about="its own loss alone", control=True, changes=own),
        Arm(name=f"{family}, aia", about="and Huber errors of three stages",
            changes={**own, **attention(family, stages=STAGES)}),
        Arm(name=f"{family}, squares", about="and squared errors with a target for every layer", control=True,
            changes={**own, **attention(family, stages=DEPTH, least=1.0)}),
        Arm(name=f"{family}, constant", about="and Huber errors of one stage", control=True,
            changes={**own, **attention(family, stages=1)}))


def claims(family: str) -> tuple[Claim, ...]:
    aia = f"{family}, aia"
    better = (("questions right", "more questions are answered rightly"),
              ("drawings: attributes", "drawings keep more of what is asked for"))
    return (
        Claim(text=f"{family}: the distance to the specialists' attention halves", metric="distance", ratio=True,
              better="lower", treatment=aia, control=family, margin=2.0),
        *(Claim(text=f"{family}: {text}", metric=metric, treatment=aia, control=family) for metric, text in better),
        *(Claim(text=f"{family}: {text} than with {what}", metric=metric, treatment=aia, control=f"{family}, {control}")
          for control, what in (("squares", "rigid squares"), ("constant", "one constant")) for metric, text in better),
        Claim(text=f"{family}: a step takes less than a tenth longer", metric="time of a step, times", better="lower",
              treatment=aia, margin=-1.1))


ABOUT = f"""
Two small models of {DEPTH} layers, one as Janus (features of the zoo's tower to read, codes to draw) and one as Emu3
(codes for both, one vocabulary), learn to draw and to answer for {BEFORE} steps; all arms of a family go on from
there for {AFTER}, with the same documents. Specialists are the same networks trained from scratch on one of the tasks
for {ALONE} steps; the attention that goes from the codes of a drawing to the words of its prompt, and from the words
of an answer to the picture, averaged over heads and tokens, gives a curve over layers each. Three stages of it are
the targets of AIA, widths are half the deviation of its samples; the controls have a target per layer with squared
errors, or one target for all layers. The weights keep the term at a fiftieth of the main loss. The distance is that
of the mean curves of held-out documents from the three stages, for all arms. What a drawing keeps of what was asked
for is the mean share of colours, shapes, places and counts that the exact verifier finds.
"""

STUDY = Study(
    name="aia", title="AIA: looking across modalities as specialists do",
    about=ABOUT, recipe=recipe("janus", AFTER, BOTH), shared=SHARED, measure=measure,
    arms=tuple(arm for family in CONFIG for arm in arms(family)),
    claims=tuple(claim for family in CONFIG for claim in claims(family)),
    quick={"stages.0.batch": 4, "threads": 1, "workers": 0},
    units={name: "share" for name in ("questions right", "drawings: attributes", "drawings right",
                                      "drawings: colors shown")})
