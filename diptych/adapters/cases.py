"""The outcome of comparing one output with a golden one."""
from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Largest absolute error, and that divided by the largest golden magnitude. `tolerance` bounds the absolute one."""

    name: str
    absolute: float
    relative: float
    tolerance: float

    @classmethod
    def compare(cls, name: str, own: Tensor, golden: Tensor, tolerance: float) -> Self:
        if own.shape != golden.shape:
            raise ValueError(f"expected {name} of shape {tuple(golden.shape)}, got {tuple(own.shape)}")
        error = (own.float() - golden.float()).abs().max().item()
        return cls(name, error, error / max(golden.float().abs().max().item(), 1e-12), tolerance)

    @property
    def passed(self) -> bool:
        return self.absolute <= self.tolerance  # False for NaN
