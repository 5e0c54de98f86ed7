"""Documents survive JSON and chat messages, whatever they hold."""
import base64
import io
import itertools
import json
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from diptych.data.images import write_image
from diptych.document import (
    PIECES,
    ROLES,
    Actions,
    Audio,
    Boxes,
    Document,
    Image,
    Mask,
    Svg,
    Text,
    Video,
    encode_png,
    piece_from_dict,
    piece_to_dict,
)

SIDES = st.integers(1, 5)
FLOATS = st.floats(-1, 1, width=32)
JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False) | st.text(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                    max_leaves=6)


def _floats(*shape):
    return st.tuples(*shape).flatmap(lambda s: arrays(np.float32, s, elements=FLOATS))


def _rgb():
    return st.tuples(SIDES, SIDES, st.just(3)).flatmap(lambda s: arrays(np.uint8, s))


IMAGES = _rgb().map(lambda a: Image.from_uint8(a).pixels)
SHORTS = st.integers(0, 9).flatmap(lambda n: arrays(np.int16, n)).map(lambda a: a.astype(np.float32) / 32768)


@st.composite
def _boxes(draw):
    boxes = draw(_floats(st.integers(0, 3), st.just(4)))
    labels = draw(st.lists(st.text(), min_size=len(boxes), max_size=len(boxes))) if draw(st.booleans()) else ()
    return {"boxes": boxes, "labels": labels}


CONTENTS = {
    Text: st.fixed_dictionaries({"text": st.text()}),
    Image: st.fixed_dictionaries({"pixels": IMAGES}),
    Video: st.fixed_dictionaries({"frames": _floats(SIDES, st.just(3), SIDES, SIDES),
                                  "frames_per_second": st.floats(0.5, 60)}),
    Audio: st.fixed_dictionaries({"samples": SHORTS, "sample_rate": st.integers(1, 96000)}),
    Svg: st.fixed_dictionaries({"source": st.text()}),
    Boxes: _boxes(),
    Mask: st.fixed_dictionaries({"mask": arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=4))}),
    Actions: st.fixed_dictionaries({"actions": _floats(SIDES, SIDES)}),
}
EMPTY = {Image: st.fixed_dictionaries({"size": st.none() | st.tuples(SIDES, SIDES)})}


@st.composite
def pieces(draw):
    kind = draw(st.sampled_from(list(CONTENTS)))
    fields = draw(CONTENTS[kind]) if draw(st.integers(0, 4)) else draw(EMPTY.get(kind, st.just({})))
    return kind(role=draw(st.sampled_from(ROLES)), target=draw(st.booleans()), **fields)


documents = st.builds(Document, st.lists(pieces(), max_size=5), st.text(max_size=5),
                      st.dictionaries(st.text(), JSON, max_size=3))


def test_every_kind_of_piece_is_covered():
    assert set(CONTENTS) == set(PIECES.values())


@settings(max_examples=50, deadline=None)
@given(documents)
def test_json_round_trip(document):
    again = Document.from_json(document.to_json())
    assert again == document
    for a, b in zip(again, document, strict=True):
        assert type(a) is type(b) and piece_from_dict(piece_to_dict(a)) == b


@settings(max_examples=50, deadline=None)
@given(documents)
def test_message_round_trip(document):
    messages = json.loads(json.dumps(document.to_messages()))
    expected = [p.replace(target=False) for p in document if not p.empty]
    assert list(Document.from_messages(messages)) == expected
    assert all(a["role"] != b["role"] for a, b in itertools.pairwise(messages))
    trained = Document.from_messages(messages, train=True, task="t")
    assert trained.task == "t" and [p.target for p in trained] == [p.role == "assistant" for p in expected]


@settings(max_examples=40, deadline=None)
@given(documents)
def test_a_prompt_holds_no_answer(document):
    prompt = document.prompt()
    assert all(p.empty for p in prompt if p.target) and prompt.prompt() == prompt
    assert all(p.labels == () for p in prompt.of(Boxes) if p.target)
    kept = [p for p in document if not p.target]
    assert [p for p in prompt if not p.target] == kept


def test_a_prompt_keeps_what_is_asked_for_and_hides_labels():
    boxes = Boxes(boxes=np.zeros((1, 4)), labels=("red star",))
    image = Image.from_uint8(np.zeros((4, 6, 3), np.uint8), target=True)
    sound = Audio(samples=np.zeros(3), sample_rate=8000, target=True)
    prompt = Document([boxes, boxes.replace(target=True), image, sound]).prompt()
    assert prompt.pieces == (boxes, Boxes(target=True), Image(size=(4, 6), target=True),
                             Audio(sample_rate=8000, target=True))


