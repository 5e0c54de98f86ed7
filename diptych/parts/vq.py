"""Picture tokenizer of the VQGAN family: pixels to a grid of codes and back.

    z = quant_conv(E(x))     (codes, q) = quantizer(z)     x' = D(post_quant_conv(q))

`VQTokenizerConfig.paper()` is VQ-16 of LlamaGen (arXiv 2406.06525), which Janus, UniGame and others use unchanged; VAR,
MAGVIT-v2 (Show-o), Infinity and the vision towers with a decoder (VILA-U, UniFork) are other values of the same config.
A decoder with a guide (MoVQ) is guided by q. Shape letters: b batch, c code width, h and w cells, H and W pixels.
"""
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.pictures import stack_by_size
from diptych.parts.quantize import (
    AnyQuantizer,
    AnyQuantizerConfig,
    CodebookConfig,
    CodeLayout,
    Grid,
    LossWeights,
    Quantized,
    ResidualConfig,
    SignConfig,
    VectorConfig,
)
from diptych.parts.towers import TowerConfig
from diptych.parts.vqgan import Decoder, PyramidConfig

ENCODER = PyramidConfig()
DECODER = PyramidConfig(blocks=(3, 3, 3, 3, 3))  # LlamaGen: one block more per level than the encoder


@dataclass(frozen=True, kw_only=True)
class VQTokenizerConfig:
    """`in_kernel`, `out_kernel`: side of the convolution before and behind the quantizer, between `latent_channels` and
    the code width; 0 for none, then the network beside it has channels of the code width."""

    encoder: PyramidConfig | TowerConfig = ENCODER
    decoder: PyramidConfig = DECODER
    latent_channels: int = 256  # LlamaGen: z_channels
    in_kernel: int = 1
    out_kernel: int = 1
    quantizer: AnyQuantizerConfig = field(default_factory=VectorConfig)
    image_channels: int = 3
    patch: int = 1  # as in `parts.vae`: above 1 the networks work on space-to-depth pixels, cheap enough for a CPU

    def __post_init__(self) -> None:
        if self.encoder.downsample != self.decoder.downsample:
            raise ValueError(f"expected encoder and decoder of one stride, got {self.encoder.downsample} and "
                             f"{self.decoder.downsample} pixels; fix: give the decoder as many levels")
        if self.decoder.guide not in (0, self.quantizer.width):
            raise ValueError(f"expected decoder.guide to be 0 or the code width {self.quantizer.width}, "
                             f"got {self.decoder.guide}")

    @property
    def downsample(self) -> int:
        """Pixels per cell, along one side."""
        return self.encoder.downsample * self.patch

    def build(self) -> "VQTokenizer":
        return VQTokenizer(self)

    @classmethod
    def small(cls) -> "VQTokenizerConfig":
        """The zoo's `vq`: 64 x 64 pixels to 8 x 8 codes on a CPU."""
        side = PyramidConfig(channels=64, channel_mult=(1, 1), blocks=(2, 2), attention=(), norm_groups=16)
        book = CodebookConfig(values=1024, width=8, decay=0.99, restart=True)
        return cls(encoder=side, decoder=side, latent_channels=64, patch=4, quantizer=VectorConfig(codebook=book))

    @classmethod
    def residual(cls) -> "VQTokenizerConfig":
        """The zoo's `rq`: 64 x 64 pixels to 4 x 4 cells of 4 residual codes on a CPU."""
        side = PyramidConfig(channels=64, channel_mult=(1, 1, 1), blocks=(2, 2, 2), attention=(), norm_groups=16)
        book = CodebookConfig(values=1024, width=16, norm="none", decay=0.99, restart=True)
        quantizer = ResidualConfig(codebook=book, depth=4, weights=LossWeights(codebook=0.0, commitment=0.25))
        return cls(encoder=side, decoder=side, latent_channels=64, patch=4, quantizer=quantizer)

    @classmethod
    def bitwise(cls) -> "VQTokenizerConfig":
        """The zoo's `bits`: 64 x 64 pixels to 130 cells of 12 bits in six scales on a CPU."""
        side = PyramidConfig(channels=64, channel_mult=(1, 1), blocks=(2, 2), attention=(), norm_groups=16)
        scales, signs = (1, 2, 3, 4, 6, 8), SignConfig(width=12, unit=True, packed=False)
        quantizer = ResidualConfig(codebook=signs, scales=tuple((n, n) for n in scales), up="bilinear", compare="step",
                                   weights=LossWeights(codebook=0.0, commitment=0.25, entropy=0.1))
        return cls(encoder=side, decoder=side, in_kernel=0, out_kernel=0, patch=4, quantizer=quantizer)

    @classmethod
    def paper(cls) -> "VQTokenizerConfig":
        """VQ-16 of LlamaGen: 16 x 16 pixels per code, 16384 codes of width 8."""
        return cls()


