"""The golden cases of RLinf-VLA: advantages and losses of chunks of actions, of texts, placements, actions, a policy.

Shapes (t, b, c): t chunks of c actions of b environments, d tokens per action. Flags and values have one more row of
chunks in front, or behind. At "chunk_level" a chunk is one step, at "action_level" every action; losses are taken per
token, action or chunk. The released loss per token divides by the number of actions, not of tokens, that count.
"""
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.adapters import openvla
from diptych.adapters.cases import Case, Fixture
from diptych.alignment import advantages as adv
from diptych.alignment import placement, surrogate
from diptych.alignment.surrogate import Clip
from diptych.parts.actions import ActionRange, ActionTokenizer

EXACT = 1e-5
GROUP_EPS = 1e-6
ERRORS = {"AssertionError": placement.PlacementError, "ValueError": ValueError}
AGGREGATIONS: dict[str, surrogate.Reduction] = {
    "token-mean": "token", "seq-mean-token-mean": "sequence", "seq-mean-token-sum": "sequence_sum"}


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    f = Fixture(folder)
    if "adv.input.rewards" in f.tensors:
        _episodes(f)
    if "filter.input.rewards" in f.tensors:
        _filter(f)
    for name in f.names("bootstrap"):
        given = f.given("bootstrap")
        ended = given["truncations"] if name == "standard" else given["truncations"] | given["terminations"]
        own = adv.bootstrap(given["rewards"], given["values"][:, 0], ended[:, -1], f.values["gamma"])
        f.compare(f"bootstrap.{name}", {"rewards": own}, EXACT, "mixed")
    for name in f.names("loss"):
        _loss(f, name)
    if "text.input.rewards" in f.tensors:
        _texts(f)
    _small(f)
    for entry in f.values.get("placement", []):
        _placement(f, entry)
    if (folder / "weights.safetensors").is_file():
        openvla.compare(f)
    return f.finish()


# -- episodes ---------------------------------------------------------------------------------------------------------

def flat(x: Tensor) -> Tensor:
    """(t, b, c) -> (t * c, b)."""
    return x.transpose(1, 2).flatten(0, 1)


def chunked(x: Tensor, chunk: int) -> Tensor:
    """(t * c, b) -> (t, b, c)."""
    return x.unflatten(0, (-1, chunk)).transpose(1, 2)


def steps(rewards: Tensor, ended: Tensor, level: str) -> tuple[Tensor, Tensor, int]:
    """Rewards (t, b, c) and flags (t + 1, b, c), the first row before the first chunk, as steps: rewards (k, b), flags
    (k + 1, b), and how many steps a chunk has."""
    if level == "chunk_level":
        return rewards.sum(-1), ended.any(-1), 1
    return flat(rewards), flat(ended)[-rewards.shape[0] * rewards.shape[2] - 1:], rewards.shape[2]


def counting(ended: Tensor) -> Tensor:
    """Flags (k + 1, b) from before the first step on -> which steps (k, b) count."""
    return adv.until(ended, 0)[1:]


def _episodes(f: Fixture) -> None:
    given = f.given("adv")
    ids = torch.arange(given["rewards"].shape[1]) // f.values["group_size"]
    for name in f.names("gae"):
        level, variant = name.split(".")
        rewards, ended, chunk = steps(given["rewards"], given["dones"], level)
        values = flat(given[f"values_{level}"])[:len(rewards) + 1]
        own, returns = adv.gae(rewards, values, ended[1:], gamma=f.values["gamma"], lam=f.values["gae_lambda"])
        if variant != "unnormalised":
            mask = counting(flat_flags(given["dones"])) if variant == "masked" else None
            if mask is not None and level == "chunk_level":
                mask = chunked(mask, given["rewards"].shape[2]).any(-1)
            own = adv.normalised(own, mask)
        outputs = {"advantages": chunked(own, chunk), "returns": chunked(returns, chunk)}
        wanted = f.wanted(f"gae.{name}")
        f.compare(f"gae.{name}", {k: v for k, v in outputs.items() if k in wanted}, EXACT, "mixed")
    chunk = given["rewards"].shape[2]
    counted = counting(flat_flags(given["dones"]))
    if "mask.output.loss_mask" in f.tensors:
        f.compare("mask", {"loss_mask": chunked(counted, chunk),
                           "loss_mask_sum": chunked(counted.sum(0).expand(len(counted), -1), chunk)}, 0.0)
    for name in f.names("grpo"):
        rewards, ended, size = steps(given["rewards"], given["dones"], name)
        mask = counting(ended)
        own = adv.group_advantages((rewards * mask).sum(0), ids, unbiased=True, eps=GROUP_EPS)
        f.compare(f"grpo.{name}", {"advantages": chunked(own * mask, size)}, EXACT, "mixed")
    for name in f.names("grpo_video"):
        rewards = given["rewards"].transpose(0, 1)  # per trajectory
        if name == "frame":
            own = adv.group_advantages(rewards, ids, unbiased=True, eps=GROUP_EPS)
        else:  # all frames of a group are compared with each other
            own = adv.group_advantages(rewards.flatten(), ids.repeat_interleave(rewards[0].numel()), unbiased=True,
                                       eps=GROUP_EPS).view_as(rewards)
        f.compare(f"grpo_video.{name}", {"advantages": own.transpose(0, 1)}, EXACT, "mixed")


