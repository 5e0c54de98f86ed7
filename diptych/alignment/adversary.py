"""UniGame (arXiv 2511.19413): a small perturber of visual tokens plays against the understanding of a model, whose own
drawings under it become hard examples to learn from.

    delta = eps d / |d|,  d = W3 gelu(W2 gelu(W1 z + b1) + b2),  eps = min + (max - min) sigmoid(rho)
    perturber   minimises  -lambda CE(z + delta) + w_l2 mean delta^2 + w_tv mean (delta_i - delta_i+1)^2
                           + w_eps sigmoid(rho)^2,  with z detached
    model       minimises  w_clean CE(z), then CE on hard examples from a buffer
    hard score  H = CE + lambda_clip max(0, tau - similarity)

`relative`: eps is a share of |z|, so that a radius means the same at any width. `variant` of mining: "paper" keeps a
candidate only if it shows what was asked (similarity >= tau) and is hard; "released" keeps the hard ones and, besides,
all that do not show it. Everything here is float32, whatever the model computes in.
"""
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.alignment.rewards.base import Reward
from diptych.document import Document, Image, Text
from diptych.parts.tokens import Modality
from diptych.systems.base import Sampling, System
from diptych.systems.batch import Batch
from diptych.systems.hooks import altering
from diptych.systems.packed import Packed
from diptych.world.language import caption, caption_spec
from diptych.world.scene import Scene

T = TypeVar("T")
TINY = 1e-12  # least norm of a direction


class Perturber(nn.Module):
    """States (..., width) -> what is added to them, of norm `eps` each. `hidden`: of the network, 0: as wide as the
    states."""

    def __init__(self, width: int, *, hidden: int = 0, eps_max: float = 0.02, eps_min: float = 0.0,
                 eps_start: float = 0.01, relative: bool = False) -> None:
        super().__init__()
        if not 0 <= eps_min < eps_start < eps_max:
            raise ValueError(f"expected 0 <= eps_min < eps_start < eps_max, got {eps_min}, {eps_start} and {eps_max}")
        inner = hidden or width
        self.eps_min, self.eps_max, self.relative = eps_min, eps_max, relative
        share = (eps_start - eps_min) / (eps_max - eps_min)
        self.rho = nn.Parameter(torch.tensor(math.log(share / (1 - share))))
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner), nn.GELU(),
                                 nn.Linear(inner, width, bias=False))
        nn.init.orthogonal_(self.mlp[-1].weight)  # type: ignore[arg-type]

    @property
    def openness(self) -> Tensor:
        """Where eps is between its ends, in (0, 1)."""
        return torch.sigmoid(self.rho)

    @property
    def eps(self) -> Tensor:
        return self.eps_min + (self.eps_max - self.eps_min) * self.openness

    def forward(self, z: Tensor) -> Tensor:
        """float32. `z` is read, not learnt through."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.detach().float()
            direction = self.mlp(z)
            unit = direction / direction.norm(dim=-1, keepdim=True).clamp_min(TINY)
            return self.eps * unit * (z.norm(dim=-1, keepdim=True) if self.relative else 1.0)


@dataclass(frozen=True, kw_only=True)
class Game:
    """Weights of the game (released configuration of TorchUMM)."""

    strength: float = 80.0  # lambda, of the adversary's share
    l2: float = 1e-4
    tv: float = 1e-5
    radius: float = 0.0
    clean: float = 1.5


class Cost(NamedTuple):
    """What the perturbation itself costs: `total` is the weighted sum."""

    total: Tensor
    l2: Tensor
    tv: Tensor
    radius: Tensor


def cost(deltas: Sequence[Tensor], perturber: Perturber, game: Game) -> Cost:
    """Of perturbations (n, width) of whole pictures: neighbours are those of one picture."""
    whole = torch.cat(list(deltas))
    steps = torch.cat([(d[1:] - d[:-1]) for d in deltas])
    l2 = whole.square().mean()
    tv = steps.square().mean() if len(steps) else l2 * 0
    radius = perturber.openness.square()
    return Cost(game.l2 * l2 + game.tv * tv + game.radius * radius, l2, tv, radius)


class Play(NamedTuple):
    """One side's turn: the `loss` to minimise, the cross-entropy of the answers, and the perturber's costs."""

    loss: Tensor
    ce: Tensor
    cost: Cost | None = None


def clean_turn(system: System, batch: Batch, generator: torch.Generator, game: Game) -> Play:
    """The model's turn on pictures as they are."""
    ce = _answers(system, batch, generator)
    return Play(game.clean * ce, ce)


