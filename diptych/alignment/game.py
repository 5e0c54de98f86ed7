"""UniGame (arXiv 2511.19413) as a loop: a model learns to answer against a perturber of what it sees, and from its own
drawings under it that are hard to answer about. The moves are those of `adversary`; an iteration, as published:

    1  the perturber learns to raise the cross-entropy of the answers; the model stands still
    2  every `digging.every` iterations the model draws under the perturber, and what is hard enters the buffer
    3  the model learns the answers about the pictures as they are
    4  the model learns hard examples, which leave the buffer

`hard` says what the fourth move learns from: "drawn" the buffer; the controls "seen" (questions that were asked before:
fine-tuning on the same data, in as many steps) and "features" (the same questions, their features perturbed: no
drawings). `rival.kind` "random": noise of the radius that a perturber may reach stands in its place.

Iteration k asks questions k * batch ... of the world's training split; all else that is drawn by chance is a function
of (seed, k). A checkpoint holds the perturber and its moments, and the buffer with its pictures.
"""
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from diptych import config
from diptych.alignment import adversary
from diptych.alignment.adversary import Game, HardBuffer, Mining, Perturber, Play
from diptych.alignment.loop import Loop, still
from diptych.alignment.recipe import Course
from diptych.alignment.rewards.base import Reward
from diptych.alignment.rewards.table import make
from diptych.data.mix import Mixture
from diptych.data.order import hash64
from diptych.data.sources import Source, WorldSource
from diptych.document import Document, Image
from diptych.systems.base import System
from diptych.systems.io import system_tensors
from diptych.systems.packed import Packed
from diptych.training import checkpoint
from diptych.training.optim import AdamW
from diptych.training.recipe import Optimizer, Stage

ASK: dict[str, Callable[[Document], Document]] = {"question": adversary.by_question, "caption": adversary.by_caption}


# -- the recipe -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Rival:
    """Who perturbs: see `Perturber`. With `relative` the radii are shares of the norm of what is perturbed."""

    kind: Literal["learnt", "random"] = "learnt"
    hidden: int = 0  # width of its network, 0: that of the states
    eps_max: float = 0.02
    eps_min: float = 0.0
    eps_start: float = 0.01
    relative: bool = False
    lr: float = 1e-2
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Digging:
    """How hard examples are found and given back: `count` drawings for every question, of what `by` says; `similarity`
    is a reward that judges whether they show it."""

    every: int = 2  # iterations
    count: int = 4
    by: Literal["question", "caption"] = "question"
    similarity: str = "clip-text"
    options: dict[str, Any] = field(default_factory=dict)
    mining: Mining = field(default_factory=Mining)
    sampling: dict[str, Any] = field(default_factory=dict)  # changes to the model's own way of drawing
    capacity: int = 4096
    temperature: float = 1.5
    batch: int = 6  # hard examples of a step

    def __post_init__(self) -> None:
        if min(self.every, self.count, self.batch) < 1:
            raise ValueError("expected every, count and batch of at least 1")


@dataclass(frozen=True, kw_only=True)
class Contest(Course):
    """What to align a model to by playing, in place of `Align`: the key `game` tells them apart."""

    task: str = "question"
    game: Game
    rival: Rival = Rival()
    digging: Digging = Digging()
    hard: Literal["drawn", "features", "seen"] = "drawn"
    batch: int = 8
    iterations: int = 100

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"expected a batch of at least 1, got {self.batch}")


# -- the players ------------------------------------------------------------------------------------------------------

class Noise(nn.Module):
    """In the place of a perturber: directions by chance, of a radius that stays."""

    def __init__(self, radius: float, relative: bool) -> None:
        super().__init__()
        self.eps, self.relative, self.generator = torch.tensor(radius), relative, torch.Generator()

    def forward(self, z: Tensor) -> Tensor:
        direction = torch.randn(z.shape, generator=self.generator).to(z.device)
        unit = direction / direction.norm(dim=-1, keepdim=True)
        return float(self.eps) * unit * (z.detach().float().norm(dim=-1, keepdim=True) if self.relative else 1.0)


