"""Align a trained model with rewards; continues after an interruption."""
import argparse
from pathlib import Path

from diptych.cli import common


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe of recipes/align")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes, such as lr=1e-4 method=best")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="where checkpoints go (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="continue at the newest checkpoint of the run")
    common.add_device(parser)


def run(args: argparse.Namespace) -> int:
    path = common.find_recipe(args.recipe, "align")
    folder = common.run_folder(args, path)
    device = common.set_up_device(args)
    from diptych import config
    from diptych.adapters.published import open_model
    from diptych.alignment.aligner import Aligner
    from diptych.alignment.recipe import Align

    recipe = config.load(Align, path, args.overrides)
    system = open_model(common.find_model(recipe.model), device=device)
    aligner = Aligner(recipe, system, folder)
    aligner.run()
    if aligner.stop:
        print(f"stopped at iteration {aligner.iteration}; go on with: diptych align {args.recipe} --run {folder} "
              "--resume")
        return 0
    print(f"finished: {folder / 'model'}; measure it with: diptych eval {folder / 'model'}")
    return 0
