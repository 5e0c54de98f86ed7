"""HBridge: a language model that reads and a diffusion transformer that draws, each of its own width, joined in the
middle layers only (arXiv 2511.20520).

    reader   embeddings of text and picture features -> L layers                          text = head(h)
    painter  F layers of its own (the noise projector) -> L layers, scaled and gated by the time
             tokens: clean latents of pictures read, noised latents, S learnt tokens     velocity = latent_out(h)
    apart    the first M and the last N of the L layers: each expert attends to itself alone
    bridge   the others: q, k, v of the painter mapped into the reader's head space, one attention, mapped back
    L = w_text CE(text) / n_text + w_image |v(x_t, t) - (data - noise)|^2 / (n_noised d)
        + w_semantic mean(1 - cos(semantic_out(s_i), pooled features of the drawn picture, cell i))

- The reader never sees the painter: it answers as if that were not there, and its keys serve all steps of a drawing.
- M = N = 6 of 28 layers leaves 16 bridged ones: 43% less shared attention.
- The S tokens stand in the same block as the noised latents, which has to carry what the picture means.

No code or weights are published; what the paper leaves open follows BAGEL (arXiv 2505.14683): one position per picture,
tables of rows and columns, noised copies that nothing else sees. Order in a bridge: map, norm, rotation. Experts of one
head geometry need no maps; with a painter that is not modulated (the time is added to its tokens) and all layers
bridged this is BAGEL, but for what the reader sees.

Differs from the paper: the tower of `paper()` is SigLIP's instead of Qwen2.5-VL's; time enters as in Lumina (scale,
tanh gate); the painter is not a pretrained one.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.blocks import BlockConfig
from diptych.parts.experts import Coupling
from diptych.parts.interleave import GENERATE, Marks, Page
from diptych.parts.masks import interleaved, query_is, same
from diptych.parts.pictures import stack_by_size
from diptych.parts.positions import Rope, TimeEmbedding
from diptych.parts.resources import stored_config
from diptych.parts.tokens import Modality
from diptych.parts.trunks import Trunk
from diptych.parts.vae import AutoEncoderConfig
from diptych.parts.vision import VisionConfig
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.base import Sampling
from diptych.systems.batch import Batch
from diptych.systems.interleaved import Grid
from diptych.systems.ports import Ports, PortsConfig


@dataclass(frozen=True, kw_only=True)
class HBridgeConfig(PortsConfig):
    reader: BlockConfig
    painter: BlockConfig
    depth: int  # layers of the reader, and as many of the painter
    apart: tuple[int, int]  # of them, the first and the last ones that are not bridged
    front: int  # layers of the painter before them
    rope_theta: float = 1e6
    painter_theta: float = 1e4
    semantic_tokens: int = 16  # a square number, or 0
    semantic_weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "apart", tuple(self.apart))  # lists come from YAML
        if math.isqrt(self.semantic_tokens) ** 2 != self.semantic_tokens:
            raise ValueError(f"expected semantic_tokens to be a square number or 0, got {self.semantic_tokens}")
        if self.reader.modulated:
            raise ValueError("expected a reader that is not modulated by time, got one that is")


class HBridge(Ports):
    Config = HBridgeConfig
    config: HBridgeConfig
    mask = interleaved & (same("route") | query_is("route", GENERATE))

    def __init__(self, config: HBridgeConfig, vocabulary: Vocabulary | None = None) -> None:
        c = config
        ropes = Rope(c.reader.head_dim, c.rope_theta), Rope(c.painter.head_dim, c.painter_theta)
        coupling = Coupling.bridge(c.depth, *c.apart, before=c.front)
        super().__init__(config, lambda: Trunk((c.reader, c.painter), coupling, ropes), vocabulary)
        self.registers = c.semantic_tokens
        if c.semantic_tokens:
            self.semantic_tokens = nn.Parameter(0.02 * torch.randn(c.semantic_tokens, c.painter.width))
            self.semantic_out = nn.Linear(c.painter.width, c.vision.width)
        if not c.painter.modulated:
            self.time = TimeEmbedding(c.painter.width)
        self.initialise()

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> HBridgeConfig:
        """For tests: seconds on a CPU."""
        return cls._world(
            reader=BlockConfig(width=64, heads=2, kv_heads=1, head_dim=32, hidden=128, qk_norm=True),
            painter=_painter(width=48, heads=3, kv_heads=3, hidden=96), depth=4, apart=(1, 1), front=1,
            semantic_tokens=4,
            vision=VisionConfig(width=32, mlp_width=64, num_layers=1, num_heads=2, patch=8, max_side=8),
            codec=AutoEncoderConfig(channels=16, channel_mult=(1, 1), num_res_blocks=1, latent_channels=6, patch=4,
                                    norm_groups=4, shift=0.0, scale=1.0))

    @classmethod
    def small(cls) -> HBridgeConfig:
        """The world at 64 px, 16 latent tokens: 8 layers of width 192 read, 10 of width 256 draw, 4 are bridged."""
        return cls._world(
            reader=BlockConfig(width=192, heads=3, kv_heads=3, head_dim=64, hidden=512, qk_norm=True),
            painter=_painter(width=256, heads=8, kv_heads=4, hidden=640), depth=8, apart=(2, 2), front=2,
            semantic_tokens=16, vision=VisionConfig(**stored_config("zoo/clip")["vision"]),
            codec=AutoEncoderConfig(**stored_config("zoo/codec")))

    @classmethod
    def _world(cls, *, reader: BlockConfig, painter: BlockConfig, depth: int, apart: tuple[int, int], front: int,
               semantic_tokens: int, vision: VisionConfig, codec: AutoEncoderConfig) -> HBridgeConfig:
        return HBridgeConfig(
            reader=reader, painter=painter, depth=depth, apart=apart, front=front, semantic_tokens=semantic_tokens,
            rope_theta=1e4, vocabulary_size=1024, tie_embeddings=True, tokenizer="zoo/tokenizer", vision=vision,
            feature_side=64, feature_merge=2, codec=codec, latent_side=64, latent_table_side=8, picture=(64, 64),
            row=128, sampling=Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),))))

    @classmethod
    def paper(cls) -> HBridgeConfig:
        """Qwen2.5-VL-7B and OmniGen2's transformer of 32 layers, 4 of them in front; the FLUX codec."""
        return HBridgeConfig(
            reader=BlockConfig(width=3584, heads=28, kv_heads=4, head_dim=128, hidden=18944),
            painter=_painter(width=2520, heads=21, kv_heads=7, hidden=10240), depth=28, apart=(6, 6), front=4,
            vocabulary_size=152064, vision=VisionConfig.paper(), feature_merge=2, codec=AutoEncoderConfig.paper(),
            marks=Marks(151644, 151645, 151652, 151653), sampling=Sampling(evaluations=50, guidance=Guidance(
                branches=(Branch(context="no_text", scale=4.5), Branch(context="no_image", scale=1.5)))))

    # -- the network --------------------------------------------------------------------------------------------------

    def latent_tokens(self, x: Tensor, t: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Times are read by the blocks, or added as BAGEL adds the noise level."""
        embedded = super().latent_tokens(x, t, grids)
        return embedded if self.config.painter.modulated else embedded + self.time(1 - t).to(embedded.dtype)

    def states(self, page: Page, features: Tensor | None, drawn: Tensor | None) -> list[Tensor]:
        """Learnt tokens stand among the latents."""
        words, latents = super().states(page, features, drawn)
        kinds = page.tokens.modality.flatten()[page.tokens.routes(2)[GENERATE]]
        learnt = torch.nonzero(kinds == Modality.QUERY).squeeze(1)
        if not len(learnt):
            return [words, latents]
        own = self.semantic_tokens.repeat(len(learnt) // self.registers, 1).to(latents.dtype)
        both = latents.new_zeros(len(kinds), latents.shape[1]).index_copy(0, learnt, own)
        return [words, both.index_copy(0, torch.nonzero(kinds == Modality.LATENT).squeeze(1), latents)]

    def further(self, batch: Batch, hidden: Sequence[Tensor]) -> dict[str, tuple[float, Tensor]]:
        numbers = [i for i, noised in batch.latents if noised]
        if not numbers or not self.registers:
            return {}
        said = self.semantic_out(self.of_kind(hidden, batch.page.tokens, Modality.QUERY)).float()
        once = list(dict.fromkeys(numbers))  # copies of a picture mean the same
        meant = self.meanings([batch.pictures[i] for i in once])[[once.index(i) for i in numbers]].flatten(0, 1)
        return {"semantic": (self.config.semantic_weight, 1 - F.cosine_similarity(said, meant, dim=-1))}

    @torch.no_grad()
    def meanings(self, pictures: Sequence[Tensor]) -> Tensor:
        """Features of the tower, pooled to as many cells as there are learnt tokens: (p, S, d) float32."""
        side, out = math.isqrt(self.registers), dict[int, Tensor]()
        for numbers, batch in stack_by_size([self.views(p)[0] for p in pictures]):
            rows = batch.shape[2] // self.config.vision.patch
            features = self.vision.encode(batch.to(self.embed.weight.dtype)).float().transpose(1, 2)
            pooled = F.adaptive_avg_pool2d(features.unflatten(2, (rows, -1)), side)
            out |= zip(numbers, pooled.flatten(2).transpose(1, 2), strict=True)
        return torch.stack([out[i] for i in range(len(pictures))])


def _painter(*, width: int, heads: int, kv_heads: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=kv_heads, head_dim=width // heads, hidden=hidden,
                       qkv_bias=False, qk_norm=True, modulated=True)
