"""The command line: quick to start, clear when wrong; the verbs that need no trained model."""
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil

import diptych
from diptych.cli import common, main

ROOT = Path(diptych.__file__).parents[1]
HELPERS = {"__init__", "main", "common"}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)


# -- starting ---------------------------------------------------------------------------------------------------------

def test_import_is_light():
    code = "import time; t = time.process_time(); import diptych, sys; print(time.process_time() - t); " \
           "print([m for m in ('torch', 'numpy', 'PIL', 'yaml') if m in sys.modules])"
    seconds, heavy = python(code).stdout.splitlines()
    assert heavy == "[]"
    assert float(seconds) < 0.3


def test_help_of_every_verb_is_light():
    code = "import time, sys, io, contextlib; t = time.process_time()\n" \
           "from diptych.cli import main\n" \
           "for verb in ([], *([v] for v in main.VERBS)):\n" \
           "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n" \
           "        main.main([*verb, '--help'])\n" \
           "print(time.process_time() - t); print('torch' in sys.modules)"
    seconds, torch = python(code).stdout.splitlines()
    assert torch == "False"
    assert float(seconds) < 1.0


def test_help_lists_every_verb_and_each_explains_itself(diptych_run):
    code, out, _ = diptych_run("--help")
    assert code == 0 and all(f"    {verb}" in out for verb in main.VERBS)
    for verb in main.VERBS:
        code, out, _ = diptych_run(verb, "--help")
        assert code == 0 and out.startswith(f"usage: diptych {verb}")


def test_verbs_and_files_agree():
    files = {p.stem for p in (ROOT / "diptych" / "cli").glob("*.py")} - HELPERS
    assert {name.removesuffix("_") for name in files} == set(main.VERBS)  # import is a word of the language
    for verb in main.VERBS:
        module = main.verb_module(verb)
        assert callable(module.add) and callable(module.run) and module.__doc__


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "diptych", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"diptych {diptych.__version__}\n")


def test_public_names_resolve_on_use():
    from diptych.document import Document

    assert diptych.Document is Document
    assert set(diptych.__all__) <= set(dir(diptych))
    with pytest.raises(AttributeError, match="no attribute 'Dokument'"):
        diptych.Dokument  # noqa: B018


# -- going wrong ------------------------------------------------------------------------------------------------------

def test_unknown_verb_names_the_nearest(diptych_run):
    code, out, err = diptych_run("drwa", "x")
    assert (code, out) == (2, "")
    assert "got 'drwa'" in err and "did you mean 'draw'?" in err
    assert "diptych --help" in diptych_run("xyzzy")[2]


def test_no_verb_is_an_error(diptych_run):
    code, _, err = diptych_run()
    assert code == 2 and "VERB" in err


@pytest.mark.parametrize(("error", "line"), [
    (ValueError("expected a, got b; fix: c"), "expected a, got b; fix: c"),
    (FileNotFoundError(2, "No such file or directory", "x.png"), "x.png: No such file or directory"),
    (ModuleNotFoundError("No module named 'av'", name="av"), "fix: pip install 'diptych[video]'"),
    (ModuleNotFoundError("No module named 'foo.bar'", name="foo.bar"), "fix: pip install foo"),
    (KeyboardInterrupt(), "interrupted")])
def test_errors_of_users_are_one_line(diptych_run, monkeypatch, error, line):
    def fail(args):
        raise error

    monkeypatch.setattr(importlib.import_module("diptych.cli.ls"), "run", fail)
    code, out, err = diptych_run("ls")
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert err.startswith("diptych: error: ") and err.count("\n") == 1 and line in err and out == ""


