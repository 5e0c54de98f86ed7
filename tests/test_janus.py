"""Janus: sizes, what learns from what, the released prompt without text, chat template, checkpoints, golden cases."""
import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.adapters import convert, janus, janus_cases
from diptych.document import Document, Image, Text
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling
from diptych.parts.interleave import Marks
from diptych.parts.pictures import crop_to, pad_square
from diptych.parts.quantize import CodebookConfig, VectorConfig
from diptych.parts.turns import Turns
from diptych.parts.vision import VisionConfig
from diptych.parts.vq import VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.base import Sampling
from diptych.systems.janus import Janus, JanusConfig
from diptych.systems.works import Read, Together
from diptych.training.recipe import load_recipe
from diptych.world.tasks import document

GOLDEN = Path(__file__).parent / "goldens" / "janus"
GUIDED = Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=3.0),)))


def build(**changes: Any) -> Janus:
    torch.manual_seed(0)
    return Janus(dataclasses.replace(Janus.tiny(), **changes)).eval()


@cache
def tiny() -> Janus:
    return build(drop_text=0.0, drop_feature=0.0)


# -- size, gradients --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("size", "width", "hidden", "layers", "name"), [
    ("paper", 4096, 11008, 30, 7.4e9), ("pro_1b", 2048, 5632, 24, 2.1e9)])
def test_published_sizes_by_arithmetic(size: str, width: int, hidden: int, layers: int, name: float) -> None:
    """LLaMA layout without grouped heads; the tower without its attention pool; VQ-16 has 71,883,403 parameters."""
    trunk = layers * (4 * width**2 + 3 * width * hidden + 2 * width) + width
    words, codes, v = 2 * 102400 * width, 16384, 1024
    tower = 24 * (4 * (v * v + v) + 2 * 4 * v * v + 4 * v + v + 4 * v) + 3 * 16**2 * v + v + 576 * v + 2 * v
    aligners = (v * width + width) + (8 * width + width) + 2 * (width**2 + width)
    ends = codes * 8 + width**2 + width + width * codes + codes
    with torch.device("meta"):
        model = Janus(getattr(Janus, size)())
    codec = sum(p.numel() for p in model.codec.parameters())
    assert codec == 71_883_403
    assert model.num_parameters() == trunk + words + tower + aligners + ends + codec
    assert model.num_parameters() == pytest.approx(name, rel=0.02)
    assert model.code_head[2].out_features == 16384 and model.code_embed.weight.shape == (16384, 8)


def reached(term: str, tasks: list[str]) -> set[str]:
    model = build(drop_text=0.0, drop_feature=0.0)
    losses = model.loss(model.collate([document(t, 1) for t in tasks]), torch.Generator().manual_seed(0))
    losses.sums[term].backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_two_ways_of_seeing_and_two_heads() -> None:
    text = reached("text", ["caption", "question"])
    assert {"head.weight", "aligner.0.weight", "vision.vision_model.post_layernorm.weight"} <= text
    assert not {n for n in text if n.startswith("code")}
    image = reached("image", ["draw"])
    assert {"code_head.2.weight", "code_embed.weight", "code_aligner.0.weight", "embed.weight"} <= image
    assert not {n for n in image if n.startswith(("head.", "codec.", "vision.", "aligner."))}
    assert any(n.startswith("vision.") for n in reached("image", ["edit"]))  # what is edited is read by features


def test_codes_are_read_by_a_table_of_their_own() -> None:
    model = build()
    codes = torch.arange(5)
    before = model.code_tokens(codes)
    with torch.no_grad():
        model.codec.quantizer.codebook.weight.mul_(-1)
    assert torch.equal(model.code_tokens(codes), before)


# -- documents to tokens ----------------------------------------------------------------------------------------------

def spans(model: Janus, d: Document, **how: Any) -> list[int | str]:
    """Ids of the texts, and for every run of features or codes its kind."""
    w = model.write(d, **how)[0]
    kinds = np.concatenate(w.strip.columns["modality"])
    out: list[int | str] = []
    for token, kind in zip(w.ids, kinds, strict=True):
        name = {0: token, 1: "features", 3: "codes"}[int(kind)]
        if isinstance(name, int) or not out or out[-1] != name:
            out.append(name)
    return out


def test_the_layout_of_pictures() -> None:
    """Begin mark, features, end mark to read; begin mark, codes to draw; a drawn one is read back if more follows."""
    model, draw, edit, story = tiny(), document("draw", 0), document("edit", 0), document("story", 0)
    m = model.marks
    assert spans(model, draw)[-2:] == [m.image_start, "codes"]
    assert spans(model, edit)[:3] == [m.image_start, "features", m.image_end]
    assert spans(model, edit)[-2:] == [m.image_start, "codes"]
    kinds = [s for s in spans(model, story) if isinstance(s, str)]
    assert kinds == ["codes", "features"] * 3 + ["codes"]
    w = model.write(story)[0]
    assert np.array_equal(np.concatenate(w.strip.columns["position"])[:, 0], np.arange(w.strip.length))


