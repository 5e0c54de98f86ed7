"""Guidance as an ordered chain of branches, each a fork of the context in which something is missing.

    v = v_full;  for each branch b in order:  v = v_b + scale_b (v - v_b), then an optional renormalisation

Renormalisation keeps guidance from inflating the norm: v *= clamp(|v_full| / |v|, floor, 1), with the norm taken over
the whole picture ("global") or per token ("channel").
"""
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from torch import Tensor

Renorm = Literal["none", "global", "channel"]
Schedule = Literal["constant", "linear"]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """`context` names the fork ("no_text", "no_image", ...); a scale of 1 switches the branch off."""

    context: str
    scale: float
    renorm: Renorm = "none"

    def __post_init__(self) -> None:
        if self.renorm not in get_args(Renorm):
            raise ValueError(f"expected renorm to be one of {', '.join(get_args(Renorm))}, got {self.renorm!r}")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """`interval`: guidance acts while lo <= t < hi (t: 0 = noise, 1 = data). `schedule` "linear": scales grow from 1 to
    their full values over the course of a picture."""

    branches: tuple[Branch, ...] = ()
    interval: tuple[float, float] = (0.0, 1.0)
    floor: float = 0.0
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"expected schedule to be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}")

    def at(self, progress: float) -> Self:
        """The chain with the scales that its schedule gives at `progress` in [0, 1]."""
        if self.schedule == "constant":
            return self
        scaled = tuple(replace(b, scale=1 + (b.scale - 1) * progress) for b in self.branches)
        return replace(self, branches=scaled, schedule="constant")

    def check(self, contexts: Collection[str]) -> None:
        """An error unless every branch names one of these."""
        unknown = sorted({b.context for b in self.branches} - set(contexts))
        if unknown:
            known = ", ".join(c for c in contexts if c != "full")
            raise ValueError(f"expected guidance branches out of {known}, got {unknown[0]!r}")

    def active(self, t: float) -> tuple[Branch, ...]:
        """The branches that have to be evaluated at time t."""
        lo, hi = self.interval
        return tuple(b for b in self.branches if b.scale != 1) if lo <= t < hi else ()

    def combine(self, full: Tensor, others: Mapping[str, Tensor], t: float) -> Tensor:
        """full and every value of `others` (n, d) -> (n, d)."""
        v = full
        for branch in self.active(t):
            base = others[branch.context]
            v = renormalise(base + branch.scale * (v - base), full, branch.renorm, self.floor)
        return v


def renormalise(v: Tensor, reference: Tensor, how: Renorm, floor: float = 0.0) -> Tensor:
    """v (..., n, d) scaled down to the norm of `reference` where it is larger; norms are float32."""
    if how == "none":
        return v
    dims = (-2, -1) if how == "global" else (-1,)
    wanted, has = (x.float().norm(dim=dims, keepdim=True) for x in (reference, v))
    return v * (wanted / (has + 1e-8)).clamp(floor, 1.0).to(v.dtype)
