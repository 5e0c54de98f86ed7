"""UnifiedReward (arXiv 2503.05236): one judge of drawings, answers and stories against a judge of each, after equally
many updates; which place it prefers; pairs it mines from drawings of two models, and what these learn from them.
"""
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from diptych.alignment.preference import Preference
from diptych.alignment.recipe import Align
from diptych.alignment.rewards import table
from diptych.alignment.rewards.base import gains
from diptych.alignment.rewards.judges import PairJudge, PointJudge
from diptych.alignment.rewards.mining import RULES, Rule, contest, preferred
from diptych.alignment.sifting import read_pairs, write_pairs
from diptych.document import Document
from diptych.parts.resources import SHIPPED
from diptych.replication.measures import judgements, suites
from diptych.replication.studies.aia import CONFIG, LEARNT, READY
from diptych.replication.studies.unirl import LOOSE, loosely
from diptych.replication.study import Arm, Claim, Context, Job, Measured, Study
from diptych.systems.base import System
from diptych.systems.io import load_system
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.world import tasks
from diptych.world.judging import KINDS, MODES

WORLD = "grid"
READING, EACH, BATCH = 700, 4096, 32  # steps; documents of each kind; documents of a step
STEPS = EACH * len(KINDS) // BATCH  # a judge of one kind reads its own documents as often as there are kinds
FEW_KINDS, FEWER = ("draw", "answer"), 3072  # of judges of the second family: a story would take it 288 codes
ITEMS = 96  # to measure, of each task
PROMPTS, CANDIDATES, DRAWN = 256, 6, 300  # to mine pairs from; of each; drawings to measure
FIRST = 2_000_000  # number of the first prompt to mine from: no training reads so far
PREFERRING, LR = 60, 5e-5  # steps of preference optimisation
# of sums over 36 codes, and of half the mean error of what is masked of them: alike in size
BETA = {"janus": 0.1, "show-o": 7.2}
TASKS = tuple(f"{kind}-{mode}" for kind in KINDS for mode in MODES)
DRAWERS = tuple(LOOSE)


# -- judges -----------------------------------------------------------------------------------------------------------

def measure(system: System, context: Context) -> Measured:
    """A row of the transfer matrix: every kind of its family, whatever the judge was trained on."""
    kinds = FEW_KINDS if context.recipe.system == "show-o" else KINDS
    found = judgements(system, context, [f"{kind}-{mode}" for kind in kinds for mode in MODES], n=ITEMS, world=WORLD)
    for mode, name in (("think", "verdicts with reasons"), ("pair", "verdicts at once")):
        found[name] = sum(found[f"{kind}-{mode}"] for kind in kinds) / len(kinds)
    own = [f"{kind}-{mode}" for kind in KINDS for mode in ("pair", "think") if trained_on(context.recipe, kind)]
    found["place preferred"] = sum(abs(found[f"{name}: says the first"] - 0.5) for name in own) / len(own)
    for family in DRAWERS if context.arm.then else ():
        found |= learnt(family, context)
    return found


def trained_on(recipe: Recipe, kind: str) -> bool:
    return any(name.startswith(f"{kind}-") for source in recipe.data for name in source.tasks)


# -- pairs, and what drawing models learn from them --------------------------------------------------------------------

@lru_cache(1)
def candidates(family: str, first: int, prompts: int) -> list[tuple[Document, list[Document]]]:
    """Prompts with drawings by the bundled model, loose, so that it errs."""
    model = load_system(SHIPPED / f"{family}-grid").eval()
    sampling = loosely(model, family)
    out = []
    for start in range(0, prompts, 32):
        asked = [tasks.document("draw", first + i, world=WORLD) for i in range(start, min(start + 32, prompts))]
        seeds = list(range(start * CANDIDATES, (start + len(asked)) * CANDIDATES))
        made = model.generate([a for a in asked for _ in range(CANDIDATES)], sampling, seeds=seeds)
        out += [(a, made[n * CANDIDATES:(n + 1) * CANDIDATES]) for n, a in enumerate(asked)]
    return out


def pairs_of(family: str, rule: Rule, context: Context) -> Path:
    return context.folder / f"{family}-{rule}.jsonl"


def mined(family: str, judge: System, context: Context) -> None:
    """Pairs by every rule: one per prompt at most."""
    pairs = PairJudge(judge, "world-draw-think")
    points = PointJudge(pairs.ask, "world-draw-point")
    prompts = context.items(PROMPTS)
    groups = candidates(family, FIRST + context.seed * prompts, prompts)
    judged = contest(groups, pairs, points)
    for rule in RULES:
        write_pairs(filter(None, preferred(groups, judged, rule)), pairs_of(family, rule, context))


