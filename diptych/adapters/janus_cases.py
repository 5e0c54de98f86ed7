"""The golden cases of Janus: preprocessing, reading, greedy text, the tokenizer, drawing with given uniform numbers,
and the layout of Hugging Face.

Published conventions: rows are padded on the left; pictures stand between their marks as ordinary ids.
"""
import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters import janus, tensors
from diptych.adapters.cases import Case
from diptych.adapters.keys import to_ours, to_theirs
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.grammar import Grammar
from diptych.parts.interleave import Layout, Page, Writer
from diptych.parts.pictures import pad_square
from diptych.parts.vq import VQTokenizer
from diptych.systems.base import Sampling
from diptych.systems.coded import Steps
from diptych.systems.janus import Janus
from diptych.systems.works import Grid, Read, Reader, Together

TOLERANCE, LOGITS = 1e-4, 5e-4


@torch.no_grad()
def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    model = janus.load(folder)
    golden = load_file(folder / "golden.safetensors")
    cases: list[Case] = []
    for name in sorted({".".join(k.split(".")[: 2 if k.startswith("generation") else 1]) for k in golden}):
        given = {k.removeprefix(f"{name}.input."): v for k, v in golden.items() if k.startswith(f"{name}.input.")}
        wanted = {k.removeprefix(f"{name}.output."): v for k, v in golden.items() if k.startswith(f"{name}.output.")}
        if name.startswith("generation."):
            given |= {k.removeprefix("generation.input."): v for k, v in golden.items()
                      if k.startswith("generation.input.")}
            if not wanted:  # what the cases share
                continue
        kind = next((k for k in _OUTPUTS if name.startswith(k)), None)
        if kind is None:
            raise ValueError(f"expected golden cases out of {', '.join(_OUTPUTS)}, got {name!r}")
        own = _OUTPUTS[kind](model, name, given, wanted)
        cases += [Case.compare(f"{name}.{k}", own[k], v, _tolerance(k, v)) for k, v in wanted.items()]
    if (folder / "hf_key_map.json").is_file():
        cases += _huggingface(model, folder)
    return cases


def _tolerance(name: str, golden: Tensor) -> float:
    if not golden.is_floating_point():
        return 0.0
    return LOGITS if "logits" in name or "pixels" in name else TOLERANCE


Tensors = Mapping[str, Tensor]


