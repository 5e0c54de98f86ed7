"""The loop of alignment: what is rewarded becomes likelier, controls learn from the same samples, runs go on."""
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filling import filled

from diptych import config
from diptych.alignment.aligner import Aligner
from diptych.alignment.game import Contest
from diptych.alignment.learner import Learner
from diptych.alignment.policy import act
from diptych.alignment.recipe import Align, Ask, Grpo
from diptych.alignment.rewards.base import Facts, Rating, Reward
from diptych.alignment.start import load
from diptych.alignment.surrogate import Clip
from diptych.cli.common import recipes
from diptych.config import ConfigError
from diptych.document import Document, Image
from diptych.systems.io import load_system
from diptych.systems.table import find
from diptych.training.optim import AdamW
from diptych.training.recipe import Lora, Optimizer, Stage
from diptych.world.tasks import document


class Bright(Reward):
    FACTS = Facts(name="bright", about="mean of the pixels", low=-1, high=1)

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Any]:
        return [Rating(float(d.of(Image)[-1].pixels.mean())) for d in made]  # type: ignore[union-attr]


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    return filled(find(name)(find(name).tiny())).eval()


def plainly(system: Any) -> Any:
    """Pictures whose brightness is that of their latents or codes: an untrained codec hides what was drawn."""
    def decode(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        level = x.float().flatten(1).mean(1)
        level = level.tanh() if x.is_floating_point() else 2 * level / (1 if int(x.max()) < 2 else 64) - 1
        return level.clamp(-1, 1)[:, None, None, None].expand(-1, 3, *(s * system.stride for s in grid))

    system.decode = decode
    return system


def recipe(name: str, **changes: Any) -> Align:
    sampling: dict[str, Any] = {"bagel": {"evaluations": 4, "stochastic": 0.7}, "show-o": {"evaluations": 4},
                                "janus": {"size": [32, 32]}}.get(name, {})
    sampling = {**sampling, "guidance": {"branches": []}, "codes": {"temperature": 1.0}}
    return Align(**{"tasks": {"draw": Ask(reward="scene")}, "group": 8, "prompts": 2, "iterations": 12,
                    "sampling": sampling, "lr": 2e-3, "freeze": ("codec",), "save_every": 5} | changes)


def aligner(name: str, folder: Path, **changes: Any) -> Aligner:
    return Aligner(recipe(name, **changes), plainly(tiny(name)), folder, rewards={"draw": Bright()})


@pytest.mark.parametrize(("name", "kind"), [("janus", "code"), ("bagel", "flow"), ("show-o", "masked code"),
                                            ("vargpt", "scale")])
def test_what_is_rewarded_becomes_likelier(name: str, kind: str, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    a = aligner(name, tmp_path, grpo=Grpo(clips={"flow": Clip(low=0.1, high=0.1)}), iterations=6)
    for _ in range(a.recipe.iterations):
        lines.append(a.iterate())
    first, last = (sum(v["reward draw"] for v in part) / 2 for part in (lines[:2], lines[-2:]))
    assert last > first + 0.05, [v["reward draw"] for v in lines]
    assert all(v["gaps"][kind]["largest"] < 0.02 for v in lines), "acting and learning agree at every first update"
    assert all(v["clipped"] == 0 for v in lines), "with one update every ratio is 1"


def test_the_control_learns_from_the_best_of_the_same_samples(tmp_path: Path) -> None:
    ours, control = aligner("janus", tmp_path / "a"), aligner("janus", tmp_path / "b", method="best")
    assert ours.ask()[2] == control.ask()[2]
    line = control.iterate()
    assert line["used"] == 2 and line["answers"] == 16 and "gaps" not in line


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = aligner("janus", tmp_path / "whole", iterations=4, updates=2, ema=0.9, save_every=2)
    whole.run()
    part = aligner("janus", tmp_path / "part", iterations=2, updates=2, ema=0.9, save_every=2)
    part.run()
    rest = aligner("janus", tmp_path / "part", iterations=4, updates=2, ema=0.9, save_every=2)
    rest.run()
    for (n, p), (_, q) in zip(whole.system.named_parameters(), rest.system.named_parameters(), strict=True):
        assert torch.equal(p, q), n
    told = [json.loads(line) for line in (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()]
    assert [v["iteration"] for v in told] == [1, 2, 3, 4] and told[-1]["answers"] == 64
    assert load_system(tmp_path / "part" / "model").num_parameters() == whole.system.num_parameters()
    with pytest.raises(ConfigError, match="lr"):
        aligner("janus", tmp_path / "part", iterations=4, updates=2, ema=0.9, save_every=2, lr=1.0).run()


def test_distance_to_the_model_as_it_was() -> None:
    """A copy and a LoRA switched off are the same reference; without advantages only the distance moves weights."""
    found = []
    for with_lora in (False, True):
        a = Aligner(recipe("bagel", grpo=Grpo(beta=0.1), lora=Lora(layers=("trunk",)) if with_lora else None),
                    tiny("bagel"), "unused", rewards={"draw": Bright()})
        asked = [document("draw", 1)] * 2
        taken = act(a.system, asked, a.sampling, [1, 2])
        line = a.learner.update(taken, torch.zeros(2), fresh=True)
        assert line["kl"] == pytest.approx(0, abs=1e-6) and line["grad_norm"] == pytest.approx(0, abs=1e-5)
        for p in a.optimizer.named.values():
            p.data.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
        found.append(a.learner.update(taken, torch.zeros(2), fresh=False)["kl"])
    assert min(found) > 1e-6


@pytest.mark.parametrize("reduction", ["token", "sequence", "sequence_sum", "all"])
def test_micro_batches_change_nothing(reduction: Any) -> None:
    gradients = []
    for micro in (1, 4):
        system = tiny("janus")
        names = {n for n, _ in system.named_parameters() if n.startswith("trunk")}
        for n, p in system.named_parameters():
            p.requires_grad_(n in names)
        optimizer = AdamW(system, names, Optimizer(), Stage(steps=1, batch=1, lr=0.0))
        r = recipe("janus")
        words = {"text": {"temperature": 1.0, "max_tokens": 6}}
        sampling = config.merge(system.default_sampling(), {**r.sampling, **words})
        asked = [document(t, n) for n, t in enumerate(("draw", "caption", "draw", "question"))]
        taken = act(system, asked, sampling, [0, 1, 2, 3])
        assert len({len(t.log_probs) for t in taken}) > 1
        learner = Learner(system, optimizer, Grpo(reduction=reduction), sampling, largest_norm=0.0, micro=micro)
        learner.update(taken, torch.tensor([1.0, -1.0, 0.5, -0.5]), fresh=True)
        gradients.append(torch.cat([p.grad.flatten() for p in optimizer.named.values() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
    assert float(gradients[0].abs().max()) > 1e-5


def test_recipes_are_read() -> None:
    for name, path in recipes("align").items():
        found = load(path)
        assert found.about and isinstance(found, Contest if "game" in config.read_yaml(path) else Align), name
    with pytest.raises(ValueError, match="group of at least 2"):
        recipe("janus", group=1)
    with pytest.raises(ValueError, match="kind of decision"):
        dataclasses.replace(recipe("janus"), grpo=Grpo(clips={"words": Clip()}))
