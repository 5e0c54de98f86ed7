"""MILR (arXiv 2509.22761): searching for a better picture at test time by moving the hidden states that its plan and
its first codes are made of. No weight changes.

    1  a document is filled as `System.generate` would do it; the states in front of the heads are kept
    2  Z_t, of the first `text_share` of the plan's words, and Z_v, of the first `picture_share` of the codes (a state
       for each context of guidance), take a step that the picture's reward decides (`alignment.latents`)
    3  the plan begins with the most likely words of Z_t and is said to its end; the picture begins with codes drawn
       from Z_v and is drawn to its end; it is judged, and 2 follows until a reward is above `threshold`

Rewards of any range count from -1, the worst, to 0, the best. Everything but step 2 is the system's own program and
sampler: what comes first is given (`objectives.decisions.Tape`), the rest is drawn with a seed of its own each time.

`mode` says what is moved: "text", "image", "both" at once, one after the other ("text_image", "image_text": half of the
steps each) or in turn ("interleaved", text first). What is not moved yet is said again and drawn anew. Codes can be
moved of systems that draw code by code, words of any. Two modes move nothing, and are the controls at as many pictures:
"again" draws anew (best of N), "plans" also says another plan each time. `direction="random"` is a third: steps of the
same length that go anywhere.

Differs from the paper: the best picture is the result, beside the last one, which is the published one; a beginning of
no token is left as it is, and a step that moves nothing is left out.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from diptych.alignment.latents import Latent, Variant, code_scores, given, stacked, values, word_scores
from diptych.alignment.policy import Trajectory, act
from diptych.alignment.rewards.base import Reward, Score, check_independent, gains
from diptych.alignment.rewards.combine import Term
from diptych.data.order import hash64
from diptych.document import Boxes, Document, Image, Text
from diptych.objectives.decisions import Decision
from diptych.systems.base import Sampling, System
from diptych.systems.coded import Coded
from diptych.systems.packed import Packed

Mode = Literal["text", "image", "both", "text_image", "image_text", "interleaved", "again", "plans"]
WORDS, CODES = "text", "code"  # kinds of decisions
CONTROLS = ("again", "plans")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`steps` follow the first picture, so `steps` + 1 pictures are drawn at most. `rate` is Adam's; `heat`: of the
    words of other plans (mode "plans")."""

    mode: Mode = "both"
    variant: Variant = "released"
    text_share: float = 0.2
    picture_share: float = 0.02
    rate: float = 0.03
    steps: int = 16
    threshold: float = -0.1
    direction: Literal["gradient", "random"] = "gradient"
    heat: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (("mode", Mode), ("variant", Variant), ("direction", Literal["gradient", "random"])):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"expected {name} out of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
        if not (0 <= self.text_share <= 1 and 0 <= self.picture_share <= 1 and self.rate > 0 and self.steps >= 0
                and -1 <= self.threshold <= 0 and self.heat > 0):
            raise ValueError("expected shares in [0, 1], rate and heat > 0, steps >= 0 and a threshold in [-1, 0], "
                             f"got {self}")

    @classmethod
    def paper(cls, mode: Mode = "both") -> Self:
        """The numbers of its text: 20% of the plan, 2% of the codes, 16 to 20 steps."""
        return cls(mode=mode, variant="paper", text_share=0.2, picture_share=0.02, rate=0.03, steps=16)

    @classmethod
    def released(cls, mode: Mode = "both") -> Self:
        """The script of the published code."""
        return cls(mode=mode, variant="released", text_share=0.1, picture_share=0.01, rate=0.01, steps=30)

    @property
    def moves_codes(self) -> bool:
        return self.mode not in (*CONTROLS, "text")

    def moved(self, step: int) -> tuple[str, ...]:
        """Kinds of decisions that step 0, 1, ... moves."""
        late = step >= (self.steps + 1) // 2
        first = {"text": True, "image": False, "text_image": not late, "image_text": late,
                 "interleaved": step % 2 == 0}
        if self.mode in CONTROLS:
            return ()
        return (WORDS, CODES) if self.mode == "both" else (WORDS,) if first[self.mode] else (CODES,)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search took: pictures from beginning to end, words and codes that were decided in them, those that were
    given, and the numbers in Z."""

    pictures: int = 0
    drawn: int = 0
    given: int = 0
    floats: int = 0


@dataclass(frozen=True, kw_only=True)
class Found:
    """`made`: the best document, of equals the first; `last`: the latest. `rewards` in [-1, 0] of all, in order, NaN
    where the reward could not tell; `tries`: pictures up to the first above the threshold, None if there was none."""

    asked: Document
    made: Document
    last: Document
    rewards: tuple[float, ...]
    tries: int | None
    budget: Budget
    reward: Reward


def search(system: System, documents: Sequence[Document], reward: Reward, settings: Settings | None = None, *,
           sampling: Sampling | None = None, seeds: Sequence[int] | int = 0) -> list[Found]:
    """Search for every document, all together; each has at most one text or plan and one picture to fill. With no steps
    the result is what `System.generate` makes with the same seeds."""
    settings = settings or Settings()
    packed = _check(system, documents, reward, settings)
    sampling = sampling or system.default_sampling()
    seeds = [seeds] * len(documents) if isinstance(seeds, int) else seeds
    if len(seeds) != len(documents):
        raise ValueError(f"expected one seed, or one per document ({len(documents)}), got {len(seeds)}")
    term = Term(reward=reward)
    hunts = [_Hunt(packed, document, seed, settings, sampling) for document, seed in zip(documents, seeds, strict=True)]
    _draw(packed, hunts, sampling, [{} for _ in hunts], list(seeds), term)
    if settings.mode == "plans":
        sampling = replace(sampling, text=replace(sampling.text, temperature=settings.heat))
    for step in range(settings.steps):
        begun = [(h, first) for h in hunts if h.tries is None and (first := h.begin(step)) is not None]
        if begun:
            own = [h.seed_of(step) for h, _ in begun]
            _draw(packed, [h for h, _ in begun], sampling, [first for _, first in begun], own, term)
    return [h.found(reward) for h in hunts]


def measure(found: Sequence[Found], metric: Reward, *, last: bool = False) -> list[Score]:
    """What was found, by another measure than the reward of the search: an error if they are the same, as the search
    would then have stopped where the figure is high. `last`: of the latest pictures, not the best."""
    for reward in {id(f.reward): f.reward for f in found}.values():
        check_independent(reward, metric)
    return metric([f.asked for f in found], [f.last if last else f.made for f in found])


def _check(system: System, documents: Sequence[Document], reward: Reward, settings: Settings) -> Packed:
    name = type(system).__name__
    if not isinstance(system, Packed):
        raise ValueError(f"expected a system that says and draws in one sequence, got {name}")
    plain = isinstance(system, Coded) and not system.code_shape and type(system).pick_code is Coded.pick_code
    if settings.moves_codes and not plain:
        raise ValueError(f"expected a system that draws code by code, one code for each cell, got {name}; fix: choose "
                         'one such as janus or emu3, or mode="text"')
    if "group" in reward.facts.needs:
        raise ValueError(f"expected a reward of single answers, got {reward.facts.name}, which compares them")
    for document in documents:
        drawn = [p for p in document.targets if isinstance(p, Image)]
        said = [p for p in document.targets if isinstance(p, Text | Boxes)]
        if len(drawn) != 1 or len(said) > 1 or drawn[-1] is not document.targets[-1]:
            raise ValueError("expected documents with one picture to draw behind at most one text or plan, got "
                             f"{', '.join(p.kind for p in document.targets) or 'nothing'} to fill")
        if not said and settings.mode not in ("image", "again"):
            raise ValueError(f"expected a text or a plan to fill for mode {settings.mode!r}, got a picture alone; fix: "
                             'documents that plan first, or mode="image"')
    return system


@torch.no_grad()
def _draw(system: Packed, hunts: Sequence["_Hunt"], sampling: Sampling, first: Sequence[Mapping[str, list[Tensor]]],
          seeds: Sequence[int], term: Term) -> None:
    """Fill the documents once more and judge them."""
    made = act(system, [h.document for h in hunts], sampling, seeds, first=first, states=True)
    for hunt, trajectory in zip(hunts, made, strict=True):
        if hunt.settings.moves_codes and not any(d.kind == CODES for d in trajectory.decisions):
            raise ValueError(f"expected {type(system).__name__} to draw code by code, got "
                             f"{', '.join(sorted(set(trajectory.kinds)))}")
    scores = term.reward([h.document for h in hunts], [t.made for t in made])
    rewards = [value - 1 for value in term.scaled(gains(term.reward, scores))]
    for hunt, trajectory, value in zip(hunts, made, rewards, strict=True):
        hunt.keep(trajectory, value)


class _Hunt:
    """The search for one document."""

    def __init__(self, system: Packed, document: Document, seed: int, settings: Settings, sampling: Sampling) -> None:
        self.system, self.document, self.seed = system, document, seed
        self.settings, self.sampling = settings, sampling
        self.latents: dict[str, Latent] = {}
        self.rewards: list[float] = []
        self.tries: int | None = None
        self.budget = Budget()
        self.made: Document | None = None
        self.latest: Trajectory | None = None

    def seed_of(self, step: int, use: int = 0) -> int:
        return hash64(self.seed, step + 1, use) >> 1

    def keep(self, trajectory: Trajectory, reward: float) -> None:
        best = max((r for r in self.rewards if r == r), default=-torch.inf)
        if self.made is None or reward > best:
            self.made = trajectory.made
        self.latest = trajectory
        self.rewards.append(reward)
        if reward > self.settings.threshold:
            self.tries = len(self.rewards)
        spent, taken = self.budget, len(trajectory.decisions)
        self.budget = Budget(pictures=spent.pictures + 1, drawn=spent.drawn + trajectory.drawn,
                             given=spent.given + taken - trajectory.drawn,
                             floats=sum(z.states.numel() for z in self.latents.values()))

    def decisions(self, kind: str) -> list[Decision]:
        assert self.latest is not None
        return [d for d in self.latest.decisions if d.kind == kind]

    def begin(self, step: int) -> Mapping[str, list[Tensor]] | None:
        """Move what this step moves -> what the next document begins with; None if there is nothing to move."""
        if self.settings.mode in CONTROLS:
            return {}
        moved = [kind for kind in self.settings.moved(step) if self.open(kind)]
        if not moved:
            return None
        for kind in moved:
            self.move(kind, step)
        first: dict[str, list[Tensor]] = {}
        if said := self.decisions(WORDS):
            # what is not moved is said again: how it goes on must not change either
            words = self.latents[WORDS].tokens() if WORDS in moved else values(said)
            first[WORDS] = given(words, said[0].value)
        if CODES in self.latents:
            latent = self.latents[CODES]
            generator = torch.Generator().manual_seed(self.seed_of(step, 1))
            uniforms = torch.rand(len(latent.states), generator=generator, dtype=torch.float64)
            codes = latent.tokens(uniforms if self.sampling.codes.temperature > 0 else None)
            first[CODES] = given(codes, self.decisions(CODES)[0].value)
        return first

    def open(self, kind: str) -> bool:
        """Whether there is something to move: the states of the latest document become parameters when first asked."""
        if kind not in self.latents:
            s, made = self.settings, self.decisions(kind)
            count = int((s.text_share if kind == WORDS else s.picture_share) * len(made))
            if not count:
                return False
            if kind == WORDS:
                scores = word_scores(self.system, self.sampling)
            else:
                assert isinstance(self.system, Coded)
                scores = code_scores(self.system, self.sampling, len(made))
            self.latents[kind] = Latent(stacked(made[:count]), scores, s.rate)
        return True

    def move(self, kind: str, step: int) -> None:
        latent, reward = self.latents[kind], self.rewards[-1]
        if reward != reward:  # nothing is known of the latest picture: go on from where we are
            return
        taken = values(self.decisions(kind)[: len(latent.states)]) if self.settings.variant == "paper" else None
        noise: Any = None
        if self.settings.direction == "random":
            noise = torch.Generator().manual_seed(self.seed_of(step, 2 if kind == WORDS else 3))
        latent.step(reward, taken, noise)

    def found(self, reward: Reward) -> Found:
        assert self.made is not None and self.latest is not None
        return Found(asked=self.document, made=self.made, last=self.latest.made, rewards=tuple(self.rewards),
                     tries=self.tries, budget=self.budget, reward=reward)