class Autoencoded(NamedTuple):
    """A training pass: `pixels` (b, 3, H, W) not clipped, and what the quantizer says."""

    pixels: Tensor
    quantized: Quantized


def _conv(in_channels: int, out_channels: int, kernel: int) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2) if kernel else nn.Identity()


class PictureTokenizer(nn.Module):
    """What turns pictures (b, 3, H, W) in [-1, 1] into codes and back: one of several networks."""

    config: Any  # has `downsample`
    quantizer: AnyQuantizer

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes int64: (b, h, w) for a plain quantizer; `layout` tells for others."""
        raise TypeError("abstract")

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels of codes in the shape that `encode` gives; values are not clipped."""
        raise TypeError("abstract")

    @torch.no_grad()
    def tokens(self, pictures: list[Tensor], shape: tuple[int, ...] = ()) -> list[Tensor]:
        """Pictures (3, H, W) of any sizes -> codes (n_i, *shape) each, cell by cell; `shape` of those of one cell."""
        out: dict[int, Tensor] = {}
        for numbers, batch in stack_by_size(pictures):
            codes = self.layout(batch.shape[2], batch.shape[3]).flatten(self.encode(batch))
            out |= zip(numbers, codes.unflatten(-1, shape) if shape else codes[..., 0], strict=True)
        return [out[i] for i in range(len(pictures))]

    def code_vectors(self, codes: Tensor) -> Tensor:
        """The vectors of single codes of any shape: (...) -> (..., c) float32, of length 1 where so normalised."""
        return self.quantizer.vectors(codes)

    def layout(self, height: int, width: int) -> CodeLayout:
        """How the codes of a picture of so many pixels are arranged."""
        grid: Grid = (height // self.config.downsample, width // self.config.downsample)
        return self.quantizer.layout(grid)


class VQTokenizer(PictureTokenizer):
    config: VQTokenizerConfig

    def __init__(self, config: VQTokenizerConfig):
        super().__init__()
        c, width = config, config.quantizer.width
        self.config = config
        colours = c.image_channels * c.patch**2
        self.encoder = c.encoder.make_encoder(colours, c.latent_channels if c.in_kernel else width)
        self.decoder = Decoder(c.decoder, c.latent_channels if c.out_kernel else width, colours)
        self.quantizer = c.quantizer.build()
        self.quant_conv = _conv(c.latent_channels, width, c.in_kernel)
        self.post_quant_conv = _conv(width, c.latent_channels, c.out_kernel)

    def features(self, pixels: Tensor) -> Tensor:
        """The map before quantization, (b, c, h, w); sides must be multiples of `config.downsample`."""
        side, channels = self.config.downsample, self.config.image_channels
        if pixels.ndim != 4 or pixels.shape[1] != channels or pixels.shape[2] % side or pixels.shape[3] % side:
            raise ValueError(f"expected images of shape (b, {channels}, h, w) with h, w multiples of {side}, "
                             f"got {tuple(pixels.shape)}; fix: resize or pad the pictures")
        pixels = F.pixel_unshuffle(pixels, self.config.patch) if self.config.patch > 1 else pixels
        return self.quant_conv(self.encoder(pixels))

    def encode(self, pixels: Tensor) -> Tensor:
        return self.quantizer(self.features(pixels)).codes

    def decode(self, codes: Tensor) -> Tensor:
        return self.decode_vectors(self.quantizer.lookup(codes))

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Pixels of a map of code vectors (b, c, h, w)."""
        vectors = vectors.to(self.decoder.conv_in.weight.dtype)
        pixels = self.decoder(self.post_quant_conv(vectors), vectors if self.config.decoder.guide else None)
        return F.pixel_shuffle(pixels, self.config.patch) if self.config.patch > 1 else pixels

    def forward(self, pixels: Tensor) -> Autoencoded:
        """There and back with gradient, for training."""
        quantized = self.quantizer(self.features(pixels))
        return Autoencoded(self.decode_vectors(quantized.vectors), quantized)
