"""Flow for systems: drawing as a program, from noise to data step by step in every branch of guidance at once, and the
loss of a generator that reads pictures of any sizes in one batch."""
from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diptych.objectives import flow
from diptych.objectives.decisions import decide
from diptych.parts.dit_stream import Reference, StreamDit
from diptych.systems.base import Emit, Progress, Sampling, Work
from diptych.systems.works import Grid, show

Ask = Callable[[list[str], Tensor, float], Work]


def denoise(x: Tensor, grid: Grid, ask: Ask, sampling: Sampling, generator: torch.Generator, index: int,
            emit: Emit) -> Generator[Work, Any, Tensor]:
    """From noise x (n, d) to data: ODE steps, or with `sampling.stochastic` SDE steps (the last one plain). The work
    `ask(contexts, x, t)` answers one velocity (n, d) per context. Where a step is learnt from, it is through the full
    context alone (Flow-GRPO)."""
    times = flow.schedule(sampling.evaluations, sampling.shift, sampling.start, sampling.end)
    before: tuple[float, Tensor] | None = None
    for k, (t, to) in enumerate(pairwise(times)):
        guidance = sampling.guidance.at(t)
        names = list(dict.fromkeys(["full", *(b.context for b in guidance.active(t))]))
        answers = yield ask(names, x, t)
        told = {name: a if name == "full" else a.detach() for name, a in zip(names, answers, strict=True)}
        v = guidance.combine(answers[0], told, t)
        progress = Progress(step=k + 1, steps=len(times) - 1, time=t)
        yield from show(x + (1 - t) * v, grid, sampling, index, emit, progress)
        if sampling.stochastic > 0 and to < 1:
            step = flow.sde_step(x, v, t, to, sampling.stochastic, times[1])
            x = decide("flow", partial(step.sample, generator), step.log_prob, step)
        elif sampling.solver == "multistep":
            x, before = flow.second_order_step(x, v, t, to, before), (t, x + (1 - t) * v)
        else:
            x = flow.euler_step(x, v, t, to)
    return x


def errors(network: StreamDit, data: Sequence[Tensor], grids: Sequence[Grid], conditions: Sequence[Tensor],
           references: Sequence[Sequence[Reference]], copies: int, shift: flow.Shift,
           generator: torch.Generator) -> Tensor:
    """Squared errors (n,) of the latent tokens of pictures (n_i, d), means over so many noised copies of each, with
    times of their own."""
    device, order = data[0].device, [k for k in range(len(data)) for _ in range(copies)]
    shifts = torch.tensor([flow.shift_for(len(data[k]), shift) for k in order], device=device)
    t = flow.shift_time(flow.sample_time(len(order), generator).to(device), shifts)
    sizes = [len(data[k]) for k in order]
    noise = torch.randn((sum(sizes), data[0].shape[1]), generator=generator, device=generator.device)
    noises = noise.to(device).split(sizes)
    x = [flow.interpolate(data[k], own, at) for k, own, at in zip(order, noises, t, strict=True)]
    v = network(x, t, [conditions[k] for k in order], [grids[k] for k in order], [references[k] for k in order])
    found = [flow.squared_error(v[i], data[k], noises[i]) for i, k in enumerate(order)]
    return torch.cat([torch.stack(found[i:i + copies]).mean(0) for i in range(0, len(found), copies)])
