"""Next-token prediction of words and of picture codes: cross-entropy, guidance on logits, sampling and the log-prob of
a sampled token, all in float32.

    guided      l = l_b + scale (l - l_b) for every branch b                      (`guidance.Guidance.combine`)
    restricted  l = -inf outside the ids that the block's grammar allows          (`parts.grammar.Grammar.allowed`)
    drawn       the smallest k whose cumulated probability exceeds a uniform number in [0, 1)

Words and codes may have one head or two: every function takes the logits of one.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.objectives.decisions import Options, decide
from diptych.objectives.guidance import Guidance


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., vocabulary), (...) -> (...) negative log-likelihoods."""
    flat = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="none")
    return flat.view(labels.shape)


@dataclass(frozen=True, kw_only=True)
class TokenSampling:
    """temperature 0 is greedy; `top_k` 0 and `top_p` 1 switch the cuts off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"expected temperature >= 0, 0 < top_p <= 1, top_k >= 0, got {self}")


@dataclass(frozen=True, kw_only=True)
class TextSampling(TokenSampling):
    """Of texts, greedy unless told otherwise; `max_tokens` ends one that does not end itself.

    Of texts that are filled in without an order: `steps`, evaluations for a text (None: as many as for a picture);
    `block`, tokens that are finished before the next so many begin (None: all at once); and which of them stay first.
    """

    temperature: float = 0.0
    max_tokens: int = 256
    steps: int | None = None
    block: int | None = None
    order: Literal["sure", "random"] = "sure"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.max_tokens, self.steps or 1, self.block or 1) < 1 or 0 in (self.steps, self.block):
            raise ValueError("expected temperature >= 0, 0 < top_p <= 1, top_k >= 0, max_tokens, steps and block >= 1, "
                             f"got {self}")
        if self.order not in ("sure", "random"):
            raise ValueError(f"expected order sure or random, got {self.order!r}")


def log_probs(logits: Tensor, sampling: TokenSampling) -> Tensor:
    """Log-probs (..., vocabulary) of the distribution that `draw` samples from (temperature 0: of the plain one)."""
    scores = logits.float()
    if sampling.temperature > 0:
        scores = scores / sampling.temperature
        if sampling.top_k:
            kth = scores.topk(min(sampling.top_k, scores.shape[-1]), -1).values[..., -1:]
            scores = scores.masked_fill(scores < kth, float("-inf"))
        if sampling.top_p < 1:
            ordered, order = scores.sort(-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            cut = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
            scores = scores.masked_fill(cut, float("-inf"))
    return scores.log_softmax(-1)


def restrict(logits: Tensor, allowed: range) -> Tensor:
    """Logits (..., vocabulary) with -inf outside the allowed ids."""
    if not 0 <= allowed.start < allowed.stop <= logits.shape[-1]:
        raise ValueError(f"expected allowed ids within a vocabulary of {logits.shape[-1]}, got {allowed}")
    out = torch.full_like(logits, float("-inf"))
    out[..., allowed.start:allowed.stop] = logits[..., allowed.start:allowed.stop]
    return out


def guide(logits: Mapping[str, Tensor], guidance: Guidance, t: float) -> Tensor:
    """Logits (n, vocabulary) of the contexts that were evaluated, "full" among them -> guided ones, float32. `t` is the
    share of the picture that stands already. Normalising each branch first (Emu3) is the same distribution."""
    scores = {name: value.float() for name, value in logits.items()}
    return guidance.at(t).combine(scores["full"], scores, t)


def choose(scores: Tensor, uniform: Tensor | None) -> Tensor:
    """Tokens (...) from log-probs (..., vocabulary) and uniform numbers (...) in [0, 1); without them the most likely
    ones, of equals the lowest id."""
    if uniform is None:
        return scores.argmax(-1)
    # The sum of float32 probabilities may fall short of 1: scaled by it, the draw never leaves the support.
    mass = scores.cpu().double().exp().cumsum(-1)
    passed = mass > uniform.cpu().double()[..., None] * mass[..., -1:]
    return passed.to(torch.uint8).argmax(-1).to(scores.device)


def pick(scores: Tensor, uniform: Tensor | None, kind: str = "code") -> Tensor:
    """`choose`, as a decision of that kind."""
    return decide(kind, lambda: choose(scores, uniform), lambda chosen: scores.gather(-1, chosen[..., None])[..., 0],
                  options=lambda chosen: Options(chosen.flatten(), scores.flatten(0, -2)))


def draw(logits: Tensor, sampling: TokenSampling, generator: torch.Generator) -> int:
    """One token from logits (vocabulary,). Ties of greedy decoding go to the lowest id."""
    if sampling.temperature == 0:
        # of the logits themselves, and nothing else where nobody asks how likely it was
        return int(decide("text", lambda: logits.argmax(-1), lambda token: log_probs(logits, sampling)[token]))
    uniform = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
    return int(pick(log_probs(logits, sampling), uniform, "text"))
