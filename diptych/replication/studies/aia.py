"""AIA (arXiv 2511.22663): does a loss that makes layers look across modalities as specialists do, help a unified model
to read and to draw? On two families: one that reads features and draws codes one by one, and one that reads the codes
that it draws masked.
"""
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from diptych.alignment.attention import KINDS, AttentionLoss, Kind, Specialists, curves
from diptych.replication.measures import held_out_losses, suites
from diptych.replication.studies.unirl import loosely
from diptych.replication.study import Arm, Claim, Context, Family, Measured, Study
from diptych.systems.base import System
from diptych.systems.packed import Packed
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.world import tasks

WORLD, DEPTH = "grid", 4
STAGES = 2
ALONE, AFTER, BATCH = 400, 100, 32  # steps: of specialists, of the arms
TASKS: dict[Kind, str] = {"draw": "draw", "read": "question"}
ATTRIBUTES = ("color", "shape", "place", "count")
OPTIMIZER = Optimizer(kind="muon", weight_decay=0.01, betas=(0.9, 0.98))

# the networks of the bundled models
SMALL = {"block.width": 128, "block.heads": 4, "block.head_dim": 32, "depth": DEPTH, "picture": [48, 48],
         "codec.quantizer.codebook.values": 64}
CONFIG: dict[str, dict[str, Any]] = {
    "janus": {**SMALL, "block.kv_heads": 4, "block.hidden": 320, "variant": "paper"},
    "show-o": {**SMALL, "block.hidden": 512}}
# ready ingredients, and what is learnt; the first are never trained
READY = {"janus": {"codec": "zoo/grid-codec#codec", "vision": "zoo/clip#vision"},
         "show-o": {"codec": "zoo/grid-codec#codec"}}
LEARNT = {"janus": ("embed", "trunk", "head", "aligner", "code_embed", "code_aligner", "code_head"),
          "show-o": ("embed", "trunk", "head")}


# -- what is trained --------------------------------------------------------------------------------------------------

def recipe(family: str, steps: int, lr: float, shares: dict[str, float]) -> Recipe:
    return Recipe(
        system=family, size="small", config=CONFIG[family], init=READY[family],
        data=(Source(world=WORLD, tasks=shares),), optimizer=OPTIMIZER, ema=0.97, precision="bf16",
        stages=(Stage(steps=steps, batch=BATCH, lr=lr, warmup=15, schedule="linear", decay=0.6, floor=0.05,
                      freeze=tuple(READY[family])),),
        log_every=20, save_every=1000, threads=2, workers=1)


def post(family: str) -> dict[str, Any]:
    """What makes the recipe of the arms one of this family, going on from the bundled model."""
    begun = {part: f"zoo/{family}-grid#{part}" for part in LEARNT[family]}
    return {"system": family, "config": CONFIG[family], "init": {**READY[family], **begun},
            "stages.0.freeze": list(READY[family])}


def attention(family: str, **how: Any) -> dict[str, Any]:
    """The loss at a fiftieth of the main one's magnitude, as the paper found best, after these specialists."""
    places = {kind: f"@{family}-{kind}s" for kind in KINDS}
    return {"objective": {"name": "attention", "options": {
        "specialists": {**places, "world": WORLD, **how}, "ratios": {kind: {} for kind in KINDS}}}}


SHARED = {f"{family}-{kind}s": recipe(family, ALONE, 2.5e-3, {task: 1.0})
          for family in CONFIG for kind, task in TASKS.items()}


# -- measuring --------------------------------------------------------------------------------------------------------

def measure(system: System, context: Context) -> Measured:
    model = cast(Packed, system)
    losses = held_out_losses(model, context, list(TASKS.values()), n=256, world=WORLD)
    loose = loosely(system, context.recipe.system)
    shown = suites(model, context, list(TASKS.values()), n=300, world=WORLD, sampling=loose)
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

FAMILIES = tuple(Family(name, post(name)) for name in CONFIG)


def _arms(of: Family) -> list[Arm]:
    return [
        of.arm("alone", "its own loss alone"),
        of.arm("aia", f"and Huber errors of {STAGES} stages", attention(of.name, stages=STAGES), control=False),
        of.arm("squares", "and squared errors with a target for every layer",
               attention(of.name, stages=DEPTH, least=1.0)),
        of.arm("constant", "and Huber errors of one stage", attention(of.name, stages=1))]


def _claims(of: Family) -> list[Claim]:
    better = (("questions right", "more questions are answered rightly"),
              ("drawings: attributes", "drawings keep more of what is asked for"))
    return [
        of.claim("the distance to the specialists' attention halves", "distance", "aia", "alone", ratio=True,
                 better="lower", margin=2.0),
        *(of.claim(text, metric, "aia", "alone") for metric, text in better),
        *(of.claim(f"{text} than with {what}", metric, "aia", control)
          for control, what in (("squares", "rigid squares"), ("constant", "one constant")) for metric, text in better),
        *(of.claim(f"{what} do not fall by more than two points", metric, "aia", "alone", margin=-0.02)
          for what, metric in (("right answers", "questions right"), ("drawings", "drawings: attributes"))),
        of.claim("a step takes less than a tenth longer", "time of a step, times", "aia", better="lower",
                 margin=-1.1)]


ABOUT = f"""
All arms of a family go on from its bundled model of {DEPTH} layers for {AFTER} steps, drawing and answering, with the
same documents: `janus-grid` (features of the zoo's tower to read, codes to draw one by one) and `show-o-grid` (codes
for both, drawn masked). Specialists are the same networks trained on one of the tasks alone for {ALONE} steps; the
attention that goes from the codes of a drawing to the words of its prompt, and from the words of an answer to the
picture, averaged over heads and tokens, gives a curve over layers each. {STAGES} stages of it are
the targets of AIA, widths are half the deviation of its samples; the controls have a target per layer with squared
errors, or one target for all layers. The weights keep the term at a fiftieth of the main loss. The distance is that
of the mean curves of held-out documents from these stages, for all arms. What a drawing keeps of what was asked for is
the mean share of colours, shapes, places and counts that the exact verifier finds, in drawings made loosely (Janus at
temperature 1.3, Show-o in four steps): as the models draw by themselves, nine of ten are right already.
"""

STUDY = Study(
    name="aia", title="AIA: looking across modalities as specialists do",
    about=ABOUT, recipe=recipe("janus", AFTER, 1e-3, dict.fromkeys(TASKS.values(), 1.0)), shared=SHARED,
    measure=measure,
    arms=tuple(arm for of in FAMILIES for arm in _arms(of)),
    claims=tuple(claim for of in FAMILIES for claim in _claims(of)),
    quick={"stages.0.batch": 4, "threads": 1, "workers": 0},
    units={name: "share" for name in ("questions right", "drawings: attributes", "drawings right",
                                      "drawings: colors shown")})
