"""The golden cases of Show-o: the tokenizer, hiding codes, prompts, training, drawing with given uniform numbers,
inpainting, and answering.

Published rows are ids of one vocabulary. Those that draw are padded on the left; with `rm_pad` the pads are apart from
the rest, as a document of their own before it.
"""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters import show_o
from diptych.adapters.cases import Case
from diptych.adapters.tokenizers import compare
from diptych.objectives import masked_token, next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.masked_token import Step
from diptych.objectives.next_token import TokenSampling
from diptych.parts.interleave import IGNORE, Frame, Page, Writer
from diptych.parts.trunks import pick
from diptych.parts.vq import VQTokenizer
from diptych.systems.base import Sampling
from diptych.systems.show_o import ShowO, picture_edges
from diptych.systems.works import Read, Reader, Together

TOLERANCE, LOGITS = 1e-4, 3e-4
DROP = 0.1
SCALES = {"t2i_cfg": 1.75, "t2i_nocfg": 0.0, "inpaint": 2.5}  # w
Tensors = Mapping[str, Tensor]


@torch.no_grad()
def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    golden = load_file(folder / "golden.safetensors")
    model, cases = show_o.load(folder), list[Case]()
    for name in sorted({k.split(".")[0] for k in golden}):
        if name.startswith("vq"):
            cases += tokenizer_case(model, name, golden)
            continue
        kind = next((k for k in _OUTPUTS if name.startswith(k)), None)
        if kind is None:
            raise ValueError(f"expected golden cases out of vq, {', '.join(_OUTPUTS)}, got {name!r}")
        given, wanted = ({k.removeprefix(f"{name}.{side}."): v for k, v in golden.items()
                          if k.startswith(f"{name}.{side}.")} for side in ("input", "output"))
        if kind in ("prompt", "mask"):  # whose rows are those of `train`
            wanted |= {k: golden[f"train.input.{k}"] for k in ("input_ids", "labels")}
        own = _OUTPUTS[kind](model, name, given, wanted)
        cases += [Case.compare(f"{name}.{k}", v, given["allowed"] if k == "allowed" and "allowed" in given else
                               wanted[k], _tolerance(k, v)) for k, v in own.items()]
    return cases


def _tolerance(name: str, value: Tensor) -> float:
    if not value.is_floating_point():
        return 0.0
    return LOGITS if "logits" in name else TOLERANCE


def tokenizer_case(model: ShowO, name: str, golden: Tensors) -> list[Case]:
    assert isinstance(model.codec, VQTokenizer)
    features = model.codec.features(golden[f"{name}.input.pixels"])
    out = model.codec.quantizer(features)
    entropy = out.losses.pop("entropy", torch.zeros(()))  # theirs is returned beside the sum of the others
    own = {"pre_quant": features, "quant": out.vectors, "codes": out.codes.flatten(1),
           "reconstruction": model.codec.decode(out.codes), "entropy_loss": entropy,
           "quantizer_loss": sum(out.losses.values(), torch.zeros(()))}
    return compare(name, {k: v for k, v in own.items() if f"{name}.output.{k}" in golden}, golden)


# -- rows -------------------------------------------------------------------------------------------------------------

def row_writers(model: ShowO, ids: list[int], *, rm_pad: bool = True) -> tuple[list[Writer], Tensor]:
    """A published row, its pads first if they stand apart, and its codes (n,)."""
    pad, task = model.special("[PAD]"), model.special("<|t2i|>")
    pads = ids.index(task) if rm_pad and task in ids else 0
    if any(i != pad for i in ids[:pads]):
        raise ValueError(f"expected pads before the task token, got {ids[:pads]}")
    before, w = model.writer(Reader()), model.writer(Reader(position=pads))
    before.text(ids[:pads], open=False, close=False)
    rest, codes = ids[pads:], torch.zeros(0, dtype=torch.long)
    if model.marks.image_start in rest:
        start, end = rest.index(model.marks.image_start), rest.index(model.marks.image_end)
        codes = torch.tensor(rest[start + 1 : end]) - model.first_code
        read = rest[max(start - 1, 0)] == model.special("<|mmu|>")
        w.text(rest[: start - read], open=False, close=False)
        if read:
            model.write_clean(w, 0, (1, len(codes)))
        else:
            model.write_drawn(w, 0, (1, len(codes)))
        rest = rest[end + 1:]
        w.position = w.strip.length + pads
    w.text(rest, open=False, close=False)
    return [before, w] if pads else [w], codes


