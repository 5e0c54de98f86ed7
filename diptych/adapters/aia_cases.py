"""The golden cases of AIA on Janus: intensities of every layer, the loss on them beside that of the next token, and
their gradients, for drawing ("gen") and reading ("und").

Published rows are padded on the left and positions count the padding; here padding is left out and positions go on from
where it ends. Spans are given in published places; those that lie on padding are seen by nothing.
"""
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters.cases import Case
from diptych.adapters.janus_cases import written
from diptych.adapters.janus_language import load_language
from diptych.adapters.keys import Rule, to_theirs
from diptych.alignment.attention import DRAW, READ, errors, intensity
from diptych.parts.grammar import CELL
from diptych.parts.interleave import IGNORE, Page, Writer
from diptych.parts.trunks import pick
from diptych.systems.janus import Janus

TOLERANCE, LOSS_ATTENTION, GRADIENT = 2e-4, 1e-5, 1e-3


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder."""
    about = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    golden, constants = load_file(folder / "golden.safetensors"), about["constants"]
    foreign = sorted(set(about) - {"gen", "und", "constants"})
    if foreign:
        raise ValueError(f"expected golden cases gen and und, got {foreign[0]!r}")
    # the mark at the end is none of these sequences': any id serves
    ids = {"bos": constants["pad_id"], "eos": constants["pad_id"], "pad": constants["pad_id"],
           "image_start": constants["image_start_id"], "image_end": constants["image_end_id"]}
    model, rules = load_language(folder, ids, side=4)
    cases: list[Case] = []
    for name, run in (("gen", _draw), ("und", _read)):
        if name in about:
            given = {k.removeprefix(f"{name}.input."): v for k, v in golden.items() if k.startswith(f"{name}.input.")}
            wanted = {k.removeprefix(f"{name}.output."): v for k, v in golden.items()
                      if k.startswith(f"{name}.output.")}
            shares, samples, main = run(model, given, about[name])
            cases += _compared(model, rules, name, about[name], constants, wanted, (shares, samples, main))
    return cases


Run = tuple[Tensor, Tensor, Tensor]  # shares of attention (layers, B, T), sample of every query (B, T), main loss


def _pads(mask: Tensor) -> list[int]:
    """Padding on the left of every row."""
    return (mask.long().argmax(1)).tolist()


def _marked(shape: tuple[int, int], pads: list[int], parts: list[list[list[int]]]) -> Tensor:
    """(B, T) bool of published spans, row by row."""
    out = torch.zeros(shape, dtype=torch.bool)
    for b, (pad, rows) in enumerate(zip(pads, parts, strict=True)):
        for start, stop in rows:
            out[b, max(start - pad, 0):max(stop - pad, 0)] = True
    return out


def _samples(queries: Tensor) -> Tensor:
    return torch.where(queries, torch.arange(len(queries))[:, None], -1)


def _draw(model: Janus, given: Mapping[str, Tensor], about: Mapping[str, Any]) -> Run:
    ids, mask, codes = given["input_ids"], given["attention_mask"], given["image_ids"]
    pads, count = _pads(mask), codes.shape[1]
    rows = []
    for row, pad in zip(ids, pads, strict=True):
        w = Writer(model.marks, pad, layout=model.layout)
        w.text(row[pad:].tolist(), open=False, close=False)
        w.code(0, [CELL] * count, drawn=False)
        rows.append(w)
    page = Page.of([[w] for w in rows])
    keys, queries = (_marked(page.tokens.shape, pads, [[span] for span in about[side]]) for side in ("front", "end"))
    states = model.states(page, None, model.code_tokens(codes.flatten()))
    with model.trunk.watch(keys) as seen:
        hidden = model.trunk(states, page.tokens, model.mask)
    length = page.tokens.shape[1]
    places = [b * length + w.strip.length - count - 1 + k for b, w in enumerate(rows) for k in range(count)]
    logits = model.code_logits(pick(hidden, page.tokens, torch.tensor(places)))
    return seen[0], _samples(queries), F.cross_entropy(logits.float(), codes.flatten())


def _read(model: Janus, given: Mapping[str, Tensor], about: Mapping[str, Any]) -> Run:
    ids, mask, labels, shown = (given[k] for k in ("input_ids", "attention_mask", "labels", "image_seq_mask"))
    pads = _pads(mask)
    features = model.aligner(model.vision.encode(given["pixel_values"]))
    rows = [written(model, row[pad:], where[pad:], features.shape[1], pad)
            for row, where, pad in zip(ids, shown, pads, strict=True)]
    page = Page.of([[w] for w in rows])
    keys = _marked(page.tokens.shape, pads, [[span] for span in about["front"]])
    queries = _marked(page.tokens.shape, pads, about["end"])
    with model.trunk.watch(keys) as seen:
        hidden = model.trunk(model.states(page, features.flatten(0, 1), None), page.tokens, model.mask)
    wanted = torch.full(page.tokens.shape, IGNORE)  # of the token behind
    for b, pad in enumerate(pads):
        own = labels[b, pad + 1:]
        wanted[b, :len(own)] = own
    places = torch.nonzero(wanted.flatten() != IGNORE).squeeze(1)
    logits = model.head(pick(hidden, page.tokens, places))
    return seen[0], _samples(queries), F.cross_entropy(logits.float(), wanted.flatten()[places])


def _compared(model: Janus, rules: list[Rule], name: str, about: Mapping[str, Any], constants: Mapping[str, Any],
              wanted: Mapping[str, Tensor], run: Run) -> list[Case]:
    shares, samples, main = run
    found = intensity(shares, samples, len(samples))
    # published stages name layers, whatever the depth
    schedule = replace(DRAW if name == "gen" else READ["released"], depth=len(found))
    attention = errors(found, schedule, torch.tensor(about["use_attn"]).float()).mean()
    total = main + constants[f"lambda_{name}"] * attention
    own = {"intensity": found, "loss_ntp": main, "loss_attn": attention, "loss": total}
    cases = [Case.compare(f"{name}.{k}", v.detach(), wanted[k], LOSS_ATTENTION if k == "loss_attn" else TOLERANCE)
             for k, v in own.items() if k in wanted]
    for kind, loss in (("grad_loss_attn", attention), ("grad", total)):
        grads = _gradients(model, rules, loss)
        cases += [_relative(f"{name}.{k}", grads[k.removeprefix(f"{kind}.")], v) for k, v in wanted.items()
                  if k.startswith(f"{kind}.")]
        if kind == "grad" and "grad_norm_all" in wanted:
            norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
            cases.append(_relative(f"{name}.grad_norm_all", norm, wanted["grad_norm_all"]))
    return cases


def _gradients(model: Janus, rules: list[Rule], loss: Tensor) -> dict[str, Tensor]:
    """By published name; zero where the loss does not reach."""
    home = {r.ours for r in rules}
    named = {k: p for k, p in model.named_parameters() if k in home}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    ours = {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(named.items(), found, strict=True)}
    return to_theirs(ours, rules)


def _relative(name: str, own: Tensor, golden: Tensor) -> Case:
    scale = golden.abs().max().clamp_min(1e-12)
    return Case.compare(name, own / scale, golden / scale, GRADIENT)
