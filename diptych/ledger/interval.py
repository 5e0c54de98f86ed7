"""Metrics with 95% confidence intervals."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
# Two-sided 95% quantiles of Student's t for 1..30 degrees of freedom; claims rest on few seeds, where Z95 is too small.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
       2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured number. `low` and `high` bound its 95% interval (None: exact or not known), `n` counts observations.

    `unit` is free text; "share" is shown as a percentage.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        numbers = [x for x in (self.low, self.value, self.high) if x is not None]
        if not all(math.isfinite(x) for x in numbers):
            raise ValueError(f"expected finite numbers, got {self.low}, {self.value}, {self.high}")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"expected both ends of an interval or none, got {self.low} and {self.high}")
        if numbers != sorted(numbers):
            raise ValueError(f"expected low <= value <= high, got {self.low}, {self.value}, {self.high}")


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion; it stays inside [0, 1] and is right at 0 and at n."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    share = successes / n
    scale = 1 + Z95**2 / n
    center = (share + Z95**2 / (2 * n)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n)) / scale
    # At the ends the bound is the share itself; rounding must not put it on the wrong side.
    return max(0.0, min(center - half, share)), min(1.0, max(center + half, share))


def proportion(successes: int, n: int) -> Metric:
    """Share of successes with its Wilson interval."""
    low, high = wilson(successes, n)
    return Metric(value=successes / n, low=low, high=high, n=n, unit="share")


def mean(values: Sequence[float], unit: str = "") -> Metric:
    """Mean with Student's t interval; a single value has no interval."""
    n = len(values)
    if n == 0:
        raise ValueError("expected at least one value, got none")
    if n == 1:
        return Metric(value=values[0], n=1, unit=unit)
    if min(values) == max(values):  # a sum divided again may be off in the last bit
        return Metric(value=values[0], low=values[0], high=values[0], n=n, unit=unit)
    center = math.fsum(values) / n
    variance = math.fsum((v - center) ** 2 for v in values) / (n - 1)
    half = (T95[n - 2] if n - 2 < len(T95) else Z95) * math.sqrt(variance / n)
    return Metric(value=center, low=center - half, high=center + half, n=n, unit=unit)