def test_the_released_prompt_without_text() -> None:
    """Every token but the first becomes a pad; the paper leaves them out. Training drops like sampling."""
    d = document("draw", 0)
    for variant, words in (("released", True), ("paper", False)):
        model = build(variant=variant, drop_text=1.0)
        m, pad = model.marks, model.config.pad
        count = len(model.spell(d.pieces[0]))
        null = [m.start, *[pad] * (count + 1)] if words else []
        assert spans(model, d, drop=(True, False, False)) == [*null, m.image_start, "codes"]
        assert model.collate([d]).page.ids[0, : len(null)].tolist() == null
        read: list[tuple[int, list[int]]] = []
        run = model.run

        def listen(works: list[Any], run: Any = run, read: list[Any] = read) -> list[Any]:
            for work in works:
                read += [[id(w.reader), w.writer.ids] for w in (work.works if isinstance(work, Together) else [work])
                         if isinstance(w, Read)]
            return run(works)

        model.run = listen  # type: ignore[method-assign]
        model.generate([d], GUIDED)
        texts = [ids for _, ids in read if len(ids) > 1]
        full = [m.start, *model.spell(d.pieces[0]), m.end]
        assert texts == [full, full] + [null] * words
        assert [ids for _, ids in read if ids == [m.image_start]] == [[m.image_start]] * 2


def test_conditions_are_dropped_as_often_as_asked() -> None:
    model = build(drop_text=0.3, drop_feature=0.5)
    drops = np.array([model._drops(document("edit", i)) for i in range(300)], float).mean(0)
    assert drops[0] == pytest.approx(0.3, abs=0.1) and drops[1] == 0 and drops[2] == pytest.approx(0.5, abs=0.1)


def test_released_needs_a_pad() -> None:
    with pytest.raises(ValueError, match="id of the pad token .*fix: set pad"):
        dataclasses.replace(Janus.tiny(), pad=None)


def test_pictures_are_padded_to_read_and_cropped_to_draw() -> None:
    picture = torch.full((3, 20, 40), 0.5)
    seen = pad_square(picture, 32)
    grey = 127 / 127.5 - 1
    assert seen.shape == (3, 32, 32)
    assert (seen[:, :8] - grey).abs().max() < 1e-6 and (seen[:, 24:] - grey).abs().max() < 1e-6
    assert (seen[:, 8:24] - 0.5).abs().max() < 0.01
    assert ((pad_square(torch.ones(3, 2, 100), 32)[0] - grey).abs() > 0.1).any(1).sum() == 14  # the least height
    wide = torch.linspace(-1, 1, 80).expand(3, 20, 80)
    cut = crop_to(wide, 16, 16)
    assert cut.shape == (3, 16, 16) and cut.mean().abs() < 0.02 and cut.max() < 0.3
    same = torch.rand(3, 64, 64)
    assert pad_square(same, 64) is same and crop_to(same, 64, 64) is same


# -- chat template ----------------------------------------------------------------------------------------------------

def test_the_template_of_deepseek() -> None:
    published = json.loads((GOLDEN / "config.json").read_text())["prompt_strings"]
    turns, ask, drawn = Turns(), Text(text="a red cube"), Image(role="assistant", target=True)
    assert turns.lead(None, ask) + turns.gap + "a red cube" + turns.lead(ask, drawn) == \
        published["generation_without_system"]
    seen, question, answer = Image(), Text(text="What is it?"), Text(role="assistant", target=True)
    own = turns.lead(None, seen) + turns.gap + "<image_placeholder>" + turns.lead(seen, question) + "What is it?"
    assert own + turns.lead(question, answer) == published["understanding"]


def test_the_template_in_the_sequence() -> None:
    model = build(turns=Turns(), drop_text=0.0)
    v, m = model.need_vocabulary(), model.marks
    ask, answer = Text(text="what is it ?"), Text(text="a cube", role="assistant", target=True)
    picture = Image(pixels=np.zeros((3, 64, 64), np.float32))
    read = Document((picture, ask, answer))
    before = [m.start, *v.encode("<|User|>:"), *v.encode(" "), m.image_start, "features", m.image_end,
              *v.encode("\n"), *v.encode("what is it ?"), *v.encode("\n\n<|Assistant|>:")]
    said = [*v.encode(" a cube"), m.end]
    assert spans(model, read) == before + said
    labels = model.write(read)[0].labels
    assert [i for i in labels if i >= 0] == said
    draw = Document((ask, picture.replace(role="assistant", target=True)))
    prompt = [*v.encode("<|User|>:"), *v.encode(" what is it ?"), *v.encode("\n\n<|Assistant|>:")]
    assert spans(model, draw) == [m.start, *prompt, m.image_start, "codes"]
    assert spans(model, draw, drop=(True, False, False)) == \
        [m.start, *[model.config.pad] * len(prompt), m.image_start, "codes"]
    # what is generated scores as what is trained
    filled = model.generate([draw.prompt(), read.prompt()], Sampling(text=TextSampling(max_tokens=3)))
    assert all(torch.isfinite(s).all() for s in model.score(filled).values)


