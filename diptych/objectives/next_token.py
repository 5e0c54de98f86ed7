"""Next-token prediction: cross-entropy, sampling and the log-prob of a sampled token, all in float32."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(n, vocabulary), (n,) -> (n,) negative log-likelihoods."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


@dataclass(frozen=True, kw_only=True)
class TextSampling:
    """temperature 0 is greedy; `top_k` 0 and `top_p` 1 switch the cuts off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_tokens < 1:
            raise ValueError(f"expected temperature >= 0, 0 < top_p <= 1, top_k >= 0, max_tokens >= 1, got {self}")


def log_probs(logits: Tensor, sampling: TextSampling) -> Tensor:
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


def draw(logits: Tensor, sampling: TextSampling, generator: torch.Generator) -> tuple[int, float]:
    """One token from logits (vocabulary,) and its log-prob. Ties of greedy decoding go to the lowest id."""
    scores = log_probs(logits, sampling)
    if sampling.temperature == 0:
        token = int(scores.argmax())
    else:
        # The sum of float32 probabilities may fall short of 1: scaled by it, the draw never leaves the support.
        mass = scores.cpu().double().exp().cumsum(-1)
        uniform = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).item()
        token = int((mass > uniform * mass[-1]).to(torch.uint8).argmax())
    return token, float(scores[token])
