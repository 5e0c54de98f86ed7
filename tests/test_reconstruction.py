import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pil
from torch import Tensor, nn

from diptych.benchmarks import reconstruction as r
from diptych.parts.quantize import CodebookConfig, VectorConfig
from diptych.parts.vae import AutoEncoder, AutoEncoderConfig
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.detokenizer import SemanticCodes
from diptych.systems.semantic_codec import SemanticCodec
from diptych.world.scene import WORLDS


def images(count: int = 4, side: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed),
                         dtype=torch.uint8)


def first_numbers(pixels: Tensor) -> Tensor:
    return pixels.flatten(1)[:, :4]


def tokenizer() -> VQTokenizer:
    side = PyramidConfig(channels=8, channel_mult=(1,), blocks=(1,), attention=(), norm_groups=4)
    torch.manual_seed(0)
    return VQTokenizer(VQTokenizerConfig(encoder=side, decoder=side, latent_channels=8, patch=8, quantizer=VectorConfig(
        codebook=CodebookConfig(values=16, width=4)))).eval()


def test_ssim_is_the_formula_at_every_window() -> None:
    a, b = images(1, 13), images(1, 13, seed=1)
    places = np.arange(11) - 5
    line = np.exp(-(places**2) / (2 * 1.5**2))
    weight = np.outer(line, line) / line.sum() ** 2
    scores = []
    for channel in range(3):
        for y in range(3):
            for x in range(3):
                p, q = (i[0, channel, y:y + 11, x:x + 11].double().numpy() for i in (a, b))
                mp, mq = (weight * p).sum(), (weight * q).sum()
                vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
                cov = (weight * (p - mp) * (q - mq)).sum()
                c1, c2 = 6.5025, 58.5225
                scores.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert float(r.ssim(a, b)) == pytest.approx(np.mean(scores), abs=1e-10)
    assert r.ssim(a, a).tolist() == pytest.approx([1.0])
    with pytest.raises(ValueError, match="at least 11 px"):
        r.ssim(images(1, 8), images(1, 8))


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 12, 12, dtype=torch.uint8)
    b = a.clone()
    b[1] += 16
    assert r.psnr(a, b).tolist() == pytest.approx([10 * math.log10(255**2 / 1e-3), 20 * math.log10(255 / 16)])


def test_frechet_distance_of_known_gaussians() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 2, generator=g)
    assert r.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert r.frechet_distance(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(25, rel=1e-6), "means alone"
    scaled = x * torch.tensor([2.0, 5.0])
    assert r.frechet_distance(x, scaled) == pytest.approx(1**2 + 4**2, rel=0.02), "(s - t)^2 per axis"
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert r.frechet_distance(x @ turn, scaled @ turn) == pytest.approx(r.frechet_distance(x, scaled), rel=1e-6)
    with pytest.raises(ValueError, match="at least 2 vectors"):
        r.frechet_distance(x[:1], x)


def test_codes_are_counted_and_continuous_latents_have_none() -> None:
    found = r.measure(tokenizer(), images(), features=first_numbers)
    codes = tokenizer().encode(r.to_float(images()))
    assert found["code use"].value == len(codes.unique()) / 16
    assert {"psnr", "ssim", "rfid", "code use", "perplexity"} == set(found)
    codec = AutoEncoder(AutoEncoderConfig(channels=8, channel_mult=(1,), num_res_blocks=1, latent_channels=4, patch=8,
                                          norm_groups=4, shift=0.0, scale=1.0)).eval()
    assert {"psnr", "ssim", "rfid"} == set(r.measure(codec, images(), features=first_numbers))


def test_semantic_codes_are_drawn_again() -> None:
    torch.manual_seed(0)
    system = SemanticCodec(SemanticCodec.tiny()).eval()
    model = r.tokenizer_of(system)
    assert isinstance(model, SemanticCodes)
    pictures = images(side=64)
    made = r.there_and_back(model, pictures)
    assert made.codes is not None and made.codes.shape == (4, 16)
    assert torch.equal(made.pictures, r.to_uint8(system.reconstruct(r.to_float(pictures))))
    found = r.measure(model, pictures, features=first_numbers)
    assert found["code use"].value == len(made.codes.unique()) / 64
    assert {"psnr", "ssim", "rfid", "code use", "perplexity"} == set(found)


@pytest.mark.parametrize("spoil", [lambda x: x, lambda x: x.flip(-1)])
def test_world_pictures_are_perceived(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]) -> None:
    """A tokenizer that loses nothing, and one that mirrors."""
    pictures = r.world_pictures(WORLDS["mini"], 12, split="pairs")
    assert torch.equal(pictures[:5], r.world_pictures(WORLDS["mini"], 5, split="pairs")), "the same, however many"
    monkeypatch.setattr(r, "there_and_back", lambda t, x, batch: r.Pass(spoil(x), None))
    found = r.measure(tokenizer(), pictures, scenes=True)
    same = found["perceived the same"].value
    assert (same == 1 and found["rfid"].value < 1e-6) if torch.equal(spoil(pictures), pictures) else same < 0.5


def test_the_tokenizer_of_a_system_is_found() -> None:
    inner = tokenizer()
    outer = nn.Module()
    outer.codec = inner
    assert r.tokenizer_of(outer) is inner and r.tokenizer_of(inner) is inner
    with pytest.raises(ValueError, match="expected a picture tokenizer or a system that draws with one, got Linear"):
        r.tokenizer_of(nn.Linear(1, 1))


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    for i, side in enumerate((16, 16, 24)):
        Pil.new("RGB", (side, side), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a picture")
    assert r.folder_pictures(tmp_path, 2)[:, 0, 0, 0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="pictures of one size .*16 x 16, 24 x 24"):
        r.folder_pictures(tmp_path, 3)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="expected captioned pictures in"):
        r.folder_pictures(empty, 3)