def _preprocess(model: Janus, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    pixels = given["image_hwc_uint8"].permute(2, 0, 1).float() / 127.5 - 1
    return {"pixel_values": pad_square(pixels, wanted["pixel_values"].shape[-1])}


# -- reading ----------------------------------------------------------------------------------------------------------

def written(model: Janus, ids: Tensor, shown: Tensor, count: int, position: float = 0) -> Writer:
    """A row of published ids from a position on, `shown` where a feature stands in place of an id, `count` features per
    picture."""
    w = Writer(model.marks, position, layout=Layout(read=Grammar(), spread=True))
    for seen, run in groupby(zip(ids.tolist(), shown.tolist(), strict=True), lambda pair: pair[1]):
        tokens = [i for i, _ in run]
        if seen:
            for n in range(len(tokens) // count):
                w.feature(n, count)
        else:
            w.text(tokens, open=False, close=False)
    return w


def _understanding(model: Janus, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    pixels, count = given["pixel_values"], given["images_emb_mask"].shape[-1]
    features = model.vision.encode(pixels.flatten(0, 1))
    aligned = model.aligner(features)
    used = given["images_emb_mask"].any(-1)  # (row, picture)
    embeds, replies = [], []
    for b, (ids, shown) in enumerate(zip(given["input_ids"], given["images_seq_mask"], strict=True)):
        page = Page.of([[written(model, ids, shown, count)]])
        own = aligned.unflatten(0, pixels.shape[:2])[b][used[b]].flatten(0, 1)
        embeds.append(model.states(page, own, None)[0])
        kept = given["attention_mask"][b].bool()
        prompt = written(model, ids[kept], shown[kept], count)
        replies.append(_reply(model, prompt, list(pixels[b][used[b]]), wanted["greedy_ids"][b]))
    row = written(model, given["input_ids"][0], given["images_seq_mask"][0], count)
    page = Page.of([[row]])
    states = model.states(page, aligned.unflatten(0, pixels.shape[:2])[0][used[0]].flatten(0, 1), None)
    logits = model.head(model.trunk(states, page.tokens, model.mask)[0])[None]
    said = torch.stack(replies)
    # the public loop goes on with the end token, whatever follows it
    spoken = said.argmax(-1).where(_open(wanted["greedy_ids"], model.marks.end), wanted["greedy_ids"])
    return {"vision_features": features, "aligned": aligned, "inputs_embeds": torch.stack(embeds),
            "logits_row0": logits, "greedy_ids": spoken, "greedy_logits": said}


def _reply(model: Janus, prompt: Writer, views: list[Tensor], said: Tensor) -> Tensor:
    """Logits (n, vocabulary) before each of the tokens `said`, one cached step at a time."""
    reader, logits = Reader(), []
    logits += model.run([Read(reader, prompt, views, predict=True)])
    for token in said[:-1].tolist():
        w = model.writer(reader)
        w.text([token], open=False, close=False)
        logits += model.run([Read(reader, w, predict=True)])
    return torch.stack(logits)


def _open(ids: Tensor, end: int) -> Tensor:
    """Whether a reply was still going on at each of its tokens."""
    return ((ids == end).cumsum(-1) - (ids == end).long()) == 0


# -- tokenizer and drawing --------------------------------------------------------------------------------------------

def _vq(model: Janus, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    assert isinstance(model.codec, VQTokenizer)
    features = model.codec.features(given["pixels"])
    found = model.codec.quantizer(features)
    return {"pre_quant": features, "indices": found.codes.flatten(), "quant": found.vectors,
            "reconstruction": model.codec.decode(found.codes), "vq_loss": found.losses["codebook"],
            "commit_loss": found.losses["commitment"]}


def _embeds(model: Janus, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    return {"embeds": model.code_tokens(given["codes"])}


def contexts(model: Janus, prompt: list[int]) -> dict[str, Reader]:
    """The prompt up to the mark of the picture, and its unconditional form."""
    contexts = {"full": Reader(), "no_text": Reader()}
    for name, reader in contexts.items():
        w = model.writer(reader)
        if name == "full":
            w.text(prompt[:-1], open=False, close=False)
        else:
            model.write_null(w, prompt[:-1])
        model.run([Read(reader, w)])
    return contexts


def drive(model: Janus, programs: list[Steps]) -> tuple[list[Tensor], list[list[Any]]]:
    """Run programs of equal length together: what they return, and all answers they were given."""
    works, heard, results = [next(p) for p in programs], [list[Any]() for _ in programs], list[Tensor]()
    while len(results) < len(programs):
        answers = model.run(works)
        works = []
        for program, answer, log in zip(programs, answers, heard, strict=True):
            log.append(answer)
            try:
                works.append(program.send(answer))
            except StopIteration as stop:
                results.append(stop.value)
    return results, heard


def _dictated(model: Janus, reader: Reader, grid: Grid, codes: Tensor) -> Steps:
    """The logits (n, codebook) before each of the given codes."""
    plan, logits = model.writer(Reader()).plan(grid), []
    for k, part in enumerate(Grammar.steps(plan)[:-1]):
        w = model.writer(reader)
        w.code(0, plan, drawn=True, part=part)
        answer = yield Together([Read(reader, w, codes=[codes[k - 1 : k]] if k else [])])
        logits.append(answer[0][0])
    return torch.stack(logits)


def _generation(model: Janus, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    """The guidance scale is part of the case's name."""
    chain = Guidance(branches=(Branch(context="no_text", scale=float(name.rpartition("cfg")[2])),))
    sampling = Sampling(guidance=chain, codes=TokenSampling(temperature=1.0))
    height, width = (side // model.stride for side in wanted["pixels"].shape[-2:])
    prompt, grid = given["prompt_ids"].tolist(), (height, width)
    drawn, heard = drive(model, [
        model.raster(u.double(), grid, contexts(model, prompt), sampling, 0, lambda event: None, False)
        for u in given["uniforms"]])
    codes = torch.stack(drawn)
    # the branch that guidance of scale 1 leaves out has logits too
    null, _ = drive(model, [_dictated(model, contexts(model, prompt)["no_text"], grid, row) for row in codes])
    told = torch.stack([torch.cat([answer[0] for answer in log]) for log in heard])
    first = wanted["logits_cond_first8"].shape[1]
    return {"codes": codes, "logits_cond_first8": told[:, :first], "logits_cond_last": told[:, -1],
            "logits_uncond_first8": torch.stack(null)[:, :first],
            "pixels": model.codec.decode(codes.unflatten(1, grid))}


_OUTPUTS = {"preprocess": _preprocess, "understanding": _understanding, "vq": _vq, "gen_embeds": _embeds,
            "generation.": _generation}


# -- the other layout -------------------------------------------------------------------------------------------------

def _huggingface(model: Janus, folder: Path) -> list[Case]:
    """The published weights under the names of Hugging Face, by the key map; and back to ours."""
    home = json.loads((folder / "hf_key_map.json").read_text())
    original = tensors.Tensors({"": tensors.need_weights(folder)})
    expected: dict[str, Tensor] = {}
    for key, names in home.items():
        names = [names] if isinstance(names, str) else names or []
        expected |= zip(names, original[key].chunk(len(names)) if names else (), strict=True)
    rules = janus.rules(model.config, "huggingface")
    own = to_theirs(model.state_dict(), rules)
    wrong = [k for k in expected.keys() | own.keys()
             if k not in own or k not in expected or not torch.equal(own[k].flatten(), expected[k].flatten())]
    state = model.state_dict()
    back, report = to_ours(own, rules, {k: v.shape for k, v in state.items()})
    lost = [k for k, v in state.items() if k not in back or not torch.equal(back[k], v)]
    bad = float(len(lost) + bool(report))
    return [Case("huggingface.names", float(len(wrong)), float(len(wrong)), 0.0),
            Case("huggingface.round_trip", bad, bad, 0.0)]
