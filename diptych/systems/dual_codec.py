"""A tokenizer with two views of a picture under one index, trained on the pictures of documents: what TokenFlow takes.
A tool for systems, not a paper; the losses are those of TokenFlow (arXiv 2412.03069, section 3.1).

    pixels     w_1 |x' - x| + w_2 (x' - x)^2 + w_e |d x' - d x|,    x' from the pixel half alone
    semantic   w_s (1 - cos(features', features of a frozen teacher)),   features' from the semantic half alone
    codebook, commitment    |q - sg z|^2 + 0.25 |sg q - z|^2, means over the scales and over both halves

- Every term is a mean over its own numbers: pixels, differences of neighbouring pixels, cells.
- Which half finds the index is told by the weights of the codebook's distances, `codec.quantizer.codebook.weights`:
  [1, 1] shares it, [0, 1] is a tokenizer of pixels and [1, 0] one of meaning. Without `semantic_weight` nothing is
  taught, and what only that term would train stands still.
- With probability `drop_scale` a step leaves out one scale, never the first.

Differs from the paper: no perceptual and no adversarial loss; errors of neighbouring pixels instead.
"""
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.document import Document
from diptych.parts.feature_codec import FeatureCodec, FeatureCodecConfig
from diptych.parts.quantize import Grid, ResidualConfig
from diptych.parts.semantic import DualTokenizer, DualTokenizerConfig
from diptych.systems.autoencoder import Batch, Pictured, PicturesConfig, pixel_errors
from diptych.systems.base import Losses
from diptych.systems.tokenflow import TokenFlow, clip_b, small_codec


@dataclass(frozen=True, kw_only=True)
class DualCodecConfig(PicturesConfig):
    codec: DualTokenizerConfig
    teacher: FeatureCodecConfig  # its tower with the statistics of its pixels; `pool` 1
    semantic_weight: float = 1.0
    drop_scale: float = 0.1

    def __post_init__(self) -> None:
        ours, theirs = ((c.downsample, w) for c, w in ((self.codec, self.codec.feature_width),
                                                       (self.teacher, self.teacher.latent_channels)))
        if ours != theirs:
            raise ValueError(f"expected a teacher with the codec's stride and feature_width, {ours}, got {theirs}")
        if self.drop_scale and not getattr(self.codec.quantizer, "scales", ()):
            raise ValueError("expected scales to leave one out, got none; fix: set drop_scale to 0")


class DualCodec(Pictured):
    Config = DualCodecConfig
    config: DualCodecConfig

    def __init__(self, config: DualCodecConfig) -> None:
        super().__init__()
        c = self.config = self.built = config
        self.codec = DualTokenizer(c.codec)
        self.teacher = FeatureCodec(c.teacher).requires_grad_(False)
        if not c.semantic_weight:
            for part in (self.codec.semantic_decoder, self.codec.decode_task):
                part.requires_grad_(False)

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> DualCodecConfig:
        """For tests: seconds on a CPU."""
        codec = TokenFlow.tiny().codec
        return DualCodecConfig(codec=codec, teacher=FeatureCodecConfig(tower=codec.semantic_encoder, pool=1))

    @classmethod
    def small(cls) -> DualCodecConfig:
        """The tokenizer of TokenFlow's `small`, taught by the zoo's contrastive tower."""
        codec = small_codec()
        return DualCodecConfig(codec=codec, teacher=FeatureCodecConfig(tower=codec.semantic_encoder, pool=1))

    @classmethod
    def paper(cls) -> DualCodecConfig:
        """The CLIP-B tokenizer. Its teacher here gives features of the patches, the published one those projected to
        the space of the texts."""
        codec = dataclasses.replace(clip_b(), feature_width=768)
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pixels
        return DualCodecConfig(codec=codec, teacher=FeatureCodecConfig(tower=codec.semantic_encoder, pool=1, mean=mean,
                                                                       std=std))

    # -- training -----------------------------------------------------------------------------------------------------

    def collate(self, documents: Sequence[Document]) -> Batch:
        batch = super().collate(documents)
        names = [*(["semantic"] if self.config.semantic_weight else []), *self._distances()]
        return dataclasses.replace(batch, counts=batch.counts | {name: float(batch.num_tokens) for name in names})

    def _distances(self) -> list[str]:
        """The terms of the quantizer that count."""
        weights = self.config.codec.quantizer.weights
        return [name for name in ("codebook", "commitment", "entropy") if getattr(weights, name)]

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        parts: dict[str, list[Tensor]] = {k: [] for k in batch.counts}
        for images in batch.groups:
            images, _ = self.varied(images, generator)
            views = self.codec(images, self._scales(generator))
            terms = pixel_errors(views.pixels.float() - images)
            cells = views.features.shape[0] * views.features.shape[1]
            terms |= {name: value * cells for name, value in views.quantized.losses.items()}  # means count per cell
            if self.config.semantic_weight:
                with torch.no_grad():
                    wanted = self.teacher.features(images).flatten(2).transpose(1, 2)
                terms["semantic"] = (1 - F.cosine_similarity(views.features.float(), wanted.float(), dim=-1)).sum()
            for name, value in terms.items():
                parts[name].append(value)
        weights = {"semantic": self.config.semantic_weight} | dict.fromkeys(self._distances(), 1.0)  # already applied
        return self.losses(parts, batch, weights)

    def _scales(self, generator: torch.Generator) -> list[Grid] | None:
        """Those of one step: all, or all but one."""
        c = self.config
        if not c.drop_scale:
            return None
        assert isinstance(c.codec.quantizer, ResidualConfig)
        scales = list(c.codec.quantizer.scales)
        chance, which = torch.rand(2, generator=generator, device=generator.device).tolist()
        if chance < c.drop_scale:
            del scales[1 + int(which * (len(scales) - 1))]
        return scales

    # -- use ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, images: Tensor, batch: int = 64) -> Tensor:
        """Pictures (b, 3, h, w) in [-1, 1] through their codes and back, clamped."""
        parts = [self.codec.decode(self.codec.encode(p.to(self.device))) for p in images.split(batch)]
        return torch.cat(parts).float().clamp(-1, 1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the codes of pictures say, both halves (b, c, rows, columns)."""
        return self.codec.quantize(images.to(self.device)).vectors.float()
