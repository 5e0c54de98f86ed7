"""The codec: a small KL autoencoder of the world, 64 px to 8 x 8 x 6 latents.

A system reads the latents as 64 tokens of 6 numbers, or patchified 2 x 2 as 16 tokens of 24 numbers. Latents have zero
mean and unit variance per channel over the training pictures; the statistics are part of the stored config.
"""
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.benchmarks.reconstruction import psnr, same_scenes, to_float, to_uint8
from diptych.parts.vae import AutoEncoder, AutoEncoderConfig
from diptych.world.render import render_uint8
from diptych.world.sample import Stream, sample_scene
from diptych.world.scene import COLORS, SHAPES, SIZES, TEXTURES, WORLDS, WorldConfig
from diptych.zoo.build import Ingredient, Recipe

CONFIG = AutoEncoderConfig(channels=64, channel_mult=(1, 1), num_res_blocks=2, latent_channels=6, patch=4,
                           norm_groups=16, shift=0.0, scale=1.0)

# Everything the world can show, denser and closer than any configured world: the codec is not one of `mini` alone.
WIDE = WorldConfig(name="codec", shapes=SHAPES, colors=tuple(COLORS), sizes=tuple(SIZES), rotated=True,
                   textures=("solid",) * 4 + TEXTURES, max_objects=6, gap=64, border=0, place_margin=0)
POOL = 24_000
NOISE = 0.45  # largest standard deviation of the noise on latents of unit variance that the decoder learns to undo
PIXELS = 64


def pictures(count: int, *, seed: int = 0, wide: float = 0.5, split: str = "train") -> Tensor:
    """World pictures, uint8 (count, 3, 64, 64): a share of WIDE scenes, the others from the mini world."""
    out = np.empty((count, 3, PIXELS, PIXELS), np.uint8)
    for index in range(count):
        world = WIDE if (index + 0.5) * wide % 1 >= 1 - wide else WORLDS["mini"]
        scene = sample_scene(world, Stream("codec", split, seed, index), split=split)
        out[index] = render_uint8(scene, PIXELS).transpose(2, 0, 1)
    return torch.from_numpy(out)


