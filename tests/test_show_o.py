"""Show-o: sizes, one vocabulary, layout, omni-attention, what is asked, drawing, checkpoints, golden cases."""
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

from diptych.adapters import convert, parity, show_o
from diptych.document import Document, Image, Text
from diptych.objectives import masked_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.masked_token import Step
from diptych.parts.interleave import Page
from diptych.parts.tokens import Modality
from diptych.systems.base import Sampling
from diptych.systems.show_o import SPECIALS, ShowO, picture_edges
from diptych.systems.works import Reader, Together
from diptych.training.recipe import load_recipe
from diptych.world.tasks import document

GOLDEN = Path(__file__).parent / "goldens" / "show-o"


def build(**changes: Any) -> ShowO:
    torch.manual_seed(0)
    return ShowO(dataclasses.replace(ShowO.tiny(), **changes)).eval()


@cache
def tiny() -> ShowO:
    return build(drop_text=0.0)


def spans(model: ShowO, d: Document, **how: Any) -> list[int | str]:
    """Ids of the texts, and "codes" for every run of them."""
    w = model.write(d, **how)[0]
    out: list[int | str] = []
    for token, kind in zip(w.ids, np.concatenate(w.strip.columns["modality"]), strict=True):
        if kind != Modality.CODE:
            out.append(token)
        elif not out or out[-1] != "codes":
            out.append("codes")
    return out


# -- sizes ------------------------------------------------------------------------------------------------------------

def test_the_published_size_by_arithmetic() -> None:
    """Phi-1.5 with norms of queries and keys, and 58498 tokens in the table and the head."""
    width, hidden, tokens = 2048, 8192, 58498
    layer = 4 * (width**2 + width) + 2 * width * hidden + hidden + width + 2 * width + 2 * 2 * 64
    with torch.device("meta"):
        model = ShowO(ShowO.paper())
    codec = sum(p.numel() for p in model.codec.parameters())
    assert model.embed.num_embeddings == tokens and model.first_code == 50305 and model.values == 8192
    assert model.num_parameters() - codec == 24 * layer + 2 * width + 2 * tokens * width + tokens
    assert model.stride == 16 and model.marks.image_start == 50296


def test_one_vocabulary() -> None:
    """Text, special tokens, codes and the mask share a table and a head."""
    model = tiny()
    assert model.embed.num_embeddings == model.head.out_features == 1024 + len(SPECIALS) + 64 + 1
    codes = torch.tensor([0, 63, 64])
    assert torch.equal(model.code_tokens(codes), model.embed.weight[[1034, 1097, 1098]])
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.code_logits(hidden), model.head(hidden)[:, 1034:1098])


# -- documents to tokens ----------------------------------------------------------------------------------------------

def test_the_layout_of_documents() -> None:
    model = tiny()
    m, (draw, read, pad) = model.marks, (model.special(n) for n in ("<|t2i|>", "<|mmu|>", "[PAD]"))
    assert pad == 1024 and (m.image_start, m.image_end) == (1025, 1026)
    d = document("draw", 0)
    words = model.spell(d.pieces[0])
    block = [m.image_start, "codes", m.image_end]
    assert spans(model, d) == [draw, m.start, *words, m.end, *block]
    assert spans(model, d, drop=(True, False, False)) == [draw, m.start, m.end, *block]
    assert spans(model, document("caption", 0))[:5] == [read, *block, m.start]
    edit = spans(model, document("edit", 0))
    assert edit[:6] == [read, *block, draw, m.start] and edit[-3:] == block
    story = spans(model, document("story", 0))
    assert story.count(draw) == 4 and story.count(read) == 3 and story.count("codes") == 7


def test_what_follows_a_drawn_picture_does_not_count_it() -> None:
    """Positions in training are those of generation, where the masked picture is never kept."""
    w = tiny().write(document("story", 0))[0]
    position = np.concatenate(w.strip.columns["position"])[:, 0]
    target = np.concatenate(w.strip.columns["target"]) & (np.concatenate(w.strip.columns["modality"]) == Modality.CODE)
    first = int(np.flatnonzero(target)[0]) - 1
    assert position[first] == position[first + 66]  # the masked block and the clean one behind it
    assert np.array_equal(position[: first + 66], np.arange(first + 66))


