"""VARGPT: sizes, layout, what the decoder looks back at, drawing against one pass, guidance of both variants,
self-correction, golden cases of the system and of Infinity, its recipe."""
import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych import config
from diptych.adapters import infinity, parity, vargpt
from diptych.document import Document, Image, Text
from diptych.objectives import next_scale
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_scale import Lesson
from diptych.objectives.next_token import TokenSampling
from diptych.parts.quantize import scale_inputs
from diptych.parts.tokens import Modality
from diptych.parts.vq import VQTokenizer
from diptych.systems.base import Event, Sampling
from diptych.systems.vargpt import Vargpt
from diptych.systems.works import Canvas, Decide, Read, Reader, Together
from diptych.training.recipe import load_recipe
from diptych.world.tasks import document
from diptych.zoo import find

GOLDENS = Path(__file__).parent / "goldens"
CELLS, BITS = 85, 6  # of the tiny size: scales of 1, 2, 4 and 8


def build(**changes: Any) -> Vargpt:
    torch.manual_seed(0)
    model = Vargpt(dataclasses.replace(Vargpt.tiny(), **changes)).eval()
    with torch.no_grad():  # fresh gates are closed and hide what a block does
        for p in model.decoder.parameters():
            p.copy_(0.2 * torch.randn(p.shape))
    return model


@cache
def tiny(variant: str = "paper") -> Vargpt:
    return build(drop_text=0.0, variant=variant)


def kinds(w: Any, name: str) -> np.ndarray:
    return np.concatenate(w.strip.columns[name])


def prompt(model: Vargpt, text: str = "a red ring") -> Reader:
    """A context that has read a text."""
    reader = Reader()
    w = model.writer(reader)
    assert model.vocabulary is not None
    w.text(model.vocabulary.encode(text))
    model.run([Read(reader, w)])
    return reader


# -- sizes ------------------------------------------------------------------------------------------------------------

def test_the_published_size_by_arithmetic() -> None:
    with torch.device("meta"):
        model = Vargpt(Vargpt.paper())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["embed"] + counts["trunk"] + counts["head"] == 7_615_616_512  # Qwen2-7B
    assert counts["vision"] == 675_759_104  # the tower of Qwen2-VL
    w = 2048
    block = 16 * w * w + 19 * w + 16  # matrices; biases, norm, offset; one factor per head
    assert counts["decoder"] == 32 * block + 8 * w * w + 121 * w + 64
    assert model.decoder.head.out_features == 2 * 32  # two logits per bit, not 2^32 codes
    assert len(model.layout.code.plan(*model.config.decoder.scales)) == 2521 + 2  # type: ignore[union-attr]


# -- documents to tokens ----------------------------------------------------------------------------------------------

def test_the_block_of_a_picture_to_draw() -> None:
    """Every cell answers for itself; empty cells fill up the block and answer nothing."""
    for multiple, empty in ((1, 0), (16, 11)):
        w = build(slot_multiple=multiple).write(document("draw", 0))[0]
        code = np.flatnonzero(kinds(w, "modality") == Modality.CODE)
        assert len(code) == CELLS + empty and w.questions == code[:CELLS].tolist()
        assert kinds(w, "target")[code].tolist() == [True] * CELLS + [False] * empty
        assert np.array_equal(kinds(w, "position")[:, 0], np.arange(w.strip.length))  # every token has its own
        assert w.ids[code[0] - 1] == build().marks.image_start and w.ids[-1] == build().marks.image_end