def preferring(family: str, rule: Rule, judge: System, context: Context) -> Align | None:
    """DPO of the drawing model on the pairs that the judge mines by this rule."""
    place = pairs_of(family, rule, context)
    if not place.is_file():
        mined(family, judge, context)
    if not place.stat().st_size:
        return None
    iterations, prompts = (1, 2) if context.quick else (PREFERRING, 8)
    return Align(model=f"{family}-grid", world=WORLD, method="dpo", preferred=str(place), lr=LR,
                 dpo=Preference(beta=BETA[family], imitation=1.0), freeze=tuple(READY[family]), seed=context.seed,
                 optimizer=Optimizer(weight_decay=0.0), save_every=1000, keep=1,
                 iterations=iterations, prompts=prompts)


def learnt(family: str, context: Context) -> dict[str, float]:
    """By rule: how many prompts have a pair, by how much the chosen drawing is better for the exact verifier, also than
    by chance on the same prompts, and how many drawings are right behind the training on them."""
    gaps = {rule: true_gaps(pairs_of(family, rule, context)) for rule in RULES}
    start = drawings_right(family, SHIPPED / f"{family}-grid", context)
    found = {f"{family}: right before": start}
    for rule in RULES:
        own, model = gaps[rule], context.model(f"{family} {rule}")
        found |= {f"{family}: pairs, {rule}": len(own) / context.items(PROMPTS),
                  f"{family}: gap, {rule}": sum(own.values()) / max(len(own), 1),
                  f"{family}: right, {rule}": drawings_right(family, model, context) if model.is_dir() else start}
        if rule != "random":  # a rule without pairs gains nothing
            above = [gap - gaps["random"][n] for n, gap in own.items()]
            found[f"{family}: gap above random, {rule}"] = sum(above) / max(len(above), 1)
    return found


def true_gaps(place: Path) -> dict[int, float]:
    """By number of the prompt."""
    if not place.stat().st_size:
        return {}
    oracle, found = table.make("scene"), read_pairs(place)
    values = [gains(oracle, oracle([d.prompt() for d in side], side))
              for side in ([p.chosen for p in found], [p.rejected for p in found])]
    return {p.chosen.meta["index"]: a - b for p, a, b in zip(found, *values, strict=True)}


def drawings_right(family: str, folder: Path, context: Context) -> float:
    model = load_system(folder).eval()
    return suites(model, context, ["draw"], n=DRAWN, world=WORLD, sampling=loosely(model, family))["draw"]


# -- recipes ----------------------------------------------------------------------------------------------------------

def data(kinds: Sequence[str], each: int = EACH) -> list[dict[str, Any]]:
    """A source for each kind, so that every judge reads the same documents of a kind."""
    return [{"name": kind, "world": WORLD, "documents": each, "weight": 1.0,
             "tasks": {f"{kind}-pair": 1.0, f"{kind}-point": 1.0, f"{kind}-think": 2.0}} for kind in kinds]


def stage(steps: int, lr: float = 3e-3, **more: Any) -> Stage:
    return Stage(steps=steps, batch=BATCH, lr=lr, warmup=min(10, steps), schedule="linear", floor=0.05, **more)


PARTS = ("vision", *LEARNT["janus"])
# what sees is learnt by inspecting: trained along with verdicts, which tell little about it, it forgets within minutes
FROZEN = ("codec", "vision", "aligner")
READER = Recipe(
    system="janus", size="small", config=CONFIG["janus"],
    init=READY["janus"] | {part: f"zoo/janus-grid#{part}" for part in LEARNT["janus"]},
    data=(Source(world=WORLD, tasks={"inspect": 3.0, "caption-short": 0.5, "check": 1.0, "question": 1.5}),),
    stages=(stage(30, 1e-2, name="words", only=("embed",)), stage(READING, name="all", freeze=("codec",))),
    optimizer=Optimizer(kind="muon", weight_decay=0.01, betas=(0.9, 0.98)), precision="bf16", log_every=20,
    save_every=1000, threads=2, workers=1)
READ = {"codec": READY["janus"]["codec"], **{part: f"@reader#{part}" for part in PARTS}}
RECIPE = replace(READER, init=READ, data=tuple(Source(**source) for source in data(KINDS)),
                 stages=(stage(STEPS, freeze=FROZEN),))

# the second family reads pictures by the codes that it draws, whose encoder is never trained
CODES_READER = replace(READER, system="show-o", config=CONFIG["show-o"], init=READY["show-o"] | {
    part: f"zoo/show-o-grid#{part}" for part in LEARNT["show-o"]})


def by_codes(kinds: Sequence[str]) -> dict[str, Any]:
    """What makes the recipe one of a judge of the second family."""
    return {"system": "show-o", "config": CONFIG["show-o"], "data": data(kinds, FEWER),
            "stages.0.steps": FEWER * len(FEW_KINDS) // BATCH, "stages.0.freeze": ["codec"],
            "init": READY["show-o"] | {part: f"@show-o-reader#{part}" for part in LEARNT["show-o"]}}


