"""A system that learns: what of it is trained, by which optimiser, its average, and how it is kept."""
import contextlib
from pathlib import Path

from diptych.alignment.recipe import Course
from diptych.systems.base import System
from diptych.systems.io import save_system, system_tensors
from diptych.training import checkpoint, lora
from diptych.training.ema import Ema
from diptych.training.optim import AdamW
from diptych.training.recipe import Stage
from diptych.training.stages import fixed_names, trained_names


class Taught:
    """`stage` says what is trained, and how fast. A LoRA that the recipe wants is attached already."""

    def __init__(self, system: System, recipe: Course, stage: Stage) -> None:
        self.system, self.recipe = system, recipe
        names = trained_names(system, stage, fixed_names(system))
        for name, parameter in system.named_parameters():
            parameter.requires_grad_(name in names)
        self.optimizer = AdamW(system, names, recipe.optimizer, stage)
        self.ema = Ema(system, names, recipe.ema) if recipe.ema else None

    def average(self, step: int) -> None:
        """After a step."""
        if self.ema is not None:
            self.ema.update(step)

    def tensors(self) -> checkpoint.Tensors:
        """What a checkpoint holds of it."""
        found = {"model": system_tensors(self.system), "optimizer": self.optimizer.tensors()}
        return found | ({"ema": self.ema.shadow} if self.ema is not None else {})

    def export(self, run: Path) -> None:
        """Write it to `model/`: averaged weights if there are any, LoRA merged."""
        with self.ema.swapped() if self.ema is not None else contextlib.nullcontext():
            if self.recipe.lora is not None:
                lora.save(self.system, run / "lora")
                lora.merge(self.system)
            save_system(self.system, run / "model")