def test_read_pictures_have_rows_and_columns() -> None:
    w = tiny().write(document("caption", 0))[0]
    at = np.flatnonzero(kinds(w, "modality") == Modality.FEATURE)
    position = kinds(w, "position")
    assert len(at) == 16 and np.array_equal(position[at] - position[at[0]],
                                            [[0, i // 4, i % 4] for i in range(16)])
    assert (position[at[-1] + 1] == position[at[0]] + 4).all()


def test_what_is_before_a_picture() -> None:
    """Of its own document, up to the token that opens it; nothing of the others in the row."""
    model = tiny()
    documents = [document("caption", 0), document("draw", 1), document("draw", 2)]
    page = model.collate(documents).page
    places, known = model.before(page)
    tokens = page.tokens
    texts = sorted(len(model.spell(d.pieces[0])) + 2 for d in documents[1:])  # with the marks
    assert sorted(known.sum(1).tolist()) == texts
    for i in range(2):
        own = places[i][known[i]]
        mark = int(page.questions[i * CELLS]) - 1
        assert own.tolist() == list(range(int(own[0]), mark))
        assert tokens.document.flatten()[own].unique().tolist() == [int(tokens.document.flatten()[mark])]


# -- training ---------------------------------------------------------------------------------------------------------

def test_company_in_a_row_changes_no_logit() -> None:
    model = tiny()
    pair = [document("draw", 1), document("draw", 2)]
    batch = model.collate(pair)
    with torch.no_grad():
        lesson = model.lesson(torch.stack(batch.pictures))
        together = model.read(batch, lesson)[1]
        for i, d in enumerate(pair):
            own = model.collate([d])
            alone = model.read(own, model.lesson(torch.stack(own.pictures)))[1][0]
            assert min((alone - row).abs().max() for row in together) < 1e-4, i


def test_nothing_before_a_picture_is_a_learned_memory() -> None:
    model = build(drop_text=0.5)
    assert model.told.null.requires_grad and not tiny().told.null.requires_grad
    d = document("draw", 3)
    bare = Document(d.pieces[1:], d.task, d.meta)
    losses = model.loss(model.collate([bare]), torch.Generator())
    losses.total().backward()
    assert model.told.null.grad is not None and model.told.null.grad.abs().sum(1).gt(0).all()
    assert model.start.grad is None or not model.start.grad.any()
    # beside a document with a text, it says the same
    both = model.collate([bare, d])
    with torch.no_grad():
        logits = model.read(both, model.lesson(torch.stack(both.pictures)))[1]
        alone = model.collate([bare])
        own = model.read(alone, model.lesson(torch.stack(alone.pictures)))[1][0]
    assert min((own - row).abs().max() for row in logits) < 1e-4
    assert max((own - row).abs().max() for row in logits) > 1e-3


def test_bits_are_turned_over_in_training_only() -> None:
    """From the generator of the step; the scores of a document do not change."""
    model, batch = build(flips=0.3), tiny().collate([document("draw", 4)])
    with torch.no_grad():
        losses = [model.loss(batch, torch.Generator().manual_seed(s)).sums["image"].item() for s in (1, 1, 2)]
        plain = build(flips=0.0).loss(batch, torch.Generator()).sums["image"].item()
    assert losses[0] == losses[1] != losses[2] and plain not in losses
    assert -model.score([document("draw", 4)]).values[0].sum().item() == pytest.approx(plain, rel=1e-5)


def test_counts_are_known_before() -> None:
    batch = tiny().collate([document("draw", 0), document("caption", 1)])
    losses = tiny().loss(batch, torch.Generator())
    assert batch.counts is not None
    assert batch.counts == {k: v.item() for k, v in losses.counts.items()}
    assert batch.counts["image"] == CELLS * BITS


# -- drawing ----------------------------------------------------------------------------------------------------------

def drawing(model: Vargpt, contexts: dict[str, Reader], scale: float, more: bool = False, **how: Any
            ) -> tuple[Tensor, list[list[Tensor]], list[Canvas]]:
    """Bits, the logits of all contexts by scale, and the canvases."""
    sampling = Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=scale),)), codes=TokenSampling(),
                        **how)
    uniforms = next_scale.uniforms(model.config.decoder.scales, (BITS,), torch.Generator().manual_seed(5))
    told: list[list[Tensor]] = []
    canvases: list[Canvas] = []
    program = model.draw(uniforms, (8, 8), contexts, sampling, 0, how.get("emit", lambda event: None), more)
    work = next(program)
    with torch.no_grad():
        while True:
            answer = model.run([work])[0]
            if isinstance(work, Together) and isinstance(work.works[0], Decide):
                told.append(answer)
                canvases = [w.canvas for w in work.works if isinstance(w, Decide)]
            try:
                work = program.send(answer)
            except StopIteration as stop:
                return stop.value, told, canvases


def one_pass(model: Vargpt, codes: Tensor, texts: list[str]) -> Tensor:
    """Logits (L, d, 2) of given bits (L, d) behind texts, as training computes them."""
    w = model.writer(Reader())
    assert model.vocabulary is not None
    for text in texts:
        w.text(model.vocabulary.encode(text))
    model.write_drawn(w, 0, (8, 8))
    batch = model.lay_out([(w, [torch.zeros(3, 64, 64)], [])])
    scales = model.config.decoder.scales
    inputs = scale_inputs(model.quantizer.partial_maps(codes[None], scales), scales, "bilinear")
    with torch.no_grad():
        return model.read(batch, Lesson(codes[None], inputs))[1][0]


