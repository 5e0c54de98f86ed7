"""The golden cases of Flow-GRPO: stochastic steps, a rollout with its log-probs, advantages, losses and gradients of a
LoRA on Stable Diffusion 3, preference pairs, average of weights, sampler.

Published conventions: sigma 1 = noise, timestep = 1000 sigma, the network says noise - data, latents (b, c, h, w). A
released KL is smaller than the exact one by the duration of the step.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from diptych.adapters import peft, unipic2
from diptych.adapters.cases import Case, Fixture
from diptych.adapters.keys import to_ours
from diptych.adapters.tensors import Tensors, need_weights, read_json
from diptych.alignment import advantages as adv
from diptych.alignment import surrogate
from diptych.alignment.preference import Pair, Preference, error_log_prob, shared
from diptych.alignment.sampler import RepeatSampler
from diptych.objectives import flow
from diptych.parts.dit import NOISE_STEPS
from diptych.parts.dit_joint import JointDit
from diptych.parts.vision import patchify, unpatchify
from diptych.training import lora
from diptych.training.ema import Ema

EXACT, NETWORK, GRADIENT = 1e-5, 2e-4, 1e-3
STRICTER = {"cfg_kl": 1.0, "cfg_nokl": 3.0, "nocfg_kl": 0.1}  # clip range of a case in that of the config
MULTIPLE = 3  # of the samples that the advantage cases keep
DECAY, INTERVAL = 0.9, 8  # of the average of weights
CLIPPED = {"clipfrac_gt_one": "above", "clipfrac_lt_one": "below"}


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    f, c = Fixture(folder), read_json(folder / "config.json")
    learner, rollout = Policy.load(folder, c), Policy.load(folder, c, "adapter_rollout.safetensors")
    _steps(f, c)
    _advantages(f, c)
    _average(f)
    _sampler(f)
    if "rollout.output.latents" in f.tensors:
        _rollout(f, c, rollout)
    for name in f.names("grpo"):
        _grpo(f, c, name, learner)
    if "flow_dpo.output.loss" in f.tensors:
        _preferences(f, c, learner, rollout)
    return f.finish()


@dataclass
class Policy:
    """The network with a LoRA, below `root`; `places` says where every published layer of the LoRA lies."""

    root: nn.Module
    patch: int
    places: dict[str, peft.Place]
    grid: tuple[int, int] = (0, 0)

    @classmethod
    def load(cls, folder: Path, c: dict[str, Any], file: str = "adapter_model.safetensors") -> "Policy":
        config, patch = unipic2.generator_config(c["transformer"]), c["transformer"]["patch_size"]
        root = nn.Module()
        root.generator = config.build()
        rules = unipic2.generator_rules(config, patch, "")
        shapes = {k: v.shape for k, v in root.state_dict().items()}
        weights = Tensors({"": need_weights(folder, ("weights",))})
        tensors, report = to_ours(weights, rules, shapes)
        if report:
            raise ValueError(f"expected the weights of {folder} to fit, got {report}")
        root.load_state_dict(tensors)
        places = peft.attach(root, rules, folder, file)
        return cls(root, patch, places)

    def __call__(self, x: Tensor, t: Tensor, told: Tensor, pooled: Tensor) -> Tensor:
        """Tokens (b, n, d) at times t (b,) or () -> velocities data - noise."""
        rows = len(x)
        network = cast(JointDit, self.root.generator)
        return network(x, t.expand(rows).float(), told.expand(rows, -1, -1), pooled.expand(rows, -1), self.grid)

    def tokens(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, n, d)."""
        self.grid = (latents.shape[2] // self.patch, latents.shape[3] // self.patch)
        return patchify(latents, self.patch)

    def latents(self, tokens: Tensor) -> Tensor:
        return unpatchify(tokens, self.patch, self.grid)


def times_of(c: dict[str, Any], steps: int) -> list[float]:
    """The times of a run as the scheduler makes them, whose smallest noise level is shifted twice."""
    shift = c["scheduler"]["shift"]
    smallest = shift / (c["scheduler"]["num_train_timesteps"] + shift - 1)
    return flow.schedule(steps, shift, end=1 - smallest)


# -- steps ------------------------------------------------------------------------------------------------------------

def _steps(f: Fixture, c: dict[str, Any]) -> None:
    """Rows of one case stand at different steps."""
    if "step.sigmas" not in f.tensors:
        return
    times = times_of(c, len(f.tensors["step.timesteps"]))
    levels = 1 - torch.tensor(times, dtype=torch.float64)
    f.same("step.sigmas", levels, EXACT)
    f.same("step.timesteps", levels[:-1] * NOISE_STEPS, EXACT, "relative")
    for name in f.names("step"):
        given = f.given(f"step.{name}")
        found = re.fullmatch(r"noise_level_([\d.]+)\.idx_(\d+(?:_\d+)*)", name)
        sample, v = given["sample"].flatten(1, 2), -given["model_output"].flatten(1, 2)
        shape = given["sample"].shape
        if found is None:  # the plain step; its index is that of its time
            at = int((levels[:-1] * NOISE_STEPS - given["timestep"][0]).abs().argmin())
            own = flow.euler_step(sample, v, times[at], times[at + 1])
            f.compare(f"step.{name}", {"prev_sample": own.view(shape)}, EXACT)
            continue
        index = [int(i) for i in found[2].split("_")]
        t, to = (torch.tensor([times[i + k] for i in index], dtype=torch.float64)[:, None, None] for k in (0, 1))
        v = v.requires_grad_()
        step = flow.sde_step(sample, v, t, to, float(found[1]), times[1])
        state = step.at(given["noise"].flatten(1, 2))
        other = step.log_prob(given["other_prev_sample"].flatten(1, 2))
        gradient = -torch.autograd.grad(other.sum(), v)[0]  # of their velocity, which points to noise
        f.compare(f"step.{name}", {
            "prev_sample": state.view(shape), "prev_sample_mean": step.mean.view(shape),
            "std_dev_t": (torch.as_tensor(step.std) / (to - t).sqrt())[..., None], "log_prob": step.log_prob(state),
            "grad_model_output_of_log_prob_of_other": gradient.view(shape)}, EXACT)
        f.compare(f"step.{name}", {"log_prob_of_other": other}, EXACT, "mixed")  # tens where the noise ends


# -- advantages, averages, sampler ------------------------------------------------------------------------------------

def _advantages(f: Fixture, c: dict[str, Any]) -> None:
    if "advantage.input.rewards" not in f.tensors:
        return
    given = f.given("advantage")
    rewards, ids = given["rewards"], given["prompt_ids"]
    plain: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "type_sft": adv.best_of_group, "type_rwr": lambda r, _: r,
        "type_dpo": lambda r, i: adv.best_and_worst(r, i, variant="released")}
    for name in f.names("advantage"):
        if name in plain:
            f.compare(f"advantage.{name}", {"advantages": plain[name](rewards, ids)}, EXACT)
            continue
        own = adv.group_advantages(rewards, ids, spread="batch" if name == "global_std" else "group")
        chosen, groups = adv.keep(own, MULTIPLE, torch.Generator().manual_seed(0)), adv.by_group(rewards, ids)
        f.compare(f"advantage.{name}", {
            "advantages": own, "keep_mask": chosen, "kept_indices": torch.nonzero(chosen).flatten(),
            "zero_std_ratio": groups.zero_std_share, "reward_std_mean": groups.std.mean()}, EXACT)


