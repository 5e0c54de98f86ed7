"""LaTtE-Flow: sizes, layers shared out over time, what a drawing costs, the reader left alone, the recipe."""
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filling import filled
from torch import Tensor

from diptych.objectives import flow
from diptych.parts.cache import Run
from diptych.parts.trunks import Layer
from diptych.systems.base import Sampling
from diptych.systems.latte_flow import LatteFlow
from diptych.systems.works import Look, Read, Reader
from diptych.training.recipe import load_recipe
from diptych.training.stages import fixed_names, trained_names
from diptych.world.tasks import document

RECIPE = Path(__file__).parents[1] / "recipes" / "latte-flow.yaml"


def build(**changes: Any) -> LatteFlow:
    """With gates and velocities that are not zero, as a fresh model's are."""
    torch.manual_seed(0)
    drops = {"drop_text": 0.0, "drop_latent": 0.0, "drop_feature": 0.0}
    return filled(LatteFlow(dataclasses.replace(LatteFlow.tiny(), **(drops | changes))).eval())


@cache
def tiny() -> LatteFlow:
    return build()


def painters(model: LatteFlow) -> set[str]:
    """The parameters of what draws."""
    kinds = ("attention", "attention_norm", "mlp", "mlp_norm", "modulation", "residual")
    return {n for n, p in model.named_parameters() if p.requires_grad and (
        n.startswith(("latent_", "trunk.norm.1", "trunk.time")) or any(f".{kind}.1." in n for kind in kinds))}


def at_time(t: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "sample_time", lambda count, generator, **kw: torch.full((count,), t))


# -- sizes, cost ------------------------------------------------------------------------------------------------------

def test_the_published_size_by_arithmetic() -> None:
    """Qwen2-VL-2B twice, with modulation; gates of 12 heads in all layers of a group but its first."""
    width, hidden = 1536, 8960
    layer = width * (width + 512) + width + 512 + width**2 + 3 * width * hidden + 2 * width
    extra = 28 * (width * 4 * width + 4 * width) + 24 * (width * 12 + 12) + 256 * width + width + width**2 + width
    with torch.device("meta"):
        model = LatteFlow(LatteFlow.paper())
    assert sum(p.numel() for p in model.trunk.parameters()) == 56 * layer + 2 * width + extra
    assert 28 * layer + width + 151936 * width == pytest.approx(1.54e9, rel=0.01)
    assert model.config.picture[0] // model.stride == 8 and model.token_width == 32
    assert model.layer_evaluations() == 40 * 7
    whole = dataclasses.replace(LatteFlow.paper(), groups=1)
    with torch.device("meta"):
        assert LatteFlow(whole).layer_evaluations() == 40 * 28


@torch.no_grad()
def test_a_step_runs_the_layers_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where the work is done: latents that go through a layer's second set."""
    model, counts = tiny(), list[int]()
    after = Layer.after

    def count(self: Layer, x: Tensor, mixed: Tensor, attention: int, mlp: int, modulation: Any = None) -> Tensor:
        counts.append(attention * len(x))
        return after(self, x, mixed, attention, mlp, modulation)

    monkeypatch.setattr(Layer, "after", count)
    model.generate([document("draw", 0).prompt()], Sampling(evaluations=6))
    assert sum(counts) == 16 * model.layer_evaluations(Sampling(evaluations=6)) == 16 * 6 * 2


def test_the_control_without_times_costs_the_same() -> None:
    """Half of the layers draw at all times; the reader keeps the others, and answers as ever."""
    cut, model = build(groups=1, twins=2), tiny()
    assert cut.layer_evaluations() == model.layer_evaluations()
    assert {n.split(".")[2] for n in painters(cut) if n.startswith("trunk.layers")} == {"0", "1"}
    assert not {n for n, _ in cut.named_parameters()} - {n for n, _ in build(groups=1).named_parameters()}
    made = cut.generate([document("draw", 0).prompt()], Sampling(evaluations=2))[0]
    assert made.pieces[1].pixels is not None  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="5 of 4 layers in 1 groups"):
        build(groups=1, twins=5)


