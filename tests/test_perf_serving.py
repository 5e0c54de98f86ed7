"""The measurements of the server, on a tiny model and in this process: every part runs, counts and writes its table."""
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from diptych.serve import Settings
from diptych.serve.run import Server as Served
from tests.serving import make


@pytest.fixture(scope="module")
def tools() -> Iterator[tuple]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "perf"))
    try:
        yield importlib.import_module("serving"), importlib.import_module("clients")
    finally:
        sys.path.pop(0)


@pytest.fixture
def measured(tools, monkeypatch):
    """(parts, sizes) with servers of this process in place of processes."""
    serving, clients = tools

    class Here(clients.Server):
        def __init__(self, model: str, *options: str, port: int = 0) -> None:
            self.began, ready = clients.time.perf_counter(), threading.Event()
            self.server = Served(make(Settings(slots=4)), "127.0.0.1", port, lambda address: ready.set())
            self.thread = threading.Thread(target=self.server.run, daemon=True)
            self.thread.start()
            assert ready.wait(30)
            self.url = self.server.address

        @property
        def ended(self) -> bool:
            return not self.thread.is_alive()

        def tree(self) -> list[int]:
            return [os.getpid()]

        def stop(self, how: signal.Signals = signal.SIGTERM) -> float:
            if how == signal.SIGKILL:  # connections break
                for connection in list(self.server.server_state.connections):
                    self.server.servers[0].get_loop().call_soon_threadsafe(connection.transport.abort)
            self.server.should_exit = True
            self.thread.join(60)
            return 0.0

    monkeypatch.setattr(clients, "Server", Here)
    return serving, serving.Sizes(seconds=0.6, requests=40, starts=1, at_once=8, steps=2)


def test_parts_measure(measured):
    serving, sizes = measured
    lines = serving.load("tiny", sizes)
    assert [row.partition(" (")[0] for row in lines[2:7]] == [f"| {k}" for k in dict.fromkeys(serving.KINDS)]
    assert "times**" in lines[-1] and "Not answered: none" in lines[-1]
    lines = serving.memory("tiny", sizes)
    assert lines[0] == "| after requests | 0 | 8 | 16 | 24 | 32 | 40 |" and "40 of 40 were answered" in lines[-1]
    assert "From the command" in serving.start("tiny", sizes)[0]


def test_slow_clients_stay_and_harm_nobody(measured):
    serving, sizes = measured
    last = serving.slow("tiny", sizes)[-1]
    assert "20 of them were still connected" in last and "not answered: none" in last


def test_every_request_of_a_fault_is_counted(measured):
    serving, sizes = measured
    killed, stopped = ([cell.strip() for cell in line.split("|")[1:-1]] for line in serving.faults("tiny", sizes)[2:4])
    for name, *counts in (killed, stopped):
        every, *ends = map(int, counts)
        assert every == sum(ends) > 0 and ends[-1] == 0, (name, counts)
    assert int(killed[4]) > 0, "some were cut off"


def test_what_is_no_whole_answer_is_silent(tools):
    _, clients = tools
    stream = clients.Ask("stream", "/", {"json": {"stream": True}})
    whole = clients.Ask("answer", "/", {"json": {}})
    delta = 'data: {"choices": [{"delta": {"content": "a "}}]}\n\n'
    for told, status, text, expected in (
            (stream, 200, f"{delta}{delta}data: [DONE]\n\n", ("answered", "a a ")),
            (stream, 200, delta, ("silent", "")),
            (stream, 200, f'{delta}data: {{"error": {{}}}}\n\n', ("error in the stream", "")),
            (whole, 200, "{", ("silent", "")), (whole, 200, "{}", ("silent", "")), (whole, 429, "", ("429", "")),
            (whole, 200, '{"choices": [{"message": {"content": "a"}}]}', ("answered", "a"))):
        assert clients._ended(httpx.Response(status, text=text), told) == expected


def test_a_report_replaces_its_own_sections(tools, tmp_path):
    serving, _ = tools
    page = tmp_path / "page.md"
    begin, end = (mark.format("perf/serving.py load") for mark in serving.BETWEEN)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    serving.Report("here", {"load": ["| new |"]}).write(page)
    assert page.read_text() == f"before\n{begin}\n*here*\n\n| new |\n{end}\nafter\n"
    with pytest.raises(SystemExit, match="marks of slow"):
        serving.Report("here", {"slow": []}).write(page)
