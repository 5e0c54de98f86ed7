"""Keeping memory: a training step frees and takes the same gigabyte again and again.

By default glibc hands large blocks back to the system at once and gets them again page by page; with both thresholds
out of reach a CPU step spends its time computing. It takes large pages, which the command line asks torch for
(THP_MEM_ALLOC_ENABLE): their alignment is what lets a freed block fit the next tensor.
"""
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell malloc of this process to keep what is freed; False where there is no glibc to tell."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, LARGEST)) and bool(mallopt(M_MMAP_THRESHOLD, LARGEST))
