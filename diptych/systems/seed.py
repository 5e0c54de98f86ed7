"""SEED-LLaMA: pictures are 32 words of the language model, causal like any others (arXiv 2310.01218; tokenizer v1:
2307.08041).

    read    <img> 32 codes </img>           draw    the same block, each code said one token ahead
    L = w_text CE(text) / n_text + w_image CE(codes) / n_codes              one softmax over texts, codes and marks
    codes -> embedding of the picture -> pixels                             only to be looked at

- Codes are semantic and 1-D: queries of a causal Q-Former, quantized (`parts.semantic_1d`). Query i sees only those up
  to i, so that codes depend on one another from left to right, as a language model predicts them.
- Ids: texts, then codes, then both marks. The model reads the codes it drew as it drew them: nothing is encoded again.
- Pixels come from a generator that knows the embedding only (`systems.detokenizer`, in the role of SD 2.1-unCLIP).
- Sampling: temperature 1, top_p 0.5, no guidance.

Tokenizer and detokenizer are trained before (`systems.semantic_codec`) and frozen here.

Differs from the paper: the marks around a picture are given by the document and the block's grammar, not predicted, so
every drawing has its 32 codes; texts and codes are averaged apart; the detokenizer is a flow transformer. Texts of
`small` have the marks of this library in place of the chat template.
"""
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from diptych.document import Piece
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.dit import DitConfig
from diptych.parts.experts import Coupling
from diptych.parts.grammar import Grammar
from diptych.parts.interleave import Frame, Layout, Marks
from diptych.parts.pictures import stack_by_size
from diptych.parts.positions import Rope
from diptych.parts.qformer import QFormerConfig
from diptych.parts.quantize import CodebookConfig, VectorConfig
from diptych.parts.resources import stored_config
from diptych.parts.semantic_1d import LEGACY, SemanticTokenizer, SemanticTokenizerConfig
from diptych.parts.trunks import Trunk
from diptych.parts.turns import Turns
from diptych.parts.vae import AutoEncoderConfig
from diptych.parts.vision import VisionConfig
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.base import Emit, Sampling
from diptych.systems.coded import Steps
from diptych.systems.detokenizer import Detokenizer, DetokenizerConfig
from diptych.systems.flat import Flat
from diptych.systems.janus import WORLD_MARKS
from diptych.systems.works import Grid, Reader

CHAT = Turns(system=("", "\n"), user=("USER:", "\n"), assistant=("ASSISTANT:", ""), between="")
HALF = (0.5, 0.5, 0.5)  # mean and deviation of colours for towers that read [-1, 1]


@dataclass(frozen=True, kw_only=True)
class SeedConfig:
    block: BlockConfig
    depth: int
    rope_theta: float = 1e4
    text_size: int = 32000  # tokens of the text vocabulary (LLaMA)
    tokenizer: str = ""  # a tokenizer.json, zoo/NAME, or a file of the model's folder
    mark_names: tuple[str, str, str, str] = ("<s>", "</s>", "<img>", "</img>")
    ends: tuple[int, int] | None = None  # ids of the marks that open and close a text; None = from the tokenizer
    turns: Turns | None = None  # the chat template; None = every text between the marks
    codec: SemanticTokenizerConfig
    detokenizer: DetokenizerConfig
    picture: tuple[int, int] = (768, 768)  # pixels that the detokenizer draws
    text_weight: float = 1.0
    image_weight: float = 1.0
    drop_text: float = 0.0  # the paper samples without guidance
    row: int = 4096  # tokens of a packed row at least (longer documents make longer rows)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name in ("picture", "ends"):  # lists come from YAML
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if self.picture[0] != self.picture[1]:
            raise ValueError(f"expected square pictures, got {self.picture[0]} x {self.picture[1]}")


