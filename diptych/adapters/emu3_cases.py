"""The golden cases of Emu3: the tokenizer on pictures and clips, fine-tuning, answers, drawing with given uniform
numbers, sizes of drawings, and the layout of Hugging Face.

Published conventions: rows to be drawn from are padded on the left; the branch without the prompt has a context of its
own, unpadded, with the size in it; a row that is finished goes on with pads, and uniform numbers are drawn for forced
tokens as well.
"""
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters import emu3
from diptych.adapters.cases import Case
from diptych.adapters.keys import to_ours, to_theirs
from diptych.adapters.published import build
from diptych.adapters.tensors import read_json
from diptych.adapters.vila_u import stated
from diptych.objectives import next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.grammar import CELL, Grammar
from diptych.parts.interleave import Page, Writer
from diptych.parts.masks import key_is
from diptych.parts.pictures import size_of_area
from diptych.parts.trunks import pick
from diptych.parts.video_codec import VideoTokenizer
from diptych.systems.base import Sampling
from diptych.systems.batch import Batch
from diptych.systems.emu3 import Emu3
from diptych.systems.works import Grid, Read, Reader

TOLERANCE, LOGITS = 1e-4, 3e-4
FACTOR, SCALE, TOP_K = 8, 3.0, 2048  # literals of the public processor and sampler
REMOVED = -1e30  # stands for minus infinity
PAD = 1  # role of pads: nothing sees them
Tensors = Mapping[str, Tensor]


@torch.no_grad()
def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    golden, about = load_file(folder / "golden.safetensors"), json.loads((folder / "config.json").read_text())
    model, cases = load(folder), list[Case]()
    for name in sorted({k.split(".")[0] for k in golden}):
        given, wanted = ({k.removeprefix(f"{name}.{side}."): v for k, v in golden.items()
                          if k.startswith(f"{name}.{side}.")} for side in ("input", "output"))
        kind = next((k for k in _OUTPUTS if name.startswith(k)), None)
        if kind is None:
            raise ValueError(f"expected golden cases out of {', '.join(_OUTPUTS)}, got {name!r}")
        own = _OUTPUTS[kind](model, given, wanted, folder)
        cases += [Case.compare(f"{name}.{k}", own[k], v, _tolerance(k, v)) for k, v in wanted.items()]
    if "generate_sizes" in about:
        cases.append(_sizes(about["generate_sizes"], int(stated(folder, r"for factor (\d+)", FACTOR))))
    if (folder / "hf_key_map.json").is_file():
        cases += _huggingface(model, folder)
    return cases


def load(folder: Path) -> Emu3:
    """A golden folder. The ids of digits are told by its text alone."""
    zero = int(stated(folder, r"digits 0-9 = (\d+)", emu3.SPELLING["0"]))
    spelling = {str(d): zero + d for d in range(10)} | {"*": int(stated(folder, r"'\*' = (\d+)", emu3.SPELLING["*"]))}
    model = cast(Emu3, build(emu3.read(folder, {}, spelling=spelling), folder, dtype=torch.float32)[0])
    first = read_json(folder / "config.json")["visual_start"]
    if model.first_code != first:
        raise ValueError(f"expected the codes from id {first}, got {model.first_code}")
    return model


def _tolerance(name: str, golden: Tensor) -> float:
    if not golden.is_floating_point():
        return 0.0
    return LOGITS if "logits" in name or "scores" in name else TOLERANCE


# -- the tokenizer ----------------------------------------------------------------------------------------------------

def _tokenizer(model: Emu3, given: Tensors, wanted: Tensors, folder: Path) -> dict[str, Tensor]:
    """Of pictures (b, 3, H, W) or clips (b, T, 3, H, W); all frames of a picture are those of a clip of its codes."""
    codec, pixels = model.codec, given["pixels"]
    assert isinstance(codec, VideoTokenizer)
    codes = codec.encode(pixels)
    own = {"pre_quant": codec.features(pixels).transpose(1, 2), "codes": codes, "reconstruction": codec.decode(codes)}
    if "reconstruction_all_frames" in wanted:
        own["reconstruction_all_frames"] = codec.decode(codes[:, None])
    return own


# -- sequences --------------------------------------------------------------------------------------------------------

def _written(model: Emu3, ids: list[int], seen: list[bool], *, drawn: bool) -> tuple[Writer, list[Tensor]]:
    """A row of published ids, and the codes of each picture in it. Ids that are not `seen` are pads behind the rest."""
    w, codes, block = model.writer(Reader()), list[Tensor](), model.layout.code
    assert block is not None
    at, end = 0, sum(seen)
    while at < end:
        opens = ids[at] == model.marks.image_start
        last = model.marks.image_end if opens else model.marks.image_start
        stop = next((i + opens for i in range(at, end) if ids[i] == last), end)
        if opens:
            [grid], found = block.parse(ids[at:stop], range(model.first_code, model.first_code + model.values))
            w.code(len(codes), w.plan(grid), drawn=drawn)
            codes.append(torch.tensor(found))
        else:
            w.text(ids[at:stop], open=False, close=False)
        at = stop
    if end < len(ids):
        w.text(ids[end:], open=False, close=False, role=PAD)
    return w, codes


