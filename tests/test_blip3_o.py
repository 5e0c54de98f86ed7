"""BLIP3-o: published outputs, conditions of zeros, features and their decoder, sequential training."""
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

from diptych.adapters import blip3_o, parity
from diptych.adapters.keys import to_theirs
from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.feature_codec import FeatureCodec, FeatureCodecConfig
from diptych.parts.towers import TowerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.base import Sampling
from diptych.systems.blip3_o import CLIP_MEAN, CLIP_STD, Blip3o
from diptych.training.recipe import load_recipe
from diptych.training.stages import trained_names
from diptych.world.tasks import document

GOLDEN = Path(__file__).parent / "goldens" / "blip3-o"


@cache
def system(**changes: Any) -> Blip3o:
    """Tiny, with everything that starts at zero filled in."""
    torch.manual_seed(0)
    return filled(Blip3o(dataclasses.replace(Blip3o.tiny(), **changes)).eval())


# -- published outputs -------------------------------------------------------------------------------------------------

def test_all_published_outputs_are_reproduced() -> None:
    cases = parity.run("blip3-o", GOLDEN)
    assert all(c.passed and c.tolerance <= 2e-4 for c in cases), parity.table(cases)
    stored = {k.replace(".output.", ".") for k in load_file(GOLDEN / "golden.safetensors") if ".output." in k}
    assert {c.name for c in cases} == stored and len(stored) == 36
    assert max(c.absolute for c in cases) < 7e-5  # of timesteps up to 1000


def other_sizes(folder: Path) -> Blip3o:
    """A folder in the published layout with other numbers everywhere, and the model in it."""
    about = json.loads((GOLDEN / "config.json").read_text())
    about |= {"n_query": 5, "gen_pooling": "early_pool2d_4", "num_hidden_layers": 1, "tie_word_embeddings": True}
    about["dit"] |= {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "in_channels": 36, "multiple_of": 8}
    about["gen_vision_cfg"] |= {"width": 36, "layers": 1, "image_size": 48}
    del about["dit_ffn_inner"]
    torch.manual_seed(0)
    model = Blip3o(blip3_o.config_of(about))
    theirs = to_theirs(model.state_dict(), blip3_o.rules(model.config))
    save_file({k: v.contiguous() for k, v in theirs.items()}, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(about))
    return model


def test_every_published_tensor_has_one_home(tmp_path: Path) -> None:
    model = other_sizes(tmp_path)
    again = blip3_o.load(tmp_path)
    assert again.config == model.config and model.config.generator.hidden == 88  # 85 rounded up to eights
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    published, loaded = load_file(GOLDEN / "weights.safetensors"), blip3_o.load(GOLDEN)
    back = to_theirs(loaded.state_dict(), blip3_o.rules(loaded.config))
    assert set(back) == set(published) and all(torch.equal(published[k], v) for k, v in back.items())
    features = torch.stack(again.encode([torch.zeros(3, 48, 48)]))
    assert features.shape == (1, 9, 36)
    with pytest.raises(ValueError, match="a codec with a decoder to show features"):
        again.decode(features, (3, 3))


@pytest.mark.parametrize("name, broken", [
    ("model.dit.model.layers.1.attn2.norm_k.weight", {"dit.velocity", "sample_images.latents"}),
    ("model.latent_queries", {"flow_loss.condition", "generate_text.features"}),
    ("visual.merger.mlp.2.weight", {"flow_loss_image.condition", "generate_image.features"}),
])
def test_one_wrong_weight_fails(name: str, broken: set[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "blip3-o"))
    tensors = load_file(folder / "weights.safetensors")
    tensors[name] = tensors[name] + 0.3 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "weights.safetensors")
    failed = {c.name for c in parity.run("blip3-o", folder) if not c.passed}
    assert broken <= failed and not failed & {"eva.pooled", "flow_loss.noisy", "sample_images.sigmas"}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    about = json.loads((GOLDEN / "config.json").read_text())
    for group, key, value in (("dit", "learn_sigma", True), ("gen_vision_cfg", "postnorm", False)):
        with pytest.raises(ValueError, match=f"expected {group}.{key} to be .*got {value!r}"):
            blip3_o.config_of(about | {group: about[group] | {key: value}})
    other_sizes(tmp_path)
    tensors = load_file(tmp_path / "weights.safetensors")
    del tensors["model.latent_queries"]
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"published layout of Blip3o .* 1 missing \(model.latent_queries\)"):
        blip3_o.load(tmp_path)


# -- conditions --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_dropped_conditions_are_zeros() -> None:
    """All of them dropped, the prompt says nothing; none, it does. Texts are never left out."""
    one, two = document("draw", 0), document("draw", 1)
    two = dataclasses.replace(two, pieces=(two.pieces[0], one.pieces[1]))
    for share, alike in ((1.0, True), (0.0, False)):
        s = system(drop_condition=share)
        sums = [s.loss(s.collate([d]), torch.Generator().manual_seed(0)).sums["image"] for d in (one, two)]
        assert bool(torch.equal(*sums)) == alike
    assert system().drop_rates()[0] == 0.0


