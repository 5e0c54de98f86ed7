import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal

from diptych.objectives import flow

MEAN, STD = 2.0, 0.5  # of Gaussian data, whose velocity is known


def gaussian_velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[data - noise | x_t] for data ~ N(MEAN, STD^2) and standard normal noise."""
    variance = (1 - t) ** 2 + t**2 * STD**2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def spread(times: list[float], noise: float, dance: bool = False) -> float:
    """Standard deviation after a run on Gaussian data, exactly: every step is affine in x."""
    variance = 1.0
    for t, to in pairwise(times):
        x = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64)
        v = gaussian_velocity(x, t)
        if noise:
            step = flow.dance_step(x, v, t, to, noise) if dance else flow.sde_step(x, v, t, to, noise, times[1])
            mean, added = step.mean, float(step.std)
        else:
            mean, added = flow.euler_step(x, v, t, to), 0.0
        gain = float(mean[1] - mean[0])
        variance = gain**2 * variance + added**2
    return math.sqrt(variance)


# -- published figures ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t, x_next, mean, std, log_prob", [
    (0.1, 0.658139, 0.3261, 2.1 * math.sqrt(0.1), -0.634583),  # theirs: 0.9 -> 0.8
    (0.0, 0.6565, 0.3065, 2.213594 * math.sqrt(0.1), -0.687264),  # theirs: 1 -> 0.9, sigma_max 0.9
])
def test_step_equals_flow_grpo(t: float, x_next: float, mean: float, std: float, log_prob: float) -> None:
    """x = 0.3, their velocity -0.8 (noise - data), noise level 0.7, drawn normal 0.5."""
    step = flow.sde_step(torch.full((1, 1), 0.3), torch.full((1, 1), 0.8), t, t + 0.1, 0.7, first=0.1)
    assert step.mean.item() == pytest.approx(mean, abs=1e-5)
    assert float(step.std) == pytest.approx(std, abs=1e-6)
    x = step.mean + step.std * 0.5
    assert x.item() == pytest.approx(x_next, abs=1e-5)
    assert step.log_prob(x).item() == pytest.approx(log_prob, abs=1e-5)


def test_step_equals_dance_grpo() -> None:
    """The same from 0.9 to 0.8."""
    step = flow.dance_step(torch.full((1, 1), 0.3), torch.full((1, 1), 0.8), 0.1, 0.2, 0.7)
    assert step.mean.item() == pytest.approx(0.374011, abs=1e-6)
    assert step.at(torch.full((1, 1), 0.5)).item() == pytest.approx(0.484691, abs=1e-6)


@pytest.mark.parametrize("steps, sde, ode, dance", [
    (10, 0.479, 0.431, 0.476), (40, 0.498, 0.483, 0.491), (200, 0.501, 0.495, 0.499)])
def test_all_samplers_reach_the_spread_of_the_data(steps: int, sde: float, ode: float, dance: float) -> None:
    times = flow.schedule(steps)
    assert spread(times, 0.7) == pytest.approx(sde, abs=2e-3)
    assert spread(times, 0.0) == pytest.approx(ode, abs=2e-3)
    assert spread(times, 0.7, dance=True) == pytest.approx(dance, abs=3e-3)  # published from samples


def test_the_stochastic_sampler_keeps_the_marginals() -> None:
    times = flow.schedule(1000)
    for share in (0.25, 0.5, 0.75):
        cut = times[: int(share * 1000) + 1]
        t = cut[-1]
        expected = math.sqrt((1 - t) ** 2 + t**2 * STD**2)
        assert spread(cut, 0.7) == pytest.approx(expected, rel=1e-2)
        assert spread(cut, 0.0) == pytest.approx(expected, rel=1e-2)


# -- path and loss ----------------------------------------------------------------------------------------------------

def test_path_runs_from_noise_to_data() -> None:
    data, noise = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(flow.interpolate(data, noise, torch.tensor(0.0)), noise)
    assert torch.equal(flow.interpolate(data, noise, torch.tensor(1.0)), data)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])[:, None]  # times are per token
    x = flow.interpolate(data, noise, t)
    torch.testing.assert_close(x[1], 0.75 * noise[1] + 0.25 * data[1])
    torch.testing.assert_close(x[2] + 0.5 * (data - noise)[2], data[2])


def test_loss_is_the_mean_over_channels() -> None:
    data, noise = torch.randn(5, 8), torch.randn(5, 8)
    assert flow.squared_error(data - noise, data, noise).abs().max() == 0
    error = flow.squared_error(data - noise + torch.arange(5.0)[:, None], data, noise)
    torch.testing.assert_close(error, torch.arange(5.0) ** 2)
    half = flow.squared_error((data - noise).bfloat16(), data, noise)
    assert half.dtype == torch.float32 and half.max() < 1e-3


# -- times ------------------------------------------------------------------------------------------------------------

def test_shift_moves_times_towards_noise() -> None:
    noise_level = torch.linspace(0, 1, 11)
    theirs = 3 * noise_level / (1 + 2 * noise_level)
    torch.testing.assert_close(1 - flow.shift_time(1 - noise_level, 3.0), theirs)
    torch.testing.assert_close(flow.shift_time(noise_level, 1.0), noise_level)
    assert (flow.shift_time(noise_level[1:-1], 3.0) < noise_level[1:-1]).all()


def test_n_released_timesteps_are_n_minus_one_evaluations() -> None:
    times = flow.schedule(49, shift=3.0)
    theirs = torch.linspace(1, 0, 50, dtype=torch.float64)
    theirs = 3 * theirs / (1 + 2 * theirs)
    assert len(times) == 50 and times[0] == 0 and times[-1] == 1
    torch.testing.assert_close(torch.tensor(times, dtype=torch.float64), 1 - theirs)
    assert all(a < b for a, b in pairwise(times))
    assert flow.schedule(1) == [0, 1]
    with pytest.raises(ValueError, match=r"at least 1 evaluation, 0 <= start < 1 .* got 0, 0.0"):
        flow.schedule(0)


def test_the_last_step_may_leave_from_a_time_of_its_own() -> None:
    """Schedulers that never ask below their smallest noise level (diffusers, Stable Diffusion 3)."""
    u = torch.linspace(0, 0.997, 4, dtype=torch.float64)
    times = flow.schedule(4, shift=3.0, end=0.997)
    torch.testing.assert_close(torch.tensor(times[:-1], dtype=torch.float64), flow.shift_time(u, 3.0))
    assert times[-1] == 1 and len(times) == 5
    assert flow.schedule(1, end=0.5) == [0, 1]
    with pytest.raises(ValueError, match=r"start < end < 1, got 4, 0.2 and 0.1"):
        flow.schedule(4, start=0.2, end=0.1)


def test_training_times_are_logit_normal() -> None:
    g = torch.Generator().manual_seed(0)
    t = flow.sample_time(40_000, g)
    logit = torch.log((1 - t) / t)
    assert abs(logit.mean()) < 0.02 and abs(logit.std() - 1) < 0.02
    shifted = flow.sample_time(40_000, torch.Generator().manual_seed(0), shift=3.0)
    torch.testing.assert_close(shifted, flow.shift_time(t, 3.0))
    moved = flow.sample_time(40_000, torch.Generator().manual_seed(0), mean=1.0, std=0.5)
    logit = torch.log((1 - moved) / moved)
    assert abs(logit.mean() - 1) < 0.02 and abs(logit.std() - 0.5) < 0.02  # more noise


# -- sampling ---------------------------------------------------------------------------------------------------------

def test_a_straight_flow_needs_one_step() -> None:
    data, noise = torch.randn(6, 4), torch.randn(6, 4)
    for steps in (1, 7):
        x = flow.sample(lambda x, t: data - noise, noise, flow.schedule(steps, shift=2.0))
        torch.testing.assert_close(x, data, atol=1e-5, rtol=1e-5)


def test_the_ode_reaches_its_closed_form_at_first_order() -> None:
    """The flow of Gaussian data is the affine map noise -> MEAN + STD * noise."""
    noise = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = MEAN + STD * noise
    errors = [(flow.sample(gaussian_velocity, noise, flow.schedule(n)) - exact).abs().max().item()
              for n in (100, 200, 400)]
    assert errors[-1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_a_transition_is_a_gaussian() -> None:
    step = flow.Transition(torch.randn(2, 5, 3), 0.3)
    x = step.sample(torch.Generator().manual_seed(1))
    expected = Normal(step.mean, 0.3).log_prob(x)
    assert step.log_prob(x).shape == (2,)
    torch.testing.assert_close(step.log_prob(x), expected.mean((1, 2)))
    many = flow.Transition(torch.full((200, 10, 10), 1.5), 0.3).sample(torch.Generator().manual_seed(2))
    assert abs(many.mean() - 1.5) < 0.01 and abs(many.std() - 0.3) < 0.01
    again = step.sample(torch.Generator().manual_seed(1))
    assert torch.equal(x, again)


def test_log_densities_are_sums_or_means_and_of_any_state() -> None:
    step, other = flow.Transition(torch.randn(2, 5, 3), 0.3), torch.randn(2, 5, 3)
    exact = Normal(step.mean, 0.3).log_prob(other).sum((1, 2))
    torch.testing.assert_close(step.log_prob(other, "sum"), exact)
    torch.testing.assert_close(step.log_prob(other), exact / 15)


@pytest.mark.parametrize("dance", [False, True])
def test_rows_may_stand_at_times_of_their_own(dance: bool) -> None:
    x, v, noise, times = *torch.randn(3, 4, 5, 3), [0.0, 0.1, 0.3, 0.7, 1.0]
    t, to = (torch.tensor(times[k:k + 4], dtype=torch.float64)[:, None, None] for k in (0, 1))

    def make(x: torch.Tensor, v: torch.Tensor, t: flow.Time, to: flow.Time) -> flow.Transition:
        return flow.dance_step(x, v, t, to, 0.7) if dance else flow.sde_step(x, v, t, to, 0.7, times[1])

    steps = make(x, v, t, to)
    state = steps.at(noise)
    for i in range(4):
        one = make(x[i], v[i], times[i], times[i + 1])
        torch.testing.assert_close(steps.mean[i], one.mean)
        torch.testing.assert_close(steps.log_prob(state)[i], one.log_prob(state[i]))
    assert steps.mean.dtype == torch.float32


def test_a_deterministic_step_has_no_density() -> None:
    step = flow.sde_step(torch.zeros(2, 2), torch.ones(2, 2), 0.5, 0.6, 0.0, first=0.1)
    torch.testing.assert_close(step.mean, flow.euler_step(torch.zeros(2, 2), torch.ones(2, 2), 0.5, 0.6))
    with pytest.raises(ValueError, match="fix: sample with noise > 0"):
        step.log_prob(step.mean)


def test_steps_are_float32_whatever_the_model() -> None:
    half = torch.ones(2, 2, dtype=torch.bfloat16)
    step = flow.sde_step(half, half, 0.5, 0.6, 0.7, first=0.1)
    assert step.mean.dtype == torch.float32 and step.log_prob(step.mean).dtype == torch.float32


def test_shifts_follow_the_number_of_tokens() -> None:
    assert flow.shift_for(7, 1.5) == 1.5 and flow.shift_for(400, "root") == 1.0
    assert [math.log(flow.shift_for(n, "linear")) for n in (256, 4096, 2176)] == pytest.approx([0.5, 1.15, 0.825])
    each = flow.shift_time(torch.tensor([0.2, 0.2]), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(each, torch.stack([flow.shift_time(torch.tensor(0.2), s) for s in (1.0, 3.0)]))
    for tokens in range(1, 400):  # rounding leads no time out of the interval
        times = flow.schedule(4, flow.shift_for(tokens, "root"))
        assert min(times) >= 0 and max(times) <= 1
