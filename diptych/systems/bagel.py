"""BAGEL: a mixture of transformers that reads text and pictures and draws by flow (arXiv 2505.14683).

    L = w_ce CE(text) / n_text + w_mse ||v(x_t, t) - (data - noise)||^2 / (n_noised d)

- One packed sequence of text, semantic features (a SigLIP-like tower) and codec latents; attention is joint over all.
- Every parameter of the trunk exists twice: text and features use one set, latents (clean or noised) the other.
- A picture to draw is a noised copy that nothing else sees; if more follows, a clean copy and its features come after.
- Time enters as a sum of sinusoid MLP and latent token; no adaptive norms.

Differs from the paper: `feature_merge` > 1 concatenates neighbouring features before the connector (the bundled model
uses 2; the paper 1), boxes are written with location tokens, condition dropping is per document.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.experts import Coupling
from diptych.parts.interleave import Marks
from diptych.parts.pictures import fit_sides
from diptych.parts.positions import Rope, TimeEmbedding, sincos_2d
from diptych.parts.resources import stored_config
from diptych.parts.trunks import Trunk
from diptych.parts.vae import AutoEncoder, AutoEncoderConfig
from diptych.parts.vision import Connector, VisionConfig, VisionTransformer, merged_features, position_ids
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.base import Sampling
from diptych.systems.interleaved import Grid, Interleaved, LatentsConfig


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Pictures are scaled so that the long side is at most `longest` and the short one at least `shortest` where
    both are possible, then rounded to the tower's or codec's stride."""

    shortest: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class BagelConfig(LatentsConfig):
    block: BlockConfig
    depth: int
    coupling: str = "mixture"  # or "dense", "feed_forward": the paper's controls
    rope_theta: float = 1e6
    feature_sides: Sides = Sides(shortest=224, longest=980)
    codec: AutoEncoderConfig
    latent_sides: Sides = Sides(shortest=512, longest=1024)
    drop_latent: float = 0.3
    drop_feature: float = 0.3


