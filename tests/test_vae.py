import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diptych.parts.vae import AutoEncoder, AutoEncoderConfig

GOLDEN = Path(__file__).parent / "goldens" / "bagel"
SMALL = AutoEncoderConfig(channels=16, channel_mult=(1, 2), num_res_blocks=1, latent_channels=3, norm_groups=8)


@pytest.fixture(scope="module")
def published() -> AutoEncoder:
    values = json.loads((GOLDEN / "config.json").read_text())["vae_config"]
    model = AutoEncoder(AutoEncoderConfig.from_published(values))
    model.load_state_dict(load_file(GOLDEN / "ae.safetensors"), strict=True)
    return model.eval().requires_grad_(False)


def test_encode_equals_the_published_code(published: AutoEncoder) -> None:
    golden = load_file(GOLDEN / "golden.safetensors")
    latent = published.latent(golden["image_vae"][None])
    torch.testing.assert_close(latent, golden["vae_encode_mean"], atol=2e-4, rtol=0)


@pytest.mark.parametrize(("case", "height", "width"), [("t2i_nocfg", 4, 3), ("t2i_cfg_global", 4, 3), ("edit", 3, 4)])
def test_decode_equals_the_published_code(published: AutoEncoder, case: str, height: int, width: int) -> None:
    golden = load_file(GOLDEN / "golden.safetensors")
    tokens = golden[f"{case}_latent_tokens"].reshape(height, width, 2, 2, 4)  # (row, column, p, q, z)
    latent = tokens.permute(4, 0, 2, 1, 3).reshape(1, 4, height * 2, width * 2)
    torch.testing.assert_close(published.decode(latent), golden[f"{case}_pixels"], atol=2e-4, rtol=0)


def test_paper_size_is_the_flux_autoencoder() -> None:
    with torch.device("meta"):
        model = AutoEncoder(AutoEncoderConfig.paper())
    assert sum(p.numel() for p in model.parameters()) == 83_819_683
    assert model.config.downsample == 8


@pytest.mark.parametrize("patch", [1, 4])
def test_shapes_and_gradients(patch: int) -> None:
    model = AutoEncoder(dataclasses.replace(SMALL, patch=patch))
    images = torch.randn(2, 3, 32, 48)
    posterior = model.encode(images)
    side = 2 * patch
    assert posterior.mean.shape == posterior.logvar.shape == (2, 3, 32 // side, 48 // side)
    pixels = model.decode(model.latent(images, torch.Generator().manual_seed(0)))
    assert pixels.shape == images.shape
    (pixels.abs().sum() + posterior.kl().sum()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # a constant added to every key moves no attention weight
    assert missing == [] or set(missing) <= {"encoder.mid.attn_1.k.bias", "decoder.mid.attn_1.k.bias"}


def test_patch_moves_pixels_into_channels_only_locally() -> None:
    """With space-to-depth, a picture shifted by one latent cell gives the shifted latent away from the border."""
    torch.manual_seed(0)
    model = AutoEncoder(dataclasses.replace(SMALL, patch=4)).encoder.conv_in
    x = torch.randn(1, 3, 64, 64)
    shuffled = torch.nn.functional.pixel_unshuffle(x, 4)
    rolled = torch.nn.functional.pixel_unshuffle(x.roll(8, 3), 4)
    torch.testing.assert_close(model(shuffled)[..., 1:10], model(rolled)[..., 3:12])


def test_latent_is_shifted_and_scaled_per_channel() -> None:
    torch.manual_seed(0)
    model = AutoEncoder(SMALL).eval()
    images = torch.randn(2, 3, 16, 16)
    mean = model.encode(images).mean
    shift, scale = (0.5, -1.0, 2.0), (2.0, 0.25, 1.0)
    other = model.with_statistics(shift, scale)
    expected = (mean - torch.tensor(shift)[:, None, None]) * torch.tensor(scale)[:, None, None]
    torch.testing.assert_close(other.latent(images), expected)
    torch.testing.assert_close(other.decode(other.latent(images)), model.decode(model.latent(images)))
    assert set(other.state_dict()) == set(model.state_dict())
    assert not any("shift" in key or "scale" in key for key in model.state_dict())


def test_sampling_uses_only_the_generator() -> None:
    torch.manual_seed(0)
    model = AutoEncoder(SMALL).eval()
    images = torch.randn(1, 3, 16, 16)
    a, b = (model.latent(images, torch.Generator().manual_seed(7)) for _ in range(2))
    c = model.latent(images, torch.Generator().manual_seed(8))
    assert torch.equal(a, b) and not torch.equal(a, c)
    posterior = model.encode(images)
    draws = torch.stack([posterior.sample(torch.Generator().manual_seed(i)) for i in range(400)])
    torch.testing.assert_close(draws.mean(0), posterior.mean, atol=0.3, rtol=0)
    torch.testing.assert_close(draws.std(0), (0.5 * posterior.logvar).exp(), atol=0.3, rtol=0.1)


def test_tokens_of_a_draw_are_those_of_the_posterior() -> None:
    torch.manual_seed(0)
    model = AutoEncoder(dataclasses.replace(SMALL, shift=(0.5, -1.0, 2.0), scale=(2.0, 0.25, 1.0))).eval()
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    posterior, noise = model.encode(images), torch.randn(1, 3, 4, 4)
    expected = (posterior.mean + torch.exp(0.5 * posterior.logvar) * noise - model.shift) * model.scale
    # (z, row, p, column, q) -> (row, column, p, q, z)
    noises = noise.view(1, 3, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(1, 4, 12)
    [drawn] = model.tokens(list(images), 2, list(noises))
    torch.testing.assert_close(drawn.view(1, 2, 2, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 4, 4), expected)
    assert torch.equal(model.tokens(list(images), 2)[0], model.tokens(list(images), 2, [torch.zeros(4, 12)])[0])


def test_kl_is_that_of_torch_distributions() -> None:
    model = AutoEncoder(SMALL)
    posterior = model.encode(torch.randn(1, 3, 16, 16))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(posterior.mean, (0.5 * posterior.logvar).exp()), normal(torch.zeros(()), torch.ones(())))
    torch.testing.assert_close(posterior.kl(), expected)


def test_errors_name_what_was_expected() -> None:
    model = AutoEncoder(dataclasses.replace(SMALL, patch=4))
    with pytest.raises(ValueError, match=r"multiples of 8, got \(1, 3, 60, 64\)"):
        model.encode(torch.zeros(1, 3, 60, 64))
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\), got \(1, 4, 8, 8\)"):
        model.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="norm_groups"):
        AutoEncoderConfig(channels=48)
    with pytest.raises(ValueError, match="3 numbers, got 2"):
        dataclasses.replace(SMALL, shift=(0.0, 1.0))
    with pytest.raises(ValueError, match="unknown zz"):
        AutoEncoderConfig.from_published({"zz": 1})
