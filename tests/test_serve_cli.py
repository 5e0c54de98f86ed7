"""`diptych serve`: wrong options are told at once; a real process answers, finishes what runs when stopped, ends."""
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

import diptych
from diptych.cli import serve, studio
from diptych.systems.io import save_system
from tests.serving import tiny

ROOT = Path(diptych.__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_system(tiny(), folder)
    return folder


def test_wrong_options_are_told_before_anything_is_read(diptych_run, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "load", lambda *_: pytest.fail("expected no model to be read"))
    (tmp_path / "keys").write_text("me:short")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for told, argv in (("did you mean 'mini'", ("--model", "minni")), ("NAME=FOLDER", ("--model", "=x")),
                           ("name of its own", ("--model", "mini", "--model", "mini")),
                           ("16 characters", ("--api-keys", tmp_path / "keys")),
                           ("gone: No such file", ("--api-keys", tmp_path / "gone")),
                           ("module:function", ("--policy", "x")), ("a module", ("--policy", "no_such_module:x")),
                           ("a free port", ("--port", taken.getsockname()[1])), ("0 to 65535", ("--port", "70000")),
                           ("positive", ("--slots", "0")), ("invalid choice", ("--log-level", "loud"))):
            code, _, err = diptych_run("serve", *argv)
            assert code == 2 and told in err, (argv, err)


def test_names_of_models(folder):
    assert serve.named_models(["mini", f"mine={folder}"]) == {"mini": "mini", "mine": str(folder)}


def test_a_missing_package_names_the_extra(diptych_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = diptych_run("serve")
    assert code == 2 and "diptych[serve]" in err


def test_a_process_serves_and_stops(folder, tmp_path):
    log = (tmp_path / "log").open("w+")
    argv = [sys.executable, "-m", "diptych", "serve", "--model", f"mine={folder}", "--port", "0", "--slots", "2",
            "--grace", "600"]  # a busy machine is slow
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    answers: list[httpx.Response] = []
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"mine on (http://127\.0\.0\.1:\d+) after [\d.]+ s\n", line)
        assert found, line + (tmp_path / "log").read_text()
        url = found[1]
        stranger = httpx.get(f"{url}/v1/models", headers={"host": "evil.example"}, timeout=60)
        assert stranger.status_code == 403, "a page that points its own name here"
        body = {"prompt": "a red circle", "num_inference_steps": 100, "seed": 1}
        asking = threading.Thread(target=lambda: answers.append(
            httpx.post(f"{url}/v1/images/generations", json=body, timeout=600)))
        asking.start()
        while 'diptych_running{model="mine"} 1.0' not in httpx.get(f"{url}/metrics", timeout=60).text:
            assert asking.is_alive()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        asking.join(600)
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
        log.close()
        if process.stdout is not None:
            process.stdout.close()
    assert [a.status_code for a in answers] == [200], "what ran was finished"
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(entry.startswith("{") for entry in lines) and any('"kind": "image_generation"' in e for e in lines)


def test_the_studio_opens_when_it_is_ready(diptych_run, monkeypatch):
    opened, told = [], {}
    monkeypatch.setattr(studio.webbrowser, "open", lambda address: opened.append(address))
    monkeypatch.setattr(serve, "run", lambda args, ready=None: told.update(vars(args), ready=ready) or 0)
    assert diptych_run("studio", "--port", "0")[0] == 0 and told["no_studio"] is False
    told["ready"]("http://127.0.0.1:1")
    for thread in threading.enumerate():
        if thread.name == "diptych-browser":
            thread.join(10)
    assert opened == ["http://127.0.0.1:1"]
    assert diptych_run("studio", "--no-open")[0] == 0 and told["ready"] is None
    assert diptych_run("studio", "--no-studio")[0] == 2
