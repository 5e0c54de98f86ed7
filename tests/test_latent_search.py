"""MILR: the update against a computation of its own, what a search leaves as it is, its budgets, modes and controls."""
import dataclasses
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filling import filled
from torch import Tensor, nn

from diptych.alignment import latent_search
from diptych.alignment.latent_search import Found, Settings, measure, search
from diptych.alignment.latents import Latent, code_scores, stacked, values, word_scores
from diptych.alignment.policy import Trajectory, act
from diptych.alignment.rewards.base import Facts, Failure, Rating, Reward
from diptych.alignment.rewards.table import make
from diptych.document import Boxes, Document, Image, Text
from diptych.objectives.decisions import Tape, decide, taping
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.replication.runner import recipe_of
from diptych.replication.studies import milr as study
from diptych.replication.study import Context
from diptych.systems.base import Sampling
from diptych.systems.table import find
from diptych.world.tasks import document

SAMPLING = Sampling(text=TextSampling(max_tokens=8), codes=TokenSampling(temperature=0.9, top_k=48),
                    guidance=Guidance(branches=(Branch(context="no_text", scale=3.0),)))
FAMILIES = ("janus", "emu3")
families = pytest.mark.parametrize("name", FAMILIES)


@cache
def lively(name: str) -> Any:
    torch.manual_seed(0)
    cls: Any = find(name)
    return filled(cls(cls.tiny())).eval()


class Says(Reward):
    """Values in order, then the last one again; None: it cannot tell."""

    FACTS = Facts(name="says", about="what the test says", low=0.0, high=2.0)

    def __init__(self, *said: float | None) -> None:
        self.said = list(said)

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        out = []
        for _ in made:
            value = self.said.pop(0) if len(self.said) > 1 else self.said[0]
            out.append(Failure("cannot tell") if value is None else Rating(value))
        return out


def pixels(made: Document) -> np.ndarray:
    return made.of(Image)[-1].pixels


def same(a: Document, b: Document) -> bool:
    plans = zip(a.of(Boxes), b.of(Boxes), strict=True)
    return np.array_equal(pixels(a), pixels(b)) and all(
        np.array_equal(x.boxes, y.boxes) and x.labels == y.labels for x, y in plans)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Trajectory]:
    """Every document that a search fills, in order."""
    seen: list[Trajectory] = []

    def kept(*given: Any, **named: Any) -> list[Trajectory]:
        made = act(*given, **named)
        seen.extend(made)
        return made

    monkeypatch.setattr(latent_search, "act", kept)
    return seen


def of_kind(trajectory: Trajectory, kind: str) -> list[int]:
    return values([d for d in trajectory.decisions if d.kind == kind]).tolist()


# -- the update -------------------------------------------------------------------------------------------------------

def adam(z: Tensor, gradient: Tensor, moments: list[Tensor], step: int, rate: float) -> Tensor:
    moments[0] = 0.9 * moments[0] + 0.1 * gradient
    moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
    first, second = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
    return z - rate * first / (second.sqrt() + 1e-8)


def test_three_steps_on_words_by_hand() -> None:
    """The gradient of -r log p[a] on z is -r W^T (e_a - p)."""
    generator = torch.Generator().manual_seed(3)
    weight, z = (torch.randn(*shape, generator=generator) for shape in ((11, 6), (4, 6)))
    head = nn.Linear(6, 11, bias=False)
    head.weight.data.copy_(weight)
    latent = Latent(z[:, None], lambda s: head(s[:, 0]).log_softmax(-1), 0.03)
    want, moments, paths = z.double(), [torch.zeros(4, 6).double()] * 2, []
    for step, reward in enumerate((-1.0, -0.5, -0.8), 1):
        latent.step(reward)
        p = (want @ weight.double().T).softmax(-1)
        chosen = p.argmax(-1)
        paths.append(chosen.tolist())
        gradient = -reward * (nn.functional.one_hot(chosen, 11) - p) @ weight.double()
        want = adam(want, gradient, moments, step, 0.03)
        torch.testing.assert_close(latent.states[:, 0].double(), want, atol=1e-5, rtol=0)
        assert latent.tokens().tolist() == (want @ weight.double().T).argmax(-1).tolist()
    assert head.weight.grad is None
    before = (z @ weight.T).log_softmax(-1).gather(1, torch.tensor(paths[0])[:, None])
    after = (latent.states[:, 0] @ weight.T).log_softmax(-1).gather(1, torch.tensor(paths[0])[:, None])
    assert bool((after < before).all()), "what a wrong picture began with becomes less likely"


