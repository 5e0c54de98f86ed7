"""The golden cases of MMaDA: hiding codes, prompts of every task, logits under the three masks, the losses, drawing
with given uniform numbers, inpainting, and texts block by block.

Published rows are ids of one vocabulary. Those that draw are padded on the left. Where pads are hidden, the golden
logits in their places are those of uniform attention, which nobody reads: only the others are compared.
"""
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters import mmada
from diptych.adapters.cases import Case
from diptych.objectives import masked_diffusion, masked_token, next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.masked_diffusion import Plan
from diptych.objectives.masked_token import Step
from diptych.objectives.next_token import TokenSampling
from diptych.parts.grammar import CELL
from diptych.parts.interleave import IGNORE, Frame, Page, Writer
from diptych.parts.masks import Predicate
from diptych.parts.quantize import SignConfig, VectorConfig
from diptych.parts.trunks import Between, pick
from diptych.parts.vq import VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.bidirectional import Bidirectional
from diptych.systems.mmada import PADS_SEEN, REAL, Mmada, picture_edges
from diptych.systems.works import Guess, Reader, Sequenced

TOLERANCE, LOGITS = 1e-4, 3e-4
DROP = 0.1
SCALES = {"t2i_inpaint": 1.5, "t2i_nocfg": 0.0, "text_cfg": 1.5}  # w, where the case's name does not tell
ALL = Bidirectional.mask
Tensors = Mapping[str, Tensor]


