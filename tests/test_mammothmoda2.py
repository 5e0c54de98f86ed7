"""MammothModa2: published outputs, twins for codes, what the renderer is told, references, plans, training."""
import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filling import filled
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.adapters import mammothmoda2, parity
from diptych.adapters.keys import to_theirs
from diptych.document import Document
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.interleave import Page
from diptych.parts.tokens import Modality
from diptych.systems.base import Sampling
from diptych.systems.mammothmoda2 import MammothModa2
from diptych.systems.works import Denoise, Read, Reader
from diptych.training.recipe import load_recipe
from diptych.training.stages import trained_names
from diptych.world.tasks import TASKS, document

GOLDEN = Path(__file__).parent / "goldens" / "mammothmoda2"


@cache
def system(**changes: Any) -> MammothModa2:
    """Tiny, with everything that starts at zero filled in; no condition is dropped unless told."""
    torch.manual_seed(0)
    drops = {"drop_text": 0.0, "drop_feature": 0.0}
    return filled(MammothModa2(dataclasses.replace(MammothModa2.tiny(), **drops | changes)).eval())


# -- published outputs -------------------------------------------------------------------------------------------------

def test_all_published_outputs_are_reproduced() -> None:
    cases = parity.run("mammothmoda2", GOLDEN)
    assert all(c.passed and c.tolerance <= 2e-4 for c in cases), parity.table(cases)
    stored = {k.replace(".output.", ".") for k in load_file(GOLDEN / "golden.safetensors") if ".output." in k}
    assert {c.name for c in cases} == stored and len(stored) == 44
    assert max(c.absolute for c in cases) < 3e-5  # machines round otherwise: 3e-6 on one, 1.4e-5 on another


