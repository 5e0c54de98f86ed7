"""Pairs to prefer by: a model answers every prompt several times, and a judge ranks and sifts what it made."""
import argparse
import math
from pathlib import Path

from diptych.cli import common

AT_ONCE = 16  # prompts


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
    parser.add_argument("--out", type=Path, required=True, metavar="JSONL", help="a pair per line")


def run(args: argparse.Namespace) -> int:
    system = common.load_model(args)
    from dataclasses import replace

    from tqdm import tqdm

    from diptych.alignment.rewards.judges import PairJudge, PointJudge
    from diptych.alignment.rewards.mining import Contested, contest
    from diptych.alignment.sifting import Preferred, write_pairs
    from diptych.world import tasks

    sampling = common.sampling_of(system, args)
    if args.temperature is not None:
        sampling = replace(sampling, text=replace(sampling.text, temperature=args.temperature),
                           codes=replace(sampling.codes, temperature=args.temperature))
    pairs = PairJudge(args.judge, f"world-{args.kind}-{'think' if args.think else 'pair'}")
    points = PointJudge(pairs.ask, f"world-{args.kind}-point")
    found: list[Preferred] = []
    for start in tqdm(range(0, args.n, AT_ONCE), unit=f"{AT_ONCE} prompts", disable=None, leave=False):
        asked = [tasks.document(args.task, i, world=args.world) for i in range(start, min(start + AT_ONCE, args.n))]
        count = len(asked) * args.candidates
        seeds = [args.seed + start * args.candidates + k for k in range(count)]
        made = system.generate([a for a in asked for _ in range(args.candidates)], sampling, seeds=seeds)
        groups = [(a, made[k:k + args.candidates])
                  for a, k in zip(asked, range(0, count, args.candidates), strict=True)]
        contests = [Contested((), ())] * len(asked) if args.rule == "random" else contest(groups, pairs, points)
        for (_, group), judged in zip(groups, contests, strict=True):
            mined = judged.pair(args.rule)
            if mined is not None:
                found.append(Preferred(group[mined.chosen], group[mined.rejected], mined.scores))
    write_pairs(found, args.out)
    gaps = [p.scores[0] - p.scores[1] for p in found if not math.isnan(p.scores[0])]
    gap = f", {sum(gaps) / len(gaps):.2f} points apart in the mean" if gaps else ""
    print(f"{len(found)} pairs of {args.n} prompts in {args.out}{gap}")
    return 0
