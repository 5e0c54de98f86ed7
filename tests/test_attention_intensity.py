"""How much a layer looks at chosen tokens, without keeping maps; and the AIA loss on it."""
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.adapters import parity
from diptych.alignment import attention as aia
from diptych.alignment.attention import DRAW, READ, AttentionLoss, Ratio, Schedule, Stage
from diptych.document import Text
from diptych.parts import attention
from diptych.parts.tokens import Modality, Tokens
from diptych.systems.bagel import Bagel
from diptych.systems.base import Sampling
from diptych.systems.decoding import Decoding
from diptych.systems.emu3 import Emu3
from diptych.systems.hbridge import HBridge
from diptych.systems.janus import Janus
from diptych.world import tasks

GOLDEN = Path(__file__).parent / "goldens" / "aia"


def system(cls: Any) -> Any:
    torch.manual_seed(0)
    made = cls(replace(cls.tiny(), drop_text=0.0))
    with torch.no_grad():  # fresh projections hardly tell keys apart
        for name, p in made.trunk.named_parameters():
            if "qkv" in name and p.ndim == 2:
                p.mul_(8)
    return made


def batch(model: Any, *names: str) -> Any:
    return model.collate([tasks.document(name, i) for i, name in enumerate(names)])


def read(model: Any, page: Any) -> Any:
    return model.loss(page, torch.Generator().manual_seed(0))


def test_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = parity.run("aia", GOLDEN)
    assert len(cases) == 22 and all(c.passed for c in cases)
    shutil.copytree(GOLDEN, tmp_path / "one")  # drawing alone, with the stages of reading
    about = json.loads((GOLDEN / "golden.json").read_text())
    (tmp_path / "one" / "golden.json").write_text(json.dumps({k: v for k, v in about.items() if k != "und"}))
    monkeypatch.setattr("diptych.adapters.aia_cases.DRAW", READ["paper"])
    found = parity.run("aia", tmp_path / "one")
    assert {"gen.loss_attn", "gen.loss"} <= {c.name for c in found if not c.passed}
    assert len(found) == 11 and all(c.passed for c in found if c.name == "gen.intensity")


