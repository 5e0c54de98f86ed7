"""What every system offers: three verbs, a config with three sizes, and a folder on disk.

    loss(batch, generator) -> Losses        named terms, each with its own token count
    generate(documents, recipe) -> documents with their targets filled in
    score(documents) -> StepLogProbs        log-prob of every decision

Everything above systems (trainer, engine, alignment, benchmarks, server) uses only these.
"""
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diptych.document import Document
from diptych.objectives.guidance import Guidance
from diptych.objectives.next_token import TextSampling, TokenSampling


@dataclass
class Losses:
    """Sums over tokens with their counts, so that means stay exact when packed, accumulated or sharded.

    total = sum_k weights[k] * sums[k] / counts[k]. Sums and counts are scalar float32 tensors.
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    weights: dict[str, float]

    def mean(self) -> dict[str, Tensor]:
        return {k: s / self.counts[k].clamp_min(1) for k, s in self.sums.items()}

    def total(self, counts: Mapping[str, Tensor] | None = None) -> Tensor:
        """The scalar to minimise. Pass the counts of the whole (accumulated, sharded) step for exact reduction."""
        counts = self.counts if counts is None else counts
        terms = [self.weights[k] * s / counts[k].clamp_min(1) for k, s in self.sums.items()]
        return torch.stack(terms).sum()


@dataclass
class StepLogProbs:
    """Log-probs (float32) of the decisions of each document, in order, with what kind of decision each was."""

    values: list[Tensor]
    kinds: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a document's targets are produced. `evaluations`: network evaluations per picture and branch; `shift` moves
    the sampling times towards noise, `start` is the first of them and `end`, if given, the last that the network is
    asked at; `stochastic` > 0 switches to the SDE with that noise level; `solver` "multistep" lets every ODE step look
    back at the one before."""

    evaluations: int = 25
    shift: float = 1.0
    start: float = 0.0
    end: float | None = None
    solver: Literal["euler", "multistep"] = "euler"
    stochastic: float = 0.0
    guidance: Guidance = field(default_factory=Guidance)
    text: TextSampling = field(default_factory=TextSampling)
    codes: TokenSampling = field(default_factory=TokenSampling)  # of pictures drawn code by code
    again: tuple[TokenSampling, ...] = ()  # of more passes over every scale, which then reads its own codes (TokenFlow)
    temperature: float = 1.0  # of the noise in tokens that are drawn by diffusion one set after the other
    size: tuple[int, int] | None = None  # (height, width) of pictures without a size of their own
    text_guidance: Guidance | None = None  # of texts that are filled in without an order; None: none
    plan_guidance: Guidance | None = None  # of codes that plan a picture for another network; None: as the picture
    plan: bool = False  # whether a drawing asked for in words alone is best asked for with boxes that come first
    partial: int = 0  # so many times emit the picture expected, evenly on the way; more than there are steps: at each
    negative: str = ""  # what guidance reads in place of the text: what a picture should not show


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a picture is when it is shown: after `step` of `steps`, at this `time` of a flow or share of what is
    known. `known` (rows, columns) bool: the cells that are settled, where they are settled one by one; `scale`: rows
    and columns so far, where all of them are drawn anew on finer grids."""

    step: int
    steps: int
    time: float | None = None
    known: Tensor | None = None
    scale: tuple[int, int] | None = None


@dataclass(frozen=True)
class Event:
    """Something to show before a document is finished: `text` (delta, a str), `boxes` (the filled piece), `partial` and
    `picture` (pixels).

    `tokens`: how many tokens of the piece the model has made so far, a closing mark not counted. `progress`: of
    `partial`."""

    kind: str
    piece: int
    value: Any
    tokens: int = 0
    progress: Progress | None = None


class Work:
    """A unit of computation that a program asks for; `System.run` executes many at once."""


Program = Generator[Work, Any, Document]
Emit = Callable[[Event], None]


class System(nn.Module):
    """One paper. Subclasses set `Config`, `tiny`, `small` and `paper`, and implement `collate`, `loss`, `program`,
    `run` and `score`."""

    Config: ClassVar[type]
    config: Any

    def collate(self, documents: Sequence[Document]) -> Any:
        """Documents -> batch (CPU tensors, picklable, has `.to(device)`). Runs in data workers."""
        raise TypeError(f"{type(self).__name__} does not train on documents")

    def loss(self, batch: Any, generator: torch.Generator) -> Losses:
        raise TypeError(f"{type(self).__name__} has no loss")

    def program(self, document: Document, sampling: Sampling, generator: torch.Generator, emit: Emit) -> Program:
        """The state machine that fills one document: yields work, receives its result, returns the document."""
        raise TypeError(f"{type(self).__name__} does not generate documents")

    def run(self, works: Sequence[Work]) -> list[Any]:
        """Results of several pieces of work, batched where they are alike."""
        raise TypeError(f"{type(self).__name__} does not generate documents")

    def default_sampling(self) -> Sampling:
        return getattr(self.config, "sampling", Sampling())

    @torch.no_grad()
    def generate(self, documents: Sequence[Document], sampling: Sampling | None = None, *,
                 seeds: Sequence[int] | int = 0, emit: Callable[[int, Event], None] | None = None) -> list[Document]:
        """Fill the targets of all documents together. One seed serves all alike; a document's result depends on its
        own seed only, not on its company."""
        sampling = sampling or self.default_sampling()
        seeds = [seeds] * len(documents) if isinstance(seeds, int) else seeds
        if len(seeds) != len(documents):
            raise ValueError(f"expected one seed, or one per document ({len(documents)}), got {len(seeds)}")
        programs: dict[int, Program] = {}
        for i, document in enumerate(documents):
            generator = torch.Generator().manual_seed(seeds[i])
            programs[i] = self.program(document.prompt(), sampling, generator, _sink(emit, i))
        return self.finish(programs)

    def finish(self, programs: dict[int, Program], *, run: Callable[[Sequence[Work]], list[Any]] | None = None,
               send: Callable[[int, Program, Any], Work] | None = None) -> list[Document]:
        """Run programs 0, 1, ... together until all have returned their documents. `run` does works in place of
        `self.run`; `send(number, program, answer)` gets the next work in place of `program.send`."""
        token = _finishing.set((self, {}))
        try:
            return self._finish(dict(programs), run or self.run, send)
        finally:
            _finishing.reset(token)

    def _finish(self, programs: dict[int, Program], run: Callable[[Sequence[Work]], list[Any]],
                send: Callable[[int, Program, Any], Work] | None) -> list[Document]:
        count = len(programs)
        finished: dict[int, Document] = {}
        answers: dict[int, Any] = dict.fromkeys(programs)
        while programs:
            works: dict[int, Work] = {}
            for i, program in list(programs.items()):
                try:
                    works[i] = program.send(answers[i]) if send is None else send(i, program, answers[i])
                except StopIteration as stop:
                    finished[i] = stop.value
                    del programs[i]
            answers = dict(zip(works, run(list(works.values())) if works else (), strict=True))
        return [finished[i] for i in range(count)]

    def score(self, documents: Sequence[Document], **kwargs: Any) -> StepLogProbs:
        """Log-probs of what the documents hold as targets, decision by decision; they carry gradients unless these are
        off."""
        raise TypeError(f"{type(self).__name__} has no decisions to score")

    def save_files(self, folder: Path) -> None:
        """Write what belongs to the system besides config and weights (tokenizer, ...)."""

    @classmethod
    def from_folder(cls, config: Any, folder: Path) -> "System":
        """Build the untrained system of a saved folder; subclasses pick up the files of `save_files`."""
        return cls(config)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def num_parameters(self, *, trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    def describe(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "config": dataclasses.asdict(self.config)}


_finishing: ContextVar[tuple[System, dict[Any, Any]] | None] = ContextVar("finishing", default=None)


def notes(system: System) -> dict[Any, Any]:
    """What is worth finding out once while the programs of this system are finished together, during which its weights
    stand still; outside of that, an empty page."""
    found = _finishing.get()
    return found[1] if found is not None and found[0] is system else {}


def _sink(emit: Callable[[int, Event], None] | None, number: int) -> Emit:
    return (lambda event: None) if emit is None else (lambda event: emit(number, event))
