"""Training a tokenizer of codes on the pictures of documents: terms, the codebook that follows, handing it on."""
import dataclasses
from pathlib import Path

import pytest
import torch

from diptych.benchmarks.reconstruction import tokenizer_of
from diptych.systems.code_tokenizer import CodeTokenizer
from diptych.systems.io import load_system, save_system
from diptych.systems.janus import Janus
from diptych.training.plan import plan
from diptych.training.recipe import Recipe, Source, Stage
from diptych.training.setup import build_system
from diptych.world.tasks import document

PLAIN = {"symmetries": False, "tint": 0.0}


def build() -> CodeTokenizer:
    torch.manual_seed(0)
    return CodeTokenizer(dataclasses.replace(CodeTokenizer.tiny(), **PLAIN)).eval()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_every_term_is_the_mean_it_says() -> None:
    model = build()
    batch = model.collate([document("draw", i) for i in range(3)])
    with torch.no_grad():
        losses = model.loss(batch, generator())
        pixels, quantized = model.codec(batch.groups[0])
    mean = {k: float(v) for k, v in losses.mean().items()}
    error = pixels - batch.groups[0]
    assert mean["l1"] == pytest.approx(float(error.abs().mean()), rel=1e-4)
    assert set(mean) == {"l1", "mse", "edge", *quantized.losses}
    for name, value in quantized.losses.items():
        assert mean[name] == pytest.approx(float(value), rel=1e-4)


def test_it_learns_and_the_codebook_follows_training_passes_only() -> None:
    model = build()
    batch = model.collate([document("draw", i) for i in range(4)])
    book = model.codec.quantizer.codebook.weight
    before = book.detach().clone()
    with torch.no_grad():
        first = float(model.loss(batch, generator()).mean()["l1"])
    assert book.equal(before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(batch, generator()).total().backward()
        optimizer.step()
    assert not book.equal(before)
    with torch.no_grad():
        assert float(model.loss(batch, generator()).mean()["l1"]) < 0.6 * first
    assert len(model.codec.encode(batch.groups[0]).unique()) > 4


def test_a_system_takes_its_codes_and_their_sizes(tmp_path: Path) -> None:
    model = build()
    save_system(model, tmp_path / "codes")
    again = load_system(tmp_path / "codes")
    assert isinstance(again, CodeTokenizer) and again.terms == model.terms
    images = model.collate([document("draw", i) for i in range(2)]).groups[0]
    assert again.reconstruct(images).equal(model.reconstruct(images))
    assert tokenizer_of(again).encode(images).equal(model.codec.encode(images))
    recipe = Recipe(system="janus", size="tiny", init={"codec": f"{tmp_path / 'codes'}#codec"},
                    stages=(Stage(steps=1, batch=1, lr=1e-3),))
    system = build_system(recipe)
    assert isinstance(system, Janus) and system.config.codec == model.config.codec
    assert system.codec.encode(images).equal(model.codec.encode(images))


def test_its_training_is_planned_without_weights() -> None:
    found = plan(Recipe(system="code-tokenizer", size="small", data=(Source(world="mini", tasks={"draw": 1}),),
                        stages=(Stage(steps=2, batch=4, lr=1e-3),)))
    assert found.flops and found.parameters == {"codec": 1_135_544}
