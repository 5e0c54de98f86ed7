"""What a benchmark is: where its items come from, what a system is asked, and how an answer becomes figures.

A suite is one value of `Suite`. Everything that decides a figure is in it, so that two results of the same suite are
comparable, and what is not in it (which system, how it samples) is in the results.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from diptych.document import Document

# item number, split, wording, world -> the whole document with its true targets and what the scorer needs in `meta`
Reader = Callable[[int, str, str, str], Document]
Status = Literal["answered", "unparsed", "abstained", "missing"]
STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The verdict on one answer.

    `right` is the headline. `checks` are further yes/no figures (only those that the item asks for), `numbers` are
    measurements, `groups` name slices ("objects=2"). `status`: `unparsed` the text has no such form, `abstained` the
    verifier cannot tell what the picture shows, `missing` there is no answer at all.
    """

    right: bool
    status: Status = "answered"
    checks: Mapping[str, bool] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    answer: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"expected status to be one of {', '.join(STATUSES)}, got {self.status!r}")
        if self.right and self.status != "answered":
            raise ValueError(f"expected an answer that is right to be answered, got {self.status}")

    def to_dict(self) -> dict[str, Any]:
        return {"right": self.right, "status": self.status, "checks": dict(self.checks), "numbers": dict(self.numbers),
                "groups": list(self.groups), "answer": self.answer}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Outcome":
        return cls(**{**data, "groups": tuple(data["groups"])})


Scorer = Callable[[Document, Document], Outcome]  # (true document, the same as a system filled it)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """`right` says in words what the headline means. Answers that are unparsed, abstained or missing count as wrong
    (`missing="wrong"`) or are left out of all figures but their own share (`missing="apart"`).

    `follow` makes, of a first answer, a second document for the same system; what is scored is the first one with the
    answers of the second behind its own.

    `protocol`: `direct` every item is asked once; `chained` later pieces build on the system's own earlier ones.
    `samples` answers per item, each with its own seed; an item then counts with the mean of its answers.
    """

    name: str
    about: str
    right: str
    read: Reader
    score: Scorer
    splits: tuple[str, ...]
    prompt: Callable[[Document], Document] = Document.prompt
    follow: Callable[[Document], Document] | None = None
    samples: int = 1
    protocol: Literal["direct", "chained"] = "direct"
    missing: Literal["wrong", "apart"] = "wrong"
    statuses: tuple[Status, ...] = ("unparsed",)  # the failures that can occur, each reported as a share
    reported: tuple[str, ...] = ()  # groups that belong into every table; the others are detail
    controls: tuple[str, ...] = ()  # of `controls.CONTROLS`, that say what the figures are worth
    judge: str = "exact"  # name and version of what decides
    coverage: str = ""  # what the suite does not ask about
