"""Tokenizer with two views of a picture under one index: what it means and what it looks like (TokenFlow, 2412.03069).

    z = [task(S(x)); quant_conv(E(x))]     (codes, q) = quantizer(z)     q = [q_semantic; q_pixel]
    pixels' = D(post_quant_conv(q_pixel))          features' = task'(T(q_semantic))

S and T are vision transformers, E and D the convolutional pyramid; neither decoder sees the other's half. Features are
trained towards those of a frozen teacher. Shape letters: b batch, c code width of both halves, h and w cells, f width
of the teacher.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.quantize import (
    AnyQuantizer,
    AnyQuantizerConfig,
    CodeLayout,
    Grid,
    JointConfig,
    Quantized,
    ResidualQuantizer,
)
from diptych.parts.towers import AnyTowerConfig, Tower, TowerConfig, build_tower, features_of
from diptych.parts.vqgan import Decoder, Encoder, PyramidConfig


@dataclass(frozen=True, kw_only=True)
class DualTokenizerConfig:
    """The quantizer's codebook joins two parts: semantic, then pixels."""

    semantic_encoder: AnyTowerConfig
    semantic_decoder: TowerConfig
    encoder: PyramidConfig
    decoder: PyramidConfig
    quantizer: AnyQuantizerConfig
    latent_channels: int = 256
    feature_width: int = 512  # CLIP-B's projected space
    patch: int = 1  # above 1 the pyramids work on space-to-depth pixels (`parts.vae`)

    def __post_init__(self) -> None:
        book = self.quantizer.codebook
        if not isinstance(book, JointConfig) or len(book.parts) != 2:
            raise ValueError(f"expected a joint codebook of two parts, semantic and pixels, got {type(book).__name__}")
        strides = (self.semantic_encoder.patch, *(self.patch * p.downsample for p in (self.encoder, self.decoder)))
        if len(set(strides)) != 1:
            raise ValueError(f"expected one stride for both encoders and the decoder, got {strides} pixels")

    @property
    def downsample(self) -> int:
        """Pixels per cell, along one side."""
        return self.semantic_encoder.patch

    @property
    def widths(self) -> tuple[int, int]:
        """Code width of the semantic half and of the pixel half."""
        book = self.quantizer.codebook
        assert isinstance(book, JointConfig)
        return book.parts[0].width, book.parts[1].width


class Views(NamedTuple):
    """A training pass: pixels (b, 3, H, W) not clipped, features (b, h * w, f), and what the quantizer says."""

    pixels: Tensor
    features: Tensor
    quantized: Quantized


def _task(in_width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_width, in_width), nn.Tanh(), nn.Linear(in_width, out_width))


class DualTokenizer(nn.Module):
    """Pictures (b, 3, H, W) in [-1, 1] <-> codes in the quantizer's layout -> pixels, features."""

    def __init__(self, config: DualTokenizerConfig):
        super().__init__()
        c, (semantic, pixel) = config, config.widths
        self.config = config
        self.semantic_encoder = build_tower(c.semantic_encoder)
        self.semantic_decoder = Tower(c.semantic_decoder, semantic)
        self.encode_task = _task(c.semantic_encoder.width, semantic)
        self.decode_task = _task(c.semantic_decoder.width, c.feature_width)
        colours = 3 * c.patch**2
        self.encoder = Encoder(c.encoder, colours, c.latent_channels)
        self.decoder = Decoder(c.decoder, c.latent_channels, colours)
        self.quant_conv = nn.Conv2d(c.latent_channels, pixel, 1)
        self.post_quant_conv = nn.Conv2d(pixel, c.latent_channels, 1)
        self.quantizer: AnyQuantizer = c.quantizer.build()

    def maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves before quantization, (b, c_semantic, h, w) and (b, c_pixel, h, w)."""
        side = self.config.downsample
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % side or pixels.shape[3] % side:
            raise ValueError(f"expected images of shape (b, 3, h, w) with h, w multiples of {side}, "
                             f"got {tuple(pixels.shape)}; fix: resize or pad the pictures")
        semantic = self.encode_task(features_of(self.semantic_encoder, pixels).movedim(1, -1)).movedim(-1, 1)
        pixels = F.pixel_unshuffle(pixels, self.config.patch) if self.config.patch > 1 else pixels
        return semantic, self.quant_conv(self.encoder(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        """Both halves as one map (b, c, h, w)."""
        return torch.cat(self.maps(pixels), 1)

    def quantize(self, pixels: Tensor, scales: Sequence[Grid] | None = None) -> Quantized:
        """`scales`: for a multi-scale quantizer, of another resolution, or with one left out."""
        z = self.features(pixels)
        if scales is None:
            return self.quantizer(z)
        if not isinstance(self.quantizer, ResidualQuantizer):
            raise ValueError(f"expected no scales for a single grid of codes, got {list(scales)}")
        return self.quantizer(z, scales)

    def encode(self, pixels: Tensor, scales: Sequence[Grid] | None = None) -> Tensor:
        return self.quantize(pixels, scales).codes

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels of codes; not clipped. Of a multi-scale quantizer the codes of the first scales do, as a preview."""
        return self.decode_vectors(self.quantizer.lookup(codes))

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Pixels of a map (b, c, h, w) of both halves."""
        half = vectors.split(self.config.widths, 1)[1]
        pixels = self.decoder(self.post_quant_conv(half.to(self.post_quant_conv.weight.dtype)))
        return F.pixel_shuffle(pixels, self.config.patch) if self.config.patch > 1 else pixels

    def semantics(self, vectors: Tensor) -> Tensor:
        """Features in the teacher's space (b, h * w, f) of a map (b, c, h, w) of both halves."""
        half = vectors.split(self.config.widths, 1)[0]
        x = self.semantic_decoder(half.to(self.post_quant_conv.weight.dtype))
        return self.decode_task(x.flatten(2).transpose(1, 2))

    def code_vectors(self, codes: Tensor) -> Tensor:
        """The vectors of single codes of any shape: (...) -> (..., c) float32."""
        return self.quantizer.vectors(codes)

    def layout(self, height: int, width: int) -> CodeLayout:
        """How the codes of a picture of so many pixels are arranged."""
        return self.quantizer.layout((height // self.config.downsample, width // self.config.downsample))

    def forward(self, pixels: Tensor, scales: Sequence[Grid] | None = None) -> Views:
        quantized = self.quantize(pixels, scales)
        return Views(self.decode_vectors(quantized.vectors), self.semantics(quantized.vectors), quantized)
