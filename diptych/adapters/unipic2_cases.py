"""The golden cases of UniPic 2.0: transformer, connector, conditions of texts and pictures, sampling from given ones.

Published conventions: sigma 1 = noise, timestep = 1000 sigma, the network says noise - data, latents (b, c, h, w). In
every pair of rows the first is the prompt, the second the negative one.
"""
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from diptych.adapters import qwen_vl, unipic2
from diptych.adapters.cases import Case
from diptych.adapters.serial_cases import SAMPLED, Golden, drawn, run, velocity
from diptych.objectives import flow
from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.dit import NOISE_STEPS
from diptych.parts.dit_joint import JointDitConfig
from diptych.parts.dit_stream import Reference
from diptych.parts.interleave import Page
from diptych.parts.trunks import pick
from diptych.parts.vae import AutoEncoder
from diptych.parts.vision import patchify, unpatchify
from diptych.systems.unipic2 import UniPic2


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    return run(unipic2.load(folder), folder, KINDS)


def conditions(prompts: Tensor, pooled: Tensor) -> Tensor:
    """Published embeddings (b, q, c) and (b, p) as the connector says them."""
    return torch.cat((prompts, pooled[:, None].expand(-1, prompts.shape[1], -1)), -1)


def said(model: UniPic2, condition: Tensor) -> dict[str, Tensor]:
    """The way back."""
    own = cast(JointDitConfig, model.config.generator)
    prompts, pooled = condition.split((own.condition_width, own.pooled_width), -1)
    return {"prompt_embeds": prompts, "pooled": pooled[:, 0]}


@torch.no_grad()
def _transformer(model: UniPic2, g: Golden) -> None:
    told = conditions(g.given["prompt_embeds"], g.given["pooled"])
    g.compare(velocity=velocity(model, g.given["latents"], g.given["timestep"], told,
                                reference=g.given.get("ref_latents")))


@torch.no_grad()
def _conditioner(model: UniPic2, g: Golden) -> None:
    g.compare_all(said(model, model.connector_out(g.given["hidden_states"])))


@torch.no_grad()
def _queries(model: UniPic2, g: Golden) -> None:
    """Rows with or without pictures; one set of patches serves all rows where there is only one."""
    features, grids, pending = None, g.grids, g.grids
    if grids:
        patches, count = g.given["pixel_values"], sum(rows * columns for rows, columns in grids)
        features = model.vision(patches.repeat(count // len(patches), 1), grids)
        g.compare(image_embeds=features)
    writers, picture = [], g.values["qwen2_5_vl"]["image_token_id"]
    for ids in g.rows():
        own = [pending.pop(0) for _ in range(qwen_vl.count_pictures(model, ids, picture))]
        writers.append(qwen_vl.write(model, ids, picture, own))
        model.write_drawn(writers[-1], 0, (1, 1))
    page = Page.of([[w] for w in writers])
    hidden = model.trunk(model.states(page, features, model.blank(len(writers))), page.tokens, model.mask)
    states = pick(hidden, page.tokens, page.questions).unflatten(0, (len(writers), -1))
    g.compare_all({"query_states": states} | said(model, model.conditions(hidden, page)[0]))
    mask = torch.cat((g.given["attention_mask"], torch.ones(len(writers), model.config.queries)), 1).bool()
    own = page.tokens.position[page.tokens.valid()].T
    g.cases.append(Case.compare(f"{g.name}.position_ids", own, g.wanted["position_ids"][:, mask], 0.0))


@torch.no_grad()
def _pipeline(model: UniPic2, g: Golden) -> None:
    codec, patch, noise = cast(AutoEncoder, model.codec), model.config.latent_patch, g.given["noise"]
    grid = (noise.shape[2] // patch, noise.shape[3] // patch)
    references = list[Reference]()
    if "image_uint8" in g.given:
        pixels = g.given["image_uint8"].permute(2, 0, 1).float() / 255 * 2 - 1
        mean, logvar = codec.encode(pixels[None])
        [tokens] = model.encode([pixels], list(patchify(g.given["posterior_noise"], patch)))
        g.compare(ref_mean=mean, ref_std=torch.exp(0.5 * logvar), ref_latents=unpatchify(tokens[None], patch, grid))
        references = [(tokens, grid)]
    sampling = replace(model.config.sampling, evaluations=int(g.given["num_inference_steps"]),
                       guidance=Guidance(branches=(Branch(context="no_text", scale=g.given["guidance_scale"].item()),)))
    full, negative = conditions(g.given["prompt_embeds"], g.given["pooled"])
    x = drawn(model, patchify(noise, patch)[0], grid, {"full": full, "no_text": negative}, sampling, references)
    times = flow.schedule(sampling.evaluations, sampling.shift, sampling.start, sampling.end)
    levels = 1 - torch.tensor(times, dtype=torch.float64)
    latents = unpatchify(x[None], patch, grid)
    g.compare(sigmas=levels, timesteps=levels[:-1] * NOISE_STEPS)
    g.compare(SAMPLED, latents=latents, decoded=codec.decode(latents))


KINDS: dict[str, Callable[[UniPic2, Golden], None]] = {
    "transformer": _transformer, "conditioner": _conditioner, "mq": _queries, "pipeline": _pipeline,
}