def flat_flags(ended: Tensor) -> Tensor:
    """(t + 1, b, c) -> (t * c + 1, b): the flag before the first action, and those behind every one."""
    return flat(ended)[ended.shape[2] - 1:]


def _filter(f: Fixture) -> None:
    """Epochs of rollouts lie behind each other in time; they become environments."""
    given, about = f.given("filter"), f.values["filter"]
    rewards, ended = (given[k].unflatten(0, (about["rollout_epoch"], -1)).transpose(0, 1).flatten(1, 2)
                      for k in ("rewards", "dones"))
    f.compare("filter", {"merged_rewards": rewards, "merged_dones": ended}, 0.0)
    ids, chunk = torch.arange(rewards.shape[1]) // about["group_size"], rewards.shape[2]
    counted = counting(flat_flags(ended))
    for name in f.names("filter"):
        mask, lengths = (chunked(x, chunk) for x in (counted, counted.sum(0).expand(len(counted), -1)))
        if name == "chunk_level":
            mask, lengths = mask.any(-1, keepdim=True), lengths[..., -1:]
        chosen = adv.within((rewards * mask).sum((0, 2)), ids, about["lower"], about["upper"])
        f.compare(f"filter.{name}", {"loss_mask": mask & chosen[:, None], "loss_mask_sum": lengths}, 0.0)


# -- losses of chunks -------------------------------------------------------------------------------------------------

