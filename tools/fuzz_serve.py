"""Malformed requests by the thousand against the server, in this process: no crash, no status 500, no path told.

    python tools/fuzz_serve.py 100000 --seed 0 --jobs 2

Every request is a mutation of a good one: of its JSON (types, numbers, depth, surrogates, keys), of its bytes, of the
pictures in it (PNG, JPEG, WebP, GIF, SVG cut, flipped, lying about their size), of its form, of its headers. The model
is tiny and of random weights. A finding is printed with the number that makes it again (`--only NUMBER`).
"""
import argparse
import asyncio
import base64
import copy
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
# Folders of this machine, wherever it keeps them, and what tracebacks look like.
FOLDERS = {ROOT, Path(sys.prefix), Path(sys.base_prefix), Path.home(), Path(tempfile.gettempdir()), Path("/usr")}
LEAKS = (*sorted(f"{folder}/" for folder in FOLDERS if folder != Path("/")), "site-packages", "Traceback", ".py\"",
         "Error(")
STATUSES = {200, 400, 401, 403, 404, 405, 408, 413, 415, 429, 431, 503}
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**100, 1e308, -1e308, 0.1, 1e-320, "", " ", "\x00",
    "a" * 5000, "\u202e\u0301" * 50, "\U0001f600" * 100, "../../etc/passwd", "/etc/passwd", "file:///etc/passwd",
    "{}", "%s%n",
    "http://127.0.0.1/", "data:image/png;base64,", "data:image/png;base64,AAAA", "data:image/svg+xml;base64,PHN2Zy8+",
    "data:,x", "<|im_start|>system", "<|vision_start|><|vision_end|>", "<loc_0>", [], {}, [[]], [None], [{}],
    {"": None}, {"a": {"b": {}}}, [0] * 100, ["x"] * 100, {"type": "text"}, {"url": None}, "0x0", "1x1", "64x64",
    "99999x99999",
    "auto", "NaN", "Infinity", "\u0661\u0662", "1e5", "system", "assistant", "text", "image", "boxes", "diptych",
    "image_url"]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, '"\\ud800"', '"\\udfff\\ud800"', "[" * 3000,
       '{"a":' * 500, "nul", "'x'", "1.", "01", '"\\x"', "\ufeff", "/*", '"\x01"', "--1", "[1,]", "{,}"]
HEADERS = [("content-type", "text/plain"), ("content-type", "application/json; charset=utf-16"),
           ("content-length", "-1"), ("content-length", "99999999999"), ("host", "\x80"), ("host", "[::"),
           ("origin", "null"), ("origin", "http://x"), ("authorization", "Bearer \xff"), ("x-request-id", "a\tb"),
           ("accept", "\x00"), ("content-encoding", "gzip"), ("transfer-encoding", "chunked"),
           ("expect", "100-continue"), ("x-forwarded-for", "127.0.0.1"),
           ("content-type", "multipart/form-data; boundary="),
           ("content-type", "multipart/form-data; boundary=" + "b" * 300)]
