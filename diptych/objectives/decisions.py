"""What a sampler leaves to chance, on tape: the decisions of a program with their log-probs, taken now or taken again.

Every sampler passes what it decides through `decide`. Without a tape nothing else happens. With an empty one each
decision is kept with its log-prob under the distribution it was drawn from (guidance, temperature and cuts included).
With one that is given, the program decides as it did then, and the log-probs are those of the network as it is now,
with gradients. So what is learnt from is by construction what was sampled: no second implementation can drift.

    text          a word (1,)
    code          codes of a cell, or one of its depths (1,)
    masked text   the words that a step revealed (m,)
    masked code   the codes that a step revealed (m,)
    scale         the codes or bits of a scale (m,)
    flow          a stochastic step (1,): the mean over its latents (Flow-GRPO, arXiv 2505.05470)
"""
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
KINDS = ("text", "code", "masked text", "masked code", "scale", "flow")
_current: ContextVar["Tape | None"] = ContextVar("tape", default=None)


@dataclass(frozen=True)
class Decision:
    """`value`: what was decided; `log_prob` (m,) float32 of its parts; `about`: the distribution, where its distance to
    another one is known exactly."""

    kind: str
    value: Any
    log_prob: Tensor
    about: Any = None


class Tape:
    """Decisions of one program in order. `given`: those to take again."""

    def __init__(self, given: Sequence[Decision] | None = None) -> None:
        self.given = given
        self.decisions: list[Decision] = []

    def decide(self, kind: str, choose: Callable[[], T], log_prob: Callable[[T], Tensor], about: Any = None) -> T:
        value: T = choose() if self.given is None else self._again(kind)
        self.decisions.append(Decision(kind, value, log_prob(value).float().flatten(), about))
        return value

    def _again(self, kind: str) -> Any:
        assert self.given is not None
        at = len(self.decisions)
        known = self.given[at].kind if at < len(self.given) else "nothing"
        if known != kind:
            raise ValueError(f"expected decision {at} to be {known}, as it was when it was taken, got {kind}; "
                             "fix: the same document, sampling and system configuration")
        return self.given[at].value

    def ahead(self, kind: str) -> list[Any]:
        """What is known of the decisions that come next, as far as they are of that kind."""
        coming = itertools.takewhile(lambda d: d.kind == kind, (self.given or ())[len(self.decisions):])
        return [d.value for d in coming]

    @property
    def complete(self) -> bool:
        """Whether all that was given has been taken again."""
        return self.given is None or len(self.decisions) == len(self.given)


@contextmanager
def taping(tape: Tape) -> Iterator[None]:
    """What is decided meanwhile, in this thread, goes through the tape."""
    token = _current.set(tape)
    try:
        yield
    finally:
        _current.reset(token)


def deciding() -> bool:
    """Whether anybody listens."""
    return _current.get() is not None


def ahead(kind: str) -> list[Any]:
    """The values of the decisions that come next and are known already, as far as they are of that kind: whoever needs
    the log-probs of them all can ask the network once."""
    tape = _current.get()
    return [] if tape is None else tape.ahead(kind)


def decide(kind: str, choose: Callable[[], T], log_prob: Callable[[T], Tensor], about: Any = None) -> T:
    """`choose` draws, `log_prob` says how likely what was drawn is: (m,) of its parts."""
    tape = _current.get()
    return choose() if tape is None else tape.decide(kind, choose, log_prob, about)
