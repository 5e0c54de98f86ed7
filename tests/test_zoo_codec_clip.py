import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diptych import zoo
from diptych.benchmarks.reconstruction import psnr, to_float
from diptych.parts.vae import AutoEncoder
from diptych.parts.vision import patchify, unpatchify
from diptych.training.optim import orthogonalize
from diptych.world.render import masks, render_uint8
from diptych.world.scene import COLORS, SHAPES, Object, Scene
from diptych.zoo import build
from diptych.zoo.clip import Clip, ClipModel, covered, pairs, patch_labels, probe, retrieval, wording, wrong
from diptych.zoo.codec import agreement, pictures, reconstruct
from diptych.zoo.tokenizer import LOCATION_TOKENS, SPECIAL, Tokenizer, default, train, world_text


class Line(build.Ingredient):
    """Fits a noisy linear map: the smallest ingredient that uses every part of the loop."""

    name = "line"
    defaults = build.Recipe(steps=60, batch=16, learning_rate=0.1, warmup=5, average=0.8, checkpoint_every=10)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))

    def matrices(self, model: nn.Module) -> list[str]:
        return ["1.weight"]

    def loss(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        x = torch.randn(self.recipe.batch, 4, generator=self.generator("x", step))
        return {"loss": (model(x).float() - x[:, :2] * 2).square().mean()}

    def config(self, model: nn.Module) -> dict[str, Any]:
        return {}

    @staticmethod
    def restore(config: dict[str, Any]) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))

    def measure(self, model: nn.Module) -> dict[str, float]:
        x = torch.randn(256, 4, generator=self.generator("test"))
        return {"error": float((model(x) - x[:, :2] * 2).square().mean())}

    def card(self, cost: Any, figures: Any) -> str:
        return f"error {figures['error']:.4f}, {cost['parameters']} parameters\n"


@pytest.fixture(scope="module")
def codec() -> AutoEncoder:
    return zoo.load("codec")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return zoo.load("tokenizer")


# -- names and the loop -----------------------------------------------------------------------------------------------

def test_unknown_name_names_the_nearest() -> None:
    for call in (zoo.load, zoo.path, build.build):
        with pytest.raises(ValueError, match="did you mean 'codec'"):
            call("codecs")
    assert {"codec", "clip", "tokenizer"} <= set(zoo.names())


def test_missing_weights_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="diptych zoo build codec"):
        zoo.load("codec", tmp_path)


@pytest.fixture()
def line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.INGREDIENTS, "line", f"{__name__}:Line")
    monkeypatch.setattr(zoo, "find", lambda name: Line)


def test_build_writes_weights_config_and_card(line: None, tmp_path: Path) -> None:
    file = build.build("line", tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["line.json", "line.md", "line.safetensors"]
    assert json.loads((tmp_path / "line.json").read_text())["format"] == zoo.FORMAT
    model = zoo.load("line", tmp_path)
    error = Line().measure(model)["error"]
    assert file.with_suffix(".md").read_text() == f"error {error:.4f}, 58 parameters\n"
    assert error < 0.05
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_resumed_build_makes_the_same_weights(line: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build.build("line", tmp_path / "whole", progress=False).read_bytes()
    loss = Line.loss

    def killed(self: Line, model: nn.Module, step: int) -> dict[str, Tensor]:
        if step == 37:
            raise KeyboardInterrupt
        return loss(self, model, step)

    monkeypatch.setattr(Line, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        build.build("line", tmp_path / "parts", progress=False)
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["line.checkpoint"]
    steps = []
    monkeypatch.setattr(Line, "loss", lambda self, model, step: steps.append(step) or loss(self, model, step))
    assert build.build("line", tmp_path / "parts", progress=False).read_bytes() == whole
    assert steps == list(range(30, 60))


def test_a_checkpoint_of_another_recipe_is_refused(line: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build.build("line", tmp_path, steps=20, progress=False)
    with pytest.raises(ValueError, match="of this recipe and seed"):
        build.build("line", tmp_path, steps=30, progress=False)


def test_loading_leaves_the_random_state_alone(codec: AutoEncoder) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    zoo.load("codec")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (16, 16)])
def test_orthogonalize_flattens_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, *shape)))
    assert values.min() > 0.3 and values.max() < 1.4


