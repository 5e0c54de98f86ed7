"""What the server bears: `python perf/serving.py --write docs/serving.md`.

`diptych serve` runs in a process of its own; this one is its clients. Parts (`--only load,memory,...`):

    load      answers, streams, drawings of several sizes and edits in turn, 16 at once against one at a time
    memory    of the server over 5,000 requests, short ones and pictures of few steps
    faults    SIGKILL and a new start, and SIGTERM, under load: how every request ended
    slow      what ten clients that read a byte a second, and ten that send so, do to the others
    start     seconds from the command to the first answer
    replicas  load and SIGKILL of a replica with two of them (needs ray)

Every request must end as an answer or as an error that its client sees; one that does neither within two minutes, or an
answer that says it is whole and is not, is counted as silent. `--quick` is for looking whether all of it works.
"""
import argparse
import asyncio
import base64
import importlib.util
import io
import os
import platform
import signal
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import clients
import httpx
import numpy as np
from clients import KINDS, PATIENCE, Outcome, asks_of, dawdlers, drive, for_seconds, serving
from PIL import Image as Pil

PARTS = ("load", "memory", "faults", "slow", "start", "replicas")
BETWEEN = ("<!-- {}: begin -->", "<!-- {}: end -->")
LOST = ("refused", "broken")  # the client is told by its connection


@dataclass(frozen=True)
class Sizes:
    """How much of everything. `seconds` of a load, `requests` for memory, `starts` of the command."""

    seconds: float = 120.0
    requests: int = 5000
    starts: int = 5
    at_once: int = 16
    steps: int | None = None  # of pictures; None: as the model draws


QUICK = Sizes(seconds=4.0, requests=120, starts=1, at_once=16, steps=4)


# -- parts ------------------------------------------------------------------------------------------------------------

def share(values: Sequence[float], part: float) -> float:
    return float(np.quantile(values, part)) if values else float("nan")


def load(model: str, sizes: Sizes, *options: str) -> list[str]:
    with serving(model, "--queue", "64", *options) as server:
        asks = asks_of(server, sizes.steps)
        runs = []
        for at_once in (1, sizes.at_once):
            runs.append(asyncio.run(drive(server.url, asks.mixed, at_once, for_seconds(sizes.seconds))))
    alone, busy = ([o for o in run if o.end == "answered"] for run in runs)
    rates = [len(run) / (max(o.began + o.seconds for o in run) - min(o.began for o in run)) for run in (alone, busy)]
    lines = [f"| requests | one at a time: p50 | p95 | {sizes.at_once} at once: p50 | p95 | ratio of p50 |",
             "|" + "---|" * 6]
    for kind in dict.fromkeys(KINDS):
        one, many = ([o.seconds for o in run if o.kind == kind] for run in (alone, busy))
        lines.append(f"| {kind} ({len(one)}, {len(many)}) | {share(one, .5):.2f} s | {share(one, .95):.2f} s "
                     f"| {share(many, .5):.2f} s | {share(many, .95):.2f} s | {share(many, .5) / share(one, .5):.1f} |")
    failed = [o.end for run in runs for o in run if o.end != "answered"]
    first = {o.number: o.made for o in alone}
    both = [(first[o.number], o.made) for o in busy if o.number in first]
    return [*lines, "", f"{rates[0]:.2f} requests a second one at a time, {rates[1]:.2f} with {sizes.at_once} at once: "
            f"**{rates[1] / rates[0]:.2f} times**. Of {len(both)} requests asked both ways {sum(map(alike, both))} "
            f"were answered alike (texts the same, pictures within two levels). {told(failed, 'Not answered')}."]


def alike(pair: tuple[str, str]) -> bool:
    if pair[0] == pair[1]:
        return True
    try:
        one, two = (np.asarray(Pil.open(io.BytesIO(base64.b64decode(text, validate=True))), np.int16) for text in pair)
    except (ValueError, OSError):
        return False
    return one.shape == two.shape and int(np.abs(one - two).max()) <= 2


def told(ends: Sequence[str], what: str) -> str:
    counts = ", ".join(f"{end} {number}" for end, number in sorted(Counter(ends).items()))
    return f"{what}: {counts or 'none'}"


