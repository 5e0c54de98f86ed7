"""Losses besides a system's own: named in a recipe, exact in parts and across interruptions, clear about mistakes."""
from pathlib import Path
from typing import Any

import pytest
import torch
import training_system as small
from filling import filled

from diptych import config
from diptych.alignment.attention import AttentionLoss
from diptych.benchmarks.reconstruction import similarities
from diptych.config import ConfigError
from diptych.objectives import flow
from diptych.systems.io import save_system
from diptych.systems.table import find
from diptych.training import checkpoint, objectives
from diptych.training.plan import plan
from diptych.training.progress import read_lines
from diptych.training.recipe import Objective, Recipe, Source, Stage
from diptych.training.trainer import Trainer
from diptych.world.tasks import document

TERMS = {"attention draw", "attention read"}


def model(name: str = "janus") -> Any:
    torch.manual_seed(0)
    cls: Any = find(name)
    return filled(cls(cls.tiny()))


def recipe(**changes: Any) -> Recipe:
    options = {"weights": {"draw": 5, "read": 10}}
    return Recipe(**{"system": "janus", "data": (Source(world="few", tasks={"draw": 1, "question": 1}),),
                     "stages": (Stage(steps=4, batch=8, lr=1e-3, freeze=("codec", "vision")),), "workers": 0,
                     "objective": Objective(name="attention", options=options), "log_every": 1, "save_every": 2,
                     "ema": 0.9, **changes})


def train(folder: Path, **changes: Any) -> Trainer:
    trainer = Trainer(recipe(**changes), folder, system=model(), device="cpu")
    trainer.run()
    return trainer


def losses(folder: Path) -> list[dict[str, float]]:
    return [line["losses"] for line in read_lines(folder / "metrics.jsonl")]


BALANCED = Objective(name="attention", options={"ratios": {"draw": {"ratio": 5, "decay": 0.5}, "read": {}}})


def test_a_recipe_names_its_objective(tmp_path: Path) -> None:
    config.save(recipe(objective=None), tmp_path / "plain.yaml")
    asked = ["objective.name=attention", "objective.options.variant=released"]
    found = config.load(Recipe, tmp_path / "plain.yaml", asked)
    assert found.objective == Objective(name="attention", options={"variant": "released"})
    with_it, without = train(tmp_path / "a"), train(tmp_path / "b", objective=None)
    first, plain = losses(tmp_path / "a")[0], losses(tmp_path / "b")[0]
    assert set(first) == set(plain) | TERMS and {k: first[k] for k in plain} == plain, "the same loss, and two terms"
    assert any(not torch.equal(p, q) for p, q in zip(with_it.system.parameters(), without.system.parameters(),
                                                     strict=True))


@pytest.mark.parametrize("objective", [recipe().objective, BALANCED], ids=["weights", "ratios"])
def test_parts_of_a_step_make_the_whole(objective: Objective, tmp_path: Path) -> None:
    """Weights by running magnitudes are those of whole steps."""
    for name, parts in (("one", 1), ("four", 4)):
        train(tmp_path / name, accumulate=parts, objective=objective)
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    for a, b in zip(one, four, strict=True):
        assert b == pytest.approx(a, rel=2e-4)
    counts = [[line["counts"] for line in read_lines(tmp_path / n / "metrics.jsonl")] for n in ("one", "four")]
    assert counts[0] == counts[1] and set(counts[0][0]) >= TERMS


