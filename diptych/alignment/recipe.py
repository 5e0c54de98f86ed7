"""What to align a trained model to, and how: the typed form of `recipes/align/*.yaml`."""
from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.alignment.advantages import Spread
from diptych.alignment.surrogate import Clip, Estimator, Reduction
from diptych.objectives.decisions import KINDS
from diptych.training.recipe import Lora, Optimizer

Method = Literal["grpo", "best"]


@dataclass(frozen=True, kw_only=True)
class Grpo:
    """How answers become a gradient (GRPO, arXiv 2402.03300; for flows Flow-GRPO, arXiv 2505.05470).

    `clips`: bounds of the ratio by kind of decision; that of flows is a mean over latents, so its ratios hardly move.
    `beta` weighs the distance to the model as it was, under the same `reduction` as the surrogate.
    """

    spread: Spread = "group"
    unbiased: bool = False
    eps: float = 1e-4
    largest: float = 5.0  # advantages are cut there
    clips: dict[str, Clip] = field(default_factory=dict)
    beta: float = 0.0
    estimator: Estimator = "k3"
    reduction: Reduction = "sequence"
    bound: float = 0.02  # of the gap between the log-probs of acting and of learning

    def __post_init__(self) -> None:
        unknown = sorted(set(self.clips) - set(KINDS))
        if unknown:
            raise ValueError(f"expected clips by kind of decision ({', '.join(KINDS)}), got {unknown[0]!r}")

    def clip(self, kind: str) -> Clip:
        return self.clips.get(kind, Clip(low=1e-3, high=1e-3) if kind == "flow" else Clip())


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the model is asked in one task, and what judges it: a reward of `alignment.rewards` with its options."""

    weight: float = 1.0
    reward: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Align:
    """An iteration asks `prompts` documents, `group` times each, and makes `updates` steps of what came back.

    Method "best" is the honest control: it fine-tunes on the best of every group, from the same samples, with the loss
    that the model was trained with.
    """

    about: str = ""
    model: str = "mini"  # a bundled model, a run, a folder
    world: str = "mini"
    tasks: dict[str, Ask]
    method: Method = "grpo"
    group: int = 8
    prompts: int = 8
    iterations: int = 50
    updates: int = 1
    micro: int = 16  # answers that are learnt from at once
    sampling: dict[str, Any] = field(default_factory=dict)  # changes to the model's own way, such as stochastic: 0.7
    grpo: Grpo = Grpo()
    lr: float
    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(weight_decay=0.0))
    lora: Lora | None = None
    ema: float = 0.0
    seed: int = 0
    save_every: int = 25  # iterations
    keep: int = 2
    threads: int = 0

    def __post_init__(self) -> None:
        if not self.tasks or min(self.group, self.prompts, self.iterations, self.updates, self.micro) < 1:
            raise ValueError("expected tasks, and group, prompts, iterations, updates and micro of at least 1")
        if self.group < 2:
            raise ValueError(f"expected a group of at least 2 answers to compare, got {self.group}")
        if self.updates > self.prompts:
            raise ValueError(f"expected at most one update per prompt ({self.prompts}), got {self.updates}; "
                             "fix: more prompts, or fewer updates")


FREE = frozenset({"about", "iterations", "save_every", "keep", "threads", "micro"})  # may change when a run goes on
