"""What a training takes, from a few real steps of it in a process of its own: seconds of everything that costs time,
and the memory at its peak.

`rehearse` starts that process (`python -m diptych.training.rehearse`), so that what the calling one holds is not
counted and a recipe that is too large ends nothing else. Each stage trains on its own data for a few seconds; memory is
looked at on the largest of a few dozen batches too; samples and a checkpoint are made once, as far as the recipe asks.
"""
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych import config
from diptych.training.recipe import Recipe, load_recipe

SECONDS = 4.0  # of timed steps in every stage
LEAST, MOST = 3, 40  # timed steps
LOOK_AHEAD = 24  # batches among which the largest is looked for


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A stage as it ran for a few steps: means of seconds per step and of waiting for its data before."""

    stage: str
    steps: int  # of the whole stage
    batch: int
    seconds: float
    waiting: float
    tokens: float  # of one step
    flops: float  # of one step, forward and backward
    warm_up: float  # what the first step takes more than the others

    @property
    def whole(self) -> float:
        """Seconds of the whole stage."""
        return self.warm_up + self.steps * (self.seconds + self.waiting)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Seconds of: what comes before the first step, each look at samples, each checkpoint, the export. `memory`: bytes
    at the peak of the training process (on a GPU, of the GPU), data processes aside."""

    recipe: Recipe
    timings: tuple[Timing, ...]
    start: float
    sample: float
    save: float
    memory: int

    @property
    def samples(self) -> int:
        every = self.recipe.samples.every
        return self.recipe.steps // every if every else 0

    @property
    def saves(self) -> int:
        return -(-self.recipe.steps // self.recipe.save_every) + 1  # and the export

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return (self.start + sum(t.whole for t in self.timings) + self.samples * self.sample + self.saves * self.save)


def rehearse(recipe: Recipe, device: str = "cpu", *, threads: int | None = None, seconds: float = SECONDS) -> Rehearsal:
    """Raises RuntimeError with the last line of what the process said if it ends early, as it does without memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        config.save(recipe, path)
        command = [sys.executable, "-m", "diptych.training.rehearse", str(path), str(device), str(threads or 0),
                   str(seconds), str(time.time())]
        done = subprocess.run(command, capture_output=True, text=True)
        found = Path(folder) / "found.json"
        if done.returncode or not found.is_file():
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise RuntimeError(f"expected the recipe to train a few steps, but: {last}")
        values: dict[str, Any] = json.loads(found.read_text())
    timings = tuple(Timing(**t) for t in values.pop("timings"))
    return Rehearsal(recipe=recipe, timings=timings, **values)


# -- in the process that trains ---------------------------------------------------------------------------------------

def main(path: Path, device: str, threads: int, seconds: float, born: float) -> None:
    import torch

    from diptych.training.progress import Metrics
    from diptych.training.trainer import Trainer

    if threads:
        torch.set_num_threads(threads)
    recipe = load_recipe(path)
    trainer = Trainer(recipe, path.parent / "run", device=device)
    start = time.time() - born
    timings = []
    for index in range(len(recipe.stages)):
        _begin(trainer, index)
        trainer.enter(index)
        timings.append(_time_stage(trainer, index, seconds))
    sample = _seconds(trainer.sample) if recipe.samples.every else 0.0
    trainer.run_folder.mkdir(exist_ok=True)
    trainer.metrics = Metrics(trainer.run_folder)
    save = _seconds(trainer.save)
    trainer.metrics.close()
    found = {"timings": [dataclasses.asdict(t) for t in timings], "start": start, "sample": sample, "save": save,
             "memory": _in_the_long_run(trainer)}
    temporary = path.parent / "found.json.tmp"
    temporary.write_text(json.dumps(found))
    os.replace(temporary, path.parent / "found.json")


def _in_the_long_run(trainer: Any) -> int:
    """The peak so far, or what a process that keeps freed memory grows to."""
    from diptych.training.memory import SLACK, peak_memory

    kept = trainer.kept
    return max(peak_memory(trainer.device), int(SLACK * kept.need) if kept is not None else 0)


def _begin(trainer: Any, index: int) -> None:
    trainer.place.step = sum(s.steps for s in trainer.recipe.stages[:index])
    trainer.place.data = 0


def _time_stage(trainer: Any, index: int, seconds: float) -> Timing:
    """Counting FLOPs slows a step down: it has one of its own."""
    from torch.utils.flop_counter import FlopCounterMode

    from diptych.training.memory import synchronize

    stage, tokens = trainer.recipe.stages[index], trainer.place.tokens
    with contextlib.closing(trainer.feed()) as feed:
        start = time.perf_counter()
        trainer.step(next(feed))
        first = time.perf_counter() - start
        steps, waits = [], []
        while len(steps) < MOST and (len(steps) < LEAST or sum(steps) + sum(waits) < seconds):
            start = time.perf_counter()
            packet = next(feed, None)
            if packet is None:  # a stage of very few steps
                break
            got = time.perf_counter()
            trainer.step(packet)
            synchronize(trainer.device)
            waits.append(got - start)
            steps.append(time.perf_counter() - got)
        tokens = (trainer.place.tokens - tokens) / (1 + len(steps))
        ahead = list(itertools.islice(feed, LOOK_AHEAD))
    if ahead:
        trainer.step(max(ahead, key=_size))
    _begin(trainer, index)
    with contextlib.closing(trainer.feed()) as feed, FlopCounterMode(display=False) as counter:
        trainer.step(next(feed))
    usual = statistics.mean(steps) if steps else first
    # The first wait is the start of the workers; the others are what the run will see.
    waiting = statistics.mean(waits[1:]) if len(waits) > 1 else 0.0
    return Timing(stage=stage.name, steps=stage.steps, batch=stage.batch, seconds=usual, waiting=waiting, tokens=tokens,
                  flops=float(counter.get_total_flops()), warm_up=max(0.0, first - usual))


def _size(packet: Any) -> int:
    return sum(getattr(b, "num_tokens", 0) for b in packet.batches)


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))