def test_a_drawing_scores_as_in_training() -> None:
    """Cached, scale by scale, against one pass over the bits that were drawn; the branch without text as a document
    that lost it."""
    model, reader = tiny(), prompt(tiny())
    with torch.no_grad():
        codes, told, canvases = drawing(model, {"full": reader, "no_text": Reader()}, 2.0, more=True)
    assert codes.shape == (CELLS, BITS) and [c.reader is reader for c in canvases] == [True, False]
    for i, texts in enumerate((["a red ring"], [])):
        stepwise = torch.cat([answer[i] for answer in told])
        torch.testing.assert_close(stepwise, one_pass(model, codes, texts), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(told[0][0], told[0][1], atol=1e-3)
    # the context goes on behind the closing mark
    w = model.writer(Reader())
    assert model.vocabulary is not None
    w.text(model.vocabulary.encode("a red ring"))
    model.write_drawn(w, 0, (8, 8))
    assert reader.position == w.position and sum(map(len, reader.states)) == reader.context.length == w.strip.length


def test_without_guidance_one_context_is_read() -> None:
    reader = prompt(tiny())
    with torch.no_grad():
        codes, told, canvases = drawing(tiny(), {"full": reader, "no_text": Reader()}, 1.0)
    assert len(canvases) == 1 and all(len(answer) == 1 for answer in told) and len(told) == 4
    torch.testing.assert_close(torch.cat([t[0] for t in told]), one_pass(tiny(), codes, ["a red ring"]), atol=2e-4,
                               rtol=1e-4)


def test_the_released_branch_reads_every_scale_by_itself() -> None:
    """Nothing of the context, and as many learned rows as the text has states, at most all."""
    model = tiny("released")
    reader = prompt(model)
    other = prompt(model, "two blue squares left of a green ring")
    with torch.no_grad():
        codes, told, canvases = drawing(model, {"full": reader, "no_text": other}, 2.0)
    assert canvases[1].reader is None and torch.equal(canvases[1].memory, model.told.null)
    short = model.canvases({"full": Reader(states=[torch.zeros(2, 64)]), "no_text": other},
                           model.config.decoder.scales, Guidance(branches=(Branch(context="no_text", scale=2.0),)))
    assert torch.equal(short["no_text"].memory, model.told.null[:2])
    torch.testing.assert_close(torch.cat([t[0] for t in told]), one_pass(model, codes, ["a red ring"]), atol=2e-4,
                               rtol=1e-4)
    # the trunk's states of a scale: those of its cells alone
    lone = one_pass(model, codes, [])
    assert not torch.allclose(torch.cat([t[1] for t in told]), lone, atol=1e-3)


def test_the_drawing_is_shown_as_it_grows() -> None:
    """A preview after every scale but the last, from the scales so far."""
    events: list[Event] = []
    model = tiny()
    d = Document((Text(text="a red ring"), Image(size=(64, 64), target=True)))
    sampling = Sampling(partial=9, codes=TokenSampling())
    model.generate([d], sampling, emit=lambda number, event: events.append(event))
    assert [e.kind for e in events] == ["partial"] * 3 + ["picture"]
    assert all(e.value.shape == (3, 64, 64) for e in events)
    assert not torch.equal(events[0].value, events[-1].value)


def test_other_sizes_have_scales_in_proportion() -> None:
    model = tiny()
    d = Document((Text(text="a red ring"), Image(size=(32, 64), target=True)))
    picture = model.generate([d], Sampling(codes=TokenSampling()))[0].pieces[1]
    assert isinstance(picture, Image) and picture.pixels is not None and picture.pixels.shape == (3, 32, 64)
    assert model.scales((4, 8)) == ((1, 1), (1, 2), (2, 4), (4, 8))


# -- what users get wrong ---------------------------------------------------------------------------------------------

def test_configs_that_do_not_fit_are_errors() -> None:
    c = Vargpt.tiny()
    with pytest.raises(ValueError, match="decoder and codec of the same scales"):
        dataclasses.replace(c, picture=(128, 128))
    with pytest.raises(ValueError, match="decoder and codec of the same scales"):
        dataclasses.replace(c, decoder=dataclasses.replace(c.decoder, scales=((1, 1), (8, 8))))
    with pytest.raises(ValueError, match="variant paper or released"):
        dataclasses.replace(c, variant="published")  # type: ignore[arg-type]


# -- published numbers ------------------------------------------------------------------------------------------------

def test_every_golden_case() -> None:
    cases = parity.run("vargpt", GOLDENS / "vargpt")
    assert [c.name for c in cases if not c.passed] == []
    assert len(cases) == 62 and max(c.absolute for c in cases if "uint8" not in c.name) < 5e-5


@pytest.mark.parametrize(("key", "hit", "safe"), [
    ("vargpt_gen.block_chunks.1.module.0.ca.v_bias", {"generate.logits_scale0", "train_t2i.gen_logits"}, "understand"),
    ("visual.blocks.1.mlp.fc1.bias", {"understanding.vit_features", "train_edit.loss_text"}, "generate"),
    ("sos_embedding.weight", {"dpo_logits.llm_slot_input_first8_and_pads", "generate.logits_scale2"}, "understand"),
])
def test_one_wrong_weight_is_noticed(key: str, hit: set[str], safe: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDENS / "vargpt", tmp_path / "vargpt"))
    tensors = load_file(folder / "weights.safetensors")
    tensors[key] = tensors[key] + 0.1 * torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "weights.safetensors")
    failed = {c.name for c in parity.run("vargpt", folder) if not c.passed}
    assert hit <= failed and not any(name.startswith(safe) for name in failed)


