"""UnifiedReward-Think (arXiv 2505.03318): a judge that thinks, by cold start, rejection sampling and reinforcement on
what it got wrong, against the same judge trained on directly.

Every arm starts from one judge that says its verdict at once. An arm that thinks learns the form, on drawings and no
more of the other kinds than their form takes, then from its own right thoughts about all kinds, then on the documents
it judged wrongly.
"""
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from diptych.alignment.recipe import Align, Ask, Grpo
from diptych.alignment.rewards.judges import Thought
from diptych.alignment.sifting import RIGHT, WRONG, consistent, sift, write_documents
from diptych.replication.measures import REPLY, judgements
from diptych.replication.studies.unified_reward import BATCH, FROZEN, PARTS, READ, READER, WORLD, stage
from diptych.replication.study import Arm, Claim, Context, Job, Measured, Study
from diptych.systems.base import System
from diptych.systems.io import load_system
from diptych.training.recipe import Optimizer, Recipe, Source
from diptych.world import tasks
from diptych.world.judging import KINDS

log = logging.getLogger("diptych.replication")

# steps; the form is learnt once for all seeds and then with the seed's own documents; of the reinforcement, iterations
# of one step each
BASE, FORM, COLD, REJECTION, UPDATES = 400, 150, 30, 60, 30
ROWS, ITEMS = 128, 96  # documents of each kind to sift, of each task to measure
FEW = 64  # documents of other kinds than drawings whose thoughts are taught
GROUP, PROMPTS = 8, 4
FIRST = 1_000_000  # number of the first document to sift: no training reads so far
THINKING = tuple(f"{kind}-think" for kind in KINDS)
DIRECT = tuple(f"{kind}-pair" for kind in KINDS)
ALL = "all.jsonl"


JUDGE = replace(READER, init=READ, stages=(stage(BASE, freeze=FROZEN),),
                data=(Source(world=WORLD, tasks={f"{k}-{mode}": 1.0 for k in KINDS for mode in ("pair", "point")}),))
JUDGED, FORMED = ({**READ, **{part: f"@{name}#{part}" for part in PARTS}} for name in ("judge", "form"))
# taught on drawings alone, so small a model gives no thoughts about anything else, and without verdicts at once among
# them it forgets how to judge
TEACHER = (
    Source(name="drawings", world=WORLD, weight=2.0, tasks={"draw-think": 1.0}),
    Source(name="few answers", world=WORLD, weight=1.0, documents=FEW, tasks={"answer-think": 1.0}),
    Source(name="few stories", world=WORLD, weight=0.5, documents=FEW, tasks={"story-think": 1.0}),
    Source(name="at once", world=WORLD, weight=1.5, tasks={
        **dict.fromkeys(("draw-pair", "answer-pair"), 1.0), **dict.fromkeys(("draw-point", "answer-point"), 0.5),
        "story-pair": 0.5, "story-point": 0.25}))
TAUGHT = replace(JUDGE, init=JUDGED, data=TEACHER, stages=(stage(FORM, freeze=FROZEN),))
COLD_START = replace(TAUGHT, init=FORMED, stages=(stage(COLD, 1e-3, freeze=FROZEN),))
REINFORCED = Align(
    tasks={name: Ask(reward="thought") for name in THINKING}, group=GROUP, prompts=PROMPTS, iterations=UPDATES,
    sampling={"text": {"temperature": 1.0, "max_tokens": REPLY}}, lr=2e-5, freeze=FROZEN,
    grpo=Grpo(unbiased=True, beta=0.04, clamp=10.0), optimizer=Optimizer(weight_decay=0.0), save_every=3, keep=1,
    micro=GROUP * PROMPTS)


# -- what comes behind the cold start ---------------------------------------------------------------------------------

