"""Janus and Janus-Pro: one causal language model with two ways of seeing, features to read and codes to draw
(arXiv 2410.13848, 2501.17811).

    read    SigLIP-like tower -> Linear, GELU, Linear
    draw    code -> table of its own (width 8) -> Linear, GELU, Linear -> trunk -> Linear, GELU, Linear -> next code
    L = w_text CE(text) / n_text + w_image CE(codes) / n_codes

- Text and codes have disjoint output spaces; which one is asked follows from the document, not from the model.
- Everything is causal, with one position per token; a drawn picture has no end token (its length is known).
- Guidance on logits: l = l_u + w (l_c - l_u), w = 5.

`variant` is the prompt without text, in guidance and where training drops it. "released": every token except the first
is a pad, as the published code samples; "paper": it is left out.

Differs from the paper: `feature_merge` > 1 joins neighbouring features; documents may read and draw several pictures,
where a drawn picture that is followed by more is read back through its features.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from diptych.document import Piece
from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.blocks import BlockConfig
from diptych.parts.experts import Coupling
from diptych.parts.grammar import Grammar
from diptych.parts.interleave import Frame, Layout, Marks, Writer
from diptych.parts.pictures import crop_to, merge_grid, pad_square
from diptych.parts.positions import Rope
from diptych.parts.quantize import CodebookConfig, VectorConfig
from diptych.parts.resources import stored_config
from diptych.parts.trunks import Trunk
from diptych.parts.turns import Turns
from diptych.parts.vision import VisionConfig, VisionTransformer
from diptych.parts.vocabulary import Vocabulary
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.base import Sampling
from diptych.systems.coded import Coded

WORLD_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
# of the DeepSeek tokenizer, with its full-width bars and low blocks
DEEPSEEK_MARKS = ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
                  "<begin_of_image>", "<end_of_image>")


@dataclass(frozen=True, kw_only=True)
class JanusConfig:
    block: BlockConfig
    depth: int
    rope_theta: float = 1e4
    vocabulary_size: int
    tokenizer: str = ""  # a tokenizer.json, zoo/NAME, or a file of the model's folder
    mark_names: tuple[str, str, str, str] = DEEPSEEK_MARKS
    turns: Turns | None = None  # the chat template; None = every text between the marks
    marks: Marks | None = None  # ids of start, end, image start, image end; None = from the tokenizer
    pad: int | None = None  # id that fills the released prompt without text
    variant: Literal["paper", "released"] = "released"
    vision: VisionConfig
    feature_merge: int = 1  # n x n neighbouring features become one token
    codec: VQTokenizerConfig
    code_width: int = 8  # of the table that codes are read with
    picture: tuple[int, int] = (384, 384)  # pixels of pictures to learn to draw, and drawn by default
    text_weight: float = 1.0
    image_weight: float = 1.0
    drop_text: float = 0.1  # condition dropping for guidance
    drop_feature: float = 0.1
    row: int = 4096  # tokens of a packed row at least (longer documents make longer rows)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.variant == "released" and self.pad is None:
            raise ValueError('expected the id of the pad token for variant "released", got none; '
                             'fix: set pad (it differs between releases), or variant="paper"')


class Janus(Coded):
    Config = JanusConfig
    config: JanusConfig

    def __init__(self, config: JanusConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        c = self.config = config
        if vocabulary is None and c.tokenizer:
            vocabulary = self.read_vocabulary(c, c.tokenizer)
        self.vocabulary = vocabulary
        width = c.block.width
        self.embed = nn.Embedding(c.vocabulary_size, width)
        self.trunk = Trunk(c.block, Coupling.dense(c.depth, 2), Rope(c.block.head_dim, c.rope_theta))
        self.head = nn.Linear(width, c.vocabulary_size, bias=False)
        self.vision = VisionTransformer(c.vision)
        self.aligner = _mlp(c.vision.width * c.feature_merge**2, width, width)
        self.codec = VQTokenizer(c.codec).requires_grad_(False)
        values = self.codec.layout(*c.picture).values
        self.code_embed = nn.Embedding(values, c.code_width)
        self.code_aligner = _mlp(c.code_width, width, width)
        self.code_head = _mlp(width, width, values)
        # features and codes enter at the scale of words: larger, they would drown what attention brings
        for part in (self.embed, self.trunk, self.head, self.aligner):
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)
        self._spread_codes()

    def _spread_codes(self) -> None:
        """Codes enter at that scale, too, and differ: the table keeps its own, wide one, and biases are none, which
        would be the same in all codes and many times what tells them apart."""
        inner, outer = (m for m in self.code_aligner if isinstance(m, nn.Linear))
        for layer in (inner, outer):
            nn.init.zeros_(layer.bias)
        nn.init.normal_(inner.weight, std=inner.in_features**-0.5)
        # the mean square of GELU(x) is 0.425 for x ~ N(0, 1)
        nn.init.normal_(outer.weight, std=0.02 * (0.425 * outer.in_features) ** -0.5)

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> JanusConfig:
        """For tests: seconds on a CPU."""
        pyramid = PyramidConfig(channels=8, channel_mult=(1, 1, 2, 2), blocks=(1,) * 4, attention=(3,), norm_groups=4)
        return cls._world(width=64, heads=2, hidden=128, depth=2,
                          vision=VisionConfig(width=32, mlp_width=64, num_layers=1, num_heads=2, patch=8, max_side=8),
                          codec=VQTokenizerConfig(encoder=pyramid, decoder=pyramid, latent_channels=16,
                                                  quantizer=VectorConfig(codebook=CodebookConfig(values=64))))

    @classmethod
    def small(cls) -> JanusConfig:
        """The world at 64 px, 64 codes, about 8M parameters; the tokenizer has the shape of the zoo's `vq`."""
        return cls._world(width=256, heads=4, hidden=640, depth=8,
                          vision=VisionConfig(**stored_config("zoo/clip")["vision"]), codec=VQTokenizerConfig.small())

    @classmethod
    def _world(cls, *, width: int, heads: int, hidden: int, depth: int, vision: VisionConfig,
               codec: VQTokenizerConfig) -> JanusConfig:
        return JanusConfig(
            block=BlockConfig(width=width, heads=heads, kv_heads=heads, head_dim=width // heads, hidden=hidden,
                              qkv_bias=False),
            depth=depth, vocabulary_size=1024, tokenizer="zoo/tokenizer", mark_names=WORLD_MARKS, pad=0, vision=vision,
            feature_merge=2, codec=codec, picture=(64, 64), row=128, sampling=_guided(2.0))

    @classmethod
    def paper(cls) -> JanusConfig:
        """Janus-Pro-7B: DeepSeek-LLM-7B, SigLIP-L/16 at 384 px, VQ-16 of LlamaGen (released `config.json`)."""
        return cls._published(width=4096, heads=32, hidden=11008, depth=30, pad=100015)

    @classmethod
    def pro_1b(cls) -> JanusConfig:
        """Janus-Pro-1B; Janus-1.3B differs in its pad token only (100015)."""
        return cls._published(width=2048, heads=16, hidden=5632, depth=24, pad=100002)

    @classmethod
    def _published(cls, *, width: int, heads: int, hidden: int, depth: int, pad: int) -> JanusConfig:
        return JanusConfig(
            block=BlockConfig(width=width, heads=heads, kv_heads=heads, head_dim=width // heads, hidden=hidden,
                              qkv_bias=False),
            depth=depth, vocabulary_size=102400, pad=pad, turns=Turns(),
            vision=VisionConfig(width=1024, mlp_width=4096, num_layers=24, num_heads=16, patch=16, max_side=24,
                                gelu="exact"),
            codec=VQTokenizerConfig.paper(), sampling=_guided(5.0))

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    @classmethod
    def read_vocabulary(cls, config: JanusConfig, source: str | Path) -> Vocabulary:
        return Vocabulary(source, marks=config.mark_names)

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]
        return Layout(code=Grammar(start=(self.marks.image_start,)), spread=True)

    def frame(self, before: Piece | None, piece: Piece) -> Frame:
        turns = self.config.turns
        if turns is None:
            return super().frame(before, piece)
        return turns.frame(before, piece, self.need_vocabulary(), self.marks.start)

    def write_null(self, w: Writer, ids: list[int]) -> None:
        """As many pads; the first token of all stays."""
        if self.config.variant == "released" and self.config.pad is not None:
            pads = [self.config.pad] * len(ids)
            w.text(pads if w.position else [*ids[:1], *pads[1:]], open=False, close=False)

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        return pad_square(pixels, c.vision.max_side * c.vision.patch), crop_to(pixels, *c.picture)

    def feature_count(self, view: Tensor) -> int:
        return (self.config.vision.max_side // self.config.feature_merge) ** 2

    # -- the network --------------------------------------------------------------------------------------------------

    def see(self, views: Sequence[Tensor]) -> Tensor:
        c = self.config
        features = self.vision.encode(torch.stack(list(views)).to(self.embed.weight.dtype))
        if c.feature_merge > 1:
            features = merge_grid(features, (c.vision.max_side, c.vision.max_side), c.feature_merge)
        return self.aligner(features).flatten(0, 1)

    def drawing_head(self) -> nn.Module:
        return self.code_head

    def code_tokens(self, codes: Tensor) -> Tensor:
        return self.code_aligner(self.code_embed(codes))

    def code_logits(self, hidden: Tensor) -> Tensor:
        return self.code_head(hidden)


def _mlp(inside: int, hidden: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, hidden), nn.GELU(), nn.Linear(hidden, outside))


def _guided(scale: float) -> Sampling:
    return Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=scale),)))