def _loss(f: Fixture, name: str) -> None:
    given, o = f.given("loss"), f.values["loss_cases"][name]
    level, log_probs = o["logprob_type"], given["logprobs"].clone().requires_grad_()
    chunk = given["advantages_action"].shape[1]

    def joined(x: Tensor) -> Tensor:
        """Log-probs (n, c * d) -> (n, c, d), (n, c) or (n,)."""
        x = x.unflatten(1, (chunk, -1))
        return x if level == "token_level" else x.sum(-1) if level == "action_level" else x.sum((1, 2))

    def wide(x: Tensor) -> Tensor:
        """(n, c) or (n, 1) for what `joined` gives."""
        return x[..., None] if level == "token_level" else x[:, 0] if level == "chunk_level" else x

    new, old, advantages = joined(log_probs), joined(given["old_logprobs"]), wide(given[o["advantages"]])
    mask = lengths = None
    if o["loss_mask"] is not None:
        mask = given["loss_mask_action"]
        mask = mask.any(-1, keepdim=True) if "any" in o["loss_mask"] else mask
    if o["loss_mask_sum"] is not None:
        lengths = given["loss_mask_sum_action"]
        lengths = lengths[:, -1:] if "-1" in o["loss_mask_sum"] else lengths
    bounds = (o["clip_log_ratio_min"], o["clip_log_ratio_max"]) if "clip_log_ratio_min" in o else None
    clip = Clip(low=o["clip_ratio_low"], high=o["clip_ratio_high"], dual=o.get("clip_ratio_c"), log_ratio=bounds)
    every = torch.ones_like(new, dtype=torch.bool) if mask is None else wide(mask).expand_as(new)
    # what the released mean sums over, in units of what it divides by
    scale = 1.0 if mask is None else new.numel() / mask.numel()

    def reduced(values: Tensor, counted: Tensor | None, at: Tensor | None, scale: float) -> Tensor:
        if at is None:
            return surrogate.reduce(values, counted, "token") * scale
        return surrogate.reduce(values, counted, "all", surrogate.length_weights(at, o["max_episode_steps"]))

    seen: dict[str, Tensor] = {}
    if o["loss_type"].startswith("decoupled"):
        policy_loss = _decoupled(given, o, new, old, advantages, clip, every, joined, level, seen)
    else:
        each = surrogate.surrogate(new, old, advantages, clip, every)
        at = None if lengths is None else wide(lengths)
        policy_loss = reduced(each, every, at, scale)
        found = surrogate.metrics(new, old, advantages, clip, every)
        part = 1.0 if level == "token_level" else scale  # ratios of tokens are averaged over tokens
        seen |= {"actor/policy_loss_abs": reduced(each.abs(), every, at, scale), "actor/ratio": found["ratio"] * part,
                 "actor/ratio_abs": found["ratio_gap"] * part, "actor/clipped_ratio": found["ratio_clipped"] * part,
                 "actor/dual_cliped_ratio": found["ratio_dual"] * part,
                 "actor/approx_kl": found["kl_k1"] * scale, "actor/clip_fraction": found["clipped"] * scale}
    seen["actor/policy_loss"], total = policy_loss, policy_loss
    values = None
    if o["values"] is not None:
        columns = slice(0, 1) if "first column" in o["values"] else slice(None)
        values, before, returns = (given[f"{k}_action"][:, columns] for k in ("values", "prev_values", "returns"))
        values = values.clone().requires_grad_()
        each = surrogate.value_loss(values, before, returns, delta=o["huber_delta"], clip=o["value_clip"])
        seen["critic/value_loss"] = reduced(each, mask, lengths, 1.0)
        total = total + seen["critic/value_loss"]
        seen |= _critic(values.detach(), before, returns, mask, o["value_clip"])
    total.backward()
    assert log_probs.grad is not None
    f.compare(f"loss.{name}", {"loss": total, "grad_logprobs": log_probs.grad}, EXACT, "mixed")
    if values is not None:
        assert values.grad is not None
        f.compare(f"loss.{name}", {"grad_values": values.grad}, EXACT, "mixed")
    for key, golden in f.values.get("loss_metrics", {}).get(name, {}).items():
        f.number(f"loss.{name}.{key}", seen[key], golden, EXACT)


def _decoupled(given: dict[str, Tensor], o: dict[str, Any], new: Tensor, old: Tensor, advantages: Tensor, clip: Clip,
               every: Tensor, joined: Any, level: str, seen: dict[str, Tensor]) -> Tensor:
    """Around a proximal policy, which is given or lies between; the version of an action is that of its first token."""
    if "proximal_logprobs" in o:
        proximal = joined(given["proximal_logprobs"])
    else:
        versions = given["versions"].unflatten(1, (given["advantages_action"].shape[1], -1))
        at = versions if level == "token_level" else versions[..., 0]
        at = at[:, 0] if level == "chunk_level" else at
        proximal = surrogate.proximal_log_prob(new, old, at, o["current_version"])
        seen |= {"actor/average_version": surrogate.reduce(at, every, "token"),
                 "actor/current_version": torch.tensor(o["current_version"])}
    weights, kept = surrogate.behaviour_weights(proximal, old, o.get("behave_weight_threshold"))
    kept = kept & every
    found = surrogate.metrics(new, proximal, advantages, clip, every)
    seen |= {"actor/proximal_ratio": found["ratio"], "actor/clipped_proximal_ratio": found["ratio_clipped"],
             "actor/clip_fraction": found["clipped"], "actor/dual_clip_fraction": found["dual"],
             "actor/behav_clip_fraction": surrogate.reduce(~kept, every, "token"),
             "actor/proximal_approx_kl": found["kl_k1"],
             "actor/behav_approx_kl": surrogate.reduce(old - proximal, kept, "token")}
    return surrogate.reduce(surrogate.surrogate(new, proximal, advantages, clip, every) * weights, kept, "token")


def _critic(values: Tensor, before: Tensor, returns: Tensor, mask: Tensor | None, extent: float) -> dict[str, Tensor]:
    """As logged: sums from which the explained variance follows, and a share of clipped values that rounding alone
    makes, since a difference is compared with its bound after it was clamped to it."""
    chosen = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand_as(values)
    moved = before + (values - before).clamp(-extent, extent)
    name, errors = "__sum__/_critic_explained_variance", (returns - values)[chosen]
    goals = returns[chosen]
    return {"critic/value_clip_ratio": ((moved - before).abs() > extent).float().mean(),
            f"{name}/count": chosen.sum(), f"{name}/returns_sum": goals.sum(),
            f"{name}/returns_sq_sum": goals.square().sum(), f"{name}/errors_sum": errors.sum(),
            f"{name}/errors_sq_sum": errors.square().sum()}


