"""What several verbs share: finding models, recipes and pictures, and plain tables."""
import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diptych
from diptych.config import unknown

if TYPE_CHECKING:
    from diptych.data.journal import Journal
    from diptych.document import Image
    from diptych.systems.base import Event, Sampling, System

PACKAGE = Path(diptych.__file__).parent
DEFAULT_MODEL = "mini"
# Read by torch when it starts. Large pages for large tensors; and of the kernels that oneDNN makes for every new shape,
# as many as a few steps need: it would keep a thousand, some 300 MiB when the number of tokens always changes.
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}


# -- models -----------------------------------------------------------------------------------------------------------

def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME|FOLDER",
                       help="a bundled model, the folder of a trained one, or a published checkpoint, by its folder or "
                            "its name on the hub (default: %(default)s)")
    add_dtype(group)
    add_device(group)
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same result (default: %(default)s)")


def add_dtype(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8", "stored"), default="float32",
                        help="precision of the weights; int8: bfloat16, and copies in 8 bits to decode token by token "
                        "on a CPU; stored: that of the file (default: %(default)s)")


def add_device(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--threads", type=positive, metavar="N", help="compute threads (default: all cores)")


def load_model(args: argparse.Namespace) -> "System":
    """The model of `--model` on `--device`, ready to generate."""
    folder = find_model(args.model)  # before torch is imported: a wrong name should be told at once
    device = set_up_device(args)
    import torch

    from diptych.adapters.published import open_model

    dtype = {"stored": None, "int8": torch.bfloat16}.get(args.dtype, getattr(torch, args.dtype, None))
    system = open_model(folder, device=device, dtype=dtype)
    if args.dtype == "int8":
        decode_in_int8(system, args.model)
    return system


def decode_in_int8(system: "System", name: str) -> None:
    from diptych.systems.decoding import Decoding
    from diptych.systems.packed import Packed

    if isinstance(system, Packed):
        system.int8 = True
    if not isinstance(system, Packed) or Decoding.of(system) is None:
        raise ValueError(f"expected a model that decodes token by token in compiled code on a CPU, got {name} on "
                         f"{system.device} ({type(system).__name__}); fix: --dtype bfloat16")


def set_up_device(args: argparse.Namespace) -> Any:
    """The `torch.device` of `--device`; sets `--threads`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else
                            "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected a device of this machine, got {args.device!r} ({reason}); "
                         "fix: `diptych doctor` lists them") from None
    return device


def find_model(name: str) -> Path:
    """The folder of a model (`adapters.published.find_model`)."""
    from diptych.adapters import published

    return published.find_model(name)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (default: what the model was made for)")
    group.add_argument("--steps", type=positive, metavar="N", help="network evaluations per picture")
    group.add_argument("--guidance", type=float, metavar="SCALE", help="how strongly the words guide; 1 = not at all")


def sampling_of(system: "System", args: argparse.Namespace, **changes: Any) -> "Sampling":
    """The model's own way of sampling with what the user changed."""
    return changed_sampling(system, args.steps, args.guidance, **changes)


def changed_sampling(system: "System", steps: int | None, guidance: float | None, **changes: Any) -> "Sampling":
    """The model's own way of sampling with these evaluations per picture, this scale of the words and these fields."""
    import dataclasses

    from diptych.objectives.guidance import Branch

    sampling = system.default_sampling()
    if steps is not None:
        changes["evaluations"] = steps
    if guidance is not None:
        chain = {b.context: b for b in sampling.guidance.branches}
        words = chain.get("no_text", Branch(context="no_text", scale=1))
        chain["no_text"] = dataclasses.replace(words, scale=guidance)
        changes["guidance"] = dataclasses.replace(sampling.guidance, branches=tuple(chain.values()))
    return dataclasses.replace(sampling, **changes)


def stream_text(index: int, event: "Event") -> None:
    """Prints text as the model says it; pass as `emit`."""
    if event.kind == "text":
        print(event.value, end="", flush=True)


# -- recipes ----------------------------------------------------------------------------------------------------------

def recipes(kind: str = "") -> dict[str, Path]:
    """Recipes of the installed package, or of the checkout: of trainings, or of another kind by its folder."""
    inside = PACKAGE / "recipes"
    folder = inside if inside.is_dir() else PACKAGE.parent / "recipes"
    return {path.stem: path for path in sorted((folder / kind).glob("*.yaml"))}


def find_recipe(name: str, kind: str = "") -> Path:
    """A YAML file, or the name of a recipe of that kind that comes with Diptych."""
    path = Path(name)
    if path.is_file():
        return path
    known = recipes(kind)
    if path.stem in known and path.parent.name in ("", kind or "recipes"):
        return known[path.stem]
    raise unknown("a recipe file or the name of a recipe", name, known)


def run_folder(args: argparse.Namespace, recipe: Path) -> Path:
    """Where a run goes: `--run`, or runs/RECIPE. One that has been started is an error without `--resume`."""
    folder = args.run or Path("runs") / recipe.stem
    started = sorted(p.name for p in folder.glob("step-*"))
    if started and not args.resume:
        raise ValueError(f"expected a new run folder, got {folder}, which holds {started[-1]}; "
                         "fix: --resume continues it, --run FOLDER starts another")
    return folder


# -- pictures ---------------------------------------------------------------------------------------------------------

def read_picture(path: str | Path, system: "System") -> "Image":
    """A user's picture. A model of one fixed picture size gets it on a white canvas of that size."""
    from diptych.data.images import fit_to_model, read_image

    return fit_to_model(read_image(path), system.config)


def picture_size(text: str) -> tuple[int, int]:
    """`64` or `96x64` (width x height) -> (height, width)."""
    width, cross, height = text.lower().partition("x")
    if not width.isdigit() or (cross and not height.isdigit()) or not int(width) or (cross and not int(height)):
        raise argparse.ArgumentTypeError(f"expected a size like 64 or 96x64 (width x height), got {text!r}")
    return (int(height) if cross else int(width)), int(width)


def output_picture(text: str) -> Path:
    """A path for a picture; refused before any work if its ending or its folder will not do."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"):
        raise argparse.ArgumentTypeError(f"expected a picture path ending in .png or .jpg, got {text!r}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text!r}")
    return path


def unfinished(out: Path, system: "System", sampling: "Sampling", **settings: Any) -> "Journal":
    """What an interrupted command has done, in a file beside its result `out`; it belongs to these weights and this way
    of asking. Refuses what could not be written at the end."""
    from diptych.config import to_dict
    from diptych.data.journal import Journal
    from diptych.systems.io import fingerprint

    if out.is_dir():
        raise ValueError(f"expected a file to write, got the folder {out}; fix: --out {out / 'pairs.jsonl'}")
    head = {"weights": fingerprint(system), "sampling": to_dict(sampling), **settings}
    place = out.with_name(f".{out.name}.unfinished")
    journal = Journal(place, head, "unfinished work of this model with these settings")
    if journal.rows:
        print(f"going on: {len(journal.rows)} are done", file=sys.stderr)
    return journal


# -- numbers and tables -----------------------------------------------------------------------------------------------

def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def table(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Columns aligned for a terminal: numbers right, the rest left."""
    cells = [[str(c) for c in row] for row in ([head, *rows] if head else rows)]
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(widths))]
    lines = ["  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
             for row in cells]
    if head:
        lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def free_memory() -> int:
    """Bytes of main memory that a new process can use."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def human(count: float, unit: str = "") -> str:
    """7600000 -> `7.6M`; bytes as GiB with unit `B`."""
    if unit == "B":
        for size, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if count >= size:
                return f"{count / size:.3g} {name}" if count / size < 1000 else f"{count / size:.0f} {name}"
        return f"{count:.0f} B"
    for size, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{' ' if unit else ''}{name}{unit}"
    return f"{count:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """`12 s`, `3 min`, `2 h 05 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
