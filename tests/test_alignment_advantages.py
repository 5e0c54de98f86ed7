"""What trajectories were worth: groups in any order, what equal rewards teach, masks, values."""
import pytest
import torch
from torch import Tensor

from diptych.alignment import advantages as adv

REWARDS = torch.tensor([0.2, 0.9, 0.4, 0.5, 0.1, 0.5, 0.7])
IDS = torch.tensor([7, 3, 7, 5, 3, 5, 7])


def test_a_group_is_compared_with_itself_only() -> None:
    own = adv.group_advantages(REWARDS, IDS)
    for i in (3, 5, 7):
        rows = torch.nonzero(IDS.eq(i)).flatten()
        r = REWARDS[rows]
        expected = (r - r.mean()) / (r.std(correction=0) + 1e-4)
        torch.testing.assert_close(own[rows], expected, atol=1e-6, rtol=1e-5)
    moved = torch.tensor([3.0, -1.0, 3.0, 8.0, -1.0, 8.0, 3.0])  # a shift of every group
    torch.testing.assert_close(adv.group_advantages(REWARDS + moved, IDS), own, atol=1e-5, rtol=1e-4)
    order = torch.tensor([4, 2, 0, 6, 5, 1, 3])
    assert torch.equal(adv.group_advantages(REWARDS[order], IDS[order]), own[order])
    far = adv.group_advantages(REWARDS * 3, IDS, eps=0.0)
    torch.testing.assert_close(far, adv.group_advantages(REWARDS, IDS, eps=0.0))


def test_the_published_number_of_four_answers() -> None:
    own = adv.group_advantages(torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.zeros(4), unbiased=True)
    torch.testing.assert_close(own, torch.tensor([-0.8659, 0.8659, 0.8659, -0.8659]), atol=5e-5, rtol=0)


def test_the_spread_is_that_of_the_batch_or_none_where_told() -> None:
    centred = adv.group_advantages(REWARDS, IDS, spread="none")
    batch = adv.group_advantages(REWARDS, IDS, spread="batch", eps=0.0)
    torch.testing.assert_close(batch * REWARDS.std(correction=0), centred)
    assert centred[IDS == 7].sum().abs() < 1e-6


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e3])
@pytest.mark.parametrize("spread", ["group", "batch", "none"])
def test_equal_rewards_teach_exactly_nothing(value: float, spread: adv.Spread) -> None:
    rewards = torch.tensor([value] * 3 + [0.0, 1.0, 5.0], dtype=torch.float64)  # whose sums round
    ids = torch.tensor([0, 0, 0, 1, 1, 2])
    for unbiased in (False, True):
        own = adv.group_advantages(rewards, ids, spread=spread, unbiased=unbiased)
        assert (own[:3] == 0).all() and own[5] == 0 and own.isfinite().all() and (own[3:5] != 0).all()
    assert float(adv.by_group(rewards, ids).zero_std_share) == pytest.approx(2 / 3)


def test_rows_may_have_many_entries_and_weights() -> None:
    rewards = torch.randn(7, 4)
    own = adv.group_advantages(rewards, IDS)
    for k in range(4):
        torch.testing.assert_close(own[:, k], adv.group_advantages(rewards[:, k], IDS))
    weights = adv.pair_weights(torch.tensor([1.0, 0.64, 0.25, 0.3, 0.5, 0.6, 0.7]),
                               torch.tensor([False, False, False, True, True, True, True]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.8, 0.5, 1, 1, 1, 1]))
    torch.testing.assert_close(adv.group_advantages(rewards, IDS, weights=weights), own * weights[:, None])
    with pytest.raises(ValueError, match=r"expected an id per row of rewards \(7,\), got \(6,\)"):
        adv.group_advantages(rewards, IDS[:6])


def test_best_and_worst_of_a_group() -> None:
    assert adv.best_of_group(REWARDS, IDS).tolist() == [0, 1, 0, 1, 0, 1, 1]  # equals are all the best
    assert adv.best_and_worst(REWARDS, IDS).tolist() == [-1, 1, 0, 0, -1, 0, 1]
    assert adv.best_and_worst(REWARDS, IDS, "released").tolist() == [-1, 1, 0, -1, -1, 1, 1]
    assert adv.best_and_worst(torch.ones(1), torch.zeros(1), "released").tolist() == [0]


