"""A picture tokenizer trained on the pictures of documents: the codes of a data set. A tool for systems, not a paper.

    L = w_1 |x' - x| + w_2 (x' - x)^2 + w_e |d x' - d x| + the quantizer's terms,   x' = D(code vectors of E(x))

- Pixels are counted as `systems.autoencoder` does; what the quantizer adds (commitment, entropy, ...) and how much of
  it, its own config says.
- A codebook of moving averages follows the features of every training pass, and codes out of use start again.
- A recipe takes the result as `init: {codec: runs/NAME/model#codec}`.
"""
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.document import Document
from diptych.parts.quantize import CodebookConfig, VectorConfig
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.autoencoder import Batch, Pictured, PicturesConfig, pixel_errors
from diptych.systems.base import Losses


@dataclass(frozen=True, kw_only=True)
class CodeTokenizerConfig(PicturesConfig):
    codec: VQTokenizerConfig


class CodeTokenizer(Pictured):
    Config = CodeTokenizerConfig
    config: CodeTokenizerConfig

    def __init__(self, config: CodeTokenizerConfig) -> None:
        super().__init__()
        self.config = self.built = config
        self.codec = VQTokenizer(config.codec)
        weights = config.codec.quantizer.weights
        self.terms = [name for name in ("codebook", "commitment", "entropy") if getattr(weights, name)]

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> CodeTokenizerConfig:
        """For tests: seconds on a CPU."""
        side = PyramidConfig(channels=16, channel_mult=(1, 1), blocks=(1, 1), attention=(), norm_groups=4)
        book = CodebookConfig(values=32, width=4, decay=0.9, restart=True)
        return CodeTokenizerConfig(codec=VQTokenizerConfig(encoder=side, decoder=side, latent_channels=16, patch=4,
                                                           quantizer=VectorConfig(codebook=book)))

    @classmethod
    def small(cls) -> CodeTokenizerConfig:
        """The zoo's `vq`: 64 px to 8 x 8 codes, 1.1M parameters, minutes on a CPU."""
        return CodeTokenizerConfig(codec=VQTokenizerConfig.small())

    @classmethod
    def paper(cls) -> CodeTokenizerConfig:
        """The network of LlamaGen's VQ-16. Its published weights were also trained adversarially, which this is not."""
        return CodeTokenizerConfig(codec=VQTokenizerConfig.paper())

    # -- training -----------------------------------------------------------------------------------------------------

    def collate(self, documents: Sequence[Document]) -> Batch:
        batch = super().collate(documents)
        return dataclasses.replace(batch, counts=batch.counts | dict.fromkeys(self.terms, float(batch.num_tokens)))

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """A forward pass with gradients also lets the codebook follow."""
        parts: dict[str, list[Tensor]] = {k: [] for k in batch.counts}
        for images in batch.groups:
            images, _ = self.varied(images, generator)
            features = self.codec.features(images)
            quantizer = self.codec.quantizer
            found = quantizer.follow(features, generator) if torch.is_grad_enabled() else quantizer(features)
            cells = features[:, 0].numel()
            terms = pixel_errors(self.codec.decode_vectors(found.vectors).float() - images)
            terms |= {name: value * cells for name, value in found.losses.items()}  # means count per cell
            for name, value in terms.items():
                parts[name].append(value)
        return self.losses(parts, batch, dict.fromkeys(self.terms, 1.0))  # already weighted

    # -- use ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, images: Tensor, batch: int = 64) -> Tensor:
        """Pictures (b, 3, h, w) in [-1, 1] through their codes and back, clamped."""
        parts = [self.codec.decode(self.codec.encode(p.to(self.device))) for p in images.split(batch)]
        return torch.cat(parts).float().clamp(-1, 1)