@settings(max_examples=40, deadline=None)
@given(pieces(), pieces())
def test_equality_means_the_same_json(a, b):
    assert (a == b) == (piece_to_dict(a) == piece_to_dict(b))


def test_openai_messages_are_read():
    picture = Image.from_uint8(np.full((2, 3, 3), 77, np.uint8))
    url = "data:image/png;base64," + base64.b64encode(encode_png(picture)).decode()
    document = Document.from_messages([
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what is it?"},
                                     {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
                                     {"type": "input_image", "image_url": url}]},
        {"role": "assistant", "content": "grey", "refusal": None},
        {"role": "assistant", "content": None},
    ], train=True)
    assert list(document) == [
        Text(text="be brief", role="system"), Text(text="what is it?"), picture, picture,
        Text(text="grey", role="assistant", target=True)]


def test_openai_messages_are_written():
    document = Document([Text(text="draw"), Image(size=(8, 8), role="assistant", target=True)])
    assert document.to_messages() == [{"role": "user", "content": [{"type": "text", "text": "draw"}]}]
    part = Document([Image.from_uint8(np.zeros((1, 1, 3), np.uint8))]).to_messages()[0]["content"][0]
    assert part["type"] == "image_url" and part["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_other_addresses_need_a_reader(tmp_path):
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}}]}]
    with pytest.raises(ValueError, match=r"base64 data URL, got 'cat\.png'; fix"):
        Document.from_messages(messages)
    seen = []
    picture = Image.from_uint8(np.zeros((2, 2, 3), np.uint8))
    document = Document.from_messages(messages, read=lambda url: seen.append(url) or picture)
    assert seen == ["cat.png"] and document.pieces == (picture,)
    write_image(picture, tmp_path / "cat.png")


@pytest.mark.parametrize(("width", "channels", "frames", "expected"), [
    (1, 1, bytes([0, 128, 192]), [-1, 0, 0.5]),
    (2, 2, np.array([[-32768, 0], [16384, 16384]], "<i2").tobytes(), [-0.5, 0.5]),
    (4, 1, np.array([-2**31, 2**30], "<i4").tobytes(), [-1, 0.5])])
def test_input_audio_of_any_pcm_width(width, channels, frames, expected):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((channels, width, 22050, 0, "NONE", ""))
        file.writeframes(frames)
    data = base64.b64encode(buffer.getvalue()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    (audio,) = Document.from_messages([{"role": "user", "content": [part]}])
    assert audio == Audio(samples=np.array(expected), sample_rate=22050)


@pytest.mark.parametrize(("message", "error"), [
    ({"role": "tool", "content": "x"}, "role to be one of"),
    ({"role": "user", "content": [{"type": "video_url"}]}, "part type text, image_url, input_audio or diptych"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}]}, "in data URL,"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,?"}]}, "base64 in data"),
    ({"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "SUQz", "format": "mp3"}}]}, "WAV"),
    ({"role": "user", "content": [{"type": "diptych", "diptych": {"kind": "text", "txt": "a"}}]}, "unknown txt")])
def test_wrong_messages_are_explained(message, error):
    with pytest.raises(ValueError, match=error):
        Document.from_messages([message])


@pytest.mark.parametrize(("make", "error"), [
    (lambda: Text(text=3), "text to be a str, got int"),
    (lambda: Svg(source=b""), "source to be a str, got bytes"),
    (lambda: Text(role="robot"), "role to be one of"),
    (lambda: Image(pixels=np.zeros((8, 8, 3))), r"\(3, height, width\), got shape \(8, 8, 3\)"),
    (lambda: Image.from_uint8(np.zeros((2, 2, 3))), "uint8"),
    (lambda: Boxes(boxes=np.zeros((2, 4)), labels=("a",)), r"one label per box \(2\)"),
    (lambda: Boxes(boxes=np.zeros((2, 3))), "xyxy"),
    (lambda: Document(["words"]), "pieces .*got str"),
    (lambda: Image().to_uint8(), "still to be drawn"),
    (lambda: Document.from_dict({"pieces": [], "taks": ""}), "unknown taks"),
    (lambda: Document.from_dict({"task": ""}), "pieces"),
    (lambda: piece_from_dict({"kind": "smell"}), "piece kind")])
def test_wrong_documents_are_explained(make, error):
    with pytest.raises((ValueError, TypeError), match=error):
        make()


def test_torch_tensors_are_accepted():
    torch = pytest.importorskip("torch")
    image = Image(pixels=torch.zeros(3, 2, 2, dtype=torch.bfloat16, requires_grad=True))
    assert image.pixels.dtype == np.float32 and image.size == (2, 2)
