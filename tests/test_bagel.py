import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diptych.document import Document, Image, Text
from diptych.objectives import flow
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling
from diptych.parts.interleave import Page
from diptych.parts.tokens import Modality, Mode
from diptych.systems.bagel import Bagel, BagelConfig, Sides
from diptych.systems.base import Event, Sampling
from diptych.systems.interleaved import Develop, Look, Read, Reader
from diptych.world.tasks import document


def build(seed: int = 0, **changes: Any) -> Bagel:
    torch.manual_seed(seed)
    model = Bagel(dataclasses.replace(Bagel.tiny(), **changes)).eval()
    torch.nn.init.normal_(model.latent_out.weight, std=0.3)  # a fresh one predicts zero
    return model


@cache
def tiny() -> Bagel:
    return build(drop_text=0.0, drop_latent=0.0, drop_feature=0.0)


def spied(model: Bagel, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every piece of work that the model is asked to run."""
    seen: list[Any] = []
    run = model.run
    monkeypatch.setattr(model, "run", lambda works: (seen.extend(works), run(works))[1])
    return seen


# -- size -------------------------------------------------------------------------------------------------------------

def test_published_size_by_arithmetic() -> None:
    """BAGEL-7B-MoT from its published configs: "7B active, 14B total"."""
    width, hidden, heads, kv, head, layers, words = 3584, 18944, 28, 4, 128, 28, 152064  # Qwen2.5-7B
    attention = width * (heads + 2 * kv) * head + (heads + 2 * kv) * head + heads * head * width + 2 * head
    trunk = layers * (attention + 3 * width * hidden + 2 * width) + width
    v, m, patch, side = 1152, 4304, 14, 70  # SigLIP2-so400m, 26 of 27 layers
    tower = 26 * (4 * (v * v + v) + 2 * v * m + m + v + 4 * v) + 3 * patch**2 * v + v + side**2 * v + 2 * v
    connector = v * width + width + width * width + width
    flow_ends = 64 * width + width + width * 64 + 64 + 256 * width + width + width * width + width
    with torch.device("meta"):
        model = Bagel(Bagel.paper())
    codec = 83_819_683  # the FLUX autoencoder
    assert sum(p.numel() for p in model.codec.parameters()) == codec
    assert model.num_parameters() == 2 * trunk + 2 * words * width + tower + connector + flow_ends + codec
    assert 14.0e9 < 2 * trunk + 2 * words * width < 14.5e9
    assert 7.0e9 < trunk + 2 * words * width < 7.7e9  # what one token passes through


# -- who learns from what ---------------------------------------------------------------------------------------------

def reached(model: Bagel, term: str, tasks: Sequence[str]) -> set[str]:
    model.zero_grad()
    losses = model.loss(model.collate([document(t, 1) for t in tasks]), torch.Generator().manual_seed(0))
    losses.sums[term].backward()
    out = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return out


def test_each_loss_reaches_its_half() -> None:
    model = build(tie_embeddings=False, drop_text=0.0, drop_latent=0.0, drop_feature=0.0)
    text = reached(model, "text", ["caption", "question"])
    assert {"head.weight", "embed.weight", "connector.fc1.weight", "trunk.norm.0.weight"} <= text
    # nothing is drawn: no latent is read, and the generation experts are not used
    assert not {n for n in text if n.startswith(("latent_", "time.", "codec.", "trunk.norm.1"))}
    assert not {n for n in text if ".attention.1." in n or ".mlp.1." in n}
    image = reached(model, "image", ["draw"])
    assert {"latent_out.weight", "latent_in.weight", "time.mlp.0.weight", "trunk.norm.1.weight"} <= image
    assert not {n for n in image if n.startswith(("head.", "codec.", "vision.", "connector.", "trunk.norm.0"))}
    assert {n for n in image if n.startswith("vision.")} == set()
    assert {n for n in reached(model, "image", ["edit"]) if n.startswith("vision.")} != set()
    # the text after a picture that was drawn reads its clean copy: the text loss moves the generation experts there
    assert {n for n in reached(model, "text", ["story"]) if ".mlp.1." in n} != set()


def test_text_never_sees_noise() -> None:
    model = tiny()
    batch = model.collate([document("story", 0), document("plan", 1)])
    with torch.no_grad():
        one, two = (model.loss(batch, torch.Generator().manual_seed(s)).sums for s in (0, 1))
    torch.testing.assert_close(one["text"], two["text"], atol=1e-4, rtol=1e-6)
    assert abs(one["image"] - two["image"]) > 0.1


# -- effect B: the packed training forward equals cached inference on the same clean tokens ---------------------------

@torch.no_grad()
def training_forward(model: Bagel, documents: list[Document], t: float) -> tuple[Page, Tensor, Tensor, Tensor]:
    """One row with all documents: page, hidden states of text and features, velocities of latents, latent inputs."""
    written = [model.write(d) for d in documents]
    page = Page.of([[w for w, _, _ in written]])
    data, grids, noised = [], [], []
    for w, pictures, _ in written:
        codes = model.encode(pictures)
        data += [codes[i] for i, _ in w.latents]
        grids += [model.grid(pictures[i]) for i, _ in w.latents]
        noised += [n for _, n in w.latents]
    times = torch.cat([torch.full((len(x),), t if n else 1.0) for x, n in zip(data, noised, strict=True)])
    x = torch.cat(data)
    x = flow.interpolate(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), times[:, None])
    features = model.see([v for _, _, views in written for v in views])
    states = model.states(page, features, model.latent_tokens(x, times, grids))
    hidden, drawn = model.trunk(states, page.tokens, model.mask)
    return page, model.head(hidden), model.latent_out(drawn), x


@torch.no_grad()
def cached_forward(model: Bagel, d: Document, x: Tensor, t: float) -> tuple[list[Tensor], list[Tensor]]:
    """The same document read piece by piece, texts token by token: logits of every text token, velocities of every
    noised picture. `x` are the latent tokens of the training forward in order."""
    reader, logits, velocities = Reader(), [], []
    drawn_later = [any(p.target and isinstance(p, Image) for p in d.pieces[i + 1:]) for i in range(len(d))]
    more = [any(p.target for p in d.pieces[i + 1:]) for i in range(len(d))]
    place = 0
    for i, piece in enumerate(d):
        if not isinstance(piece, Image):
            for n, token in enumerate([model.marks.start, *model.spell(piece), model.marks.end]):
                w = model.writer(reader)
                w.text([] if n == 0 else [token], open=n == 0, close=False)
                logits += model.run([Read(reader, w, predict=True)])
            continue
        seen, coded = model.views(torch.from_numpy(piece.pixels))
        grid = model.grid(coded)
        count = grid[0] * grid[1]
        if piece.target:
            velocities += model.run([Look([reader], x[place : place + count], t, grid)])[0]
            place += count
        if piece.target and not more[i]:
            continue
        if drawn_later[i]:
            w = model.writer(reader)
            w.latent(0, count, noised=False)
            model.run([Read(reader, w, latents=[(x[place : place + count], grid)])])
            place += count
        w = model.writer(reader)
        w.feature(0, model.feature_count(seen))
        model.run([Read(reader, w, [seen])])
    assert place == len(x)
    return logits, velocities


@pytest.mark.parametrize("coupling", ["mixture", "feed_forward", "dense"])
def test_packed_training_equals_cached_inference(coupling: str) -> None:
    model, t = build(coupling=coupling), 0.35
    documents = [document("story", 0), document("edit", 1), document("plan", 2)]
    page, logits, velocities, x = training_forward(model, documents, t)
    tokens = page.tokens
    understand, generate = tokens.routes(2)
    for n, d in enumerate(documents):
        here = tokens.document.flatten() == n
        texts = here[understand] & (tokens.mode.flatten()[understand] == Mode.CAUSAL)
        noised = here[generate] & (tokens.mode.flatten()[generate] == Mode.NOISE)
        own_logits, own_velocities = cached_forward(model, d, x[here[generate]], t)
        assert (torch.stack(own_logits) - logits[texts]).abs().max() < 1e-5
        assert (torch.cat(own_velocities) - velocities[noised]).abs().max() < 1e-5


# -- documents to tokens ----------------------------------------------------------------------------------------------

def copies(d: Document, drop: tuple[bool, bool, bool] = (False, False, False)) -> list[str]:
    w, _, _ = tiny().write(d, drop)
    t = Page.of([[w]]).tokens
    out = []
    for s in t.segment[0].unique_consecutive():
        here = t.segment[0] == s
        kind = Modality(int(t.modality[0][here].max())).name.lower()
        out.append("noised" if bool((t.mode[0][here] == Mode.NOISE).any()) else kind)
    return out


def test_which_copies_of_a_picture_are_written() -> None:
    assert copies(document("caption", 0)) == ["feature", "text", "text"]  # read only: no latents
    assert copies(document("draw", 0)) == ["text", "noised"]  # nothing follows: no clean copy
    assert copies(document("edit", 0)) == ["latent", "feature", "text", "noised"]
    assert copies(document("story", 0)) == ["text", *["noised", "latent", "feature", "text"] * 3, "noised"]
    draw, answer = document("draw", 0), Text(text="done", role="assistant", target=True)
    assert copies(Document((*draw.pieces, answer))) == ["text", "noised", "feature", "text"]  # nothing drawn later
    assert copies(document("edit", 0), (True, False, True)) == ["latent", "noised"]


def test_noised_copies_share_their_condition_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several copies of a picture cost and teach what as many documents of one copy do, with the same noise."""
    kept = {"drop_text": 0.0, "drop_latent": 0.0, "drop_feature": 0.0}
    one, three = build(**kept), build(noised_copies=3, **kept)
    for task in ("draw", "edit", "story"):
        item = document(task, 3)
        shared, alone = three.collate([item]), one.collate([item] * 3)
        assert sum(noised for _, noised in shared.latents) == sum(noised for _, noised in alone.latents)
        assert len(shared.pictures) == len(item.of(Image)), "encoded once"
        assert shared.num_tokens < alone.num_tokens
        told = [torch.Generator().manual_seed(0) for _ in range(2)]
        monkeypatch.setattr(flow, "sample_time", lambda n, *_, **__: torch.full((n,), 0.4))
        monkeypatch.setattr(flow, "interpolate", lambda data, noise, t: torch.where(t < 1, 0.4 * data, data))
        monkeypatch.setattr(flow, "squared_error", lambda v, data, noise: (v - data).square().mean(-1))
        a, b = three.loss(shared, told[0]), one.loss(alone, told[1])
        torch.testing.assert_close(a.sums["image"], b.sums["image"])
        if "text" in a.sums:
            torch.testing.assert_close(3 * a.sums["text"], b.sums["text"])


def test_a_dropped_picture_keeps_its_positions() -> None:
    d = document("edit", 0)
    words = len(tiny().write(d)[0].ids) - len(tiny().write(d, (True, False, False))[0].ids)
    positions = {drop: tiny().write(d, drop)[0].position for drop in
                 ((False,) * 3, (False, True, False), (False, True, True), (True, False, False))}
    assert positions == {(False,) * 3: words + 2, (False, True, False): words + 2, (False, True, True): words + 2,
                         (True, False, False): 2}


def test_conditions_are_dropped_as_often_as_asked() -> None:
    model = build(drop_text=0.2, drop_latent=0.5, drop_feature=0.3)
    drops = [model._drops(document("edit", i)) for i in range(400)]
    shares = np.array(drops, float).mean(0)
    assert np.abs(shares - (0.2, 0.5, 0.3)).max() < 0.08
    assert drops == [model._drops(document("edit", i)) for i in range(400)]
    drawn = np.array([model._drops(document("draw", i)) for i in range(100)])
    assert drawn[:, 0].any() and not drawn[:, 1:].any()
    sure = build(drop_text=1.0, drop_latent=1.0, drop_feature=1.0)
    for task in ("caption", "question", "refer", "story"):  # an answer never loses its question
        assert sure._drops(document(task, 0)) == (False, False, False)
    picture, ask, drawn_picture = document("edit", 0).pieces
    thought = Text(text="the ball first", role="assistant", target=True)
    assert sure._drops(Document((picture, ask, thought, drawn_picture))) == (True, False, False)


def test_pictures_of_several_sizes_are_seen_as_each_alone() -> None:
    model = build(feature_sides=Sides(shortest=16, longest=64))
    g = torch.Generator().manual_seed(0)
    views = [torch.rand(3, h, w, generator=g) * 2 - 1 for h, w in ((64, 64), (32, 64), (16, 16), (64, 64))]
    with torch.no_grad():
        together = model.see(views).split([model.feature_count(v) for v in views])
        for part, view in zip(together, views, strict=True):
            torch.testing.assert_close(part, model.see([view]), atol=1e-5, rtol=1e-5)


# -- drawing ----------------------------------------------------------------------------------------------------------

CHAIN = Guidance(branches=(Branch(context="no_text", scale=3.0), Branch(context="no_image", scale=1.5)),
                 interval=(0.0, 0.6))


@pytest.mark.parametrize("task, lengths", [
    # (everything, before the last text and its boxes, texts only)
    ("draw", lambda t, b, p: (t, 0, t)), ("edit", lambda t, b, p: (p + t, p, t)),
    ("layout", lambda t, b, p: (t + b, 0, t + b)), ("plan", lambda t, b, p: (t + 3, 0, t)),
])
def test_branches_read_what_their_names_say(task: str, lengths: Callable[..., tuple[int, ...]],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    model, d = tiny(), document(task, 1)
    works = spied(model, monkeypatch)
    answered = Sampling(evaluations=1, guidance=CHAIN, text=TextSampling(max_tokens=1))
    model.generate([d], answered)
    look = next(w for w in works if isinstance(w, Look))
    given = [p for p in d if not p.target]
    texts, boxes = (sum(len(model.spell(p)) + 2 for p in given if p.kind == kind) for kind in ("text", "boxes"))
    picture = 18 * sum(p.kind == "image" for p in given)  # 16 clean latents or features, and two marks, twice
    assert tuple(r.context.length for r in look.readers) == lengths(texts, boxes, 2 * picture)


def test_outside_its_interval_guidance_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    works = spied(model, monkeypatch)
    model.generate([document("edit", 0)], Sampling(evaluations=10, guidance=CHAIN))
    assert [len(w.readers) for w in works if isinstance(w, Look)] == [3] * 6 + [1] * 4


def test_guidance_moves_the_picture_by_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    model, d = tiny(), document("edit", 0)
    works = spied(model, monkeypatch)
    model.generate([d], Sampling(evaluations=1, guidance=CHAIN))
    look, develop = (next(w for w in works if isinstance(w, kind)) for kind in (Look, Develop))
    full, no_text, no_image = model.run([look])[0]
    v = no_image + 1.5 * (no_text + 3 * (full - no_text) - no_image)
    torch.testing.assert_close(develop.x, look.x + v, atol=1e-5, rtol=1e-5)
    # one context may serve two branches of a chain
    twice = Guidance(branches=(Branch(context="no_text", scale=3.0), Branch(context="no_text", scale=0.5)))
    assert not model.generate([d], Sampling(evaluations=1, guidance=twice))[0].pieces[2].empty


def test_stochastic_sampling_follows_its_transitions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, d = tiny(), document("draw", 0)
    works = spied(model, monkeypatch)
    sampling = Sampling(evaluations=4, stochastic=0.7)
    first, again = (model.generate([d], sampling, seeds=5)[0].pieces[1] for _ in range(2))
    assert isinstance(first, Image) and first == again
    looks, times = [w for w in works if isinstance(w, Look)][:4], flow.schedule(4)
    assert [w.t for w in looks] == times[:-1]
    steps = [flow.sde_step(w.x, model.run([w])[0][0], w.t, to, 0.7, times[1])
             for w, to in zip(looks, times[1:], strict=True)]
    z = torch.stack([(after.x - step.mean) / step.std for step, after in zip(steps, looks[1:], strict=False)])
    assert 0.8 < z.std() < 1.2 and abs(z.mean()) < 0.2  # what was added is the noise of the transitions
    plain = model.generate([d], Sampling(evaluations=4), seeds=5)[0].pieces[1]
    assert not np.allclose(plain.pixels, first.pixels, atol=1e-3)  # type: ignore[attr-defined]


def test_pictures_are_drawn_at_the_size_asked_for() -> None:
    model = tiny()
    ask = Text(text="a red ball")
    sizes = {None: (64, 64), (32, 48): (32, 48)}
    for size, expected in sizes.items():
        out = model.generate([Document((ask, Image(size=size, target=True)))], Sampling(evaluations=1))[0]
        assert out.pieces[1].pixels.shape == (3, *expected)  # type: ignore[attr-defined]
    wide = model.generate([Document((ask, Image(target=True)))], Sampling(evaluations=1, size=(16, 64)))[0]
    assert wide.pieces[1].size == (16, 64)  # type: ignore[attr-defined]


def test_events_come_while_a_document_is_filled() -> None:
    model, events = tiny(), []
    sampling = Sampling(evaluations=4, partial=2, text=TextSampling(max_tokens=6, temperature=1.0))
    filled = model.generate([document("plan", 0), document("question", 0)], sampling,
                            emit=lambda number, event: events.append((number, event)))
    pictures = [e for n, e in events if n == 0 and e.kind in ("partial", "picture")]
    assert [(e.kind, e.piece) for e in pictures] == [("partial", 2), ("partial", 2), ("picture", 2)]
    np.testing.assert_array_equal(pictures[-1].value.numpy(), filled[0].pieces[2].pixels)  # type: ignore[attr-defined]
    said: list[Event] = [e for n, e in events if n == 1]
    assert "".join(e.value for e in said) == filled[1].pieces[2].text  # type: ignore[attr-defined]


# -- must not come back -----------------------------------------------------------------------------------------------

def test_the_last_token_is_read_where_a_text_hits_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, d = tiny(), document("plan", 0)
    works = spied(model, monkeypatch)
    model.generate([d], Sampling(evaluations=1, text=TextSampling(max_tokens=3)))
    prompt = len(model.spell(d.pieces[0])) + 2
    look = next(w for w in works if isinstance(w, Look))
    assert look.readers[0].context.length == prompt + 1 + 3 + 1  # start mark, three tokens, end mark
    assert [int(w.writer.ids[0]) for w in works if isinstance(w, Read)].count(model.marks.start) >= 2


def test_a_failed_batch_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    reader, other = Reader(), Reader()
    w, v = model.writer(reader), model.writer(other)
    w.text(list(range(20, 30)))
    v.text([40])
    works = [Read(reader, w, predict=True), Read(other, v, predict=True)]  # one long and one short: two forward passes
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
        calls: list[int] = []
        head = model.head.forward
        patch.setattr(model.head, "forward", lambda x: (calls.append(1), head(x))[1] if not calls else broken())
        model.run(works)
    assert reader.context.length == other.context.length == 0 and reader.position == 0
    with torch.no_grad():
        once = model.run(works)
    assert reader.context.length == 12 and reader.position == 12
    fresh = Reader()
    u = model.writer(fresh)
    u.text(list(range(20, 30)))
    with torch.no_grad():
        torch.testing.assert_close(model.run([Read(fresh, u, predict=True)])[0], once[0])


def broken() -> Tensor:
    raise RuntimeError("out of memory")


def test_without_a_tokenizer_texts_are_errors() -> None:
    config: BagelConfig = dataclasses.replace(Bagel.tiny(), tokenizer="", marks=tiny().marks)
    with pytest.raises(ValueError, match="expected a tokenizer to read text, got none; fix: put its tokenizer.json"):
        Bagel(config).collate([document("caption", 0)])
    with pytest.raises(ValueError, match="noised_copies of at least 1"):
        dataclasses.replace(config, feature_merge=0)
