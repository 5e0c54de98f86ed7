"""Documents -> the micro-batches of a step, collated in worker processes.

A mixture is a pure function of the position, so a step's documents depend on nothing but the stage and the number of
the step: any number of workers gives the same steps, and the only state of the data is one integer.

Step k of a stage reads positions k * batch ... (k + 1) * batch - 1. Position p belongs to micro-batch p % m of the
step's m, and process r of w holds the micro-batches with i % w == r. So a step is the same whether one process works
through m micro-batches or m processes do one each.
"""
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diptych.data.loader import Loader
from diptych.data.mix import Mixture
from diptych.data.order import hash64
from diptych.document import Document
from diptych.training.recipe import Recipe, Source, Stage


@dataclass
class Packet:
    """One step's work of one process."""

    batches: list[Any]
    indices: list[int]  # the number of each micro-batch within the step
    names: list[str]  # of this process's documents, to be named when the step goes wrong


@dataclass(frozen=True)
class Share:
    """How a step is cut up: micro-batches per process, and which process this is of how many."""

    micro: int = 1
    rank: int = 0
    processes: int = 1

    @classmethod
    def of(cls, accumulate: int, rank: int = 0, processes: int = 1) -> "Share":
        """At least `accumulate` micro-batches in all, and the same number on every process."""
        return cls(-(-accumulate // processes), rank, processes)

    @property
    def total(self) -> int:
        return self.micro * self.processes


@dataclass(frozen=True)
class Deal:
    """Collates the documents of one process into its micro-batches; runs in the data workers."""

    collate: Callable[[Sequence[Document]], Any]
    share: Share

    def __call__(self, documents: Sequence[Document]) -> Packet:
        parts = [(i, documents[i::self.share.micro]) for i in range(self.share.micro)]
        parts = [(i * self.share.processes + self.share.rank, part) for i, part in parts if part]
        return Packet([self.collate(part) for _, part in parts], [i for i, _ in parts], [name_of(d) for d in documents])


def packets(mixture: Mixture, collate: Callable[[Sequence[Document]], Any], batch: int, share: Share, start: int,
            stop: int, workers: int) -> Generator[Packet, None, None]:
    """Packets of the steps from `start` up to `stop` of a stage, in order. Close it to end the workers."""
    if batch % share.total:
        raise ValueError(f"expected a batch that is a multiple of the {share.total} micro-batches of a step, "
                         f"got {batch} documents; fix: change the stage's batch or accumulate")
    loader = Loader(mixture, batch // share.processes, Deal(collate, share), start, workers, share.rank,
                    share.processes, stop=stop)
    for _, packet in loader:
        yield packet


def open_stream(recipe: Recipe, stage: Stage) -> Mixture:
    """The stage's mixture: every stage reads an order of its own."""
    if not recipe.data:
        raise ValueError("expected data sources in the recipe, got none; fix: add `data: [{world: mini, ...}]`")
    number = [s.name for s in recipe.stages].index(stage.name)
    sources = [(_open(source, stage.tasks or source.tasks), stage.sources.get(source.name, source.weight))
               for source in recipe.data]
    # 63 bits, because seeds also travel through signed integers
    return Mixture([(s, w) for s, w in sources if w > 0], hash64(recipe.seed, number, 0) >> 1)


def sample_documents(recipe: Recipe, stage: Stage) -> list[Document]:
    """The fixed documents that are looked at while training."""
    chosen = recipe.samples
    data = chosen.data or tuple(dataclasses.replace(s, split="test") for s in recipe.data)
    mixture = Mixture([(_open(s, chosen.tasks or s.tasks or stage.tasks), s.weight) for s in data], recipe.seed)
    return mixture.take(chosen.documents)


def _open(source: Source, tasks: Mapping[str, float]) -> Any:
    from diptych.data import sources

    files: dict[str, Any] = {"size": source.size, "mode": source.mode}
    if source.world is not None:
        return sources.WorldSource(source.world, tasks, source.split, source.documents or None)
    if source.folder is not None:
        return sources.FolderSource(source.folder, source.task, text=source.text, **files)
    if source.messages is not None:
        return sources.MessagesSource(source.messages, root=source.root, **files)
    return sources.LlavaSource(str(source.llava), root=source.root, **files)


def name_of(document: Document) -> str:
    """`task/index`, or what else says which document it was."""
    for key in ("index", "seed", "id", "path", "file", "name"):
        if key in document.meta:
            return f"{document.task or 'document'}/{document.meta[key]}"
    return document.task or "document"

