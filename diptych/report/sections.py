"""The sections of the tour, one function each: what the model made of its documents, as HTML."""
from collections.abc import Callable
from functools import partial

from diptych.document import Boxes, Image, Text
from diptych.ledger import Machine
from diptych.ledger.entry import code_version
from diptych.report import page
from diptych.report.page import ARROW, Section, beside, boxes, card, cards, picture, pictures, text, verdict
from diptych.report.tour import STORIES, Shown, Tour

SHOWN, DRAWN, EDITED, BOXED = 8, 12, 9, 6  # items of a task: full rows on a wide screen
SMALL, WIDE = "10rem", "27rem"  # cards


def asking(tour: Tour) -> str:
    return cards((beside(picture(image, "the picture asked about"),
                         page.questions((q.question, given, given == q.answer, q.answer) for q, given in rows))
                  for image, rows in tour.asking()), WIDE)


def describing(tour: Tour) -> str:
    return cards((beside(picture(s.given, "the picture to describe"), page.answer(_text(s)),
                         verdict(s.outcome)) for s in tour.shown("caption", SHOWN)), WIDE)


def pointing(tour: Tour) -> str:
    def one(s: Shown) -> str:
        marks = boxes(s.true.of(Boxes)[0].boxes, "truth") + boxes(s.made.of(Boxes)[0].boxes)
        return card(page.asked(s.asked), pictures(picture(s.given, "the picture", marks=marks)),
                    verdict(s.outcome, f"IoU {s.outcome.numbers['IoU']:.2f}"))
    return cards(map(one, tour.shown("refer", DRAWN)), SMALL)


def stepwise(tour: Tour) -> str:
    def one(s: Shown, frames: list[Image]) -> str:
        strip = "".join(picture(f, f"frame {i + 1} of {len(frames)}") for i, f in enumerate(frames))
        return card(page.asked(s.asked), f'<div class="steps">{strip}</div>', verdict(s.outcome))
    return cards((one(s, frames) for s, frames in tour.stepwise()), "34rem")


def drawing(tour: Tour) -> str:
    return cards((card(pictures(picture(_drawn(s), s.asked)), page.asked(s.asked),
                       verdict(s.outcome)) for s in tour.shown("draw", DRAWN)), SMALL)


def editing(tour: Tour) -> str:
    return cards((card(page.asked(s.asked),
                       pictures(picture(s.given, "before", "before"), ARROW,
                                picture(_drawn(s), "after", "after")), verdict(s.outcome))
                  for s in tour.shown("edit", EDITED)), "18rem")


def layouts(tour: Tour) -> str:
    def one(s: Shown, given: Boxes) -> str:
        marks = boxes(given.boxes, labels=given.labels)
        return card(page.asked(", ".join(given.labels)),
                    pictures(page.sheet(marks, "given"), ARROW, picture(_drawn(s), "the drawing", "drawn", marks)),
                    verdict(s.outcome))
    return cards((one(s, s.true.of(Boxes)[0]) for s in tour.shown("layout", BOXED)), "18rem")


def planning(tour: Tour) -> str:
    def one(s: Shown, plan: Boxes) -> str:
        marks = boxes(plan.boxes, labels=plan.labels)
        return card(page.asked(s.asked),
                    pictures(page.sheet(marks, "planned"), ARROW, picture(_drawn(s), "the drawing", "drawn", marks)),
                    page.answer(", ".join(plan.labels)), verdict(s.outcome))
    return cards((one(s, s.made.of(Boxes)[0]) for s in tour.shown("plan", BOXED)), "18rem")


def story(tour: Tour) -> str:
    def one(s: Shown) -> str:
        said = ["", *(p.text or "(nothing)" for p in s.made.of(Text)[1:])]
        frames = [picture(p, words or "the first picture", words)
                  for p, words in zip(s.made.of(Image), said, strict=True)]
        return card(page.asked(s.asked), f'<div class="story">{"".join(frames)}</div>',
                    verdict(s.outcome))
    return cards(map(one, tour.shown("story", STORIES)), "48rem")


def round_trips(tour: Tour) -> str:
    def one(s: Shown) -> str:
        drawing = picture(s.true.of(Image)[-1], "the model's drawing")
        return beside(drawing, page.asked(s.asked), page.answer(_text(s)), verdict(s.outcome))
    return cards(map(one, tour.round_trips(SHOWN)), WIDE)


def sweep(tour: Tour) -> str:
    rows = tour.sweep()
    prompts = [s.asked for s in rows[0][1]]
    head = "<th>scale</th><th>right</th>" + "".join(f"<th>{page.prose(p)}</th>" for p in prompts)
    lines = []
    for scale, row in rows:
        right = sum(s.outcome.right for s in row)
        cells = "".join(f"<td>{picture(_drawn(s), s.asked)}</td>" for s in row)
        lines.append(f'<tr><td class="number">{scale:g}</td><td class="number">{right} of {len(row)}</td>{cells}</tr>')
    return f'<div class="scroll"><table class="sweep"><tr>{head}</tr>{"".join(lines)}</table></div>'


