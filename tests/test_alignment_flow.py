"""Flow-GRPO: published outputs with a LoRA on Stable Diffusion 3, other sizes of them, the sampler, the window."""
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diptych.adapters import parity, peft
from diptych.adapters.keys import Rule
from diptych.alignment.sampler import RepeatSampler
from diptych.alignment.window import Window
from diptych.training import lora

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = GOLDENS / "flow-grpo"


def test_all_published_outputs_are_reproduced() -> None:
    cases = parity.run("flow-grpo", GOLDEN)
    assert all(c.passed for c in cases), parity.table(cases)
    stored = {k.replace(".output", "") for k in load_file(GOLDEN / "golden.safetensors") if ".output" in k}
    names = {c.name for c in cases}
    assert stored < names and len(stored) == 115 and sum(n.startswith("k_repeat_sampler") for n in names) == 3
    exact = [c for c in cases if c.name.startswith(("step.noise", "advantage", "ema"))]
    assert len(exact) == 51 and max(c.relative for c in exact) < 1e-6
    assert max(c.relative for c in cases) < 1e-4


@pytest.mark.parametrize("file, name, broken", [
    ("adapter_model.safetensors", "base_model.model.transformer_blocks.0.attn.to_v.lora_B.weight",
     {"grpo.cfg_kl.log_prob", "flow_dpo.theta_mse"}),
    ("adapter_rollout.safetensors", "base_model.model.transformer_blocks.1.attn.to_out.0.lora_A.weight",
     {"rollout.velocity_text", "flow_dpo.ref_mse"}),
])
def test_one_wrong_weight_fails(file: str, name: str, broken: set[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "g"))
    tensors = load_file(folder / file)
    tensors[name].add_(0.1)
    save_file(tensors, folder / file)
    assert broken <= {c.name for c in parity.run("flow-grpo", folder) if not c.passed}


def test_other_options_change_what_they_should(tmp_path: Path) -> None:
    """Numbers come from the folder."""
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "g"))
    about = json.loads((folder / "config.json").read_text()) | {"beta": 0.5, "clip_range": 1e-5, "dpo_beta": 7.0}
    (folder / "config.json").write_text(json.dumps(about))
    failed = {c.name for c in parity.run("flow-grpo", folder) if not c.passed}
    assert {"grpo.cfg_kl.loss", "grpo.cfg_kl.clipfrac", "flow_dpo.inside_term"} < failed
    assert not any(n.startswith(("step", "rollout")) or n.endswith(("log_prob", "mse", "kl_loss")) for n in failed)


def test_an_adapter_of_fused_layers_is_the_sum_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10))
    a, b = {n: torch.randn(2, 6) for n in "qv"}, {"q": torch.randn(3, 2), "v": torch.randn(4, 2)}
    tensors = {f"base_model.model.{n}.lora_{k}.weight": v[n] for k, v in (("A", a), ("B", b)) for n in "qv"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    rules = [Rule(("q.weight", "k.weight", "v.weight"), "0.weight", (3, 3, 4))]
    x, plain = torch.randn(5, 6), model[0]
    places = peft.attach(model, rules, tmp_path)
    added = model(x) - plain(x)
    expected = [3.0 * x @ a["q"].T @ b["q"].T, torch.zeros(5, 3), 3.0 * x @ a["v"].T @ b["v"].T]
    torch.testing.assert_close(added, torch.cat(expected, 1))
    model(x).square().sum().backward()
    found = peft.gradients(model, places)
    assert {k: v.shape for k, v in found.items()} == {
        k.removeprefix("base_model.model."): v.shape for k, v in tensors.items()}
    assert all(v.abs().sum() > 0 for v in found.values())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.lora_A.weight", "0.lora_B.weight"}
    assert lora.layers(model)["0"].rank == 4
    (tmp_path / "adapter_config.json").write_text(json.dumps(about | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora False, got True"):
        peft.attach(nn.Sequential(nn.Linear(6, 10)), rules, tmp_path)
    with pytest.raises(ValueError, match="expected layers of the network, got q, v"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(about))
        peft.attach(nn.Sequential(nn.Linear(6, 10)), [], tmp_path)


# -- the sampler ------------------------------------------------------------------------------------------------------

def test_every_chosen_prompt_is_asked_as_often() -> None:
    own = RepeatSampler(count=20, batch=6, repeats=4, processes=4, seed=1)
    for epoch in range(3):
        dealt = [own.indices(epoch, rank) for rank in range(4)]
        counts = Counter(i for part in dealt for i in part)
        assert set(counts.values()) == {4} and len(counts) == own.prompts == 6
        assert all(len(part) == 6 for part in dealt)
    assert own.indices(0) == own.indices(0) != own.indices(1)
    assert own.indices(0) != RepeatSampler(count=20, batch=6, repeats=4, processes=4, seed=2).indices(0)
    one = RepeatSampler(count=20, batch=24, repeats=4, seed=1)  # processes share out the same epoch
    assert one.indices(0) == [i for rank in range(4) for i in own.indices(0, rank)]


def test_groups_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4 \* 6\) to be a multiple of repeats \(5\)"):
        RepeatSampler(count=20, batch=6, repeats=5, processes=4)
    with pytest.raises(ValueError, match="at least 6 prompts, got 5"):
        RepeatSampler(count=5, batch=6, repeats=4, processes=4)
    with pytest.raises(ValueError, match="expected a rank of 1 processes, got 1"):
        RepeatSampler(count=20, batch=4, repeats=4).indices(0, 1)


# -- the window -------------------------------------------------------------------------------------------------------

def test_the_window_moves_from_noise_to_data_and_begins_again() -> None:
    own = Window(steps=25, size=4, stride=1, interval=25)  # as published
    starts = [own.at(i)[0] for i in range(25 * 22 + 1)]
    assert all(own.at(i) == range(own.at(i)[0], own.at(i)[0] + 4) for i in (0, 30, 549))
    assert starts[:26] == [0] * 25 + [1] and max(starts) == 21 and starts[-1] == 0
    assert Counter(starts[:-1]) == dict.fromkeys(range(22), 25)
    wide = Window(steps=10, size=4, stride=3, interval=1)
    assert [wide.at(i)[0] for i in range(4)] == [0, 3, 6, 0]


def test_later_windows_are_left_sooner() -> None:
    own = Window(steps=8, size=2, interval=8, rate=0.5, threshold=2)
    stays = [own.stay(s) for s in own.starts]
    assert stays == [8, 8, 8, 5, 3, 2, 2]  # ceil(8 exp(-0.5 k))
    assert [own.at(i)[0] for i in range(sum(stays))] == [s for s, n in zip(own.starts, stays, strict=True)
                                                          for _ in range(n)]


def test_the_window_may_be_anywhere() -> None:
    own = Window(steps=10, size=3, interval=2, order="random")
    starts = [own.at(i)[0] for i in range(200)]
    assert starts[::2] == starts[1::2] and set(starts) == set(range(8))
    assert [own.at(i) for i in range(9)] == [own.at(i) for i in range(9)]
    with pytest.raises(ValueError, match="expected 1 <= size <= steps"):
        Window(steps=3)
