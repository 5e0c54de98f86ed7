"""Under load: full queues, clients that leave, requests that fail, servers that stop."""
import asyncio
import contextlib
import json
import threading
import time

import httpx
import pytest

from diptych.document import Document, Text
from diptych.serve import Settings
from diptych.serve.run import running
from tests.serving import Local, make, tiny, words

ASK = {"messages": [{"role": "user", "content": "hello"}], "seed": 1}


@contextlib.contextmanager
def held(app):
    """The model of an application waits before every batch until it is let go."""
    served = app.state.context.models.find(None)
    gate, entered, run = threading.Event(), threading.Event(), served.system.run

    def waits(works):
        entered.set()
        gate.wait(30)
        return run(works)

    served.system.run = waits
    try:
        yield served.engine, gate, entered
    finally:
        gate.set()
        del served.system.run


def until(check, seconds: float = 30.0) -> None:
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < seconds, "expected it sooner"
        time.sleep(0.01)


def test_a_full_queue_says_when_to_come_again():
    app = make(Settings(slots=1, queue=1))
    with Local(app) as local, held(app) as (engine, gate, _):
        async def crowd():
            posts = [asyncio.ensure_future(local.client.post("/v1/chat/completions", json=ASK)) for _ in range(2)]
            await asyncio.to_thread(until, lambda: engine.running and engine.waiting)
            late = await local.client.post("/v1/chat/completions", json=ASK)
            several = await local.client.post("/v1/images/generations", json={"prompt": "x", "n": 5})
            gate.set()
            return late, several, [await p for p in posts]

        late, several, done = local.run(crowd())
        error = late.json()["error"]
        assert late.status_code == 429 and error["code"] == "queue_full" and int(late.headers["retry-after"]) >= 1
        assert several.status_code == 400 and several.json()["error"]["param"] == "n", "would never fit"
        assert [d.status_code for d in done] == [200, 200]
        assert local.post("/v1/chat/completions", ASK).status_code == 200


def test_the_estimate_rests_on_what_was_measured():
    with Local(make(Settings(slots=4))) as local:
        served = local.app.state.context.models.find(None)
        assert served.estimate(1) == 1
        served.seconds.extend([10.0, 30.0])
        assert served.estimate(1) == 5 and served.estimate(8) == 40 and served.estimate(10_000) == 600


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream):
    app = make(Settings(slots=1, queue=4))
    with running(app) as server, held(app) as (engine, gate, entered):
        with contextlib.suppress(httpx.TimeoutException), httpx.Client(base_url=server.address) as client:
            body = {"prompt": "a red circle", "num_inference_steps": 50, "stream": stream}
            client.post("/v1/images/generations", json=body, timeout=1.0)
        assert entered.is_set() and len(engine.running) == 1
        [left] = engine.running
        until(lambda: left.cancelled)
        gate.set()
        until(lambda: not engine.running)
        assert left.future.exception() is not None and httpx.post(
            f"{server.address}/v1/chat/completions", json=ASK, timeout=60).status_code == 200
        text = httpx.get(f"{server.address}/metrics").text
        assert 'diptych_cancelled_total{model="tiny"} 1.0' in text
        assert 'diptych_requests_total{path="/v1/images/generations",status="499"} 1.0' in text


def test_a_request_that_fails_harms_no_other(monkeypatch):
    app = make()
    with Local(app) as local:
        system, program = tiny(), tiny().program

        def fragile(document, *rest):
            if "poison" in document.pieces[0].text:
                raise RuntimeError("broken")
            return program(document, *rest)

        monkeypatch.setattr(system, "program", fragile)

        async def together():
            return await asyncio.gather(*[local.client.post("/v1/chat/completions", json={
                "messages": [{"role": "user", "content": text}], "seed": 1}) for text in ("hello", "poison", "hello")])

        one, bad, two = local.run(together())
        assert bad.status_code == 500 and one.status_code == two.status_code == 200
        assert one.json()["choices"] == two.json()["choices"]
        assert local.draw(n=2, seed=1).status_code == 200


def test_answers_overtake_pictures_that_take_long():
    app = make(Settings(slots=2, queue=16))
    with Local(app) as local:
        async def mixed():
            long = {"prompt": "a red circle", "num_inference_steps": 30}
            order: list[str] = []

            async def ask(name, path, body):
                answer = await local.client.post(path, json=body)
                order.append(name)
                return answer.status_code

            pictures = [asyncio.ensure_future(ask("picture", "/v1/images/generations", long)) for _ in range(3)]
            await asyncio.sleep(0.1)
            texts = [asyncio.ensure_future(ask("text", "/v1/chat/completions", ASK)) for _ in range(3)]
            return await asyncio.gather(*pictures, *texts), order

        codes, order = local.run(mixed())
        assert codes == [200] * 6 and order[:3] == ["text"] * 3 and order[3:] == ["picture"] * 3


def test_stopping_finishes_what_runs():
    app = make(Settings(slots=1, grace=30))
    answers: list[httpx.Response] = []
    with running(app) as server, held(app) as (engine, gate, _):
        url = f"{server.address}/v1/chat/completions"
        asking = [threading.Thread(target=lambda: answers.append(httpx.post(url, json=ASK, timeout=60)))
                  for _ in range(2)]
        for thread in asking:
            thread.start()
        until(lambda: len(engine.running) + len(engine.waiting) == 2)
        server.should_exit = True
        until(lambda: not server.servers[0].is_serving())
        with pytest.raises(httpx.TransportError):
            httpx.post(url, json=ASK, timeout=5)
        assert not answers
        gate.set()
        for thread in asking:
            thread.join(60)
    assert [a.status_code for a in answers] == [200, 200], "one ran, one waited"
    with pytest.raises(RuntimeError, match="closing"):
        engine.submit(Document((Text(target=True),)))


def test_a_closing_engine_is_told():
    with Local(make()) as local:
        local.app.state.context.models.close()
        answer = local.post("/v1/chat/completions", ASK)
        assert answer.status_code == 503 and answer.headers["retry-after"] and "shutting down" in answer.text


def test_a_reader_that_takes_nothing_is_let_go():
    app = make(Settings(send_seconds=0.2))
    with Local(app) as local:
        async def deaf():
            body = json.dumps({**ASK, "stream": True}).encode()
            sent: list[dict] = []

            async def receive():
                if body and not sent:
                    sent.append({})
                    return {"type": "http.request", "body": body, "more_body": False}
                await asyncio.sleep(60)
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)
                if message["type"] == "http.response.body":
                    await asyncio.sleep(60)

            scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/chat/completions",
                     "raw_path": b"", "query_string": b"", "root_path": "", "scheme": "http", "server": ("x", 80),
                     "client": ("192.0.2.1", 1), "headers": [(b"content-type", b"application/json"), (b"host", b"x")]}
            await asyncio.wait_for(app(scope, receive, send), 20)
            return sent

        sent = local.run(deaf())
        assert [m.get("type") for m in sent[1:3]] == ["http.response.start", "http.response.body"]
        until(lambda: not local.app.state.context.models.find(None).engine.running)
        assert 'status="200"' in local.get("/metrics").text and local.chat(words("hello")).status_code == 200
