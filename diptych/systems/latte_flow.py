"""LaTtE-Flow: the layers of a network that draws by flow are shared out over time, so that a step of a drawing runs
through a part of them only (arXiv 2506.06952).

    read     embeddings of text and picture features -> all L layers                      text = head(h)
    draw     noised latents at time t -> the L / K layers of group floor(t K), each beside a layer of the reader, whose
             keys and values it sees -> velocity = latent_out(h)
    map      A_l = softmax(q k) + g_l(t) A_(l-1)     within a group; g one gate per head, from the time
    L = w_text CE(text) / n_text + w_image ||v(x_t, t) - (data - noise)||^2 / (n_noised d)

- A drawing of T steps costs T L / K evaluations of a layer instead of T L (`layer_evaluations`).
- Every layer of the reader has a twin of the same shape that draws, scaled and gated by the time ("couple"). The reader
  never sees what is drawn, and keeps all of its layers: each group needs its keys at its own depth.

`groups` = 1 is the control that runs all layers at every step, or with `twins` = L / K the first L / K of them, which
costs what a group costs.

No code is published. Differs from the paper: the variant that draws with the reader's own layers ("blend") is left
out; the tower of `paper()` is SigLIP's instead of Qwen2-VL's; maps are not carried over from one group to the next;
documents may hold several pictures, and what follows a drawn one reads its features.
"""
from dataclasses import dataclass, replace

from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.blocks import BlockConfig
from diptych.parts.deep_codec import DeepCodecConfig
from diptych.parts.experts import Coupling
from diptych.parts.interleave import GENERATE, Marks
from diptych.parts.positions import Rope
from diptych.parts.resources import stored_config
from diptych.parts.trunks import Trunk
from diptych.parts.vae import AutoEncoderConfig
from diptych.parts.vision import VisionConfig
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.base import Sampling
from diptych.systems.ports import Ports, PortsConfig


@dataclass(frozen=True, kw_only=True)
class LatteFlowConfig(PortsConfig):
    block: BlockConfig  # of the reader
    depth: int
    groups: int
    twins: int | None = None  # how many layers draw, from the first one on; None: all
    residual: bool = True  # whether attention maps are added up
    rope_theta: float = 1e6

    def __post_init__(self) -> None:
        twins = self.depth if self.twins is None else self.twins
        if self.block.modulated or self.groups < 1 or twins % self.groups or not 0 < twins <= self.depth:
            raise ValueError(f"expected a block that is not modulated and groups of equal size, "
                             f"got {twins} of {self.depth} layers in {self.groups} groups")


class LatteFlow(Ports):
    Config = LatteFlowConfig
    config: LatteFlowConfig
    copies = False

    def __init__(self, config: LatteFlowConfig, vocabulary: Vocabulary | None = None) -> None:
        c = config
        blocks = c.block, replace(c.block, modulated=True, residual=c.residual)
        rope = Rope(c.block.head_dim, c.rope_theta)
        super().__init__(c, lambda: Trunk(blocks, Coupling.timestep(c.depth, c.groups, c.twins), rope), vocabulary)
        self.initialise()

    def layer_evaluations(self, sampling: Sampling | None = None) -> int:
        """Layers that the latents of one picture go through while it is drawn, in each context."""
        return (sampling or self.default_sampling()).evaluations * self.trunk.coupling.layers_of(GENERATE)

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> LatteFlowConfig:
        """For tests: seconds on a CPU."""
        return cls._world(
            block=BlockConfig(width=64, heads=2, kv_heads=1, head_dim=32, hidden=128, qk_norm=True), depth=4, groups=2,
            vision=VisionConfig(width=32, mlp_width=64, num_layers=1, num_heads=2, patch=8, max_side=8),
            codec=AutoEncoderConfig(channels=16, channel_mult=(1, 1), num_res_blocks=1, latent_channels=6, patch=4,
                                    norm_groups=4, shift=0.0, scale=1.0))

    @classmethod
    def small(cls) -> LatteFlowConfig:
        """The world at 64 px, 16 latent tokens: 8 layers of width 192 that read, and as many in 4 groups that draw."""
        return cls._world(
            block=BlockConfig(width=192, heads=3, kv_heads=3, head_dim=64, hidden=512, qk_norm=True), depth=8, groups=4,
            vision=VisionConfig(**stored_config("zoo/clip")["vision"]),
            codec=AutoEncoderConfig(**stored_config("zoo/codec")))

    @classmethod
    def _world(cls, *, block: BlockConfig, depth: int, groups: int, vision: VisionConfig,
               codec: AutoEncoderConfig) -> LatteFlowConfig:
        return LatteFlowConfig(
            block=block, depth=depth, groups=groups, rope_theta=1e4, vocabulary_size=1024, tie_embeddings=True,
            tokenizer="zoo/tokenizer", vision=vision, feature_side=64, feature_merge=2, codec=codec, latent_side=64,
            latent_table_side=8, picture=(64, 64), row=128, noise_steps=1000,
            sampling=Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),))))

    @classmethod
    def paper(cls) -> LatteFlowConfig:
        """Qwen2-VL-2B, 28 layers in 4 groups; the deep codec of SANA at 256 px, 64 latent tokens."""
        return LatteFlowConfig(
            block=BlockConfig(width=1536, heads=12, kv_heads=2, head_dim=128, hidden=8960), depth=28, groups=4,
            vocabulary_size=151936, tie_embeddings=True, vision=VisionConfig.paper(), feature_merge=2,
            codec=DeepCodecConfig(), latent_side=256, latent_patch=1, latent_table_side=8, picture=(256, 256),
            noise_steps=1000,
            marks=Marks(151644, 151645, 151652, 151653), sampling=Sampling(evaluations=40, guidance=Guidance(
                branches=(Branch(context="no_text", scale=3.0),))))
