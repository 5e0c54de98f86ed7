"""The typed form of a training recipe: what is trained, on what, in which stages.

    system: bagel
    size: small
    config: {trunk.layers: 6}          # changes on top of the size
    init: {codec: zoo/codec}           # submodule -> folder with model.safetensors; its config comes along
    data:
    - {world: mini, tasks: {caption: 1, draw: 2}, weight: 3}
    - {folder: pictures, weight: 1}
    stages:
    - {name: align, steps: 500, batch: 64, lr: 1e-3, only: [connector]}
    - {name: all, steps: 4000, batch: 64, lr: 3e-4, warmup: 100, schedule: cosine, freeze: [codec, vision]}
"""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diptych import config
from diptych.config import ConfigError

Precision = Literal["bf16", "float32"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from: exactly one of `world`, `folder`, `messages` and `llava`."""

    world: str | None = None  # name of a world
    folder: str | None = None  # pictures with captions
    messages: str | None = None  # JSON lines of chat messages
    llava: str | None = None  # LLaVA conversations
    name: str = ""  # how stages call it; its kind when left out
    weight: float = 1.0  # share of the documents
    tasks: dict[str, float] = field(default_factory=dict)  # world: task -> weight
    split: str = "train"  # world
    documents: int = 0  # world: only the first so many, read again and again; 0 = endless
    task: Literal["caption", "draw", "both"] = "both"  # folder
    text: str | None = None  # folder: the text column
    root: str | None = None  # messages, llava: where the pictures are
    size: tuple[int, int] | None = None  # (height, width) in pixels for pictures from files; None = as they are
    mode: Literal["crop", "pad", "stretch"] = "crop"

    def __post_init__(self) -> None:
        given = [k for k in SOURCES if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(SOURCES)}, got {', '.join(given) or 'none'}")
        if self.tasks and not self.world:
            raise ValueError(f"expected tasks for a world only, got tasks for {given[0]}")
        if self.documents < 0 or (self.documents and not self.world):
            raise ValueError(f"expected a number of documents for a world only, got {self.documents} for {given[0]}")
        object.__setattr__(self, "name", self.name or given[0])


SOURCES = ("world", "folder", "messages", "llava")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training with one learning-rate schedule, one set of trained parameters and one task mix.

    Patterns name parameters: `codec` or `trunk.layers.*.mlp` match what they spell and everything below.
    """

    name: str = "main"
    steps: int
    batch: int  # documents per step, over all processes and micro-batches
    lr: float
    warmup: int = 0  # steps of linear growth from 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    decay: float = 1.0  # the last share of the steps over which the schedule falls (0.2: warmup, stable, decay)
    floor: float = 0.0  # the end of the schedule as a share of lr
    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] = ()  # train nothing else
    rates: dict[str, float] = field(default_factory=dict)  # pattern -> factor on lr; the last match holds
    tasks: dict[str, float] = field(default_factory=dict)  # replaces the tasks of the world sources
    sources: dict[str, float] = field(default_factory=dict)  # source name -> its weight in this stage; 0 leaves it out
    losses: dict[str, float] = field(default_factory=dict)  # term -> factor on its weight

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"expected steps >= 1 and batch >= 1, got {self.steps} and {self.batch}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"expected warmup between 0 and the {self.steps} steps, got {self.warmup}")
        if not (0 < self.decay <= 1 and 0 <= self.floor <= 1):
            raise ValueError(f"expected decay in (0, 1] and floor in [0, 1], got {self.decay} and {self.floor}")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, or Muon for inner matrices with AdamW for the rest. Weight decay leaves out embeddings and everything
    below two dimensions (norms, biases)."""

    kind: Literal["adamw", "muon"] = "adamw"
    momentum: float = 0.95  # Muon
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest gradient norm; 0 = no clipping


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Train low-rank additions to these linear layers instead of the weights themselves."""

    layers: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss in place of the system's own: a name of `training.objectives`, with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Pictures and answers on fixed held-out documents while training."""

    every: int = 0  # steps; 0 = never
    documents: int = 8
    data: tuple[Source, ...] = ()  # where from; the recipe's own data when left out, of worlds the test split
    tasks: dict[str, float] = field(default_factory=dict)  # of worlds; the stage's when left out
    sampler: str = "diptych.training.sampler:grid"  # module:function(system, documents, step, folder)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """What FSDP2 shards apart from the rest: module patterns, `name:method` where not `forward` is called."""

    wrap: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    about: str = ""  # what it makes and what it costs
    system: str
    size: str = "tiny"
    config: dict[str, Any] = field(default_factory=dict)
    init: dict[str, str] = field(default_factory=dict)
    data: tuple[Source, ...] = ()
    stages: tuple[Stage, ...]
    objective: Objective | None = None  # None: the system's own loss
    optimizer: Optimizer = Optimizer()
    lora: Lora | None = None
    ema: float = 0.0  # decay of the moving average that is exported; 0 = none
    precision: Precision = "float32"  # bf16: where the device computes in it
    accumulate: int = 1  # micro-batches per step, over all processes
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep: int = 2  # newest checkpoints
    samples: Samples = Samples()
    bad_steps: int = 5  # consecutive steps with a non-finite loss or gradient before rolling back
    threads: int = 0  # compute threads; 0 = leave as it is
    workers: int = 1  # data processes; 0 = in the training process
    compile: tuple[str, ...] = ()  # module patterns for torch.compile
    parallel: Parallel = Parallel()
    sinks: tuple[Literal["tensorboard", "trackio"], ...] = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("expected at least one stage, got none")
        if self.accumulate < 1 or self.log_every < 1 or self.save_every < 1 or self.keep < 1 or self.bad_steps < 1:
            raise ValueError("expected accumulate, log_every, save_every, keep and bad_steps of at least 1")
        for what, names in (("stages", [s.name for s in self.stages]), ("sources", [s.name for s in self.data])):
            if len(set(names)) < len(names):
                raise ValueError(f"expected {what} with different names, got {', '.join(names)}")
        for stage in self.stages:
            for name in stage.sources:
                if name not in [s.name for s in self.data]:
                    raise config.unknown_key(name, [s.name for s in self.data], f"sources of stage {stage.name}")

    @property
    def steps(self) -> int:
        return sum(s.steps for s in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """(stage index, first step of that stage) of a 0-based step; the last stage past the end."""
        start = 0
        for index, stage in enumerate(self.stages):
            if step < start + stage.steps or index == len(self.stages) - 1:
                return index, start
            start += stage.steps
        raise AssertionError("a recipe has stages")


# What may change when a run resumes without making it another run.
FREE_KEYS = frozenset({"about", "log_every", "save_every", "keep", "samples", "threads", "workers", "compile", "sinks",
                       "parallel", "bad_steps"})


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    return config.load(Recipe, path, overrides)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted places where two plain recipes differ."""
    found = []
    for key in sorted({*old, *new}):
        a, b, place = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, place + ".")
        elif isinstance(a, list) and isinstance(b, list) and a != b:
            found += differences(dict(zip(map(str, range(len(a))), a, strict=True)),
                                 dict(zip(map(str, range(len(b))), b, strict=True)), place + ".")
        elif a != b:
            found.append(place)
    return found


def check_resume(saved: dict[str, Any], recipe: Recipe, where: str) -> list[str]:
    """Changed places that are harmless; an error if a change would make the resumed run another run."""
    # through the type, so that keys which are newer than the checkpoint have their defaults
    old = config.to_dict(config.from_dict(Recipe, saved, where))
    changed = differences(old, config.to_dict(recipe))
    fatal = [c for c in changed if c.split(".")[0] not in FREE_KEYS]
    if fatal:
        raise ConfigError(f"{where}: expected the recipe this run was started with, got changes in {', '.join(fatal)}; "
                          "fix: give the run another name, or change these back")
    return changed
