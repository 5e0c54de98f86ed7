"""Which steps of a flow run are stochastic, and hence trained: a window that moves along the run (MixGRPO, arXiv
2507.21802, section 3; written from its equations).

    window of iteration i = [l, l + size),   l moves by `stride` after every `interval` iterations, from noise to data
    exponential:  interval = ceil(first * exp(-rate * max(0, l - threshold))): later windows are left sooner

All other steps are plain ODE steps, which cost no gradient and may be fewer.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Window:
    """`order` "progressive" moves on and begins again where the run ends; "random" puts it anywhere, anew each time."""

    steps: int  # of a run
    size: int = 4
    stride: int = 1
    interval: int = 25  # iterations in one place
    order: Literal["progressive", "random"] = "progressive"
    rate: float = 0.0  # of the decay of the interval
    threshold: int = 0  # start behind which it decays
    seed: int = 0  # of the random order

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.steps or self.stride < 1 or self.interval < 1 or self.rate < 0:
            raise ValueError(f"expected 1 <= size <= steps, stride and interval >= 1 and rate >= 0, got {self}")
        if self.order not in ("progressive", "random"):
            raise ValueError(f"expected order progressive or random, got {self.order!r}")

    @property
    def starts(self) -> list[int]:
        """Where the window can stand."""
        return list(range(0, self.steps - self.size + 1, self.stride))

    def stay(self, start: int) -> int:
        """Iterations that the window stays there."""
        return math.ceil(self.interval * math.exp(-self.rate * max(0, start - self.threshold)))

    def at(self, iteration: int) -> range:
        """The stochastic steps of an iteration (from 0)."""
        if self.order == "random":
            generator = torch.Generator().manual_seed(self.seed + iteration // self.interval)
            start = self.starts[int(torch.randint(len(self.starts), (), generator=generator))]
            return range(start, start + self.size)
        left = iteration % sum(self.stay(s) for s in self.starts)
        for start in self.starts:
            if left < self.stay(start):
                return range(start, start + self.size)
            left -= self.stay(start)
        raise AssertionError("the remainder is less than the sum")