# -- which to train on ------------------------------------------------------------------------------------------------

def test_zero_ones_complete_a_multiple_if_there_are_enough() -> None:
    a = torch.tensor([1.0, 0, 2, 0, 0, -1, 3])
    for multiple, count in ((2, 4), (3, 6), (7, 7), (5, 5), (9, 4)):
        chosen = adv.keep(a, multiple, torch.Generator().manual_seed(1))
        assert int(chosen.sum()) == count and (chosen | (a == 0)).all()
    first = [adv.keep(a, 5, torch.Generator().manual_seed(s)).tolist() for s in range(6)]
    assert first[0] == adv.keep(a, 5, torch.Generator().manual_seed(0)).tolist() and len(set(map(tuple, first))) > 1
    per_step = torch.stack((torch.zeros(7), a), 1)  # zero at every step, or kept
    assert torch.equal(adv.keep(per_step, 1, torch.Generator()), a != 0)


def test_groups_that_all_fail_or_succeed_are_left_out() -> None:
    returns, ids = torch.tensor([0.0, 0, 5, 0, 5, 5]), torch.tensor([2, 2, 0, 0, 1, 1])
    assert adv.within(returns, ids, 0.5, 4.5).tolist() == [False, False, True, True, False, False]
    assert adv.within(returns, ids, 0.0, 2.5).tolist() == [True, True, True, True, False, False]


def test_the_first_end_counts_and_nothing_behind() -> None:
    ended = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert torch.equal(adv.until(ended), expected)
    assert torch.equal(adv.until(ended.T, 0), expected.T)


# -- values -----------------------------------------------------------------------------------------------------------

def returns(rewards: Tensor, values: Tensor, ended: Tensor, gamma: float) -> Tensor:
    """Discounted sums up to the end of the episode, with the value of the last state where it goes on."""
    out, behind = torch.zeros_like(rewards), values[-1]
    for k in reversed(range(len(rewards))):
        behind = rewards[k] + gamma * behind * (1 - ended[k].float())
        out[k] = behind
    return out


def test_gae_is_monte_carlo_at_lambda_1_and_one_step_at_0() -> None:
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(6, 3, generator=g), torch.randn(7, 3, generator=g)
    ended = torch.rand(6, 3, generator=g) < 0.3
    full, back = adv.gae(rewards, values, ended, gamma=0.9, lam=1.0)
    torch.testing.assert_close(back, returns(rewards, values, ended, 0.9))
    torch.testing.assert_close(full, back - values[:-1])
    step, _ = adv.gae(rewards, values, ended, gamma=0.9, lam=0.0)
    torch.testing.assert_close(step, rewards + 0.9 * values[1:] * ~ended - values[:-1])
    with pytest.raises(ValueError, match="expected 7 values"):
        adv.gae(rewards, values[:-1], ended, gamma=0.9, lam=1.0)


def test_nothing_crosses_the_end_of_an_episode() -> None:
    rewards, values, ended = torch.zeros(4, 1), torch.zeros(5, 1), torch.tensor([[0], [1], [0], [0]]).bool()
    rewards[3] = 1.0
    own, _ = adv.gae(rewards, values, ended, gamma=1.0, lam=1.0)
    assert own.flatten().tolist() == [0, 0, 1, 1]


def test_a_cut_episode_is_worth_what_its_last_state_promises() -> None:
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    own = adv.bootstrap(rewards, torch.tensor([10.0, 20.0]), torch.tensor([True, False]), 0.5)
    assert own.tolist() == [[1, 7], [3, 4]] and rewards[0, 1] == 2


def test_normalising_looks_at_what_counts() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 100.0])
    own = adv.normalised(x, torch.tensor([True, True, True, False]), eps=0.0)
    torch.testing.assert_close(own, x - 2)