def test_omni_attention() -> None:
    model = tiny()
    page = Page.of([[model.write(document("edit", 0))[0]]])
    allowed = model.mask.dense(page.tokens)[0]
    codes = torch.nonzero(page.tokens.modality[0] == Modality.CODE).flatten()
    start, last = int(codes[0]) - 2, len(allowed) - 1
    assert allowed[start, : int(codes[63]) + 2].all()  # <|mmu|> sees the whole picture it announces
    text = int(codes[63]) + 3
    assert not allowed[text, text + 1:].any() and allowed[text, : text + 1].all()
    assert allowed[last - 65:, :].all() and not allowed[: last - 65, last - 65:].any()


# -- training ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("variant", "edges"), [("paper", 0), ("released", 2)])
def test_masked_codes_are_asked_in_their_place(variant: Any, edges: int) -> None:
    """The loss by hand from the logits of one document; "released" adds both marks around the picture."""
    model, d = build(variant=variant, drop_text=0.0), document("draw", 1)
    batch = model.collate([d])
    losses = model.loss(batch, torch.Generator().manual_seed(5))
    codes = model.encode(batch.pictures)[0]
    shown, hidden = model.corrupt([codes], [True], torch.Generator().manual_seed(5))
    assert ((shown == model.values) == hidden).all() and losses.counts["image"] == hidden.sum() + edges
    states = model.forward_page(batch.page, [], shown)
    logits = model.head(states[1])  # of the codes, in order
    total = -logits.log_softmax(-1)[torch.arange(64), model.first_code + codes][hidden].sum()
    if edges:
        words = model.head(states[0])[-2:].log_softmax(-1)
        total = total - words[0, model.marks.image_start] - words[1, model.marks.image_end]
    torch.testing.assert_close(losses.sums["image"], total, rtol=1e-5, atol=1e-4)


def test_counts_are_left_to_the_forward_pass() -> None:
    """Which codes count is drawn there, from the generator of the step: the trainer asks it first where it must."""
    model = tiny()
    drawn, said = model.collate([document("draw", 0)]), model.collate([document("caption", 0)])
    assert drawn.counts is None and drawn.to("cpu").counts is None
    counts = [model.loss(drawn, torch.Generator().manual_seed(s)).counts["image"].item() for s in (1, 1, 2, 3)]
    assert counts[0] == counts[1] and len(set(counts)) > 1
    words = Document((Text(text="a red ring", target=True),))
    assert model.collate([words]).counts == {"text": float(len(model.spell(words.pieces[0])) + 1)}
    assert model.loss(said, torch.Generator()).sums.keys() == {"text"}


def test_edges_of_pictures() -> None:
    assert sorted(picture_edges(torch.tensor([3, 4, 5, 9, 10])).tolist()) == [2, 6, 8, 11]
    assert picture_edges(torch.zeros(0, dtype=torch.long)).tolist() == []


# -- drawing ----------------------------------------------------------------------------------------------------------

def drawing(x: torch.Tensor, total: int = 4) -> tuple[torch.Tensor, list[Step], list[Any]]:
    """The codes, steps and logits of a 2 x 4 picture drawn from codes x after a text."""
    model, reader = tiny(), Reader()
    chain = Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=1.0),)))
    uniforms = torch.rand((2, total, 8), generator=torch.Generator().manual_seed(0))
    steps: list[Step] = []
    program = model.unmask(x, uniforms[0], uniforms[1], (2, 4), {"full": reader}, chain, 0, lambda e: None, steps)
    heard: list[Any] = []
    work = next(program)
    with torch.no_grad():
        while True:
            assert isinstance(work, Together) and len(work.works) == 1  # a scale of 1 costs nothing
            heard.append(model.run([work])[0][0])
            try:
                work = program.send([heard[-1]])
            except StopIteration as stop:
                assert reader.context.length == 0
                return stop.value, steps, heard


def test_inpainting_keeps_what_is_known() -> None:
    x = torch.tensor([5, 64, 7, 64, 64, 64, 63, 0])
    codes, steps, _ = drawing(x)
    known = x < 64
    assert torch.equal(codes[known], x[known]) and (codes < 64).all() and len(steps) == 4
    assert [int(s.remasked.sum()) for s in steps] == masked_token.schedule(8, 4, 4, "released")