@families
def test_three_steps_on_codes_of_two_fused_rows(name: str) -> None:
    """p = softmax((u + w (c - u)) / temperature), cut to the 48 most likely; the gradient reaches both rows."""
    system, count, width = lively(name), 64, 64
    z = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(5))
    latent = Latent(z, code_scores(system, SAMPLING, count), 0.05)
    want, moments = z.clone(), [torch.zeros_like(z)] * 2
    for step, reward in enumerate((-1.0, -0.25, -1.0), 1):
        taken = None if step < 3 else torch.tensor([5, 6])
        if taken is not None:  # what was drawn has a probability
            taken = system.code_logits(want[:2, 0]).argmax(-1)
        latent.step(reward, taken)
        x = want.clone().requires_grad_()
        full, none = system.code_logits(x[:, 0]), system.code_logits(x[:, 1])
        fused = (none + 3.0 * (full - none)) / 0.9
        least = fused.topk(48, -1).values[:, -1:]
        p = fused.masked_fill(fused < least, -torch.inf).softmax(-1)
        chosen = p.argmax(-1) if taken is None else taken
        loss = -reward * torch.stack([torch.log(p[m, k] + 1e-10) for m, k in enumerate(chosen)]).sum()
        gradient = torch.autograd.grad(loss, x)[0]
        assert bool((gradient[: len(chosen)].flatten(1).norm(dim=1) > 0).all()), "both rows"
        want = adam(want, gradient, moments, step, 0.05)
        torch.testing.assert_close(latent.states.detach(), want, atol=1e-5, rtol=0)
    uniforms = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    with torch.no_grad():
        mass = latent.scores(latent.states).double().exp().cumsum(-1)
    drawn = [int((row > u).nonzero()[0]) for row, u in zip(mass, uniforms, strict=True)]
    assert latent.tokens(uniforms).tolist() == drawn
    assert all(p.grad is None for p in system.parameters())


def test_a_right_answer_changes_nothing_and_noise_keeps_the_length() -> None:
    head = nn.Linear(6, 11)
    z = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(1))

    def moved(reward: float, noise: torch.Generator | None = None) -> Tensor:
        latent = Latent(z, lambda s: head(s[:, 0]).log_softmax(-1), 0.03)
        latent.step(reward, noise=noise)
        return (latent.states - z).detach()

    assert not bool(moved(0.0).any())
    straight, astray = moved(-1.0), moved(-1.0, torch.Generator().manual_seed(2))
    assert float(astray.norm()) == pytest.approx(float(straight.norm()), rel=1e-5)
    assert abs(float((astray * straight).sum() / straight.square().sum())) < 0.9


# -- hidden states ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*FAMILIES, "seed", "mammothmoda2"])
def test_states_are_those_that_decisions_were_made_of(name: str) -> None:
    """With and without compiled decoding, text and codes: heads on the states give the log-probs of the decisions."""
    system, asked = lively(name), [document("plan", i) for i in (1, 2)]
    sampling = dataclasses.replace(SAMPLING, evaluations=2)
    with torch.enable_grad():
        slow = act.__wrapped__(system, asked, sampling, [5, 6], states=True)  # type: ignore[attr-defined]
    for made in (act(system, asked, sampling, [5, 6], states=True), slow):
        for trajectory in made:
            for kind in ("text", "code"):
                own = [d for d in trajectory.decisions if d.kind == kind]
                states = stacked(own).detach()
                scores = (word_scores(system, sampling) if kind == "text"
                          else code_scores(system, sampling, len(own)))
                with torch.no_grad():
                    again = scores(states).gather(-1, values(own)[:, None])[:, 0]
                torch.testing.assert_close(again, torch.cat([d.log_prob for d in own]).detach(), atol=2e-3, rtol=1e-3)
    assert all(d.states is None for d in act(system, asked[:1], sampling, [5])[0].decisions), "only if asked"


def test_a_tape_that_only_begins() -> None:
    tape = Tape(first={"code": [7, 8]})
    with taping(tape):
        made = [decide(kind, lambda: 1, lambda v: torch.zeros(1)) for kind in ("text", "code", "code", "code")]
    assert made == [1, 7, 8, 1] and tape.drawn == 2
    with pytest.raises(ValueError, match="got both"):
        Tape([], first={"code": [1]})


# -- searching --------------------------------------------------------------------------------------------------------

@families
@pytest.mark.parametrize("settings", [Settings(steps=0), Settings(text_share=0.0, picture_share=0.0),
                                      Settings(mode="again", threshold=-1.0)])
def test_what_moves_nothing_is_what_the_system_draws(name: str, settings: Settings) -> None:
    system, asked = lively(name), [document("plan", 1), document("plan", 2)]
    wanted = system.generate(asked, SAMPLING, seeds=[5, 6])
    found = search(system, asked, Says(0.5), settings, sampling=SAMPLING, seeds=[5, 6])
    for f, made in zip(found, wanted, strict=True):
        assert same(f.made, made) and same(f.last, made)
        assert f.budget.pictures == 1 and f.budget.given == 0 and f.budget.floats == 0
    assert found[0].rewards == (-0.75,)


