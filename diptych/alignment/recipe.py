"""What to align a trained model to, and how: the typed form of `recipes/align/*.yaml`."""
from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.alignment.advantages import Spread
from diptych.alignment.episodes import FOLLOW
from diptych.alignment.pairs import Pairs
from diptych.alignment.preference import Preference
from diptych.alignment.regions import Regions
from diptych.alignment.surrogate import Clip, Estimator, Reduction
from diptych.objectives.decisions import KINDS
from diptych.training.recipe import Lora, Optimizer

Method = Literal["grpo", "dpo", "through", "best", "own"]


@dataclass(frozen=True, kw_only=True)
class Grpo:
    """How answers become a gradient (GRPO, arXiv 2402.03300; for flows Flow-GRPO, arXiv 2505.05470).

    `clips`: bounds of the ratio by kind of decision; those of flow and diffusion are means, so their ratios hardly
    move. `beta` weighs the distance to the model as it was, under the same `reduction` as the surrogate.
    """

    spread: Spread = "group"
    unbiased: bool = False
    eps: float = 1e-4
    largest: float = 5.0  # advantages are cut there
    clips: dict[str, Clip] = field(default_factory=dict)
    beta: float = 0.0
    estimator: Estimator = "k3"
    clamp: float | None = None  # of the log-ratio inside the estimator
    reduction: Reduction = "sequence"
    bound: float = 0.02  # of the gap between the log-probs of acting and of learning

    def __post_init__(self) -> None:
        unknown = sorted(set(self.clips) - set(KINDS))
        if unknown:
            raise ValueError(f"expected clips by kind of decision ({', '.join(KINDS)}), got {unknown[0]!r}")

    def clip(self, kind: str) -> Clip:
        return self.clips.get(kind, Clip(low=1e-3, high=1e-3) if kind in ("flow", "diffusion") else Clip())


@dataclass(frozen=True, kw_only=True)
class Link:
    """One document of an episode. `follow`: the rule of `alignment.episodes` that makes it of the one before; `reward`
    (with its `options`): what judges it, if anything does; `learn`: whether its decisions are learnt from; `watch`:
    other rewards, which are reported only."""

    follow: str = ""
    reward: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    learn: bool = True
    watch: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ask(Link):
    """What the model is asked in one task of the world, how often (`weight`), and what is asked about its answer."""

    weight: float = 1.0
    then: tuple[Link, ...] = ()

    @property
    def links(self) -> tuple[Link, ...]:
        return self, *self.then


@dataclass(frozen=True, kw_only=True)
class Course:
    """What all recipes of alignment have: the model, the world it is asked in, how it is taught, how a run is kept."""

    about: str = ""
    model: str = "mini"  # a bundled model, a run, a folder
    world: str = "mini"
    iterations: int = 50
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


