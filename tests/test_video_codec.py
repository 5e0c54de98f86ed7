"""The tokenizer of clips: pictures as clips, what a frame depends on, stored statistics, the guide of the decoder."""
import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from diptych import config
from diptych.benchmarks.reconstruction import there_and_back, tokenizer_of
from diptych.parts.quantize import CodebookConfig, VectorConfig
from diptych.parts.video_codec import StoredNorm, VideoTokenizer, VideoTokenizerConfig
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import Decoder, PyramidConfig

SIDE = PyramidConfig(channels=8, channel_mult=(1, 2), blocks=(1, 1), attention=(1,), norm_groups=4)
BOOK = VectorConfig(codebook=CodebookConfig(values=32, width=6, norm="none"))
SMALL = VideoTokenizerConfig(encoder=SIDE, decoder=dataclasses.replace(SIDE, blocks=(2, 2), guide=6), halvings=1,
                             blocks=1, quantizer=BOOK)


@cache
def tiny() -> VideoTokenizer:
    """With statistics and code vectors that are not those of a fresh one; two frames of pixels per frame of codes."""
    torch.manual_seed(0)
    model = VideoTokenizer(SMALL)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, StoredNorm):
                module.mean.normal_(std=0.3)
                module.var.uniform_(0.5, 2)
        model.quantizer.codebook.weight.normal_(std=0.3)
    return model.eval()


