"""Check this machine, or a data set: `diptych doctor`, `diptych doctor data PATH`."""
import argparse
import os
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import diptych
from diptych.cli import common

EXTRAS = {"hf": ("transformers", "huggingface-hub"), "data": ("webdataset", "pyarrow"),
          "serve": ("fastapi", "uvicorn", "python-multipart", "prometheus-client"), "svg": ("resvg-py",),
          "video": ("av",), "audio": ("soundfile",), "ray": ("ray",), "track": ("trackio",)}
CORE = ("torch", "numpy", "safetensors", "pillow", "pyyaml", "tqdm", "tokenizers")
MATMUL = 1024


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=("machine", "data"), default="machine")
    parser.add_argument("path", nargs="?", type=Path, help="data: a folder of pictures, or a .json or .jsonl file")
    parser.add_argument("--tokenizer", metavar="NAME|FILE", default="zoo/tokenizer",
                        help="data: what counts tokens (default: %(default)s); none counts characters")
    parser.add_argument("--limit", type=common.positive, metavar="N", help="data: read the first N documents only")
    parser.add_argument("--samples", type=common.positive, default=4, metavar="N", help="data: documents to show")
    parser.add_argument("--sheet", type=common.output_picture, metavar="PICTURE",
                        help="data: write the pictures of the shown documents")


def run(args: argparse.Namespace) -> int:
    if args.what == "data":
        if args.path is None:
            raise ValueError("expected a path, got none; fix: diptych doctor data FOLDER")
        return _data(args)
    if args.path is not None:
        raise ValueError(f"expected no path for the machine, got {args.path}; fix: diptych doctor data {args.path}")
    return _machine()


def _data(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from diptych.data.doctor import inspect_data

    tokenizer = None
    if args.tokenizer != "none":
        from diptych.parts.vocabulary import Vocabulary

        tokenizer = Vocabulary(args.tokenizer)
    report = inspect_data(args.path, tokenizer, samples=args.samples, sheet=args.sheet, limit=args.limit,
                          progress=lambda items: tqdm(items, disable=None, leave=False))
    print(report, end="")
    return 0 if report.documents and not report.problems else 1


def _machine() -> int:
    import torch

    print(f"diptych {diptych.__version__}, Python {platform.python_version()}, {platform.platform()}\n")
    print("packages")
    print(_indent(common.table([(name, _version(name)) for name in CORE])))
    rows = [(extra, ", ".join(f"{p} {_version(p)}" for p in packages)) for extra, packages in EXTRAS.items()]
    print("\nextras (pip install 'diptych[NAME]')")
    print(_indent(common.table(rows)))
    print("\nmachine")
    print(_indent(common.table(_hardware(torch))))
    print("\nbundled")
    rows, complete = _bundled()
    print(_indent(common.table(rows)))
    problems = _problems(complete)
    print("\n" + ("\n".join(f"problem: {p}" for p in problems) or "all well"))
    return 1 if problems else 0


def _hardware(torch: Any) -> list[tuple[str, str]]:
    from diptych.ledger.entry import Machine

    here = Machine.here()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rows = [("processor", f"{here.cpu}, {here.cores} cores, {torch.get_num_threads()} compute threads"),
            ("memory", f"{common.human(memory, 'B')}, {common.human(common.free_memory(), 'B')} free"),
            ("disk here", f"{common.human(shutil.disk_usage('.').free, 'B')} free")]
    devices = ["cpu"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{properties.name}, {common.human(properties.total_memory, 'B')}, "
                                  f"bfloat16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"))
        devices.append(f"cuda:{i}")
    if torch.backends.mps.is_available():
        rows.append(("mps", "Apple GPU"))
        devices.append("mps")
    for device in devices:
        speeds = [f"{name} {common.human(matmul_speed(torch, device, dtype), 'FLOP/s')}"
                  for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))]
        rows.append((f"{device} matrix product", ", ".join(speeds)))
    return rows


def matmul_speed(torch: Any, device: str, dtype: Any, seconds: float = 0.3) -> float:
    """FLOP/s of square matrix products."""
    a, b = (torch.ones(MATMUL, MATMUL, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        float((a @ b)[0, 0])  # reading a number waits for the device

    product()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        product()
        count += 1
    return 2 * MATMUL**3 * count / (time.perf_counter() - start)


def _bundled() -> tuple[list[tuple[str, str]], bool]:
    """Rows of what is bundled, and whether all of it is there."""
    from diptych.cli.zoo import rows

    found = rows()
    return [(name, where if size == "-" else size) for name, size, where in found], all(s != "-" for _, s, _ in found)


def _problems(complete: bool) -> list[str]:
    problems = [f"expected the package {name}, which is not installed; fix: pip install {name}"
                for name in CORE if _version(name) == "absent"]
    if not complete:
        problems.append("expected all bundled weights, got some missing (above); "
                        "fix: install again, or diptych zoo build NAME")
    return problems


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
