"""The tour: what a model does with held-out documents, measured and shown on one page.

The first items of the test split are shown, right or wrong; nothing is picked. `Tour` asks the model, `sections`
turns what comes back into the page.
"""
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import count, islice
from typing import NamedTuple

from diptych.benchmarks.evaluate import evaluate
from diptych.benchmarks.results import Key, Results
from diptych.benchmarks.suite import Outcome
from diptych.benchmarks.world import drawn, score_caption, score_draw
from diptych.document import Document, Image, Text
from diptych.ledger import Entry, read_entries
from diptych.objectives.guidance import Branch
from diptych.report.questions import Asked, questions_about
from diptych.systems.base import Event, Sampling, System
from diptych.world import tasks
from diptych.world.perceive import perceive
from diptych.world.sample import find_world, stream
from diptych.world.scene import Scene
from diptych.world.spec import Item, Spec

MEASURED = ("caption", "question", "refer", "draw", "edit", "layout", "plan")
STORIES = 3
FRAMES = 7  # of a drawing, step by step
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
SWEPT = 8  # prompts per guidance scale
ASKED_ABOUT = 4  # pictures with several questions each
STEPWISE = (  # words of our own, with what they claim
    ("two red circles left of a blue square", Spec(
        items=(Item(count=2, color="red", shape="circle"), Item(color="blue", shape="square")),
        relations=((0, "left of", 1),))),
    ("draw a large yellow star at the center , on a black background", Spec(
        items=(Item(color="yellow", shape="star", size="large", place="center"),), background="black")),
    ("a green cross , a pink heart and an orange circle", Spec(items=(
        Item(color="green", shape="cross"), Item(color="pink", shape="heart"), Item(color="orange", shape="circle")))),
    ("a picture of a purple triangle above a cyan square", Spec(
        items=(Item(color="purple", shape="triangle"), Item(color="cyan", shape="square")),
        relations=((0, "above", 1),))),
)


class Shown(NamedTuple):
    """A measured item: the true document, what the model made of it, and the verdict."""

    true: Document
    made: Document
    outcome: Outcome

    @property
    def asked(self) -> str:
        """The words that the model was given."""
        return self.true.of(Text)[0].text

    @property
    def given(self) -> Image:
        """The picture that the model was given."""
        return self.true.of(Image)[0]


