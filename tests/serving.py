"""What the tests of the server share: tiny models of random weights, and an application spoken to without a network."""
import asyncio
import base64
import dataclasses
import functools
import io
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx
import numpy as np
import torch
from fastapi import FastAPI
from PIL import Image as Pil

from diptych.objectives.next_token import TextSampling
from diptych.serve import Settings, create_app
from diptych.systems.bagel import Bagel

T = TypeVar("T")


@functools.cache
def tiny(tokens: int = 6, steps: int = 3) -> Bagel:
    """Says at most `tokens` tokens and draws in `steps` evaluations."""
    config = Bagel.tiny()
    sampling = dataclasses.replace(config.sampling, evaluations=steps, text=TextSampling(max_tokens=tokens))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        system = Bagel(dataclasses.replace(config, sampling=sampling)).eval()
        torch.nn.init.normal_(system.latent_out.weight, std=0.1)  # a fresh one would draw its noise
    return system


def make(settings: Settings | None = None, **how: Any) -> FastAPI:
    return create_app({"tiny": tiny()}, settings, **how)


class Local:
    """Requests to an application in this process, its engines running: `with Local(app) as local: local.post(...)`."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.loop = asyncio.new_event_loop()

    def __enter__(self) -> "Local":
        self.app.state.context.models.start()
        transport = httpx.ASGITransport(self.app, client=("192.0.2.1", 1))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://testserver")
        return self

    def __exit__(self, *error: object) -> None:
        self.run(self.client.aclose())
        self.app.state.context.models.close(cancel=True)
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def send(self, method: str, path: str, **how: Any) -> httpx.Response:
        return self.run(self.client.request(method, path, **how))

    def get(self, path: str, **how: Any) -> httpx.Response:
        return self.send("GET", path, **how)

    def post(self, path: str, body: Any = None, **how: Any) -> httpx.Response:
        return self.send("POST", path, **({"json": body} if body is not None else {}), **how)

    def chat(self, *content: Any, **how: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": list(content)}], **how})

    def draw(self, prompt: str = "a red circle", **how: Any) -> httpx.Response:
        return self.post("/v1/images/generations", {"prompt": prompt, **how})


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def shown(data: bytes, kind: str = "png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data, kind)}}


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int = 64, height: int = 64, seed: int = 0, mode: str = "RGB", how: str = "PNG") -> bytes:
    channels = {"RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Pil.fromarray(pixels).save(buffer, how)
    return buffer.getvalue()


def pixels(text: str) -> np.ndarray:
    """Of base64, or of a data URL."""
    return np.asarray(Pil.open(io.BytesIO(base64.b64decode(text.rpartition(",")[2]))))


def events(text: str) -> list[tuple[str, Any]]:
    """(name, data) of server-sent events."""
    out = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if "data" in lines:
            out.append((lines.get("event", ""), json.loads(lines["data"]) if lines["data"] != "[DONE]" else None))
    return out
