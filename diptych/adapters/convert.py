"""Published folders to folders of ours and back.

An imported folder is a saved system with `published/` beside it: what an export needs to give the published folder back
bit for bit. `published/origin.json` names system, layout, weights files and rules; `published/rest.safetensors` holds
published tensors that the system does not use, and `published/files/` the other files as they were. Torch files come
back as safetensors.
"""
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diptych.adapters import published
from diptych.adapters.keys import Report, Rule, to_theirs
from diptych.adapters.published import Checkpoint, Written
from diptych.adapters.tensors import read_json
from diptych.config import unknown_key
from diptych.parts.resources import is_saved
from diptych.parts.stored import Weights
from diptych.systems.base import System
from diptych.systems.io import WEIGHTS, load_system, save_system, system_tensors
from diptych.systems.table import name_of

PUBLISHED, ORIGIN, REST, FILES = "published", "origin.json", "rest.safetensors", "files"
METADATA = {"format": "pt"}  # without it, earlier versions of transformers refuse a file
SHARD = 5 * 10**9  # bytes per weights file of an export


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import did: the family and layout it recognised, tensors and parameters placed, published tensors that
    the system does not use, and what was allowed to find no home."""

    system: str
    layout: str
    tensors: int
    parameters: int
    unused: list[str]
    report: Report


# -- importing --------------------------------------------------------------------------------------------------------

def import_folder(source: str | Path, folder: str | Path, *, system: str | None = None, layout: str | None = None,
                  parts: Mapping[str, str | Path] | None = None, allow: Sequence[str] = (),
                  dtype: torch.dtype | None = None) -> Imported:
    """Write a published checkpoint as a system of ours, in `dtype` or as it is stored. The folder must be new; it
    appears when all is written."""
    source, folder = published.locate(source), _new(folder)
    system, layout = published.find_layout(source, system, layout)
    checkpoint = published.read(source, system, layout, {k: published.locate(v) for k, v in (parts or {}).items()})
    model, report = published.build(checkpoint, source, allow=allow, dtype=dtype)
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_system(model, temporary)
        unused = _keep(checkpoint, report, source, temporary / PUBLISHED, {"system": system, "layout": layout})
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rmdir()
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Imported(system=system, layout=layout, tensors=len(system_tensors(model)),
                    parameters=model.num_parameters(), unused=unused, report=report)


def _keep(checkpoint: Checkpoint, report: Report, source: Path, folder: Path, about: dict[str, Any]) -> list[str]:
    """Write what an export needs; the names of the tensors that the system does not use."""
    folder.mkdir()
    lost, theirs = {line.split(":")[0] for line in report.reshaped}, set(checkpoint.tensors)
    placed = [rule for rule in checkpoint.rules if rule.ours not in lost and theirs.issuperset(rule.theirs)]
    rest = sorted(theirs - {t for rule in placed if rule.row is None for t in rule.theirs})
    if rest:
        _save({n: checkpoint.tensors[n] for n in rest}, folder / REST)
    for name, path in checkpoint.configs.items():
        (folder / FILES / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / FILES / name)
    files = {_name(path, source, checkpoint.apart): named for path, named in checkpoint.tensors.files().items()}
    _save_text(json.dumps(about | {"files": files, "rules": [_plain(rule) for rule in placed]}), folder / ORIGIN)
    used = {t for rule in placed for t in rule.theirs}
    return [name for name in rest if name not in used]


def _name(path: Path, source: Path, apart: Mapping[str, Path]) -> str:
    """Of a weights file in an export: its place in the published folder, or in that of a part."""
    place = next((Path(place, path.relative_to(home)) for place, home in apart.items() if path.is_relative_to(home)),
                 None)
    return (place or path.relative_to(source)).with_suffix(".safetensors").as_posix()


def _plain(rule: Rule) -> dict[str, Any]:
    """What differs from a rule's defaults."""
    stated, plain = asdict(rule), {f.name: f.default for f in fields(rule)}
    return {k: v for k, v in stated.items() if v != plain[k]}


def _rule(stated: Mapping[str, Any]) -> Rule:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stated.items()}
    return Rule(**values)


def _new(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"expected a new folder, got {folder}, which is there; fix: name another or remove it")
    return folder


# -- exporting --------------------------------------------------------------------------------------------------------

