"""Workers in processes: no bit differs from the serial run, and a death has a name and is not the end."""
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import Echo, aligner, differing

from diptych.alignment.workers.crew import Blueprint, Place, WorkerDied
from diptych.alignment.workers.process import ProcessCrew
from diptych.alignment.workers.setup import Workers

BESIDE = {"rollout": "0:0-1", "reward": "1", "learner": "0-1:0"}
BRIEF: dict[str, Any] = {"iterations": 3, "save_every": 1}
needs_two = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="places workers on two cores")


@needs_two
def test_processes_learn_the_same_and_go_on_after_a_death(tmp_path: Path) -> None:
    whole = aligner(tmp_path / "serial", Workers(parts=2), **BRIEF)
    expected = whole.run()
    workers = Workers(backend="process", schedule="pipelined", placement=BESIDE, parts=2, stream=True)
    a = aligner(tmp_path / "run", workers, **BRIEF)
    pids = a.crew.pids()  # type: ignore[attr-defined]
    with pytest.raises(WorkerDied, match=r"worker rollout 1 \(process .*signal 9; fix: .*--resume"):
        a.run(lambda line: os.kill(pids["rollout 1"], signal.SIGKILL) if line["iteration"] == 2 else None)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), "nobody is left behind"
    rest = aligner(tmp_path / "run", Workers(backend="process", schedule="disaggregated", parts=2), **BRIEF)
    lines: list[dict[str, Any]] = []
    found = rest.run(lines.append)
    assert [line["iteration"] for line in lines] in ([2, 3], [3]), "at the newest checkpoint that there was"
    assert not differing(dict(expected.named_parameters()), dict(found.named_parameters()))
    told = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("serial", "run")]
    for one, two in zip(*told, strict=True):
        for key in ("iteration", "reward draw", "loss", "grad_norm", "gaps", "answers"):
            assert one[key] == two[key], key
    assert {"rollout 0", "reward 0", "learner 0"} == set(lines[0]["idle"])
    assert 0 < lines[0]["makespan predicted"] < lines[0]["makespan"]
    for name in ("model/model.safetensors", "timeline.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
    for name in ("model.safetensors", "config.json"):
        one, two = (tmp_path / run / "model" / name for run in ("serial", "run"))
        assert one.read_bytes() == two.read_bytes()


def test_a_crew_works_side_by_side_and_says_what_went_wrong() -> None:
    crew = ProcessCrew({role: [Blueprint(Echo, place=Place(threads=1))] for role in ("one", "two")})
    try:
        start = time.time()
        first = [crew.send("one", "wait", 0.2) for _ in range(4)]
        second = [crew.send("two", "wait", 0.2, p) for p in first]
        assert [p.get() for p in second] == [0.2] * 4
        assert 1.0 <= time.time() - start < 1.5, "five of eight, the others at the same time"
        spans = crew.drain()
        assert len(spans) == 8 and all(0.2 <= s.seconds < 0.4 for s in spans)
        assert torch.equal(crew.send("two", "say", torch.arange(3)).get(), torch.arange(3))
        failed = crew.send("one", "fail")
        with pytest.raises(ArithmeticError, match="of the rollout") as error:
            crew.send("two", "say", failed).get()
        assert "in worker one 0" in error.value.__notes__[0]
        with pytest.raises(WorkerDied, match=r"worker two 0 .* to go on with die, got its end: exit code 3"):
            crew.send("two", "die").get()
        with pytest.raises(WorkerDied, match="two 0"):
            crew.send("one", "say", 1)
    finally:
        crew.close()


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(ValueError, match="a broken one"):
        ProcessCrew({"one": [Blueprint(Echo, {"broken": True})]})
