"""Picture tokenizers for systems that draw by codes: 64 px to 8 x 8 codes, to 4 x 4 cells of 4 residual codes, or to
bits on six scales."""
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diptych import config
from diptych.benchmarks.reconstruction import psnr, there_and_back
from diptych.parts.quantize import Quantized, health
from diptych.parts.stored import eighth
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.zoo.build import Recipe
from diptych.zoo.codec import Pictured, agreement, outline_weight, pictures


class VQ(Pictured):
    """The codebook follows the features as moving averages, and codes that fall out of use start again; the last steps
    polish the decoder alone, on outlines of little contrast."""

    name = "vq"
    shape = VQTokenizerConfig.small()
    about = "8 x 8 codes out of 1,024, code vectors of width 8 and length 1"
    rule = ("0.25 commitment; the code vectors are moving averages (decay 0.99), and codes that fall out of use start "
            "again")
    defaults = Recipe(steps=3500, polish=800, batch=32, learning_rate=5e-3)

    def model(self) -> VQTokenizer:
        return VQTokenizer(self.shape)

    def matrices(self, model: nn.Module) -> list[str]:
        ends = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out", "quant", "post_quant")
        return [name for name, p in model.named_parameters() if p.ndim == 4 and not name.startswith(ends)]

    def loss(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        assert isinstance(model, VQTokenizer)
        images = self.batch(step)
        polish = step >= self.recipe.steps
        if polish:
            with torch.no_grad():
                quantized = model.quantizer(model.features(images))
        else:
            quantized = self.quantize(model, images, step)
        error = model.decode_vectors(quantized.vectors).float() - images
        weight = outline_weight(images) if polish else 1.0
        l1, l2 = (weight * error.abs()).mean(), (weight * error.square()).mean()
        total = l1 + 3 * l2 + (0 if polish else sum(quantized.losses.values()))
        used = torch.tensor(health(quantized.codes, self.values).use)
        return {"loss": total, "l1": l1, "mse": error.square().mean(), "use": used}

    def quantize(self, model: VQTokenizer, images: Tensor, step: int) -> Quantized:
        """The pass that trains, in which the codebook may follow."""
        return model.quantizer.follow(model.features(images), self.generator("restart", step))

    @property
    def values(self) -> int:
        """Of one code."""
        return self.shape.quantizer.build().codebook.values

    def store(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return eighth(tensors)

    def config(self, model: nn.Module) -> dict[str, Any]:
        assert isinstance(model, VQTokenizer)
        return config.to_dict(model.config)

    @staticmethod
    def restore(stored: dict[str, Any]) -> VQTokenizer:
        return VQTokenizer(config.from_dict(VQTokenizerConfig, stored, where="config of a zoo tokenizer"))

    def measure(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, VQTokenizer)
        out: dict[str, float] = {}
        for key, wide, split in (("mini", 0.0, "test"), ("pairs", 0.0, "pairs"), ("wide", 1.0, "test")):
            images = pictures(512, seed=self.seed, wide=wide, split=split)
            made = there_and_back(model, images)
            out[f"psnr_{key}"] = float(psnr(images, made.pictures).mean())
            if wide == 0:
                out[f"agreement_{key}"], out[f"certain_{key}"] = agreement(images, made.pictures)
            assert made.codes is not None
            found = health(made.codes, self.values)
            out |= {f"use_{key}": found.use, f"perplexity_{key}": found.perplexity}
        return out

    def card(self, cost: Mapping[str, Any], figures: Mapping[str, float]) -> str:
        return CARD.format(name=self.name, about=self.about, rule=self.rule, **cost, **figures)


class RQ(VQ):
    """As few cells as a codec's latents, and each described four times: what three codes leave over has a fourth."""

    name = "rq"
    shape = VQTokenizerConfig.residual()
    about = "4 x 4 cells of 4 residual codes each, all out of the same 1,024, code vectors of width 16"


class Bits(VQ):
    """Nothing is learnt about the codes: they are signs on scales from 1 x 1 to 8 x 8, each for what the coarser ones
    leave over. The entropy term wants single bits to be sure and all to be used."""

    name = "bits"
    shape = VQTokenizerConfig.bitwise()
    about = "130 cells of 12 bits in six scales, 1 x 1 to 8 x 8"
    rule = "0.25 commitment + 0.1 entropy; bits are signs of normalised features"

    def quantize(self, model: VQTokenizer, images: Tensor, step: int) -> Quantized:
        return model.quantizer(model.features(images))


CARD = """# {name}

A picture tokenizer of the world (`diptych.parts.vq.VQTokenizer`): 64 x 64 pixels to {about};
{parameters:,} parameters, {bytes:,} bytes in 8 bits.

- **Use**: `tokenizer = zoo.load("{name}")`; `codes = tokenizer.encode(images)` from pictures (b, 3, 64, 64) in [-1, 1];
  back with `tokenizer.decode(codes)`.
- **Data**: the pictures of `codec`: 24,000 of seed {seed}, half of the mini world (training split), half of a wide one,
  under the symmetries of the square.
- **Loss**: L1 + 3 MSE + {rule}. Muon and AdamW, {steps} steps of {batch}; then {polish} steps of the decoder alone with
  outlines of low contrast weighted up to 4.
- **Cost**: {seconds:.0f} s of training on one or two busy CPU cores in bfloat16, torch {torch}.

| measured on 512 held-out pictures each, weights as stored | PSNR dB | perceived the same | codes in use | perplexity |
|---|---|---|---|---|
| mini world, test split | {psnr_mini:.2f} | {agreement_mini:.1%} | {use_mini:.1%} | {perplexity_mini:.0f} |
| mini world, held-out pairs | {psnr_pairs:.2f} | {agreement_pairs:.1%} | {use_pairs:.1%} | {perplexity_pairs:.0f} |
| wide world, test split | {psnr_wide:.2f} | | {use_wide:.1%} | {perplexity_wide:.0f} |

Made and measured by `diptych zoo build {name}`.
"""
