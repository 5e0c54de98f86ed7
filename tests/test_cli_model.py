"""The verbs that use a model, end to end on a tiny untrained BAGEL."""
import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil

import diptych


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An untrained tiny BAGEL that says at most six tokens."""
    import torch

    from diptych.objectives.next_token import TextSampling
    from diptych.systems.bagel import Bagel
    from diptych.systems.io import save_system

    tiny = Bagel.tiny()
    short = dataclasses.replace(tiny.sampling, evaluations=3, text=TextSampling(max_tokens=6))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        system = Bagel(dataclasses.replace(tiny, sampling=short)).eval()
        # an untrained velocity is zero; guidance and seeds must have something to act on
        torch.nn.init.normal_(system.latent_out.weight, std=0.1)
    folder = tmp_path_factory.mktemp("model")
    save_system(system, folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    Pil.fromarray(np.arange(90 * 120 * 3).reshape(90, 120, 3).astype(np.uint8)).save(path)
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Pil.open(path))


def test_a_name_a_folder_and_a_run_open_as_on_the_command_line(model, tmp_path):
    assert type(diptych.open_model("janus-grid")).__name__ == "Janus"
    assert type(diptych.open_model(model)).__name__ == "Bagel"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(model)
    assert not diptych.open_model(tmp_path / "run").training
    with pytest.raises(ValueError, match="fix: did you mean 'mini'"):
        diptych.open_model("minni")
    with pytest.raises(FileNotFoundError, match=r"fix: .*diptych\.open_model"):
        diptych.load_system("mini")


def test_draw_is_a_function_of_seed_and_sampling(diptych_run, model, tmp_path):
    def draw(*argv: object) -> np.ndarray:
        code, _, err = diptych_run("draw", "a red circle", "-o", tmp_path / "out.png", "--model", model, *argv)
        assert code == 0, err
        return pixels(tmp_path / "out.png")

    first = draw()
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, draw("--seed", 0))
    for change in (("--seed", 1), ("--steps", 5), ("--guidance", 9)):
        assert not np.array_equal(first, draw(*change)), change
    assert draw("--size", "32x64").shape == (64, 32, 3)


def test_draw_traces_plans_and_fills_layouts(diptych_run, model, tmp_path):
    out, trace, layout = tmp_path / "out.png", tmp_path / "trace.png", tmp_path / "layout.json"
    assert diptych_run("draw", "a star", "-o", out, "--trace", trace, "--model", model)[0] == 0
    assert pixels(trace).shape[1] > 2 * 64
    assert np.array_equal(pixels(trace)[:, -64:], pixels(out)), "the last picture of the trace is the result"
    code, printed, _ = diptych_run("draw", "a star", "--plan", "-o", out, "--model", model)
    assert code == 0 and isinstance(json.loads(printed), list)
    layout.write_text(json.dumps([{"label": "red circle", "box": [0.1, 0.1, 0.5, 0.5]}]))
    assert diptych_run("draw", "--layout", layout, "-o", out, "--model", model)[0] == 0
    filled = pixels(out)
    layout.write_text(json.dumps([{"label": "red circle", "box": [0.5, 0.5, 0.9, 0.9]}]))
    assert diptych_run("draw", "--layout", layout, "-o", out, "--model", model)[0] == 0
    assert not np.array_equal(filled, pixels(out)), "the layout must matter"


def test_a_generation_is_planned(diptych_run, model):
    code, out, err = diptych_run("plan", "draw", "--model", model, "--number", "3", "--steps", "4")
    assert code == 0, err
    assert "look" in out and "at once" in out and "MiB" in out and "fits: " in out
    code, out, _ = diptych_run("plan", "ask", "--model", model, "--words", "5")
    assert code == 0 and "prefill" in out
    code, _, err = diptych_run("plan", "draw", "size=paper", "--model", model)
    assert code == 2 and "options" in err


def test_a_plan_says_when_a_model_does_not_fit(diptych_run, model, monkeypatch):
    monkeypatch.setattr("diptych.cli.plan._free_memory", lambda device: 1_000_000)
    code, out, _ = diptych_run("plan", "draw", "--model", model)
    assert code == 0 and out.startswith("fits: no;") and "bfloat16" in out


def test_a_model_may_want_to_plan_first(diptych_run, model, tmp_path):
    folder = tmp_path / "planner"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["config"]["sampling"]["plan"] = True
    (folder / "config.json").write_text(json.dumps(config))

    def draw(*argv):
        out = tmp_path / "out.png"
        code, _, err = diptych_run("draw", "a star", "-o", out, *argv)
        assert code == 0, err
        return pixels(out)

    planned, direct = draw("--plan", "--model", model), draw("--model", model)
    assert np.array_equal(draw("--model", folder), planned) and not np.array_equal(planned, direct)
    assert np.array_equal(draw("--no-plan", "--model", folder), direct)


@pytest.mark.parametrize("content", ["{", "[]", '[{"box": [0, 0, 1, 1]}]', '[{"label": "a", "box": [0, 0, 9, 9]}]',
                                     '[{"label": "a", "box": [0.5, 0, 0.2, 1]}]', '[3]'])
def test_bad_layouts_are_refused(diptych_run, tmp_path, content):
    (tmp_path / "layout.json").write_text(content)
    code, _, err = diptych_run("draw", "--layout", tmp_path / "layout.json", "-o", tmp_path / "o.png")
    assert code == 2 and "layout.json" in err


def test_draw_refuses_before_loading(diptych_run, tmp_path):
    for argv in (("x", "-o", "out.txt"), ("x",), ("x", "-o", tmp_path / "a.png", "--size", "0"),
                 ("-o", tmp_path / "a.png"), ("x", "-o", tmp_path / "a.png", "--model", "nope"),
                 ("--plan", "-o", tmp_path / "a.png"), ("x", "-o", tmp_path / "a.png", "--steps", "0")):
        code, _, err = diptych_run("draw", *argv)
        assert code == 2 and "error: " in err, argv


def test_ask_caption_and_edit(diptych_run, model, photo, tmp_path):
    code, answer, _ = diptych_run("ask", photo, "how many circles ?", "--model", model)
    assert code == 0 and answer.endswith("\n")
    code, boxes, _ = diptych_run("ask", photo, "where ?", "--boxes", "-o", tmp_path / "m.png", "--model", model)
    assert code == 0 and isinstance(json.loads(boxes), list) and (tmp_path / "m.png").exists()
    code, captions, _ = diptych_run("caption", photo, photo, "--model", model)
    lines = captions.splitlines()
    assert code == 0 and lines[0] == lines[-1] and lines[0].startswith(f"{photo}: ")
    code, _, err = diptych_run("edit", photo, "make it red", "-o", tmp_path / "e.png", "--model", model)
    assert code == 0, err
    edited = pixels(tmp_path / "e.png")
    assert edited.shape == (64, 64, 3)
    diptych_run("edit", photo, "make it blue", "-o", tmp_path / "e.png", "--model", model)
    assert not np.array_equal(edited, pixels(tmp_path / "e.png")), "the instruction must matter"


def test_pictures_that_cannot_be_read_are_named(diptych_run, model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for path in (tmp_path / "broken.png", tmp_path / "gone.png", tmp_path):
        code, _, err = diptych_run("caption", path, "--model", model)
        assert code == 2 and path.name in err and err.count("\n") == 1


def test_marked_boxes_show_on_the_picture():
    from diptych.cli.ask import marked
    from diptych.document import Boxes, Image

    plain = Image(pixels=np.zeros((3, 64, 64), np.float32))
    drawn = marked(plain, Boxes(boxes=np.array([[0.25, 0.25, 0.75, 0.75]]))).to_uint8()
    changed = np.argwhere((drawn != plain.to_uint8()).any(-1))
    assert changed.min() in (15, 16) and changed.max() in (47, 48)


def test_chat_keeps_a_document(diptych_run, model, photo, tmp_path, monkeypatch):
    lines = [f"/image {photo}", "what is it ?", "/draw a circle", f"/save {tmp_path / 'p.png'}", "/find the circle",
             "/undo", "/unknwon", "/image gone.png", "/help", f"/save {tmp_path / 'c.json'}", "/quit", "not reached"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = diptych_run("chat", "--model", model)
    assert code == 0, err
    assert "64 x 64 picture" in out and "error: expected a command" in out and "did you mean 'undo'" in out
    assert "gone.png" in out and "/save PATH" in out
    document = diptych.Document.from_json((tmp_path / "c.json").read_text())
    assert [p.kind for p in document] == ["image", "text", "text", "text", "image"], "/undo forgets the last exchange"
    assert [p.role for p in document] == ["user", "user", "assistant", "user", "assistant"]
    assert pixels(tmp_path / "p.png").shape == (64, 64, 3)


def test_eval_measures_a_tokenizer(diptych_run, model, tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.ledger.entry.ENTRIES", tmp_path)
    code, printed, err = diptych_run("eval", "codec", "--n", 8, "--out", tmp_path / "f.json", "--ledger", "codec-8")
    assert code == 0, err
    figures = json.loads((tmp_path / "f.json").read_text())["metrics"]
    assert figures["reconstruct/test/psnr"]["value"] > 30 and "perceived the same" in printed
    kept = json.loads((tmp_path / "codec-8.json").read_text())
    assert kept["system"] == "zoo/codec" and kept["recipe"]["model"]["name"] == "codec"
    code, printed, err = diptych_run("eval", model, "--suites", "reconstruct", "--n", 4)
    assert code == 0 and "psnr" in printed, err
    code, _, err = diptych_run("eval", "codec", "--controls")
    assert code == 2 and "expected no --resume, --controls" in err


def test_eval_measures_and_keeps_verdicts(diptych_run, model, tmp_path):
    out = tmp_path / "figures.json"
    code, printed, err = diptych_run("eval", model, "--suites", "caption,draw", "--n", 3, "--out", out, "--controls")
    assert code == 0, err
    assert "caption" in printed and "95% interval" in printed and "control: blank" in printed
    assert len(json.loads(out.read_text())["items"]) == 6
    code, _, err = diptych_run("eval", model, "--suites", "captoin")
    assert code == 2 and "did you mean 'caption'" in err
    code, _, err = diptych_run("eval", model, "--ledger", "x")
    assert code == 2 and "--recipe" in err


def test_precisions_of_the_weights(diptych_run, model, photo, monkeypatch):
    from diptych.parts import decode, native
    from diptych.systems.decoding import Decoding

    if native.library() is None:
        pytest.skip("no C++ compiler")
    quantized: list[int] = []
    plain = decode.quantized
    monkeypatch.setattr(decode, "quantized", lambda w: (quantized.append(w.numel()), plain(w))[1])
    ask = ("ask", photo, "what is this ?", "--model", model, "--device", "cpu", "--dtype")
    for dtype in ("float32", "bfloat16", "stored", "int8"):
        assert not quantized, dtype
        code, _, err = diptych_run(*ask, dtype)
        assert code == 0, err
    assert len(quantized) > 4, "the matrices that tokens are decoded with"
    monkeypatch.setattr(Decoding, "of", classmethod(lambda cls, system: None))
    code, _, err = diptych_run(*ask, "int8")
    assert code == 2 and "fix: --dtype bfloat16" in err
