"""Compiled helpers for CPUs: built by the C++ compiler of the machine when first used, kept for later.

    DIPTYCH_NATIVE=0    do without; so does a machine without a compiler (everything works, more slowly)
    CXX                 the compiler (default: c++, g++ or clang++, whichever is there)
"""
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger("diptych.native")

SOURCE = Path(__file__).with_name("decode.cpp")
# fast, but sums keep their order: a row's result must not depend on how many rows there are
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-associative-math", "-fPIC", "-std=c++17", "-w")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had."""
    if os.environ.get("DIPTYCH_NATIVE") == "0":
        return None
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        log.info("no C++ compiler: tokens are decoded without the compiled step")
        return None
    try:
        return _typed(ctypes.CDLL(str(_built(compiler))))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode(errors="replace")[-500:] if isinstance(error, subprocess.CalledProcessError) else ""
        log.warning("tokens are decoded without the compiled step, which %s could not build: %s", compiler,
                    said or error)
        return None


def _built(compiler: str) -> Path:
    """The library for this source, compiler and processor."""
    threads = _threads()
    asked = "\n".join((SOURCE.read_text(), compiler, *FLAGS, *threads, platform.machine(), _processor()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych"
    made = folder / f"decode-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.so"
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        compiled, linked = Path(work) / "decode.o", Path(work) / "decode.so"
        # two steps: linking with -ffast-math would switch off small numbers for the whole process
        opened = ["-fopenmp"] if threads else []
        subprocess.run([compiler, *FLAGS, *opened, "-c", str(SOURCE), "-o", str(compiled)], check=True,
                       capture_output=True)
        subprocess.run([compiler, "-shared", str(compiled), *threads, "-lm", "-o", str(linked)], check=True,
                       capture_output=True)
        linked.replace(made)
    return made


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = [ctypes.c_void_p], [ctypes.c_int64]
    library.decode_scratch.restype = ctypes.c_int64
    library.decode_scratch.argtypes = pointer + 3 * number
    library.decode_step.argtypes = 4 * pointer + number + 3 * pointer + number + 5 * pointer + number
    library.decode_product.argtypes = pointer + number + 2 * pointer + number + pointer + number
    return library


def _threads() -> tuple[str, ...]:
    """The OpenMP of torch itself: two pools of threads would wait for each other's cores."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return (str(own[0]), f"-Wl,-rpath,{own[0].parent}") if own else ()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))[:4000]
