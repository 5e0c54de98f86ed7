"""What the server refuses, before it costs anything: bodies, pictures, callers. Everything is told in one form."""
import asyncio
import io
import json
import logging
import struct
import zlib

import httpx
import pytest
from PIL import Image as Pil

from diptych.serve import Settings, errors, logs
from diptych.serve.auth import Keys, Rate, read_keys
from diptych.serve.errors import ApiError
from diptych.serve.limits import parse
from tests.serving import Local, data_url, make, png, shown, words

KEY, OTHER = "a-key-of-some-length", "another-key-of-a-length"
TIGHT = Settings(max_body=200_000, max_pixels=10_000, max_images=2, context=64)


@pytest.fixture(scope="module")
def local():
    with Local(make(TIGHT)) as local:
        yield local


def refused(answer: httpx.Response, status: int, told: str = "") -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and told in error["message"], error
    assert answer.headers["x-request-id"]
    return error


def test_paths_and_methods_that_do_not_exist(local):
    assert refused(local.get("/nope"), 404)["code"] == "not_found"
    assert refused(local.get("/v1/models/nope"), 404)["code"] == "model_not_found"
    answer = local.get("/v1/chat/completions")
    assert refused(answer, 405)["code"] == "method_not_allowed" and "POST" in answer.headers["allow"]
    for path in ("/docs", "/v1/models/tiny/attention/nope", "/v1/models/nope/alignment",
                 "/v1/models/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/%00"):
        refused(local.get(path), 404)


def test_bodies_that_are_too_large(local):
    big = b'{"prompt": "' + b"x" * 300_000 + b'"}'
    kind = {"content-type": "application/json"}
    assert refused(local.post("/v1/images/generations", content=big, headers=kind), 413)["code"] == "too_large"
    sent = 0

    async def chunks():
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b"x" * 10_000

    refused(local.post("/v1/images/generations", content=chunks(), headers=kind), 413)
    assert sent < 25, "a body without a length is cut off, not swallowed"
    photo = png(300, 300)
    refused(local.post("/v1/images/edits", files=[("image", ("a", photo))], data={"prompt": "x"}), 413)
    assert local.app.state.context.metrics.registry.get_sample_value("diptych_body_bytes") == 0


def test_bodies_that_never_end():
    async def slow():
        yield b"{"
        await asyncio.sleep(60)

    with Local(make(Settings(body_seconds=0.2))) as local:
        kind = {"content-type": "application/json"}
        assert refused(local.post("/v1/chat/completions", content=slow(), headers=kind), 408)["code"] == "timeout"


def test_all_bodies_together_are_limited():
    settings = Settings(max_body=100_000, max_bodies=1)
    with Local(make(settings)) as local:
        gate, here = asyncio.Event(), asyncio.Event()

        async def held():
            yield b" " * 60_000
            here.set()
            await gate.wait()
            yield b"{}"

        async def both():
            kind = {"content-type": "application/json"}
            first = asyncio.ensure_future(local.client.post("/v1/chat/completions", content=held(), headers=kind))
            await here.wait()
            second = await local.client.post("/v1/chat/completions", content=b" " * 60_000, headers=kind)
            gate.set()
            return await first, second

        first, second = local.run(both())
        refused(first, 400)
        assert refused(second, 503)["code"] == "unavailable" and second.headers["retry-after"] == "1"


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b'{"a": NaN}', b'{"a": Infinity}', b"[" * 100_000,
    b'{"a":' * 40 + b"1" + b"}" * 40, b'{"a": ' + b"1" * 5000 + b"}", b'{"a": "\\ud800"}', b'{"\\udc00": 1}',
    b'{"a": [' + b"0," * 100_001 + b"0]}"])
def test_json_that_is_none(body):
    with pytest.raises(ApiError) as error:
        parse(body)
    assert error.value.status_code == 400 and error.value.code == "invalid_json" and len(error.value.detail) < 300


def test_types_that_are_not_json(local):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/json2"):
        refused(local.post("/v1/chat/completions", content=b"{}", headers={"content-type": kind}), 415)
    refused(local.post("/v1/images/edits", content=b"x", headers={"content-type": "multipart/form-data"}), 400)
    refused(local.post("/v1/images/edits", content=b"--a\r\nbroken",
                       headers={"content-type": "multipart/form-data; boundary=a"}), 400)


