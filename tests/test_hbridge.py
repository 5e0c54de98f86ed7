"""HBridge: sizes, who reads whom, what the learnt tokens stand for, packed against stepwise, the recipe."""
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filling import filled
from torch import Tensor

from diptych.objectives import flow
from diptych.parts.interleave import GENERATE
from diptych.parts.tokens import Modality
from diptych.systems.bagel import Bagel
from diptych.systems.base import Sampling
from diptych.systems.hbridge import HBridge
from diptych.systems.works import Look, Read, Reader
from diptych.training.recipe import load_recipe
from diptych.training.stages import fixed_names, trained_names
from diptych.world.tasks import document

RECIPE = Path(__file__).parents[1] / "recipes" / "hbridge.yaml"


def build(**changes: Any) -> HBridge:
    """With gates and velocities that are not zero, as a fresh model's are."""
    torch.manual_seed(0)
    drops = {"drop_text": 0.0, "drop_latent": 0.0, "drop_feature": 0.0}
    return filled(HBridge(dataclasses.replace(HBridge.tiny(), **(drops | changes))).eval())


@cache
def tiny() -> HBridge:
    return build()


def painters(model: HBridge) -> set[str]:
    """The parameters of the second expert and of what only it uses."""
    own = ("latent_", "semantic_", "trunk.norm.1", "trunk.time")
    kinds = ("attention", "attention_norm", "mlp", "mlp_norm", "modulation")
    return {n for n, p in model.named_parameters() if p.requires_grad and (
        n.startswith(own) or any(f".{kind}.1." in n for kind in kinds))}


# -- sizes ------------------------------------------------------------------------------------------------------------

def test_the_published_size_by_arithmetic() -> None:
    """Qwen2.5-7B, and "about 4B" of OmniGen2 in 32 layers; maps in 16 of them."""
    width, hidden, inner, own = 3584, 18944, 10240, 2520
    read = width * (3584 + 1024) + 3584 + 1024 + width**2 + 3 * width * hidden + 2 * width
    paint = own * (2520 + 1680) + own**2 + 3 * own * inner + 2 * own + (own * 4 * own + 4 * own)
    maps = 2520 * 3584 + 2 * 840 * 512 + 3584 * 2520
    norms = 16 * 2 * 128 + 16 * 2 * 120  # of queries and keys: in the head space where the product happens
    time = 256 * own + own + own**2 + own
    with torch.device("meta"):
        model = HBridge(HBridge.paper())
    found = sum(p.numel() for p in model.trunk.parameters())
    assert found == 28 * read + width + 32 * paint + 16 * maps + norms + own + time
    assert 28 * read + width + 2 * 152064 * width == pytest.approx(7.6e9, rel=0.01)
    assert 32 * paint == pytest.approx(3.83e9, rel=0.01)
    layers = model.trunk.coupling.layers[4:]
    assert sum(not layer.joint for layer in layers) / len(layers) == pytest.approx(0.43, abs=0.01)


# -- who reads whom ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_answers_do_not_know_the_painter() -> None:
    """Bit by bit, also behind pictures that were drawn."""
    model, documents = build(), [document(t, 1) for t in ("question", "plan", "story")]
    before = model.score(documents).values
    for n in painters(model):
        model.get_parameter(n).add_(0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.score(documents).values, strict=True))


def reached(model: HBridge, term: str, task: str) -> set[str]:
    losses = model.loss(model.collate([document(task, 1)]), torch.Generator().manual_seed(0))
    model.zero_grad()
    losses.sums[term].backward()
    out = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return out


def test_each_loss_reaches_its_expert() -> None:
    model, own = build(), painters(tiny())
    assert not reached(model, "text", "question") & own
    image, semantic = (reached(model, term, "edit") for term in ("image", "semantic"))
    assert own - image == {"semantic_out.weight", "semantic_out.bias"}
    assert own - semantic == {"latent_out.weight", "latent_out.bias"}
    # of the reader, what stands below the last bridged layer
    assert {n for n in image - own if n.startswith("trunk.layers.4")} == set()
    assert {n.split(".")[0] for n in image - own} == {"embed", "head", "trunk", "vision", "connector"} - {"head"}


def drawings(model: HBridge) -> Tensor:
    """The same picture after two different texts."""
    documents = [document("draw", i).prompt() for i in (1, 2)]
    plain = Sampling(evaluations=2)
    return torch.stack([torch.from_numpy(d.pieces[1].pixels) for d in model.generate(documents, plain)])  # type: ignore


def test_drawings_know_texts_through_the_bridge() -> None:
    for apart, told in (((1, 1), True), ((0, 0), True), ((4, 0), False), ((3, 1), False)):
        one, two = drawings(build(apart=apart))
        assert (not torch.allclose(one, two, atol=1e-4)) == told, apart


