"""Orders that are pure functions of (seed, position), in integer arithmetic that no library version can change."""
import dataclasses
from bisect import bisect_right
from collections.abc import Sequence

_ONE = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the best-spread multiplier of a Kronecker sequence


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which of several weighted choices comes at position k, and how often it came before."""

    weights: Sequence[float]
    seed: int = 0

    def __post_init__(self) -> None:
        total, bounds, acc = sum(self.weights), [0], 0.0
        for weight in self.weights:
            acc += weight
            bounds.append(round(acc / total * _ONE))
        bounds[-1] = _ONE
        object.__setattr__(self, "bounds", bounds)
        object.__setattr__(self, "phase", hash64(self.seed, 0x5C4ED))

    bounds: list[int] = dataclasses.field(init=False, repr=False)
    phase: int = dataclasses.field(init=False, repr=False)

    def at(self, position: int) -> tuple[int, int]:
        """(choice, number of earlier positions with the same choice)."""
        if position < 0:
            raise ValueError(f"expected a position of at least 0, got {position}")
        if len(self.weights) == 1:
            return 0, position
        which = self.choice(position)
        return which, self.count(which, position)

    def choice(self, position: int) -> int:
        value = (position * _GOLDEN + self.phase) % _ONE
        return bisect_right(self.bounds, value) - 1

    def count(self, which: int, position: int) -> int:
        """How many of the positions before `position` choose `which`."""
        low, high = self.bounds[which], self.bounds[which + 1]
        # #{k : (a k + p) mod M in [low, high)} = sum floor((a k + p - low + M) / M) - floor((a k + p - high + M) / M)
        return (_floor_sum(position, _ONE, _GOLDEN, self.phase - low + _ONE)
                - _floor_sum(position, _ONE, _GOLDEN, self.phase - high + _ONE))


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """sum over k in [0, n) of floor((a k + b) / m), for a, b >= 0, by the Euclidean algorithm."""
    total = 0
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b, m, a = top // m, top % m, a, m
    return total


def hash64(*keys: int) -> int:
    """A well-mixed 64-bit number of some integers (splitmix64), the same on every machine for ever."""
    state = 0
    for key in keys:
        state = (state ^ (key & (_ONE - 1))) + 0x9E3779B97F4A7C15 & (_ONE - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (_ONE - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (_ONE - 1)
        state ^= state >> 31
    return state


def permute(index: int, size: int, key: int) -> int:
    """Where a keyed permutation of range(size) sends `index`: a Feistel network, walked until it lands in range."""
    half = max((size - 1).bit_length() + 1 >> 1, 1)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(6):
            left, right = right, left ^ hash64(key, turn, right) & mask
        index = left << half | right
        if index < size:
            return index
