"""How fast a recipe trains on this machine, and where the time goes.

    python perf/training.py [RECIPE] [KEY=VALUE ...] [--steps 20] [--warm-up 5] [--profiled 3]

RECIPE is a YAML file (default recipes/mini.yaml); KEY=VALUE changes it as in `diptych train`, e.g. stages.0.batch=32.
Prints documents and tokens per second, the FLOP/s of the model (forward and backward passes; not of the optimiser) as
a share of the largest matrix product measured before and after in the same run, and a profile: self time by kind of
operator in the profiled steps. Waiting for data is measured by the clock, outside of the profile.
"""
import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from diptych.training import trainer as module
from diptych.training.plan import matmul_peak
from diptych.training.recipe import load_recipe
from diptych.training.trainer import Trainer

# Attention products are batched ones, those of linear layers are not; compiled kernels are named after what they fuse.
KINDS = {
    "attention": ("bmm", "scaled_dot_product", "softmax", "attention"),
    "convolution": ("conv", "group_norm"),
    "matmul": ("::mm", "::addmm", "::linear", "mkldnn_linear", "gemm"),
}
OPTIMIZER = "optimizer step"


def kind_of(event: Any) -> str:
    """What an operator counts as: the optimiser if it runs inside of it, else by its name."""
    parent = event
    while parent is not None:
        if parent.name == OPTIMIZER:
            return "optimizer"
        parent = parent.cpu_parent
    found = (kind for kind, names in KINDS.items() if any(n in event.name for n in names))
    return next(found, "elementwise and copies")


@contextlib.contextmanager
def optimizer_ranges(trainer: Trainer) -> Iterator[None]:
    """Everything behind the backward pass is recorded as the optimiser's: norm, clipping, the step, the average."""
    def ranged(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with record_function(OPTIMIZER):
                return function(*args, **kwargs)
        return wrapped

    places: list[tuple[Any, str]] = [(module, "gradient_norm"), (module, "clip"), (trainer.optimizer, "step_unless")]
    places += [(trainer.ema, "update")] if trainer.ema is not None else []
    kept = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, function in kept:
        setattr(owner, name, ranged(function))
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def model_flops(trainer: Trainer, packet: Any) -> float:
    """FLOP of the forward and backward passes of one step; its gradients are thrown away."""
    with FlopCounterMode(display=False) as counter:
        for batch, micro in zip(packet.batches, packet.indices, strict=True):
            trainer.forward(batch.to(trainer.device), micro).total().backward()
    trainer.system.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def timed(trainer: Trainer, feed: Iterator[Any], steps: int) -> tuple[list[float], list[float], list[float]]:
    """(seconds, seconds of waiting for data, tokens) of every step."""
    seconds, waits, tokens = [], [], []
    for _ in range(steps):
        start = time.perf_counter()
        packet = next(feed)
        got = time.perf_counter()
        before = trainer.place.tokens
        trainer.step(packet)
        wait(trainer.device)
        seconds.append(time.perf_counter() - start)
        waits.append(got - start)
        tokens.append(float(trainer.place.tokens - before))
    return seconds, waits, tokens


def breakdown(trainer: Trainer, feed: Iterator[Any], steps: int) -> list[tuple[str, float]]:
    """Milliseconds per step of self time by kind, largest first; on the accelerator where there is one."""
    on_cuda = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    packets = [next(feed) for _ in range(steps)]
    with profile(activities=activities) as prof, optimizer_ranges(trainer):
        for packet in packets:
            trainer.step(packet)
        wait(trainer.device)
    spent: Counter[str] = Counter()
    for event in prof.events() or ():
        spent[kind_of(event)] += event.self_device_time_total if on_cuda else event.self_cpu_time_total
    return [(kind, us / 1e3 / steps) for kind, us in spent.most_common()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(Path(__file__).parent.parent / "recipes" / "mini.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--profiled", type=int, default=3)
    args = parser.parse_intermixed_args()
    if "=" in args.recipe and not Path(args.recipe).exists():  # only changes were given
        args.overrides, args.recipe = [args.recipe, *args.overrides], parser.get_default("recipe")
    recipe = load_recipe(args.recipe, args.overrides)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, folder)
        device, documents = trainer.device, recipe.stages[0].batch
        print(f"{recipe.system} {recipe.size}, {trainer.system.num_parameters():,} parameters, {documents} documents a "
              f"step, {recipe.precision}, {device}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, "
              f"load {os.getloadavg()[0]:.1f}")
        peak = matmul_peak(device, recipe.precision)
        with contextlib.closing(trainer.feed()) as feed:
            flops = model_flops(trainer, first := next(feed))
            per_token = flops / max(sum(b.num_tokens for b in first.batches), 1)
            timed(trainer, feed, args.warm_up)
            seconds, waits, tokens = timed(trainer, feed, args.steps)
            profiled = breakdown(trainer, feed, args.profiled)
        peak = max(peak, matmul_peak(device, recipe.precision))  # neighbours slow both; the better one is the machine
    step, waited = statistics.median(seconds), statistics.median(waits)
    rate = per_token * statistics.mean(tokens) / step
    print(f"step {step * 1e3:.0f} ms (median of {args.steps}, slowest {max(seconds) * 1e3:.0f}), "
          f"{documents / step:,.0f} documents/s, {statistics.mean(tokens) / step:,.0f} tokens/s")
    print(f"model {rate / 1e9:,.1f} GFLOP/s of a matmul peak of {peak / 1e9:,.1f}: {rate / peak:.1%}")
    print(f"waiting for data {waited * 1e3:.1f} ms a step ({waited / step:.1%})")
    total = sum(ms for _, ms in profiled)
    for kind, ms in profiled:
        print(f"{kind:24} {ms:9.1f} ms {ms / total:6.1%}")


if __name__ == "__main__":
    main()
