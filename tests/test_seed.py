"""SEED-LLaMA: sizes, one vocabulary, layout, what is asked, reading what was drawn, the detokenizer."""
import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diptych.document import Document, Image, Text
from diptych.objectives import next_token
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.parts.interleave import Page
from diptych.parts.tokens import Modality
from diptych.systems.base import Sampling
from diptych.systems.detokenizer import Detokenizer
from diptych.systems.seed import Seed
from diptych.training.recipe import load_recipe
from diptych.world.tasks import document

ROOT = Path(__file__).parents[1]
CODES = 16  # of a tiny picture


def build(**changes: Any) -> Seed:
    torch.manual_seed(0)
    return Seed(dataclasses.replace(Seed.tiny(), **changes)).eval()


@cache
def tiny() -> Seed:
    return build()


def kinds(model: Seed, d: Document) -> list[int | str]:
    """Ids of the texts, and "code" for every code."""
    w = model.write(d)[0]
    found = np.concatenate(w.strip.columns["modality"])
    return ["code" if kind == Modality.CODE else token for token, kind in zip(w.ids, found, strict=True)]


# -- sizes ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("size", "width", "hidden", "layers"), [("paper", 4096, 11008, 32),
                                                                 ("paper_14b", 5120, 13824, 40)])
def test_the_published_size_by_arithmetic(size: str, width: int, hidden: int, layers: int) -> None:
    """LLaMA with 8194 words more; with the tokenizer it has the 8 and 14 billion parameters that its name says."""
    with torch.device("meta"):
        model = Seed(getattr(Seed, size)())
    assert model.marks.image_start == 40192 and model.embed.num_embeddings == 40194
    own = model.num_parameters() - sum(p.numel() for m in (model.codec, model.detokenizer) for p in m.parameters())
    assert own == layers * (4 * width**2 + 3 * width * hidden + 2 * width) + width + 2 * 40194 * width
    total = own + sum(p.numel() for p in model.codec.parameters())
    assert round(total / 1e9) == {"paper": 8, "paper_14b": 14}[size]
    assert model.num_parameters(trainable=True) == own and model.detokenizer.config.embedding_width == 1024


def test_one_vocabulary() -> None:
    """Texts, then codes, then both marks, in one table and one head."""
    model = tiny()
    assert model.values == 64 and model.embed.num_embeddings == model.head.out_features == 1024 + 64 + 2
    assert (model.marks.image_start, model.marks.image_end) == (1088, 1089)
    codes = torch.tensor([0, 63])
    assert torch.equal(model.code_tokens(codes), model.embed.weight[[1024, 1087]])
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.code_logits(hidden), model.head(hidden)[:, 1024:1088])


# -- documents to tokens ----------------------------------------------------------------------------------------------

def test_a_picture_is_one_block_whether_read_or_drawn() -> None:
    model = tiny()
    m, block = model.marks, [1088, *["code"] * CODES, 1089]
    d = document("draw", 0)
    assert kinds(model, d) == [m.start, *model.spell(d.pieces[0]), m.end, *block]
    assert kinds(model, document("caption", 0))[:CODES + 3] == [*block, m.start]
    story = document("story", 0)
    found = kinds(model, story)
    assert found.count("code") == CODES * len(story.of(Image)) == CODES * found.count(1088)  # none is read twice
    w, pictures, _ = model.write(story)
    assert len(pictures) == len(story.of(Image)) and w.codes == [(i, True) for i in range(len(pictures))]
    assert np.array_equal(np.concatenate(w.strip.columns["position"])[:, 0], np.arange(len(found)))
    allowed = model.mask.dense(Page.of([[w]]).tokens)[0]
    assert torch.equal(allowed, torch.ones_like(allowed).tril())


def test_codes_are_asked_among_all_words() -> None:
    model, d = tiny(), document("draw", 1)
    batch = model.collate([d])
    losses = model.loss(batch, torch.Generator())
    codes = model.encode(batch.pictures)[0]
    words = torch.tensor(model.write(d)[0].ids)
    words[-CODES - 1 : -1] = 1024 + codes
    states = model.forward_page(batch.page, [], codes)
    hidden = torch.cat((states[0][:-1], states[1]))[-CODES - 1 : -1]  # <img> and all codes but the last
    wanted = -model.head(hidden).log_softmax(-1)[torch.arange(CODES), words[-CODES - 1 : -1]].sum()
    torch.testing.assert_close(losses.sums["image"], wanted, rtol=1e-5, atol=1e-4)
    assert losses.counts["image"] == CODES


def test_pictures_of_any_size_are_read() -> None:
    model = tiny()
    square = torch.linspace(-1, 1, 3 * 64 * 64).reshape(3, 64, 64)
    found = model.encode([square, square[:, :32], square])
    assert [tuple(c.shape) for c in found] == [(CODES,)] * 3 and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], model.encode([-square])[0])


# -- drawing ----------------------------------------------------------------------------------------------------------

