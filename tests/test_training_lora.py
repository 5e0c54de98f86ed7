import json
from pathlib import Path

import pytest
import torch
import training_system as small
from safetensors.torch import load_file
from torch import nn

from diptych.systems.io import load_system
from diptych.training import lora
from diptych.training.recipe import Lora, Stage
from diptych.training.trainer import Trainer


def adapted() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4, bias=False))
    lora.attach(model, ["0", "2"], rank=2, alpha=6.0)
    for layer in lora.layers(model).values():
        nn.init.normal_(layer.lora_B.weight)
    return model, torch.randn(5, 6)


def test_starts_as_the_base_model_and_trains_the_addition_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    x = torch.randn(5, 6)
    before = model(x)
    assert lora.attach(model, ["1"], rank=2, alpha=4.0) == ["1"]
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"1.lora_A.weight", "1.lora_B.weight"}
    with pytest.raises(ValueError, match="lora layers"):
        lora.attach(model, ["nothing"], rank=2, alpha=4.0)


def test_merged_equals_unmerged_and_the_formula() -> None:
    model, x = adapted()
    layer = model[0]
    expected = layer.base(x) + x @ layer.lora_A.weight.T @ layer.lora_B.weight.T * 3.0
    torch.testing.assert_close(layer(x), expected)
    before = model(x)
    lora.merge(model)
    assert type(model[0]) is nn.Linear and not lora.layers(model)
    torch.testing.assert_close(model(x), before)


def test_inactive_layers_leave_the_base_model() -> None:
    model, x = adapted()
    before = model(x)
    with lora.inactive(model):
        reference = model[2].base(model[1](model[0].base(x)))
        assert torch.equal(model(x), reference)
        with pytest.raises(KeyError), lora.inactive(model):
            raise KeyError
        assert torch.equal(model(x), reference)  # the inner one gives back what it found
    assert torch.equal(model(x), before) and not torch.equal(before, reference)


def test_saved_in_the_layout_of_peft_and_loaded(tmp_path: Path) -> None:
    model, x = adapted()
    lora.save(model, tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["peft_type"] == "LORA" and about["r"] == 2 and about["target_modules"] == ["0", "2"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        "base_model.model.0.lora_A.weight": (2, 6), "base_model.model.0.lora_B.weight": (8, 2),
        "base_model.model.2.lora_A.weight": (2, 8), "base_model.model.2.lora_B.weight": (4, 2)}
    plain = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4, bias=False))
    plain.load_state_dict({"0.weight": model[0].base.weight, "0.bias": model[0].base.bias,
                           "2.weight": model[2].base.weight})
    lora.load(plain, tmp_path)
    assert torch.equal(plain(x), model(x))
    with pytest.raises(ValueError, match="got none"):
        lora.save(nn.Linear(2, 2), tmp_path)


def test_a_recipe_trains_saves_and_merges_it(tmp_path: Path) -> None:
    system = small.build()
    base = {n: p.detach().clone() for n, p in system.named_parameters()}
    recipe = small.recipe(lora=Lora(layers=("blocks",), rank=2), ema=0.0, stages=(Stage(steps=6, batch=4, lr=1e-2),))
    Trainer(recipe, tmp_path / "run", system=system, streams=small.words, device="cpu").run()
    assert len(load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")) == 8
    merged = load_system(tmp_path / "run" / "model", cls=small.TinyText)
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, base[n])}
    assert changed == {f"blocks.{i}.{p}.weight" for i in (0, 1) for p in ("up", "down")}
    again = small.build()
    lora.load(again, tmp_path / "run" / "lora")
    lora.merge(again)
    torch.testing.assert_close(again.blocks[1].up.weight, merged.blocks[1].up.weight)
