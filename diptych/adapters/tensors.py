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
from safetensors import SafetensorError, safe_open
from torch import Tensor

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INSIDE = ("model", "state_dict", "module", "ema")  # where a training checkpoint keeps the model
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "weights")  # of the files of a folder's weights
WINDOW = 64 * 2**20  # bytes read before files are opened anew, which gives their mapped pages back
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class SafeFile(Mapping[str, Tensor]):
    """One safetensors file. Tensors are views of the mapped file: copy what is to be kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = self._open()
        self._names = list(self._file.keys())
        self.metadata: dict[str, str] | None = self._file.metadata()

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            with open(self.path, "rb") as file:
                start = file.read(40)
            if start.startswith(b"version https://git-lfs"):
                raise ValueError(f"expected weights in {self.path}, got a pointer of git-lfs; fix: git lfs pull") \
                    from None
            raise ValueError(f"expected a whole safetensors file, got {self.path} ({error}); "
                             "fix: download it again") from None

    def __getitem__(self, name: str) -> Tensor:
        self._file = self._file or self._open()
        return self._file.get_tensor(name)

    def close(self) -> None:
        """Until the next tensor is asked for."""
        self._file = None

    def meta(self, name: str) -> Tensor:
        """A tensor of this shape and type that holds nothing."""
        self._file = self._file or self._open()
        view = self._file.get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise ValueError(f"expected numbers of a known type in {self.path}, got {view.get_dtype()} for {name}")
        return torch.empty(view.get_shape(), dtype=DTYPES[view.get_dtype()], device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class TorchFile(Mapping[str, Tensor]):
    """A file of `torch.save`; only tensors and plain containers are read, anything else is refused. Tensors are views
    of the mapped file, but of the format before zip files, which takes its whole size."""

    metadata = {"format": "pt"}  # of the safetensors file that it would be

    def __init__(self, path: Path) -> None:
        self.path, self._mapped = path, True
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
        self._tensors = self._tensors or self._open()
        return self._tensors[name]

    def close(self) -> None:
        """Until the next tensor is asked for."""
        if self._mapped:
            self._tensors = None

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
        self._homes: dict[str, tuple[SafeFile | TorchFile, str]] = {}
        self._files: list[tuple[str, SafeFile | TorchFile]] = []
        self._read = 0
        for prefix, paths in sources.items():
            for path in paths:
                file = TorchFile(path) if path.suffix in PICKLES else SafeFile(path)
                twice = [n for n in file if prefix + n in self._homes]
                if twice:
                    raise ValueError(f"expected every tensor in one file, got {twice[0]} in {path} and in "
                                     f"{self._homes[prefix + twice[0]][0].path}; fix: remove one of them")
                self._homes |= {prefix + name: (file, name) for name in file}
                self._files.append((prefix, file))

    def __getitem__(self, name: str) -> Tensor:
        if self._read > WINDOW:
            self._read = 0
            for _, file in self._files:
                file.close()
        file, own = self._homes[name]
        value = file[own]
        self._read += value.nbytes
        return value

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
