"""The golden cases of UnifiedReward-Think's reinforcement learning: masks, advantages, distances, losses, gradients.

Groups are consecutive rows; the two trainers ("qwen", "llava") clamp the log-ratio to the reference differently. One
update per rollout: the ratio is 1, and nothing clips.
"""
from pathlib import Path

import torch

from diptych.adapters.cases import Case, Fixture
from diptych.adapters.unified_reward_text_cases import text_cases
from diptych.alignment import advantages as adv
from diptych.alignment import surrogate

EXACT = 1e-5


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    f = Fixture(folder)
    numbers(f)
    return [*f.finish(), *text_cases(folder)]


def numbers(f: Fixture) -> None:
    """The cases of tensors."""
    for name in f.names("grpo"):
        _grpo(f, name)
    if "token_logprobs.output" in f.tensors:
        given = f.given("token_logprobs")
        own = surrogate.token_log_probs(given["logits"][:, :-1], given["ids"][:, 1:])
        f.compare("token_logprobs", {"": own}, EXACT)


def _grpo(f: Fixture, name: str) -> None:
    given, constants = f.given("grpo"), f.values["constants"]
    trainer, _, extreme = name.partition("_")
    ids, size = given["completion_ids"], constants["num_generations"]
    mask = adv.until(ids == constants["eos_token_id"])
    rewards, groups = given["accuracy"] + given["format"], torch.arange(len(ids)) // size
    advantages = adv.group_advantages(rewards, groups, unbiased=True, eps=constants["advantage_eps"])
    log_probs = given["logprobs"].clone().requires_grad_()
    reference = given["ref_logprobs_extreme" if extreme else "ref_logprobs"]
    kl = surrogate.kl(log_probs, reference, "k3", constants["clamp"][trainer])
    each = surrogate.surrogate(log_probs, log_probs, advantages[:, None], surrogate.Clip()) + constants["beta"] * kl
    loss = surrogate.reduce(each, mask, "sequence")
    loss.backward()
    assert log_probs.grad is not None
    own = {"completion_mask": mask, "rewards": rewards, "advantages": advantages, "loss": loss,
           "mean_kl": surrogate.reduce(kl, mask, "sequence"), "grad_logprobs": log_probs.grad}
    right = rewards.view(-1, size)
    shares = {"all_wrong_ratio": (right <= 1).all(1), "all_correct_ratio": (right >= 2).all(1)}
    own |= {k: v.float().mean() for k, v in shares.items() if k in f.wanted(f"grpo.{name}")}
    f.compare(f"grpo.{name}", own, EXACT)
    f.compare(f"grpo.{name}", {"per_token_kl": kl, "per_token_loss": each}, EXACT, "relative")