def test_settings_that_are_not_built_are_errors() -> None:
    about = json.loads((GOLDENS / "vargpt" / "config.json").read_text())
    codec = vargpt.load(GOLDENS / "vargpt").config.codec
    for section, key, value in (("llm", "hidden_act", "gelu"), ("vargpt_gen", "swiglu", True),
                                ("vargpt_gen", "rope2d_normalized_by_hw", 1)):
        changed = {**about, section: {**about[section], key: value}}
        with pytest.raises(ValueError, match=f"expected {key} to be"):
            vargpt.config_of(changed, codec, 15, 1)
    with pytest.raises(ValueError, match="quick_gelu"):
        vargpt.tower_config({**about["llm"]["vision_config"], "hidden_act": "silu"})


def test_every_case_of_infinity() -> None:
    cases = parity.run("infinity", GOLDENS / "infinity")
    assert [c.name for c in cases if not c.passed] == []
    assert {"forward_drop.logits", "infer_logits.bits_scale3", "infer_nocfg.image_uint8_bgr"} <= {c.name for c in cases}


def test_a_wrong_weight_of_infinity_is_noticed(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDENS / "infinity", tmp_path / "infinity"))
    tensors = load_file(folder / "infinity.safetensors")
    tensors["cfg_uncond"][2] += 1.0
    save_file(tensors, folder / "infinity.safetensors")
    failed = {c.name for c in parity.run("infinity", folder) if not c.passed}
    assert {"forward_drop.logits", "infer_logits.logits_scale0"} <= failed
    assert not any(name.startswith(("vae", "correct", "forward.", "infer_nocfg")) for name in failed)
    names = [f"block_chunks.{c}.module.{b}.sa.q_bias" for c in (1, 0, 10) for b in (1, 0)]
    assert infinity.block_names(dict.fromkeys(names, torch.zeros(0)))[:3] == [
        "block_chunks.0.module.0.", "block_chunks.0.module.1.", "block_chunks.1.module.0."]


def test_the_tokenizer_of_the_recipe_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """`zoo/bits` fits the small size, and a step of its training reaches both sides."""
    made = find("bits")()
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(made, "batch", lambda step: pictures)
    torch.manual_seed(0)
    model = made.model()
    assert isinstance(model, VQTokenizer)
    assert made.config(model) == config.to_dict(Vargpt.small().codec)
    terms = made.loss(model, 0)
    terms["loss"].backward()
    assert terms["use"] == 1 and set(terms) == {"loss", "l1", "mse", "use"}
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    layout = model.layout(64, 64)
    assert (layout.positions, layout.depth, layout.values) == (130, 12, 2)


def test_the_recipe_is_read() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "vargpt.yaml")
    assert recipe.system == "vargpt" and [s.name for s in recipe.stages] == ["connect", "unify", "tune"]
