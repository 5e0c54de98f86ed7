"""Tokenizer of clips that takes pictures too: pixels to frames of codes and back (Emu3's, arXiv 2409.18869, section
2.2, on the decoder of MoVQ, arXiv 2209.09002).

    z = quant_conv(S(E(x)))     (codes, q) = quantizer(z)     p, g = L(post_quant_conv(q)), L(q)     x' = D(p; guide g)

E and D are the convolutional pyramid, frame by frame; every norm of D is guided by g. S halves the number of frames and
L doubles it, `halvings` times, with convolutions that look at the frame itself and at earlier ones: a frame of codes
depends on no later frame, and neither do the frames that it is decoded to. A picture is a clip of equal frames, as many
as one frame of codes stands for.

The norms over time are batch norms with stored statistics: a picture is read alike in any company. Fresh ones are the
identity, and training moves their scale and shift only.

Shape letters: b batch, c code width, t frames of codes, T frames of pixels, h and w cells, H and W pixels.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.quantize import CodebookConfig, VectorConfig
from diptych.parts.vq import Autoencoded, PictureTokenizer
from diptych.parts.vqgan import Decoder, PyramidConfig

PAST = 2  # empty frames before a clip; of a kernel of three frames it makes a causal one


@dataclass(frozen=True, kw_only=True)
class VideoTokenizerConfig:
    """Maps over time have as many channels as a code vector, and so has the guide of the decoder."""

    encoder: PyramidConfig
    decoder: PyramidConfig
    halvings: int = 2  # of the number of frames
    blocks: int = 2  # residual blocks over time on either side
    quantizer: VectorConfig = field(default_factory=lambda: VectorConfig(
        codebook=CodebookConfig(values=32768, width=4, norm="none")))
    image_channels: int = 3

    def __post_init__(self) -> None:
        if self.encoder.downsample != self.decoder.downsample:
            raise ValueError(f"expected encoder and decoder of one stride, got {self.encoder.downsample} and "
                             f"{self.decoder.downsample} pixels; fix: give the decoder as many levels")
        if self.decoder.guide != self.quantizer.width or self.encoder.guide:
            raise ValueError(f"expected a guide of {self.quantizer.width} channels, the code width, in the decoder "
                             f"alone, got {self.decoder.guide} and {self.encoder.guide} in the encoder")

    @property
    def downsample(self) -> int:
        """Pixels per cell, along one side."""
        return self.encoder.downsample

    @property
    def frames(self) -> int:
        """Frames of pixels per frame of codes."""
        return 2**self.halvings

    def build(self) -> "VideoTokenizer":
        return VideoTokenizer(self)

    @classmethod
    def paper(cls) -> "VideoTokenizerConfig":
        """Emu3's: 4 x 8 x 8 pixels per code, 32768 codes of width 4 (released `config.json`)."""
        def side(blocks: int, guide: int = 0) -> PyramidConfig:
            return PyramidConfig(channels=256, channel_mult=(1, 2, 2, 4), blocks=(blocks,) * 4, attention=(3,),
                                 guide=guide)

        return cls(encoder=side(2), decoder=side(3, guide=4))  # one block more per level than the encoder


