"""Published checkpoints as systems: which family and layout a folder is, and how it is read and written.

Each family's module has `LAYOUTS`: name -> `Layout`. A layout reads a folder into a `Checkpoint` (config, tensors not
yet read, rules) and states a system of ours as `Written`. Everything else is done here, the same for all.
"""
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.adapters.keys import Report, Rule, converted
from diptych.adapters.tensors import Tensors, read_json
from diptych.config import unknown, unknown_key
from diptych.parts.resources import bundled_models, is_saved
from diptych.systems.base import System
from diptych.systems.io import fill, load_system, system_tensors, without_weights

FAMILIES = {
    "bagel": "diptych.adapters.bagel",
    "blip3-o": "diptych.adapters.blip3_o",
    "emu3": "diptych.adapters.emu3",
    "harmon": "diptych.adapters.harmon",
    "janus": "diptych.adapters.janus",
    "mmada": "diptych.adapters.mmada",
    "show-o": "diptych.adapters.show_o",
    "unipic2": "diptych.adapters.unipic2",
    "vargpt": "diptych.adapters.vargpt",
}
SMALL = (".json", ".txt", ".jinja", ".tiktoken", ".model")  # endings of files that are no weights
KINDS = ("missing", "unexpected", "reshaped")  # of tensors without a home
# what is downloaded of a repository
PATTERNS = [f"*.{ending}" for ending in ("json", "safetensors", "bin", "pth", "pt", "ckpt", "txt", "tiktoken", "model")]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A published folder before its tensors are read. `ignore`: prefixes of theirs that hold nothing the system uses.
    `configs`: their other files, by the name they have in the folder, which an export writes back as they are.
    `apart`: folders of parts by the place that an export gives them inside. `own`: the folder with the tokenizer of
    texts, where it is another."""

    cls: type[System]
    config: Any
    tensors: Tensors
    rules: Sequence[Rule]
    ignore: tuple[str, ...] = ()
    configs: Mapping[str, Path] = field(default_factory=dict)
    apart: Mapping[str, Path] = field(default_factory=dict)
    own: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Written:
    """A system of ours in a published layout: JSON files by name, rules, weights files with the prefix of their tensors
    (the longest that fits counts; the file holds names without it), and tensors that follow from the config. `own`:
    the folder inside for the tokenizer of texts."""

    configs: Mapping[str, Mapping[str, Any]]
    rules: Sequence[Rule]
    files: Mapping[str, str]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    own: str = ""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`about`: the files that make a folder one of this layout. `parts`: what is published apart and has to be named
    (name -> what it is). `write` raises ValueError for a config that the layout cannot state."""

    about: str
    finds: Callable[[Path], bool]
    read: Callable[[Path, Mapping[str, Path]], Checkpoint]
    write: Callable[[Any], Written]  # of a system
    parts: Mapping[str, str] = field(default_factory=dict)


# -- finding ----------------------------------------------------------------------------------------------------------

def layouts(system: str) -> dict[str, Layout]:
    """The layouts of a family by name."""
    if system not in FAMILIES:
        raise unknown_key(system, FAMILIES, "systems with published checkpoints")
    return importlib.import_module(FAMILIES[system]).LAYOUTS


def recognise(folder: Path) -> list[tuple[str, str]]:
    """(system, layout) of every layout that a folder may be."""
    return [(system, name) for system in FAMILIES for name, layout in layouts(system).items() if layout.finds(folder)]


def find_layout(folder: Path, system: str | None = None, layout: str | None = None) -> tuple[str, str]:
    """What a folder is, as far as it has not been said."""
    if not folder.is_dir():
        raise FileNotFoundError(f"expected the folder of a checkpoint, got no folder {folder}")
    if system is not None and layout is not None:
        known = layouts(system)
        if layout not in known:
            raise unknown_key(layout, known, f"layouts of {system}")
        return system, layout
    if system is not None:
        layouts(system)  # an error if there is none
    found = [(s, n) for s, n in recognise(folder) if system in (None, s) and layout in (None, n)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{s} ({n})" for s, n in found)
        raise ValueError(f"expected one published layout in {folder}, got files that fit {names}; fix: say which")
    wanted = [system] if system else list(FAMILIES)
    about = "; ".join(f"{s} ({n}): {x.about}" for s in wanted for n, x in layouts(s).items())
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"expected a published checkpoint in {folder}, got {there}; fix: one of {about}")


def read(folder: Path, system: str, layout: str, parts: Mapping[str, Path] | None = None) -> Checkpoint:
    """The checkpoint of a folder of this layout."""
    known, parts = layouts(system)[layout], dict(parts or {})
    foreign = sorted(set(parts) - set(known.parts))
    if foreign:
        raise unknown_key(foreign[0], known.parts, f"parts of {system} ({layout})")
    return known.read(folder, parts)


