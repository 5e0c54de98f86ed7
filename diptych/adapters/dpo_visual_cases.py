"""The golden cases of preference losses: bits of next-scale codes (VARGPT-v1.1), log-likelihoods alone, diffusion.

Batches hold winners, then losers. Options stand in the names of cases: LOSS_betaB, _smoothE, _ftxF. VARGPT divides
log-likelihoods by the number of positions, not of bits, for losses made for means, and what imitates winners once more.
"""
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.adapters.cases import Case, Fixture
from diptych.alignment.preference import (
    REFERENCE_FREE,
    Pair,
    Preference,
    code_log_prob,
    error_log_prob,
    shared,
)
from diptych.objectives.diffusion import Diffusion, scaled_linear_betas

EXACT, GRADIENT = 1e-5, 1e-4
BETA, MARGIN = 0.1, 0.5  # of the scalar cases; of simpo
BETAS = 0.00085, 0.012  # of Stable Diffusion's schedule
TURBO = 250  # steps between the four that a distilled model knows


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    f = Fixture(folder)
    if "bitwise.input.labels" in f.tensors:
        _bits(f)
    for name in f.names("scalar"):
        _scalar(f, name)
    if "diffusion.output.alphas_cumprod" in f.tensors:
        _diffusion(f)
    return f.finish()


def options(name: str) -> dict[str, Any]:
    """`sigmoid_beta0.1_ftx0.2` as the arguments of a `Preference`."""
    kind, *said = name.split("_")
    names = {"beta": "beta", "smooth": "smoothing", "ftx": "imitation"}
    found: dict[str, Any] = {"kind": kind}
    for part in said:
        word, number = re.fullmatch(r"([a-z]+)([\d.]+)", part).groups()  # type: ignore[union-attr]
        if word not in names:
            raise ValueError(f"expected options {', '.join(names)}, got {word!r}")
        found[names[word]] = float(number)
    return found


# -- bits -------------------------------------------------------------------------------------------------------------

def _bits(f: Fixture) -> None:
    given = f.given("bitwise")
    labels, bits = given["labels"], given["labels"].shape[-1]
    length = labels.shape[1]

    def log_prob(logits: Tensor, reduction: Any = "sum") -> Tensor:
        return code_log_prob(logits.unflatten(-1, (bits, 2)), labels, reduction)

    for name in f.names("bitwise"):
        if name in ("sum", "mean"):
            f.compare(f"bitwise.{name}", {"logps": log_prob(given["policy_logits"], name)}, EXACT, "relative")
            continue
        loss = Preference(**options(name), margin=MARGIN)
        logits = given["policy_logits"].clone().requires_grad_()
        scale = length if loss.normalised else 1
        own = log_prob(logits) / scale
        policy = Pair.of(own)
        reference = Pair.of(log_prob(given["reference_logits"]) / scale) if loss.needs_reference else None
        nll = -policy.chosen / length
        found = loss(policy, reference, nll)
        total = found.losses.mean()
        total.backward()
        assert logits.grad is not None
        f.compare(f"bitwise.{name}", {"loss": total}, EXACT, "relative")
        f.compare(f"bitwise.{name}", {"grad_policy_logits": logits.grad}, GRADIENT, "relative")
        seen = {"rewards/chosen": found.chosen.mean(), "rewards/rejected": found.rejected.mean(),
                "rewards/accuracies": found.accuracy, "rewards/margins": found.margin,
                "logps/chosen": policy.chosen.mean(), "logps/rejected": policy.rejected.mean(),
                "logits/chosen": logits.chunk(2)[0].mean(), "logits/rejected": logits.chunk(2)[1].mean(),
                # logged as what remains without the likelihood, which they divide once more there
                "sft_loss": nll.mean(), "odds_ratio_loss": (total - nll.mean()) / loss.beta}
        for key, golden in f.values.get("bitwise_metrics", {}).get(name, {}).items():
            f.number(f"bitwise.{name}.{key}", seen[key], golden, EXACT)
    if "bitwise.output.valid_length" in f.tensors:
        f.compare("bitwise", {"valid_length": torch.full((len(labels),), length)}, 0.0)


def _scalar(f: Fixture, name: str) -> None:
    given = f.given("scalar")
    policy, reference = (Pair(given[f"{who}_chosen"], given[f"{who}_rejected"]) for who in ("policy", "reference"))
    found = Preference(kind=name, beta=BETA, margin=MARGIN)(  # type: ignore[arg-type]
        policy, None if name in REFERENCE_FREE else reference)
    f.compare(f"scalar.{name}", {"losses": found.losses}, EXACT, "relative")
    f.compare(f"scalar.{name}", {"rewards_chosen": found.chosen, "rewards_rejected": found.rejected}, EXACT)


# -- diffusion --------------------------------------------------------------------------------------------------------

def _diffusion(f: Fixture) -> None:
    given, levels = f.given("diffusion"), f.tensors["diffusion.output.alphas_cumprod"]
    process = Diffusion(scaled_linear_betas(len(levels), *BETAS))
    data, noise = given["latents_w_then_l"], shared(given["noise"])
    f.compare("diffusion", {"alphas_cumprod": process.level}, EXACT)
    for name in f.names("diffusion"):
        if found := re.fullmatch(r"beta([\d.]+)", name):
            _denoised(f, name, float(found[1]), noise)
            continue
        if name not in ("sd15", "turbo"):
            raise ValueError(f"expected diffusion cases sd15, turbo and betaB, got {name!r}")
        k = given["timesteps_raw"]
        k = shared(k if name == "sd15" else TURBO * (k % (len(levels) // TURBO)) + TURBO - 1)
        noisy = process.add_noise(data.flatten(1), noise.flatten(1), k).view_as(data)
        f.compare(f"diffusion.{name}", {"timesteps": k}, 0.0)
        f.compare(f"diffusion.{name}", {"noisy_latents": noisy}, EXACT)


def _denoised(f: Fixture, name: str, beta: float, noise: Tensor) -> None:
    given = f.given("diffusion")
    said = given["model_pred"].clone().requires_grad_()
    errors = [(x - noise).square().flatten(1).mean(1) for x in (said, given["ref_pred"])]
    policy, reference = (Pair.of(error_log_prob(e)) for e in errors)
    found = Preference(beta=beta)(policy, reference)
    found.losses.mean().backward()
    assert said.grad is not None
    f.compare(f"diffusion.{name}", {"model_losses": errors[0], "ref_losses": errors[1]}, EXACT)
    f.compare(f"diffusion.{name}", {"inside_term": found.chosen - found.rejected, "loss": found.losses.mean(),
                                    "implicit_acc": found.accuracy}, EXACT, "relative")
    f.compare(f"diffusion.{name}", {"grad_model_pred": said.grad}, GRADIENT, "relative")