def _average(f: Fixture) -> None:
    if "ema.output.ema_0_final" not in f.tensors:
        return
    given, module = f.given("ema"), nn.Module()
    count = sum(k.startswith("start_") for k in given)
    for i in range(count):
        module.register_parameter(f"p{i}", nn.Parameter(given[f"start_{i}"].clone()))
    own = Ema(module, [f"p{i}" for i in range(count)], DECAY, INTERVAL)
    history: dict[int, list[Tensor]] = {i: [] for i in range(count)}
    for step in range(len(given["deltas_0"])):
        with torch.no_grad():
            for i in range(count):
                module.get_parameter(f"p{i}").add_(0.1 * given[f"deltas_{i}"][step])
        own.update(step)
        for i in range(count):
            history[i].append(own.shadow[f"p{i}"].clone())
    for name in f.wanted("ema"):
        i, what = re.fullmatch(r"ema_(\d+)_(final|history)", name).groups()  # type: ignore[union-attr]
        states = torch.stack(history[int(i)])
        f.compare("ema", {name: states[-1] if what == "final" else states}, EXACT)


def _sampler(f: Fixture) -> None:
    about = f.values.get("k_repeat_sampler")
    if about is None:
        return
    a = about["args"]
    own = RepeatSampler(count=a["dataset_len"], batch=a["batch_size"], repeats=a["k"], processes=a["num_replicas"],
                        seed=a["seed"])
    for output in about["outputs"]:
        dealt = [own.indices(output["epoch"], rank) for rank in range(a["num_replicas"])]
        f.equal(f"k_repeat_sampler.epoch_{output['epoch']}", dealt, output["indices_per_rank"])


