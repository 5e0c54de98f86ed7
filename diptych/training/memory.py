"""Keeping memory: a training step frees and takes the same gigabyte again and again.

By default glibc hands large blocks back to the system at once and gets them again page by page; with both thresholds
out of reach a CPU step spends its time computing. It takes large pages, which the command line asks torch for
(THP_MEM_ALLOC_ENABLE): their alignment is what lets a freed block fit the next tensor.

What is kept falls into pieces in time: no two steps are of the same size, and after sixty the process holds twice what
a step needs. So `Kept` gives all that is free back once more than a fifth is held beyond that.
"""
import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1
SLACK = 1.2  # what is held at most, by what a step needs


def keep_freed_memory() -> bool:
    """Tell malloc of this process to keep what is freed; False where there is no glibc to tell."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, LARGEST)) and bool(mallopt(M_MMAP_THRESHOLD, LARGEST))


class Kept:
    """Bounds what a process that keeps freed memory holds. `need`: bytes that it held after its hungriest step from a
    clean start; 0 where that cannot be told."""

    def __init__(self) -> None:
        self.need = 0
        self.clean = keep_freed_memory() and Path("/proc/self/statm").exists()
        self.on = self.clean

    def after_step(self) -> None:
        if not self.on:
            return
        held = _resident()
        if self.clean:
            self.need, self.clean = max(self.need, held), False
        elif held > SLACK * self.need:
            ctypes.CDLL(None).malloc_trim(0)
            self.clean = True


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def synchronize(device: "torch.device") -> None:
    """Wait until the device has done what it was given, so that a clock tells the truth."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def peak_memory(device: "torch.device") -> int:
    """Bytes of this process at its peak; on a GPU, what its tensors held there."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
