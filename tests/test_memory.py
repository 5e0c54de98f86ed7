import os
import subprocess
import sys

import pytest

PROBE = """
import os, sys, torch
from diptych.training.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
before = resident()
tensor = torch.empty(32 << 20).fill_(1)  # 128 MiB
del tensor
print(int(kept), resident() - before)
"""


def probe(mode: str) -> tuple[int, int]:
    env = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}  # as the command line sets it
    ran = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True, env=env)
    kept, resident = ran.stdout.split()
    return int(kept), int(resident)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    kept, resident = probe("keep")
    if not kept:
        pytest.skip("no glibc")
    assert resident > 100, "MiB of what was freed stay"
    assert probe("plain")[1] < 28, "and go back to the system otherwise"


GROWS = """
import os, sys, torch
from diptych.training.memory import Kept
kept = Kept()
if not kept.on:
    sys.exit("no glibc")
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def step(sizes):
    held = [torch.ones(n << 18) for n in sizes]  # MiB
    del held
    kept.after_step()
step([40, 40])
need = kept.need
step([600])
assert resident() < need, "given back, as it was far beyond what a step needs"
step([600])
assert kept.need > need, "but a step that needs it from a clean start raises the bound"
step([40, 40])
assert not kept.clean, "and what is below the bound is kept"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_what_is_kept_stays_near_what_a_step_needs() -> None:
    ran = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True,
                         env={**os.environ, "THP_MEM_ALLOC_ENABLE": "1"})
    if "no glibc" in ran.stderr:
        pytest.skip("no glibc")
    assert ran.returncode == 0, ran.stderr