def test_log_probs_of_a_drawing_are_those_of_its_steps() -> None:
    """What was drawn scores the same when the network reads the masked codes of every step again."""
    model, x = tiny(), torch.full((8,), 64)
    codes, steps, heard = drawing(x)
    total = 0
    for k, (step, logits) in enumerate(zip(steps, heard, strict=True)):
        after = step.codes(64) if k + 1 < len(steps) else step.drawn
        w = model.writer(Reader())
        model.write_drawn(w, 0, (2, 4))
        page = Page.of([[w]])
        with torch.no_grad():
            again = model.code_logits(model.forward_page(page, [], x)[1])
        own = [masked_token.log_prob(v.log_softmax(-1), x, after) for v in (logits, again)]
        torch.testing.assert_close(own[0], own[1], atol=1e-5, rtol=0)
        total, x = total + len(own[0]), after
    assert total == 8 and torch.equal(x, codes)


def test_pictures_are_read_through_their_codes() -> None:
    """And nothing else: pixels that change no code change no word."""
    model, d = tiny(), document("question", 0)
    picture = d.pieces[0]
    assert isinstance(picture, Image) and picture.pixels is not None
    codes = model.encode([torch.from_numpy(picture.pixels)])[0]
    near = picture.replace(pixels=picture.pixels + 1e-7)
    assert torch.equal(model.encode([torch.from_numpy(near.pixels)])[0], codes)
    far = picture.replace(pixels=-picture.pixels)
    scores = [model.score([Document((p, *d.pieces[1:]))]).values[0] for p in (picture, near, far)]
    assert torch.equal(scores[0], scores[1]) and not torch.allclose(scores[0], scores[2])


# -- checkpoints ------------------------------------------------------------------------------------------------------

def test_checkpoints_survive_the_published_layout(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "config.json", tmp_path)
    model = show_o.load(GOLDEN)
    convert.export(model, tmp_path)
    theirs, back = (load_file(folder / "showo.safetensors") for folder in (GOLDEN, tmp_path))
    assert set(back) == set(theirs) and all(torch.equal(v, theirs[k]) for k, v in back.items())
    again = show_o.load(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_what_does_not_fit_is_an_error() -> None:
    values, codec = json.loads((GOLDEN / "config.json").read_text()), ShowO.tiny().codec
    for change, message in [({"showo": {**values["showo"], "w_clip_vit": True}}, "without CLIP"),
                            ({"phi": {**values["phi"], "hidden_act": "relu"}}, "hidden_act of Phi to be 'gelu_new'"),
                            ({"showo": {**values["showo"], "vocab_size": 136}}, "got 136 tokens"),
                            ({"ids": {**values["ids"], "<|t2i|>": 66}}, "other ids of <|t2i|>")]:
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            show_o.config_of(values | change, codec)
    with pytest.raises(ValueError, match="variant paper or released"):
        build(variant="published")


def test_every_golden_case() -> None:
    cases = parity.run("show-o", GOLDEN)
    assert [c.name for c in cases if not c.passed] == []
    assert len(cases) == 47 and max(c.absolute for c in cases) < 1e-5


@pytest.mark.parametrize(("key", "hit"), [
    ("showo.model.layers.1.self_attn.k_layernorm.bias", {"train.logits", "mmu.prefix_logits"}),
    ("showo.model.layers.0.mlp.fc1.bias", {"train.loss_t2i", "t2i_cfg.step_logits_last"}),
])
def test_one_wrong_weight_is_noticed(key: str, hit: set[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "show-o"))
    tensors = load_file(folder / "showo.safetensors")
    tensors[key] = tensors[key] + 0.1 * torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "showo.safetensors")
    failed = {c.name for c in parity.run("show-o", folder) if not c.passed}
    assert hit <= failed and not any(name.startswith(("vq", "prompt", "corrupt")) for name in failed)


def test_the_recipe_is_read() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "show-o.yaml")
    assert recipe.system == "show-o" and [s.name for s in recipe.stages] == [
        "align", "tune"]
