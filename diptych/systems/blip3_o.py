"""BLIP3-o: queries read a frozen vision-language model for a flow over CLIP features, which a decoder turns into pixels
(arXiv 2505.09568).

    prompt, image start, N queries -> language model (causal) -> states of the queries = the condition
    L = mean |v(x_t, t, c) - (data - noise)|^2 over pooled features,   t uniform on a grid of 1000
    L_pixels = mean |D(features) - x|^2, for the decoder alone

- What is drawn are 64 semantic vectors of EVA-CLIP, raw; only then pixels. Their number does not grow with the picture.
- Sequential training: the language model is frozen by the recipe and its answers stay what they were. Joint training,
  the paper's control, is the same system with another freeze list.
- The generator adds gated cross-attention to self-attention (Lumina-Next); guidance is against a condition of zeros.
- Controls: `codec` with latents of an autoencoder instead of features; `objective: regression` for features that are
  said at once, without noise.

Differs from the paper: the decoder is convolutional and learns by squared error, where the paper finetunes SDXL, which
is no part of the published size here; marks of this library's texts instead of the chat template. The small size draws
features of the zoo's `clip`, which its language model also reads, and its generator has a table of positions.
"""
from typing import Any

from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.blocks import BlockConfig
from diptych.parts.dit_gated import GatedDitConfig
from diptych.parts.feature_codec import FeatureCodecConfig
from diptych.parts.resources import stored_config
from diptych.parts.serial import ConnectorConfig
from diptych.parts.towers import TowerConfig
from diptych.parts.vision import VisionConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.parts.windows import WindowConfig
from diptych.systems.bagel import Sides
from diptych.systems.base import Sampling
from diptych.systems.metaquery import QWEN_MARKS
from diptych.systems.serial import Serial, SerialConfig, of_world

NOTHING = ConnectorConfig(layers=0, projection="none", gain=None)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Blip3o(Serial):
    @classmethod
    def tiny(cls) -> SerialConfig:
        """For tests: seconds on a CPU."""
        vision = VisionConfig(width=32, mlp_width=64, num_layers=1, num_heads=2, patch=8, max_side=8)
        return cls._world(
            block=_block(64, 2, 1, 32, 128), depth=2, queries=8, noised_copies=8, vision=vision,
            generator=GatedDitConfig(token_width=32, width=64, layers=2, heads=4, hidden=128, condition_width=64,
                                     time_width=64, side=4),
            codec=FeatureCodecConfig(tower=vision, pool=2, decoder=PyramidConfig(
                channels=16, channel_mult=(1, 1), blocks=(1, 1), attention=(), mid_attention=False, norm_groups=4)))

    @classmethod
    def small(cls) -> SerialConfig:
        """The world at 64 px: 16 vectors, the zoo's language model with the tower of its `clip`."""
        vision = VisionConfig(**stored_config("zoo/clip")["vision"])
        return cls._world(
            block=_block(192, 6, 2, 32, 448), depth=6, queries=16, vision=vision, noised_copies=4,
            generator=GatedDitConfig(token_width=vision.width, width=192, layers=6, heads=6, hidden=512,
                                     condition_width=192, time_width=192, side=4),
            codec=FeatureCodecConfig(tower=vision, pool=2, decoder=PyramidConfig(
                channels=64, channel_mult=(1, 1, 2), blocks=(1, 1, 2), attention=(2,), norm_groups=16)))

    @classmethod
    def _world(cls, **sizes: Any) -> SerialConfig:
        return of_world(opening="mark", connector=NOTHING, null="zeros", drop_condition=0.1, **sizes)

    @classmethod
    def paper(cls) -> SerialConfig:
        """BLIP3-o-8B: Qwen2.5-VL-7B, the features of EVA-CLIP-E/14-plus at 448 px, a flow of 1.4B parameters."""
        return SerialConfig(
            block=BlockConfig(width=3584, heads=28, kv_heads=4, head_dim=128, hidden=18944), depth=28,
            vocabulary_size=152064, tie_embeddings=False, rope_theta=1e6, rope_sections=(16, 24, 24), tokenizer="",
            marks=QWEN_MARKS, vision=WindowConfig(out_width=3584), features="causal", positions="spread", side=448,
            row=512, queries=64, opening=151665, connector=NOTHING, generator=GatedDitConfig(),
            codec=FeatureCodecConfig(tower=TowerConfig(
                width=1792, mlp_width=15360, layers=64, heads=16, patch=14, side=32, gelu="exact", class_token=True,
                norm_behind=True), pool=4, mean=CLIP_MEAN, std=CLIP_STD),
            latent_sides=Sides(shortest=448, longest=448), picture=(448, 448), null="zeros", drop_condition=0.1,
            whole_steps=True,
            sampling=Sampling(evaluations=30, guidance=Guidance(branches=(Branch(context="no_text", scale=3.0),))))


def _block(width: int, heads: int, kv_heads: int, head_dim: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=hidden, qk_norm=True)