def sifted(system: System, context: Context) -> Path:
    """The folder of what the cold-started model answers rightly and wrongly. Arms that differ behind it share it, for
    the model is the same for a seed."""
    place = context.folder.parent / f"rows-{context.seed}"
    if not (place / ALL).is_file():  # is written last
        rows = [tasks.document(name, FIRST + i, world=WORLD) for i in range(context.items(ROWS)) for name in THINKING]
        own = system.default_sampling()
        sampling = replace(own, text=replace(own.text, max_tokens=REPLY))
        kept = sift(system, rows, Thought(), keep=consistent, sampling=sampling)
        kept.write(place)
        write_documents([d.prompt() for d in rows], place / ALL)
    return place


def rejection(system: System, context: Context) -> Recipe | None:
    """Training on own answers that were right."""
    rows = sifted(system, context) / RIGHT
    if not rows.stat().st_size:
        log.warning("%s, seed %d: nothing was right, no training on own answers", context.arm.name, context.seed)
        return None
    return replace(context.recipe, init={}, data=(Source(messages=str(rows)),),
                   stages=(stage(2 if context.quick else REJECTION, 5e-4, freeze=FROZEN),))


def reinforced(chosen: str, system: System, context: Context) -> Align | None:
    """GRPO on the rows of this file."""
    rows = sifted(system, context) / chosen
    if not rows.stat().st_size:
        return None
    short = {"iterations": 1, "prompts": 2, "group": 4} if context.quick else {}
    return replace(REINFORCED, documents=str(rows), seed=context.seed, **short)


def behind(chosen: str) -> tuple[Job, ...]:
    return Job(name="rejection", recipe=rejection), Job(name="reinforced", recipe=partial(reinforced, chosen))


# -- measuring --------------------------------------------------------------------------------------------------------

def verdicts_of(system: System, context: Context) -> dict[str, float]:
    """Of thoughts: true verdicts, form and agreement, in the mean over kinds, about the documents of the end."""
    shown = judgements(system, context, THINKING, n=ITEMS, world=WORLD)
    return {"verdicts": _mean(shown, THINKING), "form": _mean(shown, [f"{t}: form" for t in THINKING]),
            "totals agree": _mean(shown, [f"{t}: totals agree" for t in THINKING])}


def measure(system: System, context: Context) -> Measured:
    found: dict[str, float] = {}
    for name, folder in (("cold start", context.model()), ("rejection", context.model("rejection"))):
        if context.arm.then and folder.is_dir():
            found |= {f"{name}: {k}": v for k, v in verdicts_of(load_system(folder).eval(), context).items()}
    if context.arm.then:
        rows = context.folder.parent / f"rows-{context.seed}"
        counts = [len((rows / name).read_text("utf-8").splitlines()) for name in (RIGHT, WRONG)]
        found |= {"rows kept as right": float(counts[0]), "rows left wrong": float(counts[1])}
    lines = context.folder / "reinforced" / "metrics.jsonl"
    if lines.is_file():
        same = [json.loads(line)["same in all"] for line in lines.read_text("utf-8").splitlines()]
        found["groups of one reward"] = sum(same) / len(same)
    shown = judgements(system, context, [*DIRECT, *THINKING], n=ITEMS, world=WORLD)
    own = DIRECT if context.arm.name == "direct" else THINKING
    found |= shown
    found |= {"verdicts": _mean(shown, own), "direct verdicts": _mean(shown, DIRECT),
              "form": _mean(shown, [f"{t}: form" for t in THINKING]),
              "totals agree": _mean(shown, [f"{t}: totals agree" for t in THINKING]),
              "little taught verdicts": _mean(shown, own[1:])}
    if "rejection: totals agree" in found:
        found["totals agree: gained"] = found["totals agree"] - found["rejection: totals agree"]
    return found


def _mean(shown: dict[str, float], names: Sequence[str]) -> float:
    return sum(shown[name] for name in names) / len(names)


# -- the study --------------------------------------------------------------------------------------------------------

