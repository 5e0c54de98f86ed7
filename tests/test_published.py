"""Published checkpoints: found, read lazily, imported, given back bit for bit, and refused where they are broken."""
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published_folders import APART, GOLDENS, MADE, WHOLE, copy_of
from safetensors.torch import load_file, save_file

from diptych.adapters import published
from diptych.adapters.convert import PUBLISHED, export, export_folder, import_folder
from diptych.adapters.tensors import Tensors, weights_in
from diptych.cli.main import main
from diptych.systems.base import System
from diptych.systems.io import load_system, system_tensors


def weights_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every weights file of a folder; golden outputs are none."""
    return {str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("*.safetensors"))
            if p.stem != "golden" and PUBLISHED not in p.parts}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)


def assert_same_files(source: Path, folder: Path) -> None:
    theirs, back = weights_of(source), weights_of(folder)
    assert theirs.keys() == back.keys()
    for name in theirs:
        assert same(theirs[name], back[name]), name
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    for path in source.rglob("*.json"):
        assert (folder / path.relative_to(source)).read_bytes() == path.read_bytes()


@pytest.fixture(scope="module", params=[*WHOLE, *MADE])
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(family, published folder, folder it was imported to)"""
    home = tmp_path_factory.mktemp("folders")
    family, layout, make = MADE.get(request.param, (request.param, "original", None))
    source = WHOLE[family] if make is None else home / "source"
    if make is not None:
        make(source)
    done = import_folder(source, home / "model")
    assert (done.system, done.layout) == (family, layout) and not done.report
    return family, source, home / "model"


def test_an_import_comes_back_bit_for_bit(imported: tuple[str, Path, Path], tmp_path: Path) -> None:
    family, source, folder = imported
    assert export_folder(folder, tmp_path)[0] == family
    assert_same_files(source, tmp_path)


def test_an_import_is_the_model_that_is_loaded(imported: tuple[str, Path, Path]) -> None:
    _, source, folder = imported
    here, there = load_system(folder), published.load(source)
    assert type(here) is type(there) and here.config == there.config
    assert same(system_tensors(here), system_tensors(there))
    assert all(p.dtype == torch.float32 for p in here.parameters())
    stored = load_system(folder, dtype=None)
    assert same(system_tensors(stored), load_file(folder / "model.safetensors"))


def test_a_model_of_ours_is_stated_in_the_published_layout(imported: tuple[str, Path, Path], tmp_path: Path) -> None:
    family, _, folder = imported
    model = load_system(folder)
    shutil.rmtree(folder / PUBLISHED, ignore_errors=True)  # as if it had been trained here
    for layout in published.layouts(family):
        out = tmp_path / layout
        export(model, out, layout=layout)
        assert published.find_layout(out) == (family, layout)
        again = published.load(out)
        assert same(system_tensors(again), system_tensors(model))
        changed = {f for f, v in vars(again.config).items() if v != getattr(model.config, f)}
        assert changed <= {"sampling", "row"}, changed


def test_the_documentation_names_every_layout_and_part() -> None:
    lines = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| family |"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start + 2 : lines.index("", start)]]
    told = {(row[0], row[1]): {row[4].split("`")[1]} if row[4] else set() for row in rows}
    assert told == {(family, name): set(layout.parts) for family in published.FAMILIES
                    for name, layout in published.layouts(family).items()}
    assert f"{len(published.FAMILIES)} families" in " ".join(lines).replace("Nine", "9")


# -- what is found ----------------------------------------------------------------------------------------------------

def test_what_a_folder_is_follows_from_its_files(tmp_path: Path) -> None:
    for family in published.FAMILIES:
        assert published.find_layout(GOLDENS / family)[0] == family
    with pytest.raises(ValueError, match=r"(?s)expected a published checkpoint in .*, got nothing; fix: one of bagel"):
        published.find_layout(tmp_path)
    with pytest.raises(FileNotFoundError, match="got no folder"):
        published.find_layout(tmp_path / "none")
    with pytest.raises(ValueError, match="got unknown 'januss'; fix: did you mean 'janus'"):
        published.find_layout(tmp_path, "januss")
    both = copy_of("janus", tmp_path / "both")
    for name in ("ema.safetensors", "ae.safetensors", "llm_config.json"):
        shutil.copy(WHOLE["bagel"] / name, both)
    with pytest.raises(ValueError, match=r"one published layout .* bagel \(original\), janus \(original\); fix: say"):
        published.load(both)
    assert published.find_layout(both, "janus") == ("janus", "original")
    harmon = copy_of("harmon", tmp_path / "harmon")
    for size in ("0.5b", "1.5b"):
        (harmon / f"harmon_{size}.pth").touch()
    with pytest.raises(ValueError, match=r"one Harmon in .*, got harmon_0.5b.pth, harmon_1.5b.pth; fix: keep one"):
        published.load(harmon)


