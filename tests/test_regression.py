"""Embedding prediction: the loss and its gradients, prefilled places, what squared error can and cannot say."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

from diptych.objectives import regression
from diptych.objectives.regression import Prediction, Weights


def test_the_loss_is_the_weighted_sum_of_both_terms() -> None:
    own, wanted = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    error = regression.losses(own, wanted, Weights(squared=0.5, cosine=2.0))
    assert error.shape == (2, 5) and error.dtype == torch.float32
    torch.testing.assert_close(error, 0.5 * F.mse_loss(own, wanted, reduction="none").mean(-1)
                               + 2 * (1 - (F.normalize(own, dim=-1) * F.normalize(wanted, dim=-1)).sum(-1)))
    assert not regression.losses(wanted, wanted).any()
    half = regression.losses(own.bfloat16(), wanted)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, regression.losses(own.bfloat16().float(), wanted))


def test_length_matters_to_squared_error_and_not_to_cosine() -> None:
    target = torch.randn(4, 6)
    torch.testing.assert_close(regression.losses(3 * target, target, Weights(squared=0.0, cosine=1.0)), torch.zeros(4))
    torch.testing.assert_close(regression.losses(3 * target, target), 4 * target.square().mean(-1))


def test_targets_get_no_gradient() -> None:
    own, target = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    regression.losses(own, target, Weights(cosine=1.0)).sum().backward()
    assert own.grad is not None and own.grad.any() and target.grad is None


def test_places_are_filled_with_queries() -> None:
    queries = torch.arange(6.0).view(3, 2)
    assert torch.equal(regression.prefill(queries, 3), queries)
    assert torch.equal(regression.prefill(queries, 5), queries[[0, 1, 2, 0, 1]])
    assert torch.equal(regression.prefill(queries[:1], 4), queries[:1].expand(4, 2))


def test_sampling_asks_once_and_draws_nothing_unless_told() -> None:
    calls: list[torch.Tensor] = []
    matrix, queries = torch.randn(2, 5), torch.randn(4, 2)

    def predict(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x @ matrix

    one, two = (regression.sample(predict, queries, 4, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert len(calls) == 2 and torch.equal(one, two) and torch.equal(one, queries @ matrix)
    noisy = [regression.sample(predict, queries, 4, torch.Generator().manual_seed(s), std=0.5) for s in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])


def test_log_probs_are_those_of_the_gaussian() -> None:
    mean, x = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(Prediction(mean, 0.3).log_prob(x), Normal(mean, 0.3).log_prob(x).sum(-1))
    drawn = Prediction(torch.zeros(2000, 4), 0.3).sample(torch.Generator().manual_seed(0))
    assert drawn.std().item() == pytest.approx(0.3, rel=0.05)
    entropy = 4 * (0.5 + 0.5 * math.log(2 * math.pi) + math.log(0.3))
    assert Prediction(torch.zeros(2000, 4), 0.3).log_prob(drawn).mean().item() == pytest.approx(-entropy, abs=0.1)


def test_squared_error_draws_the_mean_of_what_fits() -> None:
    """Two pictures for one text: the prediction ends between them, at an error of their spread."""
    targets, query = torch.tensor([[1.0, 0.0], [-1.0, 2.0]]), torch.zeros(1, 2, requires_grad=True)
    optimizer = torch.optim.SGD([query], lr=0.5)
    for _ in range(50):
        loss = regression.losses(regression.prefill(query, 2), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(query.detach()[0], targets.mean(0), atol=1e-4, rtol=0)
    assert loss.item() == pytest.approx(1.0, abs=1e-4)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"target's shape \(2, 3\), got \(2, 4\)"):
        regression.losses(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="not both 0"):
        Weights(squared=0.0)
    with pytest.raises(ValueError, match="at least 1 embedding"):
        regression.prefill(torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match="std > 0"):
        Prediction(torch.zeros(2)).log_prob(torch.zeros(2))
