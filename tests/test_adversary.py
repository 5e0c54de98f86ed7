"""UniGame: the perturber and its turn, drawing under it, mining and the buffer."""
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from diptych.adapters import parity
from diptych.alignment import adversary
from diptych.alignment.adversary import Game, HardBuffer, Mining, Perturber, cost, hardness, mine
from diptych.alignment.rewards.base import Facts, Failure, Rating, Reward
from diptych.document import Document, Image, Text
from diptych.systems.bagel import Bagel
from diptych.systems.decoding import Decoding
from diptych.systems.hooks import altered, altering
from diptych.systems.janus import Janus
from diptych.world import tasks

GOLDEN = Path(__file__).parent / "goldens" / "unigame"


def janus() -> Janus:
    torch.manual_seed(0)
    return Janus(replace(Janus.tiny(), picture=(16, 16), drop_text=0.0))


def test_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = parity.run("unigame", GOLDEN)
    assert len(cases) == 45 and all(c.passed for c in cases)
    shutil.copytree(GOLDEN, tmp_path / "some")  # what needs no model
    about = json.loads((GOLDEN / "golden.json").read_text())
    kept = {k: about[k] for k in ("mining", "buffer", "perturb")}
    (tmp_path / "some" / "golden.json").write_text(json.dumps(kept))
    monkeypatch.setattr(adversary, "shared_ce", lambda ce, size, count: ce.repeat(size)[:count])
    monkeypatch.setattr(Perturber, "eps", property(lambda self: self.eps_max * self.openness + 1e-3))
    failed = {c.name for c in parity.run("unigame", tmp_path / "some") if not c.passed}
    assert {"mining.quantile.candidates", "perturb.eps", "perturb.delta"} <= failed
    assert not any(n.startswith("buffer") for n in failed)


def test_perturbations_have_the_learnt_radius() -> None:
    torch.manual_seed(0)
    made = Perturber(16, hidden=8, eps_max=0.5, eps_min=0.1, eps_start=0.3)
    z = torch.randn(2, 5, 16, requires_grad=True)
    delta = made(z)
    assert made.eps.item() == pytest.approx(0.3) and delta.shape == z.shape
    torch.testing.assert_close(delta.norm(dim=-1), torch.full((2, 5), 0.3))
    delta.sum().backward()
    assert z.grad is None and all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())
    assert made(z.bfloat16()).dtype == torch.float32
    own = Perturber(16, eps_max=0.1, eps_start=0.05, relative=True)
    torch.testing.assert_close(own(z).norm(dim=-1), 0.05 * z.norm(dim=-1))
    with torch.no_grad():
        made.rho.fill_(50.0)
    assert made.eps.item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="eps_min < eps_start < eps_max"):
        Perturber(16, eps_max=0.01, eps_start=0.02)


def test_neighbours_are_those_of_one_picture() -> None:
    made = Perturber(4)
    game = Game(l2=2.0, tv=3.0, radius=0.5)
    flat = [torch.ones(3, 4), -torch.ones(2, 4)]  # a step between pictures is none
    found = cost(flat, made, game)
    assert found.l2 == 1 and found.tv == 0
    assert found.total.item() == pytest.approx(2 + 0.5 * made.openness.item() ** 2)
    assert cost([torch.cat(flat)], made, game).tv == pytest.approx(1.0)
    assert cost([torch.ones(1, 4)], made, game).tv == 0


def test_the_perturber_raises_what_the_model_lowers() -> None:
    model, game = janus(), Game()
    batch = model.collate([tasks.document("question", i) for i in range(4)])
    torch.manual_seed(1)
    made = Perturber(model.config.block.width, eps_max=3.0, eps_start=0.5)
    generator = torch.Generator()
    clean = adversary.clean_turn(model, batch, generator, game)
    assert float(clean.loss.detach()) == pytest.approx(1.5 * float(clean.ce.detach()))
    optimiser, seen = torch.optim.Adam(made.parameters(), lr=5e-2), list[float]()
    for _ in range(12):
        play = adversary.adversary_turn(model, batch, made, generator, game)
        assert play.cost is not None
        seen.append(float(play.ce.detach()))
        optimiser.zero_grad()
        play.loss.backward()
        optimiser.step()
    assert seen[-1] > max(seen[0], float(clean.ce.detach())) + 0.05 and made.eps.item() > 0.5
    assert model.head.weight.grad is not None  # gradients reach both: the trainer says who moves
    again = adversary.clean_turn(model, batch, generator, game)
    torch.testing.assert_close(again.ce, clean.ce)
    counts = adversary._feature_counts(model.collate([tasks.document("question", i) for i in range(9)]))
    assert counts == [16] * 9
    with pytest.raises(ValueError, match="pictures to read in the adversary's turn"):
        adversary.adversary_turn(model, model.collate([tasks.document("read", 0)]), made, generator, game)
    with pytest.raises(ValueError, match="without a text target"):
        adversary.clean_turn(model, model.collate([tasks.document("draw", 0)]), generator, game)


def picture(documents: Sequence[Document]) -> torch.Tensor:
    return torch.from_numpy(np.stack([d.of(Image)[-1].pixels for d in documents]))


