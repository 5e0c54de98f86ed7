import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diptych import config
from diptych.alignment.rewards.table import make
from diptych.benchmarks.evaluate import evaluate
from diptych.ledger import Entry, proportion
from diptych.parts.resources import SHIPPED, stored_config
from diptych.parts.vae import AutoEncoderConfig
from diptych.systems.bagel import Bagel
from diptych.systems.io import initialise, load_system, save_system, system_tensors
from diptych.training.recipe import Recipe, Source, Stage
from diptych.world.tasks import document
from diptych.zoo import models


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "run"
    save_system(Bagel(Bagel.tiny()), folder / "model")
    data = (Source(world="mini", tasks={"draw": 1}),)
    recipe = Recipe(system="bagel", data=data, stages=(Stage(steps=2, batch=3, lr=1e-3),))
    config.save(recipe, folder / "recipe.yaml")
    last = {"step": 2, "losses": {"text": 1.5}, "seconds": 4.0, "documents": 6, "tokens": 99}
    (folder / "metrics.jsonl").write_text(json.dumps(last))
    return folder


def test_a_bundle_is_the_run_in_half_precision_with_its_recipe_and_card(run: Path, tmp_path: Path) -> None:
    folder = models.bundle(run, "mini", tmp_path)
    stored, trained = load_system(folder), load_system(run / "model")
    for (name, a), b in zip(system_tensors(stored).items(), system_tensors(trained).values(), strict=True):
        assert torch.equal(a, b.to(torch.bfloat16).float()), name
    assert (folder / "recipe.yaml").read_text() == (run / "recipe.yaml").read_text()
    assert "2 steps of 3 documents" in (folder / "card.md").read_text()
    found = Entry(name="mini", kind="quality", system="bagel", level="E1", recipe={},
                  metrics={"draw/test": proportion(3, 4), "draw/test/count": proportion(4, 4)})
    for _ in range(2):  # measuring again replaces the line
        models.note_quality(folder, found)
        text = (folder / "card.md").read_text()
        assert text.count("Measured quality") == 1 and "draw/test 75.0%" in text and "draw/test/count" not in text
        assert "2 steps of 3 documents" in text
    half = (folder / "model.safetensors").stat().st_size
    assert half < 0.6 * (run / "model" / "model.safetensors").stat().st_size
    assert models.bundle(run, "mini", tmp_path) == folder  # replaces, leaves nothing behind
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mini", "run"]


def test_a_bundle_names_its_untouched_ingredients_instead_of_holding_them(tmp_path: Path) -> None:
    codec = AutoEncoderConfig(**stored_config("zoo/codec"))
    trained = Bagel(replace(Bagel.tiny(), codec=codec))
    initialise(trained, {"codec": "zoo/codec"})
    folder = tmp_path / "run"
    save_system(trained, folder / "model")
    stages = (Stage(name="one", steps=1, batch=3, lr=1e-3, freeze=("codec", "vision")),
              Stage(name="two", steps=1, batch=3, lr=1e-3, freeze=("codec",)))
    data = (Source(world="mini", tasks={"draw": 1}),)
    init = {"codec": "zoo/codec", "vision": "zoo/clip#vision"}
    config.save(Recipe(system="bagel", data=data, init=init, stages=stages), folder / "recipe.yaml")
    (folder / "metrics.jsonl").write_text(json.dumps({"losses": {}, "seconds": 1.0, "documents": 6, "tokens": 9}))
    bundled = models.bundle(folder, "mini", tmp_path)
    names = set(load_file(bundled / "model.safetensors"))
    assert not any(n.startswith("codec.") for n in names)  # named in the config instead
    assert any(n.startswith("vision.") for n in names)  # a stage trained it
    stored = load_system(bundled)
    for name, tensor in stored.codec.state_dict().items():
        assert torch.equal(tensor, trained.codec.state_dict()[name]), name
    text = (bundled / "config.json").read_text()
    (bundled / "config.json").write_text(text.replace("zoo/codec", "zoo/absent"))
    with pytest.raises(FileNotFoundError, match="zoo/absent"):
        load_system(bundled)


def test_an_interrupted_build_says_how_to_go_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped:
        stop = True

        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

        def run(self) -> None:
            pass

    monkeypatch.setattr("diptych.training.trainer.Trainer", Stopped)
    with pytest.raises(RuntimeError, match="build again"):
        models.build("mini", run / "recipe.yaml", tmp_path, run)


def test_all_weights_together_stay_under_their_budget() -> None:
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file()) < 40_000_000
    assert not [p for p in SHIPPED.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".checkpoint")]


@pytest.mark.parametrize("name", ["janus-grid", "show-o-grid"])
def test_models_of_the_grid_do_what_studies_start_from(name: str) -> None:
    system = load_system(SHIPPED / name).eval()
    results = evaluate(system, ["draw", "plan"], n=16, world="grid", progress=False)
    assert min(results.right("draw").value, results.right("plan").value) >= 0.6
    asked = [document("check", i, split="test", world="grid") for i in range(24)]
    said = system.generate([d.prompt() for d in asked])
    assert sum(s.value for s in make("answer")(asked, said)) / len(asked) >= 0.7
