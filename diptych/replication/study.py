"""What a replication is: arms that differ in one thing, what is measured of each, and the claims that decide.

    difference per seed d = treatment - control (or their ratio), signed so that larger is better for the claim
    reproduced       the 95% interval of the mean of d lies above the margin
    not reproduced   it lies below
    inconclusive     it holds the margin, or there is none: too few seeds, or arms that differ from seed to seed by
                     amounts that happen to be the same
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diptych.ledger.interval import Metric, mean

if TYPE_CHECKING:
    from diptych.alignment.game import Contest
    from diptych.alignment.recipe import Align
    from diptych.systems.base import System
    from diptych.training.recipe import Recipe

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]
Measured = Mapping[str, float | Sequence[float]]  # a sequence is a curve, which claims do not read


RUN, MODEL = "run", "model"  # folders of the first job of an arm, and of what a job made


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an arm does behind its training: one more, or an alignment, in a folder of this name. `recipe` may look at
    the model so far, and leave files in the folder of the context; None: there is nothing to do. `beside`: it aligns
    the model that its recipe names, and the arm's stays what it was."""

    name: str
    recipe: Callable[["System", "Context"], "Recipe | Align | None"]
    beside: bool = False


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train or align. `changes` are dotted overrides of the study's recipe: all that sets the arm apart.
    `then` are jobs behind it. `fixed`: no figure of it depends on the seed, so that it is made and measured with the
    first alone."""

    name: str
    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    control: bool = False
    fixed: bool = False
    then: tuple[Job, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`treatment` beats `control` in `metric` by more than `margin`; a negative margin claims that little is lost.

    `ratio` compares treatment / control (control / treatment where lower is better) with the margin instead. Without a
    `control` the treatment's own value is compared with it. `against` is the metric of the control where it is another
    one: of two ways to use one model, treatment and control are the same arm.
    """

    text: str
    metric: str
    treatment: str
    control: str = ""
    against: str = ""
    better: Literal["higher", "lower"] = "higher"
    margin: float = 0.0
    ratio: bool = False

    def effect(self, treatment: float, control: float) -> float:
        """The difference or ratio of one seed, larger = more in favour."""
        if self.ratio:
            above, below = (treatment, control) if self.better == "higher" else (control, treatment)
            return above / below
        sign = 1 if self.better == "higher" else -1
        return sign * (treatment - (control if self.control else 0.0))


@dataclass(frozen=True)
class Family:
    """One of several models that a study asks the same of: its arms and claims by their short names. `changes` make
    the recipe that all share one of this model."""

    name: str
    changes: Mapping[str, Any]

    def arm(self, name: str, about: str, changes: Mapping[str, Any] | None = None, *, control: bool = True,
            fixed: bool = False) -> Arm:
        return Arm(name=f"{self.name}: {name}", about=about, changes={**self.changes, **(changes or {})},
                   control=control, fixed=fixed)

    def claim(self, text: str, metric: str, treatment: str, control: str = "", **how: Any) -> Claim:
        return Claim(text=f"{text} ({self.name})", metric=metric, treatment=f"{self.name}: {treatment}",
                     control=f"{self.name}: {control}" if control else "", **how)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim with its effect over the seeds."""

    claim: Claim
    effect: Metric
    verdict: Verdict

    @classmethod
    def of(cls, claim: Claim, treatment: Sequence[float], control: Sequence[float], unit: str = "") -> "Finding":
        """Values by seed, in the same order for both; `unit` is that of the metric."""
        effects = [claim.effect(t, c) for t, c in zip(treatment, control, strict=True)]
        found = mean(effects, "times" if claim.ratio else unit)
        alike = len(effects) > 1 and max(effects) - min(effects) < 1e-9
        if alike and not claim.ratio and max(treatment) - min(treatment) >= 1e-9:
            # figures of few items move in steps, so noise may cancel; no width would claim certainty
            found = replace(found, low=None, high=None)
        verdict: Verdict = "inconclusive"
        if found.low is not None and found.high is not None:
            verdict = ("reproduced" if found.low > claim.margin
                       else "not reproduced" if found.high < claim.margin else "inconclusive")
        return cls(claim=claim, effect=found, verdict=verdict)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a measurement may know: the arm, its resolved recipe, the seed, a folder of its own for pictures, and
    whether a rough figure will do."""

    arm: Arm
    recipe: Any  # of the study's kind
    seed: int
    folder: Path
    quick: bool = False

    def shared(self, name: str) -> Path:
        """The folder of a model that was trained for all arms."""
        return shared_model(self.folder.parent, name)

    def model(self, job: str = RUN) -> Path:
        """The folder of the model that the training, or a job behind it, made; there is none where there was nothing to
        do."""
        return self.folder / job / MODEL

    def items(self, count: int) -> int:
        """How many items to measure on: `count`, or a few for a rough figure."""
        return min(count, 8) if self.quick else count


def shared_model(study: Path, name: str) -> Path:
    return study / "shared" / name / RUN / MODEL


Measure = Callable[["System", Context], Measured]


@dataclass(frozen=True, kw_only=True)
class Study:
    """`recipe` is what all arms share: of a training, or of an alignment. `shared` are trainings that come first, once
    for all arms and seeds: an arm that trains starts from one with `init: {codec: "@NAME#codec"}` (options of an
    objective may name "@NAME", too), one that aligns with `model: "@NAME"` (`iterations: 0` leaves it as it was).
    `quick` are overrides for a short run, beside few steps in every stage, or iterations; `quick_shared` those of
    shared trainings. `units` of metrics are for the plot ("share" for what is shown in percent).
    """

    name: str
    title: str
    about: str
    recipe: "Recipe | Align | Contest"
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    measure: Measure
    shared: Mapping[str, "Recipe"] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)
    quick_shared: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    units: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [a.name for a in self.arms]
        within = any(c.against and c.control == c.treatment for c in self.claims)
        if len(set(known)) < len(known) or not (within or any(a.control for a in self.arms)):
            raise ValueError(f"expected arms with different names, one of them a control, got {', '.join(known)}")
        for claim in self.claims:
            if claim.against and not claim.control:
                raise ValueError(f"expected the arm that {claim.against!r} is measured of, got no control")
            for name in filter(None, (claim.treatment, claim.control)):
                if name not in known:
                    raise ValueError(f"expected an arm out of {', '.join(known)} in a claim, got {name!r}")
        if len(self.seeds) < 3:
            raise ValueError(f"expected at least 3 seeds, got {self.seeds}")

    def arm(self, name: str) -> Arm:
        return next(a for a in self.arms if a.name == name)