def _logits(model: Emu3, page: Page, codes: list[Tensor]) -> Tensor:
    """(rows, length, vocabulary) of rows of one length."""
    places = torch.arange(page.ids.numel())
    hidden = model.forward_page(page, [], torch.cat(codes) if codes else None)
    return model.head(pick(hidden, page.tokens, places)).unflatten(0, page.tokens.shape)


def _sft(model: Emu3, given: Tensors, wanted: Tensors, folder: Path) -> dict[str, Tensor]:
    """Pads see what is before them and nothing sees a pad, as published. The loss is that of training where codes alone
    have labels."""
    rows, codes = list[Writer](), list[Tensor]()
    for ids, seen in zip(given["input_ids"].tolist(), given["attention_mask"].bool().tolist(), strict=True):
        w, found = _written(model, ids, seen, drawn=True)
        w.codes = [(len(codes) + i, drawn) for i, drawn in w.codes]
        rows.append(w)
        codes += found
    page = Page.of([[w] for w in rows])
    labelled = torch.nonzero((given["labels"][:, 1:] >= 0).flatten()).squeeze(1)
    places = labelled // (page.tokens.shape[1] - 1) + labelled  # of the tokens before, in rows that are one longer
    batch = Batch(page, codes, [], [], [c for w in rows for c in w.codes])
    model.mask = model.mask & key_is("role", 0)
    model.picture_codes = list  # type: ignore[method-assign]  # pictures are given as codes
    try:
        logits = _logits(model, page, codes)
        errors = next_token.cross_entropy(logits[:, :-1].flatten(0, 1)[labelled],
                                          given["labels"][:, 1:].flatten()[labelled])
        loss = model.loss(batch, torch.Generator()).mean()["image"] if torch.equal(places, page.questions) else None
        return {"logits": logits, "loss": errors.mean() if loss is None else loss}
    finally:
        del model.mask, model.picture_codes


def _understanding(model: Emu3, given: Tensors, wanted: Tensors, folder: Path) -> dict[str, Tensor]:
    """Cached steps, one token after the other; what is said is dictated."""
    first, said = list[Tensor](), list[Tensor]()
    seen = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    for row, kept, answer in zip(given["input_ids"], seen, wanted["greedy_ids"].tolist(), strict=True):
        ids, reader = row[kept].tolist(), Reader()
        w, codes = _written(model, ids, [True] * len(ids), drawn=False)
        logits: list[Tensor] = model.run([Read(reader, w, codes=codes, predict=True)])
        first.append(logits[0])
        for token in answer[:-1]:
            w = model.writer(reader)
            w.text([token], open=False, close=False)
            logits += model.run([Read(reader, w, predict=True)])
        said.append(torch.stack(logits))
    spoken = torch.stack(said)
    return {"logits_last": torch.stack(first), "greedy_logits": spoken, "greedy_ids": spoken.argmax(-1)}


# -- drawing ----------------------------------------------------------------------------------------------------------

