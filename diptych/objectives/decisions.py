"""What a sampler leaves to chance, on tape: the decisions of a program with their log-probs, taken now or taken again.

Every sampler passes what it decides through `decide`. Without a tape nothing else happens. With an empty one each
decision is kept with its log-prob under the distribution it was drawn from (guidance, temperature and cuts included).
With one that is given, the program decides as it did then, and the log-probs are those of the network as it is now,
with gradients. So what is learnt from is by construction what was sampled: no second implementation can drift. A tape
may also hold only what comes `first` of a kind; the rest is drawn.

    text          a word (1,)
    code          codes of a cell, or one of its depths (1,)
    masked text   the words that a step revealed (m,)
    masked code   the codes that a step revealed (m,)
    posterior text, posterior code    what a step of a discrete flow takes all tokens for (m,); where they jump is left
                  to the seed, for the network has no part in it
    scale         the codes or bits of a scale (m,)
    flow          a stochastic step (1,): the mean over its latents (Flow-GRPO, arXiv 2505.05470)
    diffusion     the chains of a set of tokens (m,): the mean over steps and dimensions
"""
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
KINDS = ("text", "code", "masked text", "masked code", "posterior text", "posterior code", "scale", "flow",
         "diffusion")
_current: ContextVar["Tape | None"] = ContextVar("tape", default=None)


@dataclass(frozen=True)
class Options:
    """All that codes could have been: the `chosen` ones (m,), the log-probs (m, V) that they were drawn from, and the
    cells that they fill (m,), None where cells are filled one after the other."""

    chosen: Tensor
    log_probs: Tensor
    cells: Tensor | None = None


@dataclass(frozen=True)
class Decision:
    """`value`: what was decided; `log_prob` (m,) float32 of its parts; `about`: the distribution, where its distance to
    another one is known exactly; `options`, of a tape that asks for them; `states` (contexts, width): the hidden states
    that the network's head made it of, one of each context of the guidance, where whoever runs the program wants to
    know them."""

    kind: str
    value: Any
    log_prob: Tensor
    about: Any = None
    states: Tensor | None = None
    options: Options | None = None


class Tape:
    """Decisions of one program in order. `given`: those to take again, all of them. `first`: by kind, the values that
    the first decisions have, of which there may be fewer. `options`: whether decisions keep theirs. `states`: what the
    next decision is made of."""

    def __init__(self, given: Sequence[Decision] | None = None, *, first: Mapping[str, Sequence[Any]] | None = None,
                 options: bool = False) -> None:
        if given is not None and first:
            raise ValueError("expected all decisions or the first ones, got both; fix: leave one away")
        self.given, self.options = given, options
        self.first = {kind: deque(values) for kind, values in (first or {}).items()}
        self.states: Tensor | None = None
        self.decisions: list[Decision] = []
        self.drawn = 0  # of the decisions, those that were not given

    def decide(self, kind: str, choose: Callable[[], T], log_prob: Callable[[T], Tensor], about: Any = None,
               options: Callable[[T], Options] | None = None) -> T:
        value: T = self._value(kind, choose)
        found = options(value) if self.options and options is not None else None
        self.decisions.append(Decision(kind, value, log_prob(value).float().flatten(), about, self.states, found))
        return value

    def _value(self, kind: str, choose: Callable[[], T]) -> T:
        if self.given is not None:
            return self._again(kind)
        if left := self.first.get(kind):
            return left.popleft()
        self.drawn += 1
        return choose()

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


def ahead(kind: str) -> list[Any]:
    """The values of the decisions that come next and are known already, as far as they are of that kind: whoever needs
    the log-probs of them all can ask the network once."""
    tape = _current.get()
    return [] if tape is None else tape.ahead(kind)


def recording() -> bool:
    """Whether somebody wants to know how likely what is decided is."""
    return _current.get() is not None


def decide(kind: str, choose: Callable[[], T], log_prob: Callable[[T], Tensor], about: Any = None,
           options: Callable[[T], Options] | None = None) -> T:
    """`choose` draws, `log_prob` says how likely what was drawn is: (m,) of its parts."""
    tape = _current.get()
    return choose() if tape is None else tape.decide(kind, choose, log_prob, about, options)
