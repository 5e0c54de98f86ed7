"""From a recipe to a system: class and size, changes to its config, initial weights, compilation."""
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from diptych import config
from diptych.parts.blocks import compile_elementwise
from diptych.systems.base import System
from diptych.training.recipe import Recipe
from diptych.training.stages import matches

log = logging.getLogger("diptych.training")

SIZES = ("tiny", "small", "paper")

T = TypeVar("T")


def system_config(recipe: Recipe) -> tuple[type[System], object]:
    """The system's class and its config: the named size, in it the configs that come with initial weights, and on top
    the recipe's changes."""
    from diptych.systems import table

    cls = table.find(recipe.system)
    if recipe.size not in SIZES:
        raise config.unknown_key(recipe.size, SIZES, "size")
    built = getattr(cls, recipe.size)()
    for name, source in recipe.init.items():
        built = adopt(built, name, source)
    return cls, config.merge(built, recipe.config, where=f"config of {recipe.system}")


def adopt(c: T, name: str, source: str) -> T:
    """The config with its part `name` as the source of that submodule's weights states it, where both have one: the
    sizes of the weights, and what belongs to them but is no tensor, such as the statistics of a codec's latents."""
    own: Any = c
    for key in name.split("."):
        own = getattr(own, key, None)
    stated = stated_config(source)
    if stated is None or not dataclasses.is_dataclass(own):
        return c
    part = config.from_dict(type(own), stated, where=f"config of {source} for {name}")
    return config.merge(c, {name: config.to_dict(part)})


def stated_config(source: str) -> dict[str, Any] | None:
    """The config beside the weights of an `init` source, inside it the part below `#prefix`; None if there is none."""
    folder, _, prefix = source.partition("#")
    path = weights_file(folder)
    beside = path.with_name("config.json") if path.name == "model.safetensors" else path.with_suffix(".json")
    found: Any = json.loads(beside.read_text()) if beside.is_file() else None
    for key in ("config", *(prefix.split(".") if prefix else ())):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def build_system(recipe: Recipe) -> System:
    """The system with its initial weights, the same for the same seed."""
    cls, c = system_config(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        system = cls(c)
    initialise(system, recipe.init)
    return system


def initialise(system: nn.Module, init: Mapping[str, str]) -> None:
    """Load weights into submodules: `{"codec": FOLDER}`, or `FOLDER#prefix` for a part of what the folder holds."""
    for name, source in init.items():
        try:
            module = system.get_submodule(name)
        except AttributeError:
            raise config.unknown_key(name, [n for n, _ in system.named_modules() if n], "init") from None
        folder, _, prefix = source.partition("#")
        load_weights(module, weights_file(folder), prefix, name)


def weights_file(source: str) -> Path:
    """The safetensors file of a folder, of a file, or of `zoo/NAME`."""
    path = Path(source)
    if path.parts[:1] == ("zoo",) and not path.exists():
        path = Path(__file__).parents[1] / "zoo" / "weights" / f"{Path(*path.parts[1:])}.safetensors"
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"expected weights of {source} at {path}, got no such file; "
                                "fix: train or build them first")
    return path


def load_weights(module: nn.Module, path: Path, prefix: str, name: str) -> None:
    tensors = load_file(path)
    if prefix:
        tensors = {k[len(prefix) + 1:]: v for k, v in tensors.items() if k.startswith(prefix + ".")}
    own = module.state_dict()
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    wrong = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if missing or unknown or wrong:
        raise ValueError(f"expected the weights of {name} in {path}, got {_some(missing)} missing, {_some(unknown)} "
                         f"unknown, {_some(wrong)} of another shape; fix: match its config, or give FOLDER#prefix")
    module.load_state_dict(tensors)
    log.info("%s: %d tensors from %s", name, len(own), path)


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])})" if names else "0"


def compile_modules(system: nn.Module, patterns: Sequence[str]) -> None:
    """Compile the forward of the matching modules in place (the outermost ones only); the name "elementwise" stands
    for the memory-bound steps of all blocks."""
    if "elementwise" in patterns:
        compile_elementwise()
        patterns = [p for p in patterns if p != "elementwise"]
    done: list[str] = []
    for name, module in system.named_modules():
        if name and any(name == p or matches(name, [p]) for p in patterns) and not matches(name, done):
            module.compile(dynamic=True)
            done.append(name)
    if patterns and not done:
        raise ValueError(f"expected compile to name modules, got {', '.join(patterns)}")
