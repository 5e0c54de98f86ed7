"""Published FUDOKI checkpoints and their golden cases: the layout of Janus plus two tables that serve as metric.

The tables are `metric_tables.safetensors` here and pickled embeddings (`text_embedding.pt`, `image_embedding.pt`) in
the release. Published conventions: rows are padded on the right; w = 5 is a guidance scale of 6 here; logits of
position 0 are zero; padding attends to nothing, and its own normed input stands where attention would.
"""
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.adapters import janus
from diptych.adapters.cases import Case
from diptych.adapters.keys import to_ours
from diptych.adapters.tensors import Tensors, need_weights
from diptych.objectives import discrete_flow, next_token
from diptych.objectives.discrete_flow import Chance, MetricPath, MixturePath, Polynomial
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.grammar import CELL, Grammar
from diptych.parts.interleave import IGNORE, Layout, Marks, Page, Writer
from diptych.parts.pictures import pad_square
from diptych.parts.trunks import Layer
from diptych.systems.base import Sampling
from diptych.systems.fudoki import TURNS, Fudoki, FudokiConfig
from diptych.systems.works import Guess, Sequenced

TOLERANCE, LOGITS, RATES = 1e-4, 3e-4, 1e-3  # of the largest golden entry

Given = Mapping[str, Tensor]
Kind = Literal["text", "image"]


# -- checkpoints ------------------------------------------------------------------------------------------------------

def read_metric(folder: Path) -> dict[str, Tensor]:
    """The two frozen tables {"text", "image"} of a published folder."""
    file = folder / "metric_tables.safetensors"
    if file.is_file():
        tensors = load_file(file)
        return {kind: tensors[f"{kind}_embedding.weight"] for kind in ("text", "image")}
    tables = {}
    with torch.serialization.safe_globals([nn.Embedding]):
        for kind in ("text", "image"):
            path = folder / f"{kind}_embedding.pt"
            if not path.is_file():
                raise FileNotFoundError(f"expected metric_tables.safetensors or {path.name} in {folder}, got neither")
            tables[kind] = torch.load(path, map_location="cpu", weights_only=True).weight.detach()
    return tables


def load(folder: str | Path, *, marks: Marks | None = None, pad: int | None = None) -> Fudoki:
    """A published folder as a system; any tensor that finds no home is an error."""
    folder = Path(folder)
    values = json.loads((folder / "config.json").read_text())
    extra = values.get("_extra_sizes", {})
    marks, pad = janus.special_ids(folder, marks, pad)
    network = janus.config_of(values, marks=marks, pad=extra.get("uncond_id") if pad is None else pad)
    tables = read_metric(folder)
    model = Fudoki.from_folder(FudokiConfig(
        network=dataclasses.replace(network, turns=TURNS), text_metric=tables["text"].shape[1],
        image_metric=tables["image"].shape[1], text_c=float(extra.get("beta_c", 3)),
        image_c=float(extra.get("beta_c", 3)), exponent=float(extra.get("beta_a", 0.9)),
        sampling=Fudoki.paper().sampling), folder)
    theirs = Tensors({"": need_weights(folder)})
    shapes = {k: v.shape for k, v in model.network.state_dict().items()}
    state, report = to_ours(theirs, janus.rules(model.config.network), shapes, janus.IGNORE["original"])
    if report:
        raise ValueError(f"expected the layout of FUDOKI in {folder}, got {report}")
    model.network.load_state_dict(state)
    model.metric.load_state_dict({f"{kind}.weight": table for kind, table in tables.items()})
    return model.eval()


# -- golden cases -----------------------------------------------------------------------------------------------------

class Golden:
    """All tensors of a folder, by case, and the numbers that its config states."""

    def __init__(self, folder: Path) -> None:
        self.model = load(folder)
        self.extra: dict[str, Any] = json.loads((folder / "config.json").read_text()).get("_extra_sizes", {})
        self.tensors = load_file(folder / "golden.safetensors")

    def given(self, name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}.input."): v for k, v in self.tensors.items() if k.startswith(f"{name}.input.")}

    def wanted(self, name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}.output."): v for k, v in self.tensors.items()
                if k.startswith(f"{name}.output.")}

    def path(self, kind: str) -> MetricPath:
        return cast(MetricPath, self.model.path(cast(Kind, kind)))


