"""What goes between workers: plain data as bytes, and weights in memory that several processes see."""
import dataclasses
import io
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNED = 64  # bytes


class _Packer(pickle.Pickler):
    """Tensors as the numbers that they show: not the storage they are a view of, and from any device."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.layout is not torch.strided or obj.requires_grad:
            return NotImplemented
        plain = obj.detach().cpu().contiguous()
        wide = {2: torch.int16, 1: torch.uint8}.get(plain.element_size()) if plain.dtype not in _NUMPY else None
        return _tensor, (plain.numpy() if wide is None else plain.view(wide).numpy(), plain.dtype)


_NUMPY = {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.bool, torch.complex64}  # the others travel as integers of their size


def _tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    found = torch.from_numpy(array)
    return found if found.dtype == dtype else found.view(dtype)


def pack(thing: Any) -> bytes:
    file = io.BytesIO()
    _Packer(file, protocol=5).dump(thing)
    return file.getvalue()


def unpack(parcel: bytes) -> Any:
    """Only of what `pack` made in a process of this run."""
    return pickle.loads(parcel)


def on_device(thing: Any, device: torch.device | str) -> Any:
    """Plain data with all its tensors on a device: containers and dataclasses are made anew where something moves."""
    if isinstance(thing, Tensor):
        return thing.to(device)
    if isinstance(thing, Mapping):
        return {k: on_device(v, device) for k, v in thing.items()}
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing)(*(on_device(v, device) for v in thing))
    if isinstance(thing, list | tuple):
        return type(thing)(on_device(v, device) for v in thing)
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return dataclasses.replace(thing, **{f.name: on_device(getattr(thing, f.name), device)
                                             for f in dataclasses.fields(thing) if f.init})
    return thing


class Slot:
    """Weights in shared memory: whoever unpickles a slot sees the same numbers as long as the file was there."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.layout, at = dict[str, tuple[int, torch.dtype, tuple[int, ...]]](), 0
        for name, t in tensors.items():
            self.layout[name] = (at, t.dtype, tuple(t.shape))
            at += -(-t.nbytes // ALIGNED) * ALIGNED
        folder = Path("/dev/shm")
        handle, path = tempfile.mkstemp(prefix="diptych-", dir=folder if folder.is_dir() else None)
        os.ftruncate(handle, at)
        os.close(handle)
        self.path, self.size = path, at
        self._open()
        self.write(tensors)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "views"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def _open(self) -> None:
        whole = torch.from_file(self.path, shared=True, size=self.size, dtype=torch.uint8)
        self.views = dict[str, Tensor]()
        for name, (at, dtype, shape) in self.layout.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            self.views[name] = whole[at:at + size].view(dtype).view(shape)

    def close(self) -> None:
        """No one else can open it from now on; it goes away with the last process that has it open."""
        Path(self.path).unlink(missing_ok=True)

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.views[name].copy_(tensor)


@torch.no_grad()
def copy_into(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """In place, so that whoever keeps something made of a tensor can see that it changed."""
    for name, value in values.items():
        tensors[name].copy_(value)
