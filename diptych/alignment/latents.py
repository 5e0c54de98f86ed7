"""Hidden states of decisions as parameters, which a reward moves while every weight stays as it is (MILR, arXiv
2509.22761).

    p = softmax of what the frozen head, guidance and temperature make of Z (m, contexts, width)
    L = -r sum_m log(p_m[chosen_m] + 1e-10)             one step of Adam on Z alone; rewards r are 0 at best, else < 0

A wrong answer (r = -1) makes the tokens less likely that it began with, a right one (r = 0) changes nothing. `variant`
is what is chosen: "released", as the published code has it, the most likely tokens of Z as it is; "paper" (REINFORCE),
the tokens that were rewarded. Both are the same where decoding is greedy. Adam divides by the size of past gradients:
where r hardly changes from step to step its size hardly matters.
"""
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diptych.objectives import next_token
from diptych.objectives.decisions import Decision
from diptych.systems.base import Sampling
from diptych.systems.coded import Coded
from diptych.systems.packed import Packed

Variant = Literal["paper", "released"]
Scores = Callable[[Tensor], Tensor]  # states (m, contexts, width) -> log-probs (m, vocabulary)
SMALLEST = 1e-10  # added to probabilities


class Latent:
    """The first decisions of a kind as states (m, contexts, width), in float32, with an Adam of their own."""

    def __init__(self, states: Tensor, scores: Scores, rate: float) -> None:
        self.states = states.detach().float().clone().requires_grad_()
        self.scores = scores
        self.optimizer = torch.optim.Adam([self.states], lr=rate)

    def step(self, reward: float, taken: Tensor | None = None, noise: torch.Generator | None = None) -> None:
        """One step after a reward in [-1, 0]. `taken` (k <= m,): the tokens that were rewarded; None: the most likely
        ones. With `noise` the step keeps its length and goes anywhere: a control."""
        before = self.states.detach().clone()
        with torch.enable_grad():
            scores = self.scores(self.states)
            chosen = scores.argmax(-1) if taken is None else taken.to(scores.device)
            likely = scores[: len(chosen)].gather(-1, chosen[:, None]).exp()
            loss = -reward * (likely + SMALLEST).log().sum()
            # not backward(): the head is frozen, whatever its parameters say
            [self.states.grad] = torch.autograd.grad(loss, [self.states])
        self.optimizer.step()
        if noise is not None:
            length = (self.states.detach() - before).norm()
            way = torch.randn(before.shape, generator=noise).to(before)
            self.states.data = before + way * (length / way.norm())

    @torch.no_grad()
    def tokens(self, uniforms: Tensor | None = None) -> Tensor:
        """What is decided now (m,): the most likely tokens, or those that uniform numbers (m,) in [0, 1) draw."""
        return next_token.choose(self.scores(self.states), uniforms)


def word_scores(system: Packed, sampling: Sampling) -> Scores:
    """How words come from states (m, 1, width)."""
    def scores(states: Tensor) -> Tensor:
        return next_token.log_probs(system.head(states[:, 0].to(system.embed.weight.dtype)), sampling.text)

    return scores


def code_scores(system: Coded, sampling: Sampling, count: int) -> Scores:
    """How the first of `count` codes of a picture come from states (m, contexts, width), guidance included."""
    sampling = system.code_sampling(sampling)
    names = system.code_contexts(sampling)

    def scores(states: Tensor) -> Tensor:
        answers = system.answer(states.flatten(0, 1).to(system.embed.weight.dtype)).view(*states.shape[:2], -1)
        rows = [dict(zip(names, row.split(1), strict=True)) for row in answers]
        return torch.cat([system.code_log_probs(row, sampling, k / count) for k, row in enumerate(rows)])

    return scores


def stacked(decisions: Sequence[Decision]) -> Tensor:
    """States (m, contexts, width) that decisions were made of."""
    found = [d.states for d in decisions if d.states is not None]
    if len(found) < len(decisions):
        raise ValueError("expected the states of every decision, got decisions without; fix: act(..., states=True)")
    return torch.stack(found)


def values(decisions: Sequence[Decision]) -> Tensor:
    """What was decided (m,)."""
    return torch.stack([torch.as_tensor(d.value).flatten()[0] for d in decisions])


def given(tokens: Tensor, like: Any) -> list[Tensor]:
    """Tokens (m,) as a tape gives them: each of the shape of `like`, a decision's value."""
    return [token.view(torch.as_tensor(like).shape) for token in tokens]