class Tour:
    """Everything is a function of the system, `seed` and `n`. `results` are of the `n` first test items per suite."""

    def __init__(self, system: System, *, name: str = "", n: int = 32, seed: int = 0, world: str = "mini",
                 progress: bool = True) -> None:
        self.system, self.name, self.n, self.seed, self.world, self.progress = system, name, n, seed, world, progress
        self.config = find_world(world)
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @cached_property
    def measured(self) -> tuple[Results, dict[str, list[Shown]]]:
        """The figures, and the documents they are of by suite. Takes most of the time of a tour."""
        shown: dict[str, list[Shown]] = {}

        def watch(key: Key, true: Document, made: Document, outcome: Outcome) -> None:
            shown.setdefault(key.suite, []).append(Shown(true, made, outcome))

        def measure(suites: Sequence[str], n: int) -> Results:
            return evaluate(self.system, suites, n=n, seed=self.seed, world=self.world, progress=self.progress,
                            watch=watch)

        measure(("story",), STORIES)
        return measure(MEASURED, self.n), shown

    @property
    def results(self) -> Results:
        return self.measured[0]

    def shown(self, suite: str, most: int) -> list[Shown]:
        return self.measured[1][suite][:most]

    def fill(self, documents: Sequence[Document], sampling: Sampling | None = None,
             emit: Callable[[int, Event], None] | None = None) -> list[Document]:
        """All together, each with a seed of its own."""
        seeds = [self.seed + i for i in range(len(documents))]
        return self.system.generate(documents, sampling, seeds=seeds, emit=emit)

    # -- what the sections show ---------------------------------------------------------------------------------------

    def asking(self) -> Iterator[tuple[Image, list[tuple[Asked, str]]]]:
        """Pictures, each with several questions and the answers to them."""
        scenes = [(s.given, Scene.from_dict(s.true.meta["scene"])) for s in self.shown("caption", ASKED_ABOUT)]
        lists = [questions_about(scene, self.config, stream(self.config, "tour", "test", i))
                 for i, (_, scene) in enumerate(scenes)]
        documents = [Document((image, Text(text=q.question), Text(role="assistant", target=True)), "question")
                     for (image, _), found in zip(scenes, lists, strict=True) for q in found]
        answers = iter(self.fill(documents))
        for (image, _), found in zip(scenes, lists, strict=True):
            yield image, [(q, next(answers).of(Text)[-1].text.strip()) for q in found]

    def stepwise(self) -> list[tuple[Shown, list[Image]]]:
        """Drawings with the pictures that the model expected on the way."""
        sampling = self.system.default_sampling()
        sampling = dataclasses.replace(sampling, partial=FRAMES)
        frames: dict[int, list[Image]] = {i: [] for i in range(len(STEPWISE))}

        def collect(number: int, event: Event) -> None:
            if event.kind in ("partial", "picture"):
                frames[number].append(Image(pixels=event.value))

        size = (self.config.pixels, self.config.pixels)
        empty = Scene(objects=()).to_dict()
        documents = [Document((Text(text=words), Image(role="assistant", target=True, size=size)), "draw",
                              {"spec": spec.to_dict(), "scene": empty, "world": self.world})
                     for words, spec in STEPWISE]
        pairs = zip(documents, self.fill(documents, sampling, collect), strict=True)
        return [(Shown(d, m, score_draw(d, m)), frames[i]) for i, (d, m) in enumerate(pairs)]

    def round_trips(self, most: int) -> list[Shown]:
        """The model's own drawings, described by itself. Right is a description of what the verifier sees."""
        drawings = [s.made for s in self.shown("draw", most)]
        asked = [Document((d.of(Image)[-1].replace(role="user", target=False), Text(text="describe the picture"),
                           Text(role="assistant", target=True)), "caption") for d in drawings]
        out = []
        for drawing, said in zip(drawings, self.fill(asked), strict=True):
            percept = perceive(drawn(drawing), self.world)
            if percept.certain and percept.background is not None:
                truth = Document(asked[0].pieces, "caption", {"scene": percept.scene().to_dict(), "world": self.world})
                out.append(Shown(drawing, said, score_caption(truth, said)))
            else:
                out.append(Shown(drawing, said, Outcome(right=False, status="abstained")))
        return out

    def sweep(self) -> list[tuple[float, list[Shown]]]:
        """The same prompts, of two objects and more, with the same seeds at every guidance scale."""
        every = (tasks.document("draw", i, split="test", world=self.world) for i in count())
        true = list(islice((d for d in every if len(d.meta["scene"]["objects"]) > 1), SWEPT))
        rows = []
        for scale in SCALES:
            made = self.fill([t.prompt() for t in true], guided(self.system.default_sampling(), scale))
            rows.append((scale, [Shown(t, m, score_draw(t, m)) for t, m in zip(true, made, strict=True)]))
        return rows

    def entry(self) -> Entry | None:
        """The latest quality entry of the model in the ledger."""
        known = [e for e in read_entries() if e.kind == "quality" and self.name and e.name.startswith(self.name)
                 and any(f"{suite}/test" in e.metrics for suite in MEASURED)]
        return max(known, key=lambda e: (e.date, e.name), default=None)


def guided(sampling: Sampling, scale: float) -> Sampling:
    """The same with another scale of the words."""
    branches = tuple(b for b in sampling.guidance.branches if b.context != "no_text")
    words = next((b for b in sampling.guidance.branches if b.context == "no_text"), Branch(context="no_text", scale=1))
    guidance = dataclasses.replace(sampling.guidance, branches=(dataclasses.replace(words, scale=scale), *branches))
    return dataclasses.replace(sampling, guidance=guidance)
