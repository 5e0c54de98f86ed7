"""Chat completions: the answers are the library's, whole or streamed, in either dialect."""
import dataclasses
import json

import numpy as np
import pytest
import torch

import diptych
from diptych import config
from diptych.data.images import decode_image, fit_to_model
from diptych.document import Boxes, Document, Image, Text
from diptych.systems.base import Sampling
from tests.serving import Local, events, make, pixels, png, shown, tiny, words

SEED = 7


@pytest.fixture(scope="module")
def local():
    with Local(make()) as local:
        yield local


def library(*pieces, seed: int = SEED, **changes) -> Document:
    sampling = dataclasses.replace(tiny().default_sampling(), **changes)
    return tiny().generate([Document(pieces)], sampling, seeds=seed)[0]


def given(data: bytes) -> Image:
    return fit_to_model(decode_image(data), tiny().config)


def test_an_answer_is_the_librarys(local):
    photo = png(90, 120)
    answer = local.chat(shown(photo), words("what is it ?"), seed=SEED).json()
    made = library(given(photo), Text(text="what is it ?"), Text(role="assistant", target=True))
    [choice] = answer["choices"]
    assert choice["message"]["content"] == made.pieces[-1].text and choice["message"]["role"] == "assistant"
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny" and choice["index"] == 0
    sampled = local.chat(words("say something"), seed=SEED, temperature=1.0, top_p=0.9, top_k=50, max_tokens=4).json()
    text = dataclasses.replace(tiny().default_sampling().text, temperature=1.0, top_p=0.9, top_k=50, max_tokens=4)
    made = library(Text(text="say something"), Text(role="assistant", target=True), text=text)
    assert sampled["choices"][0]["message"]["content"] == made.pieces[-1].text


def test_pictures_come_in_both_dialects(local):
    asked = {"seed": SEED, "modalities": ["text", "image"], "size": "64x32"}
    made = library(Text(text="draw it"), Text(role="assistant", target=True),
                   Image(role="assistant", target=True, size=(32, 64)))
    message = local.chat(words("draw it"), **asked).json()["choices"][0]["message"]
    [image] = message["images"]
    assert message["content"] == made.pieces[1].text and image["type"] == "image_url" and image["index"] == 1
    assert np.array_equal(pixels(image["image_url"]["url"]), made.pieces[2].to_uint8()), "bit for bit"
    parts = local.chat(words("draw it"), **asked, content_format="parts").json()["choices"][0]["message"]["content"]
    assert [p["type"] for p in parts] == ["text", "image_url"] and parts[1]["image_url"] == image["image_url"]
    other = local.chat(words("draw it"), seed=SEED, modalities=["image", "text"], content_format="parts").json()
    assert [p["type"] for p in other["choices"][0]["message"]["content"]] == ["image_url", "text"], "as asked for"


def test_an_answer_can_be_sent_back(local):
    first = local.chat(words("draw it"), seed=1, answer=["text", "image", "boxes"], content_format="parts").json()
    said = first["choices"][0]["message"]
    assert [p["type"] for p in said["content"]] == ["text", "image_url", "diptych"]
    for message in (said, {**said, "content": "a star", "images": said["content"][1:2]}):
        talk = [{"role": "user", "content": "draw it"}, message, {"role": "user", "content": "and now ?"}]
        answer = local.post("/v1/chat/completions", {"messages": talk, "seed": 2})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 16


def test_boxes_can_be_asked_for(local):
    made = library(Text(text="where ?"), Boxes(role="assistant", target=True))
    content = local.chat(words("where ?"), seed=SEED, answer=["boxes"]).json()["choices"][0]["message"]["content"]
    assert len(json.loads(content)) == len(made.pieces[-1].boxes)
    boxes = {"type": "diptych", "diptych": {"kind": "boxes", "boxes": [[0.1, 0.1, 0.5, 0.5]], "labels": ["star"]}}
    drawn = local.chat(words("draw this layout"), boxes, seed=SEED, modalities=["image"]).json()
    layout = Boxes(boxes=np.array([[0.1, 0.1, 0.5, 0.5]]), labels=("star",))
    made = library(Text(text="draw this layout"), layout, Image(role="assistant", target=True))
    shown_ = drawn["choices"][0]["message"]["images"][0]["image_url"]["url"]
    assert np.array_equal(pixels(shown_), made.pieces[-1].to_uint8())


