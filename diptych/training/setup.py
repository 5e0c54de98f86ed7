"""From a recipe to a system: class and size, changes to its config, initial weights, compilation."""
import dataclasses
import json
import logging
import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diptych import config
from diptych.parts.blocks import compile_elementwise
from diptych.systems.base import System
from diptych.systems.io import initialise, weights_file
from diptych.training.recipe import Recipe
from diptych.training.stages import matches

log = logging.getLogger("diptych.training")

SIZES = ("tiny", "small", "paper")


def system_config(recipe: Recipe) -> tuple[type[System], object]:
    """The system's class and its config: the named size, in it the configs that come with initial weights, and on top
    the recipe's changes."""
    from diptych.systems import table

    cls = table.find(recipe.system)
    if recipe.size not in SIZES:
        raise config.unknown_key(recipe.size, SIZES, "size")
    built = getattr(cls, recipe.size)()
    parts = {name: stated_part(built, name, source) for name, source in recipe.init.items()}
    parts = {name: part for name, part in parts.items() if part is not None}
    return cls, config.merge(built, recipe.config, where=f"config of {recipe.system}", parts=parts)


def stated_part(c: Any, name: str, source: str) -> Any:
    """The part `name` of a config as the source of that submodule's weights states it, None unless both have one: the
    sizes of the weights, and what belongs to them but is no tensor, such as the statistics of a codec's latents. Where
    the place allows several types it may be another one: a codec of another kind."""
    owner, own = None, c
    for key in name.split("."):
        owner, own = own, getattr(own, key, None)
    stated = stated_config(source)
    if stated is None or not dataclasses.is_dataclass(own):
        return None
    where = f"config of {source} for {name}"
    try:
        return config.from_dict(type(own), stated, where)
    except config.ConfigError:
        return config.from_dict(typing.get_type_hints(type(owner))[name.rpartition(".")[2]], stated, where)


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
    for name, source in recipe.init.items():
        log.info("%s: from %s", name, source)
    return system


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
