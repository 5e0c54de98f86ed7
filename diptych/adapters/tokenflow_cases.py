"""The golden cases of TokenFlow: the tokenizer in use and in training, what the drawing model reads of codes, its
training, and pictures drawn with given uniform numbers in one or several passes over every scale.

Published prompts are padded on the left. Here padding is left out and only moves positions; what the public code makes
of rows that see nothing is not compared.
"""
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters import scales
from diptych.adapters.cases import Case
from diptych.adapters.tokenflow import load, square, tokenizer_rules
from diptych.adapters.tokenizers import compare, gradients, residual
from diptych.objectives import next_scale, next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.interleave import GENERATE, Page, Writer
from diptych.parts.semantic import DualTokenizer
from diptych.parts.trunks import pick
from diptych.systems.base import Sampling
from diptych.systems.tokenflow import TokenFlow
from diptych.systems.works import Read, Reader, Together

TOLERANCE, LOGITS = 1e-4, 3e-4
Tensors = Mapping[str, Tensor]


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones are drawings is read from the names of its tensors."""
    golden, about = load_file(folder / "golden.safetensors"), json.loads((folder / "config.json").read_text())
    model = load(folder)
    codec, names = model.codec.requires_grad_(True), {k.split(".")[0] for k in golden}
    cases = [*_eval_cases(codec, golden), *_train_cases(codec, golden, about["tokenizer"]["train_scale_rq_layers"]),
             *_generator_inputs(codec, golden)]
    with torch.no_grad():
        for name in sorted(names - {"tokenizer", "train", "t2i"}):
            given, wanted = (scales.case_tensors(name, golden, side) for side in ("input", "output"))
            if name.startswith("sample_"):
                own = drawing(model, about["t2i"], given, options(name, folder))
            else:
                own = training(model, about["t2i"], given, wanted)
            own = {k: own[k] for k in wanted}  # of some passes no logits are stored
            cases += scales.compare(name, own, wanted, TOLERANCE, LOGITS, {"image_uint8": 1.0})
    return cases


# -- the tokenizer ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def _eval_cases(model: DualTokenizer, golden: Mapping[str, Tensor]) -> list[Case]:
    pixels = golden["tokenizer.input.pixels"]
    semantic, pixel = model.maps(pixels)
    out = model.quantize(pixels)
    kept = sum(rows * columns for rows, columns in residual(model).config.scales[:-2])
    preview = model.quantizer.lookup(out.codes[:, :kept])
    own = {"semantic_encoder": model.semantic_encoder(pixels).flatten(2).transpose(1, 2),
           "semantic_map": semantic.flatten(2).transpose(1, 2), "pixel_map": pixel, "indices": out.codes,
           "quant": out.vectors, "semantic_recon": model.semantics(out.vectors),
           "pixel_recon": model.decode(out.codes), "prefix_pixel_recon": model.decode_vectors(preview),
           "prefix_semantic_recon": model.semantics(preview)}
    return compare("tokenizer", own, golden)


def _train_cases(model: DualTokenizer, golden: Mapping[str, Tensor], sides: list[int]) -> list[Case]:
    """`train.full`, and `train.drop` where the scale that the number of indices lacks is left out."""
    pixels, cases = golden["train.input.pixels"], []
    for name in ("train.full", "train.drop"):
        lacking = sum(side**2 for side in sides) - golden[f"{name}.output.indices"].shape[1]
        kept = [side for side in sides if side**2 != lacking]
        model.zero_grad()
        views = model(pixels, square(kept))
        losses = {"vq_loss": views.quantized.losses["codebook"], "commit_loss": views.quantized.losses["commitment"]}
        own = {**losses, "indices": views.quantized.codes, "quant": views.quantized.vectors}
        if f"{name}.output.total" in golden:
            own["total"] = (sum(views.quantized.losses.values()) + F.mse_loss(views.pixels, pixels)
                            + views.features.square().mean())
            own["total"].backward()
            cases += gradients(f"{name}.output.grad.", model, golden, tokenizer_rules(model.config))
        cases += compare(name, own, golden)
    return cases


@torch.no_grad()
def _generator_inputs(model: DualTokenizer, golden: Mapping[str, Tensor]) -> list[Case]:
    """What the language model reads of codes, before its projector; `curr1` feeds the second input scale its own."""
    codes = golden["t2i.input.codes"]
    own = {"input_features": residual(model).running_inputs(codes), "decoded_pixels": model.decode(codes),
           "input_features_curr1": residual(model).running_inputs(codes, again=2)}
    return compare("t2i", own, golden)


# -- the drawing model in training ------------------------------------------------------------------------------------

def training(model: TokenFlow, about: Mapping[str, Any], given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    """Rows of prompt, image mark, as many slots as there are codes, and a closing. Slot i holds what the i-th code
    beyond the first reads; the last, for which no code is left, holds nothing but the level of words."""
    ids, words, found = given["input_ids"], about["image_token_start"], torch.stack(model.encode([*given["pixels"]]))
    first = int((given["labels"][0] >= 0).nonzero()[0])
    last, pads = first + found.shape[1] - 1, [_padding(row, about) for row in ids.tolist()]
    rows = []
    for row, before in zip(ids.tolist(), pads, strict=True):
        w = model.writer(Reader(position=before, branch=GENERATE))
        w.text(row[before : first - 1], open=False, close=False)
        model.write_drawn(w, 0, model.config.scales[-1])
        w.text([0, *row[last + 1 :]], open=False, close=False)
        rows.append([w])
    page = Page.of(rows)
    length = page.tokens.shape[1]
    states = model.states(page, None, model.code_tokens(found.flatten()))
    empty = torch.tensor([b * length + last - before for b, before in enumerate(pads)])
    states[GENERATE][torch.searchsorted(page.tokens.routes(2)[GENERATE], empty)] = model.level.weight[0]
    hidden = model.trunk(states, page.tokens, model.mask)

    def rows_of(flat: list[Tensor], whole: Tensor) -> Tensor:
        """`whole` with what is known of every row behind its padding."""
        whole = whole.clone()
        for b, before in enumerate(pads):
            places = b * length + torch.arange(ids.shape[1] - before)
            whole[b, before:] = pick(flat, page.tokens, places)
        return whole

    allowed, seen = torch.zeros_like(wanted["allowed"]), model.mask.dense(page.tokens)
    for b, before in enumerate(pads):
        allowed[b, 0, before:, before:] = seen[b, : ids.shape[1] - before, : ids.shape[1] - before]
    none = (model.draw_embed.weight[about["pad_token_id"]] + model.level.weight[0]).expand(*ids.shape, -1)
    labels = given["labels"].clone()
    labels[:, first : last + 1] = words + found
    logits = rows_of([hidden[0], model.draw_head(hidden[GENERATE])], wanted["logits"])
    said = given["text_labels"][:, 1:]
    return {"inputs_embeds": rows_of(states, none), "allowed": allowed, "labels": labels, "logits": logits,
            "loss_vision": model.code_error(pick(hidden, page.tokens, page.questions), found.flatten()).mean(),
            "loss_text": next_token.cross_entropy(logits[:, :-1][said >= 0], said[said >= 0]).mean()}


def _padding(row: list[int], about: Mapping[str, Any]) -> int:
    return next(i for i, token in enumerate(row) if token != about["pad_token_id"])


# -- pictures ---------------------------------------------------------------------------------------------------------

def options(name: str, folder: Path) -> Sampling:
    """Guidance and the cuts of every pass, which only the README beside a case states: `NAME: cfg W, (K, P), ...`."""
    readme = folder / "README.md"
    number, short = r"[\d.]*\d", name.removeprefix("sample_")
    cuts = rf"\((?:top_k )?{number}, ?(?:top_p )?{number}\)"
    stated = re.search(rf"\b{short}: cfg ({number}), ({cuts}(?:, ?{cuts})*)",
                       readme.read_text() if readme.is_file() else "")
    if stated is None:
        raise ValueError(f"expected the options of {name} in {readme}, got none; fix: state `{short}: cfg W, (top_k K, "
                         "top_p P)` there, with a pair for every pass")
    pairs = re.findall(rf"({number}), ?(?:top_p )?({number})\)", stated[2])
    # a share of 0 switches the cut off: beside it stands a top_k of 1
    passes = [TokenSampling(top_k=int(k), top_p=float(p) or 1.0) for k, p in pairs]
    chain = Guidance(branches=(Branch(context="no_text", scale=1 + float(stated[1])),), schedule="linear")
    return Sampling(guidance=chain, codes=passes[0], again=tuple(passes[1:]))


def drawing(model: TokenFlow, about: Mapping[str, Any], given: Tensors, sampling: Sampling) -> dict[str, Tensor]:
    """Picture by picture; the guided logits and the draws of all passes."""
    count, plan = len(model.config.scales), next_scale.every_scale(
        len(model.config.scales), sampling.guidance, sampling.codes, sampling.again)
    passes = [(k, cuts) for k, how in enumerate(plan) for cuts in (how.codes, *how.again)]
    told: dict[str, list[Tensor]] = {}
    codes = []
    for i, prefix in enumerate(given["prefix_ids"].tolist()):
        contexts = {name: _read(model, about, row) for name, row in
                    (("full", prefix), ("no_text", given["negative_ids"].tolist()))}
        numbers = [given[f"uniforms_pass{n:02d}"][i] for n in range(len(passes))]
        program = model.draw(numbers, contexts, sampling, 0, lambda event: None)
        names, work = ("full", "no_text"), next(program)
        try:
            for n, (k, cuts) in enumerate(passes):
                assert isinstance(work, Together)
                answer = model.run([work])[0]
                mixed = next_token.guide(dict(zip(names, answer, strict=False)), plan[k].guidance, k / count)
                told.setdefault(f"mixed_logits_pass{n:02d}", []).append(mixed)
                drawn = next_token.choose(next_token.log_probs(mixed, cuts), numbers[n])
                told.setdefault(f"draw_pass{n:02d}", []).append(drawn)
                work = program.send(answer)
        except StopIteration as stop:
            codes.append(stop.value)
    out = {k: torch.stack(v) for k, v in told.items()} | {"codes": torch.stack(codes)}
    pixels = model.codec.decode(out["codes"])
    eight = (pixels * 127.5 + 128).clamp(0, 255).to(torch.uint8).movedim(1, -1)
    return out | {"pixels": pixels, "image_uint8": eight}


def _read(model: TokenFlow, about: Mapping[str, Any], ids: list[int]) -> Reader:
    """A context that has read a prompt up to the image mark."""
    before = _padding(ids, about)
    reader = Reader(position=before, branch=GENERATE)
    w: Writer = model.writer(reader)
    w.text(ids[before:-1], open=False, close=False)
    model.run([Read(reader, w)])
    return reader