def test_debug_and_bugs_show_the_traceback(diptych_run, monkeypatch):
    ls = importlib.import_module("diptych.cli.ls")
    for argv, error in ((("ls", "--debug"), ValueError), (("--debug", "ls"), ValueError), (("ls",), RuntimeError),
                        (("ls",), TypeError)):
        def fail(args, error=error):
            raise error("oops")

        monkeypatch.setattr(ls, "run", fail)
        with pytest.raises(error, match="oops"):
            diptych_run(*argv)

    def own(args):
        importlib.import_module("diptych.nowhere")

    monkeypatch.setattr(ls, "run", own)
    with pytest.raises(ModuleNotFoundError):
        diptych_run("ls")


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(f"{sys.executable} -m diptych ls recipes | head -c 1; exit ${{PIPESTATUS[0]}}", shell=True,
                          executable="/bin/bash", capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Traceback" not in done.stderr


# -- helpers ----------------------------------------------------------------------------------------------------------

def test_numbers_for_people():
    assert [common.human(x) for x in (7, 7.6e6, 1.5e9)] == ["7", "7.6M", "1.5G"]
    assert common.human(6.66e10, "FLOP/s") == "66.6 GFLOP/s"
    assert [common.human(x, "B") for x in (10, 2048, 40 * 2**20)] == ["10 B", "2 KiB", "40 MiB"]
    assert [common.duration(s) for s in (5, 600, 7500, 200000)] == ["5 s", "10 min", "2 h 05 min", "2 d 7 h"]


def test_table_aligns():
    assert common.table([("a", 5), ("bcd", 10)], ("name", "n")) == "name   n\n----  --\na      5\nbcd   10"
    assert common.table([]) == ""


def test_picture_size():
    assert common.picture_size("64") == (64, 64)
    assert common.picture_size("96x64") == (64, 96), "(height, width) from width x height"
    for text in ("", "0", "x", "64x", "-4", "a"):
        with pytest.raises(Exception, match="expected a size like"):
            common.picture_size(text)


def test_models_and_recipes_are_found_by_name(tmp_path, monkeypatch):
    for place in ("bundled/mini", "runs/a/model"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text('{"system": "Bagel"}')
    monkeypatch.setattr("diptych.parts.resources.SHIPPED", tmp_path / "bundled")
    assert common.find_model("mini") == tmp_path / "bundled" / "mini"
    assert common.find_model(str(tmp_path / "runs" / "a")) == tmp_path / "runs" / "a" / "model"
    with pytest.raises(ValueError, match="did you mean 'mini'"):
        common.find_model("mimi")
    with pytest.raises(ValueError, match="folder without one"):
        common.find_model(str(tmp_path / "runs"))
    (tmp_path / "own.yaml").write_text("system: bagel")
    assert common.find_recipe(str(tmp_path / "own.yaml")) == tmp_path / "own.yaml"
    monkeypatch.chdir(tmp_path)
    for name in common.recipes():
        assert common.find_recipe(name) == common.find_recipe(f"recipes/{name}.yaml") == common.recipes()[name]
    with pytest.raises(ValueError, match="name of a recipe"):
        common.find_recipe(str(tmp_path / "gone.yaml"))


# -- the other verbs --------------------------------------------------------------------------------------------------

RECIPE = """
system: bagel
size: tiny
data: [{world: mini, tasks: {caption: 1, draw: 1}}]
stages: [{name: one, steps: 3, batch: 4, lr: 1e-3, freeze: [codec]}]
save_every: 2
workers: 0
"""


def test_train_plans_stops_and_resumes(diptych_run, tmp_path):
    recipe, run = tmp_path / "small.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    code, out, err = diptych_run("plan", recipe)
    assert code == 0, err
    assert "trunk" in out and "documents/s" in out and "3 steps in 1 stage" in out and not run.exists()
    assert "to start" in out and "memory: " in out and "documents per micro-batch" in out
    code, out, err = diptych_run("train", recipe, "--run", run)
    assert code == 0 and f"diptych draw 'a red circle' -o out.png --model {run / 'model'}" in out, err
    assert common.find_model(str(run)) == run / "model"
    code, _, err = diptych_run("train", recipe, "--run", run)
    assert code == 2 and "--resume" in err
    assert diptych_run("train", recipe, "--run", run, "--resume")[0] == 0
    reader = ("data.0.tasks={caption: 1}", "stages.0.steps=1", "--run", tmp_path / "reader")
    assert "try: diptych ask PICTURE" in diptych_run("train", recipe, *reader)[1], "it has not learnt to draw"
    code, _, err = diptych_run("train", recipe, "stages.0.lrr=1", "--run", tmp_path / "other")
    assert code == 2 and "did you mean 'lr'" in err


def test_plan_of_the_published_size_needs_no_memory(diptych_run, tmp_path):
    (tmp_path / "big.yaml").write_text(RECIPE)
    code, out, _ = diptych_run("plan", tmp_path / "big.yaml", "size=paper")
    assert code == 0 and "not measured" in out and "GiB" in out


def test_lists(diptych_run):
    code, out, _ = diptych_run("ls")
    assert code == 0 and all(name in out for name in ("bagel", "tokenizer", "recipes", "ledger"))
    for name in common.recipes():
        assert name in diptych_run("ls", "recipes")[1]
    code, out, _ = diptych_run("zoo", "list")
    assert code == 0 and "tokenizer" in out
    assert "Quality" in diptych_run("zoo", "card", "tokenizer")[1]
    code, _, err = diptych_run("zoo", "build", "kodec")
    assert code == 2 and "did you mean 'codec'" in err


def test_show_explains_a_system(diptych_run, tmp_path):
    code, out, _ = diptych_run("show", "bagel", "--size", "tiny", "--mask", tmp_path / "mask.png")
    assert code == 0 and "2505.14683" in out and "mixture of transformers" in out and "vocabulary_size" in out
    mask = np.asarray(Pil.open(tmp_path / "mask.png"))
    colours = {tuple(c) for c in mask.reshape(-1, 3)}
    assert {(52, 101, 164), (78, 154, 6), (206, 92, 0)} <= colours, "text, features and latents are told apart"
    assert diptych_run("show", "vlm", "--size", "tiny", "--mask", tmp_path / "vlm.png")[0] == 0
    code, _, err = diptych_run("show", "autoencoder", "--mask", tmp_path / "none.png")
    assert code == 2 and "leave --mask away" in err and not (tmp_path / "none.png").exists()
    code, _, err = diptych_run("show", "bagle")
    assert code == 2 and "did you mean 'bagel'" in err


def test_doctor_of_the_machine(diptych_run):
    code, out, _ = diptych_run("doctor")
    complete = "problem" not in out
    assert code == (0 if complete else 1)
    assert all(word in out for word in ("torch", "cores", "bfloat16", "tokenizer", "FLOP/s"))


def test_doctor_of_data(diptych_run, tmp_path):
    for i in range(3):
        Pil.new("RGB", (8, 8), (i * 80, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    code, out, _ = diptych_run("doctor", "data", tmp_path)
    assert code == 0 and "3 usable documents" in out and "tokens" in out
    (tmp_path / "1.png").write_bytes(b"no picture")
    code, out, _ = diptych_run("doctor", "data", tmp_path, "--tokenizer", "none", "--sheet", tmp_path / "sheet.png")
    assert code == 1 and "1.png" in out and "characters" in out and (tmp_path / "sheet.png").exists()
    assert diptych_run("doctor", "data")[0] == 2
    assert diptych_run("doctor", "machine", tmp_path)[0] == 2


def test_parity_fails_past_the_tolerance(diptych_run, monkeypatch, tmp_path):
    from diptych.adapters import parity
    from diptych.adapters.cases import Case

    for error, expected in ((1e-6, 0), (1.0, 1)):
        case = Case(name="logits", absolute=error, relative=error, tolerance=2e-4)
        monkeypatch.setattr(parity, "run", lambda system, folder, case=case: [case])
        code, out, _ = diptych_run("parity", "bagel", tmp_path)
        assert code == expected and "logits" in out
    monkeypatch.undo()
    code, _, err = diptych_run("parity", "bagle", tmp_path)
    assert code == 2 and "did you mean 'bagel'" in err
    assert diptych_run("parity", "bagel", tmp_path / "gone")[0] == 2
