"""The outcome of comparing one output with a golden one, and golden folders whose names are CASE.input.NAME and
CASE.output.NAME."""
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

Kind = Literal["absolute", "relative", "mixed"]

@dataclass(frozen=True)
class Case:
    """Largest absolute error, and that divided by the largest finite golden magnitude. `tolerance` bounds the absolute
    one. Equal infinities agree, NaN agrees with nothing."""

    name: str
    absolute: float
    relative: float
    tolerance: float

    @classmethod
    def compare(cls, name: str, own: Tensor, golden: Tensor, tolerance: float) -> Self:
        if own.shape != golden.shape:
            raise ValueError(f"expected {name} of shape {tuple(golden.shape)}, got {tuple(own.shape)}")
        ours, theirs = own.float(), golden.float()
        error = torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max().item()
        size = torch.where(theirs.isfinite(), theirs.abs(), 0.0).max().item()
        return cls(name, error, error / max(size, 1e-12), tolerance)

    @property
    def passed(self) -> bool:
        return self.absolute <= self.tolerance  # False for NaN


class Fixture:
    """The tensors and values of a golden folder of algorithms, and the comparisons made with them so far. `rest` are
    outputs that nothing was compared with: a folder passes only when there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cases = folder, list[Case]()
        self.tensors = load_file(folder / "golden.safetensors")
        self.values: dict[str, Any] = json.loads((folder / "golden.json").read_text())
        self.rest = {k for k in self.tensors if ".output" in k}

    def names(self, prefix: str) -> list[str]:
        """Of the cases below a prefix that have outputs, without it."""
        found = (k.split(".output")[0] for k in self.tensors if k.startswith(f"{prefix}.") and ".output" in k)
        return list(dict.fromkeys(f.removeprefix(f"{prefix}.") for f in found if f != prefix))

    def given(self, case: str) -> dict[str, Tensor]:
        return self._below(f"{case}.input.")

    def wanted(self, case: str) -> dict[str, Tensor]:
        return self._below(f"{case}.output.")

    def _below(self, start: str) -> dict[str, Tensor]:
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def compare(self, case: str, own: Mapping[str, Tensor], tolerance: float, kind: Kind = "absolute") -> None:
        for key, value in own.items():
            self.same(f"{case}.output.{key}" if key else f"{case}.output", value, tolerance, kind)

    def same(self, name: str, own: Tensor, tolerance: float, kind: Kind = "absolute") -> None:
        """One output by its whole name. The tolerance is "relative" to the largest finite golden magnitude, or "mixed":
        relative where that exceeds 1."""
        if name not in self.tensors:
            raise ValueError(f"expected a golden output {name}, got none in {self.folder}")
        self.rest.discard(name)
        golden = self.tensors[name]
        if golden.dtype in (torch.bool, torch.int32, torch.int64):
            own = own.to(golden.dtype)
        if kind != "absolute":
            size = torch.where(golden.isfinite(), golden.abs(), 0).max().item()
            tolerance *= size if kind == "relative" else max(size, 1.0)
        self.cases.append(Case.compare(name.replace(".output", ""), own.detach(), golden, tolerance))

    def number(self, name: str, own: float | Tensor, golden: float, tolerance: float) -> None:
        """One number of the values; the tolerance is mixed."""
        self.cases.append(Case.compare(name, torch.as_tensor(own).detach().double(), torch.tensor(golden).double(),
                                       tolerance * max(1.0, abs(golden))))

    def equal(self, name: str, own: object, golden: object) -> None:
        """Anything that is either the same or wrong."""
        error = 0.0 if own == golden else 1.0
        self.cases.append(Case(name, error, error, 0.0))

    def finish(self, *apart: str) -> list[Case]:
        """All comparisons; an error if outputs are left that do not belong to cases which are tested `apart`."""
        left = sorted(k for k in self.rest if not k.startswith(apart or ("\0",)))
        if left:
            raise ValueError(f"expected every output of {self.folder} to be of a known case, got {', '.join(left[:4])}")
        return self.cases
