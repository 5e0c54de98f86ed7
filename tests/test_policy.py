"""Every system as a policy: decisions are kept, taken again with the same log-probs, and have the right gradients."""
import dataclasses
from typing import Any

import pytest
import torch
from filling import filled

from diptych.alignment.policy import Trajectory, act, compare, recall
from diptych.document import Document, Image, Text
from diptych.objectives.decisions import KINDS
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.systems.base import Sampling
from diptych.systems.table import TABLE, find
from diptych.world.tasks import document

SAMPLING = Sampling(evaluations=4, stochastic=0.7, text=TextSampling(max_tokens=5, temperature=1.0, top_k=50),
                    codes=TokenSampling(temperature=0.9, top_p=0.95),
                    guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),)))
# How each system draws.
DRAWS = {"bagel": "flow", "hbridge": "flow", "latte-flow": "flow", "blip3-o": "flow", "metaquery": "flow",
         "unipic2": "flow", "mammothmoda2": "code", "janus": "code", "emu3": "code", "seed": "code", "unifork": "code",
         "show-o": "masked code", "mmada": "masked code", "fudoki": "posterior code", "vargpt": "scale",
         "tokenflow": "scale", "harmon": "diffusion"}
SAYS = {"mmada": "masked text", "fudoki": "posterior text"}
speakers = pytest.mark.parametrize("name", list(TABLE))


def lively(name: str) -> Any:
    torch.manual_seed(0)
    system: Any = filled(find(name)(find(name).tiny())).eval()
    if name == "harmon":  # variances far off their two bounds make densities that no float holds
        with torch.no_grad():
            for p in system.denoiser.output.parameters():
                p *= 0.05
    return system


def numbers(decisions: Any) -> torch.Tensor:
    return torch.cat([d.log_prob for d in decisions])


def test_the_table_is_covered() -> None:
    assert set(DRAWS) == set(TABLE) and {*DRAWS.values(), *SAYS.values(), "text"} == set(KINDS)


@pytest.mark.parametrize("name", DRAWS)
def test_what_was_drawn_is_as_likely_when_taken_again(name: str) -> None:
    system, asked = lively(name), [document("draw", 1), document("draw", 2)]
    usual = system.generate(asked, SAMPLING, seeds=[5, 6])
    taken = act(system, asked, SAMPLING, [5, 6])
    for a, b in zip(usual, taken, strict=True):
        assert torch.equal(torch.from_numpy(a.of(Image)[-1].pixels), torch.from_numpy(b.made.of(Image)[-1].pixels))
    assert DRAWS[name] in taken[0].kinds and bool((taken[0].log_probs < 10).all())
    again = recall(system, taken, SAMPLING)
    gaps = compare(taken, again, 1e-3)
    assert set(gaps) == set(taken[0].kinds)
    sum(numbers(d).sum() for d in again).backward()
    moved = [p for p in system.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    assert len(moved) > 5 and all(bool(torch.isfinite(p.grad).all()) for p in moved)


@speakers
def test_what_was_said_is_as_likely_when_taken_again(name: str) -> None:
    system, asked = lively(name), [document("caption", 1), document("question", 2)]
    taken = act(system, asked, SAMPLING, [5, 6])
    assert set(taken[0].kinds) == {SAYS.get(name, "text")}
    compare(taken, recall(system, taken, SAMPLING), 1e-3)
    alone = act(system, asked[1:], SAMPLING, [6])
    torch.testing.assert_close(alone[0].log_probs, taken[1].log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["janus", "bagel", "show-o", "fudoki", "harmon", "vargpt"])
def test_gradients_are_those_of_the_log_probs(name: str) -> None:
    """Against central differences in float64 along a random direction."""
    system = lively(name).double()
    # no cuts: what lies on an edge falls off it when the weights move
    sampling = dataclasses.replace(SAMPLING, guidance=Guidance(), codes=TokenSampling(temperature=0.9))
    taken = act(system, [document("draw", 3)], sampling, [1])
    weights = torch.randn(len(taken[0].log_probs), generator=torch.Generator().manual_seed(1))

    def value() -> torch.Tensor:
        return (numbers(recall(system, taken, sampling)[0]) * weights).sum()

    trained = [p for n, p in system.named_parameters() if "trunk" in n and p.requires_grad]
    value().backward()
    ways = [torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype) for p in trained]
    slope = sum(float((p.grad * w).sum()) for p, w in zip(trained, ways, strict=True) if p.grad is not None)
    step, found = 1e-3, []  # log-probs are float32
    with torch.no_grad():
        for sign in (1, -1):
            for p, w in zip(trained, ways, strict=True):
                p += sign * step * w
            found.append(float(value()))
            for p, w in zip(trained, ways, strict=True):
                p -= sign * step * w
    assert slope == pytest.approx((found[0] - found[1]) / (2 * step), rel=0.02, abs=1e-3) and abs(slope) > 1e-3


def test_other_weights_give_other_log_probs_of_the_same_decisions() -> None:
    system = lively("janus")
    taken = act(system, [document("draw", 1)], SAMPLING, [0])
    with torch.no_grad():
        for p in system.trunk.parameters():
            p.mul_(1.05)
    again = recall(system, taken, SAMPLING)
    assert [d.value for d in again[0]] == [d.value for d in taken[0].decisions]
    with pytest.raises(ArithmeticError, match="code decisions within"):
        compare(taken, again)


def test_what_cannot_be_learnt_from_is_refused() -> None:
    plain = dataclasses.replace(SAMPLING, stochastic=0.0)
    with pytest.raises(ValueError, match=r"stochastic > 0"):
        act(lively("bagel"), [document("draw", 1)], plain, [0])
    system = lively("janus")
    taken = act(system, [document("draw", 1)], SAMPLING, [0])
    longer = Trajectory(Document((Text(text="x"), Text(target=True))), taken[0].made, 0, taken[0].decisions)
    with pytest.raises(ValueError, match="expected decision 0 to be code"):
        recall(system, [longer], SAMPLING)
    more = dataclasses.replace(taken[0], decisions=(*taken[0].decisions, taken[0].decisions[0]))
    with pytest.raises(ValueError, match="decisions again, got"):
        recall(system, [more], SAMPLING)