def test_what_does_not_fit_is_named_and_allowed_only_when_asked(tmp_path: Path) -> None:
    folder = copy_of("janus", tmp_path / "janus")
    weights = load_file(folder / "weights.safetensors")
    head = weights.pop("language_model.lm_head.weight")
    weights |= {"surplus": torch.zeros(2), "gen_embed.weight": weights["gen_embed.weight"][:, :-1].contiguous()}
    save_file(weights, folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(language_model.lm_head.weight\); 1 unexpected \(surplus\); "
                                         r"1 reshaped \(code_embed.weight: expected"):
        published.load(folder)
    with pytest.raises(ValueError, match="1 reshaped"):
        import_folder(folder, tmp_path / "ours", allow=("missing", "unexpected"))
    assert not (tmp_path / "ours").exists() and len(list(tmp_path.iterdir())) == 1
    done = import_folder(folder, tmp_path / "ours", allow=published.KINDS)
    assert done.report and "surplus" in done.unused
    model = load_system(tmp_path / "ours")
    assert model.get_parameter("head.weight").shape == head.shape and model.get_parameter("head.weight").std() > 0
    export_folder(tmp_path / "ours", tmp_path / "back")
    assert same(load_file(tmp_path / "back" / "weights.safetensors"), weights)
    with pytest.raises(FileExistsError, match="expected a new folder"):
        import_folder(folder, tmp_path / "ours")


@pytest.mark.parametrize("form", APART)
def test_what_is_published_apart_is_asked_for_and_comes_back_inside(form: str, tmp_path: Path) -> None:
    family, _, make = MADE[form]
    part, place = APART[form]
    make(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "alone")
    (tmp_path / "alone" / place).rename(tmp_path / "5f2c")  # as the hub's library names folders
    with pytest.raises(ValueError, match=f"expected the folder of .*, got none; fix: .*--part {part}=FOLDER"):
        published.load(tmp_path / "alone")
    with pytest.raises(ValueError, match=f"unknown '{part[:-1]}'; fix: did you mean '{part}'"):
        published.load(tmp_path / "alone", parts={part[:-1]: tmp_path / "5f2c"})
    done = import_folder(tmp_path / "alone", tmp_path / "ours", parts={part: tmp_path / "5f2c"})
    assert done.system == family
    export_folder(tmp_path / "ours", tmp_path / "back")
    assert_same_files(tmp_path / "whole", tmp_path / "back")


# -- files ------------------------------------------------------------------------------------------------------------

def test_torch_files_and_shards_are_read_like_one_file(tmp_path: Path) -> None:
    whole = published.load(copy_of("janus", tmp_path / "janus"))
    weights = load_file(tmp_path / "janus" / "weights.safetensors")
    (tmp_path / "janus" / "weights.safetensors").unlink()
    names = sorted(weights)
    halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for name, own in halves.items():
        torch.save({k: weights[k] for k in own}, tmp_path / "janus" / name)
    index = tmp_path / "janus" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {k: name for name, own in halves.items() for k in own}}))
    assert same(system_tensors(published.load(tmp_path / "janus")), system_tensors(whole))
    import_folder(tmp_path / "janus", tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    assert same(dict(Tensors({"": weights_in(tmp_path / "back")})), weights)
    with pytest.raises(ValueError, match="expected every tensor in one file, got .*fix: remove one of them"):
        Tensors({"": [*weights_in(tmp_path / "janus"), WHOLE["janus"] / "weights.safetensors"]})
    (tmp_path / "janus" / next(iter(halves))).unlink()
    with pytest.raises(FileNotFoundError, match="got 1 missing"):
        published.load(tmp_path / "janus")
    index.write_text(json.dumps({"weight_map": {"a": "../../elsewhere.bin"}}))
    with pytest.raises(ValueError, match="expected shards beside .*, got '../../elsewhere.bin'"):
        published.load(tmp_path / "janus")


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["DIPTYCH_EVIL"],)


