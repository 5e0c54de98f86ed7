"""UniPic 2.0: queries read a frozen vision-language model for a diffusion transformer in two streams that draws and
edits (arXiv 2509.04548).

    picture, prompt, N queries -> language model (causal) -> states of the queries
    e = encoder(matrix(states));   condition = matrix(e),   pooled = matrix(mean e)
    [reference, noisy latents] beside the condition, one attention over all -> velocity;   pooled + time modulate
    L = mean |v(x_t, t, c) - (data - noise)|^2,   t logit-normal

- The picture to edit is also a reference ("Kontext"): clean latents in front of the noisy ones, with the same matrix,
  places and modulation, so that the transformer of Stable Diffusion 3.5 edits without new parameters, and still draws
  where there is no reference. It is a draw of the autoencoder from the picture, scaled to the size to draw; of several
  pictures the last.
- The language model is frozen by the recipe, so what it answers is untouched. Two stages lead to it: queries and
  connector alone under a frozen generator (`freeze: [generator, ...]`), then all three.
- Guidance: v0 + s (v - v0), where v0 reads `negative` or nothing in place of the instruction and keeps the picture.
- Controls: `references: 0` leaves edits to what the language model saw; `generator.dual: []`; `exports: context` with
  the states of the prompt; `drop_latent`.
- `Sampling.stochastic` draws by steps that have densities, for reinforcement learning (PDTR is no part of this file).

Differs from the paper: marks of this library's texts instead of the chat template, and an empty negative prompt unless
one is set; queries start at random, where the released class starts them at zero. Not given there and inferred: times
without a shift in training, the rate of dropped texts. The Kontext model by itself, without a language model, has the
same generator under conditions of CLIP and T5, which are no parts here. The small size has the trunk, tower and codec
of the zoo in the places of the hub models, and its generator starts fresh.
"""
from typing import Any

from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.blocks import BlockConfig
from diptych.parts.dit_joint import JointDitConfig
from diptych.parts.resources import stored_config
from diptych.parts.serial import PooledConnectorConfig
from diptych.parts.vae import AutoEncoderConfig
from diptych.parts.vision import VisionConfig
from diptych.parts.windows import WindowConfig
from diptych.systems.bagel import Sides
from diptych.systems.base import Sampling
from diptych.systems.metaquery import QWEN_MARKS
from diptych.systems.serial import Serial, SerialConfig, of_world

SHIFT, LEVELS = 3.0, 1000  # of Stable Diffusion 3's scheduler


class UniPic2(Serial):
    @classmethod
    def tiny(cls) -> SerialConfig:
        """For tests: seconds on a CPU."""
        return cls._world(
            block=_block(64, 2, 1, 32, 128), depth=2, queries=8, noised_copies=8,
            connector=PooledConnectorConfig(layers=1, width=64, heads=2, hidden=128, pooled_width=32),
            vision=VisionConfig(width=32, mlp_width=64, num_layers=1, num_heads=2, patch=8, max_side=8),
            generator=JointDitConfig(token_width=24, width=64, layers=2, heads=4, hidden=128, condition_width=48,
                                     pooled_width=32, dual=(0,), side=8, span=8),
            codec=AutoEncoderConfig(channels=16, channel_mult=(1, 1), num_res_blocks=1, latent_channels=6, patch=4,
                                    norm_groups=4, shift=0.0, scale=1.0))

    @classmethod
    def small(cls) -> SerialConfig:
        """The world at 64 px: 16 latent tokens, the zoo's language model with the tower of its `clip`; about 7M
        parameters are trained."""
        return cls._world(
            block=_block(192, 6, 2, 32, 448), depth=6, queries=16, noised_copies=4,
            connector=PooledConnectorConfig(layers=2, width=192, heads=6, hidden=480, pooled_width=192),
            vision=VisionConfig(**stored_config("zoo/clip")["vision"]),
            generator=JointDitConfig(token_width=24, width=192, layers=5, heads=6, hidden=480, condition_width=192,
                                     pooled_width=192, dual=(0, 1, 2), side=8, span=8),
            codec=AutoEncoderConfig(**stored_config("zoo/codec")))

    @classmethod
    def _world(cls, **sizes: Any) -> SerialConfig:
        return of_world(opening="none", references=1, latent_patch=2, noise_steps=0, drop_text=0.1, **sizes)

    @classmethod
    def paper(cls) -> SerialConfig:
        """UniPic2-Metaquery-9B: Qwen2.5-VL-7B, 24 layers of connector, Stable Diffusion 3.5 Medium at 512 px."""
        return SerialConfig(
            block=BlockConfig(width=3584, heads=28, kv_heads=4, head_dim=128, hidden=18944), depth=28,
            vocabulary_size=152064, tie_embeddings=False, rope_theta=1e6, rope_sections=(16, 24, 24), tokenizer="",
            marks=QWEN_MARKS, vision=WindowConfig(out_width=3584), features="causal", positions="spread", side=448,
            row=1024, queries=256, opening="none", connector=PooledConnectorConfig(), generator=JointDitConfig(),
            codec=AutoEncoderConfig(shift=0.0609, scale=1.5305), latent_patch=2, references=1, noise_steps=0,
            latent_sides=Sides(shortest=512, longest=512), picture=(512, 512), drop_text=0.1,
            sampling=sampling(SHIFT, LEVELS))


def sampling(shift: float, levels: int) -> Sampling:
    """As released: 50 evaluations, the last at the smallest of so many noise levels, which is shifted twice."""
    smallest = shift / (levels + shift - 1)
    return Sampling(evaluations=50, shift=shift, end=1 - smallest,
                    guidance=Guidance(branches=(Branch(context="no_text", scale=3.5),)))


def _block(width: int, heads: int, kv_heads: int, head_dim: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=hidden, qk_norm=True)
