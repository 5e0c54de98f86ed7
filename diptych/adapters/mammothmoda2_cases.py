"""The golden cases of MammothModa2: language model, queries, renderer, loss, planning, conditions, sampling.

Published rows are ids of one vocabulary, the codes behind the words; latents are (b, c, h, w). A prompt ends with ten
tokens that open the answer, which alone the branch without text sees.
"""
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diptych.adapters import mammothmoda2, qwen_vl
from diptych.adapters.cases import Case
from diptych.adapters.serial_cases import SAMPLED, Golden, run
from diptych.objectives import flow
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.dit_stream import Reference, axis_angles, condition_places, picture_places
from diptych.parts.grammar import Grammar
from diptych.parts.interleave import UNDERSTAND, Page, Writer
from diptych.parts.trunks import pick
from diptych.parts.vae import AutoEncoder
from diptych.parts.vision import Grid, patchify, unpatchify
from diptych.systems.base import Sampling
from diptych.systems.mammothmoda2 import MammothModa2
from diptych.systems.works import Read, Reader

OPENING = 10  # the tokens of a prompt that open the answer
SHIFTS: dict[str, flow.Shift] = {"v1": "linear", "v2": "root", "noshift": 1.0}


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    return run(mammothmoda2.load(folder), folder, KINDS)


# -- language model ----------------------------------------------------------------------------------------------------

def written(model: MammothModa2, ids: Sequence[int]) -> Writer:
    """Ids of words and of codes, as they come."""
    w, first = model.writer(Reader()), model.config.vocabulary_size
    for code, part in groupby(ids, lambda i: i >= first):
        if code:
            w.code(0, list(part), drawn=False)
        else:
            w.text(list(part), open=False, close=False)
    return w


def valid(page: Page, states: list[Tensor]) -> Tensor:
    """States (n, width) of all tokens, row by row."""
    return pick(states, page.tokens, torch.nonzero(page.tokens.valid().flatten()).squeeze(1))


def logits(model: MammothModa2, hidden: Tensor) -> Tensor:
    return torch.cat((model.head(hidden), model.code_head(hidden)), -1)


@torch.no_grad()
def _llm_mixed(model: MammothModa2, g: Golden) -> None:
    """What stands on padding means nothing: only the rest is filled in."""
    page, mask = Page.of([[written(model, ids)] for ids in g.rows()]), g.given["attention_mask"].bool()
    layers: list[Tensor] = []

    def between(done: int, states: list[Tensor]) -> list[Tensor]:
        layers.append(valid(page, states))
        return states

    hidden = valid(page, model.trunk(model.states(page, None, None), page.tokens, model.mask, None, between))
    own = {"logits": logits(model, hidden), "condition": valid(page, model.think(page, None, None)[1])}
    filled = {"hidden_states": g.wanted["hidden_states"].clone()}
    filled["hidden_states"][:, mask] = torch.stack(layers)  # the last ones too before the norm
    for name, value in own.items():
        filled[name] = g.wanted[name].clone()
        filled[name][mask] = value
    g.compare_all(filled)


@torch.no_grad()
def _llm_image(model: MammothModa2, g: Golden) -> None:
    features, width = model.vision(g.given["pixel_values"], g.grids), model.config.block.width
    ids = g.given["input_ids"][0].tolist()
    page = Page.of([[qwen_vl.write(model, ids, g.values["llm_config"]["image_token_id"], g.grids)]])
    first, *levels = features.split(width, 1)
    g.compare(image_embeds=first, deepstack_embeds=torch.stack(levels),
              logits=logits(model, valid(page, model.think(page, features, None)[0]))[None])
    own = page.tokens.position.permute(2, 0, 1)
    g.cases.append(Case.compare(f"{g.name}.position_ids", own, g.wanted["position_ids"], 0.0))


# -- what the renderer is told, and the renderer -----------------------------------------------------------------------

@torch.no_grad()
def _qformer(model: MammothModa2, g: Golden) -> None:
    assert model.conditions.image is not None
    g.compare(tokens=model.conditions.image(g.given["x"], visible=g.given["mask"].bool()))


