"""Training a tokenizer of semantic codes with its detokenizer: batches, terms and stages, and handing the result on."""
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diptych.document import Document, Image, Text
from diptych.systems.io import load_system, save_system
from diptych.systems.seed import Seed
from diptych.systems.semantic_codec import SemanticCodec
from diptych.training.recipe import Recipe, Stage, load_recipe
from diptych.training.setup import build_system, system_config
from diptych.training.stages import trained_names
from diptych.world.tasks import document

RECIPE = Path(__file__).parents[1] / "recipes" / "semantic-codec.yaml"


def build(**changes: Any) -> SemanticCodec:
    torch.manual_seed(0)
    return SemanticCodec(dataclasses.replace(SemanticCodec.tiny(), **changes)).eval()


@cache
def tiny() -> SemanticCodec:
    return build()


def documents() -> list[Document]:
    return [*(document("draw", i) for i in range(3)), *(document("caption", i) for i in range(3))]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# -- batches ----------------------------------------------------------------------------------------------------------

def test_a_picture_and_its_last_text() -> None:
    model, docs = tiny(), documents()
    batch = model.collate(docs).to("cpu")
    assert batch.pictures.shape == (6, 3, 64, 64) and batch.groups[0] is batch.pictures
    v = model.vocabulary
    lengths = batch.texts.tokens.valid().sum(1).tolist()
    for row, d in enumerate(docs):
        words = [v.start, *v.encode(d.of(Text)[-1].text), v.end]
        assert batch.texts.ids[row, : lengths[row]].tolist() == words
    assert batch.num_tokens == sum(lengths)
    for wrong, message in [(document("edit", 0), "got 2 pictures and 1 texts in one of task 'edit'; fix"),
                           (Document((Text(text="words"),)), "got 0 pictures"),
                           (Document((docs[0].pieces[1],)), "got 1 pictures and 0 texts")]:
        with pytest.raises(ValueError, match=message):
            model.collate([wrong])
    wide = Document((Text(text="a line"), Image(pixels=np.zeros((3, 64, 128), np.float32), target=True)))
    with pytest.raises(ValueError, match="one size in a batch, got 2 sizes; fix"):
        model.collate([docs[0], wide])


