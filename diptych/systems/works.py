"""The units of work of systems that interleave texts and pictures: what a program yields and `System.run` executes."""
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diptych.objectives.masked_autoregression import Set
from diptych.parts.cache import Context
from diptych.parts.interleave import Writer
from diptych.parts.scales import Past, Scales
from diptych.systems.base import Emit, Event, Progress, Sampling, Work

if TYPE_CHECKING:
    from diptych.systems.decoding import Trail

Grid = tuple[int, int]  # rows and columns of latent tokens


@dataclass
class Reader:
    """A context with the place where the next token goes, and the branch that reads it (see `Writer`)."""

    context: Context = field(default_factory=Context)
    position: float = 0
    segment: int = 0
    branch: int | None = None
    log: "list[Read]" = field(default_factory=list)  # what was read, where a system wants to know later
    states: list[Tensor] = field(default_factory=list)  # hidden states (n, width) of it, where a system keeps them
    latents: list[tuple[Tensor, Grid]] = field(default_factory=list)  # of pictures in it, where a system keeps them
    pictures: list[Tensor] = field(default_factory=list)  # (3, h, w) in it that something may be drawn from, likewise

    def fork(self) -> "Reader":
        return Reader(self.context.fork(), self.position, self.segment, self.branch, list(self.log),
                      list(self.states), list(self.latents), list(self.pictures))


@dataclass
class Read(Work):
    """Append what `writer` holds to `reader`; answers the logits (vocabulary,) after its last token if `predict`, those
    (n, vocabulary) after each of its last n tokens if `recite` is n, or those of the codes (m, ...) that the writer's
    questions ask for. Without `keep` the reader stays as it was. `states`, if there is such a list, gets the hidden
    states (m, width) that the answer is made of."""

    reader: Reader
    writer: Writer
    views: list[Tensor] = field(default_factory=list)
    latents: list[tuple[Tensor, Grid]] = field(default_factory=list)  # clean latent tokens (n, d) and their grid
    codes: list[Tensor] = field(default_factory=list)  # what stands in the code segments, (n, ...) each
    predict: bool = False
    recite: int = 0
    keep: bool = True
    states: list[Tensor] | None = None


@dataclass
class Step(Work):
    """The token whose input is `state` (width,) joins every trail; answers the logits (trails, 1, vocabulary) of what
    comes next: of codes, or of words. `states` as in `Read`, (1, width) for every trail."""

    trails: "Sequence[Trail]"
    state: Tensor
    codes: bool
    states: list[Tensor] | None = None


@dataclass
class Together(Work):
    """Several works at once, such as one step in every branch of guidance; answers the list of their answers."""

    works: Sequence[Work]


@dataclass
class Look(Work):
    """Velocity of noised latent tokens x (n, d) at time t in several contexts: answers one (n, d) per context."""

    readers: list[Reader]
    x: Tensor
    t: float
    grid: Grid


@dataclass
class Denoise(Work):
    """Velocity of noised latent tokens x (n, d) at time t under several conditions (q, c), by a generator that knows of
    the context only these: answers one (n, d) per condition. `references`: with each the latents (m, d) and grids of
    pictures to draw from, for generators that look at them."""

    conditions: list[Tensor]
    x: Tensor
    t: float
    grid: Grid
    references: list[list[tuple[Tensor, Grid]]] = field(default_factory=list)


@dataclass
class Reveal(Work):
    """Draw the `chosen` (n,) bool of the hidden tokens of a picture, as `set` says (its conditions are found here): x
    (n, d) where they are not `hidden` (n,) bool. Answers the chains (K + 1, m, d) whose ends are the new tokens, and,
    if `tell`, their log-probs (m,). `again`: chains that were drawn before, to draw no others."""

    readers: list[Reader]
    x: Tensor
    hidden: Tensor
    chosen: Tensor
    grid: Grid
    set: Set
    again: Tensor | None = None
    tell: bool = False


