"""Small alignments whose workers can be anywhere: all of it can be imported and pickled."""
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filling import filled

from diptych.alignment.aligner import Aligner
from diptych.alignment.recipe import Align, Ask, Grpo
from diptych.alignment.rewards.base import Facts, Failure, Rating, Reward
from diptych.alignment.workers.setup import Workers
from diptych.document import Document, Image
from diptych.systems.table import find


class Level(Reward):
    """The mean of the pixels of a drawing. `missing`: of every so many answers one is not judged."""

    FACTS = Facts(name="level", about="mean of the pixels", low=-1, high=1)

    def __init__(self, missing: int = 0) -> None:
        self.missing, self.count = missing, 0

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Any]:
        out: list[Any] = []
        for d in made:
            self.count += 1
            pixels = d.of(Image)[-1].pixels
            assert pixels is not None
            lost = self.missing and self.count % self.missing == 0
            out.append(Failure("looked away") if lost else Rating(float(pixels.mean())))
        return out


class Echo:
    """A worker that waits, repeats, fails or dies."""

    def __init__(self, broken: bool = False) -> None:
        if broken:
            raise ValueError("expected a whole worker, got a broken one")

    def wait(self, seconds: float, *after: Any) -> float:
        time.sleep(seconds)
        return seconds

    def say(self, thing: Any) -> Any:
        return thing

    def fail(self) -> None:
        raise ArithmeticError("expected log-probs of the rollout, got others")

    def die(self) -> None:
        os._exit(3)


def system() -> Any:
    torch.manual_seed(0)
    return filled(find("show-o")(find("show-o").tiny())).eval()


def recipe(**changes: Any) -> Align:
    sampling = {"evaluations": 3, "guidance": {"branches": []}, "codes": {"temperature": 1.0},
                "text": {"temperature": 1.0, "max_tokens": 3}}
    return Align(**{"tasks": {"draw": Ask(reward="scene")}, "group": 4, "prompts": 2, "iterations": 4, "micro": 3,
                    "sampling": sampling, "lr": 2e-3, "freeze": ("codec",), "ema": 0.9, "save_every": 2,
                    "grpo": Grpo(spread="group")} | changes)


def aligner(folder: Path, workers: Workers | None = None, reward: Reward | None = None, **changes: Any) -> Aligner:
    return Aligner(recipe(**changes), system(), folder, rewards={"draw": reward or Level()}, workers=workers)


def weights(a: Aligner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in a.system.named_parameters()}


def differing(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    """Names of weights that differ in any bit."""
    assert one.keys() == two.keys()
    return [n for n in one if not torch.equal(one[n], two[n])]