def other_sizes(folder: Path, **changes: Any) -> MammothModa2:
    """A folder in the published layout with other numbers everywhere, and the model in it."""
    about = json.loads((GOLDEN / "config.json").read_text()) | {"gen_condition_layers": [-1, -2, -4]} | changes
    llm, dit = about["llm_config"], about["gen_dit_config"]
    llm |= {"moe_type": "ffn-1:3", "gen_vocab_size": 44}
    llm["text_config"] |= {"num_hidden_layers": 3, "intermediate_size": 40, "tie_word_embeddings": True}
    llm["vision_config"] |= {"depth": 3, "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 9}
    dit |= {"hidden_size": 36, "num_attention_heads": 3, "num_kv_heads": 1, "num_refiner_layers": 2, "num_layers": 1,
            "timestep_scale": 10.0, "multiple_of": 32}
    about["gen_axes_dim_rope"] = [4, 2, 6]
    about["gen_image_condition_refiner_config"] |= {"num_layers": 2, "num_heads": 2}
    about["gen_vae_config"] |= {"block_out_channels": [8, 8, 16], "layers_per_block": 2, "use_quant_conv": True,
                                "use_post_quant_conv": True, "down_block_types": ["DownEncoderBlock2D"] * 3,
                                "up_block_types": ["UpDecoderBlock2D"] * 3}
    torch.manual_seed(0)
    model = MammothModa2(mammothmoda2.config_of(about))
    theirs = to_theirs(model.state_dict(), mammothmoda2.rules(model.config))
    save_file({k: v.contiguous() for k, v in theirs.items()}, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(about))
    return model


@pytest.mark.parametrize("mode", ["text_image", "text", "image"])
def test_every_published_tensor_has_one_home(mode: str, tmp_path: Path) -> None:
    model = other_sizes(tmp_path, gen_condition_mode=mode)
    again = mammothmoda2.load(tmp_path)
    assert again.config == model.config and model.config.generator.hidden == 160  # 144 rounded up to 32s
    assert again.config.expert_layers == (1, 3) and again.config.generator.axes == (4, 2, 6)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    if mode != "text_image":
        return
    published, loaded = load_file(GOLDEN / "weights.safetensors"), mammothmoda2.load(GOLDEN)
    back = to_theirs(loaded.state_dict(), mammothmoda2.rules(loaded.config))
    assert set(back) == set(published) and all(torch.equal(published[k], v) for k, v in back.items())
    with pytest.raises(ValueError, match="a tokenizer of pictures to learn plans from, got none; fix"):
        loaded.picture_codes([torch.zeros(3, 16, 16)])


@pytest.mark.parametrize("name, broken, whole", [
    ("llm_model.model.language_model.layers.1.gen_mlp.down_proj.weight", "llm_mixed.logits", "llm_image.logits"),
    ("llm_model.model.visual.deepstack_merger_list.0.linear_fc2.weight", "llm_image.logits", "llm_image.image_embeds"),
    ("gen_transformer.image_index_embedding", "sample_edit.latents", "sample_t2i.latents"),
    ("gen_transformer.time_caption_embed.image_embedder.query", "dit_full.velocity", "dit_text.velocity"),
])
def test_one_wrong_weight_fails(name: str, broken: str, whole: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "mammothmoda2"))
    tensors = load_file(folder / "weights.safetensors")
    tensors[name] = tensors[name] + 0.3 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "weights.safetensors")
    passed = {c.name: c.passed for c in parity.run("mammothmoda2", folder)}
    assert not passed[broken] and passed[whole]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    about = json.loads((GOLDEN / "config.json").read_text())
    for changes, message in [
        ({"gen_text_condition_with_answer": True}, "gen_text_condition_with_answer to be False, got True"),
        ({"llm_config": about["llm_config"] | {"moe_type": "attention"}}, "moe_type none or ffn.*got 'attention'"),
        ({"llm_config": about["llm_config"] | {"gen_vocab_start_index": 150}}, "behind that of words, at 160, got 150"),
        ({"gen_vae_config": about["gen_vae_config"] | {"act_fn": "relu"}}, "act_fn of the autoencoder to be 'silu'"),
        ({"gen_dit_config": about["gen_dit_config"] | {"out_channels": 8}}, "as many channels out as in, got 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            mammothmoda2.config_of(about | changes)
    other_sizes(tmp_path)
    tensors = load_file(tmp_path / "weights.safetensors")
    del tensors["llm_model.gen_head.weight"]
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"published MammothModa2 layout .* 1 missing \(llm_model.gen_head.weight\)"):
        mammothmoda2.load(tmp_path)


def test_the_published_size_is_qwen3_vl_with_twins() -> None:
    with torch.device("meta"):
        model = MammothModa2(MammothModa2.paper())
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    twins = sum(n for name, n in sizes.items() if ".mlp.1." in name)
    language = sum(n for name, n in sizes.items() if name.startswith(("embed", "head", "trunk", "vision"))) - twins
    more = 2 * (model.config.vocabulary_size - 151936) * 4096  # rows that Qwen3-VL-8B does not have
    assert language - more == 8_767_123_696
    codes = sum(n for name, n in sizes.items() if name.startswith("code_"))
    assert twins + codes == pytest.approx(3e9, rel=0.05)  # "3B experts"


# -- the language model ------------------------------------------------------------------------------------------------

def test_twins_serve_codes_and_row_ends() -> None:
    s = system()
    batch = s.collate([document("draw", 0)])
    tokens, ids = batch.page.tokens, batch.page.ids
    codes = tokens.modality == Modality.CODE
    ends = ids == s.config.vocabulary_size + 64
    assert codes.sum() == 64 and ends.sum() == 8 and torch.equal(tokens.route == 1, codes | ends)
    assert tokens.target.sum() == 64  # row ends are forced
    layers = list(s.trunk.layers)
    assert [len(layer.mlp) for layer in layers] == [1, 2]  # type: ignore[arg-type]
    assert layers[1].mlp_norm[0] is layers[1].mlp_norm[1]  # type: ignore[index]
    none = system(expert_layers=(0, 0))
    assert not [n for n, _ in none.named_parameters() if ".mlp.1." in n]
    s.zero_grad()
    losses = s.loss(s.collate([document("question", 0)]), torch.Generator())
    losses.total().backward()
    assert all(p.grad is None or not p.grad.any() for n, p in s.named_parameters() if ".mlp.1." in n)
    s.zero_grad()


@torch.no_grad()
def test_conditions_are_means_over_layers() -> None:
    s, page = system(), Page.of([[system().write(document("draw", 0))[0]]])
    codes = torch.arange(64) % 7
    states = s.states(page, None, s.code_tokens(codes))
    found: list[list[Tensor]] = []
    s.trunk(states, page.tokens, s.mask, None, lambda done, x: found.append(x) or x)
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found[0], states, strict=True))
    for layers, own in (((-1, -2), [2, 1]), ((-1,), [2]), ((-3,), [0])):
        other = MammothModa2(dataclasses.replace(s.config, condition_layers=layers))
        other.load_state_dict(s.state_dict())
        hidden, kept = other.think(page, None, other.code_tokens(codes))
        for route in (0, 1):
            torch.testing.assert_close(kept[route], torch.stack([found[n][route] for n in own]).mean(0))
            torch.testing.assert_close(hidden[route], s.think(page, None, s.code_tokens(codes))[0][route])


