"""Batches from workers: same order, same content, clear errors, nothing left behind."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diptych.data.loader import DataError, Loader
from diptych.data.mix import Mixture
from diptych.data.sources import BrokenDocument, ListSource
from diptych.document import Document, Text


def _documents(count, name="d"):
    return [Document([Text(text=f"{name}{i}")]) for i in range(count)]


def _mixture(count=23):
    return Mixture([(ListSource(_documents(count), "a"), 2), (ListSource(_documents(7, "e"), "b"), 1)], seed=5)


def _texts(documents):
    return [d.pieces[0].text for d in documents]


def _batch(documents):
    ids = torch.tensor([int(t[1:]) for t in _texts(documents)])
    return {"texts": _texts(documents), "ids": ids, "half": ids.bfloat16(), "empty": torch.zeros(0, 3),
            "mask": (ids % 2 == 0)[None].T, "scalar": ids.sum()}


def _same(a, b):
    def equal(x, y):
        return torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_same_batches_as_inline(workers):
    expected = list(Loader(_mixture(), 4, _batch, start=2, workers=0, stop=12))
    got = list(Loader(_mixture(), 4, _batch, start=2, workers=workers, stop=12))
    assert [s for s, _ in got] == list(range(2, 12))
    assert all(_same(a, b) for (_, a), (_, b) in zip(got, expected, strict=True))


def test_a_resumed_loader_continues_exactly():
    whole = list(Loader(_mixture(), 3, _texts, workers=0, stop=20))
    assert list(Loader(_mixture(), 3, _texts, start=13, workers=1, stop=20)) == whole[13:]


def test_ranks_share_one_global_order():
    whole = [t for _, b in Loader(_mixture(), 8, _texts, workers=0, stop=5) for t in b]
    ranks = [[t for _, b in Loader(_mixture(), 2, _texts, workers=0, stop=5, rank=r, world_size=4) for t in b]
             for r in range(4)]
    assert [ranks[k % 4][k // 4] for k in range(40)] == whole


def test_workers_have_one_thread_and_a_low_priority():
    loader = Loader(_mixture(), 1, lambda _: (torch.get_num_threads(), os.nice(0), os.getpid()), workers=2, stop=2)
    states = [b for _, b in loader]
    assert all(s[0] == 1 and s[1] == min(os.nice(0) + 5, 19) for s in states)
    assert len({s[2] for s in states} | {os.getpid()}) == 3
    deadline = time.monotonic() + 30
    while any(_alive(s[2]) for s in states) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(s[2]) for s in states)


@pytest.mark.slow
def test_spawned_workers():
    got = list(Loader(_mixture(), 2, _texts, workers=1, stop=3, method="spawn"))
    assert got == list(Loader(_mixture(), 2, _texts, workers=0, stop=3))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_name_batch_and_document(workers):
    def collate(documents):
        if "d3" in _texts(documents):
            raise ValueError("bad pixels")
        return documents
    loader = Loader(Mixture([(ListSource(_documents(9), "pets"), 1)]), 2, collate, workers=workers, stop=9)
    with pytest.raises(DataError, match=r"batch \d: ValueError: bad pixels \(document 3 of pets, position \d+\)"):
        list(loader)


def test_an_error_comes_in_its_turn():
    def collate(documents):
        if len(calls) == 2:
            raise ValueError("no")
        calls.append(1)
    calls = []
    steps = []
    with pytest.raises(DataError, match="batch 2"):
        for step, _ in Loader(_mixture(), 1, collate, workers=1):
            steps.append(step)
    assert steps == [0, 1]


def test_a_killed_worker_is_reported():
    def collate(_):
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(DataError, match=r"worker 0 died \(exit code -9\)"):
        list(Loader(_mixture(), 1, collate, workers=1))


class _Half(ListSource):
    def document(self, index):
        if index % 2:
            raise BrokenDocument(f"{self.name}{index}.png", "truncated")
        return super().document(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_skipped_named_and_logged_once(workers, caplog):
    sources = [_Half(_documents(6), "a"), _Half(_documents(6), "b")]
    sources[0].problems.add("c.png", "no caption")
    mixture = Mixture([(sources[0], 1), (sources[1], 3)])
    texts = [t for _, b in Loader(mixture, 3, _texts, workers=workers, stop=16) for t in b]
    assert set(texts) == {"d0", "d2", "d4"} and len(texts) == 48
    broken = {f"{s}{i}.png": "truncated" for s in "ab" for i in (1, 3, 5)}
    assert dict(mixture.problems) == {"c.png": "no caption", **broken}
    for name in mixture.problems.items:
        assert sum(name in r.getMessage() for r in caplog.records) == 1


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see processes")
@pytest.mark.parametrize(("killer", "slow"), [
    (signal.SIGKILL, True), pytest.param(signal.SIGKILL, False, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, False, marks=pytest.mark.slow)])
def test_no_worker_outlives_its_parent(killer, slow):
    script = f"SLOW = {slow}" + """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in whatever a shell starts in the background
from diptych.data.loader import Loader
from diptych.data.mix import Mixture
from diptych.data.sources import ListSource
from diptych.document import Document, Text
mixture = Mixture([(ListSource([Document([Text(text="x")])]), 1)])
seen = []
def collate(documents):  # workers that are busy with a slow batch, or blocked by a full pipe
    seen.append(os.getpid())
    if SLOW and len(seen) > 1:
        time.sleep(60)
    return os.getpid(), b"x" * 1_000_000
batches = iter(Loader(mixture, 1, collate, workers=2))
print(next(batches)[1][0], next(batches)[1][0], flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True)
    try:
        pids = [int(p) for p in parent.stdout.readline().split()]
        assert len(set(pids)) == 2 and all(map(_alive, pids))
        parent.send_signal(killer)
        parent.wait(60)
        deadline = time.monotonic() + 30
        while any(map(_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(_alive, pids))
    finally:
        parent.kill()
        parent.communicate()


def test_leaving_the_loop_stops_the_workers():
    batches = iter(Loader(_mixture(), 1, lambda _: os.getpid(), workers=1))
    _, pid = next(batches)
    assert _alive(pid)
    batches.close()
    assert not _alive(pid)


def test_the_parents_signal_handler_does_not_run_in_workers(tmp_path):
    before = signal.signal(signal.SIGTERM, lambda *_: (tmp_path / str(os.getpid())).touch())
    try:
        batches = iter(Loader(_mixture(), 1, _texts, workers=1))
        next(batches)
        batches.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"workers": -1}, {"rank": 2, "world_size": 2}])
def test_arguments_are_checked(wrong):
    with pytest.raises(ValueError, match="expected"):
        Loader(**{"mixture": _mixture(), "batch_size": 1, "collate": _texts, **wrong})