def tokens(model: MammothModa2, latents: Tensor) -> Reference:
    """One picture (c, h, w) -> its latent tokens and their grid."""
    patch = model.config.latent_patch
    return patchify(latents[None], patch)[0], (latents.shape[1] // patch, latents.shape[2] // patch)


def velocities(model: MammothModa2, latents: Sequence[Tensor], t: Tensor, conditions: Sequence[Tensor],
               references: Sequence[Tensor] = ()) -> list[Tensor]:
    """Of pictures (c, h, w), the first of which is drawn from the references."""
    x, grids = zip(*(tokens(model, own) for own in latents), strict=True)
    given = [[tokens(model, own) for own in references] if i == 0 else [] for i in range(len(x))]
    v = model.generator(x, t, conditions, grids, given)
    return [unpatchify(own[None], model.config.latent_patch, grid)[0] for own, grid in zip(v, grids, strict=True)]


@torch.no_grad()
def _dit(model: MammothModa2, g: Golden) -> None:
    several = [g.given[k] for k in sorted(k for k in g.given if k.startswith("latents") and k != "latents")]
    latents = several or list(g.given["latents"])
    mask = g.given.get("text_mask", torch.ones(g.given["text"].shape[:2])).bool()
    plans = list(g.given["ar_image"]) if "ar_image" in g.given else [None] * len(latents)
    conditions = model.conditions([x[m] for x, m in zip(g.given["text"], mask, strict=True)], plans)
    references = [g.given[k] for k in sorted(k for k in g.given if k.startswith("ref"))]
    v = velocities(model, latents, g.given["t"], conditions, references)
    g.compare_all({f"velocity{i}": own for i, own in enumerate(v)} if several else {"velocity": torch.stack(v)})


def laid_out(cos: Tensor, sin: Tensor, axes: Sequence[int]) -> tuple[int, list[Grid]]:
    """The number of condition tokens, and the grids behind them, that stored rotations (n, head_dim) stand for: the
    first pair of an axis turns by its place itself."""
    firsts = [sum(axes[:a]) for a in range(len(axes))]
    numbers = torch.arange(len(cos) + 1)
    near = [(cos[:, f, None] - numbers.cos()).abs() + (sin[:, f, None] - numbers.sin()).abs() for f in firsts]
    places = torch.stack([own.argmin(1) for own in near], 1).tolist()
    count = next((n for n, place in enumerate(places) if place != [n] * len(axes)), len(places))
    grids = list[Grid]()
    for _, cells in groupby(places[count:], lambda place: place[0]):
        _, rows, columns = zip(*cells, strict=True)
        grids.append((max(rows) + 1, max(columns) + 1))
    return count, grids


@torch.no_grad()
def _rope(model: MammothModa2, g: Golden) -> None:
    axes, device = model.config.generator.axes, torch.device("cpu")
    count, grids = laid_out(g.wanted["cos"][0], g.wanted["sin"][0], axes)
    places = torch.cat((condition_places(count, device), *picture_places(grids, count, device)))
    angle = axis_angles(places, axes).repeat_interleave(2, 1)[None]
    g.compare(cos=angle.cos(), sin=angle.sin())


@torch.no_grad()
def _flow_loss(model: MammothModa2, g: Golden) -> None:
    data, noise, texts = (g.given[k] for k in ("x1", "noise", "text"))
    count = data.shape[2] * data.shape[3] // model.config.latent_patch**2
    t = flow.shift_time(g.given["normal"].sigmoid(), flow.shift_for(count, SHIFTS[g.name.rpartition("_")[2]]))
    x = flow.interpolate(data, noise, t[:, None, None, None])
    # the network counts time in thousandths: it is told the stored one, so that the last bit of ours does not show
    v = torch.stack(velocities(model, list(x), g.wanted["t"], model.conditions(list(texts), [None] * len(texts))))
    errors = flow.squared_error(v.flatten(1), data.flatten(1), noise.flatten(1))
    g.compare(t=t, x_t=x, velocity=v, loss=errors)


# -- planning ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def _ar_generate(model: MammothModa2, g: Golden) -> None:
    prompt, grid = g.given["input_ids"][0].tolist(), cast(Grid, tuple(g.given["grid"].tolist()))
    c, seen = model.config, [prompt, prompt[-OPENING:]]
    ends = () if c.row_end is None else (c.vocabulary_size + c.row_end,)
    # the last token of the prompt predicts the first code: here a block begins with it
    model.layout = replace(model.layout, code=Grammar(start=(prompt[-1],), row_end=ends))
    contexts = {"full": Reader(), "no_text": Reader()}
    model.run([Read(reader, written(model, ids[:-1])) for reader, ids in zip(contexts.values(), seen, strict=True)])
    guidance = Guidance(branches=(Branch(context="no_text", scale=g.given["cfg_scale"].item()),))
    sampling = Sampling(guidance=guidance, codes=TokenSampling(temperature=0.0))
    codes = drive(model, model.raster(torch.zeros(grid[0] * grid[1]), grid, contexts, sampling, 0, lambda event: None,
                                      False))
    rows = (codes + c.vocabulary_size + c.first_code).view(grid).tolist()
    drawn = [i for row in rows for i in (*row, *ends)]
    page = Page.of([[written(model, [*ids, *drawn])] for ids in seen])
    every = valid(page, model.think(page, None, None)[0]).split([len(ids) + len(drawn) for ids in seen])
    told = [x[-len(drawn) - 1:-1] for x in every]  # each step is told by the token before it
    mask = torch.ones(2, len(prompt) + len(drawn), dtype=torch.long)
    mask[1, :len(prompt) - OPENING] = 0
    g.compare(logits=logits(model, torch.stack(told)))
    g.compare(0.0, ids=torch.tensor([prompt + drawn] * 2), attention_mask=mask)


@torch.no_grad()
def _conditions(model: MammothModa2, g: Golden) -> None:
    question = int(g.given["prompt_length"]) - OPENING
    page, negative = (Page.of([[written(model, g.given[k][0].tolist())]]) for k in ("input_ids", "negative_ids"))
    states, codes = valid(page, model.think(page, None, None)[1]), page.tokens.route[0] != UNDERSTAND
    said = model.said(page, g.given["visual_tokens_ids"].tolist())[0]
    g.compare(text=states[:question][said[:question]][None], image=states[question:][codes[question:]][None],
              negative=valid(negative, model.think(negative, None, None)[1])[None])


# -- rendering ---------------------------------------------------------------------------------------------------------

def drive(model: MammothModa2, program: Any) -> Tensor:
    return cast(Tensor, model.finish({0: program})[0])


def guidance(g: Golden, times: Sequence[float], edit: bool) -> Guidance:
    """u + s_i (ref - u) + s_t (full - ref) as a chain, until the first step outside of the range of steps."""
    (low, high), steps = g.given["cfg_range"].tolist(), len(times) - 1
    outside = next((n for n in range(steps) if not low <= n / steps <= high), steps)
    text, image = g.given["text_guidance_scale"].item(), g.given["image_guidance_scale"].item()
    branches = (Branch(context="no_text", scale=text / image), Branch(context="no_image", scale=image)) if edit else \
        (Branch(context="no_text", scale=text),)
    return Guidance(branches=branches, interval=(0.0, times[outside]))


@torch.no_grad()
def _sample(model: MammothModa2, g: Golden) -> None:
    """Under the conditions of their own case; every branch without text says the negative prompt."""
    assert isinstance(model.codec, AutoEncoder)
    states, codec = Golden("conditions", g.tensors, g.values).wanted, model.codec
    full, negative = model.conditions([states["text"][0], states["negative"][0]], [states["image"][0], None])
    told = {"full": full, "no_text": negative, "no_image": negative}
    given: list[Reference] = []
    if "ref_pixels" in g.given:
        mean, logvar = codec.encode(g.given["ref_pixels"])
        std = torch.exp(0.5 * logvar)
        latents = (mean + std * g.given["posterior_noise"] - codec.shift) * codec.scale
        g.compare(ref_mean=mean, ref_std=std, ref_latents=latents)
        given = [tokens(model, own) for own in latents]
    noise, grid = tokens(model, g.given["noise"][0])
    steps = int(g.given["num_inference_steps"])
    times = flow.schedule(steps, flow.shift_for(len(noise), model.config.sampling_shift))
    sampling = Sampling(evaluations=steps, guidance=guidance(g, times, bool(given)))
    references = {"full": given, "no_text": given, "no_image": []}
    x = drive(model, model.develop(noise, grid, told, references, sampling, torch.Generator(), 0, lambda event: None))
    latents = unpatchify(x[None], model.config.latent_patch, grid)
    g.compare(timesteps=torch.tensor(times[:-1]))
    g.compare(SAMPLED, latents=latents, pixels=codec.decode(latents))


KINDS: dict[str, Callable[[MammothModa2, Golden], None]] = {
    "llm_mixed": _llm_mixed, "llm_image": _llm_image, "qformer": _qformer, "dit": _dit, "rope": _rope,
    "flow_loss": _flow_loss, "ar_generate": _ar_generate, "conditions": _conditions, "sample": _sample,
}