@torch.no_grad()
def test_deep_levels_reach_behind_the_first_layer_only() -> None:
    s, d = system(), document("caption", 0)
    w, _, views = s.write(d)
    page, features = Page.of([[w]]), s.see(views)
    assert features.shape == (16, 128)  # two levels of 64
    plain = s.think(page, features[:, :64], None)[0]
    assert torch.equal(s.states(page, features, None)[0], s.states(page, features[:, :64], None)[0])
    deep = features.clone()
    deep[:, 64:] = 0
    torch.testing.assert_close(s.think(page, deep, None)[0], plain)
    assert not torch.allclose(s.think(page, features, None)[0][0], plain[0], atol=1e-3)


# -- what the renderer is told -----------------------------------------------------------------------------------------

def listened(s: MammothModa2, d: Document, sampling: Sampling, monkeypatch: pytest.MonkeyPatch,
             codes: Tensor | None = None) -> Denoise:
    """The first work of the renderer, with the plan put into the mouth of the language model."""
    seen: list[Denoise] = []
    run = MammothModa2._run_denoises
    with monkeypatch.context() as patch:
        patch.setattr(MammothModa2, "_run_denoises", lambda self, works: (seen.extend(works), run(self, works))[1])
        if codes is not None:
            told = iter(codes.tolist())
            patch.setattr("diptych.objectives.next_token.choose", lambda scores, uniform: torch.tensor([next(told)]))
        s.generate([d], sampling)
    return seen[0]


@pytest.mark.parametrize("task", ["draw", "edit", "layout"])
@torch.no_grad()
def test_training_and_drawing_condition_alike(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s, d = system(), document(task, 1)
    batch = s.lay_out([s.write(d)])
    codes = s.picture_codes([batch.pictures[i] for i, _ in batch.codes])[0]
    texts, plans = s.exported(s.read_page(batch.page, batch.views, codes)[1], batch.page)
    assert [len(x) for x in plans if x is not None] == [72]  # codes and row ends
    work = listened(s, d, Sampling(evaluations=1), monkeypatch, codes)
    torch.testing.assert_close(work.conditions[0], s.conditions(texts, plans)[0], atol=1e-5, rtol=1e-4)
    latents = s.encode(batch.pictures)
    given = [latents[i] for i in batch.references[0]]
    assert len(given) == (task == "edit") == len(work.references[0])
    for (x, grid), own in zip(work.references[0], given, strict=True):
        assert torch.allclose(x, own, atol=1e-5) and grid == (4, 4)


@torch.no_grad()
def test_branches_without_text_have_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Guidance(branches=(Branch(context="no_text", scale=2.0), Branch(context="no_image", scale=1.5)))
    s, d = system(), document("edit", 1)
    work = listened(s, d, Sampling(evaluations=1, guidance=chain), monkeypatch)
    words = len(s.spell(d.pieces[1])) + 2
    assert [len(c) for c in work.conditions] == [words + 4, 2, words + 4]  # four queries; an empty text is two marks
    assert [len(own) for own in work.references] == [1, 1, 0]
    nothing = listened(system(null="nothing"), d, Sampling(evaluations=1, guidance=chain), monkeypatch)
    assert len(nothing.conditions[1]) == 0


@torch.no_grad()
def test_dropped_texts_hide_the_plan_in_training() -> None:
    """Nothing of the true codes reaches the renderer, which has the same noise to work on."""
    for changes, alike in (({"drop_text": 1.0}, True), ({}, False), ({"condition": "text"}, True)):
        s = system(**changes)
        batch = s.collate([document("draw", 0)])
        sums = []
        for shift in (0, 1):
            found = [(c + shift) % 64 for c in s.picture_codes(batch.pictures)]
            kept = s.read_page(batch.page, [], torch.cat(found))[1]
            sums.append(s.further(batch, kept, torch.Generator().manual_seed(0))["flow"][1].sum())
        assert bool(torch.allclose(*sums, atol=1e-6)) == alike


@torch.no_grad()
def test_pictures_that_are_left_out_are_no_references() -> None:
    d = document("edit", 0)
    assert [len(system(drop_feature=share).collate([d]).references[0]) for share in (0.0, 1.0)] == [1, 0]
    story = system().collate([document("story", 0)])
    assert [len(own) for own in story.references] == list(range(len(story.codes)))  # each draws from those before


@torch.no_grad()
def test_counts_are_known_before_the_loss() -> None:
    s = system()
    batch = s.collate([document(task, i) for i, task in enumerate(TASKS)])
    losses = s.loss(batch, torch.Generator().manual_seed(0))
    assert batch.counts == {k: float(v) for k, v in losses.counts.items()} and batch.to("cpu").counts == batch.counts


# -- drawing -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_any_plan_can_be_rendered() -> None:
    s, d, sampling = system(), document("draw", 0), Sampling(evaluations=2)
    pictures = []
    for codes in (torch.zeros(64, dtype=torch.long), torch.arange(64), torch.arange(64)):
        reader = Reader()
        w = s.writer(reader)
        w.text(s.spell(d.pieces[0]))
        s.run([Read(reader, w)])
        noise = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
        program = s.render(codes, noise, (4, 4), {"full": reader}, sampling, torch.Generator(), 0, lambda event: None)
        pictures.append(s.finish({0: program})[0])  # type: ignore[dict-item]
    assert torch.equal(pictures[1], pictures[2]) and not torch.allclose(pictures[0], pictures[1], atol=1e-4)


@torch.no_grad()
def test_plans_have_a_guidance_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    s, d = system(), document("draw", 0)
    text = Guidance(branches=(Branch(context="no_text", scale=4.0),))
    greedy = TokenSampling(temperature=0.0)

    def conditions(**options: Any) -> Tensor:
        return listened(s, d, Sampling(evaluations=1, codes=greedy, **options), monkeypatch).conditions[0]

    alike = conditions(guidance=text)
    assert torch.equal(alike, conditions(guidance=text, plan_guidance=text))
    assert torch.equal(alike, conditions(plan_guidance=text))
    assert not torch.allclose(alike, conditions(guidance=text, plan_guidance=Guidance()), atol=1e-4)
    wrong = Guidance(branches=(Branch(context="no_sound", scale=2.0),))
    with pytest.raises(ValueError, match="branches out of no_text, no_image, got 'no_sound'"):
        conditions(plan_guidance=wrong)


def test_sampling_times_follow_the_size() -> None:
    s = system(sampling_shift="root")
    steps: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MammothModa2, "_run_denoises", lambda self, works: (
            steps.append(works[0].t), [[torch.zeros_like(w.x) for _ in w.conditions] for w in works])[1])
        s.generate([document("draw", 0)], Sampling(evaluations=4))
    m = 16**0.5 / 20
    assert steps == pytest.approx([t / (m - m * t + t) for t in (0.0, 0.25, 0.5, 0.75)])