@torch.no_grad()
def test_guidance_is_against_zeros() -> None:
    """Without the full branch, prompts do not matter."""
    s = system(drop_condition=0.0)
    zero = Sampling(evaluations=2, guidance=Guidance(branches=(Branch(context="no_text", scale=0.0),)))
    pictures = [torch.from_numpy(s.generate([document("draw", i)], zero)[0].pieces[1].pixels)  # type: ignore[attr-defined]
                for i in (0, 1)]
    torch.testing.assert_close(*pictures)
    full = [torch.from_numpy(s.generate([document("draw", i)], Sampling(evaluations=2))[0].pieces[1].pixels)  # type: ignore[attr-defined]
            for i in (0, 1)]
    assert not torch.allclose(*full, atol=1e-4)


@torch.no_grad()
def test_regression_says_features_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of zeros at time 0, whatever the seed and however often; its loss is the squared error of what is drawn."""
    s, d = system(objective="regression", drop_condition=0.0), document("draw", 0)
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward, decode, drawn = s.generator.forward, s.decode, list[torch.Tensor]()
    monkeypatch.setattr(s.generator, "forward", lambda x, t, *rest: (asked.append((x, t)), forward(x, t, *rest))[1])
    monkeypatch.setattr(s, "decode", lambda x, grid: (drawn.append(x), decode(x, grid))[1])
    errors = [s.loss(s.collate([d]), torch.Generator().manual_seed(seed)).mean()["image"] for seed in (0, 1)]
    made = s.generate([d, d], Sampling(evaluations=9), seeds=[0, 1])
    assert [len(x) for x, _ in asked] == [1, 1, 2] and not any(x.any() or t.any() for x, t in asked)
    torch.testing.assert_close(drawn[0][0], drawn[0][1])
    assert (made[0].pieces[1].pixels == made[1].pieces[1].pixels).all()  # type: ignore[attr-defined]
    true = s.encode([torch.from_numpy(d.pieces[1].pixels)])[0]  # type: ignore[attr-defined]
    torch.testing.assert_close(errors[0], (drawn[0][0] - true).square().mean())
    assert errors[0] == errors[1]


# -- features ----------------------------------------------------------------------------------------------------------

def test_the_decoder_learns_alone() -> None:
    """From true features, whatever the flow says; its error reaches nothing else."""
    s = system(drop_condition=0.0)
    s.zero_grad()
    losses = s.loss(s.collate([document("draw", 0)]), torch.Generator().manual_seed(0))
    assert losses.counts["pixels"] == 3 * 64 * 64
    losses.sums["pixels"].backward()
    reached = {n for n, p in s.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached and all(n.startswith("codec.decoder.") for n in reached)
    s.zero_grad()
    still = system(drop_condition=0.0, pixel_weight=0.0)
    assert not any(p.requires_grad for p in still.codec.parameters())
    assert "pixels" not in still.loss(still.collate([document("draw", 0)]), torch.Generator()).sums


@torch.no_grad()
def test_features_are_pooled_and_scaled() -> None:
    torch.manual_seed(0)
    c = FeatureCodecConfig(
        tower=TowerConfig(width=8, mlp_width=16, layers=2, heads=2, patch=4, side=4, class_token=True,
                          norm_behind=True, gelu="exact"),
        pool=2, mean=CLIP_MEAN, std=CLIP_STD, scale=0.5,
        decoder=PyramidConfig(channels=8, channel_mult=(1, 1), blocks=(1, 1), attention=(), mid_attention=False,
                              norm_groups=4))
    codec, pixels = FeatureCodec(c), torch.rand(2, 3, 16, 16) * 2 - 1
    cells = codec.features(pixels)
    assert cells.shape == (2, 8, 4, 4) and c.downsample == 8
    expected = cells.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)) / 2
    torch.testing.assert_close(codec.latent(pixels), expected)
    assert codec.decode(expected).shape == pixels.shape
    mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    grey = codec.features((2 * mean - 1).expand(1, 3, 16, 16).contiguous())  # which the tower sees as zeros
    torch.testing.assert_close(grey, codec.tower(torch.zeros(1, 3, 16, 16)))
    with pytest.raises(ValueError, match="multiples of 8"):
        codec.latent(pixels[:, :, 4:])
    with pytest.raises(ValueError, match="enlarges by a divisor of 8, got 16"):
        dataclasses.replace(c, decoder=PyramidConfig(channels=8, norm_groups=4))


# -- training ----------------------------------------------------------------------------------------------------------

def test_the_recipe_trains_one_after_the_other() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "blip3-o.yaml")
    assert recipe.system == "blip3-o" and [s.name for s in recipe.stages] == ["pretrain", "tune"]
    s = system(drop_condition=0.0)
    fixed = [n for n, p in s.named_parameters() if not p.requires_grad]
    first, second = (trained_names(s, stage, fixed) for stage in recipe.stages)
    assert {n.partition(".")[0] for n in first} == {"queries", "generator", "codec"}
    assert {n.partition(".")[0] for n in second} == {"queries", "generator"}
    batch = s.collate([document("draw", 0)])
    assert batch.counts is None  # pixels are counted by the loss
