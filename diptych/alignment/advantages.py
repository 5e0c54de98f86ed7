"""What a sampled trajectory was worth compared with others: advantages, without any model.

    group-relative   A_i = w_i (r_i - mean of its group) / (spread + eps)                       (GRPO, arXiv 2402.03300)
    GAE              delta_k = r_k + gamma V_{k+1} (1 - done_k) - V_k
                     A_k = delta_k + gamma lambda (1 - done_k) A_{k+1},    return_k = A_k + V_k       (arXiv 1506.02438)

Groups are told by ids, never by the text of a prompt: cut prompts may look alike. Everything is float32. Shape letters:
n trajectories, g groups, k steps, "..." what follows them or stands between (environments, actions of a chunk).
"""
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Spread = Literal["group", "batch", "none"]


# -- groups -----------------------------------------------------------------------------------------------------------

class Groups(NamedTuple):
    """Rewards (n, ...) by group: `index` (n,) says which of the g groups a row belongs to, in the order of their ids;
    `mean` and `std` (g, ...), a std of 0 exactly where all rewards of a group are the same."""

    index: Tensor
    mean: Tensor
    std: Tensor

    @property
    def zero_std_share(self) -> Tensor:
        """Share of groups that teach nothing."""
        return (self.std == 0).float().mean()


def by_group(rewards: Tensor, groups: Tensor, unbiased: bool = False) -> Groups:
    """Rewards (n, ...) and ids (n,), in any order; entries behind the first dimension are compared apart."""
    if groups.ndim != 1 or len(groups) != len(rewards):
        raise ValueError(f"expected an id per row of rewards ({len(rewards)},), got {tuple(groups.shape)}")
    rewards, (ids, index) = rewards.double(), torch.unique(groups, return_inverse=True)
    wide = index.view(-1, *[1] * (rewards.ndim - 1)).expand_as(rewards)
    empty = rewards.new_zeros(len(ids), *rewards.shape[1:])
    count = torch.bincount(index, minlength=len(ids)).double().view(-1, *[1] * (rewards.ndim - 1))
    mean = empty.index_add(0, index, rewards) / count
    square = empty.index_add(0, index, (rewards - mean[index]).square())
    std = (square / (count - int(unbiased)).clamp_min(1)).sqrt()
    # sums of equal numbers round: what does not differ has neither spread nor advantage
    low, high = (empty.scatter_reduce(0, wide, rewards, kind, include_self=False) for kind in ("amin", "amax"))
    same = low == high
    return Groups(index, torch.where(same, low, mean), torch.where(same, 0.0, std))


def group_advantages(rewards: Tensor, groups: Tensor, *, spread: Spread = "group", unbiased: bool = False,
                     eps: float = 1e-4, weights: Tensor | None = None) -> Tensor:
    """Rewards (n, ...) and group ids (n,) -> advantages (n, ...), float32.

    `spread` is the standard deviation of the group, of the whole batch, or 1; `unbiased` divides by the number of rows
    less one. Flow-GRPO: "batch", biased, 1e-4; UnifiedReward-Think: "group", unbiased, 1e-4; RLinf: "group", unbiased,
    1e-6. `weights` (n,) attenuate trajectories (PairUni: `pair_weights`). Groups of one, or with equal rewards, get 0.
    """
    found = by_group(rewards, groups, unbiased)
    centred = rewards.double() - found.mean[found.index]
    if spread != "none":
        whole = spread == "batch"
        std = by_group(rewards, torch.zeros_like(groups), unbiased).std if whole else found.std[found.index]
        centred = centred / torch.where(std > 0, std + eps, 1.0)
    if weights is not None:
        centred = centred * weights.double().view(-1, *[1] * (rewards.ndim - 1))
    return centred.float()


def pair_weights(similarity: Tensor, aligned: Tensor) -> Tensor:
    """Weights (n,) of both sides of a pair: 1 where one picture carries both tasks, else the root of their cosine
    (PairUni, arXiv 2510.25682)."""
    return torch.where(aligned, 1.0, similarity.float().clamp_min(0).sqrt())


