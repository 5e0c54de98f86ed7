"""How zoo ingredients are made: one training loop, recipes in code, a card with the measured figures.

An ingredient is a subclass of `Ingredient`. Training is a pure function of the recipe and the seed: every random draw
of step n comes from a generator seeded by (name, seed, n), so a run resumed from its checkpoint makes the same weights.
"""
import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from diptych import zoo
from diptych.parts.stored import half
from diptych.training.optim import orthogonalize

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Muon for the inner matrices and kernels, AdamW for the rest; linear warmup, cosine decay to zero, and an average
    of the weights, which is what is kept. Both optimisers share the rate: Muon's update is scaled to AdamW's.

    `polish` more steps start from the averaged weights with fresh optimisers and a second cosine from a third of the
    rate; an ingredient may train something else in them.
    """

    steps: int
    polish: int = 0
    batch: int
    learning_rate: float
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 1e-3
    clip: float = 1.0  # gradient norm
    average: float = 0.998
    checkpoint_every: int = 200

    def rate(self, step: int) -> float:
        first = step < self.steps
        step, steps = (step, self.steps) if first else (step - self.steps, self.polish)
        decay = (0.5 + 0.5 * math.cos(math.pi * step / steps)) * (1 if first else 1 / 3)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * decay


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz steps (Jordan et al. 2024; the scale that makes AdamW's
    rates fit is that of arXiv 2502.16982, eq. 4). Kernels are seen as matrices (out, everything else)."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                wanted = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                update = orthogonalize(wanted[None])[0]
                p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


class Ingredient(ABC):
    """What one zoo ingredient is made of. `recipe` holds the defaults; `steps` can be overridden for a quick try."""

    name: ClassVar[str]
    defaults: ClassVar[Recipe]

    def __init__(self, *, seed: int = 0, steps: int | None = None) -> None:
        self.seed = seed
        share = self.defaults.polish / self.defaults.steps
        self.recipe = self.defaults if steps is None else dataclasses.replace(
            self.defaults, steps=steps, polish=math.ceil(steps * share))

    def generator(self, *key: object) -> torch.Generator:
        """A generator seeded by the name, the seed and the key."""
        digest = hashlib.blake2b("|".join(map(str, (self.name, self.seed, *key))).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def prepare(self) -> None:  # noqa: B027 (an ingredient may have nothing to prepare)
        """Make the training data; called once before the first step."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The module with fresh weights (drawn from the global random state, which the loop has seeded)."""

    def matrices(self, model: nn.Module) -> list[str]:
        """Names of the parameters that Muon trains: no embeddings, no first and last layers."""
        return []

    @abstractmethod
    def loss(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Scalar terms of one step; "loss" is minimised, the others are shown."""

    def finish(self, model: nn.Module) -> nn.Module:
        """Last touches after training, such as statistics that go into the config."""
        return model

    def store(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they go into the file."""
        return half(tensors)

    @abstractmethod
    def config(self, model: nn.Module) -> dict[str, Any]:
        """What `restore` needs, as JSON."""

    @staticmethod
    @abstractmethod
    def restore(config: dict[str, Any]) -> nn.Module:
        """The module of a stored config, weights not loaded yet."""

    @abstractmethod
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Quality of the stored weights on held-out data."""

    @abstractmethod
    def card(self, cost: Mapping[str, Any], figures: Mapping[str, float]) -> str:
        """Markdown: what it is, data, cost, measured quality, use."""


def build(name: str, out: Path | str | None = None, steps: int | None = None, seed: int = 0, *,
          resume: bool = True, device: str = "cpu", progress: bool = True) -> Path:
    """Train an ingredient and write weights, config and card into `out` (the package by default).

    Continues from `out/NAME.checkpoint` if there is one of the same recipe and seed. Returns the weight file.
    """
    if name == "tokenizer":  # counted, not trained by gradients
        from diptych.zoo import tokenizer

        return tokenizer.build(out)
    ingredient = zoo.find(name)(seed=seed, steps=steps)
    folder = Path(out or zoo.WEIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}.checkpoint"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    ingredient.prepare()
    model, seconds = train(ingredient, checkpoint, device=device, progress=progress)
    model = ingredient.finish(model.eval().requires_grad_(False))
    tensors = ingredient.store(model.state_dict())
    file = folder / f"{name}.safetensors"
    stored = {"format": zoo.FORMAT, "name": name, "seed": seed, "recipe": dataclasses.asdict(ingredient.recipe),
              "config": ingredient.config(model)}
    write(file, lambda temporary: save_file(tensors, temporary))
    write(file.with_suffix(".json"), lambda temporary: temporary.write_text(json.dumps(stored, indent=1) + "\n"))
    finish(ingredient, folder, seconds)
    checkpoint.unlink(missing_ok=True)
    return file


def finish(ingredient: Ingredient, folder: Path, seconds: float) -> dict[str, float]:
    """Measure the weights as stored and write the card."""
    file = zoo.path(ingredient.name, folder)
    model = zoo.load(ingredient.name, folder)
    cost = {"parameters": sum(p.numel() for p in model.parameters()), "bytes": file.stat().st_size, "seconds": seconds,
            "seed": ingredient.seed, "torch": torch.__version__, **dataclasses.asdict(ingredient.recipe)}
    figures = ingredient.measure(model)
    write(file.with_suffix(".md"), lambda temporary: temporary.write_text(ingredient.card(cost, figures)))
    log.info("%s: %s", ingredient.name, json.dumps({**cost, **figures}))
    return figures


def train(ingredient: Ingredient, checkpoint: Path, *, device: str = "cpu", progress: bool = True
          ) -> tuple[nn.Module, float]:
    """Run the recipe; returns the averaged module and the seconds spent, those before a resume included."""
    recipe = ingredient.recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ingredient.generator("weights").initial_seed())
        model = ingredient.model().to(device)
        average = ingredient.model().to(device)
    average.load_state_dict(model.state_dict())
    optimizers = _optimizers(ingredient, model)
    first, spent = 0, 0.0
    identity = json.dumps([ingredient.name, ingredient.seed, dataclasses.asdict(recipe)])
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["identity"] != identity:
            raise ValueError(f"expected {checkpoint} to be of this recipe and seed, got {state['identity']}; "
                             "fix: delete it or build without resuming")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        first, spent = state["step"], state["seconds"]
    started = time.monotonic()
    total = recipe.steps + recipe.polish
    bar = tqdm(range(first, total), initial=first, total=total, desc=ingredient.name, disable=not progress,
               mininterval=2.0)
    for step in bar:
        if step == recipe.steps:
            model.load_state_dict(average.state_dict())
            optimizers = _optimizers(ingredient, model)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            terms = ingredient.loss(model, step)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        age = step if step < recipe.steps else step - recipe.steps
        share = 1 - min(recipe.average, (1 + age) / (10 + age))  # a young average must forget where it started
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)
        if step % 20 == 0:
            bar.set_postfix({k: f"{v.item():.4g}" for k, v in terms.items()}, refresh=False)
        if (step + 1) % recipe.checkpoint_every == 0:
            state = {"identity": identity, "step": step + 1, "seconds": spent + time.monotonic() - started,
                     "model": model.state_dict(), "average": average.state_dict(),
                     "optimizers": [o.state_dict() for o in optimizers]}
            write(checkpoint, lambda temporary, state=state: torch.save(state, temporary))
    return average, spent + time.monotonic() - started


def _optimizers(ingredient: Ingredient, model: nn.Module) -> list[torch.optim.Optimizer]:
    recipe, inner = ingredient.recipe, set(ingredient.matrices(model))
    outer = [p for name, p in model.named_parameters() if name not in inner]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        outer, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)]
    if inner:
        optimizers.append(Muon([p for name, p in model.named_parameters() if name in inner], recipe.learning_rate))
    return optimizers


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, then move it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