METHODS = ["PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "XYZ"]
PATHS = ["/", "/ledger", "/ledger/", "/ledger/../x", "/health", "/metrics/", "/openapi.json", "/docs", "/\xff",
         "/v1//models", "/v1/models/", "/v1/models/../x", "/v1/models/tiny/attention/draw",
         "/v1/models/tiny/attention/", "/v1/models/tiny/alignment"]
SVG = (b'<svg xmlns="http://www.w3.org/2000/svg" width="24" height="24"><defs><g id="a"><rect width="9" height="9" '
       b'fill="red"/></g></defs><use href="#a"/><path d="M0 0L9 9" style="fill:red"/></svg>')


def pictures() -> list[tuple[str, bytes]]:
    import numpy as np
    from PIL import Image as Pil

    array = np.random.default_rng(0).integers(0, 256, (24, 24, 4), dtype=np.uint8)
    out = []
    for how, mode in (("PNG", "RGB"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("WEBP", "RGBA"), ("GIF", "RGB"),
                      ("BMP", "RGB"), ("TIFF", "RGB")):
        buffer = io.BytesIO()
        Pil.fromarray(array).convert(mode).save(buffer, how)
        out.append((how.lower(), buffer.getvalue()))
    return [*out, ("svg+xml", SVG)]


def damaged(data: bytes, kind: str, rng: random.Random) -> bytes:
    """A picture with something wrong."""
    how = rng.randrange(9)
    out = bytearray(data)
    if how == 0:
        return data[: rng.randrange(len(data))]
    if how == 1:
        for _ in range(rng.randrange(1, 20)):
            out[rng.randrange(len(out))] = rng.randrange(256)
    elif how == 2:
        place = rng.randrange(len(out))
        out[place:place] = rng.randbytes(rng.randrange(1, 200))
    elif how == 3:
        place = rng.randrange(len(out))
        del out[place: place + rng.randrange(1, 64)]
    elif how == 4 and kind == "png":
        side = rng.choice([0, 1, 2**15, 2**31 - 1, 2**32 - 1])
        head = b"IHDR" + struct.pack(">II", side, rng.choice([side, 1, 24])) + bytes(
            [rng.choice([1, 2, 4, 8, 16, 7]), rng.randrange(8), 0, 0, rng.randrange(2)])
        out[8:33] = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    elif how == 5 and kind == "png":
        text = b"zTXtk\0\0" + zlib.compress(b"x" * rng.choice([10, 5_000_000]))
        out[33:33] = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    elif how == 6 and kind == "svg+xml":
        return data.replace(rng.choice([b"red", b"#a", b"rect", b"24", b"svg", b">"]), rng.choice(
            [b"url(file:///etc/passwd)", b"http://127.0.0.1/#a", b"script", b"1e9", b"<!DOCTYPE svg [<!ENTITY a 'b'>]>",
             b"&a;", b"\0", b"\xff", b"use", b"image", b"-1", b"NaN", b"<g>" * 100, b"x:y"]))
    elif how == 7:
        return rng.randbytes(rng.randrange(0, 2000))
    else:
        return data + out[: rng.randrange(len(out))]
    return bytes(out)


def good(rng: random.Random, drawn: list[tuple[str, bytes]]) -> tuple[str, dict[str, Any]]:
    """A request that is fine."""
    kind, data = rng.choice(drawn)
    if rng.random() < 0.5:
        data = damaged(data, kind, rng)
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    chat = {"model": "tiny", "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what is it ?"},
                                     {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
                                     {"type": "diptych", "diptych": {"kind": "boxes", "boxes": [[0.1, 0.1, 0.5, 0.5]],
                                                                     "labels": ["a"]}}]},
        {"role": "assistant", "content": "a star", "images": [{"type": "image_url", "image_url": {"url": url}}]},
        {"role": "user", "content": "and ?"}], "seed": 1, "n": 1, "temperature": 0.5, "max_tokens": 1, "stream": False,
        "modalities": ["text"], "stream_options": {"include_usage": True}, "top_p": 0.5}
    draw = {"prompt": "a red circle", "n": 1, "size": "32x32", "seed": 1, "num_inference_steps": 1,
            "guidance_scale": 2.0, "negative_prompt": "a star", "response_format": "b64_json", "stream": False,
            "partial_images": 1, "plan": False,
            "boxes": [{"label": "a", "box": [0.1, 0.1, 0.5, 0.5]}], "output_format": "png", "output_compression": 50}
    return rng.choice([("/v1/chat/completions", chat), ("/v1/images/generations", draw)])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for k, v in inside for p in places(v, (*path, k))]


def strange(rng: random.Random) -> Any:
    """One that is the request's own: what is changed in it later must not be in the requests that follow."""
    return copy.deepcopy(rng.choice(STRANGE))


def mutated(value: dict[str, Any], rng: random.Random) -> str:
    """Its JSON, or what is left of it."""
    value = copy.deepcopy(value)
    raw = ""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        spots = places(value)
        if not spots:
            break
        *way, last = rng.choice(spots)
        holder: Any = value
        for key in way:
            holder = holder[key]
        how = rng.randrange(7)
        if how == 0:
            del holder[last]
        elif how == 1 and isinstance(holder, dict):
            holder[rng.choice(["", "x", "model ", "__class__", "prompt\x00", "a" * 300])] = strange(rng)
        elif how == 2:
            holder[last] = [copy.deepcopy(holder[last])] * rng.choice([2, 20])
        elif how == 3 and not raw:
            raw, holder[last] = rng.choice(RAW), "@RAW@"
        elif how == 4:
            deep: Any = holder[last]
            for _ in range(rng.choice([2, 20, 60])):
                deep = rng.choice([[deep], {"a": deep}])
            holder[last] = deep
        else:
            holder[last] = strange(rng)
    return json.dumps(value).replace('"@RAW@"', raw or '"@RAW@"')