def best_of_group(rewards: Tensor, groups: Tensor) -> Tensor:
    """1 for the best of its group (n,), for all that are equally good, 0 elsewhere: fine-tuning on own best samples.
    With raw rewards in this place one has reward-weighted regression."""
    rewards = rewards.float()
    found = by_group(rewards, groups)
    top = rewards.new_full((len(found.mean),), float("-inf")).scatter_reduce(0, found.index, rewards, "amax")
    return (rewards == top[found.index]).float()


def best_and_worst(rewards: Tensor, groups: Tensor, variant: Literal["paper", "released"] = "paper") -> Tensor:
    """+1 for the best of its group, -1 for the worst, the first of equals, 0 for the rest (n,): a pair to prefer by.

    A group of equal rewards has no pair. "released" (Flow-GRPO) makes one nevertheless, of its second and first row.
    """
    out = torch.zeros(len(rewards), device=rewards.device)
    for ids in torch.unique(groups):
        rows = torch.nonzero(groups == ids).flatten()
        best, worst = int(rewards[rows].argmax()), int(rewards[rows].argmin())
        if best == worst:
            if variant == "paper" or len(rows) < 2:
                continue
            best, worst = 1, 0
        out[rows[best]], out[rows[worst]] = 1.0, -1.0
    return out


# -- which trajectories to train on ------------------------------------------------------------------------------------

def keep(advantages: Tensor, multiple: int, generator: torch.Generator) -> Tensor:
    """Rows (n,) bool of advantages (n, ...) that are not zero throughout. Zero ones, drawn at random, complete their
    number to a multiple, if there are enough; if not, the number stays as it is (Flow-GRPO)."""
    chosen = advantages.flatten(1).abs().sum(1) != 0 if advantages.ndim > 1 else advantages != 0
    lacking = -int(chosen.sum()) % multiple
    spare = torch.nonzero(~chosen).flatten()
    if 0 < lacking <= len(spare):
        order = torch.randperm(len(spare), generator=generator, device=generator.device)[:lacking]
        chosen[spare[order.to(spare.device)]] = True
    return chosen


def within(returns: Tensor, groups: Tensor, low: float, high: float) -> Tensor:
    """Rows (n,) bool whose group's mean return lies in [low, high]: groups that all fail or all succeed teach nothing
    (RLinf's success-rate filter)."""
    found = by_group(returns, groups)
    return ((found.mean >= low) & (found.mean <= high))[found.index]


def until(ended: Tensor, dim: int = -1) -> Tensor:
    """Steps that count: True up to the first end along `dim`, which is itself kept; all where nothing ended. The mask
    of completions up to their first end token, and of episodes up to the action that ends them."""
    ended = ended.long()
    return ended.cumsum(dim) - ended == 0


# -- values -----------------------------------------------------------------------------------------------------------

def gae(rewards: Tensor, values: Tensor, ended: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Rewards (k, ...), values (k + 1, ...) with that of the state behind the last step, and whether step k ended its
    episode (k, ...) -> advantages and returns (k, ...), float32."""
    if len(values) != len(rewards) + 1 or ended.shape != rewards.shape:
        raise ValueError(f"expected {len(rewards) + 1} values and ends of shape {tuple(rewards.shape)}, got "
                         f"{len(values)} and {tuple(ended.shape)}")
    rewards, values, going = rewards.float(), values.float(), 1 - ended.float()
    deltas = rewards + gamma * values[1:] * going - values[:-1]
    out, behind = torch.empty_like(rewards), torch.zeros_like(rewards[0])
    for k in reversed(range(len(rewards))):
        behind = deltas[k] + gamma * lam * going[k] * behind
        out[k] = behind
    return out, out + values[:-1]


def bootstrap(rewards: Tensor, values: Tensor, ended: Tensor, gamma: float) -> Tensor:
    """Rewards (..., c) of a chunk of steps with gamma V added to the last, where `ended` (...) says that its last step
    ended the episode. With truncations only, or with all ends, is the caller's choice; an environment that starts anew
    by itself has no other place for the value of where it ended. `values` (...)."""
    out = rewards.float().clone()
    out[..., -1] += gamma * values.float() * ended
    return out


def normalised(values: Tensor, mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(values - mean) / (std + eps), unbiased, both over the entries of the mask; all entries are moved."""
    chosen = values if mask is None else values[mask.expand_as(values)]
    return (values - chosen.mean()) / (chosen.std() + eps)
