"""Two replicas on one machine: the answers, limits and endings of a single process, and what happens when one dies."""
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

import diptych
from diptych.cli.draw import drawing
from diptych.document import Document, Image, Text
from diptych.serve.errors import ApiError
from diptych.systems.base import Event
from diptych.systems.io import save_system
from tests.serving import events, pixels, tiny

ROOT = Path(diptych.__file__).parents[1]
LONG = {"prompt": "a red circle", "num_inference_steps": 250, "seed": 1}
SHORT = {"messages": [{"role": "user", "content": "hello"}], "seed": 7}


# -- without Ray ------------------------------------------------------------------------------------------------------

def test_without_ray_the_error_names_the_extra(diptych_run, monkeypatch):
    for name in [n for n in sys.modules if n == "ray" or n.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(os, "environ", {**os.environ})
    for options in (("--replicas", 2), ("--ray-address", "auto")):
        code, _, err = diptych_run("serve", *options)
        assert code == 2 and "diptych[ray]" in err


def test_a_second_attempt_repeats_nothing_and_contradicts_nothing():
    from diptych.serve.replicas import Replay

    told: list[Event | None] = []
    replay = Replay(told.append)
    first = [Event("text", 1, "a ", 1), Event("text", 1, "red ", 2)]
    for event in first:
        replay.tell(event)
    replay.restart()
    for event in (*first, Event("text", 1, "circle", 3)):
        replay.tell(event)
    assert [e.value for e in told if e] == ["a ", "red ", "circle"]
    replay.restart()
    with pytest.raises(ApiError, match="differently"):
        replay.tell(Event("text", 1, "the ", 1))


# -- with Ray ---------------------------------------------------------------------------------------------------------

@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen
    url: str
    log: Path

    def draw(self, **how) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/images/generations", json={**LONG, **how}, timeout=120)

    def chat(self, **how) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json={**SHORT, **how}, timeout=120)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? ([\d.e+]+)$", text, re.MULTILINE))

    def replicas(self) -> list[int]:
        """Process ids below this server."""
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])

        def ours(pid: int) -> bool:
            while pid > 1 and pid != self.process.pid:
                pid = parents.get(pid, 0)
            return pid == self.process.pid

        named = []
        for pid in filter(ours, parents):
            with contextlib.suppress(OSError):
                if b"ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    named.append(pid)
        return named


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Running]:
    pytest.importorskip("ray.serve", reason="replicas need ray: pip install 'diptych[ray]'", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("replicas")
    save_system(tiny(), folder / "model")
    argv = [sys.executable, "-m", "diptych", "serve", "--model", f"tiny={folder / 'model'}", "--port", "0",
            "--replicas", "2", "--slots", "1", "--queue", "3", "--rate", "6000", "--grace", "60"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.match(r"tiny on (http://\S+) after", line)
        assert found, line + (folder / "log").read_text()
        yield Running(process, found[1], folder / "log")
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.stdout.close()


def until(check: Callable[[], object], seconds: float = 60.0) -> None:
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < seconds, "expected it sooner"
        time.sleep(0.05)


def library(steps: int) -> np.ndarray:
    import dataclasses

    sampling = dataclasses.replace(tiny().default_sampling(), evaluations=steps)
    return tiny().generate([drawing("a red circle")], sampling, seeds=1)[0].of(Image)[-1].to_uint8()


def test_answers_are_the_librarys(server):
    assert len(server.replicas()) == 2 and server.metric("diptych_replicas") == 2
    said = tiny().generate([Document((Text(text="hello"), Text(role="assistant", target=True)))], seeds=7)[0].pieces[-1]
    with ThreadPoolExecutor(4) as pool:
        drawn = [pool.submit(server.draw, num_inference_steps=4) for _ in range(2)]
        whole, streamed = pool.submit(server.chat), pool.submit(server.chat, stream=True)
    for answer in drawn:
        [picture] = answer.result().json()["data"]
        assert np.array_equal(pixels(picture["b64_json"]), library(4)), "bit for bit"
    answer = whole.result().json()
    assert answer["choices"][0]["message"]["content"] == said.text and answer["recipe"]["seeds"] == [7]
    deltas = [e["choices"][0]["delta"].get("content") or "" for _, e in events(streamed.result().text) if e]
    assert "".join(deltas) == said.text
    partial = server.draw(num_inference_steps=8, stream=True, partial_images=2)
    assert [name.rpartition(".")[2] for name, _ in events(partial.text)] == ["partial_image"] * 2 + ["completed"]
    wrong = server.draw(boxes=[{"label": "", "box": [0.5, 0.5, 0.1, 0.1]}])
    assert wrong.status_code == 400 and wrong.json()["error"]["param"], "errors are told as ever"


def test_the_rate_of_a_caller_is_one_for_all_replicas(server):
    left = [int(server.chat().headers["x-ratelimit-remaining-requests"]) for _ in range(4)]
    assert left == sorted(left, reverse=True) and left[0] - left[-1] <= 3


def test_a_full_queue_is_one_for_all_replicas_and_those_who_leave_make_room(server):
    async def crowd():
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            posts = [asyncio.ensure_future(client.post("/v1/images/generations", json=LONG)) for _ in range(5)]
            await asyncio.to_thread(until, lambda: server.metric("diptych_queue_depth") == 3)
            assert server.metric("diptych_running") == 2
            late = await client.post("/v1/chat/completions", json=SHORT)
            for post in posts:
                post.cancel()
            await asyncio.gather(*posts, return_exceptions=True)
            return late

    late = asyncio.run(crowd())
    assert late.status_code == 429 and int(late.headers["retry-after"]) >= 1
    began = time.monotonic()
    until(lambda: server.metric("diptych_running") == 0 and server.metric("diptych_queue_depth") == 0)
    # A replica that went on with what nobody waits for would let the next ones wait behind it.
    answers = [server.draw(num_inference_steps=1) for _ in range(4)]
    assert [a.status_code for a in answers] == [200] * 4 and server.metric("diptych_cancelled_total") == 5
    alone = time.monotonic()
    assert server.draw().status_code == 200
    assert alone - began < 5 * (time.monotonic() - alone), "expected the slots at once"


def test_a_replica_that_dies_loses_no_answer_and_is_replaced(server):
    first = server.replicas()
    with ThreadPoolExecutor(5) as pool:
        drawn = [pool.submit(server.draw) for _ in range(3)]
        told = pool.submit(server.draw, stream=True, partial_images=3)
        until(lambda: server.metric("diptych_running") == 2)
        os.kill(first[0], signal.SIGKILL)
        answers = [d.result() for d in drawn]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), library(250))
    names = [name.rpartition(".")[2] for name, _ in events(told.result().text)]
    assert names == ["partial_image"] * 3 + ["completed"], "nothing twice, nothing missing"
    assert server.metric("diptych_replica_lost_total") >= 1 and "replica lost" in server.log.read_text()
    until(lambda: len(server.replicas()) == 2 and first[0] not in server.replicas())
    until(lambda: server.metric("diptych_replicas") == 2)
    with ThreadPoolExecutor(2) as pool:
        assert all(a.status_code == 200 for a in pool.map(lambda _: server.chat(), range(4)))


def test_stopping_finishes_what_runs_and_leaves_no_process(server):
    """Last: it ends the server."""
    pids = server.replicas()
    answers: list[httpx.Response] = []
    asking = [threading.Thread(target=lambda: answers.append(server.draw())) for _ in range(3)]
    for thread in asking:
        thread.start()
    until(lambda: server.metric("diptych_running") == 2 and server.metric("diptych_queue_depth") == 1)
    server.process.send_signal(signal.SIGTERM)
    for thread in asking:
        thread.join(120)
    assert [a.status_code for a in answers] == [200] * 3, "two ran, one waited"
    assert server.process.wait(60) in (0, -signal.SIGTERM)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    lines = server.log.read_text().splitlines()
    assert lines and all(json.loads(line)["event"] for line in lines), "nothing but log lines"