class Golden:
    """A golden folder with the model of its weights. Its tokenizer of pictures is another folder's, and never asked."""

    def __init__(self, folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        self.extra = values["_extra"]
        self.tensors = load_file(folder / "golden.safetensors")
        pyramid = PyramidConfig(channels=8, channel_mult=(1,), blocks=(1,), attention=(), norm_groups=4)
        book = SignConfig(width=int(math.log2(values["codebook_size"])))
        codec = VQTokenizerConfig(encoder=pyramid, decoder=pyramid, latent_channels=8,
                                  quantizer=VectorConfig(codebook=book))
        self.model = mmada.load_transformer(folder, codec)

    def side(self, name: str, side: str) -> dict[str, Tensor]:
        start = f"{name}.{side}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def texts(self, name: str) -> list[list[int]]:
        given = self.side(name, "input")
        return [given[f"text{i}"].tolist() for i in range(sum(k.startswith("text") for k in given))]


@torch.no_grad()
def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    g, cases = Golden(folder), list[Case]()
    for name in sorted({k.split(".")[0] for k in g.tensors}):
        kind = next((k for k in _OUTPUTS if name.startswith(k)), None)
        if kind is None:
            raise ValueError(f"expected golden cases out of {', '.join(_OUTPUTS)}, got {name!r}")
        wanted = g.side(name, "output")
        own = _OUTPUTS[kind](g, name, g.side(name, "input"), wanted)
        if set(wanted) - set(own):
            raise ValueError(f"expected outputs out of {', '.join(own)} in {name}, got {', '.join(sorted(wanted))}")
        for key, golden in wanted.items():
            value, real = own[key], own.get(f"{key}.real")
            value, golden = (value, golden) if real is None else (value[real], golden[real])
            exact = 0.0 if not golden.is_floating_point() else LOGITS if "logits" in key else TOLERANCE
            cases.append(Case.compare(f"{name}.{key}", value, golden, exact))
    return cases


# -- rows -------------------------------------------------------------------------------------------------------------

def row_writer(model: Mmada, row: Sequence[int], skip: int = 0) -> tuple[Writer, Tensor]:
    """A published row without its first `skip` tokens, and its codes (n,)."""
    c, row = model.config, list(row)
    start = row.index(model.marks.image_start) if model.marks.image_start in row else len(row)
    stop = row.index(model.marks.image_end) if model.marks.image_end in row else len(row)
    pads = row.index(c.specials.draw) if c.specials.draw in row[:start] else 0
    if any(i != c.specials.pad for i in row[:pads]):
        raise ValueError(f"expected pads before the task token, got {row[:pads]}")
    w = model.writer(Reader(position=skip))
    w.fill(pads, c.specials.pad)
    w.text(row[max(pads, skip) : start + 1], open=False, close=False)
    cells = torch.tensor(row[max(start + 1, skip) : stop], dtype=torch.long)
    if len(cells):
        w.code(0, [CELL] * len(cells), drawn=c.specials.draw in row[:start], ahead=False)
    w.text(row[stop:], open=False, close=False)
    return w, (cells - c.text_size).masked_fill(cells == c.specials.mask, model.values)


def _states(model: Mmada, rows: Tensor, mask: Predicate, between: Between | None = None) -> tuple[Page, Tensor]:
    """The page of published rows (N, L) and its states (N * L, width)."""
    written = [row_writer(model, row) for row in rows.tolist()]
    page = Page.of([[w] for w, _ in written])
    states = model.states(page, None, model.code_tokens(torch.cat([codes for _, codes in written])))
    hidden = model.trunk(states, page.tokens, mask, None, between)
    return page, pick(hidden, page.tokens, torch.arange(rows.numel()))


def _logits(model: Mmada, rows: Tensor, mask: Predicate) -> Tensor:
    return model.head(_states(model, rows, mask)[1]).unflatten(0, rows.shape)


def _forward(g: Golden, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    """Pads hidden (published: all pairs with a pad get the least of all numbers), seen a little less, seen."""
    ids, real, seen = given["ids"], given["mask"].bool(), list[Tensor]()

    def look(layer: int, states: list[Tensor]) -> list[Tensor]:
        seen.append(torch.cat(states))
        return states

    page, hidden = _states(g.model, ids, ALL & REAL, look)
    order = torch.cat(page.tokens.routes(2)).argsort()
    rows = [part[order][: ids.shape[1]] for part in seen[:-1]] + [hidden[: ids.shape[1]]]
    few = ids[: len(wanted["logits_no_bias_row01"])]
    return {"hidden_row0": torch.stack(rows), "hidden_row0.real": real[0].expand(len(rows), -1),
            "logits_bool_bias": g.model.head(hidden).unflatten(0, ids.shape), "logits_bool_bias.real": real,
            "logits_float_bias_row01": _logits(g.model, few, PADS_SEEN),
            "logits_no_bias_row01": _logits(g.model, few, ALL)}


# -- prompts and hiding -----------------------------------------------------------------------------------------------

def _corrupt(g: Golden, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    hidden = masked_token.hide(given["t"], given["uniforms"])
    return {"mask_prob": masked_token.mask_share(given["t"]),
            "input_ids": masked_token.cover(given["image_ids"], hidden, g.model.config.specials.mask),
            "labels": given["image_ids"].masked_fill(~hidden, IGNORE)}


def _marked(model: Mmada, ids: list[int], lead: tuple[int, ...], close: bool) -> list[int]:
    """A text that has its opening mark, and is given one otherwise."""
    w = model.writer(Reader())
    frame = Frame(lead=lead, open=ids[:1] != [model.marks.start], close=close)
    w.text(ids, frame=frame)
    return w.ids


def _cut(ids: list[int], length: int, end: int | None) -> list[int]:
    """What is too long is cut, and ends as it would have (`end`)."""
    return ids if len(ids) <= length else ids[:length] if end is None else [*ids[: length - 1], end]


def _draw_rows(g: Golden, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    model, length = g.model, g.model.config.prompt
    s, m = model.config.specials, model.marks
    corrupted = name == "prompt_t2i"
    codes = g.side("corrupt", "output") if corrupted else {}
    dropped = given.get("cond_drop_uniform", torch.ones(len(g.texts(name)))) < DROP
    ids, labels, real = list[list[int]](), list[list[int]](), list[list[int]]()
    for i, text in enumerate(g.texts(name)):
        words = _cut(_marked(model, [] if dropped[i] else text, (s.draw,), True), length, m.end)
        pads, count = length - len(words), wanted["input_ids"].shape[1] - length - 2
        shown = codes["input_ids"][i].tolist() if corrupted else [s.mask] * count
        asked = codes["labels"][i].tolist() if corrupted else shown
        ids.append([s.pad] * pads + words + [m.image_start, *shown, m.image_end])
        labels.append([IGNORE] * pads + words + [m.image_start, *asked, m.image_end])
        real.append([0] * pads + [1] * (len(ids[-1]) - pads))
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "masks": torch.tensor(real)}


def _told(g: Golden, row: list[int], start: int) -> int:
    """Tokens of a prompt: up to the last header of a chat, or all before `start`."""
    header = g.extra["end_header"]
    return len(row) - row[::-1].index(header) if header in row[start:] else start


def _hide(g: Golden, rows: list[list[int]], told: Tensor, given: Tensors) -> dict[str, Tensor]:
    """Rows with tokens of their answers hidden; `told` (N, L) bool is prompt."""
    ids = torch.tensor(rows)
    p = masked_diffusion.mask_probability(given["t"])
    hidden = masked_diffusion.hide(p, given["uniforms"]) & ~told
    return {"input_ids": ids.masked_fill(hidden, g.model.config.specials.mask), "clean": ids,
            "p_mask": p[:, None].expand(ids.shape), "answer_lengths": (~told).sum(1, keepdim=True).expand(ids.shape)}


def _before(lengths: list[int], total: int) -> Tensor:
    return torch.arange(total) < torch.tensor(lengths)[:, None]


def _text_rows(g: Golden, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    total, end = wanted["input_ids"].shape[1], g.model.marks.end
    rows = [_cut(_marked(g.model, text, (), False), total, None) for text in g.texts(name)]
    rows = [row + [end] * (total - len(row)) for row in rows]
    chat = name.startswith("prompt_lm_chat")
    told = _before([_told(g, row, 0) if chat else 0 for row in rows], total)
    out = _hide(g, rows, told, given)
    return out | {"labels": out["clean"]}


def _read_rows(g: Golden, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    rows, total, end = list[list[int]](), wanted["input_ids"].shape[1], g.model.marks.end
    for text, image in zip(g.texts(name), given["image_ids"].tolist(), strict=True):
        w = g.model.writer(Reader())
        assert g.model.layout.read is not None
        plan = g.model.layout.read.plan((1, len(image)))
        w.code(0, plan, drawn=False, ahead=False)
        codes = iter(image)
        block = [next(codes) if i == CELL else i for i in plan]
        words = _cut(_marked(g.model, text, (), False), total - len(block), end)
        rows.append(block + words + [end] * (total - len(block) - len(words)))
    start = len(block)
    told = _before([_told(g, row, start) for row in rows], total)
    out = _hide(g, rows, told, given)
    return out | {"clean_ids": out["clean"], "prompt_mask": told.long(),
                  "labels": out["clean"].masked_fill(_before([start] * len(rows), total), IGNORE)}


def _reason_rows(g: Golden, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    """Without a header all of the text is prompt; the fixed tokens of the picture are too."""
    model, total = g.model, wanted["input_ids"].shape[1]
    rows, prompts = list[list[int]](), list[int]()
    for text, image in zip(g.texts(name), given["image_ids"].tolist(), strict=True):
        length = total - len(image) - 2
        words = _cut(_marked(model, text, (model.config.specials.reason,), False), length, model.marks.end)
        words += [model.marks.end] * (length - len(words))
        rows.append([*words, model.marks.image_start, *image, model.marks.image_end])
        prompts.append(_told(g, words, 0) or length)
    told, ids = _before(prompts, total), torch.tensor(rows)
    told |= (ids == model.marks.image_start) | (ids == model.marks.image_end)
    return {"input_ids": ids, "prompt_mask": told.float()}


# -- losses -----------------------------------------------------------------------------------------------------------

def _losses(g: Golden, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    """Rows to draw, of text, to read, and to reason, all in the forward pass of training: pads are seen."""
    mask, out = g.model.config.specials.mask, dict[str, Tensor]()
    parts = {"t2i": g.side("prompt_t2i", "output"), "mmu": g.side("prompt_mmu", "output"),
             "lm": g.side("prompt_lm" if name.startswith("loss_plain") else "prompt_lm_chat", "output")}
    if name.startswith("loss_r2i"):
        rows = g.side("prompt_r2i", "output")
        parts["r2i"] = _hide(g, rows["input_ids"].tolist(), rows["prompt_mask"].bool(), given)
        parts["r2i"]["labels"] = rows["input_ids"]
        out = {k: parts["r2i"][k] for k in ("input_ids", "p_mask", "answer_lengths")}
    logits = {}
    for kind, part in parts.items():
        rows, labels = part["input_ids"], part["labels"].flatten()
        page, states = _states(g.model, rows, g.model.mask)
        logits[kind] = g.model.head(states)
        if kind == "t2i":
            places = page.questions[labels[page.questions] != IGNORE]
            places = torch.cat((places, picture_edges(page.questions)))
            out["loss_t2i"] = masked_token.loss(logits[kind][places], labels[places]).mean()
            continue
        hidden = torch.nonzero(rows.flatten() == mask).squeeze(1)
        terms = masked_diffusion.loss(logits[kind][hidden], labels[hidden], part["p_mask"].flatten()[hidden])
        out[f"loss_{kind}"] = (terms / part["answer_lengths"].flatten()[hidden]).sum() / len(rows)
    return out | {"logits_abs_mean": torch.cat(list(logits.values())).abs().mean()}


# -- drawing ----------------------------------------------------------------------------------------------------------

def _scale(name: str) -> float:
    """w; "cfg35" in the name of a case is 3.5."""
    known = next((w for case, w in SCALES.items() if name.startswith(case)), None)
    found = re.search(r"cfg(\d)(\d)", name)
    if known is None and found is None:
        raise ValueError(f"expected the guidance of {name} in its name, as in cfg35, or one of {', '.join(SCALES)}")
    return known if known is not None else float(f"{found[1]}.{found[2]}") if found else 0.0


def _follow(model: Mmada, chain: Any, contexts: dict[str, Sequenced],
            guidance: Guidance) -> tuple[Tensor, list[Tensor]]:
    """What a sampler returns, and what every context answered to each of its questions (contexts, n, V)."""
    program, told, answers = model.follow(chain, contexts, guidance), list[Tensor](), None
    try:
        while True:
            work = program.send(answers)
            assert isinstance(work, Guess)
            answers = model.run([work])[0]
            told.append(torch.stack(answers))
    except StopIteration as stop:
        return stop.value, told


def _guidance(context: str, w: float) -> Guidance:
    return Guidance(branches=(Branch(context=context, scale=1 + w),) if w else ())


def _drawing(g: Golden, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    """Pads are hidden, so they are left out."""
    model, total = g.model, len(given["uniforms"])
    guidance, sampling = _guidance("no_text", _scale(name)), TokenSampling(temperature=1.0)
    codes, told, steps = list[Tensor](), list[list[Tensor]](), list[list[Step]]()
    for i in range(len(given["input_ids"])):
        contexts, x = dict[str, Sequenced](), torch.empty(0)
        for key, rows in (("no_text", "uncond_input_ids"), ("full", "input_ids")):
            if key == "full" or guidance.branches:
                row = given[rows][i].tolist()
                w, x = row_writer(model, row[row.index(model.config.specials.draw) :])
                contexts[key] = Sequenced(w)
        steps.append([])
        chain = masked_token.fill(x, given["uniforms"][:, i], given["gumbel_uniforms"][:, i], model.values, sampling,
                                  1.0, "released", steps[-1])
        found, answers = _follow(model, chain, contexts, guidance)
        codes.append(found)
        told.append(answers)
    logits = [torch.stack([log[k] for log in told], 1).flatten(0, 1) for k in range(total)]  # by context, then by row
    raw = [[next_token.choose(next_token.log_probs(next_token.guide(
        dict(zip(("full", "no_text"), log[k], strict=False)), guidance, 0.0), sampling), given["uniforms"][k, i])
        for i, log in enumerate(told)] for k in range(total)]
    remasked = torch.stack([torch.stack([own[k].remasked for own in steps]) for k in range(total)])
    return {"codes": torch.stack(codes), "step_codes": torch.stack([torch.stack(r) for r in raw]),
            "remasked": remasked, "mask_len": remasked.sum(-1), "logits_step0": logits[0], "logits_last": logits[-1]}


# -- texts ------------------------------------------------------------------------------------------------------------

def plan_of(states: Tensor, mask: int) -> Plan:
    """Blocks and steps behind states (T + 1, rows, n), which may stop early: the shortest blocks that are each finished
    before the next begins."""
    total, tokens = len(states) - 1, states.shape[-1]
    filled = (states != mask).all(1)
    done = int(filled[-1].sum())
    for size in range(1, done + 1):
        if done % size or tokens % size or total % (done // size):
            continue
        each = total * size // done
        wanted = [(k // each * size, -(-k // each) * size) for k in range(total + 1)]
        if all(filled[k, :a].all() and (states[k, :, b:] == mask).all() for k, (a, b) in enumerate(wanted)):
            return [(slice(a, a + size), each) for a in range(0, tokens, size)]
    raise ValueError(f"expected states of {total} steps, block by block, got others")


def _text(g: Golden, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    model, mask, states = g.model, g.model.config.specials.mask, wanted["states"]
    guidance = _guidance("no_prompt", _scale(name) if "cfg" in name else 0.0)
    uniforms, sure = given.get("gumbel_uniforms_f64"), given.get("confidence_uniforms")
    plan, stop = plan_of(states, mask), given.get("eot_token")
    sampling = TokenSampling(temperature=0.0 if uniforms is None else 1.0)
    logs, first = list[Tensor](), list[Tensor]()
    for i, row in enumerate(given["prompt_ids"].tolist()):
        hidden = int((given["attention_mask"][i] == 0).sum()) if "attention_mask" in given else 0
        w, codes = row_writer(model, row, skip=hidden)
        w.text([mask] * states.shape[-1], open=False, close=False, target=True, ahead=False)
        full = Sequenced(w, codes=[codes])
        bare = model.without_prompt(full)
        bare.codes = [torch.full_like(codes, model.values)]
        log = [torch.full((states.shape[-1],), mask)]
        chain = masked_diffusion.fill(
            log[0], mask, plan, sampling, None if uniforms is None else uniforms[:, i],
            None if sure is None else sure[:, i],
            None if stop is None else lambda block: bool(block[-1] == stop), log)
        first.append(_follow(model, chain, {"full": full, "no_prompt": bare}, guidance)[1][0])
        logs.append(torch.stack(log))
    own = torch.stack(logs, 1)
    return {"states": own, "ids": torch.cat((given["prompt_ids"], own[-1]), 1),
            "logits_step0": torch.stack(first, 1).flatten(0, 1)}


_OUTPUTS = {"corrupt": _corrupt, "prompt_t2i": _draw_rows, "prompt_lm": _text_rows, "prompt_mmu": _read_rows,
            "prompt_r2i": _reason_rows, "forward": _forward, "loss": _losses, "t2i": _drawing, "text": _text}