# -- checkpoints ------------------------------------------------------------------------------------------------------

def published() -> JanusConfig:
    """Other sizes than the fixture's, grouped heads among them."""
    sides = {"channels": 16, "channel_mult": (1, 2), "attention": (1,), "norm_groups": 8}
    return dataclasses.replace(
        Janus.tiny(), feature_merge=1, vocabulary_size=60, marks=Marks(10, 11, 12, 13), pad=14, tokenizer="",
        block=dataclasses.replace(Janus.tiny().block, heads=4, kv_heads=2, head_dim=16), picture=(16, 16),
        turns=Turns(), code_width=6, mark_names=janus.DEEPSEEK_MARKS, row=4096, sampling=Janus.paper().sampling,
        vision=VisionConfig(width=24, mlp_width=72, num_layers=2, num_heads=3, patch=4, max_side=5, gelu="exact"),
        codec=VQTokenizerConfig(encoder=PyramidConfig(blocks=(1, 1), **sides), latent_channels=12,
                                decoder=PyramidConfig(blocks=(2, 2), **sides),
                                quantizer=VectorConfig(codebook=CodebookConfig(values=30, width=6))))


@pytest.mark.parametrize("layout", ["original", "huggingface"])
def test_checkpoints_survive_both_layouts(layout: Any, tmp_path: Path) -> None:
    c = published() if layout == "original" else dataclasses.replace(
        published(), picture=(20, 20), codec=dataclasses.replace(  # there pictures are as large, and groups are 32
            published().codec, encoder=PyramidConfig(channels=32, channel_mult=(1, 1), blocks=(1, 1), attention=(1,)),
            decoder=PyramidConfig(channels=32, channel_mult=(1, 1), blocks=(2, 2), attention=(1,))))
    model = Janus(c).eval()
    convert.export(model, tmp_path, layout=layout)
    again = janus.load(tmp_path, marks=c.marks, pad=c.pad)
    assert again.config == c
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("lm_head.weight" in names) == (layout == "huggingface")


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    values = json.loads((GOLDEN / "config.json").read_text())
    for change, message in [({"model_type": "llama"}, "multi_modality or janus"),
                            ({"_extra_sizes": {}}, "fix: state its sizes"),
                            ({"language_config": {**values["language_config"], "hidden_act": "gelu"}}, "'silu'")]:
        with pytest.raises(ValueError, match=message):
            janus.config_of(values | change)
    extra = {k: v for k, v in values["_extra_sizes"].items() if k != "special_ids"}
    with pytest.raises(ValueError, match="tokenizer.json beside it"):
        janus.config_of(values | {"_extra_sizes": extra})
    with pytest.raises(ValueError, match="can state"):
        convert.export(tiny(), tmp_path)
    tensors = load_file(GOLDEN / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(FileNotFoundError, match="expected weights"):
        janus.load(tmp_path)
    del tensors["gen_embed.weight"]
    save_file(tensors | {"extra.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"missing \(gen_embed.weight\); 1 unexpected \(extra.weight\)"):
        janus.load(tmp_path)


def test_every_golden_case() -> None:
    cases = janus_cases.parity(GOLDEN)
    assert [c.name for c in cases if not c.passed] == []
    assert len(cases) == 27 and max(c.absolute for c in cases) < 1e-5


@pytest.mark.parametrize(("key", "hit"), [
    ("gen_embed.weight", {"gen_embeds.embeds", "generation.cfg5.logits_cond_first8"}),
    ("aligner.layers.2.bias", {"understanding.aligned", "understanding.greedy_logits"}),
    ("vision_model.vision_tower.pos_embed", {"understanding.vision_features"}),
    ("gen_vision_model.quantize.embedding.weight", {"vq.quant", "generation.cfg1.pixels"}),
])
def test_one_wrong_weight_is_noticed(key: str, hit: set[str], tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "weights.safetensors")
    tensors[key] = tensors[key] + 0.05 * torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, tmp_path / "weights.safetensors")
    for name in ("config.json", "golden.safetensors"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    failed = {c.name for c in janus_cases.parity(tmp_path) if not c.passed}
    assert hit <= failed
    assert ("preprocess0.pixel_values" not in failed) and (key.startswith("gen") or "vq.indices" not in failed)


def test_the_recipe_is_read() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "janus.yaml")
    assert recipe.system == "janus" and [s.name for s in recipe.stages] == ["adapt", "unify", "tune"]