def test_a_run_goes_on_with_what_the_objective_knew(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", objective=BALANCED)
    part = Trainer(recipe(objective=BALANCED), tmp_path / "part", system=model(), device="cpu")
    step = part.step
    part.step = lambda packet: (part.ask_to_stop() if part.place.step == 1 else None, step(packet))[1]  # type: ignore[method-assign]
    part.run()
    folder = checkpoint.latest(tmp_path / "part")
    assert folder is not None and part.place.step == 2
    kept = checkpoint.read_state(folder)["objective"]["ratios"]
    assert all(main > 0 and term > 0 for main, term in kept.values())
    rest = train(tmp_path / "part", objective=BALANCED)
    assert isinstance(rest.objective, AttentionLoss) and rest.objective.ratios == whole.objective.ratios  # type: ignore[attr-defined]
    for (n, p), q in zip(whole.system.named_parameters(), rest.system.parameters(), strict=True):
        assert torch.equal(p, q), n
    with pytest.raises(ConfigError, match="objective"):
        train(tmp_path / "part")


def test_schedules_are_read_off_specialists(tmp_path: Path) -> None:
    own = model()
    save_system(own, tmp_path / "draws" / "model")
    save_system(own, tmp_path / "reads")
    places = {"draw": str(tmp_path / "draws"), "read": str(tmp_path / "reads"), "world": "few", "documents": 4}

    def made(**options: Any) -> AttentionLoss:
        found = objectives.make(Objective(name="attention", options={"specialists": {**places, **options}}), own)
        assert isinstance(found, AttentionLoss)
        return found

    each, one = made(stages=2), made(stages=1, least=1.0)
    assert [s.first for s in each.schedules["draw"].stages] == [0, 1] and each.schedules["read"].depth == 2
    targets = {k: [s.target for s in v.stages] for k, v in each.schedules.items()}
    assert [s.target for s in one.schedules["draw"].stages] == pytest.approx([sum(targets["draw"]) / 2])
    assert [s.delta for s in one.schedules["draw"].stages] == [1.0], "squares throughout"
    again = made(stages=1)
    again.load(each.state())
    assert again.schedules == each.schedules, "a run keeps what it began with"
    with pytest.raises(ValueError, match="9 stages of 2 layers"):
        made(stages=9)
    with pytest.raises(ValueError, match=r"specialist that is to draw.*specialists\.tasks"):
        made(tasks={"draw": "question", "read": "question"})


def test_plans_count_a_step_and_not_what_comes_before(tmp_path: Path) -> None:
    save_system(model(), tmp_path / "both")
    places = {"draw": str(tmp_path / "both"), "read": str(tmp_path / "both"), "stages": 2, "world": "few"}
    made = Objective(name="attention", options={"specialists": places})
    plain, watched = (plan(recipe(objective=o)).flops for o in (None, made))
    assert plain is not None and watched is not None and plain < watched < 1.1 * plain


def test_mistakes_are_named(tmp_path: Path) -> None:
    def fails(error: str, system: Any = None, name: str = "attention", **options: Any) -> None:
        with pytest.raises(ValueError, match=error):
            objectives.make(Objective(name=name, options=options), model() if system is None else system)

    fails("'attention'", name="atention")
    fails("did you mean 'weights'", weight={"draw": 1})
    fails("draw, read, got 'drawing'", weights={"drawing": 1})
    fails("attention can be watched, got TinyText", small.build())
    fails("schedules, or specialists", draw={"stages": [{"first": 0, "target": 0.1, "delta": 0.1}]},
          specialists={"draw": "a", "read": "b"})
    fails("stages from layer 0 on", draw={"stages": [{"first": 1, "target": 0.1, "delta": 0.1}]})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        objectives.make(Objective(name="attention", options={"specialists": {"draw": "nowhere", "read": "b"}}), model())


# -- likeness ---------------------------------------------------------------------------------------------------------

def test_likeness_is_that_of_what_a_step_expects() -> None:
    system = model("bagel").train()
    documents = [document(task, n) for n, task in enumerate(("draw", "caption", "edit"))]
    batch = system.collate(documents)
    goal = objectives.make(Objective(name="likeness", options={"weight": 0.5}), system)
    with system.expect() as expected:
        plain = system.loss(batch, torch.Generator().manual_seed(3))
    found = goal(system, batch, torch.Generator().manual_seed(3))
    assert {k: v.item() for k, v in found.sums.items() if k != "likeness"} == {
        k: v.item() for k, v in plain.sums.items()}, "its own loss stays"
    assert goal.counts(system, batch) == {k: float(v) for k, v in found.counts.items()}
    wanted = 0.0
    for e in expected:
        made = system.decode(e.latents[None].detach(), e.grid)
        wanted += 1 - similarities(batch.pictures[e.picture][None], made).item()
    assert found.sums["likeness"].item() == pytest.approx(wanted, rel=1e-4) and found.weights["likeness"] == 0.5
    drawn = {e.picture for e in expected}
    assert len(expected) == int(found.counts["likeness"]) and len(drawn) == 2
    found.sums["likeness"].backward()
    assert system.latent_out.weight.grad.abs().sum() > 0
    late = objectives.make(Objective(name="likeness", options={"since": 0.999}), system)
    assert late.counts(system, batch) is None
    assert "likeness" not in late(system, batch, torch.Generator().manual_seed(3)).sums
    assert system.expecting is None


def test_an_expectation_with_the_true_velocity_is_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    system = model("bagel")
    batch = system.collate([document("draw", 1)])
    seen: list[torch.Tensor] = []
    error = flow.squared_error
    monkeypatch.setattr(flow, "squared_error", lambda v, data, noise: (seen.extend((data, noise)), error(
        v, data, noise))[1])
    with system.expect() as expected:
        system.loss(batch, torch.Generator().manual_seed(3))
    data, noise = seen
    with torch.no_grad():
        system.latent_out.weight.zero_()
        monkeypatch.setattr(system.latent_out, "forward", lambda x: data - noise)
        with system.expect() as true:
            system.loss(batch, torch.Generator().manual_seed(3))
    assert torch.allclose(true[0].latents, data, atol=1e-5) and not torch.allclose(expected[0].latents, data, atol=0.1)


def test_likeness_is_for_flows() -> None:
    with pytest.raises(ValueError, match="by flow inside its sequence, got Janus"):
        objectives.make(Objective(name="likeness"), model("janus"))
    with pytest.raises(ValueError, match="since"):
        objectives.make(Objective(name="likeness", options={"since": 1.0}), model("bagel"))