# -- training ----------------------------------------------------------------------------------------------------------

def test_the_recipe_trains_all_but_the_ingredients() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "mammothmoda2.yaml")
    s = system()
    fixed = [n for n, p in s.named_parameters() if not p.requires_grad]
    first, second = (trained_names(s, stage, fixed) for stage in recipe.stages)
    own = {"embed", "trunk", "code_embed", "code_head", "generator", "conditions"}
    assert {n.partition(".")[0] for n in first} == own and {n.partition(".")[0] for n in second} == own | {"vision"}
    assert all(n.startswith(("codec.", "plan_codec.")) for n in fixed)
    s.zero_grad()
    losses = s.loss(s.collate([document("draw", 0)]), torch.Generator().manual_seed(0))
    losses.sums["flow"].backward()
    reached = {n.partition(".")[0] for n, p in s.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"trunk", "code_embed", "embed"} <= reached and "code_head" not in reached  # end to end
    s.zero_grad()


def test_configs_that_contradict_themselves_are_errors() -> None:
    tiny = MammothModa2.tiny()
    for changes, message in [
        ({"condition_layers": (-4,)}, r"condition_layers from -3 to -1, got \(-4,\)"),
        ({"code_rows": 64}, "at least 65 code_rows .*got spatial, 64 and 4"),
        ({"positions": "shared"}, "positions not shared"),
        ({"generator": dataclasses.replace(tiny.generator, token_width=20)}, r"\(24, 64, 64\) .*got \(20, 64, 64\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(tiny, **changes)
    with pytest.raises(ValueError, match="as many codes as plan_codec has, 64, got 60"):
        MammothModa2(dataclasses.replace(tiny, codes=60))
    with pytest.raises(ValueError, match="layers from 0 to 2 in order, got 1 and 3"):
        MammothModa2(dataclasses.replace(tiny, expert_layers=(1, 3)))
