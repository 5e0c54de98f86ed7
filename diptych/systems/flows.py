"""Drawing by flow as a program: from noise to data, step by step, in every branch of guidance at once."""
from collections.abc import Callable, Generator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diptych.objectives import flow
from diptych.systems.base import Emit, Event, Sampling, Work
from diptych.systems.works import Develop, Grid

Ask = Callable[[list[str], Tensor, float], Work]


def denoise(x: Tensor, grid: Grid, ask: Ask, sampling: Sampling, generator: torch.Generator, index: int,
            emit: Emit) -> Generator[Work, Any, Tensor]:
    """From noise x (n, d) to data: ODE steps, or with `sampling.stochastic` SDE steps (the last one plain). The work
    `ask(contexts, x, t)` answers one velocity (n, d) per context."""
    times = flow.schedule(sampling.evaluations, sampling.shift, sampling.start)
    before: tuple[float, Tensor] | None = None
    for step, (t, to) in enumerate(pairwise(times)):
        guidance = sampling.guidance.at(t)
        names = list(dict.fromkeys(["full", *(b.context for b in guidance.active(t))]))
        answers = yield ask(names, x, t)
        v = guidance.combine(answers[0], dict(zip(names, answers, strict=True)), t)
        if sampling.partial and step % sampling.partial == 0 and to < 1:
            emit(Event("partial", index, (yield Develop(x + (1 - t) * v, grid))))
        if sampling.stochastic > 0 and to < 1:
            x = flow.sde_step(x, v, t, to, sampling.stochastic, times[1]).sample(generator)
        elif sampling.solver == "multistep":
            x, before = flow.second_order_step(x, v, t, to, before), (t, x + (1 - t) * v)
        else:
            x = flow.euler_step(x, v, t, to)
    return x
