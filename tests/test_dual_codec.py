"""Training a tokenizer with two views of a picture under one index: terms, arms, dropped scales, handing it on."""
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diptych.benchmarks.reconstruction import measure, tokenizer_of
from diptych.document import Document
from diptych.parts.quantize import JointConfig, ResidualConfig
from diptych.parts.semantic import DualTokenizer
from diptych.systems.dual_codec import DualCodec
from diptych.systems.io import load_system, save_system
from diptych.systems.tokenflow import TokenFlow
from diptych.training.recipe import Recipe, Stage, load_recipe
from diptych.training.setup import build_system, system_config
from diptych.training.stages import trained_names
from diptych.world.tasks import document

RECIPE = Path(__file__).parents[1] / "recipes" / "tokenflow-codec.yaml"
PLAIN = {"symmetries": False, "tint": 0.0, "drop_scale": 0.0}


def build(**changes: Any) -> DualCodec:
    torch.manual_seed(0)
    return DualCodec(dataclasses.replace(DualCodec.tiny(), **{**PLAIN, **changes})).eval()


def weighted(*weights: float) -> dict[str, Any]:
    """The tiny config's codec with these weights of the distances."""
    codec = DualCodec.tiny().codec
    assert isinstance(codec.quantizer, ResidualConfig) and isinstance(codec.quantizer.codebook, JointConfig)
    book = dataclasses.replace(codec.quantizer.codebook, weights=weights)
    return {"codec": dataclasses.replace(codec, quantizer=dataclasses.replace(codec.quantizer, codebook=book))}