NAMES = {"caption": "describing", "question": "answering", "refer": "pointing", "draw": "drawing", "edit": "editing",
         "layout": "drawing a layout", "plan": "planning and drawing"}


def scores(tour: Tour) -> str:
    entry, metrics = tour.entry(), tour.results.metrics()
    kept = entry.metrics if entry is not None else {}
    head = (f'<th>task</th><th>here, {tour.n} items each</th><th></th><th class="wide">what counts as right</th>'
            f"<th>ledger{f' ({text(entry.date)})' if entry is not None else ''}</th>")
    lines = []
    for suite in tour.results.suites.values():
        key = f"{suite.name}/test"
        measured = kept.get(key)
        count = f" <small>of {measured.n}</small>" if measured is not None and measured.n else ""
        lines.append(f'<tr><td>{text(NAMES[suite.name])}</td><td class="number">{page.share(metrics[key])}</td>'
                     f'<td>{page.bar(metrics[key])}</td><td class="wide"><small>{text(suite.right)}</small></td>'
                     f'<td class="number">{page.share(measured)}{count}</td></tr>')
    return f'<div class="scroll"><table class="figures"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _drawn(shown: Shown) -> Image:
    return shown.made.of(Image)[-1]


def _text(shown: Shown) -> str:
    return shown.made.of(Text)[-1].text or ""


# key -> title, note, function; in the order of the page
SECTIONS: dict[str, tuple[str, str, Callable[[Tour], str]]] = {
    "asking": ("Asking", "Questions about a picture, answered in a word. Where an answer is wrong, the true one stands "
               "in brackets.", asking),
    "describing": ("Describing", "Every object with colour, shape, size and place, and the background.", describing),
    "pointing": ("Pointing", "The box of what a phrase names: solid what the model says, dashed where it is.",
                 pointing),
    "step-by-step": ("Drawing, step by step", "From words alone. Each frame is the picture that the model expects to "
                     "end up with, from the first look at pure noise on the left to the finished drawing on the right.",
                     stepwise),
    "drawing": ("Drawing from words", "Prompts of the held-out split in their order, with the verifier's verdict on "
                "every drawing.", drawing),
    "editing": ("Editing", "Right means: the change is made, and everything else stayed where and as it was.", editing),
    "layout": ("Drawing into boxes", "The boxes are given; the drawing has to fill them and nothing else.", layouts),
    "planning": ("Planning, then drawing", "From words the model first says boxes, then draws with them in view.",
                 planning),
    "story": ("A story", "Four pictures. The first follows the premise; for every later one the model first says what "
              "happens, then draws it, looking at its own picture before. Right means all four.", story),
    "there-and-back": ("There and back", "The model describes its own drawings. Right means: its words say what the "
                       "verifier sees in the drawing, whatever had been asked for.", round_trips),
    "guidance": ("Guidance", "How strongly the words pull: 1 is not at all. The same prompts, of two objects and "
                 "more, from the same noise.", sweep),
    "scores": ("Scores", "Measured while this page was made, on few items: the intervals (95%, Wilson) are wide and "
               "the bands show them. The ledger holds the figures of the full measurement.", scores),
}


def steps(tour: Tour) -> list[tuple[str, Callable[[], Section]]]:
    """Every section as (title, function that makes it), so that a caller can show how far it is."""
    def make(key: str) -> Section:
        title, note, function = SECTIONS[key]
        return Section(key, title, note, function(tour))
    return [(SECTIONS[key][0], partial(make, key)) for key in SECTIONS]


def whole(tour: Tour, made: list[Section]) -> str:
    """The page of the finished sections."""
    here = Machine.here()
    size = tour.system.num_parameters()
    facts = {"model": tour.name or type(tour.system).__name__, "parameters": f"{size / 1e6:.1f} million",
             "seed": str(tour.seed), "world": tour.world, "made in": f"{tour.seconds:.0f} s on {here.cores} cores"}
    lead = ("One small model that reads pictures and words and answers in both. Everything below was made while this "
            "page was written, from documents that were held out of its training. Verdicts are computed from pixels "
            "and words by a verifier that knows the true scene; no model judges. The first items are shown, right or "
            "wrong.")
    version = text(f"diptych {code_version()}, torch {here.torch}, Python {here.python}, {here.cpu}")
    command = text(f"diptych tour -o report/ --model {tour.name or 'MODEL'} --seed {tour.seed} --n {tour.n}")
    foot = f"<pre>{command}</pre><p>{version}</p>"
    return page.page("A tour of what Diptych sees and draws", lead, facts, made, foot)

