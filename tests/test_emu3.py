"""Emu3: sizes, one vocabulary, blocks of any aspect, what is learnt, prompts, either tokenizer, both layouts."""
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

from diptych.adapters import convert, emu3, emu3_cases, parity
from diptych.document import Document, Image, Text
from diptych.objectives import next_token
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.parts.grammar import CELL
from diptych.parts.pictures import scale_to, size_of_area, size_within
from diptych.parts.quantize import CodebookConfig, VectorConfig
from diptych.parts.tokens import Modality
from diptych.parts.video_codec import VideoTokenizer, VideoTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.base import Sampling
from diptych.systems.emu3 import CHAT, Emu3, forced_places
from diptych.systems.works import Read, Reader, Together
from diptych.training.recipe import load_recipe
from diptych.world.tasks import document

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "goldens" / "emu3"
SIDE = PyramidConfig(channels=32, channel_mult=(1, 1, 1, 2), blocks=(1,) * 4, attention=(3,))
CLIPS = VideoTokenizerConfig(encoder=SIDE, decoder=dataclasses.replace(SIDE, blocks=(2,) * 4, guide=4), halvings=1,
                             blocks=1, quantizer=VectorConfig(codebook=CodebookConfig(values=64, width=4, norm="none")))


def build(**changes: Any) -> Emu3:
    torch.manual_seed(0)
    return Emu3(dataclasses.replace(Emu3.tiny(), **({"drop_text": 0.0} | changes))).eval()


@cache
def tiny() -> Emu3:
    return build()


def ids_of(model: Emu3, d: Document, drop: bool = False) -> list[int]:
    """All ids, `CELL` for every code."""
    w = model.write(d, (drop, False, False))[0]
    kinds = np.concatenate(w.strip.columns["modality"])
    return [CELL if kind == Modality.CODE else token for token, kind in zip(w.ids, kinds, strict=True)]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (3, height, width)).astype(np.float32)


# -- sizes ------------------------------------------------------------------------------------------------------------

def test_the_published_size_by_arithmetic() -> None:
    """The language model has the 8,492,011,520 parameters of the released files."""
    with torch.device("meta"):
        model = Emu3(Emu3.paper())
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    own = model.num_parameters(trainable=True)
    assert own == 32 * layer + 4096 + 2 * 184622 * 4096 == 8_492_011_520
    assert model.embed.num_embeddings == model.first_code + model.values == 184622
    assert isinstance(model.codec, VideoTokenizer) and model.codec.config.frames == 4
    block = model.layout.code
    assert block is not None and len(block.plan((90, 90))) == 91 * 90 + len("9090") + 5


@pytest.mark.parametrize(("aspect", "area", "cells"), [((9, 16), 720**2, (68, 120)), ((16, 9), 720**2, (120, 68)),
                                                       ((9, 21), 1024**2, (84, 196)), ((1000, 1), 64, (32, 1))])
def test_the_size_of_an_area(aspect: tuple[int, int], area: int, cells: tuple[int, int]) -> None:
    assert size_of_area(*aspect, area, 8) == (8 * cells[0], 8 * cells[1])