class Bagel(Interleaved):
    Config = BagelConfig
    config: BagelConfig

    def __init__(self, config: BagelConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        c = self.config = config
        if vocabulary is None and c.tokenizer:
            vocabulary = Vocabulary(c.tokenizer)
        self.vocabulary = vocabulary
        width, merge = c.block.width, c.feature_merge
        self.embed = nn.Embedding(c.vocabulary_size, width)
        self.trunk = Trunk(c.block, Coupling.named(c.coupling, c.depth), Rope(c.block.head_dim, c.rope_theta))
        self.head = nn.Linear(width, c.vocabulary_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        self.vision = VisionTransformer(c.vision)
        self.connector = Connector(c.vision.width * merge**2, width)
        self.codec = AutoEncoder(c.codec).requires_grad_(False)
        self.token_width = c.codec.latent_channels * c.latent_patch**2
        self.noised_copies = c.noised_copies
        self.latent_in = nn.Linear(self.token_width, width)
        self.latent_out = nn.Linear(width, self.token_width)
        self.time = TimeEmbedding(width)
        self.register_buffer("feature_table", sincos_2d(width, c.vision.max_side), persistent=False)
        self.register_buffer("latent_table", sincos_2d(width, c.latent_table_side), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        normal_weights(m for name, m in self.named_modules() if not name.startswith(("codec", "vision")))
        nn.init.zeros_(self.latent_out.weight)  # a fresh model predicts zero velocity, as released

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> BagelConfig:
        """For tests: seconds on a CPU."""
        return cls._world(width=64, heads=2, kv_heads=1, head_dim=32, hidden=128, depth=2,
                          vision=VisionConfig(width=32, mlp_width=64, num_layers=1, num_heads=2, patch=8, max_side=8),
                          codec=AutoEncoderConfig(channels=16, channel_mult=(1, 1), num_res_blocks=1, latent_channels=6,
                                                  patch=4, norm_groups=4, shift=0.0, scale=1.0))

    @classmethod
    def small(cls) -> BagelConfig:
        """The bundled model: the world at 64 px, 16 latent tokens, about 10M parameters."""
        return cls._world(width=256, heads=4, kv_heads=2, head_dim=64, hidden=640, depth=6,
                          vision=VisionConfig(**stored_config("zoo/clip")["vision"]),
                          codec=AutoEncoderConfig(**stored_config("zoo/codec")))

    @classmethod
    def _world(cls, *, width: int, heads: int, kv_heads: int, head_dim: int, hidden: int, depth: int,
               vision: VisionConfig, codec: AutoEncoderConfig) -> BagelConfig:
        sides = Sides(shortest=64, longest=64)
        return BagelConfig(
            block=BlockConfig(width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=hidden,
                              qkv_bias=True, qk_norm=True),
            depth=depth, rope_theta=1e4, vocabulary_size=1024, tie_embeddings=True, tokenizer="zoo/tokenizer",
            vision=vision, feature_sides=sides, feature_merge=2, latent_sides=sides, latent_table_side=8,
            picture=(64, 64),
            codec=codec, drop_latent=0.1, drop_feature=0.1, row=128,
            sampling=Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),))))

    @classmethod
    def paper(cls) -> BagelConfig:
        """BAGEL-7B-MoT: Qwen2.5-7B twice, SigLIP2-so400m, the FLUX codec (released `llm_config.json`)."""
        return BagelConfig(
            block=BlockConfig(width=3584, heads=28, kv_heads=4, head_dim=128, hidden=18944, qkv_bias=True,
                              qk_norm=True),
            depth=28, rope_theta=1e6, vocabulary_size=152064, vision=VisionConfig.paper(),
            codec=AutoEncoderConfig.paper(), marks=Marks(151644, 151645, 151652, 151653),
            sampling=Sampling(evaluations=49, shift=3.0, guidance=Guidance(
                branches=(Branch(context="no_text", scale=4.0, renorm="global"),), interval=(0.0, 0.6))))

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    @property
    def stride(self) -> int:
        return self.config.codec.downsample * self.config.latent_patch

    @property
    def latent_patch(self) -> int:
        return self.config.latent_patch

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        coded = fit_sides(pixels, c.latent_sides.shortest, c.latent_sides.longest, self.stride)
        # the release shows the tower the picture as it was scaled for the codec
        seen = fit_sides(coded, c.feature_sides.shortest, c.feature_sides.longest, c.vision.patch * c.feature_merge)
        return seen, coded

    def feature_count(self, view: Tensor) -> int:
        side = self.config.vision.patch * self.config.feature_merge
        return (view.shape[1] // side) * (view.shape[2] // side)

    # -- the network --------------------------------------------------------------------------------------------------

    def see(self, views: Sequence[Tensor]) -> Tensor:
        c, table = self.config, cast(Tensor, self.feature_table)
        features, grids = merged_features(self.vision, views, c.feature_merge)
        ids = self._ids(grids, c.vision.max_side, c.vision.interpolate)
        return self.connector(features) + table[ids].to(features.dtype)

    def latent_tokens(self, x: Tensor, t: Tensor, grids: Sequence[Grid]) -> Tensor:
        """The time embedding of the release counts noise, hence 1 - t."""
        table = cast(Tensor, self.latent_table)
        ids = self._ids(grids, self.config.latent_table_side, self.config.vision.interpolate)
        embedded = self.latent_in(x.to(self.latent_in.weight.dtype))
        return embedded + self.time(1 - t).to(embedded.dtype) + table[ids].to(embedded.dtype)

    def _ids(self, grids: Sequence[Grid], side: int, interpolate: bool) -> Tensor:
        known = {g: position_ids(g, side, interpolate=interpolate, device=self.device) for g in set(grids)}
        return torch.cat([known[g] for g in grids])
