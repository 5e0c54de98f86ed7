"""A system on disk: a folder with `config.json` (class and config), `model.safetensors` and the system's own files.

Submodules that are frozen ingredients need not be stored again: `config.json` then names where their weights are.
"""
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

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


def load_system(folder: str | Path, *, cls: type[System] | None = None, device: str | torch.device = "cpu",
                dtype: torch.dtype | None = torch.float32) -> System:
    """Read a system with weights in `dtype` or, None, as they are stored. `cls` is needed only for classes that are not
    in the table of systems. Takes the memory of the weights once."""
    folder = Path(folder)
    cls, built = read_config(folder, cls)
    ingredients = json.loads((folder / CONFIG).read_text()).get("ingredients", {})
    with torch.random.fork_rng(devices=[]), without_weights():
        system = cls.from_folder(built, folder)
    for name, source in ingredients.items():
        tensors = matching(system.get_submodule(name), *_source(name, source))
        fill(system, ((f"{name}.{key}", value) for key, value in tensors.items()), dtype)
    fill(system, _stored(system, folder / WEIGHTS, ingredients), dtype)
    return system.to(device)


def read_config(folder: Path, cls: type[System] | None = None) -> tuple[type[System], Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"expected a saved system with {CONFIG} in {folder}, got none; fix: name its `model` "
                                "folder, or use diptych.open_model, which also knows names and published folders")
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


def fingerprint(system: System) -> str:
    """sha256 over the config and every weight with its name, kind and shape, wherever they were read from."""
    digest = hashlib.sha256(json.dumps(config.to_dict(system.config), sort_keys=True, default=str).encode())
    for name, tensor in sorted(system_tensors(system).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def load_tensors(system: nn.Module, path: Path, *, besides: Mapping[str, str] | None = None) -> None:
    """Copy a weights file into a system in place; every name must be there, with its shape, and no other. `besides`
    names submodules that are not in the file."""
    own = system_tensors(system)
    for name, value in _stored(system, path, besides or {}):
        if value.shape != own[name].shape:
            raise ValueError(f"expected {name} of shape {tuple(own[name].shape)}, got {tuple(value.shape)}")
        own[name].copy_(value)


def _stored(system: nn.Module, path: Path, besides: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file one by one; an error first if they are not those of the system."""
    own = {n for n in system_tensors(system) if not _inside(n, besides)}
    file = Weights(path)
    missing, unknown = sorted(own - set(file.names)), sorted(set(file.names) - own)
    if missing or unknown:
        raise ValueError(f"expected the tensors of {type(system).__name__} in {path}, got {len(missing)} missing "
                         f"({', '.join(missing[:3])}) and {len(unknown)} unknown ({', '.join(unknown[:3])})")
    return ((name, file.get(name)) for name in file.names)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules built inside have parameters on the meta device, which take no memory, and their usual buffers; `fill`
    gives them weights."""
    register = nn.Module.register_parameter

    def bare(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:  # a shared one has been here before, and stays the same object
            with torch.device("meta"):
                module._parameters[name] = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)

    with mock.patch.object(nn.Module, "register_parameter", bare):
        yield


@torch.no_grad()
def fill(system: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> None:
    """Give a module built `without_weights` its parameters and buffers, floating ones in `dtype` or, None, all as they
    come. Tensors that fill their memory are taken as they are, views are copied. Shapes must fit."""
    owners: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in system.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                owners.setdefault(id(tensor), []).append((place, name))
    old: dict[str, Tensor] = dict(system.named_parameters(remove_duplicate=False)) | dict(system.named_buffers())
    for name, value in tensors:
        if old[name].shape != value.shape:
            raise ValueError(f"expected {name} of shape {tuple(old[name].shape)}, got {tuple(value.shape)}")
        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
        fills = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        own = value if fills and value.dtype == kind else torch.empty(value.shape, dtype=kind).copy_(value)
        if isinstance(old[name], nn.Parameter):
            own = nn.Parameter(own, old[name].requires_grad)
        for place, key in owners[id(old[name])]:
            place[key] = own
        del value  # before the next is read


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
        module.load_state_dict(matching(module, *_source(name, source)))
        log.debug("%s: from %s", name, source)


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


def _source(name: str, source: str) -> tuple[Path, str, str]:
    folder, _, prefix = source.partition("#")
    return weights_file(folder), prefix, name


def matching(module: nn.Module, path: Path, prefix: str, name: str) -> dict[str, Tensor]:
    """The tensors below `prefix` in a file; an error if they are not those of the module called `name`."""
    tensors, own = read(path, prefix), module.state_dict()
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    wrong = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if missing or unknown or wrong:
        raise ValueError(f"expected the weights of {name} in {path}, got {_some(missing)} missing, {_some(unknown)} "
                         f"unknown, {_some(wrong)} of another shape; fix: match its config, or give FOLDER#prefix")
    return tensors


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])})" if names else "0"
