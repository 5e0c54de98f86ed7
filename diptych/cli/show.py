"""Explain one system: the idea, its configuration, its size, and its attention mask as a picture."""
import argparse
import inspect
import sys
from typing import Any

from diptych.cli import common

SIZES = ("tiny", "small", "paper")
MASK_TASKS = ("caption", "draw", "edit")  # one document of each in the mask picture


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("system", help="a name of `diptych ls systems`")
    parser.add_argument("--size", choices=SIZES, default="small", help="(default: %(default)s)")
    parser.add_argument("--mask", type=common.output_picture, metavar="PICTURE",
                        help=f"write who attends to whom in documents that {', '.join(MASK_TASKS)}")


def run(args: argparse.Namespace) -> int:
    from diptych.systems import table

    cls = table.find(args.system)
    row = table.TABLE.get(args.system)
    print(f"{row.title} ({row.year}, arXiv {row.paper}), evidence {' '.join(row.levels)}\n" if row is not None else
          f"{args.system}, an ingredient and no paper\n")
    print((inspect.getdoc(sys.modules[cls.__module__]) or "").rstrip())
    config = getattr(cls, args.size)()
    print(f"\nconfiguration: {args.size}\n")
    print(_config(config))
    print(f"parameters: {args.size}\n")
    print(parameters(cls, config))
    if args.mask is not None:
        mask_picture(cls).save(args.mask)
        print(f"\nmask: {args.mask} (queries run down, keys run right; "
              "blue text, green features, orange latents, light orange noised latents)")
    return 0


def _config(config: Any) -> str:
    import yaml

    from diptych.config import to_dict

    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=110)


def parameters(cls: type, config: Any) -> str:
    """Counted on the meta device, so that the published size needs no memory."""
    import torch

    from diptych.cli.plan import parameter_rows

    with torch.device("meta"):
        system = cls(config)
    rows = parameter_rows({name: p.numel() for name, p in system.named_parameters()})
    return common.table(rows, ("module", "parameters", "share"))


def mask_picture(cls: Any) -> Any:
    """The mask of a packed row as a PIL image, from the tiny size: the mask does not depend on the size."""
    from dataclasses import fields, replace

    from diptych.parts import masks
    from diptych.systems.packed import Packed
    from diptych.world import tasks

    if not issubclass(cls, Packed):
        raise ValueError(f"expected a system with a packed sequence for --mask, got {cls.__name__}, which has none; "
                         "fix: leave --mask away")
    whole: Any = cls
    config = whole.tiny()
    if "row" in {f.name for f in fields(config)}:  # one row for all of them
        config = replace(config, row=512)
    system = whole(config)
    documents = [tasks.document(task, 2) for task in MASK_TASKS]
    reads = [d for d in documents if system.draws or not any(p.kind == "image" for p in d.targets)]
    batch = system.collate(reads)
    return masks.picture(system.mask, batch.page.tokens, cell=6)
