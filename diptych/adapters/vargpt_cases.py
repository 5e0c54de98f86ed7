"""The golden cases of VARGPT-v1.1: training on drawings and edits, the logits that preferences are learnt from, reading
a picture, and a picture drawn within an answer with given uniform numbers.

Published rows are ids; ids of the empty token stand for the cells of a picture. Rows with a picture to draw count
positions plainly, one per token, also inside a picture that is read.
"""
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters import infinity, scales, vargpt
from diptych.adapters.cases import Case
from diptych.adapters.keys import to_theirs
from diptych.adapters.vila_u import below
from diptych.objectives import next_scale, next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.interleave import Page, Writer
from diptych.parts.quantize import flip_bits
from diptych.parts.trunks import pick
from diptych.parts.windows import WindowConfig, WindowTower
from diptych.systems.base import Sampling
from diptych.systems.vargpt import Vargpt
from diptych.systems.works import Canvas, Decide, Grid, Read, Reader, Together

TOLERANCE, LOGITS = 2e-4, 5e-4
FIRST = 8  # slots of which states are stored
Tensors = Mapping[str, Tensor]


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder; which ones there are is read from the names of its tensors."""
    golden, about = load_file(folder / "golden.safetensors"), json.loads((folder / "config.json").read_text())
    model, cases = as_stored(vargpt.load(folder)), list[Case]()
    pictures = next((v for k, v in golden.items() if k.endswith(".input.pixel_values")), torch.zeros(0))
    grids = next((v for k, v in golden.items() if k.endswith(".input.image_grid_thw")), torch.zeros(0, 3))
    read = Reading(model, about, pictures, [(int(h), int(w)) for _, h, w in grids])
    for name in sorted({k.split(".")[0] for k in golden}):
        given, wanted = (scales.case_tensors(name, golden, side) for side in ("input", "output"))
        if "pixel_gen_values" in given:
            cases += training(read, name, given, wanted, folder)
            continue
        with torch.no_grad():
            case = understanding if name.startswith("understanding") else generation
            own = case(read, given, wanted)
            loose = {"image_uint8_bgr": 1.0, "mrope_position_ids": 0.0, "rope_delta": 0.0}
            cases += scales.compare(name, own, wanted, TOLERANCE, LOGITS, loose)
    return cases


def as_stored(model: Vargpt) -> Vargpt:
    """The outputs are those of a network that once was in float16 as a whole, the frequencies of its positions too."""
    assert isinstance(model.vision, WindowTower)
    model.vision.precision = torch.float16
    for rope in model.trunk.ropes:
        rope.precision = torch.float16
    return model


@dataclasses.dataclass
class Reading:
    """A model with the one picture (or several) that the rows of a folder refer to, in rows of patches."""

    model: Vargpt
    about: Mapping
    patches: Tensor
    grids: Sequence[Grid]

    def features(self) -> Tensor:
        return self.model.vision(self.patches, self.grids)

    def write(self, ids: Sequence[int], reader: Reader | None = None) -> Writer:
        """A published row as the system writes it. Marks around pictures are written with them."""
        model, llm, left = self.model, self.about["llm"], list(self.grids)
        image, pad = llm["image_token_id"], llm["special_tokens"][vargpt.TOKENS[2]]
        vision = model.config.vision
        assert isinstance(vision, WindowConfig)
        w, text, at = model.writer(reader or Reader()), list[int](), 0
        while at < len(ids):
            following = ids[at + 1] if at + 1 < len(ids) else None
            if following not in (image, pad):
                text.append(ids[at])
                at += 1
                continue
            w.text(text, open=False, close=False)
            before, text = w.strip.length, []
            if following == image:
                rows, columns = (n // vision.merge for n in left.pop(0))
                w.feature(0, rows * columns, grid=(rows, columns))
            else:
                model.write_drawn(w, 0, model.config.decoder.scales[-1])
            at += w.strip.length - before
        w.text(text, open=False, close=False)
        if w.ids != [0 if i in (image, pad) else i for i in ids]:
            raise ValueError("expected rows of text, pictures and cells as their configs imply, got other ones")
        return w


# -- training ---------------------------------------------------------------------------------------------------------

def training(read: Reading, name: str, given: Tensors, wanted: Tensors, folder: Path) -> list[Case]:
    """Outputs, and the gradients of the whole loss that are stored."""
    model, ids = read.model, given["input_ids"]
    page = Page.of([[read.write(row)] for row in ids.tolist()])
    plain = torch.arange(ids.shape[1], dtype=torch.float32)[None, :, None].expand(*ids.shape, 3)
    page = dataclasses.replace(page, tokens=dataclasses.replace(page.tokens, position=plain))
    count = len(given["flip_percent"])
    uniforms = [given[f"flip_uniform_scale{k}"] for k in range(count)]
    lesson = model.lesson(given["pixel_gen_values"], flip_bits(uniforms, (given["flip_percent"] * 0.01).tolist()))
    grads = [k for k in wanted if k.startswith("grad.")]
    model.zero_grad()
    with torch.set_grad_enabled(bool(grads)):
        condition = model.conditions(torch.zeros(len(ids), dtype=torch.bool))
        slots = model.slots(lesson.inputs, condition)
        features = read.features() if "image_grid_thw" in given else None
        states = model.states(page, features, model.to_language(slots).flatten(0, 1))
        hidden = model.trunk(states, page.tokens, model.mask)
        memory, known = model.remember(hidden, page)
        cells = pick(hidden, page.tokens, page.questions).unflatten(0, (len(ids), -1))
        entering = model.from_language(cells)
        logits = model.decoder(entering, condition, model.config.decoder.scales, memory, known)
        said = model.head(pick(hidden, page.tokens, torch.arange(ids.numel()))).unflatten(0, ids.shape)
        # labels are the ids themselves, the prompt included, but not what stands for cells
        asked = ids[:, 1:] != read.about["llm"]["special_tokens"][vargpt.TOKENS[2]]
        text = next_token.cross_entropy(said[:, :-1][asked], ids[:, 1:][asked]).mean()
        bits = next_scale.loss(logits, lesson.codes).mean()
        total = text + model.config.image_weight * bits
    length = sum(rows * columns for rows, columns in model.config.decoder.scales)
    own = {"loss": total, "loss_text": text, "loss_bits": bits, "gen_logits": logits.flatten(2),
           "gen_labels": lesson.codes, "text_logits_first4": said[:, :4], "text_logits_last4": said[:, -4:],
           "cross_kv": memory[known], "decoder_input_first8": entering[:, :FIRST],
           "llm_slot_input_first8_and_pads": torch.cat((slots[:, :FIRST], slots[:, length:]), 1)}
    own = {k: v.detach() for k, v in own.items() if k in wanted}
    cases = scales.compare(name, own, wanted, TOLERANCE, LOGITS)
    if grads:
        total.backward()
        theirs = load_file(folder / "weights.safetensors")
        cases += gradients(read, name, {k: wanted[k] for k in grads}, below(theirs, vargpt.DECODER))
    return cases


def gradients(read: Reading, name: str, wanted: Tensors, decoder: Tensors) -> list[Case]:
    """Of stored parameters, each relative to its largest entry; those that are never used have none."""
    model, cases = read.model, []
    c = model.config
    found = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
    rules = [r for r in vargpt.rules(c, infinity.block_names(decoder)) if r.ours in found and r.theirs[0] != vargpt.SOS]
    ours = to_theirs(found, rules)
    for key, value in ((k.removeprefix("grad."), v) for k, v in wanted.items()):
        scale = value.abs().max().clamp(min=1e-6)
        own = torch.zeros_like(value) if key.startswith(vargpt.UNUSED) else ours[key]
        cases.append(Case.compare(f"{name}.grad.{key}", own / scale, value / scale, TOLERANCE))
    return cases


# -- reading ----------------------------------------------------------------------------------------------------------

def understanding(read: Reading, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    """Here pictures have positions over rows and columns."""
    model, ids = read.model, given["input_ids"]
    page = Page.of([[read.write(row)] for row in ids.tolist()])
    features = read.features()
    hidden = model.trunk(model.states(page, features, None), page.tokens, model.mask)
    position = page.tokens.position
    return {"mrope_position_ids": position.permute(2, 0, 1), "vit_features": features,
            "rope_delta": position.amax((1, 2))[:, None] + 1 - ids.shape[1],
            "logits": model.head(pick(hidden, page.tokens, torch.arange(ids.numel()))).unflatten(0, ids.shape)}


# -- drawing ----------------------------------------------------------------------------------------------------------

def generation(read: Reading, given: Tensors, wanted: Tensors) -> dict[str, Tensor]:
    """Words are greedy until the token that opens the picture, whose place is the stored one; then the picture."""
    model, options = read.model, read.about["generation"]
    assert model.config.drawing is not None
    start, grid = model.config.drawing[0], model.config.decoder.scales[-1]
    prompt, sequence = given["prompt_ids"][0].tolist(), wanted["sequence"][0].tolist()
    reader, said = Reader(), list(prompt)
    (logits,) = model.run([Read(reader, read.write(prompt, reader), predict=True)])
    for _ in range(sequence.index(start) - len(prompt)):
        said.append(int(logits.argmax()))
        w = model.writer(reader)
        w.text(said[-1:], open=False, close=False)
        (logits,) = model.run([Read(reader, w, predict=True)])
    opened = reader.fork()
    w = model.writer(opened)
    w.text([start], open=False, close=False)
    (logits,) = model.run([Read(opened, w, predict=True)])
    said += [start, int(logits.argmax())]

    chain = Guidance(branches=(Branch(context="no_text", scale=float(options["cfg"])),))
    sampling = Sampling(guidance=chain, codes=TokenSampling(temperature=options["tau"], top_k=options["top_k"],
                                                            top_p=options["top_p"]))
    numbers = [given[f"uniforms_scale{k}"][0] for k in range(len(model.config.decoder.scales))]
    program = model.draw(numbers, grid, {"full": reader, "no_text": Reader()}, sampling, 0, lambda event: None, False)
    own: dict[str, Tensor] = {}
    canvases: list[Canvas] = []
    work = next(program)
    try:
        while True:
            assert isinstance(work, Together)
            answer = model.run([work])[0]
            if isinstance(work.works[0], Decide):
                scale, canvases = work.works[0].scale, [w.canvas for w in work.works if isinstance(w, Decide)]
                cond, null = (w.states[None] for w in work.works if isinstance(w, Decide))
                own |= {f"llm_hidden_cond_scale{scale}": cond, f"llm_hidden_uncond_scale{scale}": null,
                        f"logits_scale{scale}": torch.stack(answer).flatten(2)}
            work = program.send(answer)
    except StopIteration as stop:
        codes = stop.value[None]
    for k, part in enumerate(model.quantizer.layout(grid).split(codes)):
        own[f"bits_scale{k}"] = part[:, None]
    image = model.decode(codes, grid)
    lengths = torch.tensor([len(c.memory) for c in canvases], dtype=torch.int32)
    return own | {"sequence": torch.tensor([said]), "cross_kv": torch.cat([c.memory for c in canvases]),
                  "cross_cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)), "summed_codes": model.quantizer.lookup(codes),
                  "image": image, "image_uint8_bgr": infinity.eight_bit(image)}
