"""One measured result: a JSON file that says what was measured, with what, where, at what cost."""
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import diptych
from diptych.config import from_dict, to_dict
from diptych.ledger.interval import Metric

ENTRIES = Path(__file__).parent / "entries"

Kind = Literal["quality", "claim", "parity", "speed"]
# E1 mechanism works, E2 claim measured against a control, E3 equals published code, E4 published weights or score
Level = Literal["E1", "E2", "E3", "E4"]
LEVELS: tuple[str, ...] = get_args(Level)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a result was measured. `accelerator` is None on the CPU alone; `bf16` whether the CPU computes in bfloat16
    (a recipe of that precision was computed in float32 if not), None where nothing was computed."""

    cpu: str
    cores: int
    torch: str
    python: str
    accelerator: str | None = None
    bf16: bool | None = None

    @property
    def where(self) -> str:
        """In words."""
        if self.accelerator:
            return f"{self.accelerator}, {self.cores} cores of {self.cpu}"
        return f"{self.cores} cores of {self.cpu}" + (", bfloat16 computed as float32" if self.bf16 is False else "")

    @classmethod
    def here(cls, accelerator: str | None = None) -> "Machine":
        try:
            torch = metadata.version("torch")  # the metadata, because importing torch takes seconds
        except metadata.PackageNotFoundError:
            torch = "absent"
        loaded = sys.modules.get("torch")
        # as `training.precision` decides, which the ledger does not know
        bf16 = None if loaded is None else any(
            there for name, there in loaded.cpu.get_capabilities().items() if name.endswith("bf16"))
        return cls(cpu=_cpu_name(), cores=os.cpu_count() or 1, torch=torch, python=platform.python_version(),
                   accelerator=accelerator, bf16=bf16)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a result took to make; None where it was not counted."""

    flops: float | None = None
    tokens: int | None = None
    documents: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """What was measured, counted exactly. Of its `parameters`, some stage of the training moved the `trained` ones;
    `drawing` and `answering` are those that take part in one picture and in one answer (of experts only the chosen
    ones), None where it cannot do that. `ingredients`: the weights it started from, by submodule. `training`: what the
    training took. `unable`: tasks that it refuses, with its words."""

    parameters: int
    trained: int
    drawing: int | None = None
    answering: int | None = None
    ingredients: dict[str, str] = field(default_factory=dict)
    training: Cost = field(default_factory=Cost)
    unable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Drawings side by side, all of one size: `file` lies beside the entry; drawing i is of `prompts[i]`, drawn with
    seed `seeds[i]`, and `right[i]` if it shows what was asked for."""

    file: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    right: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.seeds) == len(self.right):
            raise ValueError(f"expected a seed and a verdict for each of {len(self.prompts)} prompts, "
                             f"got {len(self.seeds)} and {len(self.right)}")
        if Path(self.file).name != self.file:
            raise ValueError(f"expected the name of a file beside the entry, got {self.file!r}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`recipe` is the resolved recipe (no defaults left implicit), `sampling` how answers and pictures were drawn,
    `verdicts` what became of each claim, by its text."""

    name: str
    kind: Kind
    system: str
    level: Level
    recipe: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    cost: Cost = field(default_factory=Cost)
    metrics: dict[str, Metric] = field(default_factory=dict)
    code: str = field(default_factory=lambda: code_version())  # defined below
    machine: Machine = field(default_factory=Machine.here)
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d"))
    note: str = ""
    verdicts: dict[str, str] = field(default_factory=dict)
    model: Model | None = None
    pictures: Pictures | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", self.name):
            raise ValueError(f"expected a name of lower-case letters, digits, '.', '_', '-', got {self.name!r}")
        for name, value, allowed in (("kind", self.kind, get_args(Kind)), ("level", self.level, LEVELS)):
            if value not in allowed:
                raise ValueError(f"expected {name} to be one of {', '.join(allowed)}, got {value!r}")
        if not self.metrics:
            raise ValueError(f"expected at least one metric in entry {self.name!r}, got none")
        datetime.strptime(self.date, "%Y-%m-%d")
        # Plain JSON from the start, so that a fresh entry equals the one read back.
        for name in ("recipe", "sampling"):
            object.__setattr__(self, name, json.loads(_dumps(to_dict(getattr(self, name)))))

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "ledger entry") -> "Entry":
        return from_dict(cls, data, where)


def write_entry(entry: Entry, folder: str | Path = ENTRIES, *, replace: bool = False) -> Path:
    """Write `folder/NAME.json`; it appears complete or not at all. An existing entry needs `replace`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{entry.name}.json"
    temporary = folder / f".{entry.name}.{os.getpid()}"
    try:
        temporary.write_text(_dumps(entry.to_dict(), indent=1) + "\n", encoding="utf-8")
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # unlike a rename, fails when the name is taken
    except FileExistsError:
        raise ValueError(f"expected a new entry, got the existing {path}; fix: another name, or replace=True") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_entry(path: str | Path) -> Entry:
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON in {path}; {error}") from None
    entry = Entry.from_dict(data, where=str(path))
    if entry.name != path.stem:
        raise ValueError(f"expected {path} to hold the entry {path.stem!r}, got {entry.name!r}")
    return entry


def read_entries(folder: str | Path = ENTRIES) -> list[Entry]:
    """All entries, by name. A folder without any gives an empty list."""
    return [read_entry(path) for path in sorted(Path(folder).glob("*.json"))]


def code_version() -> str:
    """The package version, with the commit when this is a git checkout (`0.1.0+g1a2b3c4`, `.dirty` if changed)."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return diptych.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=.dirty", "--exclude", "*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine
        return diptych.__version__
    return f"{diptych.__version__}+g{found.stdout.strip()}" if found.returncode == 0 else diptych.__version__


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
