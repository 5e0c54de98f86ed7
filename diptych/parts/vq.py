"""Picture tokenizer of the VQGAN family: pixels to a grid of codes and back.

    z = quant_conv(E(x))     (codes, q) = quantizer(z)     x' = D(post_quant_conv(q))

`VQTokenizerConfig.paper()` is VQ-16 of LlamaGen (arXiv 2406.06525), which Janus, UniGame and others use unchanged; VAR,
MAGVIT-v2 (Show-o) and Infinity are other values of the same config. Shape letters: b batch, c code width, h and w
cells, H and W pixels.
"""
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from diptych.parts.quantize import AnyQuantizerConfig, CodebookConfig, CodeLayout, Grid, Quantized, VectorConfig
from diptych.parts.vqgan import Decoder, Encoder, PyramidConfig

ENCODER = PyramidConfig()
DECODER = PyramidConfig(blocks=(3, 3, 3, 3, 3))  # LlamaGen: one block more per level than the encoder


@dataclass(frozen=True, kw_only=True)
class VQTokenizerConfig:
    """`kernel`: side of the convolutions between network and quantizer, 0 for none (then `latent_channels` must be the
    quantizer's width)."""

    encoder: PyramidConfig = ENCODER
    decoder: PyramidConfig = DECODER
    latent_channels: int = 256  # LlamaGen: z_channels
    kernel: int = 1
    quantizer: AnyQuantizerConfig = field(default_factory=VectorConfig)
    image_channels: int = 3

    def __post_init__(self) -> None:
        if self.encoder.downsample != self.decoder.downsample:
            raise ValueError(f"expected encoder and decoder with equally many levels, "
                             f"got {len(self.encoder.blocks)} and {len(self.decoder.blocks)}")
        if not self.kernel and self.latent_channels != self.quantizer.width:
            raise ValueError(f"expected latent_channels to be the code width {self.quantizer.width} "
                             f"without convolutions, got {self.latent_channels}; fix: set kernel=1")

    @property
    def downsample(self) -> int:
        """Pixels per cell, along one side."""
        return self.encoder.downsample

    @classmethod
    def tiny(cls) -> "VQTokenizerConfig":
        """64 x 64 pixels to 8 x 8 codes on a CPU."""
        sides = {"channels": 32, "channel_mult": (1, 1, 2, 2), "attention": (3,), "norm_groups": 8}
        return cls(encoder=PyramidConfig(blocks=(1, 1, 1, 1), **sides), latent_channels=64,
                   decoder=PyramidConfig(blocks=(2, 2, 2, 2), **sides),
                   quantizer=VectorConfig(codebook=CodebookConfig(values=512, width=8)))

    @classmethod
    def paper(cls) -> "VQTokenizerConfig":
        """VQ-16 of LlamaGen: 16 x 16 pixels per code, 16384 codes of width 8."""
        return cls()


class Autoencoded(NamedTuple):
    """A training pass: `pixels` (b, 3, H, W) not clipped, and what the quantizer says."""

    pixels: Tensor
    quantized: Quantized


class VQTokenizer(nn.Module):
    """Pictures (b, 3, H, W) in [-1, 1] <-> codes in the quantizer's layout."""

    def __init__(self, config: VQTokenizerConfig):
        super().__init__()
        c, width = config, config.quantizer.width
        self.config = config
        self.encoder = Encoder(c.encoder, c.image_channels, c.latent_channels)
        self.decoder = Decoder(c.decoder, c.latent_channels, c.image_channels)
        self.quantizer = c.quantizer.build()
        pad = c.kernel // 2
        self.quant_conv = nn.Conv2d(c.latent_channels, width, c.kernel, padding=pad) if c.kernel else nn.Identity()
        self.post_quant_conv = nn.Conv2d(width, c.latent_channels, c.kernel, padding=pad) if c.kernel else nn.Identity()

    def features(self, pixels: Tensor) -> Tensor:
        """The map before quantization, (b, c, h, w); sides must be multiples of `config.downsample`."""
        side, channels = self.config.downsample, self.config.image_channels
        if pixels.ndim != 4 or pixels.shape[1] != channels or pixels.shape[2] % side or pixels.shape[3] % side:
            raise ValueError(f"expected images of shape (b, {channels}, h, w) with h, w multiples of {side}, "
                             f"got {tuple(pixels.shape)}; fix: resize or pad the pictures")
        return self.quant_conv(self.encoder(pixels))

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes int64: (b, h, w) for a plain quantizer; `layout` tells for others."""
        return self.quantizer(self.features(pixels)).codes

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels of codes in the shape that `encode` gives; values are not clipped."""
        return self.decode_vectors(self.quantizer.lookup(codes))

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Pixels of a map of code vectors (b, c, h, w)."""
        weight = self.decoder.conv_in.weight
        return self.decoder(self.post_quant_conv(vectors.to(weight.dtype)))

    def code_vectors(self, codes: Tensor) -> Tensor:
        """The codebook's vectors of codes of any shape: (...) -> (..., c), float32, normalised where it normalises."""
        return self.quantizer.codebook.vectors(codes)

    def layout(self, height: int, width: int) -> CodeLayout:
        """How the codes of a picture of so many pixels are arranged."""
        grid: Grid = (height // self.config.downsample, width // self.config.downsample)
        return self.quantizer.layout(grid)

    def forward(self, pixels: Tensor) -> Autoencoded:
        """There and back with gradient, for training."""
        quantized = self.quantizer(self.features(pixels))
        return Autoencoded(self.decode_vectors(quantized.vectors), quantized)