def adversary_turn(system: Packed, batch: Batch, perturber: Perturber, generator: torch.Generator, game: Game) -> Play:
    """The perturber's turn: the model answers about perturbed features. Freeze the model, or give its optimiser
    nothing: gradients reach both."""
    counts = [int(n) for n in _feature_counts(batch)]
    deltas: list[Tensor] = []

    def change(states: Tensor) -> Tensor:
        delta = perturber(states)
        deltas.extend(delta.split(counts))
        return states.detach() + delta.to(states.dtype)

    with altering(system, "see", change):
        ce = _answers(system, batch, generator)
    if not deltas:
        raise ValueError("expected pictures to read in the adversary's turn, got none; fix: batches of questions")
    own = cost(deltas, perturber, game)
    return Play(adversary_loss(ce, own, game), ce, own)


def adversary_loss(ce: Tensor, own: Cost, game: Game) -> Tensor:
    return own.total - game.strength * ce


def _answers(system: System, batch: Batch, generator: torch.Generator) -> Tensor:
    means = system.loss(batch, generator).mean()
    if "text" not in means:
        raise ValueError("expected answers to learn, got a batch without a text target")
    return means["text"]


def _feature_counts(batch: Batch) -> list[int]:
    """Tokens of every picture that is read, in the order of the page: runs of one segment."""
    tokens = batch.page.tokens
    read = tokens.modality == Modality.FEATURE
    keys = torch.stack((tokens.document, tokens.segment))[:, read].T
    row = torch.nonzero(read)[:, :1]
    return torch.unique_consecutive(torch.cat((row, keys), 1), dim=0, return_counts=True)[1].tolist()


@contextmanager
def perturbed(system: System, perturber: nn.Module, point: str = "code_tokens") -> Iterator[None]:
    """Inside, pictures are drawn with what is sampled perturbed as it enters the network again: codes, or with `point`
    "latent_tokens" latents; with "see" pictures are read so."""
    with altering(system, point, lambda states: states + perturber(states).to(states.dtype)):
        yield


# -- hard examples ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Mining:
    """Which candidates are hard. `quantile` of the scores of a step, or an `absolute` threshold; at most `top` per
    source, and `most` per step."""

    tau: float = 0.35
    weight: float = 0.1  # lambda_clip
    quantile: float = 0.7
    absolute: float | None = None
    top: int = 2
    most: int | None = None
    variant: Literal["paper", "released"] = "paper"

    def __post_init__(self) -> None:
        if not 0 <= self.quantile <= 1 or self.top < 1 or self.variant not in ("paper", "released"):
            raise ValueError(f"expected 0 <= quantile <= 1, top >= 1 and variant paper or released, got "
                             f"{self.quantile}, {self.top} and {self.variant!r}")


def hardness(ce: Tensor, similarity: Tensor, mining: Mining) -> Tensor:
    """H (n,) of candidates from their cross-entropies and similarities (n,)."""
    return ce.float() + mining.weight * (mining.tau - similarity.float()).clamp_min(0)


def shared_ce(per_batch: Tensor, size: int, count: int) -> Tensor:
    """The mean cross-entropy of micro-batches of `size`, given to each of their `count` members, as released."""
    return per_batch.repeat_interleave(size)[:count]


def mine(hard: Tensor, similarity: Tensor, sources: Sequence[int], mining: Mining) -> list[int]:
    """Numbers of the candidates that are kept, hardest first. `sources` (n,): which item each was drawn for."""
    known = mining.absolute
    bound = torch.quantile(hard.float(), mining.quantile) if known is None else hard.new_tensor(known)
    difficult, off = hard >= bound, similarity <= mining.tau
    shown = similarity >= mining.tau
    fit = (difficult & shown) if mining.variant == "paper" else (difficult | off)
    kept: list[int] = []
    for source in dict.fromkeys(sources):
        own = [i for i, s in enumerate(sources) if s == source and bool(fit[i])]
        kept += sorted(own, key=lambda i: -float(hard[i]))[:mining.top]
    return sorted(kept, key=lambda i: -float(hard[i]))[:mining.most]


