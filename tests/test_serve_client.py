"""The server against clients that know nothing of it: OpenAI's own, one made from its specification, a hostile one."""
import asyncio
import base64
import importlib
import io
import logging
import sys
from pathlib import Path

import numpy as np
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from PIL import Image as Pil

from diptych.cli import common
from diptych.cli.caption import REQUEST
from diptych.cli.draw import drawing
from diptych.data.images import decode_image, fit_to_model
from diptych.document import Document, Image, Text
from diptych.serve import Settings, create_app
from diptych.serve.auth import Keys
from diptych.serve.run import running
from tests.serving import Local, data_url, make, pixels, tiny

KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def mini():
    from diptych.adapters.published import open_model

    return open_model(common.find_model("mini"))


@pytest.fixture(scope="module")
def client(mini):
    app = create_app({"mini": mini, "tiny": tiny()}, Settings(), keys=Keys({"me": KEY}))
    with running(app) as server, openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def image_part(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def test_models_and_errors(client):
    assert [m.id for m in client.models.list()] == ["mini", "tiny"]
    assert client.models.retrieve("mini").owned_by == "diptych"
    with pytest.raises(openai.NotFoundError, match="mini"):
        client.models.retrieve("minni")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.images.generate(model="tiny", prompt="x", size="9x9")  # type: ignore[call-overload]
    assert wrong.value.param == "size" and wrong.value.code == "invalid_value" and wrong.value.request_id
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=client.base_url, api_key="no") as stranger:
        stranger.models.list()


def test_the_bundled_model_draws_sees_and_answers(client, mini):
    """A real model, end to end: what it drew it also recognises, and all is what the library gives."""
    drawn = client.images.generate(model="mini", prompt="a large red circle", extra_body={"seed": 1})
    made = mini.generate([drawing("a large red circle", plan=True)], seeds=1)[0]
    assert np.array_equal(pixels(drawn.data[0].b64_json), made.of(Image)[-1].to_uint8())
    data = base64.b64decode(drawn.data[0].b64_json)
    asked = {"model": "mini", "messages": [{"role": "user", "content": [image_part(data), {"type": "text",
                                                                                           "text": REQUEST}]}]}
    said = client.chat.completions.create(**asked)
    picture = fit_to_model(decode_image(data), mini.config)
    told = mini.generate([Document((picture, Text(text=REQUEST), Text(role="assistant", target=True)))])[0]
    content = said.choices[0].message.content
    assert content == told.pieces[-1].text and "red circle" in content and said.choices[0].finish_reason == "stop"
    assert said.usage.completion_tokens == len(mini.vocabulary.encode(content))
    deltas = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in deltas if c.choices) == content
    assert len(deltas) > 5 and deltas[-1].usage == said.usage and said.recipe["model"] == "mini"


def test_pictures_in_chats(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "draw"}], "seed": 1,
             "modalities": ["text", "image"]}
    message = client.chat.completions.create(**asked).choices[0].message
    chunks = [c.choices[0].delta for c in client.chat.completions.create(**asked, stream=True)]
    assert [i for d in chunks for i in getattr(d, "images", None) or ()] == message.images
    assert pixels(message.images[0]["image_url"]["url"]).shape == (64, 64, 3)
    again = [*asked["messages"], message.model_dump(exclude_none=True), {"role": "user", "content": "bigger"}]
    assert client.chat.completions.create(model="tiny", messages=again).usage.prompt_tokens > 16


