"""UniGame as a loop: the order of its moves, its controls, and that a run goes on bit by bit."""
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filling import filled

from diptych import config
from diptych.adapters.published import open_model
from diptych.alignment import adversary, game, start
from diptych.alignment.adversary import Game, Mining
from diptych.alignment.game import Contest, Digging, Player, Rival
from diptych.alignment.rewards.base import Facts, Rating, Reward
from diptych.cli import main
from diptych.config import ConfigError
from diptych.document import Document, Image, Text
from diptych.systems.io import save_system
from diptych.systems.table import find
from diptych.training import lora
from diptych.training.recipe import Lora
from diptych.world import tasks
from diptych.world.scene import Scene

LORA = Lora(layers=("trunk",), rank=4, alpha=8.0)


class Bright(Reward):
    FACTS = Facts(name="bright", about="mean of the pixels", low=-1, high=1)

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Any]:
        return [Rating(float(d.of(Image)[-1].pixels.mean())) for d in made]  # type: ignore[union-attr]


def tiny(name: str, side: int = 16) -> Any:
    torch.manual_seed(0)
    cls: Any = find(name)
    return filled(cls(replace(cls.tiny(), picture=(side, side)))).eval()


def recipe(**changes: Any) -> Contest:
    digging = Digging(every=2, count=2, by="caption", batch=3, temperature=5.0,
                      mining=Mining(tau=-1.0, quantile=0.0, top=2), sampling={"evaluations": 2})
    return Contest(**{"world": "few", "game": Game(), "digging": digging, "batch": 3, "iterations": 4, "lr": 1e-3,
                      "rival": Rival(relative=True, eps_max=0.5, eps_start=0.2), "lora": LORA, "save_every": 2,
                      **changes})


def player(name: str, folder: Path, **changes: Any) -> Player:
    return Player(recipe(**changes), tiny(name), folder, similarity=Bright())


