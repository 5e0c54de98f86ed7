"""MetaQuery: learnt queries read a frozen multimodal language model for a diffusion transformer (arXiv 2504.06256).

    prompt, opening, N queries -> language model (causal) -> states of the queries
    states -> bidirectional encoder -> Linear, GELU, Linear, norm -> cross-attention of the generator
    L = mean |v(x_t, t, c) - (data - noise)|^2,   t uniform on a grid of 1000

- The language model is frozen by the recipe, so what it answers is untouched; gradients pass through it to the queries.
- Guidance: empty text, and where pictures are given also no picture: v0 + s_i (v1 - v0) + s_t (v2 - v1), which is the
  chain of the branches `no_text` with scale s_t / s_i and `no_image` with s_i.
- The generator is SANA: linear attention and convolutions, no positions, latents of a deep-compression codec.
- Controls: `exports: context` hands on the states of the prompt instead, `connector.order` projects before encoding.

Differs from the paper: queries are parameters of their own instead of rows of the vocabulary, so that weight decay
leaves the vocabulary alone; marks of this library's texts instead of the chat template; a picture that is dropped is
left out instead of black. The small size has the trunk, tower and codec of the zoo in the places of the hub models.
"""
from typing import Any

from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.blocks import BlockConfig
from diptych.parts.deep_codec import DeepCodecConfig
from diptych.parts.dit import DitConfig
from diptych.parts.interleave import Marks
from diptych.parts.resources import stored_config
from diptych.parts.serial import ConnectorConfig
from diptych.parts.vae import AutoEncoderConfig
from diptych.parts.vision import VisionConfig
from diptych.parts.windows import WindowConfig
from diptych.systems.bagel import Sides
from diptych.systems.base import Sampling
from diptych.systems.serial import Serial, SerialConfig, of_world

QWEN_MARKS = Marks(151644, 151645, 151652, 151653)  # im_start, im_end, vision_start, vision_end


class MetaQuery(Serial):
    @classmethod
    def tiny(cls) -> SerialConfig:
        """For tests: seconds on a CPU."""
        return cls._world(
            block=_block(64, 2, 1, 32, 128), depth=2, queries=8, noised_copies=8,
            connector=ConnectorConfig(layers=1, head_dim=32),
            vision=VisionConfig(width=32, mlp_width=64, num_layers=1, num_heads=2, patch=8, max_side=8),
            generator=DitConfig(token_width=24, width=64, layers=2, heads=4, hidden=128, condition_width=64,
                                cross_heads=4),
            codec=AutoEncoderConfig(channels=16, channel_mult=(1, 1), num_res_blocks=1, latent_channels=6, patch=4,
                                    norm_groups=4, shift=0.0, scale=1.0))

    @classmethod
    def small(cls) -> SerialConfig:
        """The world at 64 px: 16 latent tokens, the zoo's language model with the tower of its `clip`, about 10M
        parameters, of which 4M are trained."""
        return cls._world(
            block=_block(192, 6, 2, 32, 448), depth=6, queries=16, connector=ConnectorConfig(layers=2, head_dim=32),
            vision=VisionConfig(**stored_config("zoo/clip")["vision"]), noised_copies=4,
            generator=DitConfig(token_width=24, width=192, layers=6, heads=6, hidden=480, condition_width=192,
                                cross_heads=6),
            codec=AutoEncoderConfig(**stored_config("zoo/codec")))

    @classmethod
    def _world(cls, **sizes: Any) -> SerialConfig:
        return of_world(latent_patch=2, drop_text=0.1, drop_feature=0.1, **sizes)

    @classmethod
    def paper(cls) -> SerialConfig:
        """Size L: Qwen2.5-VL-3B, 24 layers of connector, SANA-1.6B at 512 px with its codec."""
        return SerialConfig(
            block=BlockConfig(width=2048, heads=16, kv_heads=2, head_dim=128, hidden=11008), depth=36,
            vocabulary_size=151936, rope_theta=1e6, rope_sections=(16, 24, 24), tokenizer="", marks=QWEN_MARKS,
            vision=WindowConfig(), features="causal", positions="spatial", side=448, row=1024, queries=256,
            connector=ConnectorConfig(), generator=DitConfig(), codec=DeepCodecConfig(),
            latent_sides=Sides(shortest=512, longest=512), picture=(512, 512), drop_text=0.1, drop_feature=0.1,
            whole_steps=True,
            sampling=Sampling(evaluations=30, shift=3.0, start=0.001, solver="multistep", guidance=Guidance(
                branches=(Branch(context="no_text", scale=3.0),))))


def _block(width: int, heads: int, kv_heads: int, head_dim: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=hidden, qk_norm=True)