def test_alone_as_in_company() -> None:
    system, asked = lively("janus"), [document("plan", 1), document("plan", 2)]
    settings = Settings(steps=2, text_share=0.5, picture_share=0.1, rate=0.5)
    both = search(system, asked, Says(0.0), settings, sampling=SAMPLING, seeds=[5, 6])
    [alone] = search(system, asked[1:], Says(0.0), settings, sampling=SAMPLING, seeds=[6])
    np.testing.assert_allclose(pixels(both[1].last), pixels(alone.last), atol=1e-4)  # developed in batches
    assert both[1].budget == alone.budget and both[1].last.of(Boxes)[0].labels == alone.last.of(Boxes)[0].labels
    assert alone.budget.pictures == 3 and alone.tries is None


@pytest.mark.parametrize("name", [*FAMILIES, "seed"])
def test_beginnings_come_from_the_states_and_the_rest_is_drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system, seen = lively(name), watched(monkeypatch)
    settings = Settings(steps=2, text_share=0.5, picture_share=0.125, rate=1.0)
    sampling = dataclasses.replace(SAMPLING, evaluations=2)
    [found] = search(system, [document("plan", 3)], Says(0.0), settings, sampling=sampling, seeds=4)
    words, codes = len(of_kind(seen[0], "text")) // 2, len(of_kind(seen[0], "code")) // 8
    width = system.embed.weight.shape[1]
    assert of_kind(seen[1], "text")[:words] != of_kind(seen[0], "text")[:words], "long steps say something else"
    budget = found.budget
    assert budget.pictures == 3 and budget.given == 2 * (words + codes) and budget.floats == (words + 2 * codes) * width
    assert budget.drawn == sum(len(t.decisions) for t in seen) - budget.given
    latent = Latent(stacked([d for d in seen[0].decisions if d.kind == "text"][:words]),
                    word_scores(system, sampling), 1.0)
    for trajectory in seen[1:]:
        latent.step(-1.0)
        told = latent.tokens().tolist()
        said = of_kind(trajectory, "text")
        assert said[: len(told)] == told[: len(said)]


@pytest.mark.parametrize("name", ["bagel", "show-o"])
def test_words_move_however_the_picture_is_drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system, seen = lively(name), watched(monkeypatch)
    settings = Settings(mode="text", steps=2, text_share=0.5, rate=1.0)
    sampling = dataclasses.replace(SAMPLING, evaluations=2)
    [found] = search(system, [document("plan", 3)], Says(0.0), settings, sampling=sampling, seeds=4)
    words = len(of_kind(seen[0], "text")) // 2
    assert found.budget.pictures == 3 and found.budget.given == 2 * words
    assert of_kind(seen[1], "text")[:words] != of_kind(seen[0], "text")[:words]
    assert not np.allclose(pixels(found.last), seen[0].made.of(Image)[-1].pixels), "drawn anew"


def test_modes_move_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    system, asked = lively("janus"), document("plan", 3)
    kinds = {"text": 4 * ["text"], "image": 4 * ["code"], "both": 4 * ["both"],
             "text_image": ["text", "text", "code", "code"], "image_text": ["code", "code", "text", "text"],
             "interleaved": ["text", "code", "text", "code"], "again": 4 * [""], "plans": 4 * [""]}
    for mode, order in kinds.items():
        settings = Settings(mode=mode, steps=4, text_share=0.4, picture_share=0.1, rate=0.2)  # type: ignore[arg-type]
        assert [("both" if len(m) == 2 else "".join(m)) for m in map(settings.moved, range(4))] == order
    moves: list[str] = []
    plain = latent_search._Hunt.move
    monkeypatch.setattr(latent_search._Hunt, "move", lambda self, kind, step: (moves.append(kind),
                                                                               plain(self, kind, step))[1])
    seen = watched(monkeypatch)
    settings = Settings(mode="text_image", steps=2, text_share=0.5, picture_share=0.125, rate=1.0)
    search(system, [asked], Says(0.0), settings, sampling=SAMPLING)
    assert moves == ["text", "code"]
    assert of_kind(seen[2], "text") == of_kind(seen[1], "text"), "what is not moved is said again"
    assert of_kind(seen[1], "code") != of_kind(seen[0], "code"), "and drawn anew"
    assert seen[1].drawn < len(seen[1].decisions) and seen[2].drawn == 64 - 8