def need(folder: Path, parts: Mapping[str, Path], name: str, what: str, place: str = "") -> Path:
    """The folder of a part that is published apart: the one that was named, or `place` inside (its name, unless told).
    """
    inside = folder / (place or name)
    if name not in parts and not inside.is_dir():
        raise ValueError(f"expected the folder of {what}, which is published apart, as part {name!r} or as {inside}, "
                         f"got none; fix: diptych import ... --part {name}=FOLDER")
    return parts.get(name, inside)


def has_type(kind: str, folder: Path) -> bool:
    """Whether the folder's `config.json` names this model_type."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") == kind


def others(folder: Path, apart: Mapping[str, Path] | None = None) -> dict[str, Path]:
    """The small files of a folder beside its weights: configs, templates, tokenizers, indices of shards; and those of
    parts below their place."""
    found = {f"{place}/{name}": path for place, home in (apart or {}).items() for name, path in others(home).items()}
    return found | {p.name: p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in SMALL
                    and not p.name.endswith(".bin.index.json")}


# -- reading ----------------------------------------------------------------------------------------------------------

def check(checkpoint: Checkpoint) -> Report:
    """What would find no home, told from names and shapes alone: nothing is read, nothing built."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in system_tensors(checkpoint.cls(checkpoint.config)).items()}
    report = Report()
    for _ in converted(checkpoint.tensors.meta(), checkpoint.rules, shapes, report, checkpoint.ignore):
        pass
    return report


def build(checkpoint: Checkpoint, folder: Path, *, allow: Sequence[str] = (), dtype: torch.dtype | None = None
          ) -> tuple[System, Report]:
    """The system of a checkpoint with its weights, in `dtype` or, None, as they are stored, and what was allowed to
    find no home. A tensor of ours that is missing keeps its first value. Needs the memory of the weights once."""
    report, own = check(checkpoint), checkpoint.own or folder
    wrong = report.without(allow)
    if wrong:
        raise ValueError(f"expected the published layout of {checkpoint.cls.__name__} in {folder}, got {wrong}; fix: "
                         "check that the download is whole and of this family")
    if report.missing or report.reshaped:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            system = checkpoint.cls.from_folder(checkpoint.config, own)
    else:
        with without_weights():
            system = checkpoint.cls.from_folder(checkpoint.config, own)
    shapes = {k: v.shape for k, v in system_tensors(system).items()}
    fill(system, converted(checkpoint.tensors, checkpoint.rules, shapes, Report(), checkpoint.ignore), dtype)
    return system.eval(), report


def load(folder: str | Path, *, system: str | None = None, layout: str | None = None,
         parts: Mapping[str, str | Path] | None = None, allow: Sequence[str] = (),
         dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu") -> System:
    """A published folder (or the name of one on the hub) as a system. Any tensor that finds no home is an error unless
    its kind is in `allow` (missing, unexpected, reshaped)."""
    folder = locate(folder)
    system, layout = find_layout(folder, system, layout)
    found = read(folder, system, layout, {k: locate(v) for k, v in (parts or {}).items()})
    return build(found, folder, allow=allow, dtype=dtype)[0].to(device)


def open_model(source: str | Path, *, dtype: torch.dtype | None = torch.float32,
               device: str | torch.device = "cpu") -> System:
    """A model to use, as every command's `--model`: a bundled name, a folder of ours, a published one or its name
    on the hub. `dtype` None: as stored."""
    folder = find_model(str(source))
    if is_saved(folder):
        return load_system(folder, device=device, dtype=dtype).eval()
    return load(folder, device=device, dtype=dtype)


def find_model(name: str) -> Path:
    """Folder of a model: one of ours, a finished run's, a published checkpoint's (also one of the hub), or that of a
    bundled name."""
    folder = Path(name)
    for place in (folder, folder / "model"):
        if is_saved(place):
            return place
    bundled = bundled_models()
    if name in bundled:
        return bundled[name]
    hub = name.count("/") == 1 and not folder.parent.exists()  # in a folder that is here, a name is a path
    if folder.is_dir() or hub:
        found = locate(name)
        if found.is_dir() and recognise(found):
            return found
    if folder.is_dir():
        raise ValueError(f"expected a model (config.json, model.safetensors) in {name}, got a folder without one; "
                         "fix: finish the run, or name its `model` folder")
    raise unknown("a bundled model or a model folder", name, bundled)


def locate(source: str | Path) -> Path:
    """A folder, or a hub name (OWNER/NAME), whose files are downloaded once."""
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"expected a folder, or the name of a repository on the hub, got {str(source)!r} "
                         f"({str(error).splitlines()[0]}); fix: check the name and the connection") from None
