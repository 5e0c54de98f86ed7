"""What loops that improve a trained model have in common: iterations that are counted, told, kept in checkpoints, and
gone on with after an interruption. What happens in an iteration is the subclass's."""
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from diptych import config
from diptych.alignment.recipe import Course
from diptych.alignment.taught import Taught
from diptych.systems.base import System
from diptych.training import checkpoint, lora
from diptych.training.progress import Metrics, Progress, event, interruptible
from diptych.training.recipe import Stage, differences

log = logging.getLogger("diptych.alignment")


class Loop(ABC):
    """`run()` goes to the end, or to an interruption. A subclass sets `taught` by `learning`."""

    FREE: ClassVar[frozenset[str]]  # keys of the recipe that may change when a run goes on
    taught: Taught

    def __init__(self, recipe: Course, system: System, run: str | Path) -> None:
        self.settings, self.system, self.run_folder = recipe, system.eval(), Path(run)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.iteration, self.answers, self.steps, self.seconds, self.stop = 0, 0, 0, 0.0, False

    def learning(self, stage: Stage) -> None:
        """Let the system learn what the stage trains, LoRA or weights, with an optimiser and an average."""
        r, system = self.settings, self.system
        if r.lora is not None:
            lora.attach(system, r.lora.layers, r.lora.rank, r.lora.alpha, seed=r.seed)
        self.taught = Taught(system, r, stage)

    @abstractmethod
    def iterate(self) -> dict[str, Any]:
        """One iteration, counted. Returns what to log."""

    def run(self, watch: Callable[[dict[str, Any]], None] | None = None) -> System:
        """Iterate to the end (or until interrupted, after a checkpoint); a finished run leaves `model/`."""
        self.run_folder.mkdir(parents=True, exist_ok=True)
        with self.working():
            self.resume()
            config.save(self.settings, self.run_folder / "recipe.yaml")
            self._iterate(watch)
            self.ended()
            if self.iteration >= self.settings.iterations:
                self.export()
        return self.system

    def _iterate(self, watch: Callable[[dict[str, Any]], None] | None) -> None:
        r = self.settings
        metrics = Metrics(self.run_folder, self.iteration)
        progress = Progress(r.iterations, self.iteration, self.run_folder.name)
        with interruptible(self._ask_to_stop), contextlib.closing(metrics), contextlib.closing(progress):
            while self.iteration < r.iterations and not self.stop:
                start = time.perf_counter()
                line = self.iterate()
                self.seconds += time.perf_counter() - start
                line |= {"step": self.iteration, "seconds": round(self.seconds, 3)}
                metrics.write(line)
                progress.step()
                if watch is not None:
                    watch(line)
                if self.iteration % r.save_every == 0 or self.iteration == r.iterations or self.stop:
                    metrics.flush()
                    self.save()

    def working(self) -> AbstractContextManager[None]:
        """What a run holds while it works."""
        return contextlib.nullcontext()

    def ended(self) -> None:
        """After the last iteration of this process, interrupted or not."""
        return

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def tensors(self) -> checkpoint.Tensors:
        """What a checkpoint holds; a subclass may add groups of its own."""
        return self.taught.tensors()

    def state(self) -> dict[str, Any]:
        """What else it holds, as JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Make place for what the tensors of a checkpoint are copied into next."""
        return

    def save(self) -> None:
        place = {k: getattr(self, k) for k in ("iteration", "answers", "steps", "seconds")}
        state = {"place": place, "recipe": config.to_dict(self.settings), "torch": torch.__version__, **self.state()}
        self.write(state)

    def write(self, state: dict[str, Any]) -> None:
        checkpoint.save(self.run_folder, self.iteration, self.tensors(), state, self.settings.keep)

    def read(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.restore(state)
        checkpoint.load(folder, self.tensors())

    def resume(self) -> None:
        checkpoint.clean(self.run_folder)
        folder = checkpoint.latest(self.run_folder)
        if folder is None:
            return
        state = checkpoint.read_state(folder)
        changed = differences(state["recipe"], config.to_dict(self.settings))
        fatal = [c for c in changed if c.split(".")[0] not in self.FREE]
        if fatal:
            raise config.ConfigError(f"{folder}: expected the recipe this run was started with, got changes in "
                                     f"{', '.join(fatal)}; fix: give the run another name, or change these back")
        self.read(folder, state)
        for name, value in state["place"].items():
            setattr(self, name, value)
        log.info("continuing %s at iteration %d", self.run_folder.name, self.iteration)
        event(self.run_folder, "resumed", step=self.iteration, changed=changed)

    def export(self) -> None:
        """Write the improved system to `model/`: averaged weights if there are any, LoRA merged."""
        self.give()
        event(self.run_folder, "finished", step=self.iteration)

    def give(self) -> None:
        self.taught.export(self.run_folder)

    def _ask_to_stop(self) -> None:
        self.stop = True


@contextlib.contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Inside, nothing of it is learnt, though gradients pass through it."""
    moving = [p for p in module.parameters() if p.requires_grad]
    for p in moving:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in moving:
            p.requires_grad_(True)