class Pictured(Ingredient):
    """What learns to redraw a pool of pictures, under the symmetries of the square; a tenth of every batch gets colours
    outside the palette."""

    def prepare(self) -> None:
        self.pool = pictures(min(POOL, self.recipe.steps * self.recipe.batch), seed=self.seed)

    def batch(self, step: int) -> Tensor:
        """Pictures of one step, float32 (b, 3, 64, 64)."""
        generator = self.generator("batch", step)
        chosen = torch.randint(len(self.pool), (self.recipe.batch,), generator=generator)
        images = to_float(self.pool[chosen])
        flip = torch.rand(3, generator=generator) < 0.5
        images = images.flip(-1) if flip[0] else images
        images = images.flip(-2) if flip[1] else images
        images = images.transpose(-1, -2) if flip[2] else images
        count = max(1, self.recipe.batch // 10)
        tint = torch.rand(count, 3, 3, generator=generator)  # random mixtures of the three channels
        images[:count] = torch.einsum("bij,bjhw->bihw", tint / tint.sum(-1, keepdim=True), images[:count])
        return images.contiguous()


class Codec(Pictured):
    """The last steps polish the decoder alone: on outlines of little contrast, where a loss in pixels is content early,
    and on noisy latents, as a model that draws makes them (arXiv 2510.11690 trains its decoders so)."""

    name = "codec"
    defaults = Recipe(steps=3500, polish=1200, batch=32, learning_rate=5e-3)

    def model(self) -> AutoEncoder:
        model = AutoEncoder(CONFIG)
        head = model.encoder.conv_out
        # Start almost without noise; the KL term then widens the posterior to what the decoder tolerates.
        assert head.bias is not None
        with torch.no_grad():
            head.bias[CONFIG.latent_channels:] = -8.0
            head.weight[CONFIG.latent_channels:] *= 0.1
        return model

    def matrices(self, model: nn.Module) -> list[str]:
        ends = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
        return [name for name, p in model.named_parameters() if p.ndim == 4 and not name.startswith(ends)]

    def loss(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        assert isinstance(model, AutoEncoder)
        images = self.batch(step)
        polish = step >= self.recipe.steps
        with torch.set_grad_enabled(not polish):
            posterior = model.encode(images)
            generator = self.generator("noise", step)
            latent = posterior.sample(generator)
            if polish:
                level = NOISE * torch.rand(len(latent), 1, 1, 1, generator=generator)
                spread = latent.std((0, 2, 3), keepdim=True)
                latent = latent + level * spread * torch.randn(latent.shape, generator=generator)
        error = model.decode(latent).float() - images
        weight = outline_weight(images) if polish else 1.0
        l1, l2 = (weight * error.abs()).mean(), (weight * error.square()).mean()
        kl = posterior.kl().mean()
        return {"loss": l1 + 3 * l2 + (0 if polish else 3e-4) * kl, "l1": l1, "kl": kl, "mse": error.square().mean()}

    def finish(self, model: nn.Module) -> AutoEncoder:
        """Fix the latent statistics per channel over training pictures."""
        assert isinstance(model, AutoEncoder)
        with torch.no_grad():
            means = torch.cat([model.encode(to_float(p)).mean for p in self.pool[:2048].split(128)])
        shift, deviation = means.mean((0, 2, 3)), means.std((0, 2, 3))
        return model.with_statistics(tuple(round(v, 6) for v in shift.tolist()),
                                     tuple(round(1 / v, 6) for v in deviation.tolist()))

    def config(self, model: nn.Module) -> dict[str, Any]:
        assert isinstance(model, AutoEncoder)
        return dataclasses.asdict(model.config)

    @staticmethod
    def restore(config: dict[str, Any]) -> AutoEncoder:
        return AutoEncoder(AutoEncoderConfig(**config))

    def measure(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, AutoEncoder)
        out = {}
        for key, wide, split in (("mini", 0.0, "test"), ("pairs", 0.0, "pairs"), ("wide", 1.0, "test")):
            images = pictures(512, seed=self.seed, wide=wide, split=split)
            redrawn = reconstruct(model, images)
            out[f"psnr_{key}"] = float(psnr(images, redrawn).mean())
            if wide == 0:
                out[f"agreement_{key}"], out[f"certain_{key}"] = agreement(images, redrawn)
            if key == "mini":
                out["agreement_noisy"], _ = agreement(images, reconstruct(model, images, noise=0.3))
        return out

    def card(self, cost: Mapping[str, Any], figures: Mapping[str, float]) -> str:
        return CARD.format(**cost, **figures)


def outline_weight(images: Tensor) -> Tensor:
    """(b, 1, h, w): 1 where a picture is flat; near an outline up to 4, the more the smaller its contrast."""
    high, low = (F.max_pool2d(s * images, 3, stride=1, padding=1) * s for s in (1, -1))
    contrast = (high - low).amax(1, keepdim=True)
    return torch.where(contrast < 0.02, 1.0, (2.4 / contrast.clamp_min(0.02)).clamp(1, 4))


@torch.no_grad()
def reconstruct(model: AutoEncoder, images: Tensor, noise: float = 0.0) -> Tensor:
    """uint8 pictures -> uint8 pictures through the latent mean, with noise of this deviation added to it."""
    out, generator = [], torch.Generator().manual_seed(0)
    for part in images.split(128):
        latent = model.latent(to_float(part))
        out.append(model.decode(latent + noise * torch.randn(latent.shape, generator=generator)))
    return to_uint8(torch.cat(out))


def agreement(images: Tensor, redrawn: Tensor) -> tuple[float, float]:
    """Share of pictures perceived the same before and after, among those where perception is certain of the original;
    and the share of certain ones."""
    verdicts = [v for v in same_scenes(images, redrawn) if v is not None]
    return sum(verdicts) / max(len(verdicts), 1), len(verdicts) / len(images)


CARD = """# codec

A KL autoencoder of the world (`diptych.parts.vae.AutoEncoder`, space-to-depth 4): 64 x 64 pixels to 8 x 8 x 6 latents,
{parameters:,} parameters, {bytes:,} bytes in bfloat16. Any picture with sides that are multiples of 8 works.

- **Use**: `codec = zoo.load("codec")`; `latent = codec.latent(images)` from pictures (b, 3, 64, 64) in [-1, 1];
  `codec.decode(latent)` back. Latents (b, 6, 8, 8) have zero mean and unit variance per channel; the statistics are in
  `codec.json` and never recomputed.
- **64 tokens of 6**: `patchify(latent, 1)`. **16 tokens of 24**: `patchify(latent, 2)`; back with `unpatchify`
  (`diptych.parts.vision`).
- **Data**: 24,000 world pictures of seed {seed}, half of the mini world (training split), half of a wide one: all 13
  shapes, 9 colours, 3 sizes, rotated, textured, 1 to 6 objects, close together. Flips and transposition; a tenth of
  every batch with mixed colour channels. Held-out combinations are never shown.
- **Loss**: L1 + 3 MSE + 3e-4 KL (mean over latent numbers, nats). Muon and AdamW, {steps} steps of {batch}; then
  {polish} steps of the decoder alone with outlines of low contrast weighted up to 4, on latents with noise of a
  deviation up to 0.45 of theirs: what a model draws is never exact.
- **Cost**: {seconds:.0f} s of training on one or two busy CPU cores in bfloat16, torch {torch}.

| measured on 512 held-out pictures each, weights as stored | PSNR dB | perceived the same |
|---|---|---|
| mini world, test split | {psnr_mini:.2f} | {agreement_mini:.1%} (certain of {certain_mini:.1%}) |
| mini world, held-out colour-shape pairs | {psnr_pairs:.2f} | {agreement_pairs:.1%} (certain of {certain_pairs:.1%}) |
| mini world, test split, noise of deviation 0.3 on the latents | | {agreement_noisy:.1%} |
| wide world, test split | {psnr_wide:.2f} | |

PSNR: mean over pictures of 8-bit reconstructions through the posterior mean. Perceived the same: `world.perceive` finds
the same background and, for every object, the same colour, shape and size, and the centre within 2 px.

Made and measured by `diptych zoo build codec`.
"""
