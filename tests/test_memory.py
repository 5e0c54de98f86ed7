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
