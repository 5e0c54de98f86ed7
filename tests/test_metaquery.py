"""MetaQuery: published outputs, what the language model is spared, states of both kinds, edits under two scales."""
import dataclasses
import json
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from filling import filled
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.adapters import metaquery, parity
from diptych.adapters.keys import to_theirs
from diptych.document import Document
from diptych.objectives import flow
from diptych.parts.deep_codec import DeepCodec, DeepCodecConfig
from diptych.parts.serial import ConnectorConfig
from diptych.parts.windows import WindowConfig, WindowTower
from diptych.systems.base import Sampling
from diptych.systems.metaquery import MetaQuery
from diptych.systems.works import Denoise
from diptych.training.recipe import load_recipe
from diptych.training.stages import trained_names
from diptych.world.tasks import document

GOLDEN = Path(__file__).parent / "goldens" / "metaquery"


@cache
def system(**changes: Any) -> MetaQuery:
    """Tiny, with everything that starts at zero filled in."""
    torch.manual_seed(0)
    return filled(MetaQuery(dataclasses.replace(MetaQuery.tiny(), **changes)).eval())


# -- published outputs -------------------------------------------------------------------------------------------------

def test_all_published_outputs_are_reproduced() -> None:
    cases = parity.run("metaquery", GOLDEN)
    assert all(c.passed and c.tolerance <= 2e-4 for c in cases), parity.table(cases)
    stored = {k.replace(".output.", ".") for k in load_file(GOLDEN / "golden.safetensors") if ".output." in k}
    assert {c.name for c in cases} == stored and len(stored) == 28
    assert max(c.absolute for c in cases) < 5e-5


def other_sizes(folder: Path) -> MetaQuery:
    """A folder in the published layout with other numbers everywhere, and the model in it."""
    about = json.loads((GOLDEN / "config.json").read_text())
    about["metaquery"] |= {"num_metaqueries": 3, "connector_num_hidden_layers": 1, "first_query_token_id": 150,
                           "boi_token_id": 149}
    about["qwen2_5_vl"] |= {"num_hidden_layers": 1, "intermediate_size": 40, "vocab_size": 153}
    about["qwen2_5_vl"]["vision_config"] |= {"depth": 3, "window_size": 112, "fullatt_block_indexes": [0, 2]}
    about["transformer"] |= {"num_layers": 1, "patch_size": 2, "mlp_ratio": 1.5, "attention_head_dim": 24,
                             "num_attention_heads": 2}
    about["vae"] |= {"downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle",
                     "encoder_layers_per_block": [1, 2, 1], "decoder_layers_per_block": [2, 1, 1],
                     "encoder_qkv_multiscales": [[], [], []], "decoder_qkv_multiscales": [[], [3, 5], [5]],
                     "decoder_block_types": ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"]}
    torch.manual_seed(0)
    model = MetaQuery(metaquery.config_of(about))
    with torch.no_grad():
        model.embed.weight[metaquery.query_rows(about)] = model.queries
    theirs = to_theirs(model.state_dict(), metaquery.rules(model.config))
    del theirs["queries"]
    save_file({k: v.contiguous() for k, v in theirs.items()}, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(about))
    return model


@torch.no_grad()
def test_every_published_tensor_has_one_home(tmp_path: Path) -> None:
    model = other_sizes(tmp_path)
    again = metaquery.load(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    published = load_file(GOLDEN / "weights.safetensors")
    loaded = metaquery.load(GOLDEN)
    back = to_theirs(loaded.state_dict(), metaquery.rules(loaded.config))
    del back["queries"]
    assert set(back) == set(published) and all(torch.equal(published[k], v) for k, v in back.items())
    pixels = torch.randn(1, 3, 24, 16)
    assert again.decode(torch.stack(again.encode(list(pixels))), again.grid(pixels[0])).shape == pixels.shape


@pytest.mark.parametrize("name, broken", [
    ("model.connector.0.layers.1.self_attn.k_norm.gamma", {"connector.encoder", "condition_text.condition"}),
    ("model.transformer.transformer_blocks.1.attn2.to_v.bias", {"dit.velocity", "flow_loss.loss"}),
    ("model.mllm_backbone.visual.blocks.0.attn.qkv.weight",
     {"condition_image.image_embeds", "sample_edit_3way.latents"}),
])
def test_one_wrong_weight_fails(name: str, broken: set[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "metaquery"))
    tensors = load_file(folder / "weights.safetensors")
    tensors[name] = tensors[name] + 0.3 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "weights.safetensors")
    failed = {c.name for c in parity.run("metaquery", folder) if not c.passed}
    assert broken <= failed and not failed & {"vae.latents", "condition_image.position_ids", "sample_t2i.sigmas"}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    about = json.loads((GOLDEN / "config.json").read_text())
    for group, key, value in (("metaquery", "loss_type", "diffusion"), ("scheduler", "solver_order", 3)):
        with pytest.raises(ValueError, match=f"expected {group}.{key} to be .*got {value!r}"):
            metaquery.config_of(about | {group: about[group] | {key: value}})
    other_sizes(tmp_path)
    tensors = load_file(tmp_path / "weights.safetensors")
    del tensors["model.connector.4.weight"]
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"published MetaQuery layout .* 1 missing \(model.connector.4.weight\)"):
        metaquery.load(tmp_path)


