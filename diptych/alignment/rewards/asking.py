"""Who answers the questions of a judge: a system of this library, or a model behind an OpenAI-compatible endpoint.

    ask(documents) -> [text or Failure, ...]      documents end with an empty text, which is the reply
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from diptych.alignment.rewards.base import Failure
from diptych.document import Document, Image, Text
from diptych.systems.base import Sampling, System
from diptych.systems.io import fingerprint, load_system, weights_file

Reply = str | Failure


class Asker(Protocol):
    """`name` tells apart who answers; `fixed`: the same question gets the same reply at any time."""

    @property
    def name(self) -> str: ...

    @property
    def fixed(self) -> bool: ...

    def __call__(self, documents: Sequence[Document]) -> list[Reply]: ...


class AskSystem:
    """A system, greedy unless `sampling` says otherwise; reply i has the seed `seed`. `fixed` False for a system that
    is trained meanwhile."""

    def __init__(self, system: System, *, sampling: Sampling | None = None, seed: int = 0, batch: int = 64,
                 fixed: bool = True) -> None:
        self.system, self.sampling, self.seed, self.batch = system, sampling, seed, batch
        self.fixed = fixed
        self._name = ""

    @property
    def name(self) -> str:
        """The class, and of fixed weights their fingerprint."""
        if not self._name:
            kind = type(self.system).__name__
            self._name = f"{kind} {fingerprint(self.system)}" if self.fixed else kind
        return self._name

    def __call__(self, documents: Sequence[Document]) -> list[Reply]:
        replies: list[Reply] = []
        for start in range(0, len(documents), self.batch):
            part = documents[start:start + self.batch]
            made = self.system.generate(part, self.sampling, seeds=self.seed)
            replies += [m.of(Text)[-1].text or "" for m in made]
        return replies


def asker(model: "System | Asker | str | Path", *, fixed: bool = True) -> Asker:
    """A system, or the folder of one (that of a finished run, or `zoo/NAME`), as one that is asked; others as they
    are."""
    if isinstance(model, str | Path):
        run = Path(model) / "model"
        system = load_system(weights_file(str(run if run.is_dir() else model)).parent)
        return AskSystem(system.eval().requires_grad_(False), fixed=fixed)
    return AskSystem(model, fixed=fixed) if isinstance(model, System) else model


def question(text: str, pictures: Sequence[Image] = (), *, task: str = "question") -> Document:
    """Pictures, a text, and an empty reply."""
    shown = [Image(pixels=p.pixels) for p in pictures]
    return Document((*shown, Text(text=text), Text(role="assistant", target=True)), task)
