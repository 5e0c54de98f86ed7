"""Discrete flow: paths, kinetic-optimal rates, the Euler step, chunks over the vocabulary, log-probs, calibration."""
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.objectives import discrete_flow
from diptych.objectives.discrete_flow import (
    Chance,
    Kinetic,
    MetricPath,
    MixturePath,
    Polynomial,
    calibrate,
    euler,
    log_prob,
    step,
)

CARD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])


def table(values: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(values, width, generator=torch.Generator().manual_seed(seed))


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(one: Any, two: Any, **how: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(one).double(), torch.as_tensor(two).double(), **how)


# -- the metric path --------------------------------------------------------------------------------------------------

def test_four_tokens_by_hand() -> None:
    path, x1 = MetricPath(CARD), torch.tensor([0])
    close(path.distance(x1)[0], [0, 4, 16, 0.64], atol=1e-5, rtol=0)
    for t, beta in ((0.25, 1.116123), (0.5, 3.0), (0.75, 8.063627)):
        close(path.beta(t), beta, atol=1e-5, rtol=0)
    for t, rate in ((0.25, 5.357391), (0.5, 10.8), (0.75, 38.705405)):
        close(path.beta_rate(t), rate, atol=1e-4, rtol=0)
    close(path.probs(x1, 0.5)[0], [0.8721338, 5.3586e-6, 1.24e-21, 0.1278609], atol=1e-6, rtol=0)
    far = path.jumps(torch.tensor([2]), x1, 0.5)
    close(far.rates()[0], [150.7047, 6.9447e-4, 0, 21.21059], atol=1e-3, rtol=1e-4)
    close(far.intensity[0], 171.9160, atol=1e-3, rtol=0)
    close(-torch.expm1(-far.intensity[0] / 32), 0.995357, atol=1e-5, rtol=0)
    near = path.jumps(torch.tensor([3]), x1, 0.5)
    close(near.rates()[0], [6.028189, 0, 0, 0], atol=1e-4, rtol=0)
    close(-torch.expm1(-near.intensity[0] / 32), 0.171701, atol=1e-5, rtol=0)


@settings(max_examples=25)
@given(st.integers(2, 12), st.floats(0.05, 0.9), st.floats(0.3, 6.0), st.floats(0.4, 1.5), st.integers(0, 99))
def test_the_rates_carry_the_path(values: int, t: float, c: float, a: float, seed: int) -> None:
    """dp(x) = sum_z p(z) u(x, z) - p(x) u(z, x), the left side by central differences."""
    path, x1 = MetricPath(table(values, seed=seed), c, a), torch.tensor([seed % values])
    every = torch.arange(values)
    rates = path.jumps(every, x1.expand(values), t).rates().double()  # (z, x)
    p = path.probs(x1, t)[0].double()
    inflow = p @ rates - p * rates.sum(-1)

    def exact(time: float) -> Tensor:
        return (-path.beta(time) * path.distance(x1)[0].double()).softmax(-1)

    h = 1e-5
    change = (exact(t + h) - exact(t - h)) / (2 * h)
    close(inflow, change, atol=2e-4 * float(1 + change.abs().max()), rtol=0)


def test_rates_only_lead_nearer_and_stop_at_the_end() -> None:
    path, x1, x = MetricPath(table(40)), torch.full((40,), 7), torch.arange(40)
    rates, d = path.jumps(x, x1, 0.4).rates(), path.distance(torch.tensor([7]))[0]
    nearer = d[None] < d[:, None]
    assert torch.equal(rates > 0, nearer & (rates > 0)) and (rates.sum(-1) > 0)[x != 7].all()
    assert not rates[7].any()
    assert not path.jumps(x, x1, 0.0).rates().any()  # nothing moves before there is a direction


def test_the_ends_of_time() -> None:
    path = MetricPath(table(30), 3.0)
    x1 = torch.arange(30)
    close(path.probs(x1, 0.0), torch.full((30, 30), 1 / 30), atol=1e-6, rtol=0)
    assert torch.equal(path.probs(x1, 1.0), torch.eye(30))
    assert torch.equal(path.corrupt(x1, 1.0, uniforms(30)), x1)
    assert torch.isfinite(path.beta_rate(1.0)) and torch.isfinite(path.beta_rate(0.0))


@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
def test_chunks_do_not_matter(chunk: int) -> None:
    rows = table(33)
    whole, parts = MetricPath(rows), MetricPath(rows, chunk=chunk)
    x1 = torch.randint(33, (200,), generator=torch.Generator().manual_seed(1))
    t, u = uniforms(200, seed=2), uniforms(3, 200, seed=3)
    x_t = whole.corrupt(x1, t, u[0])
    assert torch.equal(parts.corrupt(x1, t, u[0]), x_t)
    assert torch.equal(step(parts, x_t, x1, t, 0.1, u[1], u[2]), step(whole, x_t, x1, t, 0.1, u[1], u[2]))
    close(parts.jumps(x_t, x1, t).intensity, whole.jumps(x_t, x1, t).intensity, rtol=1e-5, atol=1e-6)


def test_large_vocabularies_stay_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    path, widths = MetricPath(table(500, 4), chunk=64), list[int]()
    distance = MetricPath.distance

    def watched(self: MetricPath, x: Tensor, span: slice = slice(None)) -> Tensor:
        d = distance(self, x, span)
        widths.append(d.shape[1])
        return d

    monkeypatch.setattr(MetricPath, "distance", watched)
    x1 = torch.arange(20)
    step(path, path.corrupt(x1, 0.5, uniforms(20)), x1, 0.5, 0.05, uniforms(20), uniforms(20, seed=1))
    assert widths and max(widths) <= 64


def test_draws_follow_the_probabilities() -> None:
    path, n = MetricPath(table(9), 1.0), 40_000
    x1 = torch.full((n,), 4)
    drawn = path.corrupt(x1, 0.4, uniforms(n)).bincount(minlength=9) / n
    close(drawn, path.probs(x1[:1], 0.4)[0], atol=0.01, rtol=0)
    x_t = path.distance(x1[:1])[0].argmax().expand(n)
    jumps = path.jumps(x_t, x1, 0.4)
    after = step(path, x_t, x1, 0.4, 0.05, uniforms(n, seed=1), uniforms(n, seed=2))
    moved = after != x_t
    close(moved.double().mean(), -torch.expm1(-0.05 * jumps.intensity[0]), atol=0.01, rtol=0)
    close(after[moved].bincount(minlength=9) / moved.sum(), jumps.rates()[0] / jumps.intensity[0], atol=0.02, rtol=0)


def test_a_wrong_scale_is_an_error() -> None:
    with pytest.raises(ValueError, match="c > 0 and a > 0, got c = 0"):
        MetricPath(CARD, 0.0)


@pytest.mark.parametrize(("values", "width"), [(64, 4), (256, 8), (1024, 32)])
def test_calibration_leaves_a_tenth_of_the_distance_in_the_middle(values: int, width: int) -> None:
    rows, x = table(values, width), torch.arange(values)
    c = calibrate(rows, samples=values)
    path = MetricPath(rows, c)
    d = path.distance(x)
    close((path.probs(x, 0.5) * d).sum(-1).mean() / d.mean(), 0.1, atol=0.001, rtol=0)
    assert calibrate(rows, middle=0.3, samples=values) > c > calibrate(rows, share=0.5, samples=values)


def test_calibration_is_that_of_the_paper_for_a_table_of_few_dimensions() -> None:
    assert calibrate(table(16384, 8)) == pytest.approx(3, abs=0.5)


def test_near_neighbours_do_not_move_the_calibration() -> None:
    rows = table(256, 8)
    twins = torch.stack((rows, rows + 1e-3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))), 1)
    assert calibrate(twins.flatten(0, 1), samples=512) == pytest.approx(calibrate(rows), rel=0.1)