class Seed(Flat):
    Config = SeedConfig
    config: SeedConfig
    codec: SemanticTokenizer  # type: ignore[assignment]  # codes of a picture as a sequence, not as a map

    def __init__(self, config: SeedConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        c = self.config = config
        if c.codec.embedding_width != c.detokenizer.embedding_width:
            raise ValueError(f"expected a detokenizer for embeddings of width {c.codec.embedding_width}, "
                             f"got {c.detokenizer.embedding_width}; fix: take both from one trained folder")
        if vocabulary is None and c.tokenizer:
            vocabulary = self.read_vocabulary(c, c.tokenizer)
        self.vocabulary = vocabulary
        self.codec = SemanticTokenizer(c.codec).requires_grad_(False)
        self.detokenizer = Detokenizer(c.detokenizer).requires_grad_(False)
        self.first_code, self.values = c.text_size, self.codec.layout().values
        size = c.text_size + self.values + 2
        self.embed = nn.Embedding(size, c.block.width)
        self.trunk = Trunk(c.block, Coupling.dense(c.depth, 2), Rope(c.block.head_dim, c.rope_theta))
        self.head = nn.Linear(c.block.width, size, bias=False)
        normal_weights(m for part in (self.embed, self.trunk, self.head) for m in part.modules())

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> SeedConfig:
        """For tests: seconds on a CPU."""
        vision = VisionConfig(width=32, mlp_width=64, num_layers=1, num_heads=2, patch=8, max_side=8)
        network = DitConfig(token_width=24, width=32, layers=1, heads=2, hidden=64, condition_width=16, cross_heads=2,
                            injection="prefix", attention="softmax", mlp="gelu", side=4)
        latents = AutoEncoderConfig(channels=16, channel_mult=(1, 1), num_res_blocks=1, latent_channels=6, patch=4,
                                    norm_groups=4, shift=0.0, scale=1.0)
        codec = world_codec(vision, width=32, layers=2, branch_layers=1, queries=16, values=64, code_width=8,
                            narrow=(16, 8), embedding_width=64)
        return cls._world(width=64, heads=2, hidden=128, depth=2, codec=codec,
                          detokenizer=DetokenizerConfig(network=network, latents=latents, tokens=4, steps=2))

    @classmethod
    def small(cls) -> SeedConfig:
        """The world at 64 px, 16 codes out of 512, about 14M parameters. The tower is that of the zoo's `clip`, latents
        are those of its `codec`; the embedding is the tower's features in 4 x 4 parts of the picture."""
        vision = VisionConfig(**stored_config("zoo/clip")["vision"])
        network = DitConfig(token_width=24, width=192, layers=6, heads=6, hidden=512, condition_width=vision.width,
                            cross_heads=6, injection="prefix", attention="softmax", mlp="gelu", side=4)
        latents = AutoEncoderConfig(**stored_config("zoo/codec"))
        codec = world_codec(vision, width=128, layers=4, branch_layers=2, queries=16, values=512, code_width=16,
                            narrow=(64, 32), embedding_width=16 * vision.width)
        return cls._world(width=256, heads=4, hidden=640, depth=8, codec=codec,
                          detokenizer=DetokenizerConfig(network=network, latents=latents, steps=10))

    @classmethod
    def _world(cls, *, width: int, heads: int, hidden: int, depth: int, codec: SemanticTokenizerConfig,
               detokenizer: DetokenizerConfig) -> SeedConfig:
        return SeedConfig(block=_llama(width, heads, hidden, 1e-6), depth=depth, text_size=1024,
                          tokenizer="zoo/tokenizer", mark_names=WORLD_MARKS, codec=codec, detokenizer=detokenizer,
                          picture=(64, 64), row=128, sampling=Sampling(codes=TokenSampling(top_p=0.5)))

    @classmethod
    def paper(cls) -> SeedConfig:
        """SEED-LLaMA-8B: Vicuna-7B and the tokenizer of 32 codes. The detokenizer has the size of DiT-XL and latents of
        the form of SD 2.1 in place of its U-Net."""
        return cls._published(_llama(4096, 32, 11008, 1e-6), 32)

    @classmethod
    def paper_14b(cls) -> SeedConfig:
        """SEED-LLaMA-14B: the same on LLaMA2-Chat-13B."""
        return cls._published(_llama(5120, 40, 13824, 1e-5), 40)

    @classmethod
    def _published(cls, block: BlockConfig, depth: int) -> SeedConfig:
        network = DitConfig(token_width=16, width=1152, layers=28, heads=16, hidden=4608, condition_width=256,
                            cross_heads=16, injection="prefix", attention="softmax", mlp="gelu", side=48)
        latents = AutoEncoderConfig(latent_channels=4, quant_conv=True, shift=0.0, scale=0.18215)
        return SeedConfig(
            block=block, depth=depth, ends=(1, 2), turns=CHAT, codec=SemanticTokenizerConfig(),
            detokenizer=DetokenizerConfig(network=network, latents=latents, tokens=4, scale=10.0),
            sampling=Sampling(text=TextSampling(temperature=1.0, top_p=0.5, max_tokens=512),
                              codes=TokenSampling(top_p=0.5)))

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    @classmethod
    def read_vocabulary(cls, config: SeedConfig, source: str | Path) -> Vocabulary:
        return Vocabulary(source, marks=config.mark_names)

    @property
    def stride(self) -> int:  # type: ignore[override]
        """A picture is one block whatever it shows: it has one size."""
        return self.config.picture[0]

    def grid(self, picture: Tensor) -> Grid:
        return 1, self.config.codec.count

    @cached_property
    def marks(self) -> Marks:  # type: ignore[override]
        ends, first = self.config.ends, self.config.text_size + self.values
        if ends is None:
            v = self.need_vocabulary()
            ends = v.start, v.end
        return Marks(*ends, first, first + 1)

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]
        return Layout(code=Grammar(start=(self.marks.image_start,), end=(self.marks.image_end,)), spread=True)

    def frame(self, before: Piece | None, piece: Piece) -> Frame:
        turns = self.config.turns
        return (super().frame(before, piece) if turns is None else
                turns.frame(before, piece, self.need_vocabulary(), self.marks.start))

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels, pixels

    # -- the network --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, pictures: list[Tensor]) -> list[Tensor]:
        """Pictures of any size in [-1, 1] -> codes (q,) each."""
        out: dict[int, Tensor] = {}
        for numbers, batch in stack_by_size(pictures):
            out |= zip(numbers, self.codec.encode(self.codec.prepare(batch)), strict=True)
        return [out[i] for i in range(len(pictures))]

    @torch.no_grad()
    def decode(self, x: Tensor, grid: Grid) -> Tensor:
        """Codes (b, q) -> pixels (b, 3, h, w), clamped."""
        return self.detokenizer.draw(self.codec.decode(x).float(), *self.config.picture)

    # -- drawing ------------------------------------------------------------------------------------------------------

    def paint(self, grid: Grid, contexts: dict[str, Reader], sampling: Sampling, generator: torch.Generator, index: int,
              emit: Emit, more: bool) -> Steps:
        if grid != (1, 1):
            side = self.stride
            raise ValueError(f"expected a picture of {side} x {side}, which the detokenizer draws, "
                             f"got {grid[0] * side} x {grid[1] * side}; fix: leave its size out")
        block = (1, self.config.codec.count)
        return (yield from super().paint(block, contexts, sampling, generator, index, emit, more))


def world_codec(vision: VisionConfig, *, width: int, layers: int, branch_layers: int, queries: int, values: int,
                code_width: int, narrow: tuple[int, ...], embedding_width: int) -> SemanticTokenizerConfig:
    """A tokenizer trained from scratch: code vectors of length 1 that are moving averages, which keeps them in use."""
    heads = width // 32 or 1
    qformer = QFormerConfig(width=width, mlp_width=2 * width, layers=layers, heads=heads, queries=queries,
                            feature_width=vision.width, causal=True)
    book = CodebookConfig(values=values, width=code_width, decay=0.99, restart=True)
    return SemanticTokenizerConfig(vision=vision, mean=HALF, std=HALF, qformer=qformer,
                                   quantizer=VectorConfig(codebook=book, weights=LEGACY), semantic_layers=branch_layers,
                                   image_layers=branch_layers, heads=heads, narrow=narrow,
                                   embedding_width=embedding_width)


def _llama(width: int, heads: int, hidden: int, norm_eps: float) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=heads, head_dim=width // heads, hidden=hidden,
                       qkv_bias=False, norm_eps=norm_eps)
