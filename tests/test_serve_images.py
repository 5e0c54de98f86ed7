"""Drawing and editing over HTTP: the pictures are the library's, bit for bit."""
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image as Pil

from diptych.cli.common import changed_sampling
from diptych.cli.draw import drawing, layout_json
from diptych.cli.edit import editing
from diptych.data.images import decode_image, fit_to_model
from diptych.document import Boxes, Image
from tests.serving import Local, events, make, pixels, png, tiny

SEED = 11


@pytest.fixture(scope="module")
def local():
    with Local(make()) as local:
        yield local


def library(document, seed: int = SEED, steps=None, guidance=None, **changes):
    sampling = changed_sampling(tiny(), steps, guidance, **changes)
    return tiny().generate([document], sampling, seeds=seed)[0]


def edit(local: Local, photo: bytes | list[bytes], mask: bytes | None = None, **fields):
    photos = photo if isinstance(photo, list) else [photo]
    name = "image[]" if len(photos) > 1 else "image"
    files = [(name, ("a.png", p, "image/png")) for p in photos]
    files += [("mask", ("m.png", mask, "image/png"))] if mask is not None else []
    return local.post("/v1/images/edits", files=files, data={"prompt": "make it red", "seed": SEED, **fields})


def test_a_drawing_is_the_librarys(local):
    answer = local.draw(seed=SEED).json()
    assert np.array_equal(pixels(answer["data"][0]["b64_json"]),
                          library(drawing("a red circle")).of(Image)[-1].to_uint8())
    assert answer["size"] == "64x64" and answer["usage"]["output_tokens"] == 16 and answer["recipe"]["seed"] == SEED
    changed = local.draw(seed=SEED, num_inference_steps=2, guidance_scale=4, negative_prompt="a star", size="32x64")
    made = library(drawing("a red circle", size=(64, 32)), steps=2, guidance=4, negative="a star")
    assert np.array_equal(pixels(changed.json()["data"][0]["b64_json"]), made.of(Image)[-1].to_uint8())


def test_layouts_and_plans(local):
    boxes = [{"label": "red circle", "box": [0.1, 0.1, 0.5, 0.5]}]
    filled = local.draw("", boxes=boxes, seed=SEED).json()["data"][0]
    layout = Boxes(boxes=np.array([[0.1, 0.1, 0.5, 0.5]]), labels=("red circle",))
    assert np.array_equal(pixels(filled["b64_json"]), library(drawing("", layout)).of(Image)[-1].to_uint8())
    planned = local.draw(plan=True, seed=SEED).json()
    made = library(drawing("a red circle", plan=True))
    assert np.array_equal(pixels(planned["data"][0]["b64_json"]), made.of(Image)[-1].to_uint8())
    assert planned["data"][0].get("layout", []) == layout_json(made.of(Boxes)[0]) and planned["recipe"]["plan"]


def test_several_pictures_sizes_and_formats(local):
    answer = local.draw(n=3, seed=SEED, response_format="url", output_format="jpeg", output_compression=90).json()
    assert [d["seed"] for d in answer["data"]] == answer["recipe"]["seeds"] == [SEED, SEED + 1, SEED + 2]
    shown = [d["url"] for d in answer["data"]]
    assert all(u.startswith("data:image/jpeg;base64,/9j/") for u in shown) and len(set(shown)) == 3
    assert answer["output_format"] == "jpeg"
    webp = local.draw(seed=SEED, output_format="webp").json()["data"][0]["b64_json"]
    assert webp.startswith("UklGR")
    second, alone = (pixels(a.json()["data"][-1]["b64_json"]).astype(int)
                     for a in (local.draw(n=2, seed=SEED), local.draw(seed=SEED + 1)))
    assert np.abs(second - alone).max() <= 1, "in company sums may round otherwise"


def test_a_drawing_streams_as_it_forms(local):
    whole = local.draw(seed=SEED, num_inference_steps=9).json()["data"][0]["b64_json"]
    answer = local.draw(seed=SEED, num_inference_steps=9, stream=True, partial_images=3)
    told = events(answer.text)
    assert [name for name, _ in told] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert all(name == data["type"] for name, data in told)
    assert [d["partial_image_index"] for _, d in told[:-1]] == [0, 1, 2]
    assert [d["progress"] for _, d in told[:-1]] == [
        {"step": s, "steps": 9, "time": t} for s, t in zip((2, 5, 7), (0.1111, 0.4444, 0.6667), strict=True)]
    every = events(local.draw(seed=SEED, num_inference_steps=5, stream=True, partial_images=64).text)
    assert [d["progress"]["step"] for _, d in every[:-1]] == [1, 2, 3, 4], "after the last it is finished"
    last = told[-1][1]
    assert last["b64_json"] == whole and last["recipe"]["seed"] == SEED and last["usage"]["output_tokens"] == 16
    far = [np.abs(pixels(d["b64_json"]).astype(int) - pixels(whole).astype(int)).mean() for _, d in told]
    assert far[-1] == 0 and all(f > 0 for f in far[:-1])
    only = events(local.draw(seed=SEED, stream=True, n=2).text)
    assert [d["index"] for _, d in only] == [0, 1] or [d["index"] for _, d in only] == [1, 0]