# -- codec ------------------------------------------------------------------------------------------------------------

def test_codec_redraws_held_out_pictures(codec: AutoEncoder) -> None:
    for split in ("test", "pairs"):
        images = pictures(32, seed=99, wide=0, split=split)
        redrawn = reconstruct(codec, images)
        assert psnr(images, redrawn).mean() > 32
        assert agreement(images, redrawn) >= (0.95, 0.95)
    images = pictures(32, seed=99, wide=1, split="test")
    assert psnr(images, reconstruct(codec, images)).mean() > 29


def test_codec_latents_are_normal_per_channel(codec: AutoEncoder) -> None:
    latent = codec.latent(to_float(pictures(256, seed=98)))
    assert latent.shape == (256, 6, 8, 8)
    assert latent.mean((0, 2, 3)).abs().max() < 0.1
    assert (latent.std((0, 2, 3)) - 1).abs().max() < 0.1


@pytest.mark.parametrize(("patch", "tokens", "width"), [(1, 64, 6), (2, 16, 24)])
def test_codec_as_64_and_as_16_tokens(codec: AutoEncoder, patch: int, tokens: int, width: int) -> None:
    images = to_float(pictures(4, seed=97))
    latent = codec.latent(images)
    sequence = patchify(latent, patch)
    assert sequence.shape == (4, tokens, width)
    side = 8 // patch
    back = codec.decode(unpatchify(sequence, patch, (side, side)))
    assert torch.equal(back, codec.decode(latent))


