"""UnifiedReward (arXiv 2503.05236): one judge of drawings, answers and stories against a judge of each, after equally
many updates; which place it prefers; and pairs it mines from a model's own drawings.
"""
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from diptych.alignment.rewards import table
from diptych.alignment.rewards.base import gains
from diptych.alignment.rewards.judges import PairJudge, PointJudge
from diptych.alignment.rewards.mining import Rule, mine
from diptych.document import Document
from diptych.objectives.guidance import Guidance
from diptych.parts.resources import SHIPPED
from diptych.replication.measures import judgements
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import Sampling, System
from diptych.systems.io import load_system
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.world import tasks
from diptych.world.judging import KINDS, MODES

WORLD = "one"
READING, EACH, BATCH = 120, 1280, 32  # steps; documents of each kind; documents of a step
STEPS = EACH * len(KINDS) // BATCH  # a judge of one kind reads its own documents as often as there are kinds
ITEMS = 64  # to measure, of each task
PROMPTS, CANDIDATES = 16, 6
TASKS = tuple(f"{kind}-{mode}" for kind in KINDS for mode in MODES)
RULES: tuple[Rule, ...] = ("sift", "rank", "random")
WEAK = Sampling(evaluations=4, guidance=Guidance())  # a drawing model that errs


def measure(system: System, context: Context) -> Measured:
    """A row of the transfer matrix: every kind, whatever the judge was trained on."""
    found = judgements(system, context, TASKS, n=ITEMS, world=WORLD)
    for mode, name in (("think", "verdicts with reasons"), ("pair", "verdicts at once")):
        found[name] = sum(found[f"{kind}-{mode}"] for kind in KINDS) / len(KINDS)
    own = [f"{kind}-{mode}" for kind in KINDS for mode in ("pair", "think") if trained_on(context.recipe, kind)]
    found["place preferred"] = sum(abs(found[f"{name}: says the first"] - 0.5) for name in own) / len(own)
    if len(own) == 2 * len(KINDS):
        found |= mined(system, context)
    return found


def trained_on(recipe: Recipe, kind: str) -> bool:
    return any(name.startswith(f"{kind}-") for source in recipe.data for name in source.tasks)


@lru_cache(1)
def drawings(prompts: int) -> list[tuple[Document, list[Document], list[float]]]:
    """Prompts, candidates drawn by the bundled model in few steps, and what the exact verifier gives for these."""
    model, oracle = load_system(SHIPPED / "mini").eval(), table.make("scene")
    asked = [tasks.document("draw", i, split="test", world=WORLD) for i in range(prompts)]
    made = model.generate([a for a in asked for _ in range(CANDIDATES)], WEAK, seeds=list(range(prompts * CANDIDATES)))
    groups = [made[i:i + CANDIDATES] for i in range(0, len(made), CANDIDATES)]
    return [(a, g, gains(oracle, oracle([a] * CANDIDATES, g))) for a, g in zip(asked, groups, strict=True)]


def mined(system: System, context: Context) -> dict[str, float]:
    """By rule: by how much the chosen drawing is better than the rejected one, for the exact verifier, and how many
    prompts have a pair."""
    pairs, points = PairJudge(system, "world-draw-pair"), PointJudge(system, "world-draw-point")
    groups = drawings(context.items(PROMPTS))
    found: dict[str, float] = {}
    for rule in RULES:
        chosen = [(mine(asked, made, pairs, points, rule), true) for asked, made, true in groups]
        gaps = [(true[m.chosen] - true[m.rejected], true[0] - true[1]) for m, true in chosen if m is not None]
        found[f"mined by {rule}: gap"] = sum(gap for gap, _ in gaps) / max(len(gaps), 1)
        found[f"mined by {rule}: pairs"] = len(gaps) / len(groups)
        if rule != "random":  # of the same prompts, so that a rule without pairs gains nothing
            found[f"mined by {rule}: above random"] = sum(gap - other for gap, other in gaps) / max(len(gaps), 1)
    return found


def data(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """A source for each kind, so that every judge reads the same documents of a kind."""
    return [{"name": kind, "world": WORLD, "documents": EACH, "weight": 1.0,
             "tasks": {f"{kind}-pair": 1.0, f"{kind}-point": 1.0, f"{kind}-think": 3.0}} for kind in kinds]


def stages(steps: int, lr: float = 2e-3, **more: Any) -> tuple[Stage, ...]:
    return (Stage(steps=steps, batch=BATCH, lr=lr, warmup=min(10, steps), schedule="linear", floor=0.05, **more),)


PARTS = ("vision", "connector", "embed", "trunk")
READER = Recipe(
    system="vlm", size="small", init={"vision": "zoo/clip#vision", **{part: f"zoo/vlm#{part}" for part in PARTS[1:]}},
    data=(Source(world=WORLD, tasks={"caption": 1.0, "talk": 2.0}),), stages=stages(READING),
    optimizer=Optimizer(kind="muon", weight_decay=0.01, betas=(0.9, 0.98)), precision="bf16", log_every=20,
    save_every=1000, threads=2, workers=1)
RECIPE = replace(READER, init={part: f"@reader#{part}" for part in PARTS},
                 data=tuple(Source(**source) for source in data(KINDS)), stages=stages(STEPS))


def arms() -> tuple[Arm, ...]:
    return (Arm(name="all", about="one judge of everything"),
            *(Arm(name=kind, about=f"a judge of one kind: {kind}", control=True, changes={"data": data([kind])})
              for kind in KINDS))


def claims() -> tuple[Claim, ...]:
    return (
        *(Claim(text=f"{kind}: one judge of everything gives more true verdicts with reasons than a judge of this kind "
                     "alone, after equal updates", metric=f"{kind}-think", treatment="all", control=kind)
          for kind in KINDS),
        Claim(text="the first place is preferred, or shunned, by less than 5 points", metric="place preferred",
              treatment="all", better="lower", margin=-0.05),
        *(Claim(text=f"pairs mined by {rule} are further apart for the exact verifier than random ones",
                metric=f"mined by {rule}: above random", treatment="all") for rule in RULES[:2]))


ABOUT = f"""
Judges of drawings, of answers to double questions, and of stories in four pictures: verdicts on pairs, three quarters
of them behind reasons, and scores. The judge of everything reads {EACH} documents of each kind once; a judge of one
kind reads its own {EACH} as often as makes as many updates ({STEPS} of {BATCH}). All start from one reader, which is
the zoo's vision-language model after {READING} more steps of captions and talks, and train its tower along. Pictures
are of one object. The transfer matrix: NAME-think and NAME-pair of every arm; candidates are shown in both orders, so
that a judge that always says the first has half. Mining: {CANDIDATES} drawings of each of {PROMPTS} prompts by `mini`
in {WEAK.evaluations} evaluations without guidance; random takes the first two, rank the first comparison that was
decided in both orders alike, sift the best-scored winner with the worst-scored loser. Not measured: a second family,
preference optimisation on the mined pairs, and videos with motion (stories stand for them).
"""
SHARES = ("verdicts with reasons", "verdicts at once", "place preferred", *TASKS,
          *(f"mined by {rule}: pairs" for rule in RULES),
          *(f"{task}: {key}" for task in TASKS for key in ("says the first", "orders agree", "form", "totals agree")))
STUDY = Study(
    name="unified-reward", title="UnifiedReward: one judge of drawings, answers and stories", about=ABOUT,
    recipe=RECIPE, shared={"reader": READER}, measure=measure, arms=arms(), claims=claims(),
    quick={"stages.0.batch": 4, "threads": 1, "workers": 0}, units=dict.fromkeys(SHARES, "share"))