def name_in_path(rng: random.Random) -> str:
    """Of a model or a task, or what stands where one should."""
    known = ["tiny", "draw", "plan", "caption", "question", "edit"]
    return str(rng.choice([*known, *known, *STRANGE, "a" * 1000, "..", "%2e%2e%2f", "tiny\x00"]))


def request(number: int, seed: int, drawn: list[tuple[str, bytes]]) -> dict[str, Any]:
    """Request `number`, the same for the same seed."""
    rng = random.Random(f"{seed}-{number}")
    path, body = good(rng, drawn)
    headers = {"content-type": "application/json", "host": "testserver"}
    method = "POST"
    how = rng.random()
    if how < 0.6:
        content = mutated(body, rng).encode("utf-8", "surrogatepass")
    elif how < 0.7:
        raw = bytearray(json.dumps(body).encode())
        for _ in range(rng.randrange(1, 6)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        content = bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.3 else raw)
    elif how < 0.9:
        path = "/v1/images/edits"
        content, headers["content-type"] = form(rng, drawn)
    elif how < 0.95:
        content = json.dumps(body).encode()
        name, value = rng.choice(HEADERS)
        headers[name] = value
    else:
        method = rng.choice(["GET", "GET", "GET", *METHODS])
        path = rng.choice([path, *PATHS, *PATHS, f"/v1/models/{name_in_path(rng)}/attention/{name_in_path(rng)}",
                           f"/v1/models/{name_in_path(rng)}/alignment", f"/v1/models/{name_in_path(rng)}"])
        content = b"" if rng.random() < 0.5 else rng.randbytes(50)
    return {"method": method, "path": path, "headers": headers, "content": content,
            "cut": rng.random() < 0.02, "pieces": rng.choice([1, 1, 1, 7])}


def form(rng: random.Random, drawn: list[tuple[str, bytes]]) -> tuple[bytes, str]:
    boundary = "b0undary"
    parts = []
    for name in rng.choices(["image", "image[]", "mask", "other"], [5, 3, 2, 1], k=rng.choice([0, 1, 1, 2, 3])):
        kind, data = rng.choice(drawn)
        data = damaged(data, kind, rng) if rng.random() < 0.6 else data
        file = rng.choice(["a.png", "../../etc/passwd", "\xff", "", "a\x00b", "a" * 500])
        parts.append(f'form-data; name="{name}"; filename="{file}"\r\nContent-Type: image/{kind}'.encode("latin-1")
                     + b"\r\n\r\n" + data)
    fields: dict[str, Any] = {"prompt": "make it red", "num_inference_steps": "1", "size": "32x32", "seed": "1"}
    for _ in range(rng.choice([0, 1, 2])):
        fields[rng.choice([*fields, "n", "stream", "x", "model", ""])] = rng.choice(STRANGE)
    for name, value in fields.items():
        told = str(value).encode("utf-8", "surrogatepass")
        parts.append(f'form-data; name="{name}"'.encode() + b"\r\n\r\n" + told)
    body = b"".join(b"--" + boundary.encode() + b"\r\nContent-Disposition: " + p + b"\r\n" for p in parts)
    body += b"--" + boundary.encode() + b"--\r\n"
    if rng.random() < 0.3:
        place = rng.randrange(len(body))
        body = rng.choice([body[:place], body[:place] + rng.randbytes(5) + body[place:], body.replace(b"\r\n", b"\n")])
    return body, f"multipart/form-data; boundary={boundary}"


async def ask(app: Any, told: dict[str, Any]) -> tuple[int, bytes]:
    """One request as ASGI: (status, body); -1 if the client left before it had any."""
    content, size = told["content"], max(1, -(-len(told["content"]) // told["pieces"]))
    chunks = [content[i: i + size] for i in range(0, len(content), size)] or [b""]
    over, status, out = asyncio.Event(), -1, bytearray()
    if told["cut"]:
        chunks = chunks[:-1]

    async def receive() -> dict[str, Any]:
        if chunks:
            body = chunks.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(chunks) or told["cut"]}
        if not told["cut"]:
            await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            out.extend(message.get("body", b""))

    path = told["path"]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": told["method"], "path": path,
             "raw_path": path.encode("latin-1", "replace"), "query_string": b"", "root_path": "", "scheme": "http",
             "server": ("testserver", 80), "client": ("192.0.2.1", 1),
             "headers": [(k.encode(), v.encode("latin-1")) for k, v in told["headers"].items()]}
    try:
        await asyncio.wait_for(app(scope, receive, send), 60)
    finally:
        over.set()
    return status, bytes(out)


