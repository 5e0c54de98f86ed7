"""Weights at rest: half precision, or matrices and kernels in 8 bits with one scale per output row.

    w[o] ~ s[o] q[o],   s[o] = max |w[o]| / 127,   q int8

A file in 8 bits holds NAME (int8) and NAME.scale8 (float32, one per row); `read` gives back what a module loads,
whichever way it was stored.
"""
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SCALE = ".scale8"
SHORTEST = 64  # numbers in a row that are worth a scale
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors in bfloat16, others as they are."""
    return {k: v.to("cpu", torch.bfloat16).contiguous() if v.is_floating_point() else v.cpu().contiguous()
            for k, v in tensors.items()}


def eighth(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels with long rows as int8 with their scales, the rest as `half`."""
    found: dict[str, Tensor] = {}
    for name, value in half(tensors).items():
        if not value.is_floating_point() or value.ndim < 2 or value[0].numel() < SHORTEST:
            found[name] = value
            continue
        rows = tensors[name].detach().cpu().float().flatten(1)
        scale = rows.abs().amax(1).clamp_min(1e-20) / 127
        found[name] = (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8).view(value.shape)
        found[name + SCALE] = scale
    return found


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file, tensor by tensor. Each one asked for is read into memory of its own: the pages of a mapped
    file would count beside the weights that are made of them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt"):  # checks names, types and places against the size of the file
                pass
        except SafetensorError as error:
            self._refuse(error)
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            about = json.loads(file.read(length))
        self._start = 8 + length
        self.metadata: dict[str, str] | None = about.pop("__metadata__", None)
        self._about = about

    def _refuse(self, error: Exception) -> None:
        with open(self.path, "rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        if pointer:
            raise ValueError(f"expected weights in {self.path}, got a pointer of git-lfs; fix: git lfs pull") from None
        raise ValueError(f"expected a whole safetensors file, got {self.path} ({error}); fix: download it again, or "
                         "make it anew") from None

    def __getitem__(self, name: str) -> Tensor:
        about = self._about[name]
        begin, end = about["data_offsets"]
        numbers = torch.empty(end - begin, dtype=torch.uint8)
        with open(self.path, "rb") as file:
            file.seek(self._start + begin)
            if file.readinto(numbers.numpy().data) != end - begin:
                raise ValueError(f"expected {end - begin} bytes of {name} in {self.path}, got fewer: it has changed")
        return numbers.view(self._dtype(name)).reshape(about["shape"])

    def meta(self, name: str) -> Tensor:
        """A tensor of this shape and type that holds nothing."""
        return torch.empty(self._about[name]["shape"], dtype=self._dtype(name), device="meta")

    def _dtype(self, name: str) -> torch.dtype:
        kind = self._about[name]["dtype"]
        if kind not in DTYPES:
            raise ValueError(f"expected numbers of a known type in {self.path}, got {kind} for {name}")
        return DTYPES[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._about)

    def __len__(self) -> int:
        return len(self._about)


class Weights:
    """A safetensors file, tensor by tensor: `names` are those of the module, `get` gives the values."""

    def __init__(self, path: str | Path) -> None:
        self._file = TensorFile(path)
        self.names = sorted(k for k in self._file if not k.endswith(SCALE))

    def get(self, name: str) -> Tensor:
        value = self._file[name]
        if name + SCALE not in self._file:
            return value
        return value.float() * self._file[name + SCALE].view(-1, *(1,) * (value.ndim - 1))


def read(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a file, or those below `prefix` with their names from there on."""
    weights, start = Weights(path), f"{prefix}." if prefix else ""
    return {name[len(start):]: weights.get(name) for name in weights.names if name.startswith(start)}