def export_folder(source: str | Path, folder: str | Path, *, layout: str | None = None) -> tuple[str, str]:
    """Write a folder of ours in a published layout: the one it was imported from, bit for bit, or that of its family
    (the first, unless told). A published folder is read and written in another layout. The folder must be new. Returns
    (system, layout)."""
    source, folder = Path(source), _new(folder)
    if not is_saved(source):
        return export(published.load(source, dtype=None), folder, layout=layout)
    origin = source / PUBLISHED / ORIGIN
    if origin.is_file() and layout in (None, read_json(origin)["layout"]):
        about = read_json(origin)
        _give_back(source, folder, about)
        return about["system"], about["layout"]
    return export(load_system(source, dtype=None), folder, layout=layout)


def export(model: System, folder: str | Path, *, layout: str | None = None) -> tuple[str, str]:
    """Write a system in a published layout of its family (the first, unless told)."""
    name = name_of(type(model))
    known = published.layouts(name)
    layout = next(iter(known)) if layout is None else layout
    if layout not in known:
        raise unknown_key(layout, known, f"layouts of {name}")
    written = known[layout].write(model)
    tensors = to_theirs(system_tensors(model), written.rules) | dict(written.tensors)
    _write(tensors, Path(folder), written)
    model.save_files(Path(folder, written.own))
    return name, layout


def _write(tensors: Mapping[str, Tensor], folder: Path, written: Written) -> None:
    homes: dict[str, dict[str, Tensor]] = {name: {} for name in written.files}
    prefixes = sorted(written.files.items(), key=lambda item: -len(item[1]))
    for name, value in tensors.items():
        file, prefix = next((f, p) for f, p in prefixes if name.startswith(p))
        homes[file][name.removeprefix(prefix)] = value
    for name in (*homes, *written.configs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for file, own in homes.items():
        _save_shards(own, folder / file)
    for name, values in written.configs.items():  # last: with them all is there
        _save_text(json.dumps(values, indent=1), folder / name)


def _give_back(source: Path, folder: Path, about: Mapping[str, Any]) -> None:
    """An imported folder as it was published."""
    weights, rest = Weights(source / WEIGHTS), source / PUBLISHED / REST
    rules = [_rule(r) for r in about["rules"]]
    theirs = to_theirs({n: weights.get(n) for n in weights.names}, rules)
    if rest.is_file():
        kept = Weights(rest)
        rows = {rule.theirs[0]: rule.row for rule in rules if rule.row is not None}
        for name in kept.names:
            value = kept.get(name)
            if name in rows:
                value[rows[name]] = theirs[name][rows[name]]
            theirs[name] = value
    for file, (prefix, names, metadata) in about["files"].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        _save({name: theirs[prefix + name] for name in names}, folder / file, metadata)
    _index(folder, about["files"])
    for path in sorted(p for p in (source / PUBLISHED / FILES).rglob("*") if p.is_file()):
        home = folder / path.relative_to(source / PUBLISHED / FILES)
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, home)


def _index(folder: Path, files: Mapping[str, tuple[str, list[str], Any]]) -> None:
    """The index of shards that were torch files and had another; that of safetensors comes with the other files."""
    shards: dict[Path, dict[str, str]] = {}
    for file, (_, names, _) in files.items():
        if found := re.fullmatch(r"(.+)-\d+-of-\d+", Path(file).stem):
            stem = found[1].replace("pytorch_model", "model")
            index = folder / Path(file).with_name(f"{stem}.safetensors.index.json")
            shards.setdefault(index, {}).update(dict.fromkeys(names, Path(file).name))
    for index, homes in shards.items():
        _save_text(json.dumps({"metadata": {}, "weight_map": homes}, indent=1), index)


def _save_shards(tensors: Mapping[str, Tensor], path: Path) -> None:
    """In one file, or in several with an index, as the hub's libraries read them."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if size and size + value.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    if len(shards) == 1:
        return _save(shards[0], path)
    names = [f"{path.stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _save(shard, path.with_name(name))
    total = sum(v.nbytes for v in tensors.values())
    homes = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    _save_text(json.dumps({"metadata": {"total_size": total}, "weight_map": homes}, indent=1),
               path.with_name(f"{path.name}.index.json"))


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = METADATA) -> None:
    temporary = path.with_name(f".{path.name}")
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, metadata=metadata)
    temporary.chmod(0o644)  # safetensors makes files that only their owner may read
    temporary.replace(path)


def _save_text(text: str, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)