@pytest.mark.parametrize("form", ["text", "parts"])
def test_a_stream_says_what_the_whole_answer_says(local, form):
    asked = {"seed": SEED, "answer": ["text", "image", "text", "boxes"], "content_format": form, "n": 2,
             "temperature": 1.0}
    whole = local.chat(words("tell a story"), **asked).json()
    answer = local.chat(words("tell a story"), **asked, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, (_, last), (_, done) = events(answer.text)
    assert done is None and last["usage"] == whole["usage"] and last["choices"] == []
    for choice in whole["choices"]:
        deltas = [c["choices"][0] for _, c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert [d["finish_reason"] for d in deltas] == [None] * (len(deltas) - 1) + [choice["finish_reason"]]
        said = [d["delta"] for d in deltas]
        assert said[0]["role"] == "assistant" and len(said) > 4
        if form == "text":
            assert "".join(d.get("content") or "" for d in said) == choice["message"]["content"]
            assert [i for d in said for i in d.get("images", ())] == choice["message"]["images"]
            continue
        merged: dict[int, dict] = {}
        for part in (p for d in said for p in d.get("content", ())):
            place = part.pop("index")
            if merged.setdefault(place, part) is not part:
                merged[place]["text"] += part["text"]
        parts = [{k: v for k, v in p.items() if k != "index"} for p in choice["message"]["content"]]
        assert [merged[i] for i in sorted(merged)] == [p for p in parts if p != words("")]


def test_every_answer_has_its_recipe(local):
    answer = local.chat(words("draw it"), modalities=["image"], num_inference_steps=2, guidance_scale=3.5).json()
    recipe = answer["recipe"]
    assert recipe["version"] == diptych.__version__ and recipe["steps"] == 2 and recipe["guidance"] == 3.5
    assert recipe["model_hash"] == local.get("/v1/models/tiny").json()["hash"] and recipe["seed"] == recipe["seeds"][0]
    sampling = config.from_dict(Sampling, recipe["sampling"])
    document = Document((Text(text="draw it"), Image(role="assistant", target=True)))
    made = tiny().generate([document], sampling, seeds=recipe["seed"])[0]
    picture = answer["choices"][0]["message"]["images"][0]["image_url"]["url"]
    assert np.array_equal(pixels(picture), made.pieces[-1].to_uint8())
    again = local.chat(words("draw it"), modalities=["image"], num_inference_steps=2, guidance_scale=3.5)
    assert again.json()["recipe"]["seed"] != recipe["seed"], "drawn anew"


def test_several_answers_have_seeds_of_their_own(local):
    several = local.chat(words("hello"), n=3, seed=4, temperature=1.5).json()["choices"]
    alone = [local.chat(words("hello"), seed=4 + i, temperature=1.5).json()["choices"][0] for i in range(3)]
    assert [c["message"] for c in several] == [c["message"] for c in alone]
    assert [c["index"] for c in several] == [0, 1, 2]


def test_tokens_are_counted(local):
    system = tiny()
    usage = local.chat(shown(png()), words("what is it ?"), max_tokens=3, temperature=1.0, seed=3).json()
    ids = system.vocabulary.encode("what is it ?")
    told = usage["usage"]
    # two marks about the text, two about the picture
    assert told["prompt_tokens_details"] == {"text_tokens": len(ids) + 4, "image_tokens": told["prompt_tokens"]
                                             - len(ids) - 4}
    assert told["prompt_tokens_details"]["image_tokens"] == system.feature_count(torch.zeros(3, 64, 64))
    assert told["completion_tokens"] == 3 and usage["choices"][0]["finish_reason"] == "length"
    drawn = local.chat(words("draw"), modalities=["image"]).json()["usage"]["completion_tokens_details"]
    assert drawn == {"text_tokens": 0, "image_tokens": 16}


@pytest.mark.parametrize(("change", "param"), [
    ({"stop": ["x"]}, "stop"), ({"tools": [{}]}, "tools"), ({"logprobs": True}, "logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"), ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"temprature": 1}, "temprature"), ({"temperature": 3}, "temperature"), ({"seed": -1}, "seed"),
    ({"seed": "7"}, "seed"), ({"n": 9}, "n"), ({"modalities": ["audio"]}, "modalities[0]"),
    ({"modalities": ["text", "text"]}, "modalities"), ({"size": "64x64"}, "size"), ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"), ({"logprobs": 0}, "logprobs"),
    ({"model": "tinny"}, "model"), ({"modalities": ["image"], "size": "60x61"}, "size"),
    ({"modalities": ["image"], "size": "4096x4096"}, "size"), ({"negative_prompt": "x", "guidance_scale": 1},
                                                               "guidance_scale")])
def test_what_cannot_be_honoured_is_an_error(local, change, param):
    body = {"messages": [{"role": "user", "content": "hello"}], **change}
    answer = local.post("/v1/chat/completions", body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    assert error["param"].partition(".")[0] == param and error["type"] == "invalid_request_error" and error["code"]
    if param == "temprature":
        assert "did you mean 'temperature'" in error["message"]
    if param == "stop":
        assert "stop sequences are not supported" in error["message"]


def test_what_changes_nothing_is_taken(local):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "logprobs": False,
                "parallel_tool_calls": True, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {},
                "tools": None, "stop": None, "tool_choice": "none", "response_format": {"type": "text"},
                "safety_identifier": "x", "prompt_cache_key": "x", "top_logprobs": None, "n": 1}
    plain = local.chat(words("hello"), seed=1).json()["choices"]
    assert local.chat(words("hello"), seed=1, **harmless).json()["choices"] == plain


def test_what_a_message_may_not_hold(local):
    for content, told in (([{"type": "file", "file": {}}], "type"), ([{"type": "image_url"}], "image_url"),
                          ([shown(b"no picture")], "expected an image"), ([shown(png()[:100])], "expected a complete"),
                          ([{"type": "image_url", "image_url": {"url": "data:text/plain;base64,AAAA"}}], "data:image"),
                          ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}], "base64"),
                          ([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}], "data URL"),
                          ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "data URL"),
                          ([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}], "--allow-urls"),
                          ([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}], "type")):
        answer = local.chat(*content)
        assert answer.status_code == 400 and told in answer.json()["error"]["message"], answer.text
        assert answer.json()["error"]["param"].startswith("messages[0].content[0]")
    for role in ("tool", "function", ""):
        assert local.post("/v1/chat/completions", {"messages": [{"role": role, "content": "x"}]}).status_code == 400
