"""Train a system from a recipe; continues after an interruption."""
import argparse
from pathlib import Path

from diptych.cli import common


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe (`diptych ls recipes`)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes, such as stages.0.lr=1e-3 seed=1")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="where checkpoints go (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="continue at the newest checkpoint of the run")
    parser.add_argument("--processes", type=common.positive, default=1, metavar="N",
                        help="shard over N processes of this machine, one per GPU (default: %(default)s)")
    common.add_device(parser)


def run(args: argparse.Namespace) -> int:
    path = common.find_recipe(args.recipe)
    folder = common.run_folder(args, path)
    if args.processes > 1:
        return _sharded(args, path, folder)
    device = common.set_up_device(args)
    from diptych.systems.table import TABLE
    from diptych.training.recipe import load_recipe
    from diptych.training.trainer import Trainer

    trainer = Trainer(load_recipe(path, args.overrides), folder, device=device)
    trainer.run()
    if trainer.stop:
        print(f"stopped at step {trainer.place.step}; go on with: diptych train {args.recipe} --run {folder} --resume")
        return 0
    hint = f"; try: diptych {_first_use(folder)} --model {folder / 'model'}" if trainer.recipe.system in TABLE else ""
    print(f"finished: {folder / 'model'}{hint}")
    return 0


def _first_use(run: Path) -> str:
    """What a model can be asked first: one that was last taught words alone (a reader, a judge) does not draw."""
    from diptych.training.progress import read_lines

    lines = read_lines(run / "metrics.jsonl")
    reads = bool(lines) and set(lines[-1]["losses"]) == {"text"}
    return "ask PICTURE 'how many circles are there ?'" if reads else "draw 'a red circle' -o out.png"


def _sharded(args: argparse.Namespace, path: Path, folder: Path) -> int:
    import subprocess
    import sys

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}",
               "-m", "diptych.training.parallel", str(path), str(folder), *args.overrides]
    return subprocess.run(command).returncode
