"""Answers that teach the drawing they are about, by straight-through samples of its codes (UniRL, arXiv 2505.23380)."""
from pathlib import Path
from typing import Any

import pytest
import torch
from test_aligner import tiny

from diptych import config
from diptych.alignment import through
from diptych.alignment.aligner import Aligner
from diptych.alignment.episodes import answer
from diptych.alignment.policy import act, recall
from diptych.alignment.recipe import Align, Ask, Link
from diptych.alignment.through import answer_loss, posterior_noise, rows, straight_through
from diptych.world.tasks import document

PLAINLY: dict[str, Any] = {"guidance": {"branches": []}, "codes": {"temperature": 1.0}, "evaluations": 4,
                           "text": {"temperature": 1.0, "max_tokens": 3}, "size": [32, 32]}
TASK = Ask(then=(Link(follow="answer"),))


def recipe(**changes: Any) -> Align:
    return Align(**{"method": "through", "tasks": {"draw": TASK}, "group": 2, "prompts": 2, "iterations": 2,
                    "sampling": PLAINLY, "lr": 1e-3, "freeze": ("codec",), "save_every": 1} | changes)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- samples ----------------------------------------------------------------------------------------------------------

def test_noise_explains_what_was_drawn_and_is_gumbel_noise() -> None:
    log_probs = torch.log_softmax(torch.tensor([2.0, 0.0, -1.0, float("-inf")]), 0).expand(20000, 4)
    chosen = torch.multinomial(log_probs.exp(), 1, generator=generator())[:, 0]
    noise = posterior_noise(chosen, log_probs, generator(1))
    assert torch.equal((log_probs + noise).argmax(1), chosen)
    # over what is drawn it is the noise that one draws with: mean 0.5772, variance 1.645, values independent
    assert torch.allclose(noise[:, :3].mean(0), torch.full((3,), 0.5772), atol=0.03)
    assert torch.allclose(noise[:, :3].var(0), torch.full((3,), 1.645), atol=0.1)
    assert torch.corrcoef(noise[:, :3].T).fill_diagonal_(0).abs().max() < 0.03
    assert (noise[:, 3] == 0).all()


def test_rows_are_what_was_drawn_with_the_gradient_of_a_softmax() -> None:
    logits = torch.randn(5, 7, generator=generator(), requires_grad=True)
    chosen = torch.tensor([0, 3, 6, 1, 1])
    made = straight_through(chosen, torch.log_softmax(logits, -1), generator(2), tau=0.7)
    assert torch.allclose(made, torch.nn.functional.one_hot(chosen, 7).float(), atol=1e-6)
    weights = torch.randn(5, 7, generator=generator(1))
    [found] = torch.autograd.grad((made * weights).sum(), logits)
    noise = posterior_noise(chosen, torch.log_softmax(logits, -1), generator(2))
    soft = torch.softmax((torch.log_softmax(logits, -1) + noise) / 0.7, -1)
    [wanted] = torch.autograd.grad((soft * weights).sum(), logits)
    assert torch.allclose(found, wanted, atol=1e-6) and found.abs().max() > 0.01


# -- systems ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["show-o", "emu3"])
def test_the_answer_reaches_the_drawing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system = tiny(name)
    sampling = config.merge(system.default_sampling(), PLAINLY, "sampling")
    drawings = act(system, [document("draw", i, world="one") for i in range(2)], sampling, [5, 6])
    questions = [answer(t.made, 1) for t in drawings]
    codes = [rows(own, generator()).argmax(-1) for own in recall(system, drawings, sampling, options=True)]

    def gradient() -> tuple[float, torch.Tensor]:
        loss = answer_loss(system, drawings, questions, sampling, 0)
        [found] = torch.autograd.grad(loss, [system.head.weight])
        return loss.item(), found[system.first_code : system.first_code + system.values]

    loss, reaching = gradient()
    monkeypatch.setattr(through, "rows", lambda *given: rows(*given).detach())
    same, stopping = gradient()
    assert loss == pytest.approx(same) and (reaching - stopping).abs().sum() > 0.1 * stopping.abs().sum()
    # what is learnt is the answer behind the codes that were drawn, as training has it
    monkeypatch.setattr(system, "encode", lambda pictures: [c for p in pictures for c in codes[:1]])
    for n, question in enumerate(questions):
        codes[:1] = codes[n:n + 1]
        trained = system.loss(system.collate([question]), generator()).mean()["text"].item()
        alone = answer_loss(system, drawings[n:n + 1], questions[n:n + 1], sampling, 0).item()
        assert alone == pytest.approx(trained, abs=1e-4)


def test_systems_that_read_features_are_refused(tmp_path: Path) -> None:
    a = Aligner(recipe(), tiny("janus"), tmp_path)
    with pytest.raises(ValueError, match="expected a system that reads pictures by the codes that it draws, got Janus"):
        a.iterate()


def test_the_loop_learns_both_or_the_answer_alone(tmp_path: Path) -> None:
    found = []
    for name, ask in (("both", TASK), ("answers", Ask(learn=False, then=TASK.then))):
        a = Aligner(recipe(tasks={"draw": ask}), tiny("show-o"), tmp_path / name)
        line = a.iterate()
        assert line["used"] == 4 and line["grad_norm"] > 0 and not line["skipped"]
        found.append(line["loss"])
    assert found[0] == pytest.approx(found[1], abs=0.5), "the same questions"
    for changes in ({"offline": True}, {"tasks": {"draw": Ask(reward="scene")}}, {"tau": 0.0},
                    {"tasks": {"draw": Ask(then=(Link(follow="answer", learn=False),))}}):
        with pytest.raises(ValueError, match="expected"):
            recipe(**changes)
