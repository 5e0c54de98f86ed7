"""UniPic 2.0: published outputs, folders both ways, references, the vector of the whole, what the recipe trains."""
import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from filling import filled
from safetensors.torch import load_file, save_file

from diptych.adapters import convert, parity, unipic2
from diptych.document import Document, Image
from diptych.objectives import flow
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling
from diptych.parts.dit_joint import JointDit
from diptych.parts.resources import locate
from diptych.parts.serial import PooledConnectorConfig
from diptych.systems.base import Sampling
from diptych.systems.metaquery import MetaQuery
from diptych.systems.serial import Serial
from diptych.systems.unipic2 import UniPic2
from diptych.systems.works import Denoise
from diptych.training.recipe import load_recipe
from diptych.training.stages import fixed_names, trained_names
from diptych.world.tasks import document

GOLDEN = Path(__file__).parent / "goldens" / "unipic2"
PARTS = ("transformer", "vae", "conditioner", "qwen2_5_vl")


@cache
def system(**changes: Any) -> UniPic2:
    """Tiny, with everything that starts at zero filled in; no condition is dropped unless told."""
    torch.manual_seed(0)
    return filled(UniPic2(dataclasses.replace(UniPic2.tiny(), **{"drop_text": 0.0} | changes)).eval())


# -- published outputs -------------------------------------------------------------------------------------------------

def test_all_published_outputs_are_reproduced() -> None:
    cases = parity.run("unipic2", GOLDEN)
    assert all(c.passed and c.tolerance <= 2e-4 for c in cases), parity.table(cases)
    stored = {k.replace(".output.", ".") for k in load_file(GOLDEN / "golden.safetensors") if ".output." in k}
    assert {c.name for c in cases} == stored and len(stored) == 24
    assert max(c.absolute for c in cases if "timesteps" not in c.name) < 1e-4
    assert max(c.relative for c in cases) < 1e-5


def other_sizes(folder: Path) -> UniPic2:
    """A folder in the published layout with other numbers everywhere, and the model in it."""
    about = json.loads((GOLDEN / "config.json").read_text())
    about["transformer"] |= {"num_layers": 2, "attention_head_dim": 20, "num_attention_heads": 3, "patch_size": 1,
                             "caption_projection_dim": 60, "dual_attention_layers": [1], "pos_embed_max_size": 20,
                             "pooled_projection_dim": 28, "joint_attention_dim": 32, "sample_size": 10}
    about["conditioner"] |= {"num_queries": 3, "pooled_projection_dim": 28, "joint_attention_dim": 32}
    about["conditioner"]["connector_config"] |= {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 40}
    about["qwen2_5_vl"] |= {"num_hidden_layers": 1, "intermediate_size": 40, "tie_word_embeddings": True}
    about["qwen2_5_vl"]["vision_config"] |= {"depth": 2, "window_size": 112, "fullatt_block_indexes": [0]}
    about["vae"] |= {"layers_per_block": 2, "use_quant_conv": True, "use_post_quant_conv": True}
    about["scheduler"] |= {"shift": 2.0, "num_train_timesteps": 100}
    torch.manual_seed(0)
    model = UniPic2(unipic2.config_of(about)).eval()
    convert.export(model, folder)
    return model


@torch.no_grad()
def test_every_published_tensor_has_one_home(tmp_path: Path) -> None:
    model = other_sizes(tmp_path / "other")
    again = unipic2.load(tmp_path / "other")
    assert again.config == model.config and again.config.sampling.end == pytest.approx(1 - 2 / 101)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert again.generator.config.dual == (1,) and again.generator.config.span == 10  # type: ignore[union-attr]
    loaded = unipic2.load(GOLDEN)
    convert.export(loaded, tmp_path / "golden")
    for part in PARTS:
        [file] = (tmp_path / "golden" / part).glob("*.safetensors")
        published, back = load_file(GOLDEN / f"{part}.safetensors"), load_file(file)
        assert set(back) == set(published) and all(torch.equal(published[k], v) for k, v in back.items())
    about = json.loads((GOLDEN / "config.json").read_text())
    for part in ("transformer", "vae", "conditioner", "scheduler", "qwen2_5_vl"):
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        written = json.loads((tmp_path / "golden" / part / name).read_text())
        written = {k: v for k, v in written.items() if k not in unipic2.FEATURES}
        assert _common(written, about[part]) == _common(about[part], written) and len(written) > 2
    assert not list(tmp_path.rglob(".*"))


