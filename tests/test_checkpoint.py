import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training_system as small
import training_worker
from safetensors.torch import load_file

from diptych.config import ConfigError
from diptych.training import checkpoint
from diptych.training.recipe import Stage
from diptych.training.trainer import Trainer

STAGES = [{"name": "head", "steps": 7, "batch": 4, "lr": 1e-2, "only": ["probe", "norm"]},
          {"name": "all", "steps": 14, "batch": 8, "lr": 1e-2, "warmup": 2, "schedule": "cosine", "freeze": ["probe"]}]
CHANGES = {"stages": STAGES, "save_every": 4, "accumulate": 2, "precision": "bf16", "optimizer": {"kind": "muon"}}


def curve(run: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def start(run: Path, changes: dict[str, Any], **options: Any) -> Any:
    """Train in a child process; forked, so that it need not import torch anew."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        process = multiprocessing.get_context("fork").Process(target=training_worker.train, args=(str(run), changes),
                                                              kwargs=options)
        process.start()
    return process


def run_until_finished(attempt: Callable[[int], Any]) -> int:
    """Start again after every kill; `attempt(n)` starts a process and may kill it. Returns how often it died."""
    for deaths in range(100):
        process = attempt(deaths)
        process.join(60)
        if process.exitcode == 0:
            return deaths
        assert process.exitcode == -signal.SIGKILL, f"attempt {deaths} ended with {process.exitcode}"
    raise AssertionError("expected the run to finish in 100 attempts")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    training_worker.train(str(run), CHANGES)
    return run


def assert_same_run(run: Path, reference: Path) -> None:
    assert curve(run) == curve(reference)
    assert [line["step"] for line in curve(run)] == list(range(1, 22))
    for file in ("model/model.safetensors", "step-000021/optimizer.safetensors", "step-000021/ema.safetensors"):
        mine, theirs = load_file(run / file), load_file(reference / file)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine), file
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")], "left-over temporary files"


def test_killed_between_any_two_file_operations_resumes_bit_identical(tmp_path: Path, undisturbed: Path) -> None:
    run, draw = tmp_path / "run", random.Random(5)

    def attempt(deaths: int) -> Any:
        # from a kill before the first checkpoint to ones inside the writing, renaming and removing of checkpoints
        return start(run, CHANGES, kill_at=draw.randrange(3, 30) if deaths < 10 else -1)

    assert run_until_finished(attempt) >= 5
    assert_same_run(run, undisturbed)


def test_killed_at_random_moments_with_data_workers(tmp_path: Path, undisturbed: Path) -> None:
    run, draw = tmp_path / "run", random.Random(os.getpid())
    changes = {**CHANGES, "workers": 2}

    def attempt(deaths: int) -> Any:
        process = start(run, changes)
        if deaths < 4:
            begun = time.monotonic()
            while not (run / "metrics.jsonl").exists() and time.monotonic() - begun < 30:
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 0.3))
            os.kill(process.pid, signal.SIGKILL)
        return process

    run_until_finished(attempt)
    assert_same_run(run, undisturbed)


def test_sigterm_saves_and_a_second_start_goes_on(tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    process = start(run, CHANGES)
    while not checkpoint.latest(run):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 0
    training_worker.train(str(run), CHANGES)
    assert_same_run(run, undisturbed)


def test_incomplete_folders_do_not_count(tmp_path: Path) -> None:
    for name in ("step-000003", ".step-000009", "step-000007"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000003" / "state.json").write_text("{}")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000003"
    assert checkpoint.latest(tmp_path / "absent") is None


def test_keeps_the_newest_and_replaces_the_same_step(tmp_path: Path) -> None:
    for step, value in ((5, 0.0), (10, 1.0), (100, 2.0), (100, 3.0)):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.full((2,), value)}}, {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["step-000010", "step-000100"]
    target = torch.zeros(2)
    checkpoint.load(checkpoint.latest(tmp_path), {"model": {"w": target}})  # type: ignore[arg-type]
    assert target.tolist() == [3.0, 3.0]


def test_loading_checks_names_and_shapes(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, {"model": {"w": torch.zeros(2)}}, {}, keep=1)
    with pytest.raises(ValueError, match="1 missing"):
        checkpoint.load(folder, {"model": {"w": torch.zeros(2), "v": torch.zeros(2)}})
    with pytest.raises(ValueError, match="shape"):
        checkpoint.load(folder, {"model": {"w": torch.zeros(3)}})


def test_resuming_another_recipe_is_refused(tmp_path: Path) -> None:
    Trainer(small.recipe(stages=(Stage(steps=5, batch=4, lr=1e-2),)), tmp_path / "run", system=small.build(),
            streams=small.words, device="cpu").run()
    other = small.recipe(stages=(Stage(steps=5, batch=4, lr=2e-2),))
    with pytest.raises(ConfigError, match=r"stages\.0\.lr"):
        Trainer(other, tmp_path / "run", system=small.build(), streams=small.words, device="cpu").run()
    state = json.loads((tmp_path / "run" / "step-000005" / "state.json").read_text())
    del state["recipe"]["compile"]  # as if that key were newer than the run
    (tmp_path / "run" / "step-000005" / "state.json").write_text(json.dumps(state))
    harmless = small.recipe(stages=(Stage(steps=5, batch=4, lr=1e-2),), log_every=3, keep=5)
    Trainer(harmless, tmp_path / "run", system=small.build(), streams=small.words, device="cpu").run()
