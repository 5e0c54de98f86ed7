import dataclasses
import json
from pathlib import Path

import pytest
import torch
import training_system as small
from PIL import Image as Pil

from diptych import config
from diptych.config import ConfigError
from diptych.document import Document, Image, Text
from diptych.parts.feature_codec import FeatureCodecConfig
from diptych.parts.resources import stored_config
from diptych.parts.vae import AutoEncoderConfig
from diptych.systems import table
from diptych.systems.io import initialise, save_system
from diptych.training import setup
from diptych.training.feed import Deal, Share, open_stream, sample_documents
from diptych.training.optim import AdamW, undecayed
from diptych.training.plan import plan
from diptych.training.recipe import Optimizer, Recipe, Samples, Source, Stage, load_recipe
from diptych.training.stages import lr_at, trained_names


@pytest.fixture
def in_table(monkeypatch) -> None:
    row = table.Row(title="Tiny", paper="", year=2025, home="training_system:TinyText", levels=(), about="a test")
    monkeypatch.setitem(table.TABLE, "tiny-text", row)


def test_recipe_from_yaml_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("""
system: bagel
config: {trunk.layers: 6}
data:
- {world: mini, tasks: {caption: 1, draw: 2}, weight: 3}
- {folder: pictures}
stages:
- {name: a, steps: 5, batch: 4, lr: 1e-3, only: [connector]}
- {name: b, steps: 7, batch: 4, lr: 1e-4, sources: {folder: 0}}
""")
    recipe = load_recipe(path, ["stages.1.lr=3e-4", "optimizer.betas=[0.8, 0.9]"])
    assert recipe.steps == 12 and recipe.stages[1].lr == 3e-4 and recipe.optimizer.betas == (0.8, 0.9)
    assert [s.name for s in recipe.data] == ["world", "folder"]
    assert [recipe.stage_at(s) for s in (0, 4, 5, 11, 12)] == [(0, 0), (0, 0), (1, 5), (1, 5), (1, 5)]
    for bad, message in [("stages.1.name=a", "different names"), ("stages.0.sources={foldr: 1}", "'folder'"),
                         ("data.0.folder=x", "exactly one"), ("stages.0.warmup=9", "warmup"), ("stages=[]", "stage"),
                         ("precision=fp16", "bf16")]:
        with pytest.raises(ConfigError, match=message):
            load_recipe(path, [bad])
    assert config.from_dict(Recipe, config.to_dict(recipe)) == recipe


