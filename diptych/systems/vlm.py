"""A language model that may read pictures: a dense Qwen-style trunk, optionally with features of a vision tower.

Not a paper but the role that systems fill with Qwen, LLaVA or Qwen-VL: text out, pictures and text in. Without `vision`
it is a plain language model; a model with `vision` starts from the trunk of one without. Qwen2.5-VL is another value
of the same config: a tower with windows, causal features, positions over rows and columns.
"""
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from diptych.document import Document, Image
from diptych.objectives import next_token
from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.cache import Run
from diptych.parts.experts import Coupling
from diptych.parts.interleave import IGNORE, Layout, Marks, Page, Writer
from diptych.parts.masks import Predicate, causal, hide_noise, key_is, same, valid
from diptych.parts.pictures import fit_sides, merge_grid, stack_by_size
from diptych.parts.positions import Rope, sincos_2d
from diptych.parts.resources import stored_config
from diptych.parts.tokens import Modality, Mode
from diptych.parts.trunks import Between, Trunk
from diptych.parts.vision import Connector, VisionConfig, VisionTransformer, position_ids
from diptych.parts.vocabulary import Vocabulary
from diptych.parts.windows import WindowConfig, WindowTower
from diptych.systems.base import Emit, Losses, Program, Sampling, StepLogProbs, Work
from diptych.systems.packed import Batch, Packed
from diptych.systems.works import Grid, Read, Reader

MASKS: dict[str, Predicate] = {  # how the features of a picture see each other
    "full": valid & same("document") & (causal | (same("segment") & key_is("mode", Mode.FULL))) & hide_noise,
    "causal": valid & same("document") & causal & hide_noise,
}
NO_PICTURE = "expected text or boxes as targets of a language model, got a picture to draw"


@dataclass(frozen=True, kw_only=True)
class VlmConfig:
    block: BlockConfig
    depth: int
    vocabulary_size: int
    rope_theta: float = 1e4
    rope_sections: tuple[int, ...] | None = None  # pairs of a head that turn by frame, row, column; None: all by one
    rope_interleaved: bool = False
    tie_embeddings: bool = True
    tokenizer: str = "zoo/tokenizer"
    marks: Marks | None = None  # ids of start, end, image start, image end; None = from the tokenizer
    vision: VisionConfig | WindowConfig | None = None
    features: Literal["full", "causal"] = "full"
    positions: Literal["shared", "spread", "spatial"] = "shared"  # of the features of one picture
    side: int = 64  # pictures are scaled to fit a square of this side, in pixels
    merge: int = 2  # n x n neighbouring features become one token
    row: int = 128
    drop_text: float = 0.0
    drop_latent: float = 0.0
    drop_feature: float = 0.0
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.rope_sections is not None:
            object.__setattr__(self, "rope_sections", tuple(self.rope_sections))  # lists come from JSON and YAML
        if isinstance(self.vision, WindowConfig) and self.vision.out_width != self.block.width:
            raise ValueError(f"expected vision.out_width to be the width {self.block.width} of the trunk, "
                             f"got {self.vision.out_width}")

    @property
    def coupling(self) -> Coupling:
        return Coupling.dense(self.depth, 2)


