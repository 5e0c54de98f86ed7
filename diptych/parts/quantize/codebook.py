"""Codebooks: a vector is replaced by the nearest of a set. Shape letters: n or ... vectors, c their width, k rows.

Each codebook has: `width`, `values` and `depth` of a code; `space(x)`, the vectors as distances see them (normalised or
not); `nearest(x)`, the code of each; `vectors(codes)`, back; `entropy(x)`, a term that is small when single vectors are
sure of their code while all codes are used. Everything is float32, also under autocast and for bf16 weights.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["none", "lookup", "always"]
FLOOR = 1e-5  # LlamaGen: added to mean probabilities before their logarithm


class CodebookLike(Protocol):
    width: int
    values: int
    depth: int

    def space(self, x: Tensor) -> Tensor: ...
    def nearest(self, x: Tensor) -> Tensor: ...
    def vectors(self, codes: Tensor) -> Tensor: ...
    def entropy(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """`norm`: where vectors are l2-normalised. "always": features and rows (LlamaGen); "lookup": to find the nearest
    only, the row itself keeps its length; "none": plain squared distance.

    `decay` switches the rows to moving averages of the vectors they replace (no gradient). `restart`: rows that replace
    less than one vector per step on average become vectors of the batch.
    """

    values: int = 16384
    width: int = 8
    norm: Norm = "always"
    temperature: float = 0.01  # of the softmax of -distance in the entropy term (LlamaGen)
    decay: float | None = None
    eps: float = 1e-5  # additive smoothing of the average counts (VQ-VAE, appendix A.1)
    restart: bool = False

    def build(self) -> "Codebook":
        return Codebook(self)


class Codebook(nn.Module):
    """Learned rows; the nearest has the least squared distance, the first of equals."""

    depth = 1
    count: Tensor
    total: Tensor

    def __init__(self, config: CodebookConfig):
        super().__init__()
        self.config, self.values, self.width = config, config.values, config.width
        rows = torch.empty(config.values, config.width).uniform_(-1 / config.values, 1 / config.values)
        rows = F.normalize(rows, dim=-1) if config.norm == "always" else rows
        self.weight = nn.Parameter(rows, requires_grad=config.decay is None)
        if config.decay is not None:
            self.register_buffer("count", torch.ones(config.values))
            self.register_buffer("total", rows.clone())

    def space(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1) if self.config.norm == "always" else x.float()

    def distances(self, x: Tensor) -> Tensor:
        """Squared distances (..., k) of vectors (..., c) to all rows, normalised where the codebook does it."""
        with torch.autocast(x.device.type, enabled=False):
            x, rows = x.float(), self.weight.float()
            if self.config.norm != "none":
                x, rows = F.normalize(x, dim=-1), F.normalize(rows, dim=-1)
            return x.square().sum(-1, keepdim=True) + rows.square().sum(-1) - 2 * x @ rows.T

    def nearest(self, x: Tensor) -> Tensor:
        return self.distances(x.detach()).argmin(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        return self.space(F.embedding(codes, self.weight))

    def entropy(self, x: Tensor) -> Tensor:
        return _entropy(-self.distances(x) / self.config.temperature, FLOOR)

    @torch.no_grad()
    def follow(self, x: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """Move the rows towards the vectors (..., c) they replaced: with n_k vectors of sum s_k for row k,

            count_k <- decay count_k + (1 - decay) n_k      total_k <- decay total_k + (1 - decay) s_k
            row_k = total_k / (n (count_k + eps) / (n + k eps)),  n = sum of all counts

        Rows to restart are drawn from the batch with `generator`. Processes of one training add up their vectors and
        share the rows of the first, so that all codebooks stay equal.
        """
        c = self.config
        if c.decay is None:
            raise ValueError("expected a codebook of moving averages, got one that learns by gradient; fix: set decay")
        x, codes = x.detach().float().reshape(-1, self.width), codes.flatten()
        counts = torch.bincount(codes, minlength=self.values).float()
        sums = torch.zeros_like(self.total).index_add_(0, codes, x)
        together = dist.is_available() and dist.is_initialized()
        if together:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.count.mul_(c.decay).add_(counts, alpha=1 - c.decay)
        self.total.mul_(c.decay).add_(sums, alpha=1 - c.decay)
        if c.restart:
            dead, fresh = self.count < 1, _sample_rows(x, self.values, generator)
            if together:
                dist.broadcast(fresh, 0)
            self.total[dead] = fresh[dead]
            self.count[dead] = 1
        n = self.count.sum()
        smooth = n * (self.count + c.eps) / (n + self.values * c.eps)
        self.weight.copy_(self.total / smooth[:, None])


def _sample_rows(x: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """`number` different vectors of the batch; a smaller batch is repeated with a little noise on the copies."""
    if len(x) < number:
        copies = x.repeat(-(-number // len(x)), 1)
        noise = torch.randn(copies.shape, generator=generator, device=generator.device).to(x)
        x = copies + noise * (0.01 / x.shape[-1] ** 0.5)  # RQ-VAE: standard deviation 0.01 / sqrt(c)
    order = torch.randperm(len(x), generator=generator, device=generator.device)
    return x[order[:number].to(x.device)]


def _entropy(logits: Tensor, eps: float) -> Tensor:
    """Mean entropy of softmax(logits) minus the entropy of the mean (+ eps), over all but the last dimension, nats."""
    logits = logits.reshape(-1, logits.shape[-1])
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean() + (mean * (mean + eps).log()).sum()


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Codebooks over slices of the channels that share their index; `weights` scale the distances of each."""

    parts: tuple[CodebookConfig, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "weights", tuple(self.weights) or (1.0,) * len(self.parts))
        if len({p.values for p in self.parts}) != 1 or len(self.weights) != len(self.parts):
            raise ValueError(f"expected codebooks of equal size with a weight each, "
                             f"got {[p.values for p in self.parts]} rows and {len(self.weights)} weights")

    @property
    def width(self) -> int:
        return sum(part.width for part in self.parts)

    def build(self) -> "JointCodebook":
        return JointCodebook(self)