def test_drawing_and_editing(client):
    told = list(client.images.generate(model="tiny", prompt="x", stream=True, partial_images=1,
                                       extra_body={"seed": 3, "num_inference_steps": 4}))
    assert [e.type for e in told] == ["image_generation.partial_image", "image_generation.completed"]
    assert told[0].partial_image_index == 0 and told[1].usage.output_tokens == 16
    photo, mask = io.BytesIO(), io.BytesIO()
    Pil.new("RGB", (64, 64), "white").save(photo, "PNG")
    Pil.new("RGBA", (64, 64), (0, 0, 0, 255)).save(mask, "PNG")
    photo.name, mask.name = "photo.png", "mask.png"
    kept = client.images.edit(model="tiny", image=[photo], mask=mask, prompt="make it red", extra_body={"seed": 3})
    assert (pixels(kept.data[0].b64_json) == 255).all(), "nothing was to be drawn"
    with pytest.raises(openai.APIError), client.images.generate(model="tiny", prompt="x" * 9000, stream=True) as stream:
        list(stream)


# -- from the specification -------------------------------------------------------------------------------------------

CHECKED = make(Settings(queue=1000))


async def lasting(scope, receive, send) -> None:
    """The application without its own start and stop, which the tests of a specification would repeat at every call."""
    if scope["type"] != "lifespan":
        await CHECKED(scope, receive, send)
        return
    while (kind := (await receive())["type"]) != "lifespan.shutdown":
        await send({"type": f"{kind}.complete"})
    await send({"type": f"{kind}.complete"})


SPECIFICATION = schemathesis.openapi.from_asgi("/openapi.json", lasting)


@pytest.fixture(scope="module", autouse=True)
def started():
    CHECKED.state.context.models.start()
    yield
    CHECKED.state.context.models.close(cancel=True)


@SPECIFICATION.parametrize()
@settings(max_examples=10, suppress_health_check=list(HealthCheck), deadline=None)
def test_the_specification_is_kept(case):
    """Whatever its own schemas allow or forbid: only described statuses, content types and shapes, no error 500."""
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    if isinstance(case.body, dict):
        case.body.update({k: 1 for k in ("n", "num_inference_steps") if isinstance(case.body.get(k), int)
                          and case.body[k] > 1 and case.body[k] <= 8})  # fewer pictures, not other ones
    # What a model can do no schema says: names, sizes in multiples of a stride, the bytes of a picture.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


def test_the_specification_names_every_endpoint_and_key():
    with Local(make(keys=Keys({"me": KEY}))) as local:
        told = local.get("/openapi.json").json()
    assert set(told["paths"]) == {"/health", "/metrics", "/v1/models", "/v1/models/{name}", "/v1/chat/completions",
                                  "/v1/images/generations", "/v1/images/edits", "/v1/models/{name}/alignment",
                                  "/v1/models/{name}/attention/{task}"}
    assert told["security"] == [{"key": []}] and "EditForm" in told["components"]["schemas"]
    assert told["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False


# -- hostile ----------------------------------------------------------------------------------------------------------

def test_malformed_requests_by_the_thousand():
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    try:
        tool = importlib.import_module("fuzz_serve")
    finally:
        sys.path.pop(0)
    quiet = [logging.getLogger(name) for name in ("diptych", "python_multipart")]
    levels = [logger.level for logger in quiet]
    for logger in quiet:
        logger.setLevel(logging.CRITICAL)
    app = make(Settings(max_body=300_000, max_pixels=100_000, queue=1000))
    app.state.context.models.start()
    try:
        statuses, findings = asyncio.run(tool.fuzz(app, 2000, seed=1))
    finally:
        app.state.context.models.close(cancel=True)
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)
    assert not findings, "\n".join(findings[:5])
    drawn = tool.pictures()
    before = [tool.request(n, 1, drawn) for n in range(20)]
    for n in range(20, 400):
        tool.request(n, 1, drawn)
    assert [tool.request(n, 1, drawn) for n in range(20)] == before, "a number makes the same request again"
    assert sum(statuses.values()) == 2000 and statuses[200] > 50 and statuses[400] > 500
    # It finds what it looks for.
    assert tool.wrong({"cut": False, "content": b"", "method": "POST"}, 500, b"{}") == "status 500"
    assert "tells" in tool.wrong({"cut": False, "content": b"", "method": "POST"}, 400, b'{"error": "/root/x"}')