# -- terms ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_contrast_finds_texts_and_pictures() -> None:
    model = build(smoothing=0.2)
    batch = model.collate(documents())
    states = model.codec.states(model.codec.prepare(batch.pictures))
    found = model.contrast(states[:, -1], batch.texts)
    a, b = (F.normalize(x, dim=-1) for x in (model.project(states[:, -1]), model.text(batch.texts)))
    logits = a @ b.T / 0.07
    for i in range(6):
        terms = []
        for row in (logits[i], logits[:, i]):
            log_p = row.log_softmax(-1)
            terms.append(-0.8 * log_p[i] - 0.2 * log_p.mean())
        torch.testing.assert_close(found[i], sum(terms) / 2)
    alone = model.text(model.collate(documents()[1:2]).texts)  # padding counts nothing
    torch.testing.assert_close(alone, model.text(batch.texts)[1:2], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_teacher_averages_parts_of_the_picture() -> None:
    model = tiny()
    features = torch.randn(2, 64, 32, generator=generator())
    taught = model.teach(features)
    assert taught.shape == (2, 4 * 32)
    cells = features.unflatten(1, (8, 8))
    torch.testing.assert_close(taught[:, :32], cells[:, :4, :4].mean((1, 2)))
    torch.testing.assert_close(taught[:, 32:64], cells[:, :4, 4:].mean((1, 2)))


def stage_of(model: SemanticCodec, **how: Any) -> set[str]:
    """The terms that a stage computes."""
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    names = trained_names(model, Stage(steps=1, batch=1, lr=1.0, **how), fixed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    losses = model.loss(model.collate(documents()), generator())
    assert set(losses.counts) == set(losses.sums) and set(losses.weights) >= set(losses.sums)
    losses.total().backward()
    unmoved = {n for n in names if (g := model.get_parameter(n).grad) is None or not g.any()}
    assert {n for n in unmoved if not n.endswith(("k_proj.bias", "key.bias"))} == set()
    return set(losses.sums)


def test_stages_cost_what_they_train() -> None:
    recipe = load_recipe(RECIPE)
    how = [{"only": s.only, "freeze": s.freeze} for s in recipe.stages]
    assert stage_of(build(), **how[0]) == {"contrast"}
    assert stage_of(build(), **how[1]) == {"contrast", "quantize", "recon", "image"}
    assert stage_of(build(), **how[2]) == {"flow"}
    assert stage_of(build()) == {"contrast", "quantize", "recon", "image", "flow"}


def test_weights_and_counts() -> None:
    losses = tiny().loss(tiny().collate(documents()), generator())
    assert losses.weights == {"contrast": 1.0, "quantize": 5.0, "image": 0.5, "recon": 2.0, "flow": 1.0}
    assert {k: v.item() for k, v in losses.counts.items()} == {"contrast": 6, "quantize": 6, "recon": 6, "image": 6,
                                                               "flow": 6 * 16}


def test_pixels_do_not_move_the_codes() -> None:
    model = build()
    sums = model.loss(model.collate(documents()), generator()).sums
    sums["flow"].backward()
    assert all(p.grad is None for p in model.codec.parameters())
    assert model.detokenizer.positions.grad is not None and model.detokenizer.positions.grad.any()


def test_codes_follow_only_while_they_are_learnt() -> None:
    model = build()
    rows, batch = model.codec.quantizer.codebook.weight.clone(), model.collate(documents())
    with torch.no_grad():
        model.loss(batch, generator())
    assert torch.equal(rows, model.codec.quantizer.codebook.weight)
    model.loss(batch, generator())
    assert not torch.equal(rows, model.codec.quantizer.codebook.weight)


def test_it_learns() -> None:
    model, first, means = build(), {}, {}
    batch, draws = model.collate(documents()), generator()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    for _ in range(60):
        losses = model.loss(batch, draws)
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step()
        means = {k: v.item() for k, v in losses.mean().items()}
        first = first or means
    assert means["image"] < 0.3 * first["image"] and means["recon"] < 0.3 * first["recon"]
    assert means["contrast"] < 0.75 * first["contrast"] and means["flow"] < 0.8 * first["flow"]
    assert model.reconstruct(batch.pictures).shape == batch.pictures.shape


# -- handing on -------------------------------------------------------------------------------------------------------

def test_a_system_takes_tokenizer_and_detokenizer(tmp_path: Path) -> None:
    made = build()
    save_system(made, tmp_path)
    again = load_system(tmp_path)
    assert again.config == made.config and isinstance(again, SemanticCodec)
    recipe = Recipe(system="seed", size="tiny", stages=(Stage(steps=1, batch=1, lr=1.0),),
                    init={name: f"{tmp_path}#{name}" for name in ("codec", "detokenizer")})
    taken = build_system(recipe)
    assert isinstance(taken, Seed) and taken.config.codec == made.config.codec
    assert not any(p.requires_grad for m in (taken.codec, taken.detokenizer) for p in m.parameters())
    pictures = made.collate(documents()).pictures
    codes = taken.encode(list(pictures))
    assert torch.equal(torch.stack(codes), made.codec.encode(made.codec.prepare(pictures)))
    torch.testing.assert_close(taken.decode(torch.stack(codes), (1, 16)), made.reconstruct(pictures), atol=1e-5, rtol=0)


def test_the_recipe_takes_its_ingredients_from_the_zoo() -> None:
    cls, config = system_config(load_recipe(RECIPE))
    assert cls is SemanticCodec and config == SemanticCodec.small()
    with pytest.raises(ValueError, match="codec.embedding_width to be 288, as pool and the tower imply, got 128"):
        build(pool=3)
