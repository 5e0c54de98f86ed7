"""The golden cases of MetaQuery: codec, connector, generator, conditions of texts and pictures, loss, sampling.

Published conventions: sigma 1 = noise, timestep = 1000 sigma, the network says noise - data, latents (b, c, h, w).
"""
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from diptych.adapters import metaquery, qwen_vl
from diptych.adapters.cases import Case
from diptych.adapters.keys import to_theirs
from diptych.adapters.serial_cases import SAMPLED, Golden, drawn, read, run, velocity
from diptych.objectives import flow
from diptych.parts.interleave import Page, Writer
from diptych.parts.serial import StateConnector
from diptych.parts.trunks import pick
from diptych.parts.vision import patchify, unpatchify
from diptych.systems.metaquery import MetaQuery
from diptych.systems.works import Develop, Grid, Reader


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    return run(metaquery.load(folder), folder, KINDS)


# -- parts -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def _vae(model: MetaQuery, g: Golden) -> None:
    g.compare(latents=model.codec.latent(g.given["pixels"]), decoded=model.codec.decode(g.wanted["latents"]))


@torch.no_grad()
def _connector(model: MetaQuery, g: Golden) -> None:
    states, connector = g.given["hidden_states"], cast(StateConnector, model.connector_out)
    g.compare(encoder=connector.encoder(states), condition=connector(states))


@torch.no_grad()
def _dit(model: MetaQuery, g: Golden) -> None:
    visible = g.given["attention_mask"].bool()
    g.compare(velocity=velocity(model, g.given["latents"], g.given["timestep"], g.given["condition"], visible))


# -- conditions --------------------------------------------------------------------------------------------------------

def _prompt(model: MetaQuery, g: Golden, ids: Sequence[int], grids: list[Grid]) -> Writer:
    """What stands in front of the queries; it takes its pictures from the front of `grids`."""
    before = ids[:ids.index(g.values["metaquery"]["boi_token_id"])]
    picture = g.values["qwen2_5_vl"]["image_token_id"]
    own = [grids.pop(0) for _ in range(qwen_vl.count_pictures(model, before, picture))]
    return qwen_vl.write(model, before, picture, own)


def _features(model: MetaQuery, g: Golden) -> Tensor | None:
    return model.vision(g.given["pixel_values"], g.grids) if g.grids else None


def _conditions(model: MetaQuery, g: Golden) -> tuple[Page, Tensor, Tensor]:
    """The page of all rows, states of the queries, and conditions."""
    grids = g.grids
    writers = [_prompt(model, g, ids, grids) for ids in g.rows()]
    for w in writers:
        model.write_drawn(w, 0, (1, 1))
    page = Page.of([[w] for w in writers])
    states = model.states(page, _features(model, g), model.blank(len(writers)))
    hidden = model.trunk(states, page.tokens, model.mask)
    queries = pick(hidden, page.tokens, page.questions).unflatten(0, (len(writers), -1))
    return page, queries, model.conditions(hidden, page)[0]


@torch.no_grad()
def _condition_text(model: MetaQuery, g: Golden) -> None:
    _, queries, condition = _conditions(model, g)
    g.compare(query_states=queries, condition=condition, attention_mask=torch.ones(condition.shape[:2]))


@torch.no_grad()
def _condition_image(model: MetaQuery, g: Golden) -> None:
    page, _, condition = _conditions(model, g)
    features = _features(model, g)
    assert features is not None
    g.compare(image_embeds=features, condition=condition)
    wanted, own = [], []
    for b, mask in enumerate(g.given["attention_mask"].bool()):
        count = int(page.tokens.valid()[b].sum())  # what follows the queries is not written
        wanted.append(g.wanted["position_ids"][:, b, mask][:, :count])
        own.append(page.tokens.position[b, :count].T)
    g.cases.append(Case.compare(f"{g.name}.position_ids", torch.cat(own, 1), torch.cat(wanted, 1), 0.0))


# -- training and sampling ---------------------------------------------------------------------------------------------

def _flow_loss(model: MetaQuery, g: Golden) -> None:
    steps, patch = model.config.noise_steps, model.config.latent_patch
    latents, noise = model.codec.latent(g.given["pixels"]), g.given["noise"]
    t = flow.grid_time(g.given["u"], steps)
    x = flow.interpolate(latents, noise, t[:, None, None, None])
    condition = _conditions(model, g)[2]
    grid = (x.shape[2] // patch, x.shape[3] // patch)
    v = model.generator(patchify(x, patch), t, condition, grid)
    loss = flow.squared_error(v, patchify(latents, patch), patchify(noise, patch)).mean()
    g.compare(timestep=((1 - t) * steps).round(), noisy_latents=x, condition=condition, loss=loss,
              velocity=-unpatchify(v, patch, grid))
    model.zero_grad()
    loss.backward()
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    theirs = to_theirs(own, [r for r in metaquery.rules(model.config) if r.ours in own])
    named = {f"grad.{k.removeprefix('model.')}": v for k, v in theirs.items()}
    key = "grad.embed_tokens_new_rows"
    rows = torch.tensor(metaquery.query_rows(g.values))  # the end of the block, which nothing sees, keeps zeros
    table = torch.zeros(int(rows.max()) + 1, model.queries.shape[1]).index_copy(0, rows, own["queries"])
    named[key] = table[-len(g.wanted[key]):]
    g.compare_all({k: named[k] for k in g.wanted if k.startswith("grad.")})
    model.zero_grad()


@torch.no_grad()
def _sample(model: MetaQuery, g: Golden) -> None:
    """Rows from the unguided one to the full one."""
    text, image = g.given["guidance_scale"].item(), g.given["image_guidance_scale"].item()
    grids, patches = g.grids, g.given.get("pixel_values", torch.zeros(0))
    names = ["no_image", "no_text", "full"][-len(g.rows()):]
    contexts = {name: Reader() for name in names}
    for reader, ids in zip(contexts.values(), g.rows(), strict=True):
        before = list(grids)
        w = _prompt(model, g, ids, grids)
        own = before[:len(before) - len(grids)]
        count = sum(rows * columns for rows, columns in own)
        read(model, reader, w, model.vision(patches[:count], own) if own else None)
        patches = patches[count:]
    sampling = replace(model.config.sampling, evaluations=int(g.given["num_inference_steps"]),
                       guidance=metaquery.guidance(text, image if "no_image" in contexts else 1.0))
    patch, noise = model.config.latent_patch, g.given["noise"]
    grid = (noise.shape[2] // patch, noise.shape[3] // patch)
    told = dict(zip(contexts, model.run([model.ask(reader) for reader in contexts.values()]), strict=True))
    x = drawn(model, patchify(noise, patch)[0], grid, told, sampling)
    times = flow.schedule(sampling.evaluations, sampling.shift, sampling.start)
    steps = model.config.noise_steps
    g.compare(timesteps=torch.tensor([round((1 - model.level(t)) * steps) for t in times[:-1]]),
              sigmas=1 - torch.tensor(times))
    pixels = model.run([Develop(x, grid)])[0] / 2 + 0.5
    g.compare(SAMPLED, latents=unpatchify(x[None], patch, grid), pixels=pixels[None])


KINDS: dict[str, Callable[[MetaQuery, Golden], None]] = {
    "condition_text": _condition_text, "condition_image": _condition_image, "connector": _connector, "dit": _dit,
    "flow_loss": _flow_loss, "sample": _sample, "vae": _vae,
}