# -- who learns from what ---------------------------------------------------------------------------------------------

def test_a_time_teaches_its_group_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    for t, layers in ((0.2, {"0", "1"}), (0.7, {"2", "3"})):
        at_time(t, monkeypatch)
        model.zero_grad()
        losses = model.loss(model.collate([document("edit", 1)]), torch.Generator().manual_seed(0))
        losses.sums["image"].backward()
        moved = {n for n in painters(model) if (g := model.get_parameter(n).grad) is not None and g.any()}
        assert {n.split(".")[2] for n in moved if n.startswith("trunk.layers")} == layers
        assert {"latent_in.weight", "latent_out.weight", "trunk.norm.1.weight"} <= moved


@torch.no_grad()
def test_answers_do_not_know_what_draws() -> None:
    """Bit by bit, also behind pictures that were drawn."""
    model, documents = build(), [document(t, 1) for t in ("question", "plan", "story")]
    before = model.score(documents).values
    for n in painters(model):
        model.get_parameter(n).add_(0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.score(documents).values, strict=True))


# -- training and sampling --------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("t", [0.1, 0.6])
def test_stepwise_velocities_are_those_of_training(t: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, d = tiny(), document("edit", 3)
    batch = model.collate([d])
    at_time(t, monkeypatch)
    seen: list[Tensor] = []
    inner = model.latent_out.forward
    monkeypatch.setattr(model.latent_out, "forward", lambda x: (seen.append(inner(x)), seen[-1])[1])
    model.loss(batch, torch.Generator().manual_seed(5))
    assert batch.latents == [(0, True)]  # no clean copy
    noise = torch.randn(16, model.token_width, generator=torch.Generator().manual_seed(5))
    x = flow.interpolate(model.encode(batch.pictures)[0], noise, torch.tensor(t))
    reader, w = Reader(), model.writer(Reader())
    view = model.views(torch.from_numpy(d.pieces[0].pixels))[0]  # type: ignore[attr-defined]
    w.feature(0, model.feature_count(view))
    model.run([Read(reader, w, [view])])
    w = model.writer(reader)
    w.text(model.spell(d.pieces[1]))
    model.run([Read(reader, w)])
    answer = model.run([Look([reader], x, t, (4, 4))])[0][0]
    torch.testing.assert_close(answer, seen[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_looks_at_different_times_share_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, g = tiny(), torch.Generator().manual_seed(0)
    readers, x = [], torch.randn(16, model.token_width, generator=g)
    for i in (0, 1):
        readers.append(Reader())
        w = model.writer(readers[-1])
        w.text(model.spell(document("draw", i).pieces[0]))
        model.run([Read(readers[-1], w)])
    works = [Look([r], x, t, (4, 4)) for r, t in zip(readers, (0.2, 0.8), strict=True)]
    runs: list[int] = []
    start = Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda self, *args, **kw: (runs.append(1), start(self, *args, **kw))[1])
    together = model.run(works)
    assert len(runs) == 1
    for work, answer in zip(works, together, strict=True):
        torch.testing.assert_close(model.run([work])[0][0], answer[0], atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="4 of 4 layers in 3 groups"):
        build(groups=3)
    plain = {n for n, _ in build(residual=False).named_parameters()}
    assert {n for n, _ in tiny().named_parameters()} - plain == {
        f"trunk.layers.{i}.residual.1.1.{w}" for i in (1, 3) for w in ("weight", "bias")}


def test_the_recipe_is_read() -> None:
    recipe = load_recipe(RECIPE)
    with torch.device("meta"):
        model = LatteFlow(LatteFlow.small())
    assert recipe.system == "latte-flow" and [s.name for s in recipe.stages] == ["read", "draw"]
    assert trained_names(model, recipe.stages[1], fixed_names(model)) == painters(model)