def test_texts_are_those_of_the_language_model(tmp_path: Path) -> None:
    """Its tokenizer lies in its folder, and knows the marks of texts that no config states."""
    other_sizes(tmp_path / "folder")
    shutil.copy(locate("zoo/tokenizer", ".json"), tmp_path / "folder" / "qwen2_5_vl" / "tokenizer.json")
    model = unipic2.load(tmp_path / "folder")
    v = model.need_vocabulary()
    assert (model.marks.start, model.marks.end) == (v.start, v.end) and model.marks.image_start == 148
    convert.export(model, tmp_path / "again")
    assert [p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("tokenizer.json")] == [
        Path("qwen2_5_vl", "tokenizer.json")]


def _common(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    return {k: _common(v, two[k]) if isinstance(v, dict) else v for k, v in one.items() if k in two}


@pytest.mark.parametrize("part, name, broken, whole", [
    ("transformer", "transformer_blocks.1.attn2.to_v.weight", "transformer_t2i.velocity", "mq_t2i.pooled"),
    ("transformer", "pos_embed.pos_embed", "pipeline_edit.latents", "pipeline_edit.ref_latents"),
    ("conditioner", "projector_2.weight", "mq_edit.pooled", "mq_edit.prompt_embeds"),
    ("qwen2_5_vl", "visual.merger.mlp.2.weight", "mq_edit.query_states", "mq_t2i.query_states"),
])
def test_one_wrong_weight_fails(part: str, name: str, broken: str, whole: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "unipic2"))
    tensors = load_file(folder / f"{part}.safetensors")
    tensors[name] = tensors[name] + 0.3 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / f"{part}.safetensors")
    passed = {c.name: c.passed for c in parity.run("unipic2", folder)}
    assert not passed[broken] and passed[whole]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    about = json.loads((GOLDEN / "config.json").read_text())
    for part, changes, message in [
        ("transformer", {"qk_norm": None}, "transformer.qk_norm to be 'rms_norm', got None"),
        ("transformer", {"caption_projection_dim": 40}, "caption_projection_dim 48 and out_channels 4, got 40 and 4"),
        ("scheduler", {"use_dynamic_shifting": True}, "scheduler.use_dynamic_shifting to be False, got True"),
        ("conditioner", {"pooled_projection_dim": 30}, r"widths \(64, 56, 36\) .* got \(64, 56, 30\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            unipic2.config_of(about | {part: about[part] | changes})
    model = other_sizes(tmp_path)
    file = tmp_path / "conditioner" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "meta_queries"}, file)
    with pytest.raises(ValueError, match=r"published layout of UniPic2 .* 1 missing \(conditioner.meta_queries\)"):
        unipic2.load(tmp_path)
    (tmp_path / "qwen2_5_vl").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"expected the folder of Qwen2.5-VL .* as part 'qwen2_5_vl' or as .* none"):
        unipic2.load(tmp_path)
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae/config.json, got no such file"):
        unipic2.load(tmp_path, tmp_path / "elsewhere")
    wider = dataclasses.replace(model.config, generator=dataclasses.replace(model.config.generator, hidden=100))
    with pytest.raises(ValueError, match="four times as wide.*fix: save it with save_system"):
        unipic2.published_configs(wider)


def test_the_published_sizes_follow_from_the_layout() -> None:
    c = UniPic2.paper()
    with torch.device("meta"):
        generator, codec = c.generator.build(), c.codec.build()
        connector = c.connector.build(c.block.width, c.generator.condition_width)
    w, layers, dual = 1536, 24, 13
    attention, norms, mlp = 4 * (w * w + w), 2 * 64, 2 * 4 * w * w + 5 * w
    picture = layers * (6 * (w * w + w) + attention + norms + mlp) + dual * (3 * (w * w + w) + attention + norms)
    words = layers * (6 * (w * w + w) + attention + norms + mlp) - (4 * (w * w + w) + (w * w + w) + mlp)
    ends = (64 * w + w) + (64 * w + 64) + (4096 * w + w) + 2 * (w * w + w)
    times = (256 * w + w) + (w * w + w) + (2048 * w + w) + (w * w + w)
    assert _count(generator) == picture + words + ends + times == 2_243_171_520  # Stable Diffusion 3.5 Medium
    assert cast(JointDit, generator).positions.shape == (384 * 384, w)
    assert _count(codec) == 83_819_683  # also that of FLUX
    layer = attention + 2 * w * 8960 + 8960 + w + 4 * w
    ends = (3584 * w + w) + (w * 2048 + 2048) + (w * 4096 + 4096)
    assert _count(connector) == 24 * layer + ends and (c.queries, c.block.width) == (256, 3584)


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- references --------------------------------------------------------------------------------------------------------