def test_controls_draw_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    system, asked = lively("emu3"), [document("plan", 3)]
    seen = watched(monkeypatch)
    search(system, asked, Says(0.0), Settings(mode="again", steps=2), sampling=SAMPLING)
    assert all(of_kind(t, "text") == of_kind(seen[0], "text") for t in seen), "greedy plans stay"
    assert len({tuple(of_kind(t, "code")) for t in seen}) == 3
    del seen[:]
    search(system, asked, Says(0.0), Settings(mode="plans", steps=2, heat=5.0), sampling=SAMPLING)
    assert len({tuple(of_kind(t, "text")) for t in seen}) == 3
    del seen[:]
    search(system, asked, Says(0.0), Settings(mode="both", steps=1, rate=1.0, text_share=0.5, direction="random"),
           sampling=SAMPLING)
    assert len(seen) == 2 and seen[1].drawn < len(seen[1].decisions)


def test_it_stops_keeps_the_best_and_goes_on_where_nothing_is_known() -> None:
    system, asked = lively("janus"), [document("draw", 3)]
    settings = Settings(mode="image", picture_share=0.1, steps=5)
    [found] = search(system, asked, Says(1.0, None, 1.6, 1.2, 1.9, 0.0), settings, sampling=SAMPLING)
    assert found.tries == 5 and found.budget.pictures == 5
    assert found.rewards[0] == -0.5 and np.isnan(found.rewards[1])
    assert found.rewards[2:] == pytest.approx((-0.2, -0.4, -0.05)) and same(found.made, found.last)
    [found] = search(system, asked, Says(1.0, 1.6, 1.2, 0.4), dataclasses.replace(settings, steps=3),
                     sampling=SAMPLING)
    assert found.tries is None and found.rewards.index(max(found.rewards)) == 1 and not same(found.made, found.last)


def test_a_sign_below_means_better() -> None:
    class Costs(Says):
        FACTS = dataclasses.replace(Says.FACTS, name="costs", sign=-1)

    [found] = search(lively("janus"), [document("draw", 3)], Costs(0.0), Settings(mode="image"), sampling=SAMPLING)
    assert found.rewards == (0.0,) and found.tries == 1


def test_the_metric_is_not_the_reward() -> None:
    asked = [document("draw", 3)]
    found: list[Found] = search(lively("janus"), asked, make("scene"), Settings(mode="again", steps=1),
                                sampling=SAMPLING)
    assert measure(found, make("exact"))[0].value in (0.0, 1.0)
    assert len(measure(found, make("colors"), last=True)) == 1
    with pytest.raises(ValueError, match="metric that is not the reward"):
        measure(found, make("scene", gated=False))


@pytest.mark.parametrize(("name", "asked", "settings", "message"), [
    ("bagel", "draw", Settings(mode="image"), "code by code"),
    ("unifork", "draw", Settings(mode="image"), "one code for each cell"),
    ("show-o", "draw", Settings(mode="image"), "code by code"),
    ("janus", "draw", Settings(), 'mode="image"'),
    ("janus", "question", Settings(mode="text"), "one picture to draw"),
])
def test_what_cannot_be_searched_is_refused(name: str, asked: str, settings: Settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(lively(name), [document(asked, 1)], Says(0.0), settings, sampling=SAMPLING)


def test_mistakes_in_settings_are_named() -> None:
    with pytest.raises(ValueError, match="expected mode out of"):
        Settings(mode="texts")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold in"):
        Settings(threshold=0.5)
    assert Settings.paper().text_share == 0.2 and Settings.released("image").steps == 30
    texts = Document((Text(text="x"), Text(target=True), Boxes(target=True), Image(target=True)))
    with pytest.raises(ValueError, match="at most one text"):
        search(lively("janus"), [texts], Says(0.0))


# -- the study --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["janus", "bagel"])
def test_the_study_compares_searches_of_one_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "PROMPTS", 1)
    monkeypatch.setattr(study, "PLAN", 6)
    recipe = recipe_of(study.STUDY, study.STUDY.arm(name), 0)
    context = Context(arm=study.STUDY.arm(name), recipe=recipe, seed=0, folder=Path(), quick=True)
    found: Any = study.measure_searches(lively(name), context)
    claims = [c for c in study.STUDY.claims if c.treatment == name]
    assert {c.control for c in claims} == {name} and all({c.metric, c.against} <= set(found) for c in claims)
    for judge, names in (("oracle", study.SEARCHES[name]), ("self", study.BY_ITSELF)):
        drawn = {found[f"{judge}: {search}, pictures"] for search in names if search != "one picture"}
        assert drawn == {3.0} and found[f"{judge}: one picture, pictures"] == 1.0, "nothing is right: all draw as many"
    assert found["oracle: MILR, numbers moved"] == found["oracle: random steps, numbers moved"] > 0
