"""Pairs to prefer by: a model answers every prompt several times, and a judge ranks and sifts what it made."""
import argparse
import math
from pathlib import Path

from diptych.cli import common


def add(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("--judge", required=True, metavar="FOLDER", help="a model that judges (`recipes/judge.yaml`)")
    parser.add_argument("--task", default="draw", metavar="NAME", help="of the world (default: %(default)s)")
    parser.add_argument("--kind", default="draw", choices=("draw", "answer", "story"),
                        help="what the judge is told that it sees (default: %(default)s)")
    parser.add_argument("--think", action="store_true", help="compare by verdicts behind thoughts")
    parser.add_argument("--world", default="mini", help="(default: %(default)s)")
    parser.add_argument("--n", type=common.positive, default=100, metavar="N", help="prompts (default: %(default)s)")
    parser.add_argument("--candidates", type=common.positive, default=10, metavar="N",
                        help="answers to every prompt, an even number (default: %(default)s)")
    parser.add_argument("--rule", default="sift", choices=("sift", "rank", "random"),
                        help="sift: the best of the winners with the worst of the losers; rank and random are controls "
                        "(default: %(default)s)")
    parser.add_argument("--temperature", type=float, metavar="T", help="of answers in words and codes")
    common.add_sampling(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="JSONL",
                        help="a pair per line; interrupted, the same command goes on where it was")


def run(args: argparse.Namespace) -> int:
    if args.candidates % 2:
        raise ValueError(f"expected an even number of --candidates, got {args.candidates}")
    system = common.load_model(args)
    from dataclasses import replace

    from diptych.alignment.rewards.judges import PairJudge, PointJudge
    from diptych.alignment.rewards.mining import mine
    from diptych.alignment.sifting import write_pairs
    from diptych.world import tasks

    sampling = common.sampling_of(system, args)
    if args.temperature is not None:
        sampling = replace(sampling, text=replace(sampling.text, temperature=args.temperature),
                           codes=replace(sampling.codes, temperature=args.temperature))
    pairs = PairJudge(args.judge, f"world-{args.kind}-{'think' if args.think else 'pair'}")
    points = PointJudge(pairs.ask, f"world-{args.kind}-point")
    documents = [tasks.document(args.task, i, world=args.world) for i in range(args.n)]
    journal = common.unfinished(args.out, system, sampling, judges=[pairs.identity, points.identity], task=args.task,
                                world=args.world, candidates=args.candidates, rule=args.rule, seed=args.seed)
    found = mine(system, documents, pairs, points, rule=args.rule, candidates=args.candidates, sampling=sampling,
                 seed=args.seed, journal=journal, progress=True)
    write_pairs(found, args.out)
    journal.remove()
    gaps = [p.scores[0] - p.scores[1] for p in found if not math.isnan(p.scores[0])]
    gap = f", {sum(gaps) / len(gaps):.2f} points apart in the mean" if gaps else ""
    print(f"{len(found)} pairs of {args.n} prompts in {args.out}{gap}")
    return 0