def test_a_table_of_one_row_cannot_be_calibrated() -> None:
    with pytest.raises(ValueError, match="fix: remove repeated rows"):
        calibrate(torch.ones(10, 3))


# -- mixture paths ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", [Polynomial(), Polynomial(2.0), Kinetic(), Kinetic(0.125)])
def test_schedules_run_from_noise_to_data(schedule: Polynomial | Kinetic) -> None:
    t, h = torch.linspace(0.1, 0.9, 9, dtype=torch.float64), 1e-6
    close(schedule.value(torch.tensor([0.0, 1.0], dtype=torch.float64)), [0.0, 1.0], atol=1e-9, rtol=0)
    close(schedule.rate(t), (schedule.value(t + h) - schedule.value(t - h)) / (2 * h), atol=1e-6, rtol=0)
    if schedule == Kinetic():
        close(schedule.value(t), torch.sin(math.pi / 2 * t).square(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("free", [0.0, 1.5])
def test_mixture_rates_carry_the_path(free: float) -> None:
    path, t, values = MixturePath(values=8, schedule=Polynomial(2.0), divergence_free=free), 0.4, 8
    x1, every = torch.full((values,), 3), torch.arange(values)
    rates = path.jumps(every, x1, t).rates().double()
    p = torch.full((values,), (1 - t**2) / values, dtype=torch.float64)
    p[3] += t**2
    change = 2 * t * (torch.eye(values, dtype=torch.float64)[3] - 1 / values)
    close(p @ rates - p * rates.sum(-1), change, atol=1e-5, rtol=0)
    close(path.jumps(every, x1, t).intensity, rates.sum(-1), atol=1e-5, rtol=0)


def test_one_number_noises_and_chooses() -> None:
    path, n = MixturePath(values=5, schedule=Polynomial()), 20_000
    x = path.corrupt(torch.full((n,), 2), 0.25, uniforms(n))
    close(x.bincount(minlength=5) / n, torch.tensor([0.15, 0.15, 0.4, 0.15, 0.15]), atol=0.01, rtol=0)
    masked = MixturePath(values=5, mask=5)
    x = masked.corrupt(torch.full((n,), 2), 0.25, uniforms(n))
    close(x.bincount(minlength=6) / n, torch.tensor([0, 0, 0.25, 0, 0, 0.75]), atol=0.01, rtol=0)
    assert (masked.prior(uniforms(3)) == 5).all()


def test_velocity_and_bound_by_hand() -> None:
    path, logits = MixturePath(values=3), torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]).log()
    x_t, x1 = torch.tensor([1, 0]), torch.tensor([0, 0])
    close(path.velocity(logits, x_t, 0.5), [[1.0, -1.4, 0.4], [-1.0, 0.6, 0.4]], atol=1e-6, rtol=0)
    close(path.generalized_kl(logits, x1, x_t, 0.5), [-2 * (0.3 + math.log(0.5)), -2 * (0.5 - 1)], atol=1e-6, rtol=0)
    assert float(path.generalized_kl(logits, x1, torch.tensor([3, 3]), 0.5)[0]) == pytest.approx(-2 * math.log(0.5))