def test_what_was_drawn_is_read_as_it_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No encoder is asked, and later words have the log-probs that training gives them behind the same codes."""
    model = tiny()
    draw, answer = document("draw", 2), document("caption", 2).pieces[2]
    assert isinstance(answer, Text) and answer.target
    d = Document((*draw.pieces, answer))
    wanted: Iterator[int] = iter([*model.spell(answer), model.marks.end])
    heard, drawn = list[Tensor](), list[Tensor]()
    decode = model.decode

    def dictate(logits: Tensor, sampling: TextSampling, generator: torch.Generator) -> int:
        token = next(wanted)
        heard.append(next_token.log_probs(logits, sampling)[token])
        return token

    def unasked(pictures: list[Tensor]) -> list[Tensor]:
        raise AssertionError("a drawn picture was encoded")

    monkeypatch.setattr(next_token, "draw", dictate)
    monkeypatch.setattr(model, "decode", lambda x, grid: (drawn.append(x[0]), decode(x, grid))[1])
    monkeypatch.setattr(model, "encode", unasked)
    filled = model.generate([d], Sampling(codes=TokenSampling(top_p=0.5)))[0]
    assert filled.pieces[2] == answer and len(drawn) == 1 and drawn[0].shape == (CODES,)
    monkeypatch.setattr(model, "encode", lambda pictures: [drawn[0]])
    score = model.score([filled])
    text = torch.tensor([k == "text" for k in score.kinds[0]])
    torch.testing.assert_close(torch.stack(heard), score.values[0][text], atol=1e-4, rtol=0)


def test_pictures_have_the_size_that_the_detokenizer_draws() -> None:
    model, words = tiny(), Text(text="a red ring")
    for size, message in [((128, 128), "a picture of 64 x 64, which the detokenizer draws, got 128 x 128"),
                          ((64, 96), "multiples of 64, got 64 x 96")]:
        with pytest.raises(ValueError, match=message):
            model.generate([Document((words, Image(size=size, target=True)))])
    with pytest.raises(ValueError, match="expected square pictures, got 64 x 32"):
        build(picture=(64, 32))
    with pytest.raises(ValueError, match="embeddings of width 64, got 128; fix"):
        build(detokenizer=dataclasses.replace(Seed.tiny().detokenizer, tokens=8))


# -- the detokenizer --------------------------------------------------------------------------------------------------

@cache
def detokenizer(**changes: Any) -> Detokenizer:
    torch.manual_seed(0)
    return Detokenizer(dataclasses.replace(Seed.tiny().detokenizer, **changes)).eval()


def embeddings(count: int = 2) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(0))


def test_the_same_embedding_always_looks_alike() -> None:
    model, x = detokenizer(), embeddings()
    both = model.draw(x, 64, 64)
    assert both.shape == (2, 3, 64, 64) and both.abs().max() <= 1 and not torch.allclose(both[0], both[1], atol=1e-4)
    torch.testing.assert_close(model.draw(x[1:], 64, 64), both[1:], atol=1e-5, rtol=0)
    assert not torch.allclose(detokenizer(seed=1).draw(x, 64, 64), both, atol=1e-3)
    with pytest.raises(ValueError, match="multiples of 16, got 64 x 40"):
        model.draw(x, 64, 40)
    with pytest.raises(ValueError, match=r"embeddings of shape \(2, 64\), got \(2, 63\)"):
        model.draw(x[:, :63], 64, 64)


@torch.no_grad()
def test_guidance_extrapolates_from_no_embedding() -> None:
    """One Euler step from noise: x = noise + v_0 + scale (v - v_0)."""
    x, empty = embeddings(), torch.zeros(2, 64)
    noise = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1)
    model = detokenizer(steps=1, scale=3.0)
    v, v0 = (model.velocity(noise, torch.zeros(2), e, (4, 4)) for e in (x, empty))
    wanted = model.latents.from_tokens(noise + v0 + 3 * (v - v0), 2, (4, 4))
    torch.testing.assert_close(model.draw(x, 64, 64), wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(detokenizer(steps=1).draw(x, 64, 64), wanted, atol=1e-4)


@torch.no_grad()
def test_training_leaves_embeddings_out() -> None:
    pictures = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)
    x, empty = embeddings(), torch.zeros(2, 64)
    errors = {drop: [detokenizer(drop=drop).errors(pictures, e, torch.Generator().manual_seed(3)) for e in (x, empty)]
              for drop in (0.0, 1.0)}
    assert errors[0.0][0].shape == (2, 16) and not torch.allclose(errors[0.0][0], errors[0.0][1], atol=1e-5)
    torch.testing.assert_close(*errors[1.0])
    torch.testing.assert_close(errors[1.0][1], errors[0.0][1])


def test_sizes_of_the_detokenizer_fit() -> None:
    with pytest.raises(ValueError, match="network.token_width to be 6, as latent_channels and patch imply, got 24"):
        dataclasses.replace(Seed.tiny().detokenizer, patch=1)


def test_the_recipe_is_read() -> None:
    recipe = load_recipe(ROOT / "recipes" / "seed.yaml")
    assert recipe.system == "seed" and [s.name for s in recipe.stages] == ["pretrain", "tune"]
    assert set(recipe.init) == {"codec", "detokenizer"}