def documents(count: int = 3) -> list[Document]:
    return [document("draw", i) for i in range(count)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_term_is_the_mean_it_says() -> None:
    model = build()
    batch = model.collate(documents())
    assert batch.num_tokens == 3 * 16 and batch.counts["semantic"] == batch.counts["codebook"] == 48
    with torch.no_grad():
        losses = model.loss(batch, generator())
        views = model.codec(batch.groups[0])
        wanted = model.teacher.features(batch.groups[0]).flatten(2).transpose(1, 2)
    mean = {k: float(v) for k, v in losses.mean().items()}
    error = views.pixels - batch.groups[0]
    assert mean["l1"] == pytest.approx(float(error.abs().mean()), rel=1e-4)
    assert mean["mse"] == pytest.approx(float(error.square().mean()), rel=1e-4)
    cosines = F.cosine_similarity(views.features, wanted, dim=-1)
    assert mean["semantic"] == pytest.approx(1 - float(cosines.mean()), rel=1e-4)
    for name in ("codebook", "commitment"):
        assert mean[name] == pytest.approx(float(views.quantized.losses[name]), rel=1e-4)
    assert losses.weights == {"l1": 1.0, "mse": 3.0, "edge": 0.5, "semantic": 1.0, "codebook": 1.0, "commitment": 1.0}
    assert {k: float(v) for k, v in losses.counts.items()} == batch.counts


def test_a_step_moves_everything_but_the_teacher() -> None:
    model = build()
    before = model.loss(batch := model.collate(documents()), generator())
    before.total().backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert [n for n in still if not n.endswith("k_proj.bias")] == []  # a bias of all keys cancels
    assert all(p.grad is None for p in model.teacher.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        (after := model.loss(batch, generator())).total().backward()
        optimizer.step()
    for name in ("mse", "semantic"):
        assert float(after.mean()[name].detach()) < 0.7 * float(before.mean()[name].detach()), name


def test_one_half_finds_the_index_where_the_other_weighs_nothing() -> None:
    """The arms of a study: changes of the half that does not count move no code."""
    batch = build().collate(documents())
    for weights, idle, busy in (((0.0, 1.0), "encode_task", "quant_conv"), ((1.0, 0.0), "quant_conv", "encode_task")):
        model = build(**weighted(*weights))
        codes = model.codec.encode(batch.groups[0])
        for part, moves in ((idle, False), (busy, True)):
            other = build(**weighted(*weights))
            with torch.no_grad():
                for p in other.codec.get_submodule(part).parameters():
                    p.copy_(torch.randn(p.shape, generator=generator(1)))
            assert torch.equal(other.codec.encode(batch.groups[0]), codes) is not moves, (weights, part)
    shared = build().codec.encode(batch.groups[0])
    assert not torch.equal(shared, build(**weighted(0.0, 1.0)).codec.encode(batch.groups[0]))


def test_without_a_teacher_nothing_is_taught() -> None:
    model = build(semantic_weight=0.0)
    batch = model.collate(documents())
    losses = model.loss(batch, generator())
    losses.total().backward()
    assert "semantic" not in losses.sums and "semantic" not in batch.counts
    for part in (model.codec.semantic_decoder, model.codec.decode_task):
        assert not any(p.requires_grad for p in part.parameters())


def test_a_step_may_leave_out_a_scale_but_never_the_first() -> None:
    model = build(drop_scale=1.0)
    kept = {tuple(model._scales(generator(s)) or ()) for s in range(12)}
    assert kept == {((1, 1), (4, 4)), ((1, 1), (2, 2))}
    assert build()._scales(generator()) is None
    rare = build(drop_scale=0.1)
    counts = [len(rare._scales(generator(s)) or ()) for s in range(200)]
    assert 8 < counts.count(2) < 40 and set(counts) == {2, 3}
    with torch.no_grad():
        losses = [float(model.loss(model.collate(documents()), generator(s)).mean()["mse"]) for s in (0, 0, 1, 2, 3)]
    assert losses[0] == losses[1] and len(set(losses)) > 1


def test_what_is_saved_is_what_tokenflow_takes(tmp_path: Path) -> None:
    model = build()
    save_system(model, tmp_path)
    again = load_system(tmp_path)
    assert isinstance(again, DualCodec) and again.config == model.config
    batch = model.collate(documents())
    torch.testing.assert_close(again.reconstruct(batch.groups[0]), model.reconstruct(batch.groups[0]))
    assert model.features(batch.groups[0]).shape == (3, 16, 4, 4)
    recipe = Recipe(system="tokenflow", size="tiny", init={"codec": f"{tmp_path}#codec"},
                    stages=(Stage(steps=1, batch=1, lr=1.0),))
    system = build_system(recipe)
    assert isinstance(system, TokenFlow) and not any(p.requires_grad for p in system.codec.parameters())
    codes = torch.stack(system.encode([*batch.groups[0]]))
    torch.testing.assert_close(codes, model.codec.encode(batch.groups[0]))


def test_its_losses_are_told_as_of_any_tokenizer() -> None:
    tokenizer = tokenizer_of(build())
    assert isinstance(tokenizer, DualTokenizer)
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=generator(), dtype=torch.uint8)
    found = measure(tokenizer, images, features=lambda x: x.mean((2, 3)))
    assert 0 < found["psnr"].value < 30 and found["code use"].n == 64 and found["perplexity"].n == 4 * 21


def test_stages_and_sizes() -> None:
    recipe = load_recipe(RECIPE)
    cls, config = system_config(recipe)
    assert cls is DualCodec and config == DualCodec.small() and DualCodec.small().codec == TokenFlow.small().codec
    with torch.device("meta"):
        model = DualCodec(DualCodec.small())
        assert model.num_parameters() == 2_822_600 and DualCodec(DualCodec.paper()).num_parameters() > 450e6
    codes, pixels = (trained_names(model, s) for s in recipe.stages)
    assert not any(n.startswith("teacher") for n in codes) and any(n.startswith("codec.semantic_enc") for n in codes)
    assert {n.split(".")[1] for n in pixels} == {"decoder", "post_quant_conv"}


def test_configs_that_do_not_fit_are_errors() -> None:
    c = DualCodec.tiny()
    with pytest.raises(ValueError, match=r"stride and feature_width, \(16, 32\), got \(16, 48\)"):
        tower = dataclasses.replace(c.teacher.tower, width=48)  # type: ignore[type-var]
        dataclasses.replace(c, teacher=dataclasses.replace(c.teacher, tower=tower))
    flat = ResidualConfig(codebook=c.codec.quantizer.codebook, depth=2)
    with pytest.raises(ValueError, match="set drop_scale to 0"):
        dataclasses.replace(c, codec=dataclasses.replace(c.codec, quantizer=flat))
