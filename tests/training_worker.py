"""Runs the small test system in a process of its own, for tests that kill it or start several.

    training_worker.py RUN JSON-of-recipe-changes [--parallel]
"""
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import training_system as small

from diptych import config
from diptych.training.trainer import Trainer


def train(run: str, changes: dict[str, Any], *, parallel: bool = False, kill_at: int = -1) -> None:
    """Train to the end; with `kill_at`, SIGKILL right before that file operation in the run's folder."""
    torch.set_num_threads(1)
    if kill_at >= 0:
        die_at(Path(run), kill_at)
    changes = dict(changes)
    system = small.build(**changes.pop("model", {}))
    recipe = config.merge(small.recipe(), changes)
    with contextlib.ExitStack() as stack:
        mesh = None
        if parallel:
            import torch.distributed as dist

            from diptych.training.parallel import open_mesh

            mesh = open_mesh()
            stack.callback(dist.destroy_process_group)
        Trainer(recipe, run, system=system, streams=small.words, mesh=mesh, device="cpu").run()


def die_at(run: Path, countdown: int) -> None:
    """Python reports every open, rename, mkdir and remove to audit hooks before doing it."""
    left = [countdown]

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(run) in str(arguments[0]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    train(sys.argv[1], json.loads(sys.argv[2]), parallel="--parallel" in sys.argv)
