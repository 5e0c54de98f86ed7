"""Settings of every test run: one thread per worker, reproducible Hypothesis, no network."""
import os
import socket
import sys
from collections.abc import Callable

import pytest
from hypothesis import settings

settings.register_profile("diptych", deadline=None, derandomize=True)
settings.load_profile("diptych")

# Two workers with a full thread pool each only fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Only where a test module has imported torch: tests of the world and the ledger start without it.
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Tests reach this machine only."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"expected no network in tests, got a connection to {address}")
        connect(self, address)  # type: ignore[arg-type]

    socket.socket.connect = local_only  # type: ignore[method-assign]
    config.add_cleanup(lambda: setattr(socket.socket, "connect", connect))


@pytest.fixture
def diptych_run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a `diptych` command in this process: (exit code, standard output, standard error)."""
    from diptych.cli import main

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main.main([str(a) for a in argv])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err
    return run