# -- the network ------------------------------------------------------------------------------------------------------

def _guided(c: dict[str, Any], text: Tensor, blank: Tensor) -> Tensor:
    return blank + c["guidance_scale"] * (text - blank)


@torch.no_grad()
def _rollout(f: Fixture, c: dict[str, Any], policy: Policy) -> None:
    given, steps = f.given("rollout"), f.tensors["rollout.output.log_probs"].shape[1]
    times = times_of(c, steps)
    x = plain = policy.tokens(given["initial_latents"])
    states, log_probs, said = [x], list[Tensor](), list[tuple[Tensor, Tensor]]()

    def answers(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        at = torch.tensor(t)
        return (policy(x, at, given["negative_prompt_embeds"], given["negative_pooled_prompt_embeds"]),
                policy(x, at, given["prompt_embeds"], given["pooled_prompt_embeds"]))

    for j, (t, to) in enumerate(pairwise(times)):
        said.append(answers(x, t))
        step = flow.sde_step(x, _guided(c, said[-1][1], said[-1][0]), t, to, c["noise_level"], times[1])
        x = step.at(policy.tokens(given["noise"][:, j]))
        log_probs.append(step.log_prob(x))
        states.append(x)
        blank, text = answers(plain, t)
        plain = flow.euler_step(plain, _guided(c, text, blank), t, to)
    blank, text = (-torch.stack([policy.latents(pair[k]) for pair in said], 1) for k in (0, 1))
    levels = 1 - torch.tensor(times[:-1], dtype=torch.float64)
    f.compare("rollout", {"timesteps": levels * NOISE_STEPS}, EXACT, "relative")
    f.compare("rollout", {"latents": torch.stack([policy.latents(s) for s in states], 1),
                          "log_probs": torch.stack(log_probs, 1), "velocity_uncond": blank, "velocity_text": text,
                          "ode_final_latents": policy.latents(plain)}, NETWORK)


def _grpo(f: Fixture, c: dict[str, Any], name: str, policy: Policy) -> None:
    """Losses of every step that is trained; the branch without text is not."""
    given, rollout, wanted = f.given("rollout"), f.wanted("rollout"), f.wanted(f"grpo.{name}")
    guided, beta = not name.startswith("nocfg"), 0.0 if name.endswith("nokl") else c["beta"]
    extent = c["clip_range"] * STRICTER[name]
    clip = surrogate.Clip(low=extent, high=extent)
    times = times_of(c, rollout["log_probs"].shape[1])
    old = rollout["log_probs"] if guided else f.tensors[f"grpo.{name}.input.log_probs_old"]
    advantages = f.tensors["grpo.input.advantages"].clamp(-c["adv_clip_max"], c["adv_clip_max"])
    gathered: dict[str, list[Tensor]] = {}
    policy.root.zero_grad()
    for j in range(wanted["log_prob"].shape[1]):
        x, state = (policy.tokens(rollout["latents"][:, j + k]) for k in (0, 1))
        t, to = times[j], times[j + 1]

        def step(x: Tensor = x, t: float = t, to: float = to) -> flow.Transition:
            at = torch.tensor(t)
            v = policy(x, at, given["prompt_embeds"], given["pooled_prompt_embeds"])
            if guided:
                blank = policy(x, at, given["negative_prompt_embeds"], given["negative_pooled_prompt_embeds"])
                v = _guided(c, v, blank.detach())
            return flow.sde_step(x, v, t, to, c["noise_level"], times[1])

        now = step()
        log_prob = now.log_prob(state)
        told = (log_prob, old[:, j], advantages[:, j], clip)
        seen = surrogate.metrics(*told)
        loss = policy_loss = surrogate.reduce(surrogate.surrogate(*told), None, "token")
        own = {"policy_loss": policy_loss, "prev_sample_mean": policy.latents(now.mean), "log_prob": log_prob,
               "approx_kl": seen["kl_k2"], "clipfrac": seen["above"] + seen["below"]}
        own |= {theirs: seen[ours] for theirs, ours in CLIPPED.items()}
        if beta:
            with torch.no_grad(), lora.inactive(policy.root):
                reference = step()
            kl_loss = surrogate.flow_kl(now, reference, to - t, "released").mean()
            loss = policy_loss + beta * kl_loss
            own |= {"kl_loss": kl_loss, "prev_sample_mean_ref": policy.latents(reference.mean)}
        loss.backward()
        for key, value in (own | {"loss": loss}).items():
            gathered.setdefault(key, []).append(value.detach())
    per_sample = {"log_prob", "prev_sample_mean", "prev_sample_mean_ref"}
    f.compare(f"grpo.{name}", {k: torch.stack(v, int(k in per_sample)) for k, v in gathered.items()}, NETWORK)
    found = peft.gradients(policy.root, policy.places)
    f.compare(f"grpo.{name}", {k: found[k.removeprefix("grad_sum.")] for k in wanted if k.startswith("grad_sum.")},
              GRADIENT, "relative")
    norm = torch.stack([g.norm() for g in found.values()]).norm()
    f.compare(f"grpo.{name}", {"grad_norm_all_lora": norm}, GRADIENT, "relative")


def _preferences(f: Fixture, c: dict[str, Any], policy: Policy, reference: Policy) -> None:
    """Winners before losers; a small u is much noise."""
    given, rollout = f.given("flow_dpo"), f.given("rollout")
    data = policy.tokens(given["latents_w_then_l"])
    half = len(data) // 2
    noise = shared(policy.tokens(given["noise"]))
    scheduler = c["scheduler"]
    t = flow.shift_time(flow.grid_time(given["u"], scheduler["num_train_timesteps"]), scheduler["shift"])
    t, told = shared(t), [shared(rollout[k][:half]) for k in ("prompt_embeds", "pooled_prompt_embeds")]
    x = flow.interpolate(data, noise, t[:, None, None])
    policy.root.zero_grad()
    reference.grid = policy.grid
    said = policy(x, t, *told)
    with torch.no_grad():
        before = reference(x, t, *told)
    errors = [flow.squared_error(v, data, noise).mean(-1) for v in (said, before)]
    own, former = (Pair.of(error_log_prob(e)) for e in errors)
    found = Preference(beta=c["dpo_beta"])(own, former)
    found.losses.mean().backward()
    wanted, gradients = f.wanted("flow_dpo"), peft.gradients(policy.root, policy.places)
    f.compare("flow_dpo", {"timesteps": (1 - t) * NOISE_STEPS}, EXACT, "relative")
    f.compare("flow_dpo", {
        "sigma": 1 - t, "noisy_model_input": policy.latents(x), "model_pred": -policy.latents(said),
        "model_pred_ref": -policy.latents(before), "theta_mse": errors[0], "ref_mse": errors[1],
        "inside_term": found.chosen - found.rejected, "loss": found.losses.mean(), "implicit_acc": found.accuracy},
        NETWORK)
    f.compare("flow_dpo", {k: gradients[k.removeprefix("grad.")] for k in wanted if k.startswith("grad.")}, GRADIENT,
              "relative")