@torch.no_grad()
def test_all_layers_bridged_between_equals_are_bagel() -> None:
    """With its mask: in BAGEL the marks of a picture look at it. Cut apart, the painter no longer knows the text."""
    c = Bagel.tiny()
    vision = dataclasses.replace(c.vision, interpolate=True)
    theirs = filled(Bagel(dataclasses.replace(c, drop_text=0.0, vision=vision)).eval())
    theirs.mask = HBridge.mask
    ours, cut = (build(reader=c.block, painter=c.block, depth=c.depth, front=0, apart=apart, semantic_tokens=0,
                       spread_tables=True, vision=vision, codec=c.codec) for apart in ((0, 0), (1, 1)))
    documents = [document("draw", 1), document("caption", 2)]
    for model in (ours, cut):
        model.load_state_dict(theirs.state_dict())
    losses = [m.loss(m.collate(documents), torch.Generator().manual_seed(0)).sums for m in (theirs, ours)]
    assert set(losses[1]) == {"text", "image"}
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value)
    assert not torch.allclose(*drawings(ours), atol=1e-4) and torch.allclose(*drawings(cut), atol=1e-4)


# -- learnt tokens ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_learnt_tokens_stand_for_the_picture() -> None:
    model, batch = tiny(), tiny().collate([document("edit", 0), document("draw", 1)])
    pictures = [batch.pictures[i] for i, noised in batch.latents if noised]
    assert len(pictures) == 2 and batch.counts is not None and batch.counts["semantic"] == 2 * 4
    losses = model.loss(batch, torch.Generator().manual_seed(0))
    assert batch.counts == {k: float(v) for k, v in losses.counts.items()}
    wanted = []
    for p in pictures:  # 8 x 8 features in 2 x 2 cells
        features = model.vision.encode(p[None])[0].unflatten(0, (2, 4, 2, 4))
        wanted.append(features.mean((1, 3)).flatten(0, 1))
    torch.testing.assert_close(model.meanings(pictures), torch.stack(wanted))
    expected = 1 - F.cosine_similarity(torch.cat(wanted), wanted[0][0][None], dim=-1)
    for copies in (1, 3):
        model = build(noised_copies=copies)
        model.semantic_out.weight.zero_()
        model.semantic_out.bias.copy_(wanted[0][0])
        own = model.collate([document("edit", 0), document("draw", 1)])
        found = model.loss(own, torch.Generator().manual_seed(0))
        torch.testing.assert_close(found.sums["semantic"], copies * expected.sum(), atol=1e-5, rtol=1e-5)


def test_they_may_be_left_out() -> None:
    model = build(semantic_tokens=0)
    losses = model.loss(model.collate([document("draw", 0)]), torch.Generator().manual_seed(0))
    assert set(losses.sums) == {"image"} and drawings(model).isfinite().all()
    with pytest.raises(ValueError, match="a square number or 0, got 5"):
        build(semantic_tokens=5)
    with pytest.raises(ValueError, match="a reader that is not modulated"):
        build(reader=HBridge.tiny().painter)


# -- training and sampling --------------------------------------------------------------------------------------------

@torch.no_grad()
def test_stepwise_velocities_are_those_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an edited picture: its features, its clean latents and a text before it, read one after the other."""
    model, d = tiny(), document("edit", 3)
    batch = model.collate([d])
    monkeypatch.setattr(flow, "sample_time", lambda count, generator, **kw: torch.full((count,), 0.3))
    seen: list[Tensor] = []
    inner = model.latent_out.forward
    monkeypatch.setattr(model.latent_out, "forward", lambda x: (seen.append(inner(x)), seen[-1])[1])
    model.loss(batch, torch.Generator().manual_seed(5))
    data = model.encode(batch.pictures)
    noise = torch.randn(32, model.token_width, generator=torch.Generator().manual_seed(5))
    (first, _), (second, drawn) = batch.latents
    assert drawn and torch.equal(data[first], data[0])
    x = flow.interpolate(data[second], noise[16:], torch.tensor(0.3))
    reader, w = Reader(), model.writer(Reader())
    views, coded = model.views(torch.from_numpy(d.pieces[0].pixels))  # type: ignore[attr-defined]
    w.latent(0, 16, noised=False)
    w.feature(0, model.feature_count(views))
    model.run([Read(reader, w, [views], [(model.encode([coded])[0], (4, 4))])])
    w = model.writer(reader)
    w.text(model.spell(d.pieces[1]))
    model.run([Read(reader, w)])
    answer = model.run([Look([reader], x, 0.3, (4, 4))])[0][0]
    torch.testing.assert_close(answer, seen[0], atol=1e-5, rtol=1e-5)
    later = model.run([Look([reader], x, 0.8, (4, 4))])[0][0]
    assert not torch.allclose(later, answer, atol=1e-3)


def test_learnt_tokens_share_the_block_of_the_noise() -> None:
    tokens = tiny().collate([document("draw", 0)]).page.tokens
    queries, latents = (tokens.modality == kind for kind in (Modality.QUERY, Modality.LATENT))
    assert queries.sum() == 4 and (tokens.route[queries] == GENERATE).all()
    assert set(tokens.segment[queries].tolist()) == set(tokens.segment[latents].tolist())
    seen = tiny().mask.dense(tokens)[0]
    assert seen[latents[0]][:, queries[0]].all() and seen[queries[0]][:, latents[0]].all()
    assert not seen[(tokens.route[0] == 0)][:, queries[0] | latents[0]].any()


def test_the_recipe_is_read() -> None:
    recipe = load_recipe(RECIPE)
    with torch.device("meta"):
        model = HBridge(HBridge.small())
    assert recipe.system == "hbridge" and [s.name for s in recipe.stages] == ["read", "draw"]
    assert trained_names(model, recipe.stages[1], fixed_names(model)) == painters(model)
