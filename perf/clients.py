"""A server in a process of its own, and clients that ask it: what `serving.py` measures with."""
import asyncio
import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image as Pil

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("answer", "drawing", "stream", "answer", "edit", "drawing, large")
PATIENCE = 120.0  # seconds after which a request hangs


# -- the server -------------------------------------------------------------------------------------------------------

class Server:
    """`diptych serve` in a process of its own, which has answered nothing yet when this returns."""

    def __init__(self, model: str, *options: str, port: int = 0) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `stop`
        self.began = time.perf_counter()
        argv = [sys.executable, "-m", "diptych", "serve", "--model", model, "--port", str(port), "--log-level",
                "warning", *options]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        found = re.search(r" on (http://\S+) after", self.process.stdout.readline())
        if not found:
            self.log.seek(0)
            raise SystemExit(f"expected a server, got: {self.log.read()[-2000:]}")
        self.url = found[1]

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def memory(self) -> int:
        """Bytes that are resident in the process and those below it; shared ones count in each."""
        return sum(_resident(pid) for pid in self.tree())

    def tree(self) -> list[int]:
        below: dict[int, list[int]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                below.setdefault(parent, []).append(int(folder.name))
        found = [self.process.pid]
        for pid in found:
            found += below.get(pid, [])
        return found

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> float:
        """Seconds until the process has ended."""
        began = time.perf_counter()
        self.process.send_signal(how)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()
        return time.perf_counter() - began


@contextlib.contextmanager
def serving(model: str, *options: str) -> Iterator[Server]:
    server = Server(model, *options)
    try:
        yield server
    finally:
        if not server.ended:
            server.stop()


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


# -- requests ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Ask:
    kind: str
    path: str
    how: dict[str, Any]  # as httpx takes it

    @property
    def streams(self) -> bool:
        return bool(self.how.get("json", {}).get("stream"))


@dataclass(frozen=True)
class Outcome:
    """`end`: answered, a status such as 429, refused, broken, silent. `made`: what was answered."""

    number: int
    kind: str
    began: float
    seconds: float
    end: str
    made: str = ""


class Asks:
    """Request `n` of a mix, always the same. A picture of the world is given where one is needed."""

    def __init__(self, card: Mapping[str, Any], steps: int | None) -> None:
        width, height = map(int, (card["size"] or "64x64").split("x"))
        pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Pil.fromarray(pixels).resize((width, height), Pil.Resampling.NEAREST).save(buffer, "PNG")
        self.png, self.steps = buffer.getvalue(), {} if steps is None else {"num_inference_steps": steps}
        self.large = f"{width * 3 // 2}x{height * 3 // 2}"

    def mixed(self, number: int) -> Ask:
        return self.of(KINDS[number % len(KINDS)], number)

    def small(self, number: int) -> Ask:
        """Short answers, and every fourth time a picture of two steps."""
        ask = self.of("drawing" if number % 4 == 3 else "answer" if number % 4 else "stream", number)
        change = {"num_inference_steps": 2} if ask.kind == "drawing" else {"max_tokens": 4}
        return Ask(ask.kind, ask.path, {"json": ask.how["json"] | change})

    def of(self, kind: str, number: int) -> Ask:
        if kind in ("answer", "stream"):
            url = f"data:image/png;base64,{base64.b64encode(self.png).decode()}"
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it ?"}]
            body = {"messages": [{"role": "user", "content": content}], "seed": number, "stream": kind == "stream"}
            return Ask(kind, "/v1/chat/completions", {"json": body})
        if kind == "edit":
            form = {"prompt": "make the circle blue", "seed": str(number)} | {k: str(v) for k, v in self.steps.items()}
            return Ask(kind, "/v1/images/edits", {"data": form, "files": {"image": ("a.png", self.png, "image/png")}})
        size = {"size": self.large} if kind == "drawing, large" else {}
        body = {"prompt": "a large red circle", "seed": number, **size, **self.steps}
        return Ask(kind, "/v1/images/generations", {"json": body})


async def ask(client: httpx.AsyncClient, number: int, told: Ask) -> Outcome:
    began, made = time.perf_counter(), ""
    try:
        answer = await asyncio.wait_for(client.post(told.path, **told.how), PATIENCE)
        end, made = _ended(answer, told)
    except TimeoutError:
        end = "silent"
    except (httpx.ConnectError, httpx.ConnectTimeout):
        end = "refused"
    except httpx.TransportError:
        end = "broken"
    return Outcome(number, told.kind, began, time.perf_counter() - began, end, made)


def _ended(answer: httpx.Response, told: Ask) -> tuple[str, str]:
    """How, and what was said. An answer that seems whole must be."""
    if answer.status_code != 200:
        return str(answer.status_code), ""
    if told.streams:
        blocks = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
        if any('"error"' in block[:12] for block in blocks):
            return "error in the stream", ""
        if not blocks or blocks[-1] != "[DONE]":
            return "silent", ""
        deltas = [json.loads(block)["choices"] for block in blocks[:-1]]
        return "answered", "".join(d[0]["delta"].get("content") or "" for d in deltas if d)
    try:
        body = answer.json()
        return "answered", (body["choices"][0]["message"]["content"] or "" if "choices" in body else
                            body["data"][0]["b64_json"])
    except (ValueError, LookupError):
        return "silent", ""


async def drive(url: str, asks: Callable[[int], Ask], at_once: int, go_on: Callable[[int], bool],
                watch: Callable[[int], None] | None = None) -> list[Outcome]:
    """`at_once` clients ask one request after the other while `go_on(number)`; `watch` is told how many have ended."""
    ended: list[Outcome] = []
    number = 0
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        async def one() -> None:
            nonlocal number
            while go_on(number):
                mine, number = number, number + 1
                ended.append(await ask(client, mine, asks(mine)))
                if ended[-1].end == "refused":
                    await asyncio.sleep(0.25)  # until there is a server again
                if watch is not None:
                    watch(len(ended))

        await asyncio.gather(*[one() for _ in range(at_once)])
    return ended


def for_seconds(seconds: float) -> Callable[[int], bool]:
    until = time.perf_counter() + seconds
    return lambda number: time.perf_counter() < until


def asks_of(server: Server, steps: int | None) -> Asks:
    """After a first request of each kind: kernels are made and pages touched then."""
    card = httpx.get(f"{server.url}/v1/models", timeout=PATIENCE).json()["data"][0]
    asks = Asks(card, steps)
    for outcome in asyncio.run(drive(server.url, asks.mixed, 1, lambda n: n < len(KINDS))):
        if outcome.end != "answered":
            raise SystemExit(f"expected an answer to a first {outcome.kind}, got {outcome.end}")
    return asks


# -- slow clients ------------------------------------------------------------------------------------------------------

@contextlib.asynccontextmanager
async def dawdlers(server: Server, asks: Asks) -> AsyncIterator[Callable[[], int]]:
    """Ten slow readers, whose pictures are made, and ten slow senders; yields how many the server still bears."""
    stream = {"prompt": "a large red circle", "seed": 1, "n": 8, "stream": True, "partial_images": 3, **asks.steps}
    body = json.dumps(stream).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    ended: list[bool] = []

    async def reads() -> None:
        reader, writer = await _connect(server)
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await _dawdle(writer, lambda: reader.read(1))

    async def sends() -> None:
        _, writer = await _connect(server)
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode())
        left = iter(body)

        async def send() -> bytes:
            writer.write(bytes([next(left)]))
            await writer.drain()
            return b"."

        await _dawdle(writer, send)

    async def _dawdle(writer: asyncio.StreamWriter, step: Callable[[], Awaitable[bytes]]) -> None:
        try:
            while await step():
                await asyncio.sleep(1)
        except OSError:
            pass
        finally:
            ended.append(True)
            writer.transport.abort()

    tasks = [asyncio.ensure_future(one()) for _ in range(10) for one in (reads, sends)]
    await asyncio.sleep(1)
    while await asyncio.to_thread(server.metric, "diptych_running"):
        await asyncio.sleep(0.2)  # their own pictures take time from others as anybody's do
    try:
        yield lambda: len(tasks) - len(ended)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that takes little at a time."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
    return await asyncio.open_connection(sock=sock, limit=2048)
