"""Losses of policies: what an on-policy step is, where gradients end, what reductions divide by, distances, values."""
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from diptych.alignment import surrogate as s
from diptych.objectives import flow
from diptych.objectives.next_token import TokenSampling

CLIP = s.Clip(low=0.2, high=0.3)


def gradient(ratio: list[float], advantage: list[float], clip: s.Clip = CLIP) -> list[float]:
    old = torch.zeros(len(ratio))
    new = torch.tensor(ratio).log().requires_grad_()
    s.surrogate(new, old, torch.tensor(advantage), clip).sum().backward()
    assert new.grad is not None
    return new.grad.tolist()


# -- the surrogate ----------------------------------------------------------------------------------------------------

def test_on_policy_the_loss_is_minus_the_advantage_and_its_gradient_that_of_the_log_prob() -> None:
    a, log_prob = torch.randn(5, 3), torch.randn(5, 3, requires_grad=True)
    loss = s.surrogate(log_prob, log_prob, a, CLIP)
    torch.testing.assert_close(loss, -a)
    loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, -a)
    seen = s.metrics(log_prob, log_prob, a, CLIP)
    assert seen["ratio"] == 1 and all(seen[k] == 0 for k in ("above", "below", "clipped", "dual", "kl_k1", "kl_k2"))


def test_beyond_the_bounds_nothing_pushes_further_but_everything_pulls_back() -> None:
    assert gradient([1.4, 0.7], [1.0, -1.0]) == [0, 0]  # good and likelier, bad and rarer: enough
    assert gradient([1.4, 0.7], [-1.0, 1.0]) == pytest.approx([1.4, -0.7])
    assert gradient([1.25, 0.85], [1.0, -1.0]) == pytest.approx([-1.25, 0.85])
    assert gradient([1.25], [1.0], s.Clip(low=0.2, high=0.2)) == [0]  # the sides are apart


def test_dual_clip_bounds_the_loss_of_bad_decisions_only() -> None:
    clip = s.Clip(low=0.2, high=0.2, dual=3.0)
    new, a = torch.tensor([5.0, 2.0, 5.0]).log(), torch.tensor([-1.0, -1.0, 1.0])
    assert s.surrogate(new, torch.zeros(3), a, clip).tolist() == pytest.approx([3.0, 2.0, -1.2])
    assert gradient([5.0, 2.0], [-1.0, -1.0], clip) == pytest.approx([0, 2.0])
    seen = s.metrics(new, torch.zeros(3), a, clip)
    assert float(seen["dual"]) == pytest.approx(1 / 3) and seen["above"] == 1
    with pytest.raises(ValueError, match="dual > 1"):
        s.Clip(dual=1.0)


def test_a_clamped_log_ratio_has_no_gradient_outside() -> None:
    clip = s.Clip(low=10, high=10, log_ratio=(-0.3, 0.4))
    assert gradient([2.0, 0.5, 1.1], [1.0, 1.0, 1.0], clip) == pytest.approx([0, 0, -1.1])