class Opponent:
    """A perturber of states (..., width), and what it learns by."""

    def __init__(self, rival: Rival, width: int, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.rival = rival
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = Perturber(width, hidden=rival.hidden, eps_max=rival.eps_max, eps_min=rival.eps_min,
                             eps_start=rival.eps_start, relative=rival.relative)
        self.module: Perturber | Noise = made.to(device)
        self.optimizer: AdamW | None = None
        if rival.kind == "random":
            self.module = Noise(rival.eps_max, rival.relative)
            return
        stage = Stage(steps=1, batch=1, lr=rival.lr)
        self.optimizer = AdamW(made, [n for n, _ in made.named_parameters()], Optimizer(weight_decay=0.0), stage)

    def turn(self, system: Packed, batch: Any, generator: torch.Generator, game: Game) -> Play | None:
        """Learn one step against a system that stands still; None: it does not learn."""
        if self.optimizer is None or not isinstance(self.module, Perturber):
            return None
        with still(system):
            play = adversary.adversary_turn(system, batch, self.module, generator, game)
            self.optimizer.zero_grad()
            play.loss.backward()
        self.optimizer.clipped_step(self.rival.clip)
        return play

    def stir(self, seed: int) -> None:
        """What it draws by chance is a function of this."""
        if isinstance(self.module, Noise):
            self.module.generator.manual_seed(seed)

    def tensors(self) -> checkpoint.Tensors:
        if self.optimizer is None:
            return {}
        return {"rival": system_tensors(self.module), "rival-optimizer": self.optimizer.tensors()}


def attack(system: Packed, questions: Sequence[Document], rival: Rival, *, steps: int, batch: int = 16, seed: int = 0
           ) -> Perturber:
    """A fresh perturber of the largest radius, which has learnt for some steps to make these questions hard for a
    system as it is: inside `perturbed(system, it, "see")` it is under attack."""
    edge = replace(rival, kind="learnt", eps_start=rival.eps_min + 0.99 * (rival.eps_max - rival.eps_min))
    opponent, game = Opponent(edge, width_of(system), seed=seed, device=system.device), Game()
    for k in range(steps):
        part = [questions[(k * batch + i) % len(questions)] for i in range(min(batch, len(questions)))]
        generator = torch.Generator(system.device).manual_seed(hash64(seed, k, 0) >> 1)
        opponent.turn(system, system.collate(part).to(system.device), generator, game)
    assert isinstance(opponent.module, Perturber)
    return opponent.module


def width_of(system: Packed) -> int:
    """Of what is seen and what is drawn, as they enter the network."""
    widths = set(system.trunk.widths)
    if len(widths) > 1:
        raise ValueError(f"expected one width of all that enters the network, got {', '.join(map(str, widths))} of "
                         f"{type(system).__name__}; fix: a system whose experts have one width")
    return widths.pop()


# -- the loop ---------------------------------------------------------------------------------------------------------

class Player(Loop):
    """`Player(recipe, system, folder).run()` plays to the end, going on at the newest checkpoint in the folder.

    `similarity` replaces the reward that the recipe names, `source` the world."""

    FREE = frozenset({"about", "iterations", "save_every", "keep", "threads"})

    def __init__(self, recipe: Contest, system: System, run: str | Path, *, similarity: Reward | None = None,
                 source: Source | None = None) -> None:
        if not isinstance(system, Packed) or type(system).see is Packed.see:
            raise ValueError("expected a system of one packed sequence that sees features of pictures, got "
                             f"{type(system).__name__}; fix: another model")
        super().__init__(recipe, system, run)
        self.recipe, self.model = recipe, system
        self.point = "code_tokens" if hasattr(type(system), "code_tokens") else "latent_tokens"
        source = WorldSource(recipe.world, {recipe.task: 1.0}, "train") if source is None else source
        self.stream = Mixture([(source, 1.0)], hash64(recipe.seed, 11, 0) >> 1)
        digging = recipe.digging
        self.similarity = similarity or make(digging.similarity, **digging.options)
        self.sampling = config.merge(system.default_sampling(), digging.sampling, "digging.sampling")
        self.learning(Stage(steps=max(recipe.iterations, 1), batch=recipe.batch, lr=recipe.lr, freeze=recipe.freeze,
                            only=recipe.only))
        self.opponent = Opponent(recipe.rival, width_of(system), seed=recipe.seed, device=system.device)
        self.buffer: HardBuffer[Document] = HardBuffer(digging.capacity)

    def question(self, position: int) -> Document:
        """It knows its own position, by which a checkpoint finds it again."""
        found = self.stream.document(position)
        return replace(found, meta={**found.meta, "position": position})

    def number(self, use: int) -> int:
        """For what is drawn by chance in this iteration."""
        return hash64(self.recipe.seed, self.iteration, use) >> 2

    def iterate(self) -> dict[str, Any]:
        start, r = time.perf_counter(), self.recipe
        questions = [self.question(self.iteration * r.batch + i) for i in range(r.batch)]
        line: dict[str, Any] = {"iteration": self.iteration + 1, "eps": float(self.opponent.module.eps.detach())}
        self.opponent.stir(self.number(0))
        play = self.opponent.turn(self.model, self._batch(questions), self._generator(1), r.game)
        if play is not None:
            line["cross-entropy under attack"] = float(play.ce.detach())
        played = time.perf_counter()
        if r.hard == "drawn" and self.iteration % r.digging.every == 0:
            line |= self.dig(questions)
        dug = time.perf_counter()
        clean = adversary.clean_turn(self.model, self._batch(questions), self._generator(2), r.game)
        line |= {"cross-entropy": float(clean.ce.detach()), "grad_norm": self._learn(clean.loss)}
        line |= self._learn_hard(questions)
        self.iteration += 1
        return line | {"answers": self.answers, "steps": self.steps, "buffer": len(self.buffer),
                       "seconds attacking": played - start, "seconds drawing": dug - played,
                       "seconds learning": time.perf_counter() - dug}

    def dig(self, questions: Sequence[Document]) -> dict[str, Any]:
        d = self.recipe.digging
        rows = adversary.dig(self.model, questions, self.opponent.module, self.similarity, d.mining, count=d.count,
                             ask=ASK[d.by], sampling=self.sampling, seed=self.number(3), point=self.point)
        self.buffer.push(rows)
        self.answers += d.count * len(questions)
        return {"mined": len(rows), "hardest": rows[0][0] if rows else None}

    def _learn_hard(self, questions: Sequence[Document]) -> dict[str, Any]:
        """The fourth move."""
        r, generator = self.recipe, torch.Generator().manual_seed(self.number(4))
        under: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if r.hard == "drawn":
            questions = self.buffer.sample(r.digging.batch, generator, r.digging.temperature)
        elif r.hard == "seen":
            past = (self.iteration + 1) * r.batch
            places = torch.randint(past, (r.digging.batch,), generator=generator).tolist()
            questions = [self.question(p) for p in places]
        else:
            questions, under = questions[:r.digging.batch], self._under_attack()
        if not questions:
            return {"hard": 0}
        with under:
            batch = self._batch(questions)
            ce = self.model.loss(batch, self._generator(5)).mean()["text"]
            self._learn(ce)
        return {"hard": len(questions), "cross-entropy of hard ones": float(ce.detach())}

    @contextlib.contextmanager
    def _under_attack(self) -> Iterator[None]:
        with still(self.opponent.module), adversary.perturbed(self.model, self.opponent.module, "see"):
            yield

    def _batch(self, questions: Sequence[Document]) -> Any:
        return self.model.collate(questions).to(self.model.device)

    def _generator(self, use: int) -> torch.Generator:
        return torch.Generator(self.model.device).manual_seed(self.number(use))

    def _learn(self, loss: Tensor) -> float:
        """One step of the model. Returns the norm of its gradient."""
        self.taught.optimizer.zero_grad()
        loss.backward()
        norm, _ = self.taught.optimizer.clipped_step(self.recipe.optimizer.clip)
        self.steps += 1
        self.taught.average(self.steps)
        return float(norm)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def tensors(self) -> checkpoint.Tensors:
        """The pictures of the buffer are tensors over the documents' own arrays."""
        pictures = {str(n): torch.from_numpy(d.of(Image)[0].pixels) for n, d in enumerate(self.buffer.items)}
        return super().tensors() | self.opponent.tensors() | ({"buffer": pictures} if pictures else {})

    def state(self) -> dict[str, Any]:
        return {"buffer": [(hardness, d.meta["position"], d.of(Image)[0].size) for hardness, d in self.buffer.rows]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.buffer.rows = [(hardness, adversary.about(self.question(p), np.empty((3, *size), np.float32)))
                            for hardness, p, size in state["buffer"]]