def test_no_file_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_EVIL", str(tmp_path / "was here"))
    folder = copy_of("janus", tmp_path / "janus")
    (folder / "weights.safetensors").unlink()
    for write in (lambda path: torch.save({"a": Evil()}, path), lambda path: path.write_bytes(pickle.dumps(Evil()))):
        write(folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="nothing but tensors|whole torch file"):
            import_folder(folder, tmp_path / "ours")
        assert not (tmp_path / "was here").exists() and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(("content", "message"), [
    (b"", "whole safetensors file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    (b"<!DOCTYPE html><html>not found</html>", "whole safetensors file"),
    (None, "whole safetensors file"),
])
def test_broken_weights_are_an_error_that_names_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    folder = copy_of("harmon", tmp_path / "harmon")
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=message) as error:
        published.load(folder)
    assert str(path) in str(error.value)


def test_broken_configs_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    folder = copy_of("janus", tmp_path / "janus")
    (folder / "config.json").write_text('{"model_type": "jan')
    with pytest.raises(ValueError, match="expected JSON in .*config.json"):
        published.load(folder, system="janus", layout="original")
    sizes = json.loads((WHOLE["janus"] / "config.json").read_text())
    sizes["language_config"]["hidden_size"] *= 1000  # nothing of that size is made: shapes are compared first
    sizes["language_config"]["intermediate_size"] *= 100_000
    (folder / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(ValueError, match="reshaped"):
        published.load(folder)


MEMORY = """
import re, sys
from pathlib import Path
from diptych.adapters import published
from diptych.systems import janus

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

published.load(sys.argv[2], dtype=None)  # what the code itself takes is there before
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
model = published.load(sys.argv[1], dtype=None)
size = sum(p.nbytes for p in model.parameters()) / 1024
print((status("VmHWM") - before) / size, size)
"""


def test_loading_takes_the_memory_of_the_weights_once(tmp_path: Path) -> None:
    config = json.loads((WHOLE["janus"] / "config.json").read_text())
    config["language_config"] |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6,
                                  "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 60000}
    for part, key in (("aligner", "n_embed"), ("gen_aligner", "n_embed"), ("gen_head", "n_embed")):
        config[f"{part}_config"]["params"][key] = 1024
    config["gen_head_config"]["params"]["image_token_embed"] = 1024
    folder = tmp_path / "large"
    folder.mkdir()
    from diptych.adapters.janus import config_of, rules
    from diptych.adapters.keys import to_theirs
    from diptych.systems.janus import Janus

    c = config_of(config)
    with torch.device("meta"):
        shapes = to_theirs(system_tensors(Janus(c)), rules(c))
    save_file({k: torch.full(v.shape, 0.5, dtype=torch.bfloat16) for k, v in shapes.items()},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, str(folder), str(GOLDENS / "janus")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    ratio, size = map(float, out.stdout.split())
    assert size > 300_000 and ratio < 1.1, out.stdout


# -- the command line -------------------------------------------------------------------------------------------------

def test_verbs_import_export_and_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, back = str(tmp_path / "ours"), tmp_path / "back"
    assert main(["import", str(WHOLE["harmon"]), "-o", ours]) == 0
    assert "harmon (original layout)" in capsys.readouterr().out
    assert main(["export", ours, "-o", str(back)]) == 0
    assert main(["export", ours, "-o", str(back)]) == 2 and "expected a new folder" in capsys.readouterr().err
    assert main(["export", str(WHOLE["janus"]), "-o", str(tmp_path / "hf"), "--layout", "huggingface"]) == 0
    assert published.find_layout(tmp_path / "hf") == ("janus", "huggingface")
    assert weights_of(back).keys() == weights_of(WHOLE["harmon"]).keys()
    assert main(["export", "mini", "-o", str(tmp_path / "mini"), "--layout", "huggingface"]) == 2
    assert "layouts of bagel" in capsys.readouterr().err


def test_a_name_on_the_hub_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.safetensors" in allow_patterns
        return str(WHOLE["harmon"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = published.load("someone/harmon")
    assert isinstance(model, System) and asked == ["someone/harmon"]
    assert published.locate(str(tmp_path)) == tmp_path and len(asked) == 1
