"""A system on disk: a folder with `config.json` (class and config), `model.safetensors` and the system's own files.

Submodules that are frozen ingredients need not be stored again: `config.json` then names where their weights are.
"""
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diptych import config
from diptych.parts.resources import SHIPPED
from diptych.parts.stored import Weights, read
from diptych.systems.base import System

CONFIG, WEIGHTS = "config.json", "model.safetensors"

log = logging.getLogger("diptych.systems")


def save_system(system: System, folder: str | Path, tensors: dict[str, Tensor] | None = None, *,
                ingredients: Mapping[str, str] | None = None) -> None:
    """Write a system; `tensors` replaces its own (gathered shards). `config.json` comes last: with it all is there.

    `ingredients` ({"codec": "zoo/codec"}) are submodules that are loaded from their source instead of being stored.
    """
    folder, ingredients = Path(folder), dict(ingredients or {})
    folder.mkdir(parents=True, exist_ok=True)
    tensors = system_tensors(system) if tensors is None else tensors
    about = {"system": type(system).__name__, "config": config.to_dict(system.config)}
    about |= {"ingredients": ingredients} if ingredients else {}
    temporary = folder / f".{WEIGHTS}"
    kept = {n: t for n, t in tensors.items() if not _inside(n, ingredients)}
    save_file({n: t.detach().cpu().contiguous() for n, t in kept.items()}, temporary)
    temporary.chmod(0o644)  # safetensors makes files that only their owner may read
    temporary.replace(folder / WEIGHTS)
    system.save_files(folder)
    temporary = folder / f".{CONFIG}"
    temporary.write_text(json.dumps(about, indent=1))
    temporary.replace(folder / CONFIG)


def load_system(folder: str | Path, *, cls: type[System] | None = None, device: str | torch.device = "cpu") -> System:
    """Read a system; `cls` is needed only for classes that are not in the table of systems."""
    folder = Path(folder)
    cls, built = read_config(folder, cls)
    ingredients = json.loads((folder / CONFIG).read_text()).get("ingredients", {})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        system = cls.from_folder(built, folder)
        initialise(system, ingredients)
        load_tensors(system, folder / WEIGHTS, besides=ingredients)
    return system.to(device)


def read_config(folder: Path, cls: type[System] | None = None) -> tuple[type[System], Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"expected a saved system with {CONFIG} in {folder}, got none")
    about = json.loads(path.read_text())
    if cls is None:
        from diptych.systems import table

        cls = table.find_class(about["system"])
    if cls.__name__ != about["system"]:
        raise ValueError(f"expected a saved {cls.__name__} in {folder}, got {about['system']}")
    return cls, config.from_dict(cls.Config, about["config"], where=str(path))


def system_tensors(system: nn.Module) -> dict[str, Tensor]:
    """Parameters (shared ones once) and saved buffers, by name; the tensors themselves."""
    tensors: dict[str, Tensor] = {n: p.detach() for n, p in system.named_parameters()}
    aliases = {n for n, _ in system.named_parameters(remove_duplicate=False)}
    return tensors | {n: b for n, b in system.state_dict().items() if n not in aliases and isinstance(b, Tensor)}


@torch.no_grad()
def load_tensors(system: nn.Module, path: Path, *, besides: Mapping[str, str] | None = None) -> None:
    """Copy a weights file into a system in place; every name must be there, with its shape, and no other. `besides`
    names submodules that are not in the file."""
    own = {n: t for n, t in system_tensors(system).items() if not _inside(n, besides or {})}
    file = Weights(path)
    missing, unknown = sorted(set(own) - set(file.names)), sorted(set(file.names) - set(own))
    if missing or unknown:
        raise ValueError(f"expected the tensors of {type(system).__name__} in {path}, got {len(missing)} missing "
                         f"({', '.join(missing[:3])}) and {len(unknown)} unknown ({', '.join(unknown[:3])})")
    for name, target in own.items():
        value = file.get(name)
        if value.shape != target.shape:
            raise ValueError(f"expected {name} of shape {tuple(target.shape)}, got {tuple(value.shape)}")
        target.copy_(value)


def _inside(name: str, modules: Mapping[str, str]) -> bool:
    return name.startswith(tuple(f"{m}." for m in modules))


# -- ingredients ------------------------------------------------------------------------------------------------------

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
    if path.parts[:1] == ("zoo",):
        shipped = SHIPPED / Path(*path.parts[1:])
        path = shipped if shipped.is_dir() else shipped.with_suffix(".safetensors")
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"expected weights of {source} at {path}, got no such file; "
                                "fix: train or build them first")
    return path


def load_weights(module: nn.Module, path: Path, prefix: str, name: str) -> None:
    tensors = read(path, prefix)
    own = module.state_dict()
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    wrong = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if missing or unknown or wrong:
        raise ValueError(f"expected the weights of {name} in {path}, got {_some(missing)} missing, {_some(unknown)} "
                         f"unknown, {_some(wrong)} of another shape; fix: match its config, or give FOLDER#prefix")
    module.load_state_dict(tensors)
    log.debug("%s: %d tensors from %s", name, len(own), path)


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])})" if names else "0"
