"""See what a model does: asking, drawing, editing, planning, telling, as one page with every result checked."""
import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cli import common
from diptych.cli.report import Page, card, picture, text, verdict

if TYPE_CHECKING:
    from diptych.document import Document
    from diptych.systems.base import Sampling, System

Filled = Any  # a document whose task says which pieces it has, so that they are used without asking their kind

SHOWN = 6  # documents of a task on the page
SCORED = ("caption", "question", "refer", "draw", "edit", "layout", "plan")
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
SWEEP = 24  # drawings per guidance scale
BATCH = 48  # documents that are filled together


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="where index.html goes")
    parser.add_argument("--documents", type=common.positive, default=40, metavar="N",
                        help="held-out documents per task in the table of scores (default: %(default)s)")
    parser.add_argument("--world", default="mini", help="where the documents come from (default: %(default)s)")
    common.add_model(parser)


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    system = common.load_model(args)
    tour = Tour(system, args)
    page = Page(f"Diptych: {args.model}", f"A model of {system.num_parameters() / 1e6:.1f}M parameters that sees and "
                "draws. All documents are from the held-out split of the world; every verdict is computed from the "
                "pixels by an exact verifier that knows the true scene.")
    for section in (tour.asking, tour.drawing, tour.editing, tour.planning, tour.story, tour.round_trips, tour.sweep,
                    tour.scores):
        print(f"{section.__name__.replace('_', ' ')} ...", flush=True)
        section(page)
    seconds = time.perf_counter() - start
    page.section("This run")
    page.pre(_about(args, seconds))
    page.write(args.out / "index.html")
    print("\n" + common.table(tour.rows, HEAD))
    print(f"\n{args.out / 'index.html'} ({common.duration(seconds)})")
    return 0


HEAD = ("task", "right", "95% interval", "documents")