def clip(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- sizes ------------------------------------------------------------------------------------------------------------

def test_the_published_size_by_arithmetic() -> None:
    """Emu3-VisionTokenizer: 271M parameters, 4 x 8 x 8 pixels per code."""
    def res(inside: int, outside: int, norm: int = 0) -> int:  # `norm`: of two 1x1 convolutions on a guide, per channel
        skip = inside * outside + outside if inside != outside else 0
        convs = 9 * inside * outside + outside + 9 * outside**2 + outside
        return (2 + norm) * (inside + outside) + convs + skip

    def attention(c: int, norm: int = 0) -> int:
        return (2 + norm) * c + 4 * (c**2 + c)

    widths, guided = [256, 512, 512, 1024], 2 * (4 + 1)
    encoder = 3 * 9 * 256 + 256
    decoder = 4 * 9 * 1024 + 1024
    for inside, c in zip([256, *widths], widths, strict=False):
        encoder += res(inside, c) + res(c, c) + (9 * c**2 + c) * (c != 1024) + 2 * attention(c) * (c == 1024)
    for level, (inside, c) in enumerate(zip([1024, 1024, 512, 512], reversed(widths), strict=True)):
        decoder += res(inside, c, guided) + 2 * res(c, c, guided) + (9 * c**2 + c) * (level < 3)
        decoder += 3 * attention(c, guided) * (c == 1024)
    encoder += 2 * res(1024, 1024) + attention(1024) + 2 * 1024 + 9 * 1024 * 4 + 4
    decoder += 2 * res(1024, 1024, guided) + attention(1024, guided) + (2 + guided) * 256 + 9 * 256 * 3 + 3
    block = 2 * (27 * 16 + 4) + 2 * 8
    time = 2 * (36 * 16 + 4) + 2 * block + 2 * (27 * 16 + 4) + 2 * block
    with torch.device("meta"):
        model = VideoTokenizer(VideoTokenizerConfig.paper())
    count = sum(p.numel() for p in model.parameters())
    assert count == encoder + decoder + time + 2 * (3 * 16 + 4) + 32768 * 4
    assert round(count / 1e6) == 271 and (model.config.frames, model.config.downsample) == (4, 8)
    assert model.layout(720, 720).count == 90 * 90


def test_a_saved_config_says_which_tokenizer_it_is() -> None:
    @dataclasses.dataclass(frozen=True)
    class Holder:
        codec: VQTokenizerConfig | VideoTokenizerConfig

    for codec in (SMALL, VQTokenizerConfig.small()):
        again = config.from_dict(Holder, config.to_dict(Holder(codec)))
        assert again.codec == codec and type(again.codec.build().config) is type(codec)


# -- pictures and clips -----------------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_picture_is_a_clip_of_equal_frames() -> None:
    model, picture = tiny(), clip(2, 3, 8, 12)
    codes = model.encode(picture)
    assert codes.shape == (2, 4, 6) and codes.dtype == torch.int64 and len(codes.unique()) > 2
    still = picture[:, None].expand(-1, 2, -1, -1, -1)
    assert torch.equal(model.encode(still)[:, 0], codes)
    torch.testing.assert_close(model.features(still), model.features(picture))
    whole = model.decode(codes[:, None])
    assert whole.shape == (2, 2, 3, 8, 12)
    torch.testing.assert_close(model.decode(codes), whole[:, 0])
    torch.testing.assert_close(model(picture).pixels, model.decode(codes))
    torch.testing.assert_close(model(still).pixels, whole)
    flat = model.tokens([picture[0], clip(3, 4, 4), picture[1]])
    assert [len(c) for c in flat] == [24, 4, 24] and torch.equal(flat[2], codes[1].flatten())


@torch.no_grad()
def test_a_frame_depends_on_no_later_one() -> None:
    model, one = tiny(), clip(1, 6, 3, 4, 4)
    later = one.clone()
    later[:, 4:] = clip(1, 2, 3, 4, 4, seed=1)
    a, b = model.features(one), model.features(later)
    torch.testing.assert_close(a[:, :, :2], b[:, :, :2])
    assert not torch.allclose(a[:, :, 2], b[:, :, 2])
    earlier = one.clone()
    earlier[:, :2] = clip(1, 2, 3, 4, 4, seed=2)
    assert not torch.allclose(model.features(earlier)[:, :, 1], a[:, :, 1])  # but on earlier ones it does

    codes = torch.arange(12).view(1, 3, 2, 2)
    other = codes.clone()
    other[:, 2] = 31
    x, y = model.decode(codes), model.decode(other)
    assert x.shape == (1, 6, 3, 4, 4)
    torch.testing.assert_close(x[:, :4], y[:, :4])
    assert not torch.allclose(x[:, 4:], y[:, 4:])
    torch.testing.assert_close(model.decode(codes[:, :1]), x[:, :2])  # the beginning of a clip is a clip


@torch.no_grad()
def test_statistics_are_stored() -> None:
    """Evaluation of a batch norm, whatever the mode and the company."""
    norm, plain = StoredNorm(5), nn.BatchNorm3d(5)
    plain.running_mean, plain.running_var = torch.randn(5), torch.rand(5) + 0.5
    plain.weight.copy_(torch.randn(5))
    plain.bias.copy_(torch.randn(5))
    norm.load_state_dict({"weight": plain.weight, "bias": plain.bias, "mean": plain.running_mean,
                          "var": plain.running_var})
    x = torch.randn(2, 5, 3, 2, 2)
    torch.testing.assert_close(norm.train()(x), plain.eval()(x))
    low = norm.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), plain(x), atol=0.05, rtol=0.05)
    model, pictures = tiny(), clip(3, 3, 8, 8)
    torch.testing.assert_close(model.train().features(pictures)[1:2], model.eval().features(pictures[1:2]))


def test_there_and_back_with_gradients_everywhere() -> None:
    model = VideoTokenizer(SMALL)
    out = model(clip(1, 4, 3, 8, 8))
    (out.pixels.square().mean() + sum(out.quantized.losses.values())).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(name.endswith(".k.bias") for name in idle)  # a constant added to every key moves nothing


@pytest.mark.parametrize(("shape", "message"), [
    ((1, 3, 3, 8, 8), r"h, w multiples of 2 and t of 2, got \(1, 3, 3, 8, 8\); fix: resize or pad"),
    ((1, 3, 8, 9), r"got \(1, 3, 8, 9\)"), ((1, 1, 8, 8), r"got \(1, 1, 8, 8\)"), ((3, 8, 8), r"got \(3, 8, 8\)")])