def _rows(model: ShowO, rows: Tensor, rm_pad: bool = True) -> tuple[Page, Tensor, Tensor]:
    """Page, mask (N, 1, L, L) bool and hidden states (N * L, width) of published rows (N, L)."""
    written = [row_writers(model, row, rm_pad=rm_pad) for row in rows.tolist()]
    page = Page.of([writers for writers, _ in written])
    hidden = model.forward_page(page, [], torch.cat([codes for _, codes in written]))
    states = pick(hidden, page.tokens, torch.arange(rows.numel()))
    return page, model.mask.dense(page.tokens)[:, None], states


def _corrupt(model: ShowO, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    codes = given["image_ids"] - model.first_code
    hidden = masked_token.hide(given["t"], given["rand"])
    return {"mask_prob": masked_token.mask_share(given["t"]),
            "input_ids": masked_token.cover(codes, hidden, model.values) + model.first_code,
            "labels": given["image_ids"].masked_fill(~hidden, IGNORE)}


def _prompt(model: ShowO, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    """The rows of `train` from texts: too long ones are cut, those that draw and those that read keep their end."""
    length, pad = wanted["input_ids"].shape[1], model.special("[PAD]")
    ids, labels = list[list[int]](), list[list[int]]()

    def text(key: str, room: int, *, drop: bool = False, end: bool = True) -> list[int]:
        w = model.writer(Reader())
        w.text([] if drop else given[key].tolist())
        return w.ids[:room] if len(w.ids) <= room or not end else [*w.ids[: room - 1], model.marks.end]

    for i, (image, answers) in enumerate(zip(given["t2i_image_ids"], given["t2i_image_labels"], strict=True)):
        room = length - len(image) - 3
        words = [model.special("<|t2i|>"), *text(f"t2i_text{i}", room, drop=bool(given["cond_drop_uniform"][i] < DROP))]
        gap = room + 1 - len(words)
        block = [model.marks.image_start, *image.tolist(), model.marks.image_end]
        ids.append([pad] * gap + words + block)
        labels.append([IGNORE] * gap + words + [block[0], *answers.tolist(), block[-1]])
    for i in range(sum(k.startswith("lm_text") for k in given)):
        words = text(f"lm_text{i}", length, end=False)
        ids.append(words + [pad] * (length - len(words)))
        labels.append(words + [IGNORE] * (length - len(words)))
    for i, image in enumerate(given.get("mmu_image_ids", [])):
        w = model.writer(Reader())
        model.write_clean(w, 0, (1, len(image)))
        block = [*w.ids[:2], *image.tolist(), w.ids[-1]]
        words = text(f"mmu_text{i}", length - len(block))
        fill = length - len(block) - len(words)
        ids.append(block + words + [pad] * fill)
        labels.append([IGNORE] * len(block) + words + [IGNORE] * fill)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def _train(model: ShowO, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    """Rows of codes to draw give the masked loss, rows of a picture to read and of text alone the shifted one."""
    rows, labels = given["input_ids"], given["labels"]
    page, allowed, states = _rows(model, rows)
    logits = model.head(states).unflatten(0, rows.shape)
    drawn = (rows == model.special("<|t2i|>")).any(1)
    read = (rows == model.special("<|mmu|>")).any(1)
    counted = labels.flatten()[page.questions] != IGNORE
    places = torch.cat((page.questions[counted], picture_edges(page.questions)))
    own = {"logits": logits, "allowed": allowed,
           "loss_t2i": masked_token.loss(logits.flatten(0, 1)[places], labels.flatten()[places]).mean()}
    for key, chosen in (("loss_lm", ~drawn & ~read), ("loss_mmu", read)):
        after = labels[chosen][:, 1:]
        said = logits[chosen][:, :-1]
        own[key] = next_token.cross_entropy(said[after != IGNORE], after[after != IGNORE]).mean()
    return own


def _mask(model: ShowO, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    rows = wanted["input_ids"][: len(wanted["allowed"])]
    return {"allowed": _rows(model, rows, rm_pad=False)[1]}


# -- drawing ----------------------------------------------------------------------------------------------------------

def _context(model: ShowO, row: list[int]) -> tuple[Reader, Tensor]:
    """What stands before the picture, read, and the codes."""
    start = row.index(model.marks.image_start)
    reader, w = Reader(), model.writer(Reader())
    words = row[row.index(model.special("<|t2i|>")) : start]
    w.text(words[2:-1], frame=Frame(lead=(words[0],)))
    model.run([Read(reader, w)])
    return reader, torch.tensor(row[start + 1 : row.index(model.marks.image_end)]) - model.first_code


def _drawing(model: ShowO, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    """The guidance scale goes with the case's name."""
    w = next(scale for case, scale in SCALES.items() if name.startswith(case))
    chain = Guidance(branches=(Branch(context="no_text", scale=1 + w),)) if w else Guidance()
    sampling = Sampling(guidance=chain, codes=TokenSampling(temperature=1.0), temperature=1.0)
    height, width = (side // model.stride for side in wanted["pixels"].shape[-2:])
    rows = given["input_ids"].tolist()
    drawn, told, steps = list[Tensor](), list[list[Any]](), list[list[Step]]()
    for i, row in enumerate(rows):
        full, x = _context(model, row)
        contexts = {"full": full}
        if w:
            contexts["no_text"] = _context(model, given["uncond_input_ids"][i].tolist())[0]
        steps.append([])
        told.append([])
        program = model.unmask(x, given["uniforms"][:, i], given["gumbel_uniforms"][:, i], (height, width), contexts,
                               sampling, 0, lambda event: None, steps[-1])
        work = next(program)
        try:
            while True:
                assert isinstance(work, Together)
                told[-1].append(model.run([work])[0])
                work = program.send(told[-1][-1])
        except StopIteration as stop:
            drawn.append(stop.value)
    codes, total = torch.stack(drawn), len(given["uniforms"])
    # (contexts, rows, n, V) of a step, conditional rows first
    logits = [torch.stack([torch.stack(list(log[k])) for log in told], 1).flatten(0, 1) for k in range(total)]
    raw = [[next_token.choose(next_token.log_probs(next_token.guide(
        dict(zip(("full", "no_text"), log[k], strict=False)), chain, 0.0), sampling.codes), given["uniforms"][k, i])
        for i, log in enumerate(told)] for k in range(total)]
    remasked = torch.stack([torch.stack([own[k].remasked for own in steps]) for k in range(total)])
    allowed = _rows(model, torch.cat([given["input_ids"], given.get("uncond_input_ids", given["input_ids"][:0])]))[1]
    first = wanted["step_logits_first2"].shape[0]
    return {"allowed": allowed, "step_codes": torch.stack([torch.stack(r) for r in raw]), "remasked": remasked,
            "mask_len": remasked.sum(-1).float(), "sampled_codes": codes,
            "step_logits_first2": torch.stack(logits[:first]), "step_logits_last": logits[-1],
            "pixels": model.codec.decode(codes.unflatten(1, (height, width)))}


def _mmu(model: ShowO, name: str, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    """The prompt in one pass, then cached steps with what was said put into the mouth of the decoder."""
    _, allowed, states = _rows(model, given["input_ids"])
    (writer,), codes = row_writers(model, given["input_ids"][0].tolist())
    reader, logits = Reader(), list[Tensor]()
    logits += model.run([Read(reader, writer, codes=[codes], predict=True)])
    for token in wanted["ids"][:-1].tolist():
        w = model.writer(reader)
        w.text([token], open=False, close=False)
        logits += model.run([Read(reader, w, predict=True)])
    said = torch.stack(logits)
    return {"allowed": allowed, "prefix_logits": model.head(states)[None], "step_logits": said, "ids": said.argmax(-1)}


_OUTPUTS = {"corrupt": _corrupt, "prompt": _prompt, "train": _train, "mask": _mask, "t2i_": _drawing,
            "inpaint": _drawing, "mmu": _mmu}