# -- the study --------------------------------------------------------------------------------------------------------

def arms() -> tuple[Arm, ...]:
    jobs = tuple(Job(name=f"{family} {rule}", recipe=partial(preferring, family, rule), beside=True)
                 for family in DRAWERS for rule in RULES)
    return (Arm(name="all", about="one judge of everything; then DPO of drawing models on pairs it mines", then=jobs),
            *(Arm(name=kind, about=f"a judge of one kind: {kind}", control=True, changes={"data": data([kind])})
              for kind in KINDS),
            Arm(name="show-o: all", about="one judge of drawings and answers", changes=by_codes(FEW_KINDS)),
            *(Arm(name=f"show-o: {kind}", about=f"a judge of one kind: {kind}", control=True, changes=by_codes([kind]))
              for kind in FEW_KINDS))


def claims() -> tuple[Claim, ...]:
    def right(family: str, text: str, rule: str, other: str) -> Claim:
        return Claim(text=f"{text} ({family})", metric=f"{family}: right, {rule}", treatment="all", control="all",
                     against=f"{family}: right{other}")

    judges = [claim for of, where, kinds in (("", "janus", KINDS), ("show-o: ", "show-o", FEW_KINDS)) for claim in (
        *(Claim(text=f"{kind}: one judge of everything gives more true verdicts with reasons than a judge of this kind "
                     f"alone, after equal updates ({where})", metric=f"{kind}-think", treatment=f"{of}all",
                control=f"{of}{kind}") for kind in kinds),
        Claim(text=f"the first place is preferred, or shunned, by less than 5 points ({where})",
              metric="place preferred", treatment=f"{of}all", better="lower", margin=-0.05))]
    return (
        *judges,
        *(Claim(text=f"pairs mined by {rule} are further apart for the exact verifier than random ones ({family})",
                metric=f"{family}: gap above random, {rule}", treatment="all")
          for family in DRAWERS for rule in RULES[:2]),
        *(claim for family in DRAWERS for claim in (
            right(family, "sifted pairs make drawings better", "sift", " before"),
            right(family, "... by more than pairs that are only ranked", "sift", ", rank"),
            right(family, "... and than random ones", "sift", ", random"))))


ABOUT = f"""
Judges of drawings, of answers to double questions, and of stories in four pictures: verdicts on pairs, half of the
documents behind reasons, and scores. The judge of everything reads {EACH:,} documents of each kind once; a judge of one
kind reads its own {EACH:,} as often as makes as many updates ({STEPS} of {BATCH}). All start from one reader, the
bundled `janus-grid` after {READING} more steps of looking closely (how blurred, noisy or torn a drawing is, what it
shows, questions). What sees is frozen behind it: trained along, the judge no longer tells a blurred picture from a
sharp one. Pictures are of one object. The arms called "show-o" are judges of a second family, taught in the same way
from the bundled `show-o-grid`, which sees a picture as 36 codes out of 64: of drawings and answers alone, {FEWER:,}
documents of each, or of the one kind, in {FEWER * len(FEW_KINDS) // BATCH} updates. The transfer matrix: NAME-think and
NAME-pair of every arm; candidates are shown in both orders, so that a judge that always says the first has half.
NAME-point: final scores, of four, that are right.

Mining: {CANDIDATES} drawings of each of {PROMPTS} prompts, by the bundled `janus-grid` and `show-o-grid`, which draw
loosely as in the study unirl, so that they err; random takes the first two, rank the first comparison whose verdict,
behind thoughts, is the same in both orders, sift the best-scored winner with the worst-scored loser. DPO on the pairs
makes {PREFERRING} steps of 8, with the loss of imitating the better one beside it; right is what the exact verifier
says of {DRAWN} other prompts. Not measured: videos with motion (stories stand for them).
"""
SHARES = ("verdicts with reasons", "verdicts at once", "place preferred", *TASKS,
          *(f"{family}: {what}" for family in DRAWERS for what in (
              "right before", *(f"{figure}, {rule}" for figure in ("pairs", "right") for rule in RULES))),
          *(f"{task}: {key}" for task in TASKS for key in ("says the first", "orders agree", "form", "totals agree")))
STUDY = Study(
    name="unified-reward", title="UnifiedReward: one judge of drawings, answers and stories", about=ABOUT,
    recipe=RECIPE, shared={"reader": READER, "show-o-reader": CODES_READER}, measure=measure, arms=arms(),
    claims=claims(), quick={"stages.0.batch": 4, "threads": 1, "workers": 0}, units=dict.fromkeys(SHARES, "share"))
