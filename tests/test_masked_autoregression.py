"""Diffusion with learned variance, and masked autoregression over it."""
import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from diptych.objectives import masked_autoregression as mar
from diptych.objectives.diffusion import Diffusion, Transition, cosine_betas, respace
from diptych.parts.mar import DiffusionHead, HeadConfig, Mar, MarConfig

FULL = Diffusion.cosine()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def head(width: int = 32, d: int = 3, w: int = 5) -> DiffusionHead:
    """With its closed layers opened."""
    torch.manual_seed(0)
    made = DiffusionHead(HeadConfig(width=width, layers=2), d, w)
    with torch.no_grad():
        for p in made.parameters():
            if not p.any():
                p.copy_(0.1 * torch.randn(p.shape))
    return made.requires_grad_(False)


# -- schedule ---------------------------------------------------------------------------------------------------------

def test_the_schedule_goes_from_data_to_noise() -> None:
    betas = cosine_betas(1000)
    assert betas.dtype == torch.float64 and 0 < betas[0] < 1e-4 and betas.max() == 0.999
    assert (FULL.level[1:] < FULL.level[:-1]).all() and FULL.level[0] > 0.9999 and FULL.level[-1] < 1e-8
    assert FULL.level[499].item() == pytest.approx(math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 /
                                                   math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rel=1e-9)


def test_respaced_schedules_have_the_levels_of_the_steps_they_keep() -> None:
    short = FULL.respaced((20,))
    assert short.steps[0] == 0 and short.steps[-1] == 999 and len(short.steps) == 20
    torch.testing.assert_close(short.level, FULL.level[short.steps], rtol=1e-9, atol=0)
    assert respace(10, (2, 3)) == [0, 4, 5, 7, 9] and respace(7, (1,)) == [0] and respace(4, (4,)) == [0, 1, 2, 3]
    assert FULL.respaced((50,)).respaced((5,)).steps == [FULL.respaced((50,)).steps[i] for i in respace(50, (5,))]
    with pytest.raises(ValueError, match="1 to 5 steps in section 1 of 10 steps, got 6"):
        respace(10, (2, 6))


# -- loss -------------------------------------------------------------------------------------------------------------

def test_the_right_answer_costs_nothing() -> None:
    data, noise, k = normal(6, 3), normal(6, 3, seed=1), torch.tensor([1, 5, 137, 500, 900, 998])
    output = torch.cat((noise, -torch.ones(6, 3)), 1)  # the lower bound of the variance is that of the posterior
    error, bits = FULL.losses(output, data, noise, k)
    assert error.abs().max() == 0 and bits.abs().max() < 2e-4
    wide = FULL.losses(torch.cat((noise, torch.ones(6, 3)), 1), data, noise, k)[1]
    assert (wide[:2] > 1e-3).all()  # where the bounds differ, the upper one is wrong


def test_the_variational_term_is_the_divergence_of_two_gaussians() -> None:
    data, noise, output = normal(4, 3), normal(4, 3, seed=1), normal(4, 6, seed=2)
    k = torch.tensor([3, 60, 400, 700])
    x = FULL.add_noise(data, noise, k)
    mean, log_variance = FULL.moments(x, output, k)
    wanted = FULL.look_up("from_data", k) * data + FULL.look_up("from_x", k) * x
    p = torch.distributions.Normal(wanted, (0.5 * FULL.look_up("log_low", k)).exp())
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(p, q).mean(1) / math.log(2)
    torch.testing.assert_close(FULL.losses(output, data, noise, k)[1], kl, rtol=1e-4, atol=1e-5)


def test_the_variational_term_trains_the_variance_only() -> None:
    output = normal(5, 6).requires_grad_()
    error, bits = FULL.losses(output, normal(5, 3), normal(5, 3, seed=1), torch.tensor([0, 1, 9, 300, 990]))
    (by_bits,) = torch.autograd.grad(bits.sum(), output, retain_graph=True)
    (by_error,) = torch.autograd.grad(error.sum(), output)
    assert by_bits[:, :3].abs().max() == 0 and by_bits[1:, 3:].abs().min() > 0
    assert by_error[:, 3:].abs().max() == 0 and by_error[:, :3].abs().min() > 0


def test_the_likelihood_of_levels_sums_to_one() -> None:
    """At the last step data are 8-bit levels: the outermost ones take the tails."""
    levels, k = torch.linspace(-1, 1, 256)[:, None], torch.zeros(256, dtype=torch.long)
    output = torch.cat((torch.full((256, 1), 0.4), torch.ones(256, 1)), 1)
    # noise such that x, and with it the mean, is the same for every level
    noise = (0.3 - FULL.look_up("signal", k) * levels) / FULL.look_up("noise", k)
    bits = FULL.losses(output, levels, noise, k)[1]
    assert (2.0 ** -bits).sum().item() == pytest.approx(1, abs=1e-3)