def listened(s: UniPic2, d: Document, sampling: Sampling, monkeypatch: pytest.MonkeyPatch, seed: int = 0
             ) -> list[Denoise]:
    """The works of the generator."""
    seen: list[Denoise] = []
    run = Serial._run_denoises
    with monkeypatch.context() as patch:
        patch.setattr(UniPic2, "_run_denoises", lambda self, works: (seen.extend(works), run(self, works))[1])
        s.generate([d], sampling, seeds=seed)
    return seen


@torch.no_grad()
def test_references_are_draws_that_every_branch_with_the_picture_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    s, d = system(), document("edit", 1)
    chain = Guidance(branches=(Branch(context="no_text", scale=2.0), Branch(context="no_image", scale=1.5)))
    work = listened(s, d, Sampling(evaluations=1, guidance=chain), monkeypatch)[0]
    assert [len(own) for own in work.references] == [1, 1, 0]
    (x, grid), (other, _) = work.references[0][0], work.references[1][0]
    assert x is other and grid == (4, 4)
    picture = cast(Image, d.pieces[0]).pixels
    assert picture is not None
    pixels = torch.from_numpy(picture)
    [mean] = s.encode([pixels])
    [far] = s.encode([pixels], [torch.ones(16, 24)])
    z = (x - mean) / (far - mean)
    assert (far > mean).all() and 0.8 < z.std() < 1.2 and abs(z.mean()) < 0.2
    again, another = (listened(s, d, Sampling(evaluations=1), monkeypatch, seed)[0] for seed in (0, 1))
    assert torch.equal(again.references[0][0][0], x) and not torch.allclose(another.references[0][0][0], x)
    assert torch.equal(again.x, work.x)
    drawing = listened(s, document("draw", 0), Sampling(evaluations=1), monkeypatch)[0]
    assert [len(own) for own in drawing.references] == [0]


@torch.no_grad()
def test_training_sees_what_drawing_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    s, d = system(), document("edit", 1)
    batch = s.lay_out([s.write(d)])
    trained, visible = s.conditions(s.hidden(batch), batch.page)
    work = listened(s, d, Sampling(evaluations=1), monkeypatch)[0]
    torch.testing.assert_close(work.conditions[0], trained[0], atol=1e-5, rtol=1e-4)
    assert visible is None and trained.shape == (1, 8, 48 + 32)
    assert torch.equal(trained[:, :, 48:], trained[:, :1, 48:].expand(-1, 8, -1))  # the same whole beside every state
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape, **kw: torch.zeros(*shape))
        [given] = s.given_latents(batch, torch.Generator())
        seen = listened(s, d, Sampling(evaluations=1), monkeypatch)[0].references[0][0][0]
    torch.testing.assert_close(given, seen, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_references_take_the_size_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    s, d = system(), document("edit", 0)
    asked = Document((*d.pieces[:-1], Image(size=(32, 48), target=True)))
    [made] = s.generate([asked], Sampling(evaluations=1))
    assert cast(Any, made.pieces[-1]).pixels.shape == (3, 32, 48)
    [(x, grid)] = listened(s, asked, Sampling(evaluations=1), monkeypatch)[0].references[0]
    assert grid == (2, 3) and x.shape == (6, 24)


@torch.no_grad()
def test_a_story_is_drawn_from_the_picture_before(monkeypatch: pytest.MonkeyPatch) -> None:
    s, d = system(), document("story", 0)
    batch = s.collate([d])
    shown = [len(x) for x in s.given_latents(batch, torch.Generator())]
    assert shown == [0, 16, 16, 16][:len(shown)] and len(shown) > 2
    works = listened(s, d, Sampling(evaluations=1, text=TextSampling(max_tokens=1)), monkeypatch)
    assert [len(w.references[0]) for w in works] == [n // 16 for n in shown]
    two = system(references=2)
    assert [len(x) for x in two.given_latents(two.collate([d]), torch.Generator())][:3] == [0, 16, 32]


@torch.no_grad()
def test_without_references_the_generator_sees_none() -> None:
    s, d = system(references=0), document("edit", 0)
    assert s.collate([d]).latents == [] and system().collate([d]).latents == [(0, False)]
    assert system(drop_latent=1.0).collate([d]).latents == []
    assert s.generate([d], Sampling(evaluations=1))[0].pieces[-1].empty is False


def test_edits_and_drawings_are_learnt_in_one_batch() -> None:
    """Rows with and without a reference go through the generator apart, and what is read is what they hold."""
    s = system()
    batch = s.collate([document("edit", 0), document("draw", 0), document("edit", 1)])
    losses = s.loss(batch, torch.Generator().manual_seed(0))
    assert losses.counts["image"] == batch.counts["image"] == 24  # type: ignore[index]
    losses.total().backward()
    assert s.queries.grad is not None and s.queries.grad.any()
    s.zero_grad()


# -- guidance and times ------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_negative_prompt_stands_in_place_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    d, guided = document("edit", 1), Sampling(evaluations=1, guidance=Guidance(branches=(
        Branch(context="no_text", scale=2.0),)))
    plain = listened(system(), d, guided, monkeypatch)[0]
    negative = listened(system(negative="a small purple ring"), d, guided, monkeypatch)[0]
    assert torch.equal(plain.conditions[0], negative.conditions[0])
    assert not torch.allclose(plain.conditions[1], negative.conditions[1], atol=1e-4)


