"""RLinf-VLA: published outputs, of pure functions and of a small OpenVLA."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.adapters import openvla, parity
from diptych.adapters.cases import Case

GOLDEN = Path(__file__).parent / "goldens" / "rlinf-vla"


def test_all_published_outputs_are_reproduced() -> None:
    cases = parity.run("rlinf-vla", GOLDEN)
    assert all(c.passed for c in cases), parity.table(cases)
    stored = {k.replace(".output", "") for k in load_file(GOLDEN / "golden.safetensors") if ".output" in k}
    names = {c.name for c in cases}
    assert stored < names and len(stored) == 95
    values = json.loads((GOLDEN / "golden.json").read_text())
    assert sum(n.startswith("placement.") for n in names) == len(values["placement"])
    metrics = {f"loss.{case}.{key}" for case, found in values["loss_metrics"].items() for key in found}
    assert metrics < names
    assert max(c.absolute for c in cases if not c.name.startswith(("policy", "loss"))) < 1e-6
    assert max(c.absolute for c in cases) < 1e-5


@pytest.mark.parametrize("name, broken", [
    ("vision_backbone.featurizer.reg_token", {"policy.vision_features"}),
    ("vision_backbone.featurizer.blocks.0.ls2.scale_factor", {"policy.vision_features"}),
    ("value_head.mlp.4.weight", {"policy.t1.values"}),
    ("language_model.lm_head.weight", {"policy.logits_last"}),
])
def test_one_wrong_weight_fails(name: str, broken: set[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "g"))
    tensors = load_file(folder / "weights.safetensors")
    tensors[name].view(-1)[::2] += 0.3
    save_file(tensors, folder / "weights.safetensors")
    assert broken <= {c.name for c in parity.run("rlinf-vla", folder) if not c.passed}


def test_weights_that_are_not_read_change_nothing(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "g"))
    tensors = load_file(folder / "weights.safetensors")
    for name in ("vision_backbone.featurizer.norm.weight", "vision_backbone.fused_featurizer.blocks.2.mlp.fc1.weight"):
        tensors[name] += 1.0
    save_file(tensors, folder / "weights.safetensors")
    assert all(c.passed for c in parity.run("rlinf-vla", folder))


def test_rows_do_not_depend_on_each_other() -> None:
    policy = openvla.load(GOLDEN)
    patches = torch.randn(2, 4, policy.config.language.block.width)
    prompts = [torch.tensor([1, 5, 6]), torch.tensor([1, 9])]
    actions = torch.tensor([[72, 80, 95, 90], [73, 74, 75, 76]])
    both = policy(patches, prompts, actions)
    for i in range(2):
        torch.testing.assert_close(policy(patches[i:i + 1], prompts[i:i + 1], actions[i:i + 1]), both[i:i + 1])


def test_another_architecture_is_refused() -> None:
    about = json.loads((GOLDEN / "config.json").read_text())
    for changes in ({"timm_model_ids": about["timm_model_ids"][::-1]}, {"arch_specifier": "linear"}):
        with pytest.raises(ValueError, match="expected the towers vit_large_patch14_reg4_dinov2"):
            openvla.PolicyConfig.from_published(about | changes)


def test_equal_infinities_agree() -> None:
    inf = float("inf")
    own = torch.tensor([-inf, 1.0])
    assert Case.compare("x", own, torch.tensor([-inf, 1.5]), 1.0).absolute == 0.5
    assert not Case.compare("x", own, torch.tensor([2.0, 1.0]), 1.0).passed
    assert not Case.compare("x", own, torch.tensor([inf, 1.0]), 1.0).passed
