"""A language model that may read pictures: a dense Qwen-style trunk, optionally with features of a vision tower.

Not a paper but the role that systems fill with Qwen, LLaVA or Qwen-VL: text out, pictures and text in. Without `vision`
it is a plain language model; a model with `vision` starts from the trunk of one without.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from diptych.document import Document, Image
from diptych.objectives import next_token
from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.experts import Coupling
from diptych.parts.interleave import IGNORE, Page
from diptych.parts.pictures import fit_sides, merge_grid, stack_by_size
from diptych.parts.positions import Rope, sincos_2d
from diptych.parts.resources import stored_config
from diptych.parts.trunks import Trunk
from diptych.parts.vision import Connector, VisionConfig, VisionTransformer, position_ids
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.base import Emit, Losses, Program, Sampling, StepLogProbs
from diptych.systems.interleaved import Batch, Grid, Interleaved

NO_PICTURE = "expected text or boxes as targets of a language model, got a picture to draw"


@dataclass(frozen=True, kw_only=True)
class VlmConfig:
    block: BlockConfig
    depth: int
    vocabulary_size: int
    rope_theta: float = 1e4
    tokenizer: str = "zoo/tokenizer"
    vision: VisionConfig | None = None
    side: int = 64  # pictures are scaled to fit a square of this side, in pixels
    merge: int = 2  # n x n neighbouring features become one token
    row: int = 128
    drop_text: float = 0.0
    drop_latent: float = 0.0
    drop_feature: float = 0.0
    sampling: Sampling = field(default_factory=Sampling)


class Vlm(Interleaved):
    Config = VlmConfig
    config: VlmConfig
    draws = False
    latent_patch = 1
    stride = 1

    def __init__(self, config: VlmConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        c = self.config = config
        self.vocabulary = Vocabulary(c.tokenizer) if vocabulary is None else vocabulary
        width = c.block.width
        self.embed = nn.Embedding(c.vocabulary_size, width)
        self.trunk = Trunk(c.block, Coupling.dense(c.depth, 2), Rope(c.block.head_dim, c.rope_theta))
        self.head = nn.Linear(width, c.vocabulary_size, bias=False)
        self.head.weight = self.embed.weight
        if c.vision is not None:
            self.vision = VisionTransformer(c.vision)
            self.connector = Connector(c.vision.width * c.merge**2, width)
            self.register_buffer("feature_table", sincos_2d(width, c.vision.max_side), persistent=False)
        normal_weights(m for name, m in self.named_modules() if not name.startswith("vision"))

    @classmethod
    def tiny(cls) -> VlmConfig:
        """For tests, with a tower."""
        return VlmConfig(block=_block(48, 3, 1, 16, 96), depth=2, vocabulary_size=1024,
                         vision=VisionConfig(width=32, mlp_width=64, num_layers=1, num_heads=2, patch=8, max_side=8))

    @classmethod
    def small(cls) -> VlmConfig:
        """The zoo's `vlm`: the zoo's `lm` with the tower of its `clip`."""
        return replace(cls.language(), vision=VisionConfig(**stored_config("zoo/clip")["vision"]))

    @classmethod
    def language(cls) -> VlmConfig:
        """The zoo's `lm`: 2.5M parameters, text only."""
        return VlmConfig(block=_block(192, 6, 2, 32, 448), depth=6, vocabulary_size=1024)

    @classmethod
    def paper(cls) -> VlmConfig:
        """The language model of Qwen2.5-0.5B, the smallest that papers in the table take from the hub."""
        return VlmConfig(block=BlockConfig(width=896, heads=14, kv_heads=2, head_dim=64, hidden=4864), depth=24,
                         vocabulary_size=151936, rope_theta=1e6)

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.vision is None:
            raise ValueError("expected a document without pictures for a text-only model, got an image; "
                             "fix: use a model with a vision tower")
        seen = fit_sides(pixels, self.config.side, self.config.side, self.config.vision.patch * self.config.merge)
        return seen, seen

    def feature_count(self, view: Tensor) -> int:
        assert self.config.vision is not None
        side = self.config.vision.patch * self.config.merge
        return (view.shape[1] // side) * (view.shape[2] // side)

    # -- the network --------------------------------------------------------------------------------------------------

    def see(self, views: Sequence[Tensor]) -> Tensor:
        assert self.config.vision is not None
        merge, out = self.config.merge, []
        for numbers, batch in stack_by_size(list(views)):
            grid = (batch.shape[2] // self.config.vision.patch, batch.shape[3] // self.config.vision.patch)
            features = self.vision.encode(batch.to(self.embed.weight.dtype))
            features = self.connector(merge_grid(features, grid, merge))
            cells = (grid[0] // merge, grid[1] // merge)
            ids = position_ids(cells, self.config.vision.max_side, device=features.device)
            features = features + cast(Tensor, self.feature_table)[ids].to(features.dtype)
            out += zip(numbers, features, strict=True)
        return torch.cat([f for _, f in sorted(out, key=lambda pair: pair[0])])

    def latent_tokens(self, x: Tensor, t: Tensor, grids: Sequence[Grid]) -> Tensor:
        raise ValueError(NO_PICTURE)

    def program(self, document: Document, sampling: Sampling, generator: torch.Generator, emit: Emit) -> Program:
        if any(isinstance(p, Image) for p in document.targets):
            raise ValueError(NO_PICTURE)
        return super().program(document, sampling, generator, emit)

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        if batch.latents:
            raise ValueError(NO_PICTURE)
        hidden, labels = self._hidden(batch.page, batch.views)
        rows = torch.nonzero(labels != IGNORE).squeeze(1)
        error = next_token.cross_entropy(self.head(hidden[rows]), labels[rows]).sum()
        return Losses({"text": error}, {"text": torch.tensor(float(len(rows)), device=error.device)}, {"text": 1.0})

    def _hidden(self, page: Page, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(self.states(page, self.see(views) if views else None, None), page.tokens, self.mask)[0]
        return hidden, page.labels.flatten()[page.tokens.routes(2)[0]]

    @torch.no_grad()
    def score(self, documents: Sequence[Document]) -> StepLogProbs:
        """Log-probs of the targets' tokens (closing mark included), document by document."""
        values: list[Tensor] = []
        for document in documents:
            batch = self.collate([document]).to(self.device)
            hidden, labels = self._hidden(batch.page, batch.views)
            rows = labels != IGNORE
            values.append(self.head(hidden[rows]).float().log_softmax(-1).gather(1, labels[rows][:, None])[:, 0])
        return StepLogProbs(values, [["text"] * len(v) for v in values])


def _block(width: int, heads: int, kv_heads: int, head_dim: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=hidden, qk_norm=True)
