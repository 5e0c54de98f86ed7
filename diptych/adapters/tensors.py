"""Published weights on disk, tensor by tensor: safetensors, shards of them with an index, and torch files.

Nothing is read before it is asked for, and no file can run code: torch files are loaded with `weights_only=True`.
"""
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.parts.stored import TensorFile

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INSIDE = ("model", "state_dict", "module", "ema")  # where a training checkpoint keeps the model
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "weights")  # of the files of a folder's weights
WINDOW = 64 * 2**20  # bytes read of torch files before they are opened anew, which gives their mapped pages back


class TorchFile(Mapping[str, Tensor]):
    """A file of `torch.save`; only tensors and plain containers are read, anything else is refused. Every tensor given
    is memory of its own; one of the format before zip files keeps the whole file beside it."""

    metadata = {"format": "pt"}  # of the safetensors file that it would be

    def __init__(self, path: Path) -> None:
        self.path, self._mapped, self._read = path, True, 0
        self._tensors: dict[str, Tensor] | None = self._open()
        self._meta = {name: value.to("meta") for name, value in self._tensors.items()}

    def _open(self) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings():  # what it warns of is said as an error where it matters
                warnings.simplefilter("ignore")
                found = self._load()
        except pickle.UnpicklingError as error:
            reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "class" in line), str(error))
            raise ValueError(f"expected nothing but tensors in {self.path}, got a file that asks for more and was not "
                             f"loaded ({reason.strip()[:200]}); fix: convert it to safetensors where you trust it"
                             ) from None
        except (RuntimeError, EOFError, OSError, KeyError, AttributeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"expected a whole torch file, got {self.path} ({reason}); fix: download it again"
                             ) from None
        return _state_dict(found, self.path)

    def _load(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            self._mapped = False
            return torch.load(self.path, map_location="cpu", weights_only=True)

    def __getitem__(self, name: str) -> Tensor:
        if self._read > WINDOW and self._mapped:
            self._tensors, self._read = None, 0
        self._tensors = self._tensors or self._open()
        value = self._tensors[name]
        self._read += value.nbytes
        return value.clone()

    def meta(self, name: str) -> Tensor:
        return self._meta[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._meta)

    def __len__(self) -> int:
        return len(self._meta)


def _state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(found, Mapping):
        tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
        inside = next((k for k in INSIDE if isinstance(found.get(k), Mapping)), None)
        if tensors:
            return tensors
        if inside:
            return _state_dict(found[inside], path)
    what = type(found).__name__
    if isinstance(found, Mapping):
        what = f"a mapping of {', '.join(map(str, list(found)[:5]))}"
    raise ValueError(f"expected a state dict in {path} (or one below {', '.join(INSIDE)}), got {what}")


class Tensors(Mapping[str, Tensor]):
    """Several files as one state dict; {prefix: files}: names of those files get the prefix."""

    def __init__(self, sources: Mapping[str, Sequence[Path]]) -> None:
        self._homes: dict[str, tuple[TensorFile | TorchFile, str]] = {}
        self._files: list[tuple[str, TensorFile | TorchFile]] = []
        for prefix, paths in sources.items():
            for path in paths:
                file = TorchFile(path) if path.suffix in PICKLES else TensorFile(path)
                twice = [n for n in file if prefix + n in self._homes]
                if twice:
                    raise ValueError(f"expected every tensor in one file, got {twice[0]} in {path} and in "
                                     f"{self._homes[prefix + twice[0]][0].path}; fix: remove one of them")
                self._homes |= {prefix + name: (file, name) for name in file}
                self._files.append((prefix, file))

    def __getitem__(self, name: str) -> Tensor:
        file, own = self._homes[name]
        return file[own]

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def files(self) -> dict[Path, tuple[str, list[str], dict[str, str] | None]]:
        """Every file with the prefix that its names got here, its names, and what it says of itself."""
        return {file.path: (prefix, list(file), file.metadata) for prefix, file in self._files}

    def meta(self) -> dict[str, Tensor]:
        """Every tensor without its numbers."""
        return {name: file.meta(own) for name, (file, own) in self._homes.items()}


def weights_in(folder: Path, stems: Sequence[str] = STEMS) -> list[Path]:
    """The files that hold the weights of a folder: STEM.safetensors, its shards as the index names them, or the same
    as torch files; empty if there are none."""
    for stem in stems:
        for ending in (".safetensors", ".bin"):
            if (whole := folder / f"{stem}{ending}").is_file():
                return [whole]
            if (index := folder / f"{stem}{ending}.index.json").is_file():
                return _shards(index)
    return []


def need_weights(folder: Path, stems: Sequence[str] = STEMS) -> list[Path]:
    """As `weights_in`; an error if there are none."""
    found = weights_in(folder, stems)
    if not found:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"expected weights ({', '.join(stems)}, .safetensors or .bin, whole or in shards with "
                                f"an index) in {folder}, got {there}; fix: download them")
    return found


def _shards(index: Path) -> list[Path]:
    homes = read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise ValueError(f"expected a weight_map in {index}, got none; fix: download it again")
    names = sorted(set(map(str, homes.values())))
    foreign = [n for n in names if Path(n).name != n]
    if foreign:
        raise ValueError(f"expected shards beside {index}, got {foreign[0]!r}; fix: do not use this folder")
    lacking = [n for n in names if not (index.parent / n).is_file()]
    if lacking:
        raise FileNotFoundError(f"expected {len(names)} shards of {index}, got {len(lacking)} missing "
                                f"({', '.join(lacking[:3])}); fix: download them")
    return [index.parent / n for n in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a published folder."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"expected JSON in {path}, got something else ({error}); fix: download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(found).__name__}")
    return found