class Vlm(Packed):
    Config = VlmConfig
    config: VlmConfig
    draws = False
    stride = 1

    def __init__(self, config: VlmConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        c = self.config = config
        self.vocabulary = Vocabulary(c.tokenizer) if vocabulary is None and c.tokenizer else vocabulary
        self.mask = MASKS[c.features]
        self.layout = Layout(spread=c.positions != "shared", spatial=c.positions == "spatial")
        width = c.block.width
        self.embed = nn.Embedding(c.vocabulary_size, width)
        rope = Rope(c.block.head_dim, c.rope_theta, c.rope_sections, c.rope_interleaved)
        self.trunk = Trunk(c.block, c.coupling, rope)
        self.head = nn.Linear(width, c.vocabulary_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        if isinstance(c.vision, WindowConfig):
            self.vision = WindowTower(c.vision)
        elif c.vision is not None:
            self.vision = VisionTransformer(c.vision)
            self.connector = Connector(c.vision.width * c.merge**2, width)
            self.register_buffer("feature_table", sincos_2d(width, c.vision.max_side), persistent=False)
        normal_weights(m for name, m in self.named_modules() if not name.startswith(("vision", "connector")))

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
        seen = fit_sides(pixels, self.config.side, self.config.side, self.feature_side)
        return seen, seen

    @property
    def feature_side(self) -> int:
        """Pixels per feature token, along one side."""
        vision = self.config.vision
        assert vision is not None
        return vision.stride if isinstance(vision, WindowConfig) else vision.patch * self.config.merge

    def feature_grid(self, view: Tensor) -> Grid:
        return view.shape[1] // self.feature_side, view.shape[2] // self.feature_side

    def write_seen(self, w: Writer, seen: Tensor, coded: Tensor, pictures: list[Tensor], views: list[Tensor]) -> None:
        grid = self.feature_grid(seen)
        w.feature(len(views), grid[0] * grid[1], grid=grid)
        views.append(seen)

    def write_drawn(self, w: Writer, number: int, grid: Grid) -> None:
        raise ValueError(NO_PICTURE)

    # -- the network --------------------------------------------------------------------------------------------------

    def see(self, views: Sequence[Tensor]) -> Tensor:
        vision, merge, out = self.config.vision, self.config.merge, []
        if isinstance(self.vision, WindowTower):
            return self.vision.see(views)
        assert isinstance(vision, VisionConfig)
        for numbers, batch in stack_by_size(list(views)):
            grid = (batch.shape[2] // vision.patch, batch.shape[3] // vision.patch)
            features = self.vision.encode(batch.to(self.embed.weight.dtype))
            features = self.connector(merge_grid(features, grid, merge))
            cells = (grid[0] // merge, grid[1] // merge)
            ids = position_ids(cells, vision.max_side, device=features.device)
            features = features + cast(Tensor, self.feature_table)[ids].to(features.dtype)
            out += zip(numbers, features, strict=True)
        return torch.cat([f for _, f in sorted(out, key=lambda pair: pair[0])])

    def blank(self, count: int) -> Tensor | None:
        """What stands in so many blocks of pictures to draw, (n, width)."""
        return None

    def given(self, works: Sequence[Read]) -> Tensor | None:
        return self.blank(sum(len(w.writer.codes) for w in works))

    def hidden(self, batch: Batch) -> list[Tensor]:
        """States of texts and features in order, and of what stands for pictures to draw."""
        features = self.see(batch.views) if batch.views else None
        return self.think(batch.page, features, self.blank(len(batch.codes)))[0]

    def states(self, page: Page, features: Tensor | None, drawn: Tensor | None) -> list[Tensor]:
        return super().states(page, None if features is None else features[:, :self.config.block.width], drawn)

    def think(self, page: Page, features: Tensor | None, drawn: Tensor | None, run: Run | None = None
              ) -> tuple[list[Tensor], list[Tensor]]:
        states = self.states(page, features, drawn)
        hidden = self.trunk(states, page.tokens, self.mask, run, self.deepen(page, features))
        return hidden, hidden

    def deepen(self, page: Page, features: Tensor | None) -> Between | None:
        """Adds the deep levels of features behind the first layers, where the tower has any."""
        width = self.config.block.width
        if features is None or features.shape[1] == width:
            return None
        levels, tokens = features.split(width, 1)[1:], page.tokens
        at = torch.nonzero(tokens.modality.flatten()[tokens.routes(2)[0]] == Modality.FEATURE).squeeze(1)

        def between(done: int, states: list[Tensor]) -> list[Tensor]:
            if not 1 <= done <= len(levels):
                return states
            return [states[0].index_add(0, at, levels[done - 1].to(states[0].dtype)), *states[1:]]

        return between

    def _look_at(self, reader: Reader, pixels: Tensor, x: Tensor | None, grid: Grid | None,
                 copy: bool) -> Generator[Work, Any, None]:
        seen, coded = self.views(pixels)
        w, views = self.writer(reader), list[Tensor]()
        self.write_seen(w, seen, coded, [], views)
        yield Read(reader, w, views)

    def program(self, document: Document, sampling: Sampling, generator: torch.Generator, emit: Emit) -> Program:
        if not self.draws and any(isinstance(p, Image) for p in document.targets):
            raise ValueError(NO_PICTURE)
        return super().program(document, sampling, generator, emit)

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        error, count = self.text_error(self.hidden(batch)[0], batch.page)
        return Losses({"text": error}, {"text": count}, {"text": 1.0})

    def text_error(self, hidden: Tensor, page: Page) -> tuple[Tensor, Tensor]:
        """Sum over the text targets of a page and their number, from the states of texts and features."""
        labels = page.labels.flatten()[page.tokens.routes(2)[0]]
        rows = torch.nonzero(labels != IGNORE).squeeze(1)
        error = next_token.cross_entropy(self.head(hidden[rows]), labels[rows]).sum()
        return error, torch.tensor(float(len(rows)), device=error.device)

    def score(self, documents: Sequence[Document]) -> StepLogProbs:
        """Log-probs of the targets' tokens (closing mark included), document by document."""
        values: list[Tensor] = []
        for document in documents:
            batch = self.lay_out([self.write(document)]).to(self.device)
            hidden, labels = self.hidden(batch)[0], batch.page.labels.flatten()[batch.page.tokens.routes(2)[0]]
            rows = labels != IGNORE
            values.append(self.head(hidden[rows]).float().log_softmax(-1).gather(1, labels[rows][:, None])[:, 0])
        return StepLogProbs(values, [["text"] * len(v) for v in values])


def _block(width: int, heads: int, kv_heads: int, head_dim: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=hidden, qk_norm=True)