class Tour:
    """The documents of the tour, filled once and shared by the sections."""

    def __init__(self, system: "System", args: argparse.Namespace) -> None:
        self.system, self.args = system, args
        self.rows: list[tuple[str, str, str, int]] = []
        self.done: dict[str, tuple[list[Filled], list[Filled]]] = {}

    def fill(self, documents: Sequence["Document"], sampling: "Sampling | None" = None) -> list[Filled]:
        """Every document with a seed of its own; the result does not depend on the batch."""
        from diptych.engine import generate

        return generate(self.system, documents, sampling, seeds=self.seeds(documents), slots=BATCH)

    def seeds(self, documents: Sequence["Document"]) -> list[int]:
        return [self.args.seed + i for i in range(len(documents))]

    def task(self, name: str) -> tuple[list[Filled], list[Filled]]:
        """(true documents, the same as the model fills them) of a task."""
        from diptych.world import tasks

        if name not in self.done:
            count = max(self.args.documents, SHOWN)
            true = [tasks.document(name, i, split="test", world=self.args.world) for i in range(count)]
            self.done[name] = true, self.fill(true)
        return self.done[name]

    def shown(self, name: str) -> list[tuple[Filled, Filled]]:
        true, made = self.task(name)
        return list(zip(true, made, strict=True))[:SHOWN]

    # -- sections -----------------------------------------------------------------------------------------------------

    def asking(self, page: Page) -> None:
        from diptych.cli.ask import marked

        page.section("Asking", "Describing, answering, and pointing at what a phrase names.")
        for name in ("caption", "question"):
            page.row(card([picture(true.pieces[0], "the picture")], f"<b>{text(true.pieces[1].text)}</b>",
                          text(made.pieces[-1].text), verdict(judge(true, made)))
                     for true, made in self.shown(name))
        page.row(card([picture(marked(true.pieces[0], made.pieces[-1]), "the picture with the boxes")],
                      f"<b>{text(true.pieces[1].text)}</b>", verdict(judge(true, made)))
                 for true, made in self.shown("refer"))

    def drawing(self, page: Page) -> None:
        page.section("Drawing, step by step", "What the model expects the finished picture to be, from the first look "
                     "at pure noise to the end.")
        documents = [example(), *(true for true, _ in self.shown("draw"))][:SHOWN]
        sampling = self.system.default_sampling()
        sampling = dataclasses.replace(sampling, partial=max(1, sampling.evaluations // 6))
        frames: dict[int, list[Any]] = {i: [] for i in range(len(documents))}
        made = self.system.generate(documents, sampling, seeds=self.seeds(documents),
                                    emit=lambda i, event: frames[i].append(event.value))
        from diptych.document import Image

        page.row(card([picture(Image(pixels=f), "a step", 96) for f in frames[i]],
                      f"<b>{text(true.pieces[0].text)}</b>", verdict(judge(true, done), parts(true, done)))
                 for i, (true, done) in enumerate(zip(documents, made, strict=True)))

    def editing(self, page: Page) -> None:
        page.section("Editing", "Before, after, and what was wanted. Right means: the change is made and everything "
                     "else stayed.")
        page.row(card([picture(true.pieces[0], "before"), picture(made.pieces[-1], "after"),
                       picture(true.pieces[-1], "wanted", 64)],
                      f"<b>{text(true.pieces[1].text)}</b>", verdict(judge(true, made), parts(true, made)))
                 for true, made in self.shown("edit"))

    def planning(self, page: Page) -> None:
        from diptych.cli.ask import marked

        page.section("Planning", "First the boxes are said, then the picture is drawn into them; below, the boxes are "
                     "given.")
        for name in ("plan", "layout"):
            page.row(card([picture(marked(made.pieces[-1], made.pieces[1]), "the drawing with its boxes")],
                          f"<b>{text(true.pieces[0].text)}</b>", verdict(judge(true, made)))
                     for true, made in self.shown(name))

    def story(self, page: Page) -> None:
        from diptych.document import Text
        from diptych.world import tasks

        page.section("A story", "Four pictures and what happens between them; each is drawn after the model has "
                     "looked at the one before.")
        true = [tasks.document("story", i, split="test", world=self.args.world) for i in range(2)]
        for document in self.fill(true):
            page.row(card([picture(p, "a picture of the story")] if not isinstance(p, Text) else [],
                          *([text(p.text)] if isinstance(p, Text) else [])) for p in document)

    def round_trips(self, page: Page) -> None:
        from diptych.cli.caption import REQUEST
        from diptych.document import Document, Text
        from diptych.world import language
        from diptych.world.perceive import perceive

        page.section("There and back", "The model describes its own drawings. Right means: the description says what "
                     "the verifier sees in the drawing.")
        drawn = [made for _, made in self.shown("draw")]
        asked = [Document((d.pieces[-1].replace(target=False, role="user"), Text(text=REQUEST),
                           Text(role="assistant", target=True)), "caption") for d in drawn]
        cards = []
        for document, answered in zip(drawn, self.fill(asked), strict=True):
            percept = perceive(document.pieces[-1].pixels, self.args.world)
            said = language.parse_caption(answered.pieces[-1].text)
            if percept.certain and percept.background is not None:
                seen = language.caption_spec(percept.scene())
                found = verdict(said is not None and language.same_claims(said, seen))
            else:
                found = verdict(None, "unclear drawing")
            cards.append(card([picture(document.pieces[-1], "the drawing")],
                              f"<b>{text(document.pieces[0].text)}</b>", text(answered.pieces[-1].text), found))
        page.row(cards)

    def sweep(self, page: Page) -> None:
        from diptych.ledger import proportion
        from diptych.ledger.report import format_metric
        from diptych.world import tasks

        page.section("Guidance", "The same prompts with the words pulling less or more; 1 is no guidance.")
        true: list[Filled] = [tasks.document("draw", i, split="test", world=self.args.world) for i in range(SWEEP)]
        rows = []
        for scale in SCALES:
            asked = argparse.Namespace(steps=None, guidance=scale)
            made = self.fill(true, common.sampling_of(self.system, asked))
            right = sum(judge(t, m) is True for t, m in zip(true, made, strict=True))
            rows.append((f"{scale:g}", format_metric(proportion(right, len(true)))))
            page.row([card([picture(m.pieces[-1], t.pieces[0].text, 64) for t, m in zip(true, made, strict=True)][:12],
                           f"scale {scale:g}: {right} of {len(true)} right")])
        page.table(rows, ("scale", "drawings right"))

    def scores(self, page: Page) -> None:
        from diptych.ledger import proportion, read_entries, render_table

        page.section("Scores of this run", "Few documents, so that the intervals are wide; the measured table of the "
                     "model is below.")
        for name in SCORED:
            true, made = self.task(name)
            judged = [judge(t, m) for t, m in zip(true, made, strict=True)]
            metric = proportion(sum(j is True for j in judged), len(judged))
            self.rows.append((name, f"{metric.value:.1%}", f"{metric.low:.1%} to {metric.high:.1%}", len(judged)))
        page.table([tuple(map(str, row)) for row in self.rows], HEAD)
        entries = [e for e in read_entries() if e.name.startswith(self.args.model)]
        if entries:
            page.section("Measured", "From the ledger: more documents, with recipe and cost.")
            page.pre(render_table(entries))


def example() -> Filled:
    """The prompt of the README, with its meaning for the verifier."""
    from diptych.cli.draw import drawing
    from diptych.world.spec import Item, Spec

    spec = Spec(items=(Item(count=2, color="red", shape="circle"), Item(color="blue", shape="square")),
                relations=((0, "left of", 1),))
    document = drawing("two red circles left of a blue square")
    return dataclasses.replace(document, meta={"spec": spec.to_dict(), "world": "mini"})


# -- verdicts ---------------------------------------------------------------------------------------------------------

def judge(true: Filled, made: Filled) -> bool:
    """Whether the last piece of `made` is right, by the exact rules of its task."""
    from diptych.world import language
    from diptych.world.spec import Spec

    answer = made.pieces[-1]
    if true.task == "question":
        return answer.text.strip() == true.meta["answer"]
    if true.task == "caption":
        said = language.parse_caption(answer.text)
        return said is not None and language.same_claims(said, Spec.from_dict(true.meta["spec"]))
    if true.task == "refer":
        return len(answer.boxes) == 1 and overlap(answer.boxes[0], true.pieces[-1].boxes[0]) > 0.5
    return _verdict(true, made).exact


def parts(true: Filled, made: Filled) -> str:
    """The verifier's parts that are not perfect, as text."""
    found = _verdict(true, made)
    wrong = [f"{name} {value:.0%}" for name, value in found.scores.items() if value < 1]
    return ", ".join(wrong) if wrong or not found.abstained else "unclear picture"


def _verdict(true: Filled, made: Filled) -> Any:
    from diptych.world.scene import Scene
    from diptych.world.spec import Spec
    from diptych.world.verify import verify, verify_edit

    answer = made.pieces[-1]
    world = true.meta["world"]
    if true.task == "edit":
        return verify_edit(true.pieces[0].pixels, answer.pixels, Scene.from_dict(true.meta["scene"]),
                           Scene.from_dict(true.meta["after"]), world)
    return verify(answer.pixels, Spec.from_dict(true.meta["spec"]), world)


def overlap(a: Any, b: Any) -> float:
    """Intersection over union of two boxes xyxy."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, float(width)) * max(0.0, float(height))
    area = sum(float(x[2] - x[0]) * float(x[3] - x[1]) for x in (a, b))
    return both / (area - both) if area > both else 0.0


def _about(args: argparse.Namespace, seconds: float) -> str:
    from diptych.ledger.entry import Machine, code_version

    here = Machine.here()
    return (f"diptych {code_version()}, model {args.model}, seed {args.seed}\n{here.cpu}, {here.cores} cores, "
            f"torch {here.torch}, Python {here.python}\n{common.duration(seconds)}")