def test_codec_forgives_small_errors_in_latents(codec: AutoEncoder) -> None:
    """What a generator draws is never exact: noise of a tenth of the latents' deviation costs little."""
    images = pictures(32, seed=96, wide=0, split="test")
    latent = codec.latent(to_float(images))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    noisy = ((codec.decode(latent + 0.1 * noise).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert psnr(images, noisy).mean() > 28


def test_agreement_notices_a_changed_object() -> None:
    star = Object(id=0, shape="star", color="blue", size="large", radius=480, x=1200, y=1200)
    scene = Scene(objects=(star, star.replace(id=1, shape="circle", x=2900, y=2800)))
    a = torch.from_numpy(render_uint8(scene, 64).transpose(2, 0, 1))[None]
    assert agreement(a, a) == (1.0, 1.0)
    for change in ({"color": "red"}, {"shape": "square"}, {"x": 1200 + 400}):
        other = scene.replace(objects=(star.replace(**change), scene.objects[1]))
        b = torch.from_numpy(render_uint8(other, 64).transpose(2, 0, 1))[None]
        assert agreement(a, b)[0] == 0.0


# -- tokenizer --------------------------------------------------------------------------------------------------------

@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_normalised_text_survives(text: str) -> None:
    ids = default().encode(text)
    assert default().encode(default().decode(ids)) == ids


def test_every_word_of_the_world_is_one_token(tokenizer: Tokenizer) -> None:
    words = {w for text in world_text(3) for w in text.split()} | set(SHAPES) | set(COLORS)
    assert [w for w in sorted(words) if len(tokenizer.encode(w)) != 1] == []
    assert len(tokenizer.encode("a large red circle")) == 4


def test_special_tokens_are_not_read_from_text(tokenizer: Tokenizer) -> None:
    ids = {tokenizer.id(t) for t in (*SPECIAL, *LOCATION_TOKENS)}
    assert len(ids) == 69
    text = "<|im_end|> and <loc_3>"
    assert not ids & set(tokenizer.encode(text))
    said = [tokenizer.id("<|im_start|>"), *tokenizer.encode("yes"), tokenizer.id("<|im_end|>")]
    assert tokenizer.decode(said) == "yes"
    with pytest.raises(ValueError, match="did you mean '<|im_end|>'"):
        tokenizer.id("<im_end>")


def test_locations_are_bins_of_the_unit_interval(tokenizer: Tokenizer) -> None:
    assert tokenizer.location(0) == tokenizer.id("<loc_0>") and tokenizer.location(1) == tokenizer.id("<loc_63>")
    for value in (0.0, 0.33, 0.5, 0.999):
        back = tokenizer.coordinate(tokenizer.location(value))
        assert back is not None and abs(back - value) <= 0.5 / 64
    assert tokenizer.coordinate(tokenizer.encode("red")[0]) is None


def test_training_a_tokenizer_is_deterministic(tmp_path: Path) -> None:
    texts = ["a red circle", "a blue square and a red star"] * 5
    a, b = train(texts, 400), train(texts, 400)
    assert a.backend.to_str() == b.backend.to_str()
    a.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("a red star") == b.encode("a red star")


# -- clip -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def clip() -> ClipModel:
    return zoo.load("clip")


def test_clip_finds_captions_of_held_out_pictures(clip: ClipModel) -> None:
    images, texts, _ = pairs(128, seed=99, split="test")
    assert retrieval(clip, images, texts) > 0.9
    assert wording(clip, images, texts, torch.Generator().manual_seed(0)) > 0.7  # half is chance


def test_clip_features_name_what_a_patch_shows(clip: ClipModel) -> None:
    assert clip.features(to_float(pictures(2))).shape == (2, 64, 128)
    found = probe(clip.features, seed=98, train=96, test=32)
    assert found["color"] > 0.9 and found["shape"] > 0.7 and found["size"] > 0.8 and found["count"] > 0.35


def test_clip_vectors_are_unit_and_do_not_depend_on_the_batch(clip: ClipModel) -> None:
    texts = ["a large red circle at the top , on a white background", "a blue star"]
    both = clip.encode_text(texts)
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(both[1:], clip.encode_text(texts[1:]), atol=1e-5, rtol=1e-4)
    images = to_float(pictures(3))
    torch.testing.assert_close(clip.encode_image(images)[1:2], clip.encode_image(images[1:2]), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="at most 96 tokens"):
        clip.encode_text(["red " * 100])
    assert clip.encode_text([""]).isfinite().all()


def test_patch_labels_say_what_is_where() -> None:
    star = Object(id=4, shape="star", color="blue", size="large", radius=480, x=1200, y=2800)
    labels = patch_labels(Scene(objects=(star,), background="gray")).reshape(8, 8, 5)
    row, column = 2800 * 8 // 4096, 1200 * 8 // 4096
    assert labels[row, column].tolist() == [list(COLORS).index("blue") + 1, SHAPES.index("star") + 1, 3, 1, 2]
    assert labels[..., 3].sum() == 1 and (labels[..., 4] == 2).all()
    assert labels[0, 7].tolist() == [0, 0, 0, 0, 2]


def test_covered_pixels_are_those_of_the_objects() -> None:
    star = Object(id=4, shape="star", color="purple", size="large", radius=480, x=1200, y=2800)
    scene = Scene(objects=(star,), background="gray")
    image = torch.from_numpy(render_uint8(scene, 64).transpose(2, 0, 1).copy())[None]
    pixels = unpatchify(covered(image, torch.tensor([2])), 8, (8, 8))[0, 0]
    assert (pixels.numpy() >= masks(scene, 64)[4]).all() and pixels.sum() < 1.5 * masks(scene, 64)[4].sum()


def test_wrong_captions_change_one_thing() -> None:
    generator = torch.Generator().manual_seed(0)
    text = "a large {} circle at the top left , a medium {} star at the right , on a white background"
    row = default().encode(text.format("red", "blue"))
    changed = [wrong(row, generator) for _ in range(60)]
    assert all(len(w) == len(row) and w != row for w in changed)
    differences = {sum(a != b for a, b in zip(row, w, strict=True)) for w in changed}
    assert differences == {1, 2}
    exchanged = default().decode(next(w for w in changed if sum(a != b for a, b in zip(row, w, strict=True)) == 2))
    assert exchanged == text.format("blue", "red")


def test_clip_step_reaches_every_parameter() -> None:
    recipe = Clip(steps=1)
    recipe.recipe = dataclasses.replace(recipe.recipe, batch=8)
    recipe.prepare()
    model = recipe.model()
    recipe.loss(model, 0)["loss"].backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-8}
    assert not {n for n in still if not n.endswith("k_proj.bias")}, "a bias of all keys cancels in the softmax"


def test_all_weights_are_small_enough() -> None:
    assert zoo.path("codec").stat().st_size <= 2.5e6
    assert zoo.path("clip").stat().st_size <= 4e6