def drawn(model: Any, made: Perturber | None, point: str = "code_tokens") -> torch.Tensor:
    prompt = Document((tasks.document("draw", 0).pieces[0], Image(role="assistant", target=True, size=(16, 16))))
    if made is None:
        return picture(model.generate([prompt], seeds=3))
    with adversary.perturbed(model, made, point):
        assert altered(model) and Decoding.of(model) is None
        return picture(model.generate([prompt], seeds=3))


def test_drawings_are_perturbed_where_codes_enter() -> None:
    model = janus()
    width = model.config.block.width
    with torch.no_grad():
        cast(nn.Linear, model.code_head[2]).weight.mul_(20)  # a fresh head hardly looks at its input
    plain = drawn(model, None)
    slight = drawn(model, Perturber(width, eps_max=1e-6, eps_start=1e-7))
    strong = drawn(model, Perturber(width, eps_max=50.0, eps_start=40.0))
    assert torch.equal(plain, slight) and not torch.equal(plain, strong)
    assert not altered(model) and torch.equal(drawn(model, None), plain)


def test_latents_are_perturbed_too_and_mistakes_are_named() -> None:
    torch.manual_seed(0)
    model = Bagel(Bagel.tiny())
    torch.nn.init.normal_(model.latent_out.weight)
    width = model.config.block.width
    plain = drawn(model, None)
    assert not torch.equal(drawn(model, Perturber(width, eps_max=50.0, eps_start=40.0), "latent_tokens"), plain)
    with pytest.raises(ValueError, match="one of see, code_tokens, latent_tokens, got 'code_tokens' of Bagel"):
        drawn(model, Perturber(width))
    with altering(model, "see", lambda x: x), pytest.raises(ValueError, match="one change of 'see' at a time"):
        with altering(model, "see", lambda x: x):
            pass
    assert "see" not in vars(model)


# -- mining and the buffer --------------------------------------------------------------------------------------------

def test_mining_keeps_hard_ones_that_show_what_was_asked() -> None:
    ce, similarity = torch.tensor([1.0, 3.0, 2.5, 0.1, 2.0, 0.2]), torch.tensor([0.5, 0.5, 0.1, 0.5, 0.4, 0.0])
    paper = Mining(quantile=0.5, top=2)
    hard = hardness(ce, similarity, paper)
    assert hard.tolist() == pytest.approx([1.0, 3.0, 2.525, 0.1, 2.0, 0.235])
    sources = [0, 0, 0, 1, 1, 1]
    assert mine(hard, similarity, sources, paper) == [1, 4]
    released = replace(paper, variant="released")
    assert mine(hard, similarity, sources, released) == [1, 2, 4, 5]  # 5 is easy, but shows something else
    assert mine(hard, similarity, sources, replace(released, top=1, most=1)) == [1]
    assert mine(hard, similarity, sources, replace(paper, absolute=0.05)) == [1, 4, 0, 3]
    with pytest.raises(ValueError, match="variant paper or released"):
        Mining(variant="both")  # type: ignore[arg-type]


def test_the_buffer_keeps_the_hardest_and_gives_each_once() -> None:
    buffer: HardBuffer[str] = HardBuffer(3)
    buffer.push([(1.0, "a"), (3.0, "b")])
    buffer.push([(2.0, "c"), (0.5, "d"), (3.0, "e")])
    assert buffer.items == ["b", "e", "c"] and len(buffer) == 3
    chances = buffer.probabilities(1.0)
    assert chances.sum() == pytest.approx(1) and chances[0] / chances[1] == pytest.approx(np.e)
    first = buffer.sample(2, torch.Generator().manual_seed(0), 50.0)
    assert len(set(first)) == 2 and len(buffer) == 1 and not set(first) & set(buffer.items)
    assert len(buffer.sample(5, torch.Generator().manual_seed(0))) == 1 and len(buffer) == 0
    assert buffer.sample(1, torch.Generator()) == []
    buffer.push((float(i), str(i)) for i in range(300))
    assert HardBuffer(1).capacity == 1 and len(buffer) == 3
    with pytest.raises(ValueError, match="capacity of at least 1"):
        HardBuffer(0)


class Brightness(Reward):
    """A similarity that can be told."""

    FACTS = Facts(name="brightness", about="", low=-1.0, high=1.0)

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        return [Rating(float(m.of(Image)[-1].pixels.mean())) for m in made]


def test_a_model_digs_for_its_own_hard_examples() -> None:
    model = janus()
    made = Perturber(model.config.block.width)
    questions = [tasks.document("question", i) for i in range(2)]
    rows = adversary.dig(model, questions, made, Brightness(), Mining(quantile=0.0, top=2, tau=-1.0), count=3, seed=5)
    assert len(rows) == 4 and [h for h, _ in rows] == sorted((h for h, _ in rows), reverse=True)
    for hard, document in rows:
        assert [type(p) for p in document] == [type(p) for p in questions[0]] and document.of(Image)[0].size == (16, 16)
        assert float(adversary.answer_ce(model, [document])[0]) == pytest.approx(hard, abs=1e-5)
        assert document.of(Text)[1].text in [q.of(Text)[1].text for q in questions]
    again = adversary.dig(model, questions, made, Brightness(), Mining(quantile=0.0, top=2, tau=-1.0), count=3, seed=5)
    assert [d for _, d in again] == [d for _, d in rows]
    pictures = torch.rand(2, 3, 8, 8)
    assert adversary.resized(pictures, (4, 4)).shape == (2, 3, 4, 4)
