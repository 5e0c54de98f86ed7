"""A system on disk: a folder with `config.json` (class and config), `model.safetensors` and the system's own files."""
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diptych import config
from diptych.systems.base import System

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_system(system: System, folder: str | Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write a system; `tensors` replaces its own (gathered shards). `config.json` comes last: with it all is there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = system_tensors(system) if tensors is None else tensors
    about = {"system": type(system).__name__, "config": config.to_dict(system.config)}
    temporary = folder / f".{WEIGHTS}"
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary)
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
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        system = cls.from_folder(built, folder)
        load_tensors(system, folder / WEIGHTS)
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
def load_tensors(system: nn.Module, path: Path) -> None:
    """Copy a weights file into a system in place; every name must be there, with its shape, and no other."""
    own = system_tensors(system)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        missing, unknown = sorted(set(own) - names), sorted(names - set(own))
        if missing or unknown:
            raise ValueError(f"expected the tensors of {type(system).__name__} in {path}, got {len(missing)} missing "
                             f"({', '.join(missing[:3])}) and {len(unknown)} unknown ({', '.join(unknown[:3])})")
        for name, target in own.items():
            value = file.get_tensor(name)
            if value.shape != target.shape:
                raise ValueError(f"expected {name} of shape {tuple(target.shape)}, got {tuple(value.shape)}")
            target.copy_(value)
