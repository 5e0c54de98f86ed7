"""How many finished training documents the world makes per second: all tasks in equal shares, pictures rendered.

    python perf/documents.py [--world mini] [--seconds 10] [--workers 1 2]

Prints per number of workers the wall-clock rate and the rate per second of CPU time of a worker; the second is the
one to compare on a machine that is busy with other work. The first documents fill the cache of stamps, so the rate of
the first thousand is given apart.
"""
import argparse
import multiprocessing
import os
import time

from diptych.world.sample import SPLITS
from diptych.world.scene import WORLDS
from diptych.world.tasks import TASKS, document

BLOCK = 200  # documents between two looks at the clock


def work(world: str, split: str, offset: int, seconds: float) -> tuple[int, float, float]:
    """(documents, wall seconds, CPU seconds) of one worker after its caches are warm."""
    for index in range(3000):
        document(TASKS[index % len(TASKS)], offset + index, split=split, world=world)
    made, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        for _ in range(BLOCK):
            document(TASKS[made % len(TASKS)], offset + 3000 + made, split=split, world=world)
            made += 1
    return made, time.perf_counter() - start, time.process_time() - cpu


def single(world: str, split: str) -> dict[str, float]:
    """CPU microseconds per document of each task, warm."""
    out = {}
    for task in TASKS:
        start = time.process_time()
        for index in range(500):
            document(task, 10_000_000 + index, split=split, world=world)
        out[task] = (time.process_time() - start) / 500 * 1e6
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="mini", choices=list(WORLDS))
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    start = time.process_time()
    for index in range(1000):
        document(TASKS[index % len(TASKS)], index, split=args.split, world=args.world)
    print(f"world {args.world}, split {args.split}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"first 1,000 documents of a process: {1000 / (time.process_time() - start):,.0f} per CPU second")
    print("CPU us per document: " + ", ".join(f"{t} {v:.0f}" for t, v in single(args.world, args.split).items()))
    context = multiprocessing.get_context("spawn")
    for workers in args.workers:
        with context.Pool(workers) as pool:
            jobs = [(args.world, args.split, worker * 10**6, args.seconds) for worker in range(workers)]
            results = pool.starmap(work, jobs, chunksize=1)
        rate = sum(made / wall for made, wall, _ in results)
        per_cpu = sum(made for made, _, _ in results) / sum(cpu for *_, cpu in results)
        print(f"{workers} workers: {rate:,.0f} documents/s, {per_cpu:,.0f} per CPU second")


if __name__ == "__main__":
    main()