def test_what_does_not_fit_is_an_error(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().encode(torch.zeros(shape))


def test_wrong_configs_are_errors() -> None:
    with pytest.raises(ValueError, match="codes of shape"):
        tiny().decode(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="guide of 6 channels, the code width, in the decoder alone, got 0"):
        dataclasses.replace(SMALL, decoder=SIDE)
    with pytest.raises(ValueError, match="one stride, got 2 and 4"):
        dataclasses.replace(SMALL, decoder=PyramidConfig(channels=8, channel_mult=(1, 1, 1), blocks=(1, 1, 1), guide=6,
                                                         attention=(), norm_groups=4))


def test_its_reconstructions_are_measured() -> None:
    images = (clip(3, 3, 8, 8) * 127 + 128).to(torch.uint8)
    made = there_and_back(tokenizer_of(tiny()), images)
    assert made.pictures.shape == images.shape and made.codes is not None and made.codes.shape == (3, 4, 4)


# -- the guide --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_every_norm_of_a_guided_decoder_reads_the_guide() -> None:
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(SIDE, guide=2), 4, 3).eval()
    z, guide = clip(1, 4, 3, 3), clip(1, 2, 3, 3, seed=1)
    usual = decoder(z, guide)
    assert usual.shape == (1, 3, 6, 6)
    convs = {name: m for name, m in decoder.named_modules() if name.endswith((".scale", ".shift"))}
    assert len(convs) == 2 * (2 * 2 + 1 + 2 * 2 + 1 + 1)  # middle, levels, last
    for name, conv in convs.items():
        weight = conv.weight.clone()
        conv.weight.zero_()
        assert not torch.allclose(decoder(z, guide), usual, atol=1e-6), name
        conv.weight.copy_(weight)
    for norm in decoder.modules():  # scale 1, shift 0: a plain norm
        if hasattr(norm, "scale"):
            for conv, value in ((norm.scale, 1.0), (norm.shift, 0.0)):
                conv.weight.zero_()
                conv.bias.fill_(value)
    plain = Decoder(SIDE, 4, 3).eval()
    plain.load_state_dict({k.replace(".norm.weight", ".weight").replace(".norm.bias", ".bias") if ".norm" in k and
                           k.count("norm") > 1 else k: v for k, v in decoder.state_dict().items()
                           if ".scale." not in k and ".shift." not in k})
    torch.testing.assert_close(decoder(z, guide), plain(z))


def test_a_guide_where_there_is_none_is_an_error() -> None:
    guided = dataclasses.replace(SIDE, guide=2)
    for c, guide in ((SIDE, torch.zeros(1, 2, 3, 3)), (guided, None), (guided, torch.zeros(1, 3, 3, 3))):
        with pytest.raises(ValueError, match=f"expected a guide of {c.guide} channels"):
            Decoder(c, 4, 3)(torch.zeros(1, 4, 3, 3), guide)
    with pytest.raises(ValueError, match="an encoder without a guide, got one of 2"):
        guided.make_encoder(3, 4)
    with pytest.raises(ValueError, match="decoder.guide to be 0 or the code width 6, got 2"):
        VQTokenizerConfig(encoder=SIDE, decoder=guided, quantizer=BOOK)


@torch.no_grad()
def test_a_tokenizer_of_pictures_may_have_a_guide() -> None:
    torch.manual_seed(0)
    model = VQTokenizer(VQTokenizerConfig(encoder=SIDE, decoder=dataclasses.replace(SIDE, guide=6), latent_channels=5,
                                          quantizer=BOOK)).eval()
    codes = model.encode(clip(1, 3, 8, 8))
    vectors = model.quantizer.lookup(codes)
    wanted = model.decoder(model.post_quant_conv(vectors), vectors)
    torch.testing.assert_close(model.decode(codes), wanted)
