"""What systems share whose network reads features of a tower and draws latents of a codec, both placed by fixed tables
of rows and columns, while its blocks read the time: HBridge, LaTtE-Flow. What lies between the ends is the system's.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from diptych.parts.blocks import normal_weights
from diptych.parts.pictures import fit_sides
from diptych.parts.positions import sincos_2d
from diptych.parts.trunks import Trunk
from diptych.parts.vision import Connector, VisionTransformer, merged_features, position_ids
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.interleaved import Grid, Interleaved, LatentsConfig


@dataclass(frozen=True, kw_only=True)
class PortsConfig(LatentsConfig):
    feature_side: int = 980  # pixels of the long side of pictures to read, at most
    latent_side: int = 1024  # pixels of the long side of pictures for the codec, at most
    spread_tables: bool = False  # whether small grids spread over the whole tables of positions


class Ports(Interleaved):
    config: PortsConfig

    def __init__(self, config: PortsConfig, trunk: Callable[[], Trunk], vocabulary: Vocabulary | None = None) -> None:
        """Subclasses call `initialise` when they are complete."""
        super().__init__()
        c = self.config = config
        self.vocabulary = Vocabulary(c.tokenizer) if vocabulary is None and c.tokenizer else vocabulary
        self.noised_copies, self.latent_patch = c.noised_copies, c.latent_patch
        network = trunk()
        width, inner = network.widths
        self.embed, self.head = nn.Embedding(c.vocabulary_size, width), nn.Linear(width, c.vocabulary_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        self.trunk = network
        self.vision = VisionTransformer(c.vision)
        self.connector = Connector(c.vision.width * c.feature_merge**2, width)
        self.codec = c.codec.build().requires_grad_(False)
        self.token_width = c.codec.latent_channels * c.latent_patch**2
        self.latent_in, self.latent_out = nn.Linear(self.token_width, inner), nn.Linear(inner, self.token_width)
        self.register_buffer("feature_table", sincos_2d(width, c.vision.max_side), persistent=False)
        self.register_buffer("latent_table", sincos_2d(inner, c.latent_table_side), persistent=False)

    def initialise(self) -> None:
        """Maps between head spaces and gates keep what they start with; a fresh model predicts zero velocity."""
        normal_weights(m for name, m in self.named_modules() if not name.startswith(("codec", "vision"))
                       and not any(part in name for part in (".there", ".back", ".modulation", ".residual")))
        nn.init.zeros_(self.latent_out.weight)

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    @property
    def stride(self) -> int:
        return self.config.codec.downsample * self.config.latent_patch

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        c, side = self.config, self.config.vision.patch * self.config.feature_merge
        return fit_sides(pixels, side, c.feature_side, side), fit_sides(pixels, self.stride, c.latent_side, self.stride)

    def feature_count(self, view: Tensor) -> int:
        side = self.config.vision.patch * self.config.feature_merge
        return (view.shape[1] // side) * (view.shape[2] // side)

    # -- the ends of the network --------------------------------------------------------------------------------------

    def see(self, views: Sequence[Tensor]) -> Tensor:
        features, grids = merged_features(self.vision, views, self.config.feature_merge)
        places = self._places("feature_table", grids, self.config.vision.max_side)
        return self.connector(features) + places.to(features.dtype)

    def latent_tokens(self, x: Tensor, t: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Times are read by the blocks."""
        embedded = self.latent_in(x.to(self.latent_in.weight.dtype))
        return embedded + self._places("latent_table", grids, self.config.latent_table_side).to(embedded.dtype)

    def _places(self, table: str, grids: Sequence[Grid], side: int) -> Tensor:
        rows = cast(Tensor, getattr(self, table))
        spread = self.config.spread_tables
        return torch.cat([rows[position_ids(g, side, interpolate=spread, device=rows.device)] for g in grids])