def test_what_is_masked_may_hold_anything() -> None:
    new = torch.tensor([[0.1, float("-inf")], [0.2, 0.3]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    loss = s.reduce(s.surrogate(new, torch.zeros(2, 2), torch.ones(2, 1), CLIP, mask), mask, "token")
    loss.backward()
    assert loss.isfinite() and new.grad is not None and new.grad.isfinite().all() and new.grad[0, 1] == 0


def test_metrics_tell_the_sides_apart() -> None:
    new, a = torch.tensor([1.5, 1.5, 0.5, 1.0]).log(), torch.tensor([1.0, -1.0, -1.0, 1.0])
    seen = {k: float(v) for k, v in s.metrics(new, torch.zeros(4), a, CLIP).items()}
    assert (seen["above"], seen["below"], seen["clipped"]) == (0.5, 0.25, 0.5)
    assert seen["kl_k2"] == pytest.approx(float(new.square().mean() / 2))
    assert seen["ratio_gap"] == pytest.approx(0.375)


# -- reductions -------------------------------------------------------------------------------------------------------

def test_reductions_divide_by_what_they_say() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = [float(s.reduce(x, mask, r)) for r in ("token", "sequence", "sequence_sum", "all")]
    assert found == pytest.approx([10 / 4, (2 + 4) / 2, (6 + 4) / 2, 10 / 6])
    empty = torch.cat((mask, torch.zeros(1, 3).bool()))  # a row of which nothing counts has no mean
    assert float(s.reduce(torch.cat((x, x[:1])), empty, "sequence")) == pytest.approx(3.0)
    wide = s.reduce(x[..., None].expand(2, 3, 4), mask[..., None], "token")
    assert float(wide) == pytest.approx(2.5)
    with pytest.raises(ValueError, match="expected reduction token"):
        s.reduce(x, None, "mean")  # type: ignore[arg-type]


def test_length_weights_make_trajectories_equal() -> None:
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    weights = s.length_weights(mask.sum(1, keepdim=True), 4)
    assert float(s.reduce(torch.ones(2, 4), mask, "all", weights)) == 1
    parts = [float(s.reduce(torch.ones(2, 4) * row, mask, "all", weights)) for row in torch.eye(2)[..., None]]
    assert parts == [0.5, 0.5]


# -- old rollouts -----------------------------------------------------------------------------------------------------

def test_the_proximal_policy_lies_one_update_back() -> None:
    old, new = torch.zeros(4), torch.full((4,), 1.0, requires_grad=True)
    versions = torch.tensor([3.0, 2.0, 0.0, -1.0])
    own = s.proximal_log_prob(new, old, versions, current=4)
    assert own.tolist() == pytest.approx([0, 0.5, 0.75, 0]) and not own.requires_grad
    weights, counted = s.behaviour_weights(own, old, threshold=1.8)
    torch.testing.assert_close(weights, own.exp())
    assert counted.tolist() == [True, True, False, True]


# -- distances --------------------------------------------------------------------------------------------------------

def test_estimators_agree_with_the_distance_they_estimate() -> None:
    p, q = Normal(0.0, 1.0), Normal(0.2, 1.1)
    torch.manual_seed(0)
    x = p.sample((200_000,))
    exact = float(kl_divergence(p, q))
    found = {k: s.kl(p.log_prob(x), q.log_prob(x), k) for k in ("k1", "k2", "k3")}
    assert (found["k3"] >= 0).all() and (found["k2"] >= 0).all() and (found["k1"] < 0).any()
    assert float(found["k1"].mean()) == pytest.approx(exact, abs=2e-3)
    assert float(found["k3"].mean()) == pytest.approx(exact, rel=0.02)
    assert float(found["k2"].mean()) == pytest.approx(exact, rel=0.25)  # biased
    assert found["k3"].std() < found["k1"].std()
    assert float(s.kl(torch.tensor(0.2), torch.tensor(0.0), "k3")) == pytest.approx(0.0187308, abs=1e-7)  # published


def test_the_clamp_ends_the_gradient() -> None:
    new = torch.tensor([0.0, 0.0], requires_grad=True)
    own = s.kl(new, torch.tensor([20.0, 1.0]), "k3", clamp=10)
    own.sum().backward()
    assert float(own.detach()[0]) == pytest.approx(math.exp(10) - 11, rel=1e-6)
    assert new.grad is not None and new.grad[0] == 0 and new.grad[1] != 0


def test_the_kl_of_flow_steps_in_both_forms() -> None:
    """The published example: a gap of 0.05 between means at sigma 0.9."""
    x, v = torch.full((1, 1, 1), 0.3), torch.full((1, 1, 1), 0.8)
    step = flow.sde_step(x, v, 0.1, 0.2, 0.7, first=0.1)
    other = flow.Transition(step.mean + 0.05, step.std)
    assert float(s.flow_kl(step, other, 0.1)) == pytest.approx(2.834e-3, abs=1e-6)
    assert float(s.flow_kl(step, other, 0.1, "released")) == pytest.approx(2.834e-4, abs=1e-7)
    exact = kl_divergence(Normal(step.mean, step.std), Normal(other.mean, step.std))
    torch.testing.assert_close(step.kl(other), exact.mean((1, 2)))


def test_entropies_and_log_probs_of_what_was_drawn() -> None:
    logits = torch.randn(3, 4, 11)
    torch.testing.assert_close(s.entropy(logits), Categorical(logits=logits).entropy())
    cut = logits.clone()
    cut[..., 5:] = float("-inf")
    torch.testing.assert_close(s.entropy(cut), Categorical(logits=logits[..., :5]).entropy())
    ids = logits.argmax(-1)
    torch.testing.assert_close(s.token_log_probs(logits, ids), Categorical(logits=logits).log_prob(ids))
    sampling = TokenSampling(temperature=1.6, top_k=3)
    kept = s.token_log_probs(logits, ids, sampling)
    top = (logits / 1.6).topk(3, -1).values
    torch.testing.assert_close(kept, top[..., 0] - top.logsumexp(-1))


def test_values_move_by_no_more_than_the_clip() -> None:
    old, target = torch.zeros(3), torch.tensor([1.0, 1.0, 30.0])
    values = torch.tensor([0.1, 0.9, 0.1], requires_grad=True)
    loss = s.value_loss(values, old, target, delta=10.0, clip=0.2)
    assert loss.tolist() == pytest.approx([0.5 * 0.9**2, 0.5 * 0.8**2, 10 * (29.9 - 5)])
    loss.sum().backward()
    assert values.grad is not None and values.grad.tolist() == pytest.approx([-0.9, 0, -10])


def test_everything_is_float32_under_bfloat16() -> None:
    half: Tensor = torch.randn(4, dtype=torch.bfloat16)
    assert s.surrogate(half, half, torch.ones(4), CLIP).dtype == torch.float32
    assert s.kl(half, half, "k3").dtype == s.entropy(half[None]).dtype == torch.float32
    assert s.value_loss(half, half, half, delta=1.0, clip=0.2).dtype == torch.float32