def test_masks_have_no_way_back() -> None:
    with pytest.raises(ValueError, match="expected uniform noise"):
        MixturePath(values=4, mask=4, divergence_free=1.0)


# -- steps ------------------------------------------------------------------------------------------------------------

PATHS = {"metric": MetricPath(table(6), 2.0), "uniform": MixturePath(values=6),
         "free": MixturePath(values=6, divergence_free=0.7), "masked": MixturePath(values=6, mask=6)}


@pytest.mark.parametrize("name", PATHS)
def test_transitions_sum_to_one(name: str) -> None:
    path, t, h = PATHS[name], 0.4, 0.1
    states = torch.arange(7 if name == "masked" else 6)
    for x1 in range(6):
        total = sum(log_prob(path, torch.full_like(states, x), states, torch.full_like(states, x1), t, h).exp()
                    for x in range(6))
        if name == "masked":
            total[6] += log_prob(path, states[6:], states[6:], torch.tensor([x1]), t, h).exp()[0]
        close(total, torch.ones(len(states)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PATHS)
def test_a_walk_with_a_perfect_network_arrives(name: str) -> None:
    path, n, steps = PATHS[name], 50, 20
    x1, chance = torch.arange(n) % 6, Chance.draw(steps, n, torch.Generator().manual_seed(0))
    chain = euler(path, path.prior(chance.start), torch.linspace(0, 1, steps + 1).tolist(), chance)
    x, t = next(chain)
    states = [x]
    with pytest.raises(StopIteration) as stop:
        while True:
            x, t = chain.send(x1)
            states.append(x)
    assert torch.equal(stop.value.value, x1) and len(states) == steps and t == pytest.approx(0.95)
    right = [(x == x1).double().mean() for x in states]
    assert right[0] < 0.5 and right[-1] > 0.8
    if name == "metric":
        assert torch.equal(states[1], states[0])  # its rate diverges at t = 0, and then moves nothing


def test_metric_and_uniform_paths_correct_and_masks_do_not() -> None:
    """From a wrong token, with a network that knows better."""
    n, steps = 200, 16
    wrong, x1, chance = torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.long), Chance.draw(
        16, n, torch.Generator().manual_seed(0))
    changed = {}
    for name, path in PATHS.items():
        x = wrong
        for i in range(steps - 1):
            # a masked network copies what it sees, whatever it may think: the loss never asked it for more
            believed = x if name == "masked" else x1
            x = step(path, x, believed, i / steps, 1 / steps, chance.jump[i], chance.target[i])
        changed[name] = float((x != wrong).double().mean())
    assert changed["masked"] == 0 and min(changed["metric"], changed["uniform"]) > 0.8


def test_loss_is_cross_entropy() -> None:
    logits, x1 = table(5, 7), torch.arange(5)
    close(discrete_flow.cross_entropy(logits, x1), -logits.log_softmax(-1)[x1, x1], atol=1e-6, rtol=0)