# -- sampling ---------------------------------------------------------------------------------------------------------

def oracle(mean: Tensor) -> mar.Network:
    """The best prediction for data N(mean, 0.25): its noise in closed form, the variance at its lower bound."""
    def network(x: Tensor, step: Tensor) -> Tensor:
        level = FULL.level[step].float()[:, None]
        total = 0.25 * level + 1 - level
        noise = (1 - level).sqrt() / total * (x - level.sqrt() * mean)
        return torch.cat((noise, -torch.ones_like(x)), 1)
    return network


def test_a_perfect_network_draws_the_distribution() -> None:
    short = FULL.respaced((60,))
    mean = torch.tensor([1.5, -0.5])
    path = short.path(oracle(mean), normal(4000, 2), normal(60, 4000, 2, seed=1))
    assert path.shape == (61, 4000, 2) and torch.equal(path[0], normal(4000, 2))
    torch.testing.assert_close(path[-1].mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(path[-1].std(0), torch.full((2,), 0.5), atol=0.05, rtol=0)
    cold = short.path(oracle(mean), normal(4000, 2), normal(60, 4000, 2, seed=1), temperature=0.5)
    assert (cold[-1].std(0) < 0.8 * path[-1].std(0)).all()
    with pytest.raises(ValueError, match=r"step noise of shape \(60, 4000, 2\), got \(59, 4000, 2\)"):
        short.path(oracle(mean), normal(4000, 2), normal(59, 4000, 2))


def test_limits_keep_an_unsure_network_in_range() -> None:
    short = FULL.respaced((20,))

    def unsure(x: Tensor, step: Tensor) -> Tensor:
        return torch.cat((0.9 * x, torch.zeros_like(x)), 1)

    assert short.path(unsure, normal(8, 2), normal(20, 8, 2))[-1].abs().max() > 20
    assert short.path(unsure, normal(8, 2), normal(20, 8, 2), limit=3.0)[-1].abs().max() <= 3


def test_log_probs_are_those_of_the_gaussian_steps() -> None:
    short = FULL.respaced((6,))
    network = oracle(torch.tensor([1.0, 0.0]))
    path = short.path(network, normal(5, 2), normal(6, 5, 2, seed=1), temperature=0.8)
    wanted = torch.zeros(5)
    for i, k in enumerate((5, 4, 3, 2, 1)):
        step = short.transition(network, path[i], k, temperature=0.8)
        wanted += torch.distributions.Normal(step.mean, step.std).log_prob(path[i + 1]).sum(1)
    torch.testing.assert_close(short.log_prob(network, path, temperature=0.8), wanted, rtol=1e-4, atol=1e-4)
    last = short.transition(network, path[5], 0)
    assert torch.equal(last.sample(normal(5, 2)), last.mean)
    with pytest.raises(ValueError, match="expected a stochastic step"):
        Transition(last.mean, last.std).log_prob(path[6])


# -- masks and orders -------------------------------------------------------------------------------------------------

def test_mask_ratios_are_the_quantiles_of_a_truncated_normal() -> None:
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    ratio = mar.mask_ratio(u)
    assert ratio[0] == pytest.approx(0.7) and ratio[-1] == 1 and (ratio[1:] > ratio[:-1]).all()
    cdf = torch.distributions.Normal(1.0, 0.25).cdf
    low = cdf(torch.tensor(0.7))
    torch.testing.assert_close((cdf(ratio.float()) - low) / (0.5 - low), u.float(), atol=1e-4, rtol=0)
    assert mar.mask_ratio(torch.tensor([0.0]), 0.2).item() == pytest.approx(0.2)


def test_orders_hide_their_beginning() -> None:
    order = mar.random_order(torch.tensor([[0.3, 0.1, 0.2], [0.0, 0.5, 0.9]]))
    assert order.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert mar.hide(order, 2).tolist() == [[False, True, True], [True, True, False]]
    assert not mar.hide(order, 0).any() and mar.hide(order[0], 3).all()


@pytest.mark.parametrize("tokens, iterations", [(256, 64), (36, 4), (16, 20), (1, 3), (5, 1)])
def test_every_token_is_revealed_once(tokens: int, iterations: int) -> None:
    left = mar.schedule(tokens, iterations)
    assert len(left) == iterations and left[-1] == 0
    steps = [a - b for a, b in zip([tokens, *left], left, strict=False)]
    assert sum(steps) == tokens and min(steps) >= 0
    if tokens >= iterations * 2 > 2:
        assert min(steps) >= 1 and steps[-1] > steps[0]  # few at first
    with pytest.raises(ValueError, match="at least 1 iteration, got 0"):
        mar.schedule(tokens, 0)


# -- with a head ------------------------------------------------------------------------------------------------------

def test_the_loss_is_the_mean_over_draws() -> None:
    data, conditions = normal(7, 3), normal(7, 5, seed=1)
    seen: list[Tensor] = []

    def spy(x: Tensor, k: Tensor, c: Tensor) -> Tensor:
        seen.extend((x, k, c))
        return head()(x, k, c)

    own, bits = mar.loss(spy, FULL, data, conditions, torch.Generator().manual_seed(3), copies=4)
    x, k, c = seen
    assert own.shape == (7,) and k.unique().numel() > 20 and k.min() >= 0 and k.max() < 1000
    assert torch.equal(c, conditions.repeat_interleave(4, 0))
    repeated = data.repeat_interleave(4, 0)
    noise = (x - FULL.look_up("signal", k) * repeated) / FULL.look_up("noise", k)
    error, variational = (v.unflatten(0, (7, 4)).mean(1) for v in mar.terms(head(), FULL, repeated, c, k, noise))
    torch.testing.assert_close(own, error, rtol=1e-2, atol=1e-3)  # the noise is worked back out of x
    assert bits.shape == (7,) and bool((bits - variational).abs().max() < 0.05 * variational.abs().max())
    assert torch.equal(own, mar.loss(head(), FULL, data, conditions, torch.Generator().manual_seed(3))[0])
    assert not torch.equal(own, mar.loss(head(), FULL, data, conditions, torch.Generator().manual_seed(4))[0])


def sets(scale: float = 2.0) -> list[mar.Set]:
    def guide(noise: Sequence[Tensor]) -> Tensor:
        return noise[1] + scale * (noise[0] - noise[1])

    return [mar.Set([normal(m, 5, seed=m), normal(m, 5, seed=m + 1)], normal(m, 3, seed=m + 2),
                    normal(8, m, 3, seed=m + 3), guide, temperature)
            for m, temperature in ((2, 1.0), (5, 1.0), (3, 0.5))]


def test_sets_do_not_disturb_each_other() -> None:
    short = FULL.respaced((8,))
    together = mar.draw(head(), short, sets(), limit=3.0)
    assert [p.shape for p in together] == [(9, 2, 3), (9, 5, 3), (9, 3, 3)]
    for path, one in zip(together, sets(), strict=True):
        torch.testing.assert_close(path, mar.draw(head(), short, [one], limit=3.0)[0], atol=1e-4, rtol=1e-4)


def test_guidance_acts_on_the_noise_alone() -> None:
    one = sets(scale=3.0)[1]
    x, k = normal(5, 3, seed=9), torch.tensor([500])
    full, null = (head()(x, k, c) for c in one.conditions)
    own = mar.network(head(), [one])(x, k)
    torch.testing.assert_close(own[:, :3], null[:, :3] + 3 * (full - null)[:, :3])
    torch.testing.assert_close(own[:, 3:], full[:, 3:])


def test_a_drawn_set_has_the_log_prob_of_its_chain() -> None:
    short, one = FULL.respaced((8,)), sets()[2]
    path = mar.draw(head(), short, [one], limit=3.0)[0]
    own = mar.log_prob(head(), short, one, path, limit=3.0)
    assert own.shape == (3,) and torch.isfinite(own).all()
    moved = path.clone()
    moved[4, 1] += 1.0
    other = mar.log_prob(head(), short, one, moved, limit=3.0)
    assert other[1] < own[1] - 1 and torch.allclose(other[[0, 2]], own[[0, 2]])


# -- the transformer --------------------------------------------------------------------------------------------------

def test_only_revealed_tokens_are_seen() -> None:
    torch.manual_seed(0)
    model = Mar(MarConfig(width=24, layers=1, heads=2, decoder_width=16, decoder_heads=4, token_width=3, side=4,
                          buffers=2))
    x, hidden = normal(2, 12, 3), mar.hide(mar.random_order(torch.rand(2, 12)), 8)
    with torch.no_grad():
        states = model.encode(x, hidden, (3, 4))
        assert states.shape == (2, 6, 24)
        torch.testing.assert_close(states, model.encode(x.masked_fill(hidden[..., None], 9.0), hidden, (3, 4)))
        assert not torch.allclose(states, model.encode(x.masked_fill(~hidden[..., None], 9.0), hidden, (3, 4)))
        other = model.encode(x, hidden, (3, 4), normal(2, 24))
        assert not torch.allclose(states, other)  # what buffers hold matters
        assert model.decode(states, hidden, (3, 4)).shape == (2, 12, 16)
        assert not torch.allclose(model.encode(x, hidden, (3, 4)), model.encode(x, hidden, (4, 3)))
    with pytest.raises(ValueError, match=r"equally many hidden tokens in every picture, got \[1, 2\]"):
        model.encode(x[:, :3], torch.tensor([[True, False, False], [True, True, False]]), (1, 3))
    with pytest.raises(ValueError, match="expected 16 tokens .* grid of 4 x 4, got 12"):
        model.encode(x, hidden, (4, 4))