BEHIND = COLD + REJECTION + UPDATES  # behind the form
EQUAL = FORM + BEHIND
ABOUT = f"""
A judge of drawings, answers and stories, whose verdicts and scores come at once ({BASE} steps of {BATCH} documents,
from the reader of the study unified-reward), is shared by all arms. Each makes {EQUAL} more steps: on direct verdicts
of all kinds; on what the teacher shows; or {FORM + COLD} of these, {REJECTION} on its own right and consistent thoughts
about {ROWS} documents of each kind, and {UPDATES} of GRPO with {GROUP} answers to each of {PROMPTS} documents that it
judged wrongly ("think") or of all ("all rows"). Rewards are those of the paper: one for the form, one for the verdict.
The teacher shows thoughts (exact scores per dimension, with slips on purpose) about drawings without end, about {FEW}
answers and {FEW} stories, and between them verdicts and scores at once. In the paper the cold start has drawings only;
a model as small as this one, which no reading taught to think, then says no thoughts about anything else. Verdicts are
counted in the arm's own mode (thinking, or direct), on held-out pairs in both orders; "little taught" are those on
answers and stories. A step of GRPO sees fewer documents than one of the others and costs more; equal are updates, not
FLOPs. The first {FORM} steps on what the teacher shows are made once for all seeds. Pictures are of one object.
"""
KEYS = ("verdicts", "direct verdicts", "form", "totals agree", "little taught verdicts", "totals agree: gained",
        "groups of one reward", *DIRECT, *THINKING, *(f"{t}: form" for t in THINKING),
        *(f"{t}: totals agree" for t in THINKING),
        *(f"{t}: {k}" for t in (*DIRECT, *THINKING) for k in ("says the first", "orders agree")),
        *(f"{s}: {k}" for s in ("cold start", "rejection") for k in ("verdicts", "form", "totals agree")))

STUDY = Study(
    name="unified-reward-think", title="UnifiedReward-Think: a judge that thinks before it says so",
    about=ABOUT, recipe=COLD_START, shared={"reader": READER, "judge": JUDGE, "form": TAUGHT}, measure=measure,
    arms=(
        Arm(name="direct", about="direct verdicts, as many steps", control=True,
            changes={"stages.0.steps": EQUAL, "init": JUDGED,
                     "data": [{"world": WORLD, "tasks": dict.fromkeys(DIRECT, 1.0)}]}),
        Arm(name="taught", about="what the teacher shows only, as many steps", control=True,
            changes={"stages.0.steps": BEHIND}),
        Arm(name="think", about="cold start, own right thoughts, reinforcement on what was wrong",
            changes={"about": "then own right thoughts, and reinforcement on what was wrong"}, then=behind(WRONG)),
        Arm(name="all rows", about="as think, with reinforcement on all documents", control=True,
            changes={"about": "then own right thoughts, and reinforcement on all documents"}, then=behind(ALL))),
    claims=(
        Claim(text="Thinking judges better than verdicts said at once, after equal updates", metric="verdicts",
              treatment="think", control="direct"),
        Claim(text="... and better than what the teacher shows alone", metric="verdicts", treatment="think",
              control="taught"),
        Claim(text="... also where the teacher showed few thoughts", metric="little taught verdicts", treatment="think",
              control="taught"),
        Claim(text="Reinforcement on what was wrong is better than on all documents", metric="verdicts",
              treatment="think", control="all rows"),
        Claim(text="Over 98% of the replies have the form", metric="form", treatment="think", margin=0.98),
        Claim(text="Reinforcement makes totals agree with verdicts more often, though that is not rewarded",
              metric="totals agree: gained", treatment="think"),
        Claim(text="Thinking also makes the verdicts better that are said at once", metric="direct verdicts",
              treatment="think", control="direct")),
    quick={"stages.0.batch": 4, "threads": 1, "workers": 0}, units=dict.fromkeys(KEYS, "share"))