def memory(model: str, sizes: Sizes) -> list[str]:
    every, warm = max(1, sizes.requests // 50), sizes.requests // 5
    series: list[tuple[int, int]] = []
    with serving(model) as server:
        asks = asks_of(server, sizes.steps)
        series.append((0, server.memory()))

        def watch(done: int) -> None:
            if done % every == 0:
                series.append((done, server.memory()))

        ended = asyncio.run(drive(server.url, asks.small, sizes.at_once, lambda n: n < sizes.requests, watch))
    after = [(done, size) for done, size in series if done >= warm]
    slope = float(np.polyfit(*np.array(after, float).T, 1)[0]) * 1000 / 2**20
    shown = [series[0], *[s for s in series if s[0] and s[0] % max(every, sizes.requests // 5 // every * every) == 0]]
    lines = ["| after requests | " + " | ".join(f"{done:,}" for done, _ in shown) + " |",
             "|" + "---|" * (len(shown) + 1),
             "| MiB resident | " + " | ".join(f"{size / 2**20:.0f}" for _, size in shown) + " |", ""]
    answered = sum(o.end == "answered" for o in ended)
    return [*lines, f"{answered:,} of {len(ended):,} were answered. From request {warm:,} on memory grew by "
            f"**{slope:+.1f} MiB per 1,000 requests** (a line through {len(after)} readings, from "
            f"{min(s for _, s in after) / 2**20:.0f} to {max(s for _, s in after) / 2**20:.0f} MiB)."]


def faults(model: str, sizes: Sizes) -> list[str]:
    lines = ["| under load | requests | answered | refused | broken | errors | **silent** |", "|" + "---|" * 7]
    server = clients.Server(model)
    asks = asks_of(server, sizes.steps)
    port, held = server.port, [server]

    async def killed() -> list[Outcome]:
        running = asyncio.ensure_future(drive(server.url, asks.mixed, sizes.at_once, lambda n: not back))
        await asyncio.sleep(sizes.seconds / 4)
        await asyncio.to_thread(server.stop, signal.SIGKILL)
        held.append(await asyncio.to_thread(clients.Server, model, port=port))
        await asyncio.sleep(sizes.seconds / 4)
        back.append(True)
        return await running

    async def stopped() -> tuple[list[Outcome], float, float]:
        at: list[float] = []
        running = asyncio.ensure_future(drive(server.url, asks.mixed, sizes.at_once, lambda n: not at))
        await asyncio.sleep(sizes.seconds / 4)
        at.append(time.perf_counter())
        took = await asyncio.to_thread(held[-1].stop)
        return await running, at[0], took

    back: list[bool] = []
    try:
        ended = asyncio.run(killed())
        lines.append(_row("SIGKILL, started again at once", ended))
        ended, at, took = asyncio.run(stopped())
        lines.append(_row("SIGTERM", ended))
    finally:
        for one in held:
            if not one.ended:
                one.stop()
    under = [o for o in ended if o.began < at - 0.05 and o.began + o.seconds > at]
    done = sum(o.end == "answered" for o in under)
    return [*lines, "", f"Of {len(under)} that were under way at SIGTERM {done} were answered; the "
            f"process had ended after {took:.1f} s. Refused: no connection. Broken: the connection ended before the "
            "answer did, which clients see as an error."]


def _row(name: str, ended: Sequence[Outcome]) -> str:
    counts = Counter(o.end for o in ended)
    other = len(ended) - sum(counts[k] for k in ("answered", *LOST, "silent"))
    return (f"| {name} | {len(ended)} | {counts['answered']} | {counts['refused']} | {counts['broken']} | {other} "
            f"| {counts['silent']} |")


def slow(model: str, sizes: Sizes) -> list[str]:
    seconds = min(40.0, sizes.seconds)  # a reader that takes nothing is let go after a minute
    with serving(model) as server:
        asks = asks_of(server, sizes.steps)

        async def measured() -> tuple[list[Outcome], list[Outcome], int]:
            await drive(server.url, asks.mixed, 4, for_seconds(seconds / 4))  # kernels for four at once
            free = await drive(server.url, asks.mixed, 4, for_seconds(seconds / 2))
            async with dawdlers(server, asks) as left:
                held = await drive(server.url, asks.mixed, 4, for_seconds(seconds))
                still = left()
            return [*free, *await drive(server.url, asks.mixed, 4, for_seconds(seconds / 2))], held, still

        free, held, left = asyncio.run(measured())
    lines = ["| requests, 4 at once | alone, before and after: p50 | p95 | beside slow clients: p50 | p95 | ratios |",
             "|" + "---|" * 6]
    for kind in ("all", *dict.fromkeys(KINDS)):
        one, two = ([o.seconds for o in run if o.end == "answered" and kind in ("all", o.kind)] for run in (free, held))
        values = share(one, .5), share(one, .95), share(two, .5), share(two, .95)
        lines.append(f"| {kind} ({len(one)}, {len(two)}) | {values[0]:.2f} s | {values[1]:.2f} s | {values[2]:.2f} s "
                     f"| {values[3]:.2f} s | {values[2] / values[0]:.2f}, {values[3] / values[1]:.2f} |")
    failed = [o.end for run in (free, held) for o in run if o.end != "answered"]
    return [*lines, "", "Ten that read a byte a second from streams of pictures and ten that send a body so; "
            f"{left} of them were still connected at the end. {told(failed, 'Of the others not answered')}."]


def start(model: str, sizes: Sizes, *options: str) -> list[str]:
    times: list[tuple[float, float]] = []
    body = {"messages": [{"role": "user", "content": "hello"}], "seed": 1, "max_tokens": 4}
    for _ in range(sizes.starts):
        with serving(model, *options) as server:
            ready = time.perf_counter() - server.began
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE).raise_for_status()
            times.append((ready, time.perf_counter() - server.began))
    both = [statistics.median(t) for t in zip(*times, strict=True)]
    every = ", ".join(f"{t:.1f}" for _, t in times)
    return [f"From the command to the first answer **{both[1]:.1f} s**, of which {both[0]:.1f} s until it listens "
            f"(median of {len(times)} new processes: {every} s)."]


def replicas(model: str, sizes: Sizes) -> list[str]:
    if importlib.util.find_spec("ray") is None:
        return ["Not measured: ray is not installed here."]
    two = ("--replicas", "2")
    lines = [*load(model, sizes, *two), "", *start(model, sizes, *two), ""]
    with serving(model, *two) as server:
        asks = asks_of(server, sizes.steps)

        async def killed() -> list[Outcome]:
            going = for_seconds(sizes.seconds / 2)
            running = asyncio.ensure_future(drive(server.url, asks.mixed, sizes.at_once, going))
            await asyncio.sleep(sizes.seconds / 8)
            os.kill(replica_of(server), signal.SIGKILL)
            return await running

        ended = asyncio.run(killed())
        again = server.metric("diptych_replica_lost_total")
    return [*lines, "| under load | requests | answered | refused | broken | errors | **silent** |", "|" + "---|" * 7,
            _row("SIGKILL of one of two replicas", ended), "",
            f"{again:.0f} answers were under way in it and were made by the other."]


def replica_of(server: clients.Server) -> int:
    return next(pid for pid in server.tree() if b"ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes())


# -- the report -------------------------------------------------------------------------------------------------------

@dataclass
class Report:
    """Sections by part; `write` replaces those that were measured and leaves the others."""

    head: str
    sections: dict[str, list[str]] = field(default_factory=dict)

    def text(self, part: str) -> str:
        return "\n".join([f"*{self.head}*", "", *self.sections[part]])

    def write(self, path: Path) -> None:
        page = path.read_text(encoding="utf-8")
        for part in self.sections:
            begin, end = (mark.format(f"perf/serving.py {part}") for mark in BETWEEN)
            if begin not in page or end not in page:
                raise SystemExit(f"expected the marks of {part} in {path}, got none; fix: add {begin} and {end}")
            before, _, rest = page.partition(begin)
            page = f"{before}{begin}\n{self.text(part)}\n{end}{rest.partition(end)[2]}"
        aside = path.with_suffix(".new")
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, help="of each load")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also put the tables between their marks")
    args = parser.parse_args(argv)
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(unknown)}")
    sizes = QUICK if args.quick else Sizes()
    if args.seconds:
        sizes = replace(sizes, seconds=args.seconds)
    import torch

    import diptych

    report = Report(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch "
                    f"{torch.__version__}, diptych {diptych.__version__}, {args.model}, "
                    f"{'quick, ' if args.quick else ''}{sizes.seconds:g} s a load, load before "
                    f"{os.getloadavg()[0]:.1f}")
    for part in parts:
        report.sections[part] = globals()[part](args.model, sizes)
        print(f"## {part}\n\n{report.text(part)}\n", flush=True)
        if args.write:
            report.write(args.write)


if __name__ == "__main__":
    main()