@pytest.mark.parametrize("cls", [Janus, Bagel, HBridge])
def test_shares_are_those_of_the_maps(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped heads, mixtures of experts, several products in a layer."""
    model = system(cls)
    page = batch(model, "draw", "question")
    keys = page.page.tokens.modality == Modality.TEXT
    maps: list[Tensor] = []
    plain = attention.attend

    def noting(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * q.shape[-1] ** -0.5
        maps.append((scores + bias[:, None]).softmax(-1).mean(1))
        return plain(q, k, v, bias)

    with torch.no_grad():
        before = read(model, page)
        monkeypatch.setattr(attention, "attend", noting)
        with model.trunk.watch(keys) as seen:
            after = read(model, page)
    [shares] = seen
    layers, products = len(model.trunk.layers), [len(p) for p in model.trunk.products]
    assert shares.shape == (layers, *page.page.tokens.shape) and shares.dtype == torch.float32
    for name, value in before.sums.items():
        torch.testing.assert_close(after.sums[name], value)
    if max(products) == 1 and keys.shape[0] == 1:
        valid = page.page.tokens.valid()
        for layer, found in zip(shares, maps, strict=True):
            torch.testing.assert_close(layer[valid], (found * keys[:, None]).sum(-1)[valid], rtol=1e-4, atol=1e-6)
    assert shares.max() <= 1 + 1e-5 and float(shares.std()) > 0.01


@pytest.mark.parametrize("cls", [Janus, HBridge])
def test_shares_of_all_keys_are_one_and_add_up(cls: Any) -> None:
    model = system(cls)
    page = batch(model, "draw", "question", "caption", "story", "draw")  # rows of different lengths
    assert page.page.tokens.shape[0] > 1
    valid, some = page.page.tokens.valid(), page.page.tokens.modality == Modality.TEXT
    found = []
    with torch.no_grad():
        for keys in (torch.ones_like(valid), some, ~some):
            with model.trunk.watch(keys) as seen:
                read(model, page)
            found.append(seen[0])
    whole, text, rest = found
    attends = whole[:, valid].round()  # a layer may leave a route out
    assert attends.max() == 1 and attends.mean() > (0.5 if cls is HBridge else 0.999)
    torch.testing.assert_close(whole[:, valid], attends)
    assert whole[:, ~valid].abs().max() == 0
    torch.testing.assert_close(text + rest, whole)


def test_a_watch_is_differentiable_and_ends() -> None:
    model = system(Janus)
    page = batch(model, "draw")
    keys = page.page.tokens.modality == Modality.TEXT
    with model.trunk.watch(keys) as seen:
        read(model, page)
        with pytest.raises(ValueError, match="one watch at a time"), model.trunk.watch(keys):
            pass
    weight = model.trunk.layers[0].attention[0].qkv.weight
    [gradient] = torch.autograd.grad(seen[0].sum(), weight)
    width = model.config.block.width
    assert gradient[:width].abs().max() > 0 and gradient[width:2 * width].abs().max() > 0
    read(model, page)
    assert len(seen) == 1 and model.trunk.watching is None


def test_cached_passes_are_watched_by_what_tokens_are() -> None:
    model, document = system(Janus), tasks.document("draw", 0)
    sampling = Sampling()

    def text(tokens: Tokens) -> Tensor:
        return (tokens.modality == Modality.TEXT) & tokens.valid()

    plain = model.generate([document.prompt()], sampling)
    with model.trunk.watch(text) as seen:
        assert Decoding.of(model) is None  # compiled steps tell nothing
        watched = model.generate([document.prompt()], sampling)
    assert len(seen) == 3 + 64  # the prompt in every context, then code by code
    torch.testing.assert_close(torch.from_numpy(watched[0].pieces[1].pixels),
                               torch.from_numpy(plain[0].pieces[1].pixels), atol=1e-4, rtol=0)
    # the same as without a cache, at the same codes
    whole = model.collate([watched[0]])
    with torch.no_grad(), model.trunk.watch(text(whole.page.tokens)) as once:
        read(model, whole)
    steps = torch.cat([seen[0][:, 0], seen[3][:, 0]], 1)
    # a drawing that is encoded again may have other codes: the prompt and the mark behind it are sure
    torch.testing.assert_close(steps, once[0][:, 0, :steps.shape[1]], atol=1e-5, rtol=1e-4)
    assert steps.shape[1] + 64 == int(whole.page.tokens.valid().sum())
    with pytest.raises(ValueError, match="function of the tokens"), model.trunk.watch(torch.ones(1, 4)):
        model.generate([document.prompt()], sampling)
    assert model.trunk.watching is None


# -- the loss ---------------------------------------------------------------------------------------------------------

def test_huber_and_stages_have_the_published_values() -> None:
    def at(schedule: Schedule, layer: int, found: float) -> float:
        stage = schedule.stage(layer, 30)
        return float(aia.huber(torch.tensor(found - stage.target), torch.tensor(stage.delta)))

    assert at(DRAW, 3, 0.1) == pytest.approx(0.04) and at(DRAW, 12, 0.38) == pytest.approx(2e-4)
    assert at(DRAW, 27, 0.5) == pytest.approx(0.01375)
    assert [READ[v].stage(20, 30).target for v in ("paper", "released")] == [0.3, 0.15]
    target, delta = DRAW.at(6)  # stages move with the depth
    assert target.tolist() == pytest.approx([0.4] * 5 + [0.2])
    assert delta.tolist() == pytest.approx([0.2] * 2 + [0.1] * 3 + [0.05])
    flat = Schedule(stages=(Stage(first=0, target=0.4, delta=0.2),))
    error = aia.errors(torch.tensor([[0.4, 0.1], [0.4, 0.4]]), flat, torch.tensor([1.0, 0.0]))
    assert error.tolist() == [0, 0]
    with pytest.raises(ValueError, match="stages from layer 0 on"):
        Schedule(stages=(Stage(first=1, target=0.1, delta=0.1),))
    ratio = Ratio(ratio=50, decay=0.5)
    assert ratio.weight == 0, "nothing is known before the first step"
    ratio.note(10, 0.1)
    assert ratio.weight == pytest.approx(2)
    ratio.note(10, 0.3)
    assert ratio.weight == pytest.approx(1)


@pytest.mark.parametrize("cls", [Janus, Bagel])
def test_spans_of_pages(cls: Any) -> None:
    model = system(cls)
    documents = [tasks.document("draw", 0), tasks.document("question", 0)]
    page = model.collate(documents).page
    found = aia.spans(page)
    tokens = page.tokens
    assert sorted(found.kinds) == ["draw", "read"] and found.weights.tolist() == [1, 1]
    [draw], [look] = found.of("draw"), found.of("read")
    drawn = Modality.CODE if cls is Janus else Modality.LATENT
    assert set(tokens.modality[found.samples == draw].tolist()) == {drawn}
    assert set(tokens.modality[found.samples == look].tolist()) == {Modality.TEXT}
    count = int((found.samples == draw).sum())
    for n, kind in ((draw, Modality.TEXT), (look, Modality.FEATURE)):
        row = int(torch.nonzero((found.samples == n).any(1))[0])
        own = tokens.document[row] == int(tokens.document[row][found.samples[row] == n][0])
        assert set(tokens.modality[row][found.keys[row] & own].tolist()) == {kind}
        if n == draw:  # the words and their marks, not those of the picture
            [text] = [p.text for p in documents[0].of(Text)]
            assert int((found.keys[row] & own).sum()) == len(model.vocabulary.encode(text)) + 2
    moved = aia.spans(page, reference=True)
    assert int((moved.samples == draw).sum()) == count - 1
    looked = torch.nonzero((moved.keys & ~found.keys).flatten())
    assert len(looked) == 1 and int((found.keys & ~moved.keys).sum()) == 1


def test_a_prompt_left_out_counts_nothing() -> None:
    model = system(Janus)
    w = [model.write(tasks.document("draw", i), (i == 1, False, False)) for i in range(2)]
    found = aia.spans(model.lay_out(w).page, silent=aia.silent_ids(model))
    assert sorted(found.weights.tolist()) == [0, 1]


def test_codes_that_are_read_are_looked_at_and_empty_prompts_are_none() -> None:
    model = system(Emu3)
    w = [model.write(tasks.document("draw", i), (i == 1, False, False)) for i in range(2)]
    w.append(model.write(tasks.document("question", 0)))
    page = model.lay_out(w).page
    found = aia.spans(page, silent=aia.silent_ids(model))
    assert sorted(zip(found.kinds, found.weights.tolist(), strict=True)) == [("draw", 0), ("draw", 1), ("read", 1)]
    [read] = found.of("read")
    row, end = (int(v[-1]) for v in torch.nonzero(found.samples == read, as_tuple=True))
    own = page.tokens.document[row] == page.tokens.document[row, end]
    assert int((found.keys[row] & own).sum()) == 64
    assert set(page.tokens.modality[row][found.keys[row] & own].tolist()) == {Modality.CODE}


def test_the_loss_pulls_attention_to_its_targets() -> None:
    model = system(Janus)
    page = batch(model, "draw", "draw", "question", "question")
    loss = AttentionLoss()
    optimiser = torch.optim.Adam([p for n, p in model.trunk.named_parameters() if "qkv" in n], lr=3e-3)
    gaps: list[float] = []
    plain = read(model, page)
    for _ in range(12):
        losses = loss(model, page, torch.Generator().manual_seed(0))
        assert losses.counts["attention draw"] == losses.counts["attention read"] == 2
        assert losses.weights["attention draw"] == 5 and losses.weights["attention read"] == 10
        if not gaps:
            torch.testing.assert_close(losses.sums["text"], plain.sums["text"])
        means = losses.mean()
        gaps.append(float((means["attention draw"] + means["attention read"]).detach()))
        optimiser.zero_grad()
        (means["attention draw"] + means["attention read"]).backward()
        optimiser.step()
    assert gaps[-1] < 0.5 * gaps[0]
    balanced = AttentionLoss(ratios={"draw": Ratio(), "read": Ratio()})
    first = balanced(model, page, torch.Generator().manual_seed(0))
    torch.testing.assert_close(first.total().detach(), read(model, page).total().detach())
    balanced.after_step(first)
    scaled = balanced(model, page, torch.Generator().manual_seed(0))
    total = float(scaled.total().detach())
    names = ("attention draw", "attention read")
    own = sum(float(scaled.mean()[n].detach()) * scaled.weights[n] for n in names)
    assert own / (total - own) == pytest.approx(2 / 50, rel=1e-3)


def test_curves_are_read_off_specialists() -> None:
    model = system(Janus)
    found = aia.curves(model, [tasks.document(t, i) for i in range(3) for t in ("draw", "question")], batch=4)
    assert {k: v.shape for k, v in found.items()} == {"draw": (2, 3), "read": (2, 3)}
    schedule = aia.read_off(found["draw"], (0, 1))
    assert schedule.depth == 2 and schedule.at(2)[0].tolist() == pytest.approx(found["draw"].mean(1).tolist())
    assert all(s.delta >= 0.05 for s in schedule.stages)