def _drawn(model: Emu3, prompts: list[list[int]], grid: Grid, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """The codes (n,) that the sampler of the system draws; both prompts end where the block begins."""
    contexts = {"full": Reader(), "no_text": Reader()}
    for reader, ids in zip(contexts.values(), prompts, strict=True):
        w = model.writer(reader)
        w.text(ids, open=False, close=False)
        model.run([Read(reader, w)])
    program = model.raster(uniforms, grid, contexts, sampling, 0, lambda event: None, False)
    work = next(program)
    while True:
        try:
            work = program.send(model.run([work])[0])
        except StopIteration as stop:
            return stop.value


def _gen(model: Emu3, given: Tensors, wanted: Tensors, folder: Path) -> dict[str, Tensor]:
    """Rows are drawn one by one, each at its size; then all logits of both branches behind what was drawn."""
    scale, top_k = stated(folder, r"cfg (\d+(?:\.\d+)?)", SCALE), int(stated(folder, r"top_k (\d+)", TOP_K))
    chain = Guidance(branches=(Branch(context="no_text", scale=scale),))
    sampling = Sampling(guidance=chain, codes=TokenSampling(top_k=top_k))
    pad = json.loads((folder / "config.json").read_text())["special_tokens"]["pad"]
    steps, every = given["uniforms"].shape[1], range(model.first_code, model.first_code + model.values)
    own: dict[str, list[Tensor]] = {k: [] for k in ("new_ids", "allowed", "cond", "guided")}
    pictures: dict[str, Tensor] = {}
    for i, (rows, columns) in enumerate(given["sizes_hw"].tolist()):
        grid = (rows, columns)
        plan = model.writer(Reader()).plan(grid)
        begins = plan.index(CELL)
        prompts = [given["ids"][i][given["attention_mask"][i].bool()].tolist(), given["negative_ids"][i].tolist()]
        if any(ids[-begins:] != plan[:begins] for ids in prompts):
            raise ValueError(f"expected prompts that end with {plan[:begins]}, got {[p[-begins:] for p in prompts]}")
        prompts = [ids[:-begins] for ids in prompts]
        tail = [*plan[begins:], model.marks.end, *[pad] * steps][:steps]
        cells = [k for k, token in enumerate(tail) if token == CELL]
        uniforms = torch.zeros(rows * columns, dtype=torch.float64)
        uniforms[: len(cells)] = given["uniforms"][i][cells].double()
        codes = _drawn(model, prompts, grid, uniforms, sampling)
        ids = torch.tensor(tail)
        ids[cells] = model.first_code + codes[: len(cells)]
        own["new_ids"].append(ids)
        allowed = torch.zeros(steps, model.head.out_features, dtype=torch.bool)
        for k, token in enumerate(tail):
            may = Grammar.allowed(token, every)
            allowed[k, may.start : may.stop] = True
        own["allowed"].append(allowed)
        full, null = (_behind(model, prompt, plan, codes, tail) for prompt in prompts)
        own["cond"].append(full)
        normed = {"full": full.log_softmax(-1), "no_text": null.log_softmax(-1)}
        own["guided"].append(next_token.guide(normed, chain, 0.0).masked_fill(~allowed, REMOVED))
        if len(cells) == rows * columns:
            grid_codes = codes.unflatten(0, grid)
            pictures |= {f"codes{i}": grid_codes, f"image{i}": model.codec.decode(grid_codes[None])[0]}
    stacked = {k: torch.stack(v) for k, v in own.items()}
    out = {"new_ids": stacked["new_ids"], "allowed": stacked["allowed"], "cond_logits_last": stacked["cond"][:, -1]}
    for key in wanted:
        if cut := re.fullmatch(r"(guided_scores|cond_logits)_first(\d+)", key):
            out[key] = stacked["guided" if cut[1] == "guided_scores" else "cond"][:, : int(cut[2])]
    return out | pictures


def _behind(model: Emu3, prompt: list[int], plan: list[int], codes: Tensor, tail: list[int]) -> Tensor:
    """Logits (steps, vocabulary) that predict each of `tail`, which begins with the first code of the plan."""
    w = model.writer(Reader())
    w.text(prompt, open=False, close=False)
    w.code(0, plan, drawn=True)
    before = len(prompt) + plan.index(CELL) - 1
    w.text(tail[len(plan) - plan.index(CELL) :], open=False, close=False)
    return _logits(model, Page.of([[w]]), [codes])[0, before : before + len(tail)]


def _sizes(wanted: Mapping[str, Sequence[int]], factor: int) -> Case:
    """`width:height@area` -> rows and columns."""
    wrong = 0
    for asked, grid in wanted.items():
        width, height, area = (int(number) for number in re.split("[:@]", asked))
        wrong += [side // factor for side in size_of_area(height, width, area, factor)] != list(grid)
    return Case("generate_sizes", float(wrong), float(wrong), 0.0)


_OUTPUTS = {"image": _tokenizer, "video": _tokenizer, "sft": _sft, "understanding": _understanding, "gen": _gen}


# -- the other layout -------------------------------------------------------------------------------------------------

def _huggingface(model: Emu3, folder: Path) -> list[Case]:
    """The published weights under the names of Hugging Face, the tokenizer's by the key map; and back to ours."""
    home = json.loads((folder / "hf_key_map.json").read_text())
    expected = {f"text_model.{k}": v for k, v in load_file(folder / "llm.safetensors").items()}
    expected |= {f"vqmodel.{home[k]}": v
                 for k, v in load_file(folder / f"{emu3.TOKENIZER}.safetensors").items()}
    written, state = emu3.write(model, "huggingface"), model.state_dict()
    own = to_theirs(state, written.rules) | dict(written.tensors)
    wrong = [k for k in expected.keys() | own.keys() if k not in own or k not in expected or not torch.equal(
        own[k].flatten().double(), expected[k].flatten().double())]
    matrices = [k for k, v in own.items() if k.endswith("_proj.weight") and v.ndim != 2]
    back, report = to_ours(own, written.rules, {k: v.shape for k, v in state.items()}, tuple(written.tensors))
    lost = [k for k, v in state.items() if k not in back or not torch.equal(back[k], v)]
    bad = float(len(lost) + bool(report))
    found = float(len(wrong) + len(matrices))
    return [Case("huggingface.names", found, found, 0.0),
            Case("huggingface.round_trip", bad, bad, 0.0)]