def test_an_edit_is_the_librarys(local):
    photo, second = png(64, 64), png(100, 60, seed=1)
    def fitted(data):
        return fit_to_model(decode_image(data), tiny().config)

    one = edit(local, photo).json()
    made = library(editing([fitted(photo)], "make it red"))
    assert np.array_equal(pixels(one["data"][0]["b64_json"]), made.of(Image)[-1].to_uint8())
    two = edit(local, [photo, second]).json()
    made = library(editing([fitted(photo), fitted(second)], "make it red"))
    assert np.array_equal(pixels(two["data"][0]["b64_json"]), made.of(Image)[-1].to_uint8())
    told = events(edit(local, photo, stream="true", partial_images="1", num_inference_steps="4").text)
    assert [name for name, _ in told] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_mask_keeps_what_is_outside_it(local):
    photo = png(64, 64)
    alpha = np.full((64, 64, 4), 255, np.uint8)
    alpha[16:40, 8:32, 3] = 0
    buffer = io.BytesIO()
    Pil.fromarray(alpha).save(buffer, "PNG")
    free, masked = edit(local, photo).json(), edit(local, photo, buffer.getvalue()).json()
    before, drawn, kept = pixels_of(photo), pixels(free["data"][0]["b64_json"]), pixels(masked["data"][0]["b64_json"])
    inside = alpha[..., 3] == 0
    assert np.array_equal(kept[~inside], before[~inside]) and np.array_equal(kept[inside], drawn[inside])
    assert masked["recipe"]["mask"] == "composite" and "mask" not in free["recipe"]
    for bad, told in ((png(64, 64), "transparent places"), (png(32, 64, mode="RGBA"), "as large as"),
                      (b"x", "expected an image")):
        answer = edit(local, photo, bad)
        assert answer.status_code == 400 and told in answer.json()["error"]["message"], answer.text
        assert answer.json()["error"]["param"] == "mask"


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Pil.open(io.BytesIO(data)))


@pytest.mark.parametrize(("change", "param"), [
    ({"prompt": " "}, "prompt"), ({"n": 11}, "n"), ({"quality": "hd"}, "quality"), ({"style": "vivid"}, "style"),
    ({"background": "transparent"}, "background"), ({"size": "big"}, "size"), ({"size": "9x9"}, "size"),
    ({"partial_images": 65}, "partial_images"), ({"boxes": [{"label": "a", "box": [0.5, 0, 0.2, 1]}]}, "boxes[0]"),
    ({"boxes": []}, "boxes"), ({"num_inference_steps": 1000}, "num_inference_steps"), ({"guidance_scale": 1e400},
                                                                                       "guidance_scale"),
    ({"plan": True, "boxes": [{"label": "a", "box": [0, 0, 1, 1]}]}, "plan"), ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"), ({"seed": 2**60}, "seed"), ({"image": "x"}, "image")])
def test_bad_drawings_are_refused(local, change, param):
    if change.get("guidance_scale"):
        answer = local.post("/v1/images/generations", content=b'{"prompt": "x", "guidance_scale": 1e400}',
                            headers={"content-type": "application/json"})
    else:
        answer = local.post("/v1/images/generations", {"prompt": "x", **change})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_bad_edits_are_refused(local):
    photo = png()
    for told, answer in (
            ("image", local.post("/v1/images/edits", files=[("other", ("a", photo))], data={"prompt": "x"})),
            ("expected a picture to edit", local.post("/v1/images/edits", files=[("mask", ("a", photo))],
                                                      data={"prompt": "x"})),
            ("multipart", local.post("/v1/images/edits", {"prompt": "x"})),
            ("prompt", local.post("/v1/images/edits", files=[("image", ("a", photo))])),
            ("an instruction", edit(local, photo, prompt="  ")), ("seed", edit(local, photo, seed="many")),
            ("breaks off", local.post("/v1/images/edits", headers={"content-type": "multipart/form-data; boundary=a"},
                                      content=b'--a\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--a')),
            ("unknown", edit(local, photo, sed="1")), ("at most 16 pictures", edit(local, [photo] * 17)),
            ("once", local.post("/v1/images/edits", files=[("image", ("a", photo)), ("prompt", (None, "x")),
                                                           ("prompt", (None, "y"))]))):
        assert answer.status_code in (400, 415), answer.text
        assert told in answer.text or told == "unknown", (told, answer.text)


def test_models_that_only_read_say_so():
    from diptych.serve import Settings, create_app
    from diptych.systems.autoencoder import Autoencoder

    blind = tiny()
    with Local(create_app({"reads": blind}, Settings())) as local:
        served = local.app.state.context.models.find("reads")
        served.system = type("Reads", (), {"draws": False})()
        answer = local.draw()
        assert answer.status_code == 400 and "only reads pictures" in answer.text
    with pytest.raises(ValueError, match="fills documents"):
        create_app({"codec": Autoencoder(Autoencoder.tiny())})
    assert dataclasses.asdict(Settings())["allow_urls"] is False