def wrong(told: dict[str, Any], status: int, body: bytes) -> str | None:
    """What is wrong with an answer."""
    if status not in STATUSES and not (status in (-1, 499) and told["cut"]):
        return f"status {status}"
    text = body.decode("utf-8", "replace")
    found = [leak for leak in LEAKS if leak in text and leak.encode() not in told["content"]]
    if found and status != 200:
        return f"tells {found[0]!r}"
    if status >= 400 and told["method"] != "HEAD":
        error = json.loads(text).get("error", {})
        if set(error) != {"message", "type", "param", "code"}:
            return "an error of another form"
    return None


async def fuzz(app: Any, count: int, seed: int, only: int | None = None, at_once: int = 8, part: int = 0,
               parts: int = 1, watch: Callable[[int], None] | None = None) -> tuple[Counter[int], list[str]]:
    """(how many answers of each status, what was wrong) of the requests `part`, `part + parts`, ... below `count`.
    `watch` is told after each how many there were."""
    drawn, statuses, findings = pictures(), Counter[int](), list[str]()
    numbers = iter(range(part, count, parts) if only is None else [only])

    async def worker() -> None:
        for number in numbers:
            told = request(number, seed, drawn)
            try:
                status, body = await ask(app, told)
                what = wrong(told, status, body)
            except Exception as error:
                status, body, what = -2, b"", f"{type(error).__name__}: {error}"
            statuses[status] += 1
            if watch is not None:
                watch(sum(statuses.values()))
            if what or only is not None:
                asked = f"{told['method']} {told['path']} {told['content'][:300]!r}"
                findings.append(f"{number}: {what}: {asked} -> {status} {body[:300]!r}")

    await asyncio.gather(*[worker() for _ in range(at_once)])
    return statuses, findings


@dataclass(frozen=True)
class Share:
    """What one process found. `memory`: bytes after a tenth of its requests, at the end, and at the highest."""

    statuses: Counter[int]
    findings: list[str]
    memory: tuple[int, int, int]


def share(count: int, seed: int, only: int | None, part: int, parts: int) -> Share:
    """A server of its own and its share of the requests."""
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    from diptych.serve import Settings
    from tests.serving import make

    for name in ("diptych", "python_multipart"):
        logging.getLogger(name).setLevel(logging.ERROR)
    app = make(Settings(max_body=300_000, max_pixels=100_000, queue=1000))
    models = app.state.context.models
    models.start()
    early, at = 0, max(1, count // parts // 10)

    def watch(done: int) -> None:
        nonlocal early
        if done == at:
            early = resident()

    statuses, findings = asyncio.run(fuzz(app, count, seed, only, part=part, parts=parts, watch=watch))
    models.close(cancel=True)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Share(statuses, findings, (early, resident(), highest))


def resident() -> int:
    """Bytes of memory that this process has now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, each with a server and a share")
    args = parser.parse_args()
    jobs = 1 if args.only is not None else max(1, args.jobs)
    began = time.monotonic()
    if jobs == 1:
        shares = [share(args.count, args.seed, args.only, 0, 1)]
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            shares = [f.result() for f in [pool.submit(share, args.count, args.seed, None, part, jobs)
                                           for part in range(jobs)]]
    seconds = time.monotonic() - began
    statuses = sum((s.statuses for s in shares), Counter[int]())
    findings = [line for s in shares for line in s.findings]
    for line in findings[:50]:
        print(line)
    told = ", ".join(f"{status}: {number:,}" for status, number in sorted(statuses.items()))
    early, end, highest = (max(s.memory[i] for s in shares) / 2**20 for i in range(3))
    print(f"{sum(statuses.values()):,} requests in {seconds:.0f} s, {sum(statuses.values()) / seconds:.0f} a second; "
          f"{told}; {len(findings)} findings")
    print(f"memory per process: {early:.0f} MiB after a tenth, {end:.0f} MiB at the end, {highest:.0f} MiB at most")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
