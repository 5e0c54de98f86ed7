"""Several processes, one model: FSDP2 shards, losses reduced over all processes, sharded checkpoints.

    torchrun --nproc-per-node 2 -m diptych.training.parallel RECIPE RUN [key=value ...]

Only runs with several processes (and loading what they saved) import this file.
"""
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from diptych.systems.base import Losses, System
from diptych.systems.io import save_system, system_tensors
from diptych.training import checkpoint
from diptych.training.stages import matches


def open_mesh() -> DeviceMesh:
    """The processes that torchrun started, as a one-dimensional mesh: NCCL on GPUs, gloo otherwise."""
    if "WORLD_SIZE" not in os.environ:
        raise RuntimeError("expected to be started by torchrun, got a lone process; fix: torchrun")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo beside NCCL: named counts travel as Python objects without touching the device
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return init_device_mesh(kind, (dist.get_world_size(),))


def shard(system: System, mesh: DeviceMesh, wrap: Sequence[str]) -> None:
    """Shard parameters in place. Modules matching `wrap` are gathered one at a time, the rest together at the start.

    A pattern is a module name, or `name:method` where the module is used through another method than forward.
    """
    for pattern in wrap:
        name, _, method = pattern.partition(":")
        found = [m for n, m in system.named_modules() if n and matches(n, [name]) and not _inside(n, name)]
        if not found:
            raise ValueError(f"expected parallel.wrap to name modules, got {pattern!r} which names none")
        for module in found:
            fully_shard(module, mesh=mesh)
            if method:
                register_fsdp_forward_method(module, method)
    fully_shard(system, mesh=mesh)
    register_fsdp_forward_method(system, "loss")


def reach_together(system: System, total: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same scalar, with a (zero) gradient for every gathered parameter that it reaches on another process.

    Processes reduce gradients together, so where one has no picture in its documents and another has, both must bring
    the same list. Modules that are wrapped apart must be used by every forward pass anyway.
    """
    mine = leaves(total)
    gathered = [p for p in system.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    mask = torch.tensor([id(p) in mine for p in gathered], dtype=torch.int32)
    dist.all_reduce(mask, dist.ReduceOp.MAX, group=mesh.get_group())
    for p, anywhere in zip(gathered, mask.tolist(), strict=True):
        if anywhere and id(p) not in mine:
            total = total + p.flatten()[:1].sum() * 0
    return total


def leaves(total: Tensor) -> set[int]:
    """The ids of the tensors that a backward pass would give gradients to."""
    found, seen, waiting = set(), set(), [total.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of the nodes that accumulate gradients
        if leaf is not None:
            found.add(id(leaf))
        waiting += [n for n, _ in node.next_functions]
    return found


def sum_named(values: Mapping[str, float], mesh: DeviceMesh) -> dict[str, float]:
    """Sum numbers by name over all processes; a name may be absent on some."""
    gathered: list[Any] = [None] * mesh.size()
    dist.all_gather_object(gathered, dict(values), group=mesh.get_group())
    names = dict.fromkeys(k for part in gathered for k in part)  # rank order: the same everywhere
    return {k: sum(part.get(k, 0.0) for part in gathered) for k in names}


def sum_losses(losses: Losses, mesh: DeviceMesh) -> Losses:
    """The losses of all processes together, on the host."""
    sums, counts = ({k: torch.tensor(v) for k, v in sum_named({k: float(x) for k, x in part.items()}, mesh).items()}
                    for part in (losses.sums, losses.counts))
    gathered: list[Any] = [None] * mesh.size()
    dist.all_gather_object(gathered, losses.weights, group=mesh.get_group())
    return Losses(sums, counts, {k: w for part in gathered for k, w in part.items()})


def any_of(flag: Tensor, mesh: DeviceMesh) -> Tensor:
    """Whether a boolean scalar is true on any process."""
    number = flag.to(torch.int32)
    dist.all_reduce(number, dist.ReduceOp.MAX, group=mesh.get_group())
    return number.bool()


# -- checkpoints ------------------------------------------------------------------------------------------------------

def save_shards(run: Path, step: int, tensors: checkpoint.Tensors, state: Mapping[str, Any], keep: int,
                mesh: DeviceMesh) -> None:
    """Every process writes its shards into one hidden folder; the first gives it its name when all have."""
    main = mesh.get_rank() == 0
    if main:
        checkpoint.begin(run, step)
    dist.barrier(mesh.get_group())
    temporary = run / f".step-{step:06d}"
    dcp.save(_flat(tensors), checkpoint_id=temporary / checkpoint.SHARDS)
    dist.barrier(mesh.get_group())
    if main:
        checkpoint.finish(run, step, temporary, state, keep)
    dist.barrier(mesh.get_group())


def load_shards(folder: Path, tensors: checkpoint.Tensors) -> None:
    """Load what any number of processes saved into tensors of any sharding, in place."""
    flat = _flat(tensors)
    reader = dcp.FileSystemReader(folder)
    saved = reader.read_metadata().state_dict_metadata
    checkpoint.check_names(set(flat), set(saved), str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*load in a single process.*")  # that is what is wanted
        dcp.load(flat, storage_reader=reader, no_dist=not dist.is_initialized())


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """This process's view of a full tensor, distributed as `target` is."""
    assert isinstance(target, DTensor)
    return distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)


def export(system: System, folder: Path, mesh: DeviceMesh) -> None:
    """Gather the whole system tensor by tensor; the first process writes it as `save_system` does."""
    main = mesh.get_rank() == 0
    whole: dict[str, Tensor] = {}
    for name, tensor in system_tensors(system).items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if main:
            whole[name] = full.cpu()
    if main:
        save_system(system, folder, whole)
    dist.barrier(mesh.get_group())


def _flat(tensors: checkpoint.Tensors) -> dict[str, Tensor]:
    return {f"{group}/{name}": t.detach() for group, named in tensors.items() for name, t in named.items()}


def _inside(name: str, pattern: str) -> bool:
    """Whether a module lies below the ones the pattern names, rather than being one."""
    return name.count(".") > pattern.count(".")


# -- the entry point of torchrun --------------------------------------------------------------------------------------

def main(arguments: Sequence[str]) -> None:
    from diptych.training.recipe import load_recipe
    from diptych.training.trainer import Trainer

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe_file, run, *overrides = arguments
    mesh = open_mesh()
    try:
        Trainer(load_recipe(recipe_file, overrides), run, mesh=mesh, device=mesh.device_type).run()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
