"""See what a model does: asking, drawing, editing, planning, telling, as one page with every result checked."""
import argparse
from pathlib import Path

from diptych.cli import common
from diptych.parts.resources import bundled_models


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="where index.html goes")
    parser.add_argument("--n", type=common.positive, default=32, metavar="N",
                        help="held-out items per task in the table of scores (default: %(default)s)")
    parser.add_argument("--world", default="mini", help="where the documents come from (default: %(default)s)")
    common.add_model(parser)


def run(args: argparse.Namespace) -> int:
    if args.out.is_file():
        raise ValueError(f"expected a folder for -o, got the file {args.out}")
    system = common.load_model(args)
    from tqdm import tqdm

    from diptych.report.page import write
    from diptych.report.sections import steps, whole
    from diptych.report.tour import Tour

    name = args.model if args.model in bundled_models() else Path(args.model).name
    tour = Tour(system, name=name, n=args.n, seed=args.seed, world=args.world)
    results, made = tour.results, []
    with tqdm(steps(tour), unit="section", leave=False) as bar:
        for title, make in bar:
            bar.set_description(title)
            made.append(make())
    path = args.out / "index.html"
    write(path, whole(tour, made))
    print(results.table(detail=False))
    print(f"\n{path} ({common.duration(tour.seconds)})")
    return 0
