"""The golden cases of SRUM: reward maps, the weighted flow-matching loss with its gradients, the published readers of
judgements, boxes and records.

Published convention: time 1 = noise, velocity = noise - data. Here both are turned round.
"""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters import srum
from diptych.adapters.cases import Case
from diptych.alignment import reward_map
from diptych.alignment.reward_map import token_map, weighted_loss
from diptych.alignment.self_reward import Reply, published_overall, published_regions
from diptych.objectives import flow
from diptych.parts.vision import patchify

TOLERANCE = 1e-5
TEXTS = ("parse_regions", "parse_global", "boxes", "format")


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder."""
    about = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "golden.safetensors")
    foreign = sorted(set(about) - {"maps", "loss", *TEXTS})
    if foreign:
        raise ValueError(f"expected golden cases maps, loss, {', '.join(TEXTS)}, got {foreign[0]!r}")
    maps = {name: _map(row) for name, row in about.get("maps", {}).items()}
    cases = [Case.compare(f"map.{name}", own, tensors[f"map.{name}.output.reward_map"], TOLERANCE)
             for name, own in maps.items()]
    if "loss" in about:
        cases += _loss(about["loss"], tensors, maps)
    for kind in TEXTS:
        cases += _TEXTS[kind](about[kind]) if kind in about else []
    return cases


def _map(row: Mapping[str, Any]) -> Tensor:
    width, height = row["image_size_wh"]
    regions = srum.regions(row["vlm_rewards"], (height, width))
    return reward_map.reward_map(regions, row["global_score"], (height, width))


# -- the loss ---------------------------------------------------------------------------------------------------------

def _loss(about: Mapping[str, Any], tensors: Mapping[str, Tensor], maps: Mapping[str, Tensor]) -> list[Case]:
    given = {k.removeprefix("loss.input."): v for k, v in tensors.items() if k.startswith("loss.input.")}
    patch, grids = about["latent_patch_size"], about["patch_grid_hw"]
    data, reference = (torch.cat([patchify(x[None, :, :h * patch, :w * patch], patch)[0]
                                  for x, (h, w) in zip(given[name], grids, strict=True)])
                       for name in ("latents", "reference_latents"))
    noise = given["noise"]
    t = flow.shift_time(1 - torch.sigmoid(given["timestep_logits"]), about["timestep_shift"])
    weights = torch.cat([token_map(maps[name], (h, w))
                         for name, (h, w) in zip(about["map_case_of_each_image"], grids, strict=True)])
    own = {"timesteps": 1 - t, "clean_tokens": data, "token_rewards": weights,
           "noisy_tokens": flow.interpolate(data, noise, t[:, None])}
    cases = [Case.compare(f"loss.{k}", v, tensors[f"loss.output.{k}"], TOLERANCE) for k, v in own.items()]
    noised = t < 1
    for name in sorted({k.split(".")[1] for k in tensors if k.startswith("loss.") and k.count(".") == 3}):
        velocity = -given["v_theta"].clone().requires_grad_(True)
        apart = reference[noised] if name == "separate_reference" else None
        found = weighted_loss(velocity, data[noised], noise[noised], None if name == "no_map" else weights[noised],
                              about["lambda_constraint"], apart)
        [gradient] = torch.autograd.grad(found.total, velocity)
        made = {"mse": found.total, "loss_reward": found.reward, "loss_constraint": found.reference,
                "grad_v_theta": -gradient}
        wanted = [k.rpartition(".")[2] for k in tensors if k.startswith(f"loss.{name}.output.")]
        cases += [Case.compare(f"loss.{name}.{k}", made[k].detach(), tensors[f"loss.{name}.output.{k}"], TOLERANCE)
                  for k in wanted]
    return cases


# -- texts ------------------------------------------------------------------------------------------------------------

def _exact(name: str, own: Any, golden: Any) -> Case:
    wrong = float(own != golden)
    return Case(name, wrong, wrong, 0.0)


def _named(reply: Reply | None, names: tuple[str, str, str]) -> dict[str, Any]:
    values = () if reply is None else (reply.name, reply.score, reply.reason)
    return {n: v for n, v in zip(names, values, strict=False) if v is not None}


def _regions(rows: list[dict[str, Any]]) -> list[Case]:
    names = ("identified_object", "score", "reason")
    found = [{str(n): _named(r, names) for n, r in published_regions(row["text"]).items()} for row in rows]
    return [_exact(f"parse_regions.{n}", own, row["output"])
            for n, (own, row) in enumerate(zip(found, rows, strict=True))]


def _overall(rows: list[dict[str, Any]]) -> list[Case]:
    names = ("layout_analysis", "global_layout_score", "reason")
    return [_exact(f"parse_global.{n}", _named(published_overall(row["text"]), names), row["output"])
            for n, row in enumerate(rows)]


def _boxes(row: dict[str, Any]) -> list[Case]:
    return [_exact("boxes", srum.proposals(row["masks"]), row["output"])]


def _format(rows: list[dict[str, Any]]) -> list[Case]:
    return [_exact(f"format.{n}", srum.formatted(row["record"], row["prompts"]), row["output"])
            for n, row in enumerate(rows)]


_TEXTS = {"parse_regions": _regions, "parse_global": _overall, "boxes": _boxes, "format": _format}
