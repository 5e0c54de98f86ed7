"""The golden cases of Harmon and MAR: codec, encoder and decoder, understanding, drawing, diffusion head, sampling.

Published conventions: mask 1 = hidden, latents (rows, columns, channels), -200 where a picture stands among ids.
"""
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters import harmon
from diptych.adapters.cases import Case
from diptych.adapters.keys import to_theirs
from diptych.objectives import masked_autoregression as mar
from diptych.objectives.diffusion import Diffusion
from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.interleave import IGNORE, Page, Writer
from diptych.parts.vision import unpatchify
from diptych.systems.base import Sampling
from diptych.systems.harmon import Harmon
from diptych.systems.works import Grid, Read, Reader, Reveal

TOLERANCE, SAMPLED = 1e-4, 2e-4
PICTURE = -200  # in published ids


class Golden:
    """The tensors of one case, and the comparisons made with them so far."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], classes: Tensor) -> None:
        self.name, self.classes, self.cases = name, classes, list[Case]()
        self.given = {k.removeprefix(f"{name}.input."): v for k, v in tensors.items() if k.startswith(f"{name}.input.")}
        self.wanted = {k.removeprefix(f"{name}.output."): v for k, v in tensors.items()
                       if k.startswith(f"{name}.output.")}

    def compare(self, tolerance: float = TOLERANCE, **own: Tensor) -> None:
        self.cases += [Case.compare(f"{self.name}.{k}", v.detach(), self.wanted[k], tolerance) for k, v in own.items()]

    def compare_gradients(self, model: Harmon, loss: Tensor) -> None:
        model.zero_grad()
        loss.backward()
        own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        theirs = to_theirs(own, [r for r in harmon.rules(model.config) if r.ours in own])
        self.compare(TOLERANCE, **{k: theirs[k.removeprefix("grad.")] for k in self.wanted if k.startswith("grad.")})
        model.zero_grad()

    def grid(self) -> Grid:
        rows, columns = self.given["image_shape"].tolist()
        return rows, columns


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    model = harmon.load(folder)
    tensors = load_file(folder / "golden.safetensors")
    classes = load_file(folder / "weights.safetensors").get(harmon.CLASSES, torch.zeros(0, model.config.mar.width))
    cases: list[Case] = []
    for name in dict.fromkeys(k.split(".")[0] for k in tensors):
        golden = Golden(name, tensors, classes)
        kind = next((k for k in KINDS if name == k or name.startswith(f"{k}_")), None)
        if kind is None:
            raise ValueError(f"expected cases named after {', '.join(KINDS)}, got {name!r}")
        if kind in ("und_text_only", "und_greedy"):  # variations of another case: what they do not say is as there
            golden.given = Golden("und", tensors, classes).given | golden.given
        KINDS[kind](model, golden)
        cases += golden.cases
    return cases


# -- pictures and the transformer -------------------------------------------------------------------------------------

@torch.no_grad()
def _vae(model: Harmon, g: Golden) -> None:
    g.compare(latents=model.codec.latent(g.given["pixels"]).permute(0, 2, 3, 1),
              decoded=model.codec.decode(g.wanted["latents"].permute(0, 3, 1, 2)))


@torch.no_grad()
def _mar(model: Harmon, g: Golden) -> None:
    hidden = g.given["mask"].bool()
    states = model.mar.encode(g.given["x"], hidden, g.grid())
    g.compare(encoder=states, decoder=model.mar.decode(states, hidden, g.grid()))


def _mar_class(model: Harmon, g: Golden) -> None:
    x, hidden = g.given["latents"], g.given["mask"].bool()
    grid = (x.shape[2], x.shape[3])
    tokens = x.flatten(2).transpose(1, 2)
    states = model.mar.encode(tokens, hidden, grid, g.classes[g.given["labels"]])
    error, bits = _terms(model, tokens, model.mar.decode(states, hidden, grid), g)
    share = hidden.flatten().repeat(len(error) // hidden.numel())
    g.compare(loss=(error + bits)[share].mean())


def _terms(model: Harmon, tokens: Tensor, conditions: Tensor, g: Golden) -> tuple[Tensor, Tensor]:
    """Both loss terms of all tokens, once per copy of the batch."""
    t = g.given["t"]
    copies = len(t) // (tokens.shape[0] * tokens.shape[1])
    return mar.terms(model.denoiser, model.diffusion, tokens.flatten(0, 1).repeat(copies, 1),
                     conditions.flatten(0, 1).repeat(copies, 1), t, g.given["noise"])


# -- understanding ----------------------------------------------------------------------------------------------------

def _write(model: Harmon, reader: Reader, ids: Sequence[int]) -> Writer:
    w = model.writer(reader)
    for picture, run in groupby(ids, lambda i: i == PICTURE):
        part = list(run)
        if picture:
            w.feature(0, len(part))
        else:
            w.text(part, open=False, close=False)
    return w


def _rows(g: Golden) -> list[list[int]]:
    """Ids without padding."""
    mask = g.given.get("attention_mask")
    if mask is None or mask.shape != g.given["input_ids"].shape:
        return g.given["input_ids"].tolist()
    return [row[keep].tolist() for row, keep in zip(g.given["input_ids"], mask.bool(), strict=True)]


def _logits(model: Harmon, rows: list[list[int]], pixels: Tensor | None) -> Tensor:
    """(b, longest row, vocabulary), zeros behind shorter rows."""
    page = Page.of([[_write(model, Reader(), ids)] for ids in rows])
    features = None if pixels is None else model.see(list(pixels))
    said = model.trunk(model.states(page, features, None), page.tokens, model.mask)[0]
    return torch.nn.utils.rnn.pad_sequence(list(model.head(said).split([len(r) for r in rows])), batch_first=True)


def _answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    labels = labels[:, 1:logits.shape[1]].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.masked_fill(labels < 0, IGNORE), ignore_index=IGNORE)


def _und(model: Harmon, g: Golden) -> None:
    pixels = g.given["pixels"]
    latents = model.codec.latent(pixels).permute(0, 2, 3, 1)
    hidden = torch.zeros(len(pixels), latents[0, ..., 0].numel(), dtype=torch.bool)
    encoder = model.mar.encode(latents.flatten(1, 2), hidden, (latents.shape[1], latents.shape[2]))
    g.compare(latents=latents, encoder=encoder, visual_tokens=model.to_language(encoder))
    logits = _logits(model, _rows(g), pixels)
    loss = _answer_loss(logits, g.given["labels"])
    keep = g.given["attention_mask"].bool()
    g.wanted["logits"] = g.wanted["logits"][keep]
    g.compare(logits=logits[keep[:, :logits.shape[1]]], loss=loss)
    g.compare_gradients(model, loss)


def _und_text_only(model: Harmon, g: Golden) -> None:
    rows = [[0 if i == PICTURE else i for i in row] for row in _rows(g)]
    g.compare(loss=_answer_loss(_logits(model, rows, None), g.given["labels"]))


@torch.no_grad()
def _und_greedy(model: Harmon, g: Golden) -> None:
    """Token by token in a context; the golden answer is fed, so that one early difference stays one."""
    reader, logits = Reader(), []
    work = Read(reader, _write(model, reader, _rows(g)[0]), [g.given["pixels"][0]], predict=True)
    for token in g.wanted["ids"].tolist():
        logits.append(model.run([work])[0])
        work = Read(reader, _write(model, reader, [token]), predict=True)
    own = torch.stack(logits)
    g.compare(logits=own)
    g.compare(0.0, ids=own.argmax(-1))


# -- drawing ----------------------------------------------------------------------------------------------------------

def _t2i(model: Harmon, g: Golden) -> None:
    latents, hidden = g.given["latents"], g.given["mask"].bool()
    grid, tokens = (latents.shape[1], latents.shape[2]), latents.flatten(1, 2)
    writers = [_write(model, Reader(), ids) for ids in _rows(g)]
    for i, w in enumerate(writers):
        model.write_drawn(w, i, grid)
    page = Page.of([[w] for w in writers])
    states = model.mar.encode(tokens, hidden, grid)
    where = model.thinned(page.tokens, list(hidden))
    words = model.states(dataclasses.replace(page, tokens=where), None, model.to_language(states).flatten(0, 1))
    said = model.trunk(words, where, model.mask)[1].unflatten(0, states.shape[:2])
    encoder = model.from_language(states, said)
    decoder = model.mar.decode(encoder, hidden, grid)
    error, bits = _terms(model, tokens, decoder, g)
    share = hidden.flatten().repeat(len(error) // hidden.numel())
    loss = (error + bits)[share].mean()
    g.compare(encoder=encoder, decoder=decoder, mse=error, vb=bits, loss=loss)
    g.compare_gradients(model, loss)


@torch.no_grad()
def _diffloss(model: Harmon, g: Golden) -> None:
    x, t, noise = g.given["x"], g.given["t"], g.given["noise"]
    x_t = model.diffusion.add_noise(x, noise, t)
    error, bits = mar.terms(model.denoiser, model.diffusion, x, g.given["c"], t, noise)
    g.compare(x_t=x_t, net=model.denoiser(x_t, t, g.given["c"]), mse=error, vb=bits, loss=error + bits)


def _schedule(model: Harmon, g: Golden) -> None:
    for name in g.wanted:
        kind, _, count = name.rpartition("_")
        if name == "betas_respaced":
            own = model.sampler.betas.float()
        elif kind == "betas":
            own = Diffusion.cosine(int(count)).betas.float()
        else:
            steps = model.sampler.steps if name == "timestep_map" else model.diffusion.respaced([int(count)]).steps
            own = torch.tensor(steps)
        g.compare(TOLERANCE if name.startswith("betas") else 0.0, **{name: own})


def _guidance(scale: float, schedule: str = "constant") -> Guidance:
    branches = (Branch(context="no_text", scale=scale),) if scale != 1 else ()
    return Guidance(branches=branches, schedule="linear" if schedule == "linear" else "constant")


def _scale(guidance: Guidance) -> float:
    return guidance.branches[0].scale if guidance.branches else 1.0


def _guide(guidance: Guidance) -> mar.Guide:
    return lambda noise: guidance.combine(noise[0], {"no_text": noise[-1]}, 0.0)


@torch.no_grad()
def _sample(model: Harmon, g: Golden) -> None:
    count = len(g.given["init_noise"])
    one = mar.Set(g.given["c"].split(count), g.given["init_noise"], g.given["step_noise"][:, :count],
                  _guide(_guidance(g.given["cfg"].item())), g.given["temperature"].item())
    g.compare(SAMPLED, x=mar.draw(model.denoiser, model.sampler, [one])[0][-1])


def _noises(g: Golden, image: int, counts: Sequence[int]) -> Iterator[Tensor]:
    """The stored noise of one image, set after set (`counts` tokens each): the images of a batch alternate."""
    images, start = len(g.given["orders"]), 0
    for count in counts:
        own = slice(start + image * count, start + (image + 1) * count)
        start += images * count
        if count:
            yield g.given["init_noise"][own]
            yield g.given["step_noise"][own].transpose(0, 1)


def _counts(tokens: int, iterations: int) -> list[int]:
    left = [tokens, *mar.schedule(tokens, iterations)]
    return [a - b for a, b in pairwise(left)]


@torch.no_grad()
def _gen(model: Harmon, g: Golden) -> None:
    orders, grid, iterations = g.given["orders"], g.grid(), int(g.given["num_iter"])
    images, tokens = orders.shape
    guidance = _guidance(g.given["cfg"].item(), g.name.rpartition("_")[2])
    readers = [Reader() for _ in g.given["input_ids"]]
    model.run([Read(r, _write(model, r, ids)) for r, ids in zip(readers, _rows(g), strict=True)])
    sampling = Sampling(evaluations=iterations, guidance=guidance, temperature=g.given["temperature"].item())
    counts = _counts(tokens, iterations)
    programs = []
    for i, order in enumerate(orders):
        noises = _noises(g, i, counts)
        contexts = {"full": readers[i], "no_text": readers[-images + i]}
        programs.append(model.reveal(grid, order, lambda *shape, noises=noises: next(noises), contexts, sampling, 0,
                                     lambda event: None))
    first, answers, finished = None, [None] * images, []
    while not finished:
        works: list[Reveal] = []
        for program, answer in zip(programs, answers, strict=True):
            try:
                works.append(program.send(answer))
            except StopIteration as stop:  # all pictures take equally many steps
                finished.append(stop.value)
        if works:
            if first is None:
                of = model.conditions(works)
                first = torch.cat([of[i][k][works[i].chosen] for k in range(len(of[0])) for i in range(images)])
            answers = model.run(works)
    assert first is not None
    left = mar.schedule(tokens, iterations)
    scales = [_scale(guidance.at((tokens - max(n, 1)) / tokens)) for n in left]
    g.compare(first_condition=first, revealed_counts=torch.tensor(counts) * images, cfg_per_iter=torch.tensor(scales))
    x = torch.stack(finished)
    g.compare(SAMPLED, latents=x.unflatten(1, grid), pixels=model.codec.decode(unpatchify(x, 1, grid)))


@torch.no_grad()
def _mar_class_sample(model: Harmon, g: Golden) -> None:
    """MAR alone: class embeddings in the buffers, `fake_latent` in those of the unguided half."""
    images, tokens = g.given["orders"].shape
    scales = g.wanted["cfg_per_iter"]
    full = 1 + (scales[-1].item() - 1) * tokens / (tokens - 1)  # the last iteration stops one token short of it
    guidance, grid = _guidance(full, "linear"), (g.wanted["latents"].shape[2], g.wanted["latents"].shape[3])
    labels = g.classes[g.given["labels"]]
    starts = [labels, model.mar.fake_latent.expand_as(labels)]
    x, hidden = torch.zeros(images, tokens, model.config.mar.token_width), torch.ones(images, tokens, dtype=torch.bool)
    counts, own = _counts(tokens, len(scales)), []
    streams = [_noises(g, i, counts) for i in range(images)]
    for left, count in zip(mar.schedule(tokens, len(scales)), counts, strict=True):
        guided = guidance.at((tokens - max(left, 1)) / tokens)
        own.append(_scale(guided))
        if not count:
            continue
        remaining = mar.hide(g.given["orders"], left)
        chosen = hidden & ~remaining
        conditions = [model.mar.decode(model.mar.encode(x, hidden, grid, start), hidden, grid) for start in starts]
        sets = [mar.Set([c[i][chosen[i]] for c in conditions], next(streams[i]), next(streams[i]), _guide(guided))
                for i in range(images)]
        drawn = mar.draw(model.denoiser, model.sampler, sets)
        x[chosen] = torch.cat([path[-1] for path in drawn])
        hidden = remaining
    g.compare(cfg_per_iter=torch.tensor(own))
    g.compare(SAMPLED, latents=x.transpose(1, 2).unflatten(2, grid))


KINDS: dict[str, Callable[[Harmon, Golden], None]] = {  # longer names first
    "mar_class_sample": _mar_class_sample, "mar_class": _mar_class, "mar": _mar, "vae": _vae,
    "und_greedy": _und_greedy, "und_text_only": _und_text_only, "und": _und,
    "t2i": _t2i, "diffloss": _diffloss, "schedule": _schedule, "sample": _sample, "gen": _gen,
}