class CausalConv(nn.Conv3d):
    """(b, c, T, h, w) -> same, or half the frames with a stride of 2; a frame sees itself and two before it, and with
    a kernel of four frames the one after it, which belongs to the same pair."""

    def __init__(self, channels: int, frames: int, side: int, stride: int = 1):
        super().__init__(channels, channels, (frames, side, side), (stride, 1, 1), (0, side // 2, side // 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 0, 0, 0, PAST, 0)))


class StoredNorm(nn.Module):
    """Batch norm of every channel of (b, c, ...) by stored mean and variance, in float32."""

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), eps
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.float() * torch.rsqrt(self.var.float() + self.eps)
        shift = self.bias.float() - self.mean.float() * scale
        channels = (-1, *(1,) * (x.ndim - 2))
        return (x.float() * scale.view(channels) + shift.view(channels)).to(x.dtype)


class TimeBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (b, c, T, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = StoredNorm(channels), StoredNorm(channels)
        self.conv1, self.conv2 = CausalConv(channels, 3, 3), CausalConv(channels, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class Shorten(nn.Module):
    """(b, c, T, h, w) -> (b, c, t, h, w): the number of frames halved so many times, then blocks."""

    def __init__(self, channels: int, halvings: int, blocks: int):
        super().__init__()
        self.resize = nn.ModuleList(CausalConv(channels, 4, 3, stride=2) for _ in range(halvings))
        self.blocks = nn.ModuleList(TimeBlock(channels) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.resize:
            x = F.silu(conv(x))
        for block in self.blocks:
            x = block(x)
        return x


class Lengthen(nn.Module):
    """(b, c, t, h, w) -> (b, c, T, h, w): blocks, then every frame twice, so many times."""

    def __init__(self, channels: int, doublings: int, blocks: int):
        super().__init__()
        self.blocks = nn.ModuleList(TimeBlock(channels) for _ in range(blocks))
        self.resize = nn.ModuleList(CausalConv(channels, 3, 3) for _ in range(doublings))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for conv in self.resize:
            x = F.silu(conv(x.repeat_interleave(2, 2)))
        return x


class VideoTokenizer(PictureTokenizer):
    """Pictures (b, 3, H, W) <-> codes (b, h, w), and clips (b, T, 3, H, W) <-> codes (b, t, h, w)."""

    config: VideoTokenizerConfig

    def __init__(self, config: VideoTokenizerConfig):
        super().__init__()
        c, width = config, config.quantizer.width
        self.config = config
        self.encoder = c.encoder.make_encoder(c.image_channels, width)
        self.decoder = Decoder(c.decoder, width, c.image_channels)
        self.shorten = Shorten(width, c.halvings, c.blocks)
        self.lengthen = Lengthen(width, c.halvings, c.blocks)
        self.quant_conv, self.post_quant_conv = CausalConv(width, 3, 1), CausalConv(width, 3, 1)
        self.quantizer = c.quantizer.build()

    def features(self, pixels: Tensor) -> Tensor:
        """The map of pictures or clips before quantization, (b, c, t, h, w); t is 1 for pictures."""
        side, frames, channels = self.config.downsample, self.config.frames, self.config.image_channels
        if (pixels.ndim not in (4, 5) or pixels.shape[-3] != channels or pixels.shape[-2] % side
                or pixels.shape[-1] % side or (pixels.ndim == 5 and pixels.shape[1] % frames)):
            raise ValueError(f"expected pictures of shape (b, {channels}, h, w) or clips (b, t, {channels}, h, w) with "
                             f"h, w multiples of {side} and t of {frames}, got {tuple(pixels.shape)}; "
                             "fix: resize or pad the pictures, repeat or leave out frames")
        if pixels.ndim == 5:
            x = self.encoder(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).transpose(1, 2)
        else:  # equal frames are encoded once
            x = self.encoder(pixels)[:, :, None].expand(-1, -1, frames, -1, -1)
        return self.quant_conv(self.shorten(x))

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes int64 (b, h, w) of pictures, (b, t, h, w) of clips."""
        codes = self.quantizer(self.features(pixels)).codes
        return codes if pixels.ndim == 5 else codes[:, 0]

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels of codes in the shape that `encode` gives; values are not clipped. Of a picture the first frame."""
        if codes.ndim not in (3, 4):
            raise ValueError(f"expected codes of shape (b, h, w) or (b, t, h, w), got {tuple(codes.shape)}")
        if codes.ndim == 4:
            return self.decode_vectors(self.quantizer.lookup(codes))
        return self.decode_vectors(self.quantizer.lookup(codes[:, None]), 1)[:, 0]

    def decode_vectors(self, vectors: Tensor, frames: int | None = None) -> Tensor:
        """The clip (b, T, 3, H, W) of a map of code vectors (b, c, t, h, w), or its first `frames`."""
        vectors = vectors.to(self.decoder.conv_in.weight.dtype)
        # one network reads both what is drawn and its guide
        both = self.lengthen(torch.cat((self.post_quant_conv(vectors), vectors)))[:, :, :frames].transpose(1, 2)
        x, guide = both.chunk(2)
        return self.decoder(x.flatten(0, 1), guide.flatten(0, 1)).unflatten(0, x.shape[:2])

    def forward(self, pixels: Tensor) -> Autoencoded:
        """There and back with gradient, for training."""
        quantized = self.quantizer(self.features(pixels))
        clip = self.decode_vectors(quantized.vectors, None if pixels.ndim == 5 else 1)
        return Autoencoded(clip if pixels.ndim == 5 else clip[:, 0], quantized)