@torch.no_grad()
def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    g, cases = Golden(folder), list[Case]()
    for name in sorted({k.split(".")[0] for k in g.tensors}):
        wanted = g.wanted(name)
        if not wanted:  # what other cases share
            continue
        kind = next((k for k in KINDS if name == k or name.startswith(f"{k}_")), None)
        if kind is None:
            raise ValueError(f"expected golden cases out of {', '.join(KINDS)}, got {name!r}")
        own = KINDS[kind](g, name, g.given(name), wanted)
        cases += [Case.compare(f"{name}.{k}", own[k], v, _tolerance(k, v)) for k, v in wanted.items()]
    return cases


def _tolerance(name: str, golden: Tensor) -> float:
    if not golden.is_floating_point():
        return 0.0
    share = LOGITS if "logits" in name else RATES if name.startswith(("rates", "intensity")) else TOLERANCE
    return share * golden.abs().max().item()


def _preprocess(g: Golden, name: str, given: Given, wanted: Given) -> dict[str, Tensor]:
    pixels = given["image_hwc_uint8"].permute(2, 0, 1).float() / 127.5 - 1
    square = pad_square(pixels, wanted["pixel_values"].shape[-1], shortest=1, filter="bilinear")
    eight = ((square + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return {"padded_hwc_uint8": eight, "pixel_values": square}


# -- paths and steps --------------------------------------------------------------------------------------------------

def _flat(t: Tensor, like: Tensor) -> Tensor:
    """One time per row -> one per token."""
    return t.unsqueeze(-1).expand(like.shape).flatten()


def _path(g: Golden, name: str, given: Given, wanted: Given) -> dict[str, Tensor]:
    path, x1 = g.path(name.split("_")[1]), given["x1"]
    t, flat = _flat(given["t"], x1), x1.flatten()
    return {"distance": path.distance(flat).unflatten(0, x1.shape), "prob": path.probs(flat, t).unflatten(0, x1.shape),
            "x_t": path.corrupt(flat, t, given["uniforms"].flatten()).view_as(x1)}


def _step(g: Golden, name: str, given: Given, wanted: Given) -> dict[str, Tensor]:
    path, shape, h = g.path(name.split("_")[1]), given["x1"].shape, float(given["h"])
    x_t, x1, jump, target = (given[k].flatten() for k in ("x_t", "x1", "jump_uniforms", "target_uniforms"))
    t = _flat(given["t"], given["x1"])
    jumps = path.jumps(x_t, x1, t)
    return {"rates": jumps.rates().unflatten(0, shape), "intensity": jumps.intensity.view(shape),
            "jump_prob": -torch.expm1(-h * jumps.intensity).view(shape),
            "x_next": discrete_flow.step(path, x_t, x1, t, h, jump, target).view(shape)}


def _mixture(g: Golden, name: str, given: Given, wanted: Given) -> dict[str, Tensor]:
    logits, shape = given["logits"], given["x1"].shape
    path = MixturePath(values=logits.shape[-1], schedule=Polynomial(g.extra["mixture_polynomial_n"]))
    x0, x1, uniform = (given[k].flatten() for k in ("x0", "x1", "uniforms"))
    t, flat = _flat(given["t"], given["x1"]), logits.flatten(0, -2)
    x_t = path.mix(x0, x1, t, uniform)
    loss = path.generalized_kl(flat, x1, x_t, t)
    return {"x_t": x_t.view(shape), "velocity": path.velocity(flat, x_t, t).unflatten(0, shape),
            "generalized_kl_none": loss.view(shape), "generalized_kl_mean": loss.mean()}


def _mixture_solver(g: Golden, name: str, given: Given, wanted: Given) -> dict[str, Tensor]:
    """The posterior is a table: logits of a place depend on the token there and on time."""
    table, shape = g.given("mixture_solver")["posterior_table"], given["x_init"].shape
    free = 0.0 if name.endswith("div0") else g.extra["mixture_div_free"]
    path = MixturePath(values=table.shape[-1], schedule=Polynomial(g.extra["mixture_polynomial_n"]),
                       divergence_free=free)
    places, times = torch.arange(shape[-1]).expand(shape).flatten(), given["time"].double().tolist()
    jump, target, posterior = (given[k].flatten(1) for k in ("jump_uniforms", "target_uniforms", "x1_uniforms"))
    x = given["x_init"].flatten()
    chain = discrete_flow.euler(path, x, times, Chance(x, posterior, jump, target))
    states, samples, rates = list[Tensor](), list[Tensor](), list[Tensor]()
    x, t = next(chain)
    try:
        for uniform in posterior:
            scores = (table[places, x] * (0.5 + t)).log_softmax(-1)
            states.append(x)
            samples.append(next_token.choose(scores, uniform))
            rates.append(path.jumps(x, samples[-1], t).rates())
            x, t = chain.send(samples[-1])
    except StopIteration as stop:
        final = stop.value
    else:
        raise ValueError(f"expected {len(times) - 1} posterior draws in {name}, got {len(posterior)}")
    shaped = {"states": torch.stack(states), "x1": torch.stack(samples), "x_final": final,
              "rates": torch.stack(rates[:-1])}
    return {k: v.unflatten(0 if k == "x_final" else 1, shape) for k, v in shaped.items()}


# -- the network ------------------------------------------------------------------------------------------------------

def _row(g: Golden, ids: Tensor, shown: Tensor, start: int, count: int, *, codes: bool) -> Writer:
    """A published row: features where `shown`, and a target of `count` tokens at `start`, codes or text."""
    w = Writer(g.model.marks, layout=Layout(read=Grammar(), code=Grammar(), spread=True))

    def plain(first: int, stop: int) -> None:
        seen = shown[first:stop].nonzero().flatten()
        if len(seen):
            w.text(ids[first : first + int(seen[0])].tolist(), open=False, close=False)
            w.feature(0, len(seen))
            first += int(seen[-1]) + 1
        w.text(ids[first:stop].tolist(), open=False, close=False)

    plain(0, start - 1)  # the token before the target predicts its first
    if codes:
        w.code(0, [int(ids[start - 1]), *[CELL] * count], drawn=True)
    else:
        w.text(ids[start - 1 : start + count].tolist(), target=True, open=False, close=False)
        # a label of every slot and none of what follows
        w.labels[start - 1 : start + count] = [*ids[start : start + count].tolist(), IGNORE]
    plain(start + count, len(ids))
    return w


def _span(mask: Tensor) -> tuple[int, int]:
    places = mask.nonzero().flatten()
    return int(places[0]), len(places)


def _drawing(g: Golden, ids: Tensor, dropped: bool = False) -> Sequenced:
    """The sequence of `forward_gen` with other ids; `dropped` without its text."""
    about = {k: v[0] for k, v in g.given("forward_gen").items()}
    length = int(about["attention_mask"].sum())
    if dropped:
        first, _ = _span(about["text_token_mask"])
        last = int(about["text_token_mask"].nonzero()[-1])
        ids = ids.clone()
        ids[first : last + 1] = g.extra["uncond_id"]
    none = torch.zeros(length, dtype=torch.bool)
    return Sequenced(_row(g, ids[:length], none, *_span(about["image_token_mask"]), codes=True))


def _shifted(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    logits = head(hidden[:-1])
    return torch.cat((torch.zeros_like(logits[:1]), logits))[None]


def _hidden(g: Golden, s: Sequenced, codes: Tensor | None, features: Tensor | None) -> Tensor:
    """States (T, width) of one row, in order."""
    page, model = Page.of([[s.writer]]), g.model
    states = model.states(page, features, None if codes is None else model.code_tokens(codes))
    parts = model.trunk(states, page.tokens, model.mask)
    out = torch.zeros(page.tokens.shape[1], parts[0].shape[1])
    for places, part in zip(page.tokens.routes(2), parts, strict=True):
        out[places] = part
    return out


def _padding(g: Golden, ids: Tensor) -> Tensor:
    """States (n, width) of padding: its own normed input stands where attention would."""
    trunk = g.model.trunk
    x = g.model.embed(ids)
    for layer in trunk.layers:
        layer = cast(Layer, layer)
        x = layer.after(x, layer.attention_norm[0](x), 0, 0)
    return trunk.norm[0](x)


def _forward_gen(g: Golden, name: str, given: Given, wanted: Given) -> dict[str, Tensor]:
    ids, length = given["ids"][0], int(given["attention_mask"].sum())
    hidden = _hidden(g, _drawing(g, ids), ids[given["image_token_mask"][0].bool()], None)
    every = torch.cat((hidden, _padding(g, ids[length:])))
    return {"img_logits": _shifted(every, g.model.code_logits), "txt_logits": _shifted(hidden, g.model.head)}


def _reading(g: Golden, ids: Tensor) -> tuple[Sequenced, Tensor]:
    """The sequence of `forward_und` with other ids, and the features of its picture."""
    about = g.given("forward_und")
    shown, (start, count) = about["image_token_mask"][0], _span(about["text_token_mask"][0])
    features = g.model.see(list(about["pixel_values"]))
    return Sequenced(_row(g, ids, shown, start, count, codes=False), features=features), features


def _forward_und(g: Golden, name: str, given: Given, wanted: Given) -> dict[str, Tensor]:
    s, features = _reading(g, given["ids"][0])
    return {"image_embeds": features[None], "txt_logits": _shifted(_hidden(g, s, None, features), g.model.head)}


# -- sampling and training --------------------------------------------------------------------------------------------

def _walk(g: Golden, kind: Kind, contexts: dict[str, Sequenced], x: Tensor, given: Given,
          scale: float) -> dict[str, Tensor]:
    """The system's own walk with the golden numbers, and what it was told on the way."""
    jump, target = given["jump_uniforms"][:, 0], given["target_uniforms"][:, 0]
    steps, path = len(jump) + 1, g.path(kind)
    posterior = given["x1_uniforms"][:, 0] if "x1_uniforms" in given else None
    chain = Guidance(branches=(Branch(context="no_text", scale=scale),) if scale != 1 else ())
    tokens = TokenSampling(temperature=0.0 if posterior is None else 1.0)
    sampling = Sampling(evaluations=steps, guidance=chain)
    chance = Chance(x, jump if posterior is None else posterior, jump, target)
    program = g.model.walk(kind, contexts, x, chance, tokens, sampling, None)
    states, logits, final = list[Tensor](), list[Tensor](), x
    work = next(program)
    try:
        while isinstance(work, Guess):
            states.append(work.x)
            answers = g.model.run([work])[0]
            logits.append(next_token.guide(dict(zip(("full", "no_text"), answers, strict=False)), chain, 0.0))
            work = program.send(answers)
    except StopIteration as stop:
        final = stop.value
    x1 = torch.stack([next_token.choose(v.log_softmax(-1), None if posterior is None else posterior[k])
                      for k, v in enumerate(logits)])
    jumps = [path.jumps(states[k], x1[k], k / steps) for k in range(steps - 1)]
    return {"states": torch.stack([*states, final]), "x1": x1[:, None], "logits": torch.stack(logits)[:, None],
            "intensity": torch.stack([j.intensity for j in jumps])[:, None], "final": final[None],
            "rates": torch.stack([j.rates() for j in jumps])[:, None]}


def _t2i(g: Golden, name: str, given: Given, wanted: Given) -> dict[str, Tensor]:
    """The published weight of guidance is part of the case's name."""
    ids = given["x_init"][0]
    contexts = {"full": _drawing(g, ids), "no_text": _drawing(g, ids, dropped=True)}
    x = ids[g.given("forward_gen")["image_token_mask"][0].bool()]
    found = _walk(g, "image", contexts, x, given, 1 + float(name.rpartition("cfg")[2]))
    posterior = found["logits"].softmax(-1)
    grid = tuple(side // g.model.stride for side in wanted["pixels"].shape[-2:])
    return {"codes": found["final"], "states": found["states"], "x1": found["x1"], "intensity": found["intensity"],
            "posterior_step0": posterior[0], "posterior_last": posterior[-1],
            "pixels": g.model.codec.decode(found["final"].unflatten(1, grid)),
            **{k: found["rates"][int(k.removeprefix("rates_step"))] for k in wanted if k.startswith("rates_step")}}


def _i2t(g: Golden, name: str, given: Given, wanted: Given) -> dict[str, Tensor]:
    ids = given["x_init"][0]
    start, count = _span(g.given("forward_und")["text_token_mask"][0])
    found = _walk(g, "text", {"full": _reading(g, ids)[0]}, ids[start : start + count], given, 1.0)
    return {"answer": found["final"], "states": found["states"], "x1": found["x1"], "intensity": found["intensity"],
            "txt_logits_last": found["logits"][-1]}


def _train(g: Golden, name: str, given: Given, wanted: Given) -> dict[str, Tensor]:
    x1, out = given["x1"][0], {}
    x_t = g.path("image").corrupt(x1, float(given["t"]), given["uniforms"][0])
    for case in ("kept", "dropped"):
        s = _drawing(g, given["sequence"][0], dropped=float(given[f"{case}_drop_uniform"]) < g.model.config.drop_text)
        logits = g.model.run([Guess([s], x_t)])[0][0]
        loss = discrete_flow.cross_entropy(logits, x1)
        out |= {f"{case}_img_logits": logits[None], f"{case}_ce_per_token": loss[None], f"{case}_loss": loss.mean()}
    return out | {"x_t": x_t[None]}


KINDS: dict[str, Callable[[Golden, str, Given, Given], dict[str, Tensor]]] = {
    "path": _path, "step": _step, "mixture_solver": _mixture_solver, "mixture": _mixture, "preprocess": _preprocess,
    "forward_gen": _forward_gen, "forward_und": _forward_und, "t2i": _t2i, "i2t": _i2t, "train": _train}
