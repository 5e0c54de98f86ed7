import multiprocessing
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import training_system as small
import training_worker
from safetensors.torch import load_file

from diptych.training import checkpoint, parallel
from diptych.training.progress import read_lines
from diptych.training.recipe import Stage, load_recipe
from diptych.training.trainer import Trainer

STAGES = [{"name": "a", "steps": 4, "batch": 8, "lr": 1e-2, "freeze": ["blocks"]},
          {"name": "b", "steps": 8, "batch": 8, "lr": 1e-2, "schedule": "cosine"}]
CHANGES: dict[str, Any] = {"stages": STAGES, "accumulate": 2, "save_every": 3}


def rank(number: int, count: int, port: int, run: str, changes: dict[str, Any]) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    training_worker.train(run, changes, parallel=True)


def train_with(count: int, run: Path, changes: dict[str, Any]) -> None:
    """As torchrun does, but forked, so that nothing imports torch anew."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        ranks = [context.Process(target=rank, args=(i, count, port, str(run), changes)) for i in range(count)]
        for process in ranks:
            process.start()
    for process in ranks:
        process.join(100)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * count


def losses(run: Path) -> list[dict[str, float]]:
    return [line["losses"] for line in read_lines(run / "metrics.jsonl")]


def assert_close(a: Path, b: Path, tolerance: float = 1e-4) -> None:
    mine, theirs = losses(a), losses(b)
    assert len(mine) == len(theirs) > 0
    for step, (x, y) in enumerate(zip(mine, theirs, strict=True), 1):
        assert x == pytest.approx(y, abs=tolerance), f"step {step}"


@pytest.mark.parametrize("changes", [{}, {"parallel": {"wrap": ["blocks.*"]}}, {"model": {"sparse": True}}],
                         ids=["whole", "by block", "terms missing on some processes"])
def test_two_processes_give_the_single_process_loss(tmp_path: Path, changes: dict[str, Any]) -> None:
    training_worker.train(str(tmp_path / "one"), CHANGES | changes)
    train_with(2, tmp_path / "two", CHANGES | changes)
    assert_close(tmp_path / "two", tmp_path / "one")
    if "model" in changes:
        assert {len(line) for line in losses(tmp_path / "one")} == {1, 2}
    one, two = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_two_loads_in_one_and_back(tmp_path: Path) -> None:
    """Stop after 6 of 12 steps, go on with another number of processes, compare with the undisturbed run."""
    training_worker.train(str(tmp_path / "one"), CHANGES)
    half = {**CHANGES, "stages": [STAGES[0], {**STAGES[1], "steps": 2}]}
    train_with(2, tmp_path / "half", half)
    folder = checkpoint.latest(tmp_path / "half")
    assert folder is not None and folder.name == "step-000006" and (folder / "shards").is_dir()

    t = Trainer(small.recipe(stages=tuple(Stage(**s) for s in half["stages"]), accumulate=2), tmp_path / "x",
                system=small.build(seed=5), streams=small.words, device="cpu")
    t.load(folder)
    exported = load_file(tmp_path / "half" / "model" / "model.safetensors")
    assert t.ema is not None and t.optimizer is not None
    for name, value in t.ema.shadow.items():
        torch.testing.assert_close(value, exported[name], rtol=0, atol=0)
    assert t.place.step == 6 and float(t.optimizer.tensors()["probe.weight/step"]) == 6
    assert all(bool((v != 0).any()) for n, v in t.optimizer.tensors().items() if "blocks" not in n)

    for first, second in ((2, 1), (1, 2)):
        run = tmp_path / f"{first}-{second}"
        interrupted(run, first)
        if second == 1:
            small_trainer(run).run()
        else:
            train_with(2, run, CHANGES)
        assert_close(run, tmp_path / "one")


def interrupted(run: Path, count: int) -> None:
    """The first checkpoints of a run: the later ones are removed, as if it had stopped there."""
    if count == 1:
        training_worker.train(str(run), {**CHANGES, "keep": 9})
    else:
        train_with(count, run, {**CHANGES, "keep": 9})
    for folder in checkpoint.complete(run):
        if folder.name > "step-000006":
            folder.rename(run / f".{folder.name}")


def small_trainer(run: Path) -> Trainer:
    return Trainer(small.recipe(stages=tuple(Stage(**s) for s in STAGES), accumulate=2, save_every=3), run,
                   system=small.build(), streams=small.words, device="cpu")


def test_a_single_process_never_imports_it(tmp_path: Path) -> None:
    code = ("import sys, training_worker\n"
            f"training_worker.train({str(tmp_path / 'run')!r}, {{'stages': [{{'steps': 2, 'batch': 2, 'lr': 0.1}}]}})\n"
            "sys.exit('diptych.training.parallel' in sys.modules)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_leaves_are_those_a_backward_pass_reaches() -> None:
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    total = ((a * 2 + b.detach()).sum() + a.exp().sum()) * (c * 0).sum()
    assert parallel.leaves(total) == {id(a), id(c)}


@pytest.mark.parametrize("wrong", [{"parallel": {"wrap": ["nothing"]}}, {"lora": {"layers": ["probe"]}}])
def test_what_cannot_be_sharded_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="1, 1"):
        train_with(2, tmp_path / "run", {**CHANGES, **wrong})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_trains_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("""
system: bagel
data: [{world: mini, tasks: {caption: 1, draw: 1}}]
stages: [{steps: 2, batch: 4, lr: 1e-3}]
accumulate: 2
threads: 1
log_every: 1
""")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    two = [*torchrun, "-m", "diptych.training.parallel", str(tmp_path / "recipe.yaml"), str(tmp_path / "two")]
    assert subprocess.run(two, env=environment, cwd=tmp_path).returncode == 0
    Trainer(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "one", device="cpu").run()
    assert_close(tmp_path / "two", tmp_path / "one")
