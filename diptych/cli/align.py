"""Align a trained model with rewards, or by playing against itself; continues after an interruption."""
import argparse
from pathlib import Path

from diptych.cli import common


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe of recipes/align")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes, such as lr=1e-4 method=best")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="where checkpoints go (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="continue at the newest checkpoint of the run")
    common.add_device(parser)
    where = parser.add_argument_group("where workers run (changes no result)")
    where.add_argument("--backend", choices=("serial", "process", "ray"), default="serial",
                       help="all in this process, a process for each, or Ray (default: %(default)s)")
    where.add_argument("--schedule", choices=("collocated", "disaggregated", "pipelined"), default="collocated",
                       help="who may work while others do (default: %(default)s)")
    where.add_argument("--placement", default="", metavar="TEXT",
                       help="cores or devices of each role, such as 'rollout: 0; reward: 1; learner: 0-1:0'")
    where.add_argument("--parts", type=common.positive, default=1, metavar="K",
                       help="answer and judge the prompts of an iteration in so many batches (default: %(default)s)")
    where.add_argument("--stream", action="store_true", help="begin an update with the parts that are judged")
    where.add_argument("--ray-address", default="", metavar="ADDRESS",
                       help="join this Ray cluster instead of starting one")


def run(args: argparse.Namespace) -> int:
    path = common.find_recipe(args.recipe, "align")
    folder = common.run_folder(args, path)
    device = common.set_up_device(args)
    from diptych.adapters.published import open_model
    from diptych.alignment import start
    from diptych.alignment.workers.setup import Workers, read_placement

    workers = Workers(backend=args.backend, schedule=args.schedule, placement=read_placement(args.placement),
                      parts=args.parts, stream=args.stream, address=args.ray_address)
    recipe = start.load(path, args.overrides)
    loop = start.start(recipe, open_model(recipe.model, device=device), folder, workers)
    loop.run()
    if loop.stop:
        print(f"stopped at iteration {loop.iteration}; go on with: diptych align {args.recipe} --run {folder} --resume")
        return 0
    world = "" if recipe.world == "mini" else f" --world {recipe.world}"
    print(f"finished: {folder / 'model'}; measure it with: diptych eval {folder / 'model'}{world}")
    return 0