def weights(module: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(module: Any, before: list[torch.Tensor]) -> bool:
    return any(not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_moves_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perturber, drawings, the model on pictures as they are, the model on hard ones; each moves its own weights."""
    p, said = player("janus", tmp_path), list[str]()
    rival, model = weights(p.opponent.module), weights(p.system)
    turn, dig, learn = p.opponent.turn, adversary.dig, p._learn

    def note(name: str, of: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            said.append(f"{name}, model {'moved' if moved(p.system, model) else 'still'}")
            return of(*given, **named)
        return call

    monkeypatch.setattr(p.opponent, "turn", note("perturber", turn))
    monkeypatch.setattr(adversary, "dig", note("drawings", dig))
    monkeypatch.setattr(p, "_learn", note("learn", learn))
    first = p.iterate()
    assert said == ["perturber, model still", "drawings, model still", "learn, model still", "learn, model moved"]
    assert moved(p.opponent.module, rival) and first["hard"] == 3 and first["mined"] == 6 and first["buffer"] == 3
    names = {n for n, q in p.system.named_parameters() if q.requires_grad}
    assert names and all("lora_" in n for n in names), "the vision tower and the base weights stay"
    said.clear()
    second = p.iterate()
    assert "drawings" not in " ".join(said) and second["buffer"] == 0 and second["answers"] == 6
    third = p.iterate()
    assert third["mined"] == 6 and third["cross-entropy under attack"] > 0 and p.steps == 6


@pytest.mark.parametrize("name", ["janus", "bagel"])
def test_a_run_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    whole = player(name, tmp_path / "whole", ema=0.9)
    whole.run()
    part = player(name, tmp_path / "part", ema=0.9, iterations=3, save_every=3)
    part.run()
    assert len(part.buffer) == 3, "drawings wait in the checkpoint"
    rest = player(name, tmp_path / "part", ema=0.9)
    rest.run()
    for mine, theirs in ((whole.system, rest.system), (whole.opponent.module, rest.opponent.module)):
        assert not moved(theirs, weights(mine))
    a, b = ([json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
            for n in ("whole", "part"))
    assert [v["iteration"] for v in b] == [1, 2, 3, 4]
    told = ("cross-entropy", "cross-entropy under attack", "cross-entropy of hard ones", "eps", "buffer", "hardest")
    assert [[v.get(k) for k in told] for v in a] == [[v.get(k) for k in told] for v in b]
    assert not lora.layers(rest.system) and open_model(tmp_path / "part" / "model").num_parameters() > 0
    with pytest.raises(ConfigError, match=r"rival\.lr"):
        player(name, tmp_path / "part", ema=0.9, rival=Rival(relative=True, eps_max=0.5, eps_start=0.2, lr=1.0)).run()


def test_the_buffer_is_kept_with_its_pictures(tmp_path: Path) -> None:
    p = player("janus", tmp_path)
    p.iterate()
    p.save()
    again = player("janus", tmp_path)
    again.resume()
    assert [h for h, _ in again.buffer.rows] == [h for h, _ in p.buffer.rows] and again.iteration == 1
    assert again.buffer.items == p.buffer.items
    assert all(np.isfinite(d.of(Image)[0].pixels).all() for d in again.buffer.items)


def test_controls_take_as_many_steps_and_draw_nothing(tmp_path: Path) -> None:
    seen, features = player("janus", tmp_path / "a", hard="seen"), player("janus", tmp_path / "b", hard="features")
    lines = [[p.iterate() for _ in range(2)] for p in (seen, features)]
    assert seen.steps == features.steps == 4 and seen.answers == features.answers == 0
    assert all("mined" not in v and v["hard"] == 3 for part in lines for v in part)
    for radius, alike in ((1e-9, True), (0.5, False)):
        rival = Rival(relative=True, eps_max=radius, eps_start=radius / 2)
        line = player("janus", tmp_path / "c", hard="features", rival=rival, lr=0.0).iterate()
        apart = abs(line["cross-entropy of hard ones"] - line["cross-entropy"])
        assert (apart < 1e-5) == alike, "the same questions, by the same model, as they are perturbed"


def test_noise_of_the_same_radius(tmp_path: Path) -> None:
    chance = Rival(kind="random", relative=True, eps_max=0.5, eps_start=0.2)
    p = player("janus", tmp_path, rival=chance)
    z = torch.randn(7, 64)
    p.opponent.stir(1)
    delta = p.opponent.module(z)
    torch.testing.assert_close(delta.norm(dim=-1), 0.5 * z.norm(dim=-1))
    assert not torch.equal(p.opponent.module(z), delta)
    p.opponent.stir(1)
    assert torch.equal(p.opponent.module(z), delta)
    p.run()
    part = player("janus", tmp_path / "part", rival=chance, iterations=3, save_every=3)
    part.run()
    rest = player("janus", tmp_path / "part", rival=chance)
    rest.run()
    assert not moved(rest.system, weights(p.system))


def test_an_attack_is_learnt_against_a_model_that_stays() -> None:
    model, questions = tiny("janus"), [tasks.document("question", i, world="few") for i in range(8)]
    before, rival = weights(model), Rival(relative=True, eps_max=1.0, eps_start=0.2, lr=3e-2)
    found = [float(adversary.answer_ce(model, questions).mean())]
    for steps in (0, 20):
        made = game.attack(model, questions, rival, steps=steps, batch=8)
        assert float(made.eps.detach()) == pytest.approx(0.99, abs=0.01)
        with adversary.perturbed(model, made, "see"):
            found.append(float(adversary.answer_ce(model, questions).mean()))
    assert found[2] > max(found[:2]) + 0.02, found
    assert not moved(model, before) and all(p.grad is None for p in model.parameters())


def test_drawings_are_asked_for_by_question_or_by_caption() -> None:
    question = tasks.document("question", 5, world="few")
    words = adversary.by_question(question)
    assert words.of(Text)[0].text == question.of(Text)[0].text and words.of(Image)[0].empty
    stated = adversary.by_caption(question)
    assert all(o.color in (stated.of(Text)[0].text or "") for o in Scene.from_dict(question.meta["scene"]).objects)
    assert stated.meta["spec"]["items"] and stated.task == "draw"
    with pytest.raises(ValueError, match="draw by the question itself"):
        adversary.by_caption(replace(question, meta={}))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sees features of pictures, got Show"):
        player("show-o", tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        Digging(every=0)
    path = tmp_path / "a.yaml"
    path.write_text("game: {strenght: 1}\nlr: 1e-3\n")
    with pytest.raises(ConfigError, match="'strength'"):
        start.load(path)
    path.write_text("lr: 1e-3\n")
    with pytest.raises(ConfigError, match="expected tasks"):
        start.load(path, ["model=mini"])


def test_the_command_line_plays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_system(tiny("janus", 32), tmp_path / "model")
    changed = recipe(model=str(tmp_path / "model"), iterations=1, digging=Digging(
        count=1, batch=1, by="caption", mining=Mining(tau=0.0, quantile=0.0), similarity="scene"))
    config.save(changed, tmp_path / "one.yaml")
    assert main.main(["align", str(tmp_path / "one.yaml"), "batch=2", "--run", str(tmp_path / "run")]) == 0
    assert f"diptych eval {tmp_path / 'run' / 'model'} --world few" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert (tmp_path / "run" / "lora").is_dir()