# -- pictures ---------------------------------------------------------------------------------------------------------

def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels in a few bytes."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"\0" * 1000)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_pictures_that_are_too_large_or_too_many(local):
    for data in (bomb(101, 100), bomb(50_000, 50_000), bomb(2**31 - 1, 2**31 - 1)):
        refused(local.chat(shown(data)), 400, "pixels")
    assert local.chat(shown(png(100, 100))).status_code == 200
    refused(local.chat(shown(png(80, 80)), shown(png(80, 80))), 400, "at most 3600 pixels")
    refused(local.chat(*[shown(png(8, 8))] * 3), 400, "at most 2 pictures")
    refused(local.draw(size="160x160"), 400, "at most")


def test_formats_that_are_not_for_the_web(local):
    for how in ("TIFF", "TGA", "PPM", "ICO", "PCX"):
        buffer = io.BytesIO()
        Pil.new("RGB", (16, 16)).save(buffer, how)
        refused(local.chat(shown(buffer.getvalue())), 400, "expected an image")
    for how in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        assert local.chat(shown(png(16, 16, how=how))).status_code == 200, how


def test_prompts_that_are_too_long(local):
    assert refused(local.chat(words("a red circle " * 30)), 400, "tokens")["code"] == "context_length_exceeded"
    refused(local.chat(words("x" * 30_000)), 400, "characters")
    refused(local.chat(words("x" * 40_000)), 400, "at most 32000 characters")
    refused(local.draw("a red circle " * 30), 400, "tokens")
    told = local.chat(words("hello"), max_tokens=5000, seed=1).json()["recipe"]["sampling"]["text"]["max_tokens"]
    assert told == 64


# -- callers ----------------------------------------------------------------------------------------------------------

