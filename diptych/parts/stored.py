"""Weights at rest: half precision, or matrices and kernels in 8 bits with one scale per output row.

    w[o] ~ s[o] q[o],   s[o] = max |w[o]| / 127,   q int8

A file in 8 bits holds NAME (int8) and NAME.scale8 (float32, one per row); `read` gives back what a module loads,
whichever way it was stored.
"""
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

SCALE = ".scale8"
WINDOW = 64 * 2**20  # bytes read before a file is opened anew, which gives its mapped pages back
SHORTEST = 64  # numbers in a row that are worth a scale


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


class Weights:
    """A safetensors file, tensor by tensor: `names` are those of the module, `get` gives the values, which are views of
    the mapped file unless they stand in 8 bits."""

    def __init__(self, path: str | Path) -> None:
        self._path, self._read = path, 0
        self._file = safe_open(path, framework="pt")
        self._keys = set(self._file.keys())
        self.names = sorted(k for k in self._keys if not k.endswith(SCALE))

    def get(self, name: str) -> Tensor:
        if self._read > WINDOW:
            self._file, self._read = safe_open(self._path, framework="pt"), 0
        value = self._file.get_tensor(name)
        self._read += value.nbytes
        if name + SCALE not in self._keys:
            return value
        scale = self._file.get_tensor(name + SCALE)
        return value.float() * scale.view(-1, *(1,) * (value.ndim - 1))


def read(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a file, or those below `prefix` with their names from there on."""
    weights, start = Weights(path), f"{prefix}." if prefix else ""
    return {name[len(start):]: weights.get(name) for name in weights.names if name.startswith(start)}
