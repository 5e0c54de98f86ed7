"""Masked diffusion of texts: tokens are hidden each by itself, and a text of a length given beforehand is filled in
block by block, several tokens at once (LLaDA, arXiv 2502.09992; MMaDA, arXiv 2505.15809).

    training   t ~ U(0, 1), p = (1 - e) t + e, e = 1e-3; every token is hidden with probability p
    loss       CE / p of the hidden ones, in their places: over t a bound of -log p(text), whatever the length
    sampling   block after block; every step draws all hidden tokens and keeps the surest of the block for good
    surest     by the probability, in float64, of the token that was drawn, or at random

Blocks keep a text from ending at once: filling is what a network is surest of, and there it stands at the end.

Shape letters: n tokens of a text, V tokens of the vocabulary, [MASK] among them.
"""
from collections.abc import Callable, Generator, Sequence
from functools import partial

import torch
from torch import Tensor

from diptych.objectives import next_token
from diptych.objectives.decisions import decide
from diptych.objectives.masked_token import Ask, gumbel
from diptych.objectives.next_token import TokenSampling

FLOOR = 1e-3  # the least probability to hide a token: 1 / p stays bounded

Plan = Sequence[tuple[slice, int]]  # the blocks of a text, each with its number of steps


# -- training ---------------------------------------------------------------------------------------------------------

def mask_probability(t: Tensor) -> Tensor:
    """p of t in [0, 1]: hardly any token is hidden at 0, all are at 1."""
    return (1 - FLOOR) * t + FLOOR


def hide(p: Tensor, uniforms: Tensor) -> Tensor:
    """(..., n) bool: the hidden places for p (...) and uniform numbers (..., n); there may be none."""
    return uniforms < p[..., None]


def corrupt(texts: Sequence[Tensor], mask: int, generator: torch.Generator,
            p: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Texts (n_i,) -> what the network reads in their place (n,), which tokens are hidden (n,), and the probability of
    that (n,): of each text its own, unless it is given."""
    hidden, rates = [], []
    for text in texts:
        t = torch.rand((1,), generator=generator, device=generator.device)[0]
        uniforms = torch.rand((len(text),), generator=generator, device=generator.device)
        rate = mask_probability(t) if p is None else torch.full_like(t, p)
        hidden.append(hide(rate, uniforms).to(text.device))
        rates.append(rate.to(text.device).expand(len(text)))
    places = torch.cat(hidden)
    return torch.cat(list(texts)).masked_fill(places, mask), places, torch.cat(rates)


def loss(logits: Tensor, tokens: Tensor, p: Tensor) -> Tensor:
    """(m,) float32: terms of the bound for hidden tokens (m,), given the logits (m, V) in their places and the
    probability (m,) or () that each was hidden."""
    return next_token.cross_entropy(logits, tokens) / p.float()


# -- sampling ---------------------------------------------------------------------------------------------------------

def plan(tokens: int, block: int | None, steps: int) -> Plan:
    """Blocks of `block` tokens (None: one), the last perhaps shorter, and how `steps` are shared out among them:
    evenly, what is left over goes to the first, each has one at least."""
    size = tokens if block is None else block
    spans = [slice(a, min(a + size, tokens)) for a in range(0, tokens, size)]
    return list(zip(spans, quotas(max(steps, len(spans)), len(spans)), strict=True))


def quotas(count: int, steps: int) -> list[int]:
    """`count` tokens shared out evenly among steps; what is left over goes to the first."""
    even, rest = divmod(count, steps)
    return [even + (k < rest) for k in range(steps)]


def draw(logits: Tensor, sampling: TokenSampling, uniforms: Tensor | None) -> Tensor:
    """Tokens (n,) from logits (n, V) and uniform numbers: one for each place (n,), or as many as tokens (n, V) for
    Gumbel noise, which is the same distribution. Without them, or at temperature 0, the likeliest."""
    scores = next_token.log_probs(logits, sampling)
    if uniforms is None or sampling.temperature == 0:
        return scores.argmax(-1)
    if uniforms.dim() == 2:
        return (scores.double() + gumbel(uniforms.to(scores.device).double())).argmax(-1)
    return next_token.choose(scores, uniforms)


def certainty(logits: Tensor, drawn: Tensor) -> Tensor:
    """(n,) float64 log-probs of the tokens drawn, at temperature 1."""
    return logits.double().log_softmax(-1).gather(-1, drawn[:, None])[:, 0]


def reveal(x: Tensor, drawn: Tensor, sure: Tensor, mask: int, within: slice, count: int) -> Tensor:
    """x (n,) in which the `count` surest of its hidden tokens `within` a block are those drawn (n,). Of equally sure
    ones the first comes first."""
    hidden = torch.zeros_like(x, dtype=torch.bool)
    hidden[within] = x[within] == mask
    order = sure.masked_fill(~hidden, -torch.inf).argsort(descending=True, stable=True)
    chosen = order[: min(count, int(hidden.sum()))]
    return x.index_copy(0, chosen, drawn[chosen])


def _revealed(logits: Tensor, sampling: TokenSampling, before: Tensor, mask: int, after: Tensor) -> Tensor:
    new = (before == mask) & (after != mask)
    return next_token.log_probs(logits[new], sampling).gather(-1, after[new][:, None])[:, 0]


def fill(x: Tensor, mask: int, blocks: Plan, sampling: TokenSampling, uniforms: Tensor | None = None,
         sure: Tensor | None = None, done: Callable[[Tensor], bool] | None = None,
         log: list[Tensor] | None = None) -> Generator[Ask, Tensor, Tensor]:
    """The sampler as a coroutine: yields tokens (n,) for the network to read, is sent logits (n, V), and returns them
    filled in; those of x that are not `mask` stay.

    Uniform numbers (T, n) or (T, n, V) choose tokens, `sure` (T, n) takes the place of their certainty (a random
    order); T steps as `blocks` has them. `done` is told a block that is finished, and says whether the rest may stay
    hidden. `log` collects the states behind every step.
    """
    first = 0
    for within, steps in blocks:
        for k, count in enumerate(quotas(int((x[within] == mask).sum()), steps), start=first):
            if count:
                logits = yield x, 1 - int((x == mask).sum()) / len(x), None
                drawn = draw(logits, sampling, None if uniforms is None else uniforms[k])
                certain = certainty(logits, drawn) if sure is None else sure[k].to(logits.device)
                x = decide("masked text", partial(reveal, x, drawn, certain, mask, within, count),
                           partial(_revealed, logits, sampling, x, mask))
            if log is not None:
                log.append(x)
        first += steps
        if done is not None and done(x[within]):
            break
    return x
