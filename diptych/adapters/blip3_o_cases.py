"""The golden cases of BLIP3-o: generator, tower, loss with dropped conditions and read pictures, sampling, generation.

Published conventions: sigma 1 = noise, timestep = 1000 sigma, the network says noise - data, features (b, c, h, w).
"""
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.adapters import blip3_o, qwen_vl
from diptych.adapters.cases import Case
from diptych.adapters.keys import to_theirs
from diptych.adapters.serial_cases import SAMPLED, Golden, drawn, read, run, velocity
from diptych.objectives import flow
from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.feature_codec import FeatureCodec
from diptych.parts.interleave import Page
from diptych.parts.vision import patchify, unpatchify
from diptych.systems.base import Sampling
from diptych.systems.blip3_o import Blip3o
from diptych.systems.works import Reader

PATCHES = ("und_pixel_values", "pixel_values")
GRADIENTS = {"gate0": "model.dit.model.layers.0.gate", "patch_embedder": "model.dit.model.patch_embedder.proj.weight",
             "latent_queries": "model.latent_queries"}


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    return run(blip3_o.load(folder), folder, KINDS)


@torch.no_grad()
def _dit(model: Blip3o, g: Golden) -> None:
    """Variations of the first case: what they do not say is as there."""
    first = Golden("dit", g.tensors, g.values).given
    x = g.given.get("x", first["x"])
    timestep, condition = (g.given.get(k, first[k])[: len(x)] for k in ("timestep", "condition"))
    condition = torch.zeros_like(condition) if g.name.endswith("_null") else condition
    g.compare(velocity=velocity(model, x, timestep, condition))


@torch.no_grad()
def _eva(model: Blip3o, g: Golden) -> None:
    """The fixture gives pixels as the tower wants them."""
    features, pooled = _targets(model, g.given["pixels"])
    g.compare(features=features.flatten(2).transpose(1, 2), pooled=pooled)


def _targets(model: Blip3o, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of normalised pixels, (b, c, rows, columns), as they are and pooled."""
    codec = cast(FeatureCodec, model.codec)
    features = codec.tower(pixels)
    return features, F.avg_pool2d(features, codec.config.pool)


def _features(model: Blip3o, g: Golden) -> Tensor | None:
    patches = next((g.given[k] for k in PATCHES if k in g.given), None)
    return None if patches is None else model.vision(patches, g.grids)


def _flow_loss(model: Blip3o, g: Golden) -> None:
    picture, steps, grids = g.values["image_token_id"], model.config.noise_steps, g.grids
    writers = []
    for ids, first in zip(g.given["input_ids"].tolist(), g.given["i_s_pos"].tolist(), strict=True):
        before = ids[: first - 1]  # the start of the image belongs to the block
        count = qwen_vl.count_pictures(model, before, picture)
        writers.append(qwen_vl.write(model, before, picture, [grids.pop(0) for _ in range(count)]))
        model.write_drawn(writers[-1], 0, (1, 1))
    page = Page.of([[w] for w in writers])
    hidden = model.trunk(model.states(page, _features(model, g), model.blank(len(writers))), page.tokens, model.mask)
    condition = model.conditions(hidden, page)[0].masked_fill(g.given["drop"].bool()[:, None, None], 0.0)
    with torch.no_grad():
        data = _targets(model, g.given["gen_image"])[1]
    t, noise = flow.grid_time(g.given["u"], steps), g.given["noise"]
    x = flow.interpolate(data, noise, t[:, None, None, None])
    timestep = ((1 - t) * steps).round()
    v = velocity(model, x, timestep, condition)
    loss = flow.squared_error(patchify(-v, 1), patchify(data, 1), patchify(noise, 1)).mean()
    g.compare(timestep=timestep, noisy=x, condition=condition, velocity=v, loss=loss)
    model.zero_grad()
    loss.backward()
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    theirs = to_theirs(own, [r for r in blip3_o.rules(model.config) if r.ours in own])
    g.compare_all({k: theirs[GRADIENTS[k.removeprefix("grad.")]] for k in g.wanted if k.startswith("grad.")})
    model.zero_grad()


def _sampling(model: Blip3o, steps: int, scale: float) -> Sampling:
    return replace(model.config.sampling, evaluations=steps,
                   guidance=Guidance(branches=(Branch(context="no_text", scale=scale),)))


@torch.no_grad()
def _sample_images(model: Blip3o, g: Golden) -> None:
    condition, noise = g.given["condition"][0], g.given["noise"]
    grid = (noise.shape[2], noise.shape[3])
    sampling = _sampling(model, int(g.given["num_inference_steps"]), g.given["guidance_scale"].item())
    told = {"full": condition, "no_text": torch.zeros_like(condition)}
    x = drawn(model, patchify(noise, 1)[0], grid, told, sampling)
    times = flow.schedule(sampling.evaluations)
    steps = model.config.noise_steps
    levels = 1 - torch.tensor(times)  # timesteps as scheduled: the network is told their whole part
    g.compare(sigmas=levels, timesteps=levels[:-1] * steps)
    g.compare(SAMPLED, latents=unpatchify(x[None], 1, grid))


@torch.no_grad()
def _generate(model: Blip3o, g: Golden) -> None:
    """Thirty steps at scale 3, as the release generates; the ids come without the start of the image."""
    ids, noise = g.given["input_ids"][0].tolist(), g.given["noise"]
    reader, grid = Reader(), (noise.shape[2], noise.shape[3])
    read(model, reader, qwen_vl.write(model, ids, g.values["image_token_id"], g.grids), _features(model, g))
    condition = model.run([model.ask(reader)])[0]
    x = drawn(model, patchify(noise, 1)[0], grid, {"full": condition, "no_text": torch.zeros_like(condition)},
              model.config.sampling)
    g.compare(condition=condition[None])
    g.compare(SAMPLED, features=x[None])


KINDS: dict[str, Callable[[Blip3o, Golden], None]] = {
    "dit": _dit, "eva": _eva, "flow_loss": _flow_loss, "sample_images": _sample_images, "generate": _generate,
}