class JointCodebook(nn.Module):
    """One index per vector, chosen by the weighted sum of distances in every slice (TokenFlow, section 3.1)."""

    depth = 1

    def __init__(self, config: JointConfig):
        super().__init__()
        self.config, self.values = config, config.parts[0].values
        self.parts = nn.ModuleList(Codebook(p) for p in config.parts)
        self.widths = [p.width for p in config.parts]
        self.width = sum(self.widths)

    def _slices(self, x: Tensor) -> list[tuple[Codebook, Tensor]]:
        books: list[Any] = list(self.parts)
        return list(zip(books, x.split(self.widths, -1), strict=True))

    def space(self, x: Tensor) -> Tensor:
        return torch.cat([book.space(part) for book, part in self._slices(x)], -1)

    def distances(self, x: Tensor) -> Tensor:
        terms = [w * book.distances(part) for w, (book, part) in zip(self.config.weights, self._slices(x), strict=True)]
        return torch.stack(terms).sum(0)

    def nearest(self, x: Tensor) -> Tensor:
        return self.distances(x.detach()).argmin(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        books: Sequence[Any] = list(self.parts)
        return torch.cat([book.vectors(codes) for book in books], -1)

    def entropy(self, x: Tensor) -> Tensor:
        return _entropy(-self.distances(x) / self.config.parts[0].temperature, FLOOR)


@dataclass(frozen=True, kw_only=True)
class SignConfig:
    """Codes by sign. `unit`: vectors are normalised and code vectors have norm 1 (BSQ), else +-1 per channel (LFQ).
    `packed`: a code is one integer, the first channel its most significant bit; else it is `width` bits."""

    width: int = 13  # MAGVIT-v2 of Show-o
    unit: bool = False
    packed: bool = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.packed and self.width > 62:
            raise ValueError(f"expected at most 62 bits in an integer code, got {self.width}; fix: set packed to False")

    def build(self) -> "SignCodebook":
        return SignCodebook(self)


class SignCodebook(nn.Module):
    """The corners of a cube as codebook: nothing is learned, bit i is 1 where channel i is positive."""

    def __init__(self, config: SignConfig):
        super().__init__()
        self.config, self.width = config, config.width
        self.values, self.depth = (2**config.width, 1) if config.packed else (2, config.width)
        self.level = config.width**-0.5 if config.unit else 1.0  # of the code vectors, per channel

    def space(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1) if self.config.unit else x.float()

    def nearest(self, x: Tensor) -> Tensor:
        bits = (x > 0).long()
        return pack(bits) if self.config.packed else bits

    def vectors(self, codes: Tensor) -> Tensor:
        bits = unpack(codes, self.width) if self.config.packed else codes
        return (2 * bits - 1).float() * self.level

    def entropy(self, x: Tensor) -> Tensor:
        """The mean over bits of the term of a two-way softmax of -(distance to either level)^2 / temperature."""
        x = self.space(x).reshape(-1, self.width)
        logits = torch.stack((-(x + self.level).square(), -(x - self.level).square()), -1) / self.config.temperature
        return torch.stack([_entropy(logits[:, i], 1e-12) for i in range(self.width)]).mean()


def pack(bits: Tensor) -> Tensor:
    """Bits (..., d), the most significant first -> integers (...)."""
    powers = 2 ** torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)
    return (bits.long() * powers).sum(-1)


def unpack(codes: Tensor, width: int) -> Tensor:
    """Integers (...) -> bits (..., width), the most significant first."""
    return codes[..., None] >> torch.arange(width - 1, -1, -1, device=codes.device) & 1


AnyCodebookConfig = CodebookConfig | JointConfig | SignConfig