def test_schedules() -> None:
    cosine = Stage(steps=110, batch=1, lr=2.0, warmup=10, schedule="cosine", floor=0.1)
    rates = [lr_at(cosine, s) for s in range(110)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(2.0 * 0.55) and rates[-1] == pytest.approx(0.2, rel=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    stable = Stage(steps=100, batch=1, lr=1.0, schedule="linear", decay=0.2)
    assert lr_at(stable, 80) == 1.0 and lr_at(stable, 90) == pytest.approx(0.5)
    assert lr_at(Stage(steps=9, batch=1, lr=1.0), 8) == 1.0


def test_freezing_by_pattern_and_nearest_name() -> None:
    system = small.build()

    def names(**changes) -> set[str]:
        return trained_names(system, Stage(steps=1, batch=1, lr=1.0, **changes))

    assert names(only=("blocks.*.up",)) == {f"blocks.{i}.up.{p}" for i in (0, 1) for p in ("weight", "bias")}
    assert names(freeze=("blocks", "embed")) == {"norm.weight", "norm.bias", "probe.weight", "probe.bias"}
    weights = {f"blocks.1.{p}.weight" for p in ("norm", "up", "down")}
    assert names(only=("blocks.1",), freeze=("blocks.1.*.bias",)) == weights
    with pytest.raises(ValueError, match="did you mean 'blocks'"):
        names(freeze=("block",))
    with pytest.raises(ValueError, match="everything frozen"):
        names(freeze=("*",))


def test_rates_decay_and_carried_moments() -> None:
    system = small.build()
    stage = Stage(steps=1, batch=1, lr=0.1, rates={"blocks": 0.5, "blocks.1": 0.0})
    first = AdamW(system, trained_names(system, stage), Optimizer(weight_decay=0.3), stage)
    first.set_lr(0.1)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in first.param_groups for p in g["params"]}
    got = {n: settings[id(p)] for n, p in system.named_parameters()}
    assert got["blocks.0.up.weight"] == (0.05, 0.3) and got["blocks.1.up.weight"] == (0.0, 0.3)
    assert got["embed.weight"] == got["norm.weight"] == got["probe.bias"] == (0.1, 0.0)
    assert undecayed(system) == {n for n, (_, d) in got.items() if d == 0}
    for value in first.tensors().values():
        value.fill_(2.0)
    second = AdamW(system, ["probe.weight"], Optimizer(), stage)
    second.carry(first.tensors())
    assert all(bool((v == 2.0).all()) for v in second.tensors().values()) and len(second.tensors()) == 3


def test_muon_takes_the_inner_matrices_only() -> None:
    system = small.build()
    stage = Stage(steps=1, batch=1, lr=0.1, rates={"blocks.1": 0.5})
    muon = AdamW(system, trained_names(system, stage), Optimizer(kind="muon", weight_decay=0.0), stage)
    assert set(muon.muon) == {"probe.weight", *(f"blocks.{i}.{p}.weight" for i in (0, 1) for p in ("up", "down"))}
    before = {n: p.detach().clone() for n, p in system.named_parameters()}
    for p in system.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    muon.set_lr(0.1)
    muon.step_unless(torch.tensor(True))
    assert all(torch.equal(p, before[n]) for n, p in system.named_parameters())
    muon.step_unless(torch.tensor(False))
    for name, lr in (("blocks.0.up.weight", 0.1), ("blocks.1.up.weight", 0.05)):
        change = (dict(system.named_parameters())[name] - before[name]).detach()
        values = torch.linalg.svdvals(change / (lr * 0.2 * max(change.shape) ** 0.5))
        assert float(values.min()) > 0.5 and float(values.max()) < 1.3, values
    assert all(not torch.equal(p, before[n]) for n, p in system.named_parameters())


def test_a_step_is_the_same_however_it_is_dealt() -> None:
    documents = [Document((Text(text=str(i), target=True),)) for i in range(8)]

    def dealt(share: Share) -> dict[int, list[str]]:
        mine = documents[share.rank::share.processes]
        packet = Deal(lambda part: [d.pieces[0].text for d in part], share)(mine)
        return dict(zip(packet.indices, packet.batches, strict=True))

    alone = dealt(Share.of(4))
    together = dealt(Share.of(4, 0, 2)) | dealt(Share.of(4, 1, 2))
    assert alone == together == {0: ["0", "4"], 1: ["1", "5"], 2: ["2", "6"], 3: ["3", "7"]}


def test_open_stream_reads_files_and_stage_weights(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Pil.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / name / "x.png")
        (tmp_path / name / "x.txt").write_text(f"picture {name}")
    sources = tuple(Source(folder=str(tmp_path / n), name=n, task="caption", size=(4, 4)) for n in "ab")
    both = Stage(name="both", steps=1, batch=1, lr=1.0)
    only = Stage(name="only", steps=1, batch=1, lr=1.0, sources={"a": 0.0})
    recipe = small.recipe(data=sources, stages=(both, only))
    texts = [{d.targets[0].text for d in open_stream(recipe, s).take(12)} for s in recipe.stages]
    assert texts == [{"picture a", "picture b"}, {"picture b"}]
    assert open_stream(recipe, both).take(1)[0].of(Image)[0].pixels.shape == (3, 4, 4)
    shown = dataclasses.replace(recipe, samples=Samples(data=sources[1:], documents=2))
    assert [d.targets[0].text for d in sample_documents(shown, only)] == ["picture b"] * 2
    assert len(sample_documents(recipe, only)) == 8
    with pytest.raises(ValueError, match="got none"):
        open_stream(small.recipe(), small.recipe().stages[0])


def test_initial_weights_from_folders(tmp_path: Path) -> None:
    donor, system = small.build(1), small.build(2)
    save_system(donor, tmp_path)
    initialise(system, {"blocks.0": f"{tmp_path}#blocks.1", "norm": f"{tmp_path}#norm"})
    assert torch.equal(system.blocks[0].up.weight, donor.blocks[1].up.weight)
    assert not torch.equal(system.blocks[1].up.weight, donor.blocks[1].up.weight)
    for init, error in [({"norm": str(tmp_path)}, "unknown"), ({"nrm": f"{tmp_path}#norm"}, "'norm'"),
                        ({"norm": "zoo/absent"}, "expected weights")]:
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            initialise(system, init)


def test_recipes_build_systems_from_the_table(tmp_path: Path, in_table: None) -> None:
    recipe = small.recipe(system="tiny-text", config={"width": 24}, seed=4)
    a, b = setup.build_system(recipe), setup.build_system(recipe)
    assert a.config == small.TinyText.Config(width=24)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    other = setup.build_system(small.recipe(system="tiny-text", config={"width": 24}, seed=5))
    assert not torch.equal(a.embed.weight, other.embed.weight)
    for changes, message in (({"size": "tinny"}, "'tiny'"), ({"config": {"widht": 3}}, "'width'"),
                             ({"system": "tiny-txt"}, "'tiny-text'")):
        with pytest.raises(ValueError, match=message):
            setup.build_system(small.recipe(**{"system": "tiny-text", **changes}))


def test_plan_counts_what_a_step_takes(tmp_path: Path, in_table: None) -> None:
    line = json.dumps([{"role": "user", "content": "say it"}, {"role": "assistant", "content": "x" * 16}])
    (tmp_path / "a.jsonl").write_text((line + "\n") * 20)
    stages = (Stage(name="a", steps=3, batch=16, lr=1.0), Stage(name="b", steps=2, batch=8, lr=1.0, freeze=("blocks",)))
    made = plan(small.recipe(data=(Source(messages=str(tmp_path / "a.jsonl")),), stages=stages, accumulate=2))
    width, tokens = 16, 16 * 16
    # forward: two blocks of 4 w^2 and the head of 256 w on all but the last token, the probe once; backward: twice
    expected = 3 * 2 * (tokens * 2 * 4 * width**2 + (tokens - 16) * 256 * width + 16 * width**2)
    assert made.counted and made.stages[0].flops == pytest.approx(expected, rel=0.01)
    assert made.stages[0].tokens == tokens and made.stages[1].flops < made.stages[0].flops / 2
    system = small.build()
    assert made.parameters["blocks"] == sum(p.numel() for p in system.blocks.parameters())
    assert made.stages[0].trained == system.num_parameters() == made.memory["average"] // 4
    assert made.memory["optimizer"] == sum(8 * p.numel() + 4 for p in system.parameters())
    assert made.memory["weights"] == 4 * system.num_parameters() + 4
    # at least the logits (float32) of a micro-batch are kept
    assert made.memory["activations"] > tokens / 2 * 256 * 4 * 0.9
    assert made.flops == pytest.approx(3 * made.stages[0].flops + 2 * made.stages[1].flops)
    assert made.seconds(0.5) == pytest.approx(made.flops / made.peak * 2) and made.peak > 1e8


def test_a_part_may_be_of_the_kind_that_its_weights_are() -> None:
    """A codec of features gives way to an autoencoder, with the statistics stored beside its weights."""
    recipe = Recipe(system="blip3-o", size="small", init={"codec": "zoo/codec"},
                    stages=(Stage(steps=1, batch=1, lr=0.0),),
                    config={"latent_patch": 2, "generator": {"token_width": 24}, "codec.norm_groups": 8})
    made = setup.system_config(recipe)[1].codec  # type: ignore[attr-defined]
    stored = AutoEncoderConfig(**stored_config("zoo/codec"))
    assert made == dataclasses.replace(stored, norm_groups=8) and stored.scale != 1.0
    kept = setup.system_config(dataclasses.replace(recipe, init={"codec.tower": "zoo/clip#vision"}, config={}))[1]
    assert isinstance(kept.codec, FeatureCodecConfig)  # type: ignore[attr-defined]
