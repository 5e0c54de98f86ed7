"""What a recipe will take, before it runs: parameters, memory, FLOPs, and the time they take at this machine's speed.

`training.rehearse` measures what is counted here. Memory of the training state is exact. FLOPs and activations are
counted on one small real step of every stage and scaled to its batch; a system too large to build here is laid out on
the meta device instead, and its FLOPs are then the usual estimate of 2 per weight and token forward and twice that
backward (an upper bound where tokens are routed).
"""
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diptych.systems.base import System
from diptych.training import objectives
from diptych.training.feed import open_stream
from diptych.training.memory import synchronize
from diptych.training.optim import AdamW
from diptych.training.precision import autocast, dtype_of
from diptych.training.recipe import Precision, Recipe, Stage
from diptych.training.setup import system_config
from diptych.training.stages import fixed_names, trained_names

LARGEST = 1_000_000_000  # parameters that are still built for counting
PROBE = 8  # documents of the counted step


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage; `flops` and `activations` are None where documents cannot be made into tokens here."""

    name: str
    steps: int
    batch: int
    trained: int  # parameters
    optimizer: int  # bytes
    tokens: int | None  # per step
    flops: float | None  # per step, forward and backward
    activations: int | None  # bytes kept for the backward pass of one micro-batch


@dataclass(frozen=True, kw_only=True)
class Plan:
    parameters: dict[str, int]  # by top-level module
    stages: tuple[StagePlan, ...]
    memory: dict[str, int]  # bytes by use, at the hungriest stage
    flops: float | None  # of the whole run
    counted: bool  # False: estimated from the number of parameters
    peak: float  # measured matmul FLOP/s in the recipe's precision

    def seconds(self, utilisation: float = 0.4) -> float | None:
        """Time of the run if it reaches this share of the matmul peak."""
        return None if self.flops is None else self.flops / (self.peak * utilisation)


def plan(recipe: Recipe, device: str | torch.device = "cpu", *, probe: bool = True) -> Plan:
    """Plan a recipe for a device of this machine. Without `probe` no step is run: all is counted on the meta device."""
    device = torch.device(device)
    cls, config = system_config(recipe)
    with torch.device("meta"):
        system = cls(config)
    counted = probe and system.num_parameters() <= LARGEST
    if counted:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            system = cls(config).to(device)
    fixed = fixed_names(system)
    stages = tuple(_plan_stage(system, recipe, stage, fixed, counted) for stage in recipe.stages)
    sizes = {n: p.numel() * p.element_size() for n, p in system.named_parameters()}
    trained = [trained_names(system, s, fixed) for s in recipe.stages]
    memory = {"weights": sum(sizes.values()) + sum(b.numel() * b.element_size() for b in system.buffers()),
              "gradients": max(sum(sizes[n] for n in names) for names in trained),
              "optimizer": max(s.optimizer for s in stages),
              "average": 4 * sum(p.numel() for n, p in system.named_parameters() if n in set().union(*trained))
              if recipe.ema else 0,
              "activations": max((s.activations or 0) for s in stages)}
    parameters: dict[str, int] = {}
    for name, p in system.named_parameters():
        top = name.partition(".")[0]
        parameters[top] = parameters.get(top, 0) + p.numel()
    known = [s.steps * s.flops for s in stages if s.flops is not None]
    return Plan(parameters=parameters, stages=stages, memory=memory, counted=counted,
                flops=sum(known) if len(known) == len(stages) else None, peak=matmul_peak(device, recipe.precision))


def _plan_stage(system: System, recipe: Recipe, stage: Stage, fixed: frozenset[str], counted: bool) -> StagePlan:
    names = trained_names(system, stage, fixed)
    parameters = dict(system.named_parameters())
    for name, p in parameters.items():
        p.requires_grad_(name in names)
    state = AdamW(system, names, recipe.optimizer, stage).tensors()
    facts: dict[str, Any] = {"name": stage.name, "steps": stage.steps, "batch": stage.batch,
                             "trained": sum(parameters[n].numel() for n in names),
                             "optimizer": sum(t.numel() * t.element_size() for t in state.values())}
    stream = open_stream(recipe, stage)
    number = min(PROBE, stage.batch)
    documents = [stream.document(i) for i in range(number)]
    try:
        batch = system.collate(documents)
    except ValueError:
        if counted:
            raise
        return StagePlan(**facts, tokens=None, flops=None, activations=None)  # a published size without its tokenizer
    scale = stage.batch / number
    tokens = getattr(batch, "num_tokens", None)
    whole = None if tokens is None else round(tokens * scale)
    if not counted:
        weights = sum(p.numel() for n, p in parameters.items() if not _is_table(system, n))
        moved = sum(parameters[n].numel() for n in names if not _is_table(system, n))
        flops = None if whole is None else float(whole * (4 * weights + 2 * moved))
        return StagePlan(**facts, tokens=whole, flops=flops, activations=None)
    flops, activations = _count(system, recipe, batch)
    return StagePlan(**facts, tokens=whole, flops=flops * scale,
                     activations=round(activations * scale / recipe.accumulate))


def _count(system: System, recipe: Recipe, batch: Any) -> tuple[float, int]:
    """FLOPs of a forward and backward pass, and the bytes kept between the two."""
    device = system.device
    generator = torch.Generator(device).manual_seed(recipe.seed)
    objective = objectives.make(recipe.objective, system)  # what it does before the first step is not counted
    with FlopCounterMode(display=False) as counter, _kept_bytes(system) as kept:
        with autocast(recipe.precision, device):
            total = objective(system, batch.to(device), generator).total()
        total.backward()
    system.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()), sum(kept.values())


@contextmanager
def _kept_bytes(system: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd keeps inside, parameters aside; each storage once."""
    own = {p.untyped_storage().data_ptr() for p in system.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage is freed and its address counted again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def _is_table(system: nn.Module, name: str) -> bool:
    return isinstance(system.get_submodule(name.rpartition(".")[0]), nn.Embedding)


def matmul_peak(device: torch.device, precision: Precision, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product: the best of several, after one that warms up."""
    side = 1024 if device.type == "cpu" else 8192
    dtype = dtype_of(precision, device)
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, device=device, generator=generator).to(dtype)
    best, spent = float("inf"), 0.0
    for attempt in range(1000):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        took = time.perf_counter() - start
        spent += took
        best = min(best, took) if attempt else best
        if attempt and spent > seconds:
            break
    return 2 * side**3 / best
