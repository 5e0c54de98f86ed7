"""Let a model answer, and part what it got right from what it got wrong, for the next stages of its training."""
import argparse
from pathlib import Path

from diptych.cli import common


def add(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("--tasks", required=True, metavar="A,B", help="tasks of the world, such as draw-think")
    parser.add_argument("--world", default="mini", help="(default: %(default)s)")
    parser.add_argument("--n", type=common.positive, default=1000, metavar="N",
                        help="documents of each task (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first one (default: 0)")
    parser.add_argument("--reward", default="thought", help="right is what has its best value (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers (default: 0, the likeliest)")
    parser.add_argument("--any-reason", action="store_true",
                        help="also keep right verdicts that the totals in the thoughts do not support")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for right.jsonl and wrong.jsonl; "
                        "interrupted, the same command goes on where it was")


def run(args: argparse.Namespace) -> int:
    system = common.load_model(args)
    import dataclasses

    from diptych.alignment.rewards import table
    from diptych.alignment.sifting import RIGHT, WRONG, consistent, sift
    from diptych.world import tasks

    names = [name.strip() for name in args.tasks.split(",")]
    documents = [tasks.document(name, args.first + i, world=args.world) for i in range(args.n) for name in names]
    sampling = system.default_sampling()
    sampling = dataclasses.replace(sampling, text=dataclasses.replace(sampling.text, temperature=args.temperature))
    thinking = args.reward == "thought" and not args.any_reason
    reward = table.make(args.reward)
    journal = common.unfinished(args.out / RIGHT, system, sampling, reward=reward.identity, tasks=names,
                                world=args.world, first=args.first, consistent=thinking, seed=args.seed)
    kept = sift(system, documents, reward, keep=consistent if thinking else None, sampling=sampling, seed=args.seed,
                journal=journal, progress=True)
    kept.write(args.out)
    journal.remove()
    print(f"{len(kept.right)} right in {args.out / RIGHT}, {len(kept.wrong)} wrong in {args.out / WRONG}; "
          f"{kept.unkept} right for another reason and {kept.failed} not judged left out")
    return 0
