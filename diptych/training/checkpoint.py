"""Checkpoints: a folder that is complete or absent.

    runs/NAME/step-000500/model.safetensors      parameters and buffers
                          optimizer.safetensors  moments and step counts, by parameter name
                          ema.safetensors        float32 averages
                          state.json             step, stage, data state, recipe, counters
A sharded run has `shards/` (torch.distributed.checkpoint) in place of the safetensors; either kind of run loads both.
Everything is written to a hidden folder, flushed to the disk, and renamed: a kill at any moment leaves whole folders.
"""
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, dict[str, Tensor]]  # group ("model", "optimizer", "ema") -> name -> the tensor itself

STATE = "state.json"
SHARDS = "shards"


def save(run: Path, step: int, tensors: Tensors, state: Mapping[str, Any], keep: int) -> Path:
    """Write `run/step-N` atomically, then remove all but the `keep` newest. One process only."""
    temporary = begin(run, step)
    for group, named in tensors.items():
        path = temporary / f"{group}.safetensors"
        save_file({n: t.detach().cpu().contiguous() for n, t in named.items()}, path)
    return finish(run, step, temporary, state, keep)


def begin(run: Path, step: int) -> Path:
    """An empty hidden folder for the files of a checkpoint."""
    run.mkdir(parents=True, exist_ok=True)
    clean(run)
    temporary = run / f".step-{step:06d}"
    temporary.mkdir()
    return temporary


def finish(run: Path, step: int, temporary: Path, state: Mapping[str, Any], keep: int) -> Path:
    """Flush the hidden folder and give it its name: the moment the checkpoint begins to exist."""
    (temporary / STATE).write_text(json.dumps(state))
    for path in [*(p for p in temporary.rglob("*") if p.is_file()), temporary]:
        flush(path)
    final = run / f"step-{step:06d}"
    if final.exists():  # the same step again, after going back to an older checkpoint
        final.rename(run / f".step-{step:06d}-old")
    temporary.rename(final)
    flush(run)
    for old in complete(run)[:-keep]:
        gone = run / f".{old.name}-gone"
        old.rename(gone)  # first the name, so that a half-deleted folder never looks whole
        shutil.rmtree(gone, ignore_errors=True)
    return final


def clean(run: Path) -> None:
    """Remove what killed runs left behind."""
    for leftover in run.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def complete(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in run.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name) and (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest(run: Path) -> Path | None:
    folders = complete(run)
    return folders[-1] if folders else None


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text())


def load(folder: Path, tensors: Tensors) -> None:
    """Copy a checkpoint into the given tensors, in place. Every name must be there, with its shape."""
    if (folder / SHARDS).is_dir():
        from diptych.training import parallel

        parallel.load_shards(folder / SHARDS, tensors)
        return
    for group, named in tensors.items():
        with safe_open(folder / f"{group}.safetensors", framework="pt") as file:
            check_names(set(named), set(file.keys()), f"{folder.name}/{group}")
            for name, target in named.items():
                copy(target, file.get_tensor(name), name)


@torch.no_grad()
def copy(target: Tensor, value: Tensor, name: str) -> None:
    if target.shape != value.shape:
        raise ValueError(f"expected {name} of shape {tuple(target.shape)}, got {tuple(value.shape)}")
    if hasattr(target, "to_local"):  # a sharded target: each process keeps its part
        from diptych.training import parallel

        value = parallel.shard_like(value, target)
    target.copy_(value)


def check_names(expected: set[str], got: set[str], where: str) -> None:
    if expected != got:
        missing, extra = sorted(expected - got), sorted(got - expected)
        raise ValueError(f"{where}: expected the tensors of this system, got {len(missing)} missing "
                         f"({', '.join(missing[:3])}) and {len(extra)} unknown ({', '.join(extra[:3])})")


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