# -- the language model ------------------------------------------------------------------------------------------------

def test_only_what_the_recipe_leaves_free_learns() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "metaquery.yaml")
    assert recipe.system == "metaquery" and [s.name for s in recipe.stages] == ["pretrain", "instruct"]
    s = system()
    free = trained_names(s, recipe.stages[0], [n for n, p in s.named_parameters() if not p.requires_grad])
    assert {n.partition(".")[0] for n in free} == {"queries", "connector_out", "generator"}
    s.zero_grad()
    s.loss(s.collate([document("draw", 0), document("edit", 0)]), torch.Generator()).total().backward()
    for name in ("queries", "connector_out.project.0.weight", "generator.input.weight"):
        grad = s.get_parameter(name).grad
        assert grad is not None and grad.any()
    s.zero_grad()


def test_answers_never_see_queries() -> None:
    """A text behind a drawn picture is said as by the language model alone."""
    s, story = system(), document("story", 0)
    before = s.score([story]).values[0]
    kept = s.queries.data.clone()
    s.queries.data.add_(1.0)
    after = s.score([story]).values[0]
    s.queries.data.copy_(kept)
    assert torch.equal(before, after)


# -- states ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"exports": "context", "queries": 0}], ids=["queries", "context"])
@torch.no_grad()
def test_training_and_drawing_condition_alike(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    s, d = system(**changes), document("edit", 1)
    batch = s.lay_out([s.write(d)])
    trained, _ = s.conditions(s.hidden(batch), batch.page)
    seen: list[Tensor] = []
    run = MetaQuery._run_denoises

    def listen(self: MetaQuery, works: list[Denoise]) -> list[list[Tensor]]:
        seen.append(works[0].conditions[0])
        return run(self, works)

    monkeypatch.setattr(MetaQuery, "_run_denoises", listen)
    s.generate([d], Sampling(evaluations=1))
    torch.testing.assert_close(seen[0], trained[0], atol=1e-5, rtol=1e-4)
    if changes:
        tokens = sum(len(w.ids) for w in [s.write(Document(d.pieces[:-1]))[0]])
        assert len(trained[0]) == tokens + 1  # the context, and the opening


def test_the_context_as_condition_learns_and_knows_what_it_reads() -> None:
    s = system(exports="context", queries=0)
    one, two = (document("draw", i) for i in (0, 1))
    batch = s.collate([one, two])
    losses = s.loss(batch, torch.Generator().manual_seed(0))
    assert losses.counts["image"] == batch.counts["image"] == 2
    losses.total().backward()
    assert s.embed.weight.grad is not None and s.embed.weight.grad.any()
    s.zero_grad()
    pictures = s.generate([one, two], Sampling(evaluations=2))
    alone = s.generate([two], Sampling(evaluations=2))[0]
    assert torch.allclose(*(torch.from_numpy(d.pieces[1].pixels) for d in (pictures[1], alone)), atol=1e-4)  # type: ignore
    with pytest.raises(ValueError, match="queries exactly where they are exported"):
        dataclasses.replace(MetaQuery.tiny(), exports="context")


def test_two_scales_are_one_chain() -> None:
    null, text, full = (torch.randn(3) for _ in range(3))
    chain = metaquery.guidance(3.0, 1.5)
    v = chain.combine(full, {"full": full, "no_text": text, "no_image": null}, 0.5)
    torch.testing.assert_close(v, null + 1.5 * (text - null) + 3.0 * (full - text))
    plain = metaquery.guidance(3.0, 1.0)
    torch.testing.assert_close(plain.combine(full, {"no_text": text}, 0.5), text + 3.0 * (full - text))


def test_levels_are_told_in_whole_steps() -> None:
    released, exact = system(whole_steps=True), system()
    assert released.level(0.25) == 0.25 and released.level(0.1) == pytest.approx(0.1)
    assert released.level(0.12345) == pytest.approx(0.124)  # 876.55 of 1000 becomes 876
    assert exact.level(0.12345) == 0.12345


def test_second_order_steps_land_closer() -> None:
    """On data N(2, 0.5^2), whose path is known: x_1 = 2 + 0.5 x_0."""
    def velocity(x: Tensor, t: float) -> Tensor:
        return 2 + (t / 4 - (1 - t)) / ((1 - t) ** 2 + t**2 / 4) * (x - 2 * t)

    errors = []
    for solver in ("euler", "multistep"):
        x, before, times = torch.tensor([[1.0], [-2.0]], dtype=torch.float64), None, flow.schedule(12, 2.0, 0.001)
        for t, to in pairwise(times):
            v = velocity(x, t)
            if solver == "euler":
                x = flow.euler_step(x, v, t, to)
            else:
                x, before = flow.second_order_step(x, v, t, to, before), (t, x + (1 - t) * v)
        errors.append((x - torch.tensor([[2.5], [1.0]])).abs().max().item())
    assert errors[1] < 0.4 * errors[0] and times[0] == pytest.approx(0.0005, rel=1e-2)


def test_a_grid_of_times_holds_noise_and_no_data() -> None:
    u = torch.tensor([0.0, 0.00099, 0.001, 0.5, 0.9999])
    torch.testing.assert_close(flow.grid_time(u, 1000), torch.tensor([0.0, 0.0, 0.001, 0.5, 0.999]))
    times = flow.sample_time(1000, torch.Generator().manual_seed(0), steps=10)
    assert len(times.unique()) == 10 and times.max() < 0.95


# -- parts -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_windows_hide_what_is_far() -> None:
    torch.manual_seed(0)
    c = WindowConfig(width=16, hidden=24, layers=2, heads=2, patch=4, window=16, full=(), out_width=8)
    tower, picture = WindowTower(c), torch.rand(3, 16, 32) * 2 - 1
    other = picture.clone()
    other[:, :, 16:] = 0
    changed = (tower.see([picture]) - tower.see([other])).abs().amax(-1).view(2, 4) > 1e-6
    assert changed.tolist() == [[False, False, True, True]] * 2
    joined = WindowTower(dataclasses.replace(c, full=(1,)))
    assert ((joined.see([picture]) - joined.see([other])).abs().amax(-1) > 1e-7).all()
    both = tower.see([picture, other])
    torch.testing.assert_close(both, torch.cat([tower.see([picture]), tower.see([other])]))
    with pytest.raises(ValueError, match="multiples of 8, got 12 x 32"):
        tower.see([picture[:, :12]])


@pytest.mark.parametrize("rearrange", [False, True])
@torch.no_grad()
def test_the_deep_codec_works_with_both_ways_of_resizing(rearrange: bool) -> None:
    c = DeepCodecConfig(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1), encoder_scales=(None, (3,)),
                        decoder_scales=(None, (3,)), latent_channels=4, head_dim=4, rearrange_down=rearrange,
                        rearrange_up=rearrange, scale=0.5)
    codec = DeepCodec(c)
    pixels = torch.randn(2, 3, 6, 8)
    latent = codec.latent(pixels)
    assert latent.shape == (2, 4, 3, 4) and codec.decode(latent).shape == pixels.shape and c.downsample == 2
    torch.testing.assert_close(codec.latent(pixels[:1]), latent[:1])
    with pytest.raises(ValueError, match="multiples of 2"):
        codec.latent(pixels[:, :, 1:])
    with pytest.raises(ValueError, match="encoder_blocks for 2 levels, got 1"):
        dataclasses.replace(c, encoder_blocks=(1,))


def test_configs_that_contradict_themselves_are_errors() -> None:
    with pytest.raises(ValueError, match="generator.token_width to be 24"):
        dataclasses.replace(MetaQuery.tiny(), generator=dataclasses.replace(MetaQuery.tiny().generator, token_width=23))
    with pytest.raises(ValueError, match="even head_dim"):
        ConnectorConfig(head_dim=3)