class HardBuffer(Generic[T]):
    """The hardest items so far, hardest first; of equals the earlier. What is sampled leaves it."""

    def __init__(self, capacity: int = 4096) -> None:
        if capacity < 1:
            raise ValueError(f"expected a capacity of at least 1, got {capacity}")
        self.capacity = capacity
        self.rows: list[tuple[float, T]] = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def items(self) -> list[T]:
        return [item for _, item in self.rows]

    def push(self, rows: Iterable[tuple[float, T]]) -> None:
        """(hardness, item); what is least hard beyond the capacity is dropped."""
        self.rows = sorted([*self.rows, *rows], key=lambda row: -row[0])[:self.capacity]

    def probabilities(self, temperature: float) -> Tensor:
        """Of the items in order: softmax of (n - 1 - rank) / temperature. At the published 1.5 to 2 it returns hardly
        anything but the first few."""
        return torch.softmax(torch.arange(len(self.rows) - 1, -1, -1) / temperature, 0)

    def pop(self, picked: Sequence[int]) -> list[T]:
        """The items at these places, which leave."""
        out = [self.rows[i][1] for i in picked]
        self.rows = [row for i, row in enumerate(self.rows) if i not in set(picked)]
        return out

    def sample(self, count: int, generator: torch.Generator, temperature: float = 1.5) -> list[T]:
        """Up to `count` different items, without replacement."""
        count = min(count, len(self.rows))
        if not count:
            return []
        chances = self.probabilities(temperature).double().clamp_min(torch.finfo(torch.float64).tiny)
        return self.pop(torch.multinomial(chances, count, generator=generator).tolist())


@torch.no_grad()
def answer_ce(system: Packed, documents: Sequence[Document]) -> Tensor:
    """Mean negative log-probability of the answers of each document (n,), one by one."""
    return torch.stack([-v.float().mean() for v in system.score(documents).values])


def resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, 3, h, w) as the tower reads them, bilinear."""
    return F.interpolate(pictures.float(), size, mode="bilinear", align_corners=False)


def by_question(document: Document) -> Document:
    """What the release draws candidates for: the question itself, whose answer need not be true of what is drawn."""
    return _wish(next(p.text or "" for p in document.of(Text) if not p.target), document)


def by_caption(document: Document) -> Document:
    """A drawing of all that can be said of the question's picture (a scene of the world), so that where it is right the
    answer is, too; what is claimed stands in the meta."""
    if "scene" not in document.meta:
        raise ValueError(f"expected the scene of the world in the meta of a question, got none in task "
                         f"{document.task!r}; fix: draw by the question itself")
    scene = Scene.from_dict(document.meta["scene"])
    return _wish(caption(scene), document, spec=caption_spec(scene).to_dict())


def _wish(text: str, document: Document, **facts: Any) -> Document:
    return Document((Text(text=text), Image(role="assistant", target=True)), "draw", {**document.meta, **facts})


def dig(system: Packed, questions: Sequence[Document], perturber: nn.Module, similarity: Reward, mining: Mining, *,
        count: int = 4, ask: Callable[[Document], Document] = by_question, sampling: Sampling | None = None,
        seed: int = 0, point: str = "code_tokens") -> list[tuple[float, Document]]:
    """Hard examples for the buffer, (H, document): for every question (picture, text, answer) the model draws `count`
    pictures of what `ask` says under the perturber, answers about them without it, and `mine` chooses. `similarity`
    judges drawings."""
    sources = [i for i in range(len(questions)) for _ in range(count)]
    asked = [ask(questions[i]) for i in sources]
    seeds = [seed + n for n in range(len(asked))]
    with torch.no_grad(), perturbed(system, perturber, point):
        drawn = system.generate(asked, sampling, seeds=seeds)
    seen = [about(questions[i], d.of(Image)[-1].pixels) for i, d in zip(sources, drawn, strict=True)]
    scores = torch.tensor([s.value for s in similarity(asked, drawn)])
    if bool(scores.isnan().any()):
        raise ValueError(f"expected {similarity.facts.name} to judge every drawing, got one it cannot tell")
    hard = hardness(answer_ce(system, seen).cpu(), scores, mining)
    return [(float(hard[i]), seen[i]) for i in mine(hard, scores, sources, mining)]


def about(question: Document, pixels: np.ndarray) -> Document:
    """The question about another picture."""
    pieces = tuple(p.replace(pixels=pixels) if isinstance(p, Image) else p for p in question)
    return Document(pieces, question.task, question.meta)