def test_times_end_at_the_smallest_level() -> None:
    c = UniPic2.paper().sampling
    times = flow.schedule(c.evaluations, c.shift, c.start, c.end)
    assert len(times) == 51 and times[0] == 0 and times[-1] == 1
    once = 3 * 0.001 / (1 + 2 * 0.001)
    assert 1 - times[-2] == pytest.approx(3 * once / (1 + 2 * once))


@torch.no_grad()
def test_stochastic_steps_have_densities(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drawn step by step is scored by asking the generator again."""
    s, d, plain = system(), document("edit", 1), Sampling(evaluations=3, shift=3.0)
    works = listened(s, d, dataclasses.replace(plain, stochastic=0.7), monkeypatch)
    times = flow.schedule(3, 3.0)
    for work, after, t, to in zip(works, works[1:], times, times[1:]):
        [v] = s.run([work])[0]
        step = flow.sde_step(work.x, v, t, to, 0.7, times[1])
        assert -5 < step.log_prob(after.x) < 5
        assert step.log_prob(after.x) > step.log_prob(after.x + 3 * step.std)
    assert not torch.allclose(listened(s, d, plain, monkeypatch)[1].x, works[1].x)


# -- the language model, and controls ----------------------------------------------------------------------------------

def test_only_what_the_recipe_leaves_free_learns() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "unipic2.yaml")
    assert recipe.system == "unipic2" and [s.name for s in recipe.stages] == ["pretrain", "tune"]
    s = system()
    for stage in recipe.stages:
        free = trained_names(s, stage, fixed_names(s))
        assert {n.partition(".")[0] for n in free} == {"queries", "connector_out", "generator"}
    align = dataclasses.replace(recipe.stages[0], freeze=(*recipe.stages[0].freeze, "generator"))
    assert {n.partition(".")[0] for n in trained_names(s, align, fixed_names(s))} == {"queries", "connector_out"}


@torch.no_grad()
def test_answers_never_see_queries() -> None:
    s, story = system(), document("story", 0)
    before = s.score([story]).values[0]
    kept = s.queries.data.clone()
    s.queries.data.add_(1.0)
    after = s.score([story]).values[0]
    s.queries.data.copy_(kept)
    assert torch.equal(before, after)


def test_the_context_as_condition_learns_and_keeps_to_itself() -> None:
    s = system(exports="context", queries=0, opening="learnt")
    documents = [document("edit", 0), document("draw", 1)]
    s.loss(s.collate(documents), torch.Generator().manual_seed(0)).total().backward()
    assert s.embed.weight.grad is not None and s.embed.weight.grad.any()
    s.zero_grad()
    together = s.generate(documents, Sampling(evaluations=2))
    alone = [s.generate([d], Sampling(evaluations=2))[0] for d in documents]
    for a, b in zip(together, alone, strict=True):
        assert np.allclose(cast(Any, a.pieces[-1]).pixels, cast(Any, b.pieces[-1]).pixels, atol=1e-4)


def test_configs_that_contradict_themselves_are_errors() -> None:
    tiny, other = UniPic2.tiny(), MetaQuery.tiny()
    for base, changes, message in [
        (tiny, {"connector": other.connector}, "as the generator asks for, of width 32, got None"),
        (tiny, {"connector": PooledConnectorConfig(layers=1, width=64, heads=2, hidden=64, pooled_width=30)},
         "of width 32, got 30"),
        (other, {"references": 1}, "a generator that looks at references, got DitConfig; fix: set references to 0"),
        (tiny, {"whole_steps": True}, "noise_steps of at least 1 to tell whole ones, got 0"),
        (tiny, {"exports": "context", "queries": 0}, "learnt opening where the context is exported, got 'none'"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(base, **changes)
