"""TokenFlow: one tokenizer with two views of a picture under each index, and two language models on its codes, one that
reads them and one that draws them scale by scale (arXiv 2412.03069).

    code   argmin_k  |z_sem - E_sem,k|^2 + w |z_pix - E_pix,k|^2     the same k in both tables, scale after scale
    F      sum of [E_sem,k ; E_pix,k] over the scales, each resized to the finest grid
    read   F at the finest grid -> Linear, GELU, Linear -> language model, which answers
    draw   running F of the scales before -> Linear, GELU, Linear, + level, + place -> language model -> codes
    L = w_text CE(text) / n_text + w_image CE(codes) / n_codes

- Semantic and pixel half are found by one index: what is drawn can be understood, what is read can be shown.
- A scale of the drawing model sees itself and all before; the codes of the first are asked of the image mark. Its block
  normalises what attention and network say, not what they read, and queries and keys; level and place are added once.
- Its vocabulary is that of the words with a code behind each other: training spreads over all, drawing over codes only.
- Drawing goes over every scale but the first several times (`Sampling.again`): the scale reads F with its own codes and
  draws them anew with narrower cuts, 9 scales x 3 - 2 = 25 passes. Guidance grows from none to 1 + 7.5.

`features` "continuous" reads the normalised maps before the codebook instead of F.

Differs from the paper: both models live in one system with one vocabulary, as branches of a sample
(`systems.branched`); the drawing model can read pictures too, as F through its own projector; pictures are read at the
size they are drawn at, between the image marks; texts stand between marks. The released drawing model pads texts on the
left, which changes nothing: positions are relative.
"""
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.objectives import next_scale, next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_scale import Scales
from diptych.objectives.next_token import TokenSampling
from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.experts import Coupling
from diptych.parts.grammar import Grammar
from diptych.parts.interleave import GENERATE, Layout, Marks, Page, Writer
from diptych.parts.masks import causal, key_is, same, valid
from diptych.parts.positions import Rope
from diptych.parts.quantize import CodebookConfig, JointConfig, ResidualConfig, ResidualQuantizer
from diptych.parts.resources import stored_config
from diptych.parts.scales import level_ids
from diptych.parts.semantic import DualTokenizer, DualTokenizerConfig
from diptych.parts.tokens import Modality, Mode
from diptych.parts.towers import TowerConfig
from diptych.parts.trunks import Trunk
from diptych.parts.vision import VisionConfig
from diptych.parts.vocabulary import Vocabulary
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.base import Emit, Progress, Sampling, Work
from diptych.systems.branched import Branched
from diptych.systems.works import Grid, Read, Reader, Together, show