@pytest.mark.parametrize(("given", "wanted"), [
    ((700, 601), (704, 600)),  # neither too small nor too large: the nearest multiples
    ((100, 300), (296, 888)),  # 512^2 pixels at least, rounded up
    ((3000, 1000), (1768, 584)),  # 1024^2 at most, rounded down
])
def test_the_size_of_what_is_read(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert size_within(*given, 512**2, 1024**2, 8) == wanted
    assert 512**2 <= wanted[0] * wanted[1] <= 1024**2
    same = torch.zeros(3, 8, 8)
    assert scale_to(same, (8, 8)) is same and scale_to(same, (16, 8)).shape == (3, 16, 8)


# -- documents to tokens ----------------------------------------------------------------------------------------------

def test_a_picture_states_its_size_and_ends_its_rows() -> None:
    model, m = tiny(), tiny().marks
    v = model.need_vocabulary().tokenizer
    size = [v.token_to_id("8"), v.token_to_id("*"), v.token_to_id("8")]
    block = [m.image_start, *size, 1024, *([CELL] * 8 + [1025]) * 8, 1026, m.image_end]
    d = document("draw", 0)
    assert ids_of(model, d) == [m.start, *model.spell(d.pieces[0]), m.end, *block]
    assert ids_of(model, document("caption", 0))[: len(block) + 1] == [*block, m.start]
    story = ids_of(model, document("story", 0))
    assert story.count(m.image_start) == 4 and story.count(CELL) == 4 * 64  # none is read twice
    assert model.first_code == 1027 and model.embed.num_embeddings == 1027 + 64


def test_pictures_keep_their_aspect() -> None:
    """One to draw has the area of `picture`, one to read keeps its size."""
    model, words = tiny(), Text(text="a red ring")
    for side in ((32, 128), (24, 40), (64, 64)):
        grid = tuple(n // 8 for n in side)
        read = Document((Image(pixels=picture(*side)), Text(text="a ring", target=True)))
        if 32**2 < side[0] * side[1] < 64**2:
            assert ids_of(model, read).count(CELL) == grid[0] * grid[1]
        drawn = model.write(Document((words, Image(pixels=picture(*side), target=True))))
        wanted = size_of_area(*side, 64**2, 8)
        assert drawn[1][0].shape == (3, *wanted) and abs(wanted[0] * wanted[1] / 64**2 - 1) < 0.2
    sides = ((32, 128), (64, 64))
    both = model.collate([Document((words, Image(pixels=picture(*side), target=True))) for side in sides])
    assert model.loss(both, torch.Generator()).counts["image"] == 2 * 64


@torch.no_grad()
def test_a_drawing_has_the_size_that_is_asked_for() -> None:
    model, words, asked = tiny(), Text(text="a red ring"), list[list[int]]()
    run = model.run

    def listen(works: Any) -> Any:
        asked.extend(leaf.writer.ids for w in works for leaf in (w.works if isinstance(w, Together) else [w])
                     if isinstance(leaf, Read))
        return run(works)

    model.run = listen  # type: ignore[method-assign]
    try:
        made = model.generate([Document((words, Image(size=(16, 40), target=True))), Document((
            words, Image(target=True)))], Sampling(size=(24, 8)))
    finally:
        del model.run
    assert [p.pixels.shape for d in made for p in d.of(Image) if p.pixels is not None] == [(3, 16, 40), (3, 24, 8)]
    said = {model.need_vocabulary().decode(ids[1:-1]).replace(" ", "") for ids in asked if ids[-1] == 1024}
    assert said == {"2*5", "3*1"}


# -- what is learnt ---------------------------------------------------------------------------------------------------

def test_the_rest_of_a_block_is_learnt_too() -> None:
    model = tiny()
    documents = [document("edit", 0), document("caption", 1), document("draw", 2)]
    batch = model.collate(documents)
    page, forced = batch.page, set(forced_places(batch.page).tolist())
    flat, first = page.ids.flatten().tolist(), model.marks.image_start
    wanted, t = set[int](), page.tokens
    for b in range(t.shape[0]):
        for i in range(t.shape[1]):
            place, cells = b * t.shape[1] + i, (t.document[b] == t.document[b, i]) & (t.segment[b] == t.segment[b, i])
            inside = bool((cells & t.target[b] & (t.modality[b] == Modality.CODE)).any())
            if inside and t.modality[b, i] == Modality.TEXT and flat[place] != first:
                wanted.add(place)
    assert forced == wanted and len(forced) == 2 * (3 + 1 + 8 + 2)
    losses = model.loss(batch, torch.Generator())
    found = model.encode(batch.pictures)
    hidden = model.forward_page(page, [], torch.cat([found[i] for i, _ in batch.codes]))
    rows = torch.tensor([int((t.route.flatten()[:p - 1] == t.route.flatten()[p - 1]).sum()) for p in sorted(forced)])
    states = torch.stack([hidden[int(t.route.flatten()[p - 1])][r] for p, r in zip(sorted(forced), rows, strict=True)])
    errors = -model.head(states).log_softmax(-1)[range(len(rows)), [flat[p] for p in sorted(forced)]]
    torch.testing.assert_close(losses.sums["block"], errors.sum(), rtol=1e-5, atol=1e-4)
    assert batch.counts == {k: float(v) for k, v in losses.counts.items()}
    codes = build(block_weight=0.0)
    batch = codes.collate(documents)
    assert set(codes.loss(batch, torch.Generator()).sums) == set(batch.counts or ()) == {"text", "image"}


@torch.no_grad()
def test_guidance_before_the_grammar_is_guidance_among_codes() -> None:
    """log-softmax over all words, mixed, then restricted: what the sampler draws from."""
    model, generator = tiny(), torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 64, generator=generator) * 3
    c, u = model.head(hidden).log_softmax(-1)
    wanted = next_token.restrict(u + 3 * (c - u), range(model.first_code, model.first_code + model.values))
    sampling = Sampling(guidance=Emu3.paper().sampling.guidance, codes=TokenSampling(top_k=20))
    answers: dict[str, torch.Tensor] = dict(zip(("full", "no_text"), model.code_logits(hidden), strict=True))
    scores = next_token.log_probs(next_token.guide(answers, sampling.guidance, 0.0), sampling.codes)
    torch.testing.assert_close(next_token.log_probs(wanted, sampling.codes)[model.first_code :], scores)
    assert Emu3.paper().sampling.guidance.branches[0].scale == 3 and Emu3.paper().sampling.codes.top_k == 2048


# -- prompts ----------------------------------------------------------------------------------------------------------

def test_a_dropped_prompt_is_empty_and_the_negative_one_is_for_guidance() -> None:
    model, d = build(negative="a blurred picture"), document("draw", 0)
    m, v = model.marks, model.need_vocabulary()
    assert ids_of(model, d, drop=True)[:3] == [m.start, m.end, m.image_start]
    plan = ids_of(model, document("plan", 0), drop=True)
    assert plan[:3] == [m.start, m.end, m.image_start] and CELL in plan
    w = model.writer(Reader())
    model.write_null(w, [m.start, 9, 9, m.end])
    assert w.ids == [m.start, *v.encode("a blurred picture"), m.end]
    chat = build(negative="a blurred picture", turns=CHAT)
    w = chat.writer(Reader())
    chat.write_null(w, [m.start, 9, 9])
    assert w.ids == [m.start, *v.encode("a blurred picture")]
    assert ids_of(chat, d, drop=True)[:2] == [m.start, m.image_start]
    drawn = [m.generate([d.prompt()], Sampling(size=(16, 16), guidance=m.config.sampling.guidance))[0].of(Image)[0]
             for m in (model, tiny())]
    assert drawn[0] != drawn[1]


def test_the_template_is_for_answers() -> None:
    model, m = build(turns=CHAT), tiny().marks
    v, block = model.need_vocabulary(), tiny().layout.code
    assert block is not None
    shown, question, answer = document("question", 0).pieces
    wanted = [m.start, *v.encode_frame("You are a helpful assistant. USER: "), *block.plan((8, 8)),
              *model.spell(question), *v.encode_frame(". ASSISTANT:"), *model.spell(answer), m.end]
    assert ids_of(model, Document((shown, question, answer))) == wanted
    d = document("draw", 0)
    assert ids_of(model, d) == [m.start, *model.spell(d.pieces[0]), *block.plan((8, 8))]
    filled = model.generate([Document((shown, question, answer)).prompt()], Sampling(text=TextSampling(max_tokens=3)))
    assert filled[0].targets[0].text is not None  # type: ignore[attr-defined]


# -- the tokenizer of clips -------------------------------------------------------------------------------------------

@cache
def of_clips(**changes: Any) -> Emu3:
    model = build(codec=CLIPS, block=dataclasses.replace(Emu3.tiny().block, kv_heads=1), **changes)
    with torch.no_grad():
        model.codec.quantizer.codebook.weight.normal_(std=0.3)
    return model


@torch.no_grad()
def test_either_tokenizer_will_do() -> None:
    model, documents = of_clips(), [document(t, 0) for t in ("draw", "question", "edit")]
    assert [p.requires_grad for p in model.codec.parameters()].count(True) == 0 and model.values == 64
    losses = model.loss(model.collate(documents), torch.Generator())
    assert losses.counts["image"] == 2 * 64
    for d in documents:
        score = model.score([d])
        apart = model.loss(model.collate([d]), torch.Generator())
        decided = apart.sums.get("text", torch.tensor(0.0)) + apart.sums.get("image", torch.tensor(0.0))
        torch.testing.assert_close(-score.values[0].sum(), decided, rtol=1e-5, atol=1e-3)
    asked = Document((*documents[2].pieces[:-1], Image(size=(16, 24), target=True)))
    made = model.generate([asked])[0]
    drawn = made.of(Image)[-1].pixels
    assert drawn is not None and drawn.shape == (3, 16, 24) and np.abs(drawn).max() <= 1


# -- checkpoints ------------------------------------------------------------------------------------------------------

def same(one: Emu3, two: Emu3) -> bool:
    state = two.state_dict()
    return all(torch.equal(v, state[k]) for k, v in one.state_dict().items()) and len(state) == len(one.state_dict())


@pytest.mark.parametrize("layout", ["original", "huggingface"])
def test_both_layouts_come_back(layout: emu3.Naming, tmp_path: Path) -> None:
    model = of_clips()
    convert.export(model, tmp_path, layout=layout)
    again = emu3.load(tmp_path)
    assert same(again, model) and not list(tmp_path.rglob(".*"))
    assert again.layout.code == model.layout.code and again.marks == model.marks
    for name in ("block", "depth", "rope_theta", "first_code", "codec", "mark_names", "picture"):
        assert getattr(again.config, name) == getattr(model.config, name)
    if layout == "original":
        (tmp_path / emu3.TOKENIZER).rename(tmp_path / "elsewhere")
        assert same(emu3.load(tmp_path, tmp_path / "elsewhere"), model)
        with pytest.raises(ValueError, match=r"the tokenizer of pictures .* as part 'tokenizer' or as .*_tokenizer"):
            emu3.load(tmp_path)
        names = set(load_file(tmp_path / "elsewhere" / "model.safetensors"))
        assert "encoder.time_res_stack.0.norm1.num_batches_tracked" in names and "lm_head.weight" not in names
        return
    theirs = load_file(tmp_path / "model.safetensors")
    assert theirs["vqmodel.encoder.middle_block.attn_1.q_proj.weight"].shape == (64, 64)
    memory = {"text_model.model.": "model.text_model.", "text_model.lm_head.": "lm_head.", "vqmodel.": "model.vqmodel."}
    for saved, named in memory.items():  # a file of its state dict
        theirs = {k.replace(saved, named) if k.startswith(saved) else k: v for k, v in theirs.items()}
    save_file(theirs, tmp_path / "model.safetensors")
    assert same(emu3.load(tmp_path), model)


def test_the_paper_size_is_what_the_published_configs_say() -> None:
    about = json.loads((GOLDEN / "config.json").read_text())
    paper = Emu3.paper()
    ids = {"bos": 151849, "eos": 151850, "img": 151851, "boi": 151852, "eoi": 151853, "eol": 151846, "eof": 151847}
    values = about["llm"] | {"vocab_size": 184622, "hidden_size": 4096, "intermediate_size": 14336,
                             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    values |= {f"{name}_token_id": i for name, i in ids.items()}
    tokenizer = about["vision_tokenizer"] | {"codebook_size": 32768, "ch": 256, "ch_mult": [1, 2, 2, 4],
                                             "num_res_blocks": 2, "attn_resolutions": [3]}
    assert emu3.config_of(values, tokenizer) == paper
    with pytest.raises(ValueError, match="48 codes at the end of the vocabulary, got vocab_size 184621"):
        known = {emu3.VISUAL.format(0): 184622 - 48, **{t: 1 for t in emu3.IDS.values()}, **emu3.SPELLING}
        emu3.config_of({"text_config": values | {"vocab_size": 184621}, "vq_config": about["vision_tokenizer"],
                        "vocabulary_map": known})
    for changes, message in [({"double_z": True}, "double_z of the tokenizer to be False"),
                             ({"temporal_downsample_factor": 3}, "a power of 2"), ({"z_channels": 8}, "as embed_dim")]:
        with pytest.raises(ValueError, match=message):
            emu3.config_of(values, tokenizer | changes)
    with pytest.raises(ValueError, match="hidden_act of the language model to be 'silu'"):
        emu3.config_of(values | {"hidden_act": "gelu"}, tokenizer)
    with pytest.raises(ValueError, match="a token '<.visual token 000000.>' in the vocabulary"):
        emu3.config_of({"vocabulary_map": {}, "text_config": {}, "vq_config": {}})


def test_what_the_layouts_cannot_state_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a tokenizer of clips, as published, got VQTokenizerConfig"):
        convert.export(tiny(), tmp_path)
    with pytest.raises(ValueError, match="the published layout can state, got another picture"):
        convert.export(of_clips(picture=(64, 32)), tmp_path)
    with pytest.raises(ValueError, match="picture in multiples of 8"):
        build(picture=(60, 64))
    with pytest.raises(ValueError, match="read_area of at least 64 pixels, the fewest first"):
        build(read_area=(4096, 1024))


def test_every_golden_case() -> None:
    cases = parity.run("emu3", GOLDEN)
    assert [c.name for c in cases if not c.passed] == []
    assert len(cases) == 24 and max(c.absolute for c in cases) < 2e-5


@pytest.mark.parametrize(("file", "key", "hit", "spared"), [
    ("llm", "model.layers.1.mlp.up_proj.weight", {"sft.loss", "understanding.logits_last", "gen.cond_logits_last"},
     {"image.codes", "video.reconstruction"}),
    ("vision_tokenizer", "decoder.time_conv.1.conv.conv.weight", {"image.reconstruction", "gen.image1"},
     {"image.pre_quant", "gen.codes1"}),
    ("vision_tokenizer", "encoder.time_res_stack.0.norm2.running_var", {"image.pre_quant", "video.pre_quant"},
     {"gen.image1", "sft.logits"}),
])
def test_one_wrong_weight_is_noticed(file: str, key: str, hit: set[str], spared: set[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "emu3"))
    tensors = load_file(folder / f"{file}.safetensors")
    tensors[key] = tensors[key] * 1.5
    save_file(tensors, folder / f"{file}.safetensors")
    failed = {c.name for c in parity.run("emu3", folder) if not c.passed}
    assert hit <= failed and not spared & failed


def test_digits_are_those_that_the_folder_states(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "emu3"))
    (folder / "README.md").unlink()
    model = emu3_cases.load(folder)
    assert model.layout.code is not None and model.layout.code.digits == tuple(range(15, 25))
    with pytest.raises(ValueError, match="expected prompts that end with"):
        parity.run("emu3", folder)


def test_the_recipe_is_read() -> None:
    recipe = load_recipe(ROOT / "recipes" / "emu3.yaml")
    assert recipe.system == "emu3" and [s.name for s in recipe.stages] == ["pretrain", "tune"]
    assert recipe.init == {"codec": "zoo/vq"}