@dataclass(frozen=True, kw_only=True)
class Align(Course):
    """An iteration asks `prompts` documents, `group` times each, and makes `updates` steps of what came back.

    `method` grpo: every decision by how its answer compares with the group's. dpo: the best of a group over its worst.
    through: the true answer to a question about a drawing, whose loss reaches the drawing's codes by straight-through
    samples at temperature `tau` (`alignment.through`); where the drawing does not learn, the answer alone.
    Two honest controls learn from the same samples with the loss that the model was trained with: best, of every group
    the best; own, all of them. With `offline` the model as it was answers all along; `cache` is a folder where such
    answers are left for other runs that ask the same, with the judgements of `regions` (`alignment.answer_cache`).
    With `preferred`, a file of pairs (`diptych mine`), dpo asks nothing and takes `prompts` pairs of it each time.
    """

    documents: str = ""  # JSON lines of documents that are asked instead of the world's; weights of tasks say nothing
    preferred: str = ""
    tasks: dict[str, Ask] = field(default_factory=dict)
    pairs: Pairs | None = None  # where questions and drawings come in pairs, in place of documents by chance (PairUni)
    method: Method = "grpo"
    group: int = 8
    prompts: int = 8
    updates: int = 1
    micro: int = 16  # answers that are learnt from at once
    sampling: dict[str, Any] = field(default_factory=dict)  # changes to the model's own way, such as stochastic: 0.7
    offline: bool = False
    cache: str = ""
    regions: Regions | None = None  # of methods best and own: how the tokens of a drawing are weighed (SRUM)
    grpo: Grpo = Grpo()
    dpo: Preference = field(default_factory=Preference)
    tau: float = 1.0

    def __post_init__(self) -> None:
        if min(self.group, self.prompts, self.updates, self.micro) < 1:
            raise ValueError("expected group, prompts, updates and micro of at least 1, got "
                             f"{self.group}, {self.prompts}, {self.updates} and {self.micro}")
        if bool(self.tasks) == bool(self.preferred):
            raise ValueError(f"expected tasks that are asked, or a file of preferred answers, got "
                             f"{'both' if self.tasks else 'neither'}")
        if self.preferred and self.method != "dpo":
            raise ValueError(f"expected method=dpo to learn from preferred answers, got {self.method}")
        if self.group < 2 and self.method not in ("own", "through"):
            raise ValueError(f"expected a group of at least 2 answers to compare, got {self.group}")
        if self.updates > self.prompts:
            raise ValueError(f"expected at most one update per prompt ({self.prompts}), got {self.updates}; "
                             "fix: more prompts, or fewer updates")
        if self.regions is not None and self.method not in ("best", "own"):
            raise ValueError(f"expected regions to weigh examples (method=own or best), got method={self.method}")
        if self.offline and self.method in ("grpo", "through"):
            raise ValueError(f"expected {self.method} to learn from its own answers, got offline; "
                             "fix: method=dpo, best or own")
        if self.cache and not (self.offline and self.method in ("best", "own")):
            raise ValueError(f"expected answers that stay the same to keep (offline, method=own or best), got "
                             f"{'' if self.offline else 'not '}offline, method={self.method}")
        if not self.tau > 0:
            raise ValueError(f"expected tau > 0, got {self.tau}")
        if self.pairs is not None and (set(self.tasks) != {"question", "draw"} or self.prompts % (2 * self.updates)):
            raise ValueError("expected the tasks question and draw and whole pairs in every update, got "
                             f"{', '.join(self.tasks)} and {self.prompts} prompts in {self.updates} updates")
        for task, ask in self.tasks.items():
            self._check(task, ask)

    def _check(self, task: str, ask: Ask) -> None:
        for link in ask.then:
            if link.follow not in FOLLOW:
                raise ValueError(f"expected tasks.{task}.then to follow by {', '.join(FOLLOW)}, got {link.follow!r}")
        if ask.follow:
            raise ValueError(f"expected nothing before the first document of {task}, got follow: {ask.follow}")
        if not any(link.learn for link in ask.links):
            raise ValueError(f"expected a document of tasks.{task} to learn from, got learn: false for all")
        if self.method == "through":
            if [link.follow for link in ask.then] != ["answer"] or not ask.then[0].learn:
                raise ValueError(f"expected tasks.{task} to be followed by one answer that is learnt from (method "
                                 f"through), got {', '.join(link.follow for link in ask.then) or 'nothing'}")
            return
        judged = any(link.reward for link in ask.links[[link.learn for link in ask.links].index(True):])
        if not judged and self.method != "own":
            raise ValueError(f"expected tasks.{task} to name a reward for what is learnt, got none")

    @property
    def needs_reference(self) -> bool:
        """Whether the model as it was is asked again."""
        return self.offline or self.regions is not None or (self.method == "grpo" and bool(self.grpo.beta)) or (
            self.method == "dpo" and self.dpo.needs_reference)


# may change when a run goes on
FREE = frozenset({"about", "iterations", "save_every", "keep", "threads", "micro", "cache"})