@dataclass
class Sequenced:
    """A whole sequence with one target, for networks whose tokens all see each other. `features` of its views and the
    `codes` (n_i, ...) of the clean pictures in it are computed once."""

    writer: Writer
    views: list[Tensor] = field(default_factory=list)
    features: Tensor | None = None
    pictures: list[Tensor] = field(default_factory=list)  # for the codec, (3, h, w)
    codes: list[Tensor] | None = None


@dataclass
class Guess(Work):
    """The logits (n, vocabulary) of the target in several sequences, where its tokens are x (n,); answers their list.
    Targets are codes (the questions of the writer) or text (its labels)."""

    sequences: list[Sequenced]
    x: Tensor


@dataclass
class Deepen(Work):
    """Logits (contexts, codebook) of the next code of a cell: what every context says of it (contexts, width), and its
    codes so far (d,)."""

    hidden: Tensor
    codes: Tensor


@dataclass
class Canvas:
    """A picture that is drawn scale by scale, as one context sees it: its condition (c,), the memory (m, c) that it
    looks back at, and what the scales before have left. Without a reader each scale is read by itself."""

    reader: Reader | None
    scales: Scales
    condition: Tensor
    memory: Tensor
    past: Past = ()


@dataclass
class Decide(Work):
    """The logits of scale number `scale` of a canvas from the states (n, width) that a language model gives its cells;
    the canvas then holds that scale too."""

    states: Tensor
    canvas: Canvas
    scale: int


@dataclass
class Encode(Work):
    """Pixels (3, h, w) -> latent tokens (n, d). `noise` (n, d): those of a draw, where the system's codec draws."""

    pixels: Tensor
    noise: Tensor | None = None


@dataclass
class Develop(Work):
    """Latent tokens (n, d) -> pixels (3, h, w)."""

    x: Tensor
    grid: Grid


def parts_of(work: Work) -> Sequence[Work]:
    return work.works if isinstance(work, Together) else (work,)


def told(works: Sequence[Read], states: Tensor, counts: Sequence[int]) -> Tensor:
    """The hidden states (m, width) behind the answers, `counts` for each, once works that ask for theirs have them."""
    for work, own in zip(works, states.split(list(counts)), strict=True):
        if work.states is not None:
            work.states.append(own)
    return states


def due(step: int, steps: int, sampling: Sampling) -> bool:
    """Whether the picture after this step (1, 2, ...) is one of those to show; after the last it is finished."""
    wanted = sampling.partial
    if not wanted or not 0 < step < steps:
        return False
    return wanted >= steps - 1 or any(step == (2 * i * steps + wanted + 1) // (2 * wanted + 2)
                                      for i in range(1, wanted + 1))


def show(x: Tensor, grid: Grid, sampling: Sampling, index: int, emit: Emit, progress: Progress
         ) -> Generator[Work, Any, None]:
    """Emit what these latent tokens (n, d) look like, if it is due."""
    if due(progress.step, progress.steps, sampling):
        emit(Event("partial", index, (yield Develop(x, grid)), progress=progress))


def developed(decode: Callable[[Tensor, Grid], Tensor], works: Sequence[Develop]) -> list[Tensor]:
    """Pictures (3, h, w) of all, those of one shape together."""
    out: dict[int, Tensor] = {}
    for shape in {(w.x.shape, w.grid) for w in works}:
        numbers = [i for i, w in enumerate(works) if (w.x.shape, w.grid) == shape]
        out |= zip(numbers, decode(torch.stack([works[i].x for i in numbers]), shape[1]), strict=True)
    return [out[i] for i in range(len(works))]


def kind_of(work: Work) -> str:
    """Works of one kind share a forward pass; single tokens are kept apart from long texts, which would pad them."""
    if isinstance(work, Read):
        return "prefill" if work.writer.strip.length > 4 else "decode"
    for kind, name in ((Step, "step"), (Look, "look"), (Denoise, "denoise"), (Reveal, "reveal"), (Guess, "guess"),
                       (Deepen, "deepen"), (Decide, "decide"), (Encode, "encode"), (Develop, "develop")):
        if isinstance(work, kind):
            return name
    raise TypeError(f"expected work of an interleaved system, got {type(work).__name__}")