def test_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# who may\nalice:{KEY}\n\n")
    with Local(make(keys=read_keys(file, {"DIPTYCH_API_KEYS": f"bob:{OTHER}"}))) as local:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"},
                        {"authorization": f"Bearer {KEY}x"}, {"authorization": "Bearer "}):
            for path in ("/v1/models", "/metrics", "/nope"):
                answer = local.get(path, headers=headers)
                assert refused(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer" and KEY not in answer.text
        for key in (KEY, OTHER):
            assert local.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert local.get("/health").json()["status"] == "ok"
    assert read_keys(None, {}) is None and Keys({"a": KEY}).name_of(KEY) == "a"
    for text, told in (("alice:short", "16 characters"), (f"a:{KEY}\na:{OTHER}", "twice"), ("# none", "got none")):
        file.write_text(text)
        with pytest.raises(ValueError, match=told):
            read_keys(file, {})


def test_rates_are_per_key():
    with Local(make(Settings(rate=2), keys=Keys({"a": KEY, "b": OTHER}))) as local:
        def ask(key: str) -> httpx.Response:
            return local.get("/v1/models", headers={"authorization": f"Bearer {key}"})

        assert [ask(KEY).headers["x-ratelimit-remaining-requests"] for _ in range(2)] == ["1", "0"]
        late = ask(KEY)
        assert refused(late, 429)["type"] == "rate_limit_error" and 1 <= int(late.headers["retry-after"]) <= 31
        assert ask(OTHER).status_code == 200 and local.get("/health").status_code == 200
    now = [0.0]
    rate = Rate(60, clock=lambda: now[0])
    assert [rate.take("x")[0] for _ in range(61)] == [0.0] * 60 + [1.0]
    now[0] = 2.0
    assert [rate.take("x")[0] for _ in range(3)] == [0.0, 0.0, 1.0]
    for i in range(10_010):
        rate.take(str(i))
    assert len(rate.buckets) <= 10_000


def test_pages_of_other_sites_stay_out():
    with Local(make(Settings(hosts=("127.0.0.1", "testserver"), cors=("https://fine.example",)))) as local:
        assert refused(local.get("/v1/models", headers={"origin": "https://evil.example"}), 403)["code"] == \
            "origin_not_allowed"
        assert refused(local.get("/v1/models", headers={"host": "evil.example"}), 403)["code"] == "host_not_allowed"
        for host in ("testserver@evil.example", "evil.example:80", "", "[::1", "testserver/x"):
            refused(local.get("/v1/models", headers={"host": host}), 403)
        assert local.get("/v1/models", headers={"host": "127.0.0.1:8000"}).status_code == 200
        assert local.get("/v1/models", headers={"origin": "http://testserver"}).status_code == 200
        fine = local.get("/v1/models", headers={"origin": "https://fine.example"})
        assert fine.headers["access-control-allow-origin"] == "https://fine.example"
        asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        assert "access-control-allow-origin" not in local.send("OPTIONS", "/v1/models", headers=asked).headers


# -- what is told -----------------------------------------------------------------------------------------------------

def test_errors_that_nobody_foresaw_tell_a_number(caplog, monkeypatch):
    with Local(make()) as local, caplog.at_level(logging.INFO, "diptych.serve"):
        served = local.app.state.context.models.find(None)
        for broken in (RuntimeError("secret /home/me/weights"), ValueError("secret"), KeyError("secret")):
            def fail(works, broken=broken):
                raise broken

            monkeypatch.setattr(served.system, "run", fail)
            answer = local.chat(words("hello"))
            error = refused(answer, 500)
            number = error["message"].split()[-1]
            assert error["type"] == "server_error" and "secret" not in answer.text and len(number) == 16
            [line] = [r for r in caplog.records if getattr(r, "facts", {}).get("error_id") == number]
            assert line.exc_info is not None and "secret" in logs.JsonLines().format(line)
            streamed = local.chat(words("hello"), stream=True)
            assert streamed.status_code == 200 and "secret" not in streamed.text and "event: error" in streamed.text
        monkeypatch.setattr(served.system, "run", lambda works: 1 / 0)
        monkeypatch.undo()
        assert local.chat(words("hello")).status_code == 200, "others go on"


def test_messages_lose_the_folders_of_paths():
    told = errors.public(ValueError("expected marks in /home/me/models/x/tokenizer.json to write boxes, got none"))
    assert told is not None and told.detail == "expected marks in tokenizer.json to write boxes, got none"
    told = errors.public(ValueError("expected data:image/png;base64 at http://a.b/c/d, got 3/4 of '~/x/y.png'"))
    assert told is not None and told.detail == "expected data:image/png;base64 at http://a.b/c/d, got 3/4 of 'y.png'"
    assert errors.public(ValueError("other")) is None and errors.public(TypeError("expected x")) is None


def test_ids_logs_and_metrics(local, caplog):
    with caplog.at_level(logging.INFO, "diptych.serve"):
        given = local.chat(shown(png(16, 16)), words("hello there"), seed=1, max_tokens=3,
                           temperature=1.0).headers["x-request-id"]
        assert local.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        for odd in ("a" * 65, "a b", "x\u00e9"):
            assert local.get("/health", headers={"x-request-id": odd.encode()}).headers["x-request-id"] != odd
    lines = [json.loads(logs.JsonLines().format(r)) for r in caplog.records]
    [line] = [x for x in lines if x.get("kind") == "chat"]
    assert line["status"] == 200 and line["model"] == "tiny" and line["tokens_out"] == 3 and line["pictures_in"] == 1
    assert line["path"] == "/v1/chat/completions" and line["seconds"] > 0 and given.startswith("req_")
    assert "hello there" not in json.dumps(lines), "logs keep no content"
    text = local.get("/metrics").text
    for name in ("diptych_requests_total", "diptych_request_seconds_bucket", "diptych_queue_depth",
                 'diptych_work_seconds_count{kind="text",model="tiny"}', "diptych_running", "diptych_errors_total",
                 'diptych_tokens_total{direction="out",model="tiny"}', 'diptych_pictures_total{direction="in"'):
        assert name in text, name
    assert local.get("/health").headers["x-content-type-options"] == "nosniff"


def test_data_urls_are_not_repeated(local):
    answer = local.post("/v1/chat/completions", {"messages": [{"role": "user", "content": data_url(png()), "x": 1}]})
    assert "base64" not in answer.text and refused(answer, 400)["code"] == "unknown_parameter"