@dataclass(frozen=True, kw_only=True)
class TokenFlowConfig:
    """`block`, `depth`: of the model that answers; `draw_block`, `draw_depth`: of the one that draws."""

    block: BlockConfig
    depth: int
    draw_block: BlockConfig
    draw_depth: int
    rope_theta: float = 1e4
    vocabulary_size: int  # words; the drawing model has the codes behind them
    tokenizer: str = ""  # a tokenizer.json, zoo/NAME, or a file of the model's folder
    marks: Marks | None = None  # ids of start, end, image start, image end; None = from the tokenizer
    codec: DualTokenizerConfig
    features: Literal["quantized", "continuous"] = "quantized"
    picture: tuple[int, int] = (256, 256)  # pixels of pictures, read or drawn
    negative: str = ""  # what guidance (and training without the text) reads in place of a text
    text_weight: float = 1.0
    image_weight: float = 1.0
    drop_text: float = 0.1  # condition dropping for guidance
    drop_feature: float = 0.0
    row: int = 4096  # tokens of a packed row at least (longer documents make longer rows)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.features not in ("quantized", "continuous"):
            raise ValueError(f"expected features quantized or continuous, got {self.features!r}")
        finest = tuple(side // self.codec.downsample for side in self.picture)
        scales = getattr(self.codec.quantizer, "scales", ())
        if not scales or scales[0] != (1, 1) or scales[-1] != finest:
            raise ValueError(f"expected a codec on scales from one cell to the {finest} cells of a picture, got "
                             f"{list(scales)}; fix: set codec.quantizer.scales or picture")

    @property
    def scales(self) -> Scales:
        assert isinstance(self.codec.quantizer, ResidualConfig)
        return self.codec.quantizer.scales


class TokenFlow(Branched):
    Config = TokenFlowConfig
    config: TokenFlowConfig
    codec: DualTokenizer  # type: ignore[assignment]
    levels: Tensor
    layout = Layout(spread=True)
    mask = valid & same("document") & (causal | (same("segment") & key_is("modality", Modality.CODE)))

    def __init__(self, config: TokenFlowConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        c = self.config = config
        if vocabulary is None and c.tokenizer:
            vocabulary = self.read_vocabulary(c, c.tokenizer)
        self.vocabulary = vocabulary
        blocks, code = (c.block, c.draw_block), c.codec.quantizer.width
        self.trunk = Trunk(blocks, Coupling.apart(c.depth, c.draw_depth),
                           [Rope(b.head_dim, c.rope_theta) for b in blocks])
        self.codec = DualTokenizer(c.codec).requires_grad_(False)
        own, drawn = (b.width for b in blocks)
        self.embed = nn.Embedding(c.vocabulary_size, own)
        self.head = nn.Linear(own, c.vocabulary_size, bias=False)
        self.projector = _mlp(code, own)
        size = c.vocabulary_size + self.quantizer.codebook.values
        self.draw_embed = nn.Embedding(size, drawn)
        self.draw_head = nn.Linear(drawn, size, bias=False)
        self.draw_projector = _mlp(code, drawn)
        self.level = nn.Embedding(len(c.scales) + 1, drawn)  # of words and the image mark; of each scale
        ids = level_ids(c.scales)
        self.register_buffer("levels", ids + (ids > 0), persistent=False)  # what asks for the first is the image mark
        self.table = nn.Parameter(torch.randn(len(ids), drawn) * 0.02)
        # code vectors are short: through a first layer as small as the others, pictures would be next to nothing
        kept = ("codec", "projector.0", "draw_projector.0")
        normal_weights(m for name, m in self.named_modules() if not name.startswith(kept))

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> TokenFlowConfig:
        """For tests: seconds on a CPU."""
        side = PyramidConfig(channels=8, channel_mult=(1, 1, 2), blocks=(1,) * 3, attention=(), norm_groups=4)
        codec = DualTokenizerConfig(
            semantic_encoder=VisionConfig(width=32, mlp_width=64, num_layers=1, num_heads=2, patch=16, max_side=4),
            semantic_decoder=TowerConfig(width=32, mlp_width=64, layers=1, heads=2, patch=1, side=4), encoder=side,
            decoder=side, latent_channels=16, feature_width=32, patch=4, quantizer=_codes(64, (8, 8), (1, 2, 4)))
        return cls._world(codec, _llama(64, 2, 128), 2, _drawing(64, 2, 128), 2)

    @classmethod
    def small(cls) -> TokenFlowConfig:
        """The world at 64 px, 130 codes in six scales, about 8M trained parameters."""
        return cls._world(small_codec(), _llama(192, 6, 448), 6, _drawing(256, 4, 640), 6)

    @classmethod
    def _world(cls, codec: DualTokenizerConfig, block: BlockConfig, depth: int, draw_block: BlockConfig,
               draw_depth: int) -> TokenFlowConfig:
        return TokenFlowConfig(
            block=block, depth=depth, draw_block=draw_block, draw_depth=draw_depth, vocabulary_size=1024,
            tokenizer="zoo/tokenizer", codec=codec, picture=(64, 64), row=192,
            sampling=_guided(2.0, TokenSampling(top_k=100, top_p=0.9), TokenSampling(top_k=20, top_p=0.9),
                             TokenSampling(top_k=1)))

    @classmethod
    def paper(cls) -> TokenFlowConfig:
        """TokenFlow-B, Vicuna-13B on the CLIP-B tokenizer, with the drawing model of LLaMA-2-7B at 256 px."""
        return TokenFlowConfig(
            block=_llama(5120, 40, 13824), depth=40, draw_block=_drawing(4096, 32, 11008), draw_depth=32,
            vocabulary_size=32001, codec=clip_b(),
            sampling=_guided(1 + 7.5, TokenSampling(top_k=1200, top_p=0.8), TokenSampling(top_k=100, top_p=0.8),
                             TokenSampling(top_k=1)))

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    @property
    def quantizer(self) -> ResidualQuantizer:
        assert isinstance(self.codec.quantizer, ResidualQuantizer)
        return self.codec.quantizer

    def feature_count(self, view: Tensor) -> int:
        rows, columns = self.grid(view)
        return rows * columns

    def write_null(self, w: Writer, ids: list[int]) -> None:
        if self.config.negative:
            w.text(self.need_vocabulary().encode(self.config.negative))

    def write_drawn(self, w: Writer, number: int, grid: Grid) -> None:
        for scale in range(len(self.config.scales)):
            self.write_scale(w, number, scale)

    def write_scale(self, w: Writer, number: int, scale: int) -> None:
        """Its cells predict their own codes; the only one of the first is the image mark."""
        plan, span = Grammar().plan(*self.config.scales), next_scale.spans(self.config.scales)[scale]
        w.code(number, plan, drawn=True, mode=Mode.FULL, ahead=False, part=span, apart=True)

    @torch.no_grad()
    def encode(self, pictures: list[Tensor]) -> list[Tensor]:
        """Pictures of the one size (3, h, w) -> codes (L,) of all scales."""
        return [*self.codec.encode(torch.stack(pictures))] if pictures else []

    @torch.no_grad()
    def decode(self, x: Tensor, grid: Grid) -> Tensor:
        """Codes (b, n) of all scales of a grid, or of the first, -> pixels (b, 3, h, w), clamped."""
        return self.codec.decode(x).float().clamp(-1, 1)

    # -- the network --------------------------------------------------------------------------------------------------

    def see(self, views: Sequence[Tensor]) -> Tensor:
        """What the codes say of pictures, (n, c) float32; each model has a projector of its own."""
        z = self.codec.features(torch.stack(list(views)).to(self.embed.weight.dtype))
        if self.config.features == "continuous":
            return self.quantizer.codebook.space(z.movedim(1, -1)).flatten(0, 2)
        return self.quantizer(z).vectors.float().movedim(1, -1).flatten(0, 2)

    def states(self, page: Page, features: Tensor | None, drawn: Tensor | None) -> list[Tensor]:
        ids, modality, out = page.ids.flatten(), page.tokens.modality.flatten(), []
        owner = page.tokens.route.flatten()[modality == Modality.FEATURE]
        sides = ((self.embed, self.projector), (self.draw_embed, self.draw_projector))
        for route, index in enumerate(page.tokens.routes(2)):
            embed, projector = sides[route]
            x, kind = embed(ids[index]), modality[index]
            if features is not None:
                at = torch.nonzero(kind == Modality.FEATURE).squeeze(1)
                x = x.index_copy(0, at, projector(features[owner == route].to(embed.weight.dtype)).to(x.dtype))
            x = x + self.level.weight[0] if route == GENERATE else x
            if route == GENERATE and drawn is not None:
                at = torch.nonzero(kind == Modality.CODE).squeeze(1)
                x = x.index_copy(0, at, drawn.to(x.dtype))
            out.append(x)
        return out

    def cells(self, inputs: Tensor, span: slice) -> Tensor:
        """States (b, n, w) of the cells `span` of all scales from what they read (b, n, c): the first of all is the
        image mark, which reads nothing and is left out of `inputs`."""
        x = self.draw_projector(inputs.to(self.draw_embed.weight.dtype))
        if span.start == 0:
            mark = self.draw_embed.weight[self.marks.image_start]
            x = torch.cat((mark.to(x.dtype).expand(len(x), 1, -1), x), 1)
        return x + self.level(self.levels[span]) + self.table[span]

    def code_tokens(self, codes: Tensor) -> Tensor:
        codes = codes.unflatten(0, (-1, len(self.table)))
        inputs = self.quantizer.running_inputs(codes, self.config.scales)
        return self.cells(inputs, slice(0, len(self.table))).flatten(0, 1)

    def code_error(self, hidden: Tensor, codes: Tensor) -> Tensor:
        return next_token.cross_entropy(self.draw_head(hidden), self.config.vocabulary_size + codes)

    def code_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.draw_head.weight[self.config.vocabulary_size:])

    # -- drawing ------------------------------------------------------------------------------------------------------

    def paint(self, grid: Grid, contexts: dict[str, Reader], sampling: Sampling, generator: torch.Generator, index: int,
              emit: Emit, more: bool) -> Generator[Work, Any, Tensor]:
        if grid != self.config.scales[-1]:
            raise ValueError(f"expected pictures of {self.config.picture} pixels, whose cells have learned places, got "
                             f"{tuple(side * self.stride for side in grid)}; fix: draw pictures of that size")
        numbers = next_scale.uniforms(self.config.scales, (), generator, len(sampling.again))
        return (yield from self.draw(numbers, contexts, sampling, index, emit))

    def draw(self, uniforms: Sequence[Tensor], contexts: dict[str, Reader], sampling: Sampling, index: int,
             emit: Emit) -> Generator[Work, Any, Tensor]:
        """Codes (L,) of a picture, chosen by uniform numbers (n,) per pass. What later scales see of one is what its
        first pass read: more passes leave no trace in the contexts."""
        scales, passes = self.config.scales, 1 + len(sampling.again)
        spans = next_scale.spans(scales)
        names = list(dict.fromkeys(["full", *(b.context for b in sampling.guidance.branches if b.scale != 1)]))
        readers = {name: contexts[name] if name == "full" else contexts[name].fork() for name in names}
        spare: dict[str, Reader] = {}
        none = self.table.new_zeros(1, 0, self.config.codec.quantizer.width)
        how = next_scale.every_scale(len(scales), sampling.guidance, sampling.codes, sampling.again)
        sampler = next_scale.sample(self.quantizer, scales, "running", how, uniforms)
        try:
            ask = next(sampler)
            while True:
                if ask.turn == 0 and ask.scale and passes > 1:
                    spare = {name: reader.fork() for name, reader in readers.items()}
                x = self.cells(none if ask.inputs is None else ask.inputs[None], spans[ask.scale])[0]
                asked = spare if ask.turn else readers
                answers = yield Together([self._scale(asked[name], ask.scale, x, not ask.turn) for name in names])
                ask = sampler.send(dict(zip(names, answers, strict=True)))
                if ask.codes is not None and ask.turn == 0:
                    yield from show(ask.codes, scales[-1], sampling, index, emit, Progress(
                        step=ask.scale, steps=len(scales), scale=scales[ask.scale - 1]))
        except StopIteration as stop:
            return torch.cat([step.codes for step in stop.value])

    def _scale(self, reader: Reader, scale: int, x: Tensor, keep: bool) -> Read:
        w = self.writer(reader)
        self.write_scale(w, 0, scale)
        return Read(reader, w, codes=[x], keep=keep)

    def given(self, works: Sequence[Read]) -> Tensor | None:
        """Cells come as states."""
        cells = [x for w in works for x in w.codes]
        return torch.cat(cells) if cells else None


def small_codec() -> DualTokenizerConfig:
    """The tokenizer of `small`: 64 px, 8 x 8 cells, codes of 16 semantic and 8 pixel channels."""
    side = PyramidConfig(channels=64, channel_mult=(1, 1), blocks=(1, 1), attention=(), norm_groups=16)
    tower = VisionConfig(**stored_config("zoo/clip")["vision"])
    return DualTokenizerConfig(
        semantic_encoder=tower, encoder=side, decoder=side, latent_channels=64, feature_width=tower.width, patch=4,
        semantic_decoder=TowerConfig(width=128, mlp_width=256, layers=2, heads=4, patch=1, side=8),
        quantizer=_codes(512, (16, 8), (1, 2, 3, 4, 6, 8)))


def clip_b() -> DualTokenizerConfig:
    """The released `clipb_32k_enhanced`: 16 x 16 pixels per cell, 680 codes at 224 px as trained, 817 at 256 px."""
    student = TowerConfig(width=768, mlp_width=3072, layers=12, heads=12, patch=16, side=14, norm_eps=1e-5,
                          gelu="quick", class_token=True, patch_bias=False, first_norm=True, last_norm=True,
                          table_offset=0.1)
    back = TowerConfig(width=768, mlp_width=3072, layers=3, heads=12, patch=1, side=14, gelu="exact", class_token=True,
                       last_norm=True, table_offset=0.1)
    return DualTokenizerConfig(semantic_encoder=student, semantic_decoder=back, encoder=PyramidConfig(),
                               decoder=PyramidConfig(channels=256, blocks=(5,) * 5),
                               quantizer=_codes(32768, (32, 8), (1, 2, 4, 6, 8, 10, 12, 14, 16)))


def _codes(values: int, widths: tuple[int, int], sides: Sequence[int]) -> ResidualConfig:
    """Semantic and pixel channels under one index, on square scales."""
    book = JointConfig(parts=tuple(CodebookConfig(values=values, width=width) for width in widths))
    return ResidualConfig(codebook=book, scales=tuple((side, side) for side in sides), compare="step")


def _llama(width: int, heads: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=heads, head_dim=width // heads, hidden=hidden, qkv_bias=False,
                       norm_eps=1e-5)


def _drawing(width: int, heads: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=heads, head_dim=width // heads, hidden=hidden, qkv_bias=False,
                       norm_eps=1e-5, qk_norm=True, qk_eps=1e-6, norm_behind=True)


def _mlp(inside: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, width), nn.GELU(), nn.Linear(width, width))


def _guided(scale: float, *passes: TokenSampling) -> Sampling:
    return Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=scale),), schedule="linear"),
                    codes=passes[0], again=passes[1:])
