"""What a run says while it trains: `metrics.jsonl`, `events.jsonl`, a progress line, optional dashboards."""
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

log = logging.getLogger("diptych.training")


class Metrics:
    """`metrics.jsonl`: one line per logged step; never a step twice, never one lost across kills and resumes."""

    def __init__(self, run: Path, step: int = 0) -> None:
        """Continue after `step` finished steps: later lines belong to work that was lost and goes away."""
        self.path = run / "metrics.jsonl"
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        temporary = run / ".metrics.jsonl"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        self.file = self.path.open("a")

    def write(self, line: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def flush(self) -> None:
        """To the disk: before a checkpoint that counts these lines as written."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def event(run: Path, kind: str, **facts: Any) -> None:
    """Append to `events.jsonl`: resumed, skipped, rolled back, finished."""
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": round(time.time(), 3), "event": kind, **facts}) + "\n")


class Progress:
    """A bar on a terminal, plain lines elsewhere. Loss terms are smoothed over about ten logged steps."""

    def __init__(self, total: int, done: int, name: str) -> None:
        self.total, self.name, self.smooth = total, name, {}
        self.start_step, self.start_time = done, time.perf_counter()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=name, dynamic_ncols=True, smoothing=0.05) if terminal else None

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def show(self, line: Mapping[str, Any], losses: Mapping[str, float]) -> None:
        for name, value in losses.items():
            old = self.smooth.get(name, value)
            self.smooth[name] = old + 0.1 * (value - old) if value == value else old
        terms = " ".join(f"{n} {v:.4g}" for n, v in self.smooth.items())
        speed = f"{line['documents_per_second']:.0f} docs/s {line['tokens_per_second']:.0f} tok/s lr {line['lr']:.2e}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{line['stage']} {terms} {speed}")
            return
        seconds = (time.perf_counter() - self.start_time) / max(line["step"] - self.start_step, 1)
        left = _clock(seconds * (self.total - line["step"]))
        log.info("%s %d/%d %s | %s | %s | left %s", self.name, line["step"], self.total, line["stage"], terms, speed,
                 left)

    def rewind(self, step: int) -> None:
        if self.bar is not None:
            self.bar.n = step
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Sink(Protocol):
    def write(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_sinks(names: Sequence[str], run: Path, recipe: Mapping[str, Any]) -> list[Sink]:
    makers = {"tensorboard": _Tensorboard, "trackio": _Trackio}
    return [makers[name](run, recipe) for name in names]


class _Tensorboard:
    def __init__(self, run: Path, recipe: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"))

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in numbers(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.close()


class _Trackio:
    def __init__(self, run: Path, recipe: Mapping[str, Any]) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(project="diptych", name=run.name, config=dict(recipe), resume="allow")

    def write(self, line: Mapping[str, Any]) -> None:
        self.trackio.log(numbers(line), step=line["step"])

    def close(self) -> None:
        self.trackio.finish()


@contextmanager
def interruptible(ask: Callable[[], None]) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM calls `ask` (to stop at a good moment); the second acts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: Any) -> None:
        log.warning("stopping after this step (again to stop at once)")
        signal.signal(number, old[signal.Signals(number)])
        ask()

    old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def numbers(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a metrics line under slash-separated names."""
    out: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            out |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            out[prefix + key] = value
    return out


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