# -- texts ------------------------------------------------------------------------------------------------------------

def _texts(f: Fixture) -> None:
    given, about = f.given("text"), f.values["text"]
    mask, rewards = given["mask"], given["rewards"]
    groups = torch.arange(len(rewards)) // about["group_size"]
    per_text = adv.group_advantages(rewards, groups, unbiased=True, eps=GROUP_EPS)[:, None] * mask
    f.compare("text.grpo", {"advantages": per_text}, EXACT, "mixed")
    paid = torch.zeros_like(given["values"])
    paid[:, -1] = rewards  # at the last place, even behind the end
    values = torch.cat((given["values"], torch.zeros(len(rewards), 1)), 1)
    own = adv.gae(paid.T, values.T, torch.zeros_like(paid.T), gamma=about["gamma"], lam=about["gae_lambda"])
    f.compare("text.gae", {"advantages": own[0].T, "returns": own[1].T}, EXACT, "mixed")
    clip = Clip(low=about["clip"], high=about["clip"], dual=about["dual_clip"])
    for name in f.names("text.loss"):
        log_probs = given["logprobs"].clone().requires_grad_()
        each = surrogate.surrogate(log_probs, given["old_logprobs"], per_text, clip, mask)
        loss = surrogate.reduce(each, mask, AGGREGATIONS[name])
        loss.backward()
        assert log_probs.grad is not None
        f.compare(f"text.loss.{name}", {"loss": loss, "grad_logprobs": log_probs.grad}, EXACT, "mixed")
    kinds: tuple[surrogate.Estimator, ...] = ("k1", "k2", "k3", "abs")
    for kind in kinds:
        if f"text.kl.{kind}.output" in f.tensors:
            own = surrogate.kl(given["logprobs"], given["ref_logprobs"], kind)
            f.compare(f"text.kl.{kind}", {"": own}, EXACT, "mixed")


# -- the rest ---------------------------------------------------------------------------------------------------------

def _small(f: Fixture) -> None:
    if "logits.input.logits" in f.tensors:
        given = f.given("logits")
        f.compare("logits", {"logprobs": surrogate.token_log_probs(given["logits"], given["target"]),
                             "entropy": surrogate.entropy(given["logits"])}, EXACT, "mixed")
    if "entropy_reshape.input" in f.tensors:
        each, wanted = f.tensors["entropy_reshape.input"], f.wanted("entropy_reshape")
        actions = each.unflatten(1, (wanted["action_level"].shape[1], -1)).sum(-1)
        f.compare("entropy_reshape", {"action_level": actions, "chunk_level": actions.sum(-1)}, EXACT, "mixed")
    about = f.values.get("action_tokenizer")
    if about is None:
        return
    tokenizer = ActionTokenizer(vocabulary_size=about["vocab_size"], bins=about["bins"], low=about["min"],
                                high=about["max"])
    if "action_tokenizer.input.actions64" in f.tensors:
        ids = tokenizer.encode(f.given("action_tokenizer")["actions64"])
        f.compare("action_tokenizer", {"ids": ids}, 0.0)
        f.compare("action_tokenizer", {"decoded64": tokenizer.decode(ids)}, EXACT, "mixed")
    if "unnormalise.input.ids" in f.tensors:
        fractions = tokenizer.decode(f.given("unnormalise")["ids"])
        own = ActionRange.from_published(f.values["unnormalise"]).restore(fractions)
        f.compare("unnormalise", {"actions64": own}, EXACT, "mixed")


def _placement(f: Fixture, entry: dict[str, Any]) -> None:
    text = entry["placement"]
    try:
        own = placement.parse(text, entry["resources"])
        said: object = ([[list(s.accelerators), list(s.workers)] for s in own.segments],
                        {str(k): list(v) for k, v in own.workers.items()})
    except ValueError as error:
        said = type(error)
    golden = ERRORS[entry["error"]] if "error" in entry else (entry["rank_map"], entry["process_to_resources"])
    f.equal(f"placement.{re.sub(r'[^0-9a-z:,-]', '_', text) or 'empty'}", said, golden)
