"""Show-o: one transformer that says texts token by token and draws pictures by filling in masked codes
(arXiv 2408.12528).

    draw    <|t2i|> start text end  <|soi|> codes, many of them [MASK] <|eoi|>     every code is asked in its own place
    read    <|mmu|> <|soi|> codes <|eoi|>  start text end                          texts are asked one token ahead
    L = w_text CE(text) / n_text + w_image CE(masked codes) / n_masked

- One table and one head over text tokens, ten special tokens, codes and [MASK]; what a token means is told by the
  attention alone: texts are causal, the tokens of a picture see each other and everything before (omni-attention).
- The block is that of Phi-1.5 with norms of queries and keys. Codes come from a frozen tokenizer by sign (LFQ).
- Pictures are read through the same codes. Guidance on logits: l = l_u + (1 + w)(l_c - l_u), w = 1.75.

`variant` "released" also asks for <|soi|> and <|eoi|> in their own places, as part of the mean over masked codes, and
samples as `objectives.masked_token` says of it; "paper" does neither.

Differs from the paper: documents may hold several pictures and texts, every text has its marks, and no padding stands
before a text (hidden from the others, it only shifts all positions). A drawn picture that is followed by more is read
back as a clean one. Texts without pictures have no weight of their own; mix the data instead.
"""
import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.document import Image, Piece
from diptych.objectives import masked_token, next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.masked_token import Step, Variant
from diptych.parts.blocks import BlockConfig
from diptych.parts.experts import Coupling
from diptych.parts.grammar import Grammar
from diptych.parts.interleave import Frame, Layout, Marks, Page, Writer
from diptych.parts.masks import interleaved
from diptych.parts.positions import Rope
from diptych.parts.quantize import SignConfig, VectorConfig
from diptych.parts.tokens import Mode
from diptych.parts.trunks import Trunk, pick
from diptych.parts.vocabulary import Vocabulary
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.base import Emit, Progress, Sampling, Work
from diptych.systems.batch import Batch
from diptych.systems.coded import Coded, Steps
from diptych.systems.works import Encode, Grid, Read, Reader, Together, show

# behind the text tokens, in this order; then codes and [MASK]
SPECIALS = ("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")


@dataclass(frozen=True, kw_only=True)
class ShowOConfig:
    block: BlockConfig
    depth: int
    rope_theta: float = 1e4
    rotary: float = 0.5  # share of a head's channels that rotate
    text_size: int  # tokens of the text vocabulary
    tokenizer: str = ""  # a tokenizer.json, zoo/NAME, or a file of the model's folder
    ends: tuple[int, int] | None = None  # ids of the marks that open and close a text; None = from the tokenizer
    codec: VQTokenizerConfig
    picture: tuple[int, int] = (256, 256)  # pixels of pictures, read or drawn by default
    variant: Variant = "released"
    text_weight: float = 1.0
    image_weight: float = 1.0
    drop_text: float = 0.1  # condition dropping for guidance
    row: int = 4096  # tokens of a packed row at least (longer documents make longer rows)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"expected variant paper or released, got {self.variant!r}")
        if self.ends is not None:
            object.__setattr__(self, "ends", tuple(self.ends))  # lists come from YAML


class ShowO(Coded):
    Config = ShowOConfig
    config: ShowOConfig
    mask = interleaved
    scores_codes = False

    def __init__(self, config: ShowOConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        c = self.config = config
        if vocabulary is None and c.tokenizer:
            vocabulary = self.read_vocabulary(c, c.tokenizer)
        self.vocabulary = vocabulary
        self.codec = VQTokenizer(c.codec).requires_grad_(False)
        self.values = self.codec.layout(*c.picture).values
        self.first_code = c.text_size + len(SPECIALS)
        size = self.first_code + self.values + 1
        self.embed = nn.Embedding(size, c.block.width)
        self.trunk = Trunk(c.block, Coupling.dense(c.depth, 2), Rope(int(c.block.head_dim * c.rotary), c.rope_theta))
        self.head = nn.Linear(c.block.width, size)
        for part in (self.embed, self.trunk, self.head):
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    for parameter in module.parameters(recurse=False):
                        nn.init.normal_(parameter, std=0.02)

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> ShowOConfig:
        """For tests: seconds on a CPU."""
        pyramid = PyramidConfig(channels=8, channel_mult=(1, 1, 2, 2), blocks=(1,) * 4, attention=(3,), norm_groups=4)
        return cls._world(width=64, heads=2, hidden=256, depth=2, codec=VQTokenizerConfig(
            encoder=pyramid, decoder=pyramid, latent_channels=16, quantizer=VectorConfig(codebook=SignConfig(width=6))))

    @classmethod
    def small(cls) -> ShowOConfig:
        """The world at 64 px, 64 codes, about 8M parameters; the tokenizer has the shape of the zoo's `vq`."""
        return cls._world(width=256, heads=4, hidden=1024, depth=8, codec=VQTokenizerConfig.small())

    @classmethod
    def _world(cls, *, width: int, heads: int, hidden: int, depth: int, codec: VQTokenizerConfig) -> ShowOConfig:
        return ShowOConfig(block=_phi(width, heads, hidden), depth=depth, text_size=1024, tokenizer="zoo/tokenizer",
                           codec=codec, picture=(64, 64), row=192, sampling=_guided(2.0, 12))

    @classmethod
    def paper(cls) -> ShowOConfig:
        """Show-o at 256 px: Phi-1.5, 8192 codes by sign (released `config.json`)."""
        return ShowOConfig(block=_phi(2048, 32, 8192), depth=24, text_size=50295, ends=(50256, 50256),
                           codec=magvit(), sampling=_guided(1 + 1.75, 18))

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    def special(self, name: str) -> int:
        return self.config.text_size + SPECIALS.index(name)

    @cached_property
    def marks(self) -> Marks:  # type: ignore[override]
        ends = self.config.ends
        if ends is None:
            v = self.need_vocabulary()
            ends = v.start, v.end
        return Marks(*ends, self.special("<|soi|>"), self.special("<|eoi|>"))

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]
        m = self.marks
        return Layout(read=Grammar(start=(self.special("<|mmu|>"), m.image_start), end=(m.image_end,)),
                      code=Grammar(start=(m.image_start,), end=(m.image_end,)), spread=True)

    def frame_at(self, pieces: Sequence[Piece], i: int) -> Frame:
        """The first of the texts that lead to a drawn picture begins with the task token."""
        frame = super().frame_at(pieces, i)
        text = not isinstance(pieces[i], Image)
        following = next((p for p in pieces[i:] if isinstance(p, Image)), None)
        if text and following is not None and following.target and (i == 0 or isinstance(pieces[i - 1], Image)):
            return dataclasses.replace(frame, lead=(self.special("<|t2i|>"), *frame.lead))
        return frame

    def write_null(self, w: Writer, ids: list[int]) -> None:
        """The task token and an empty text."""
        if ids and ids[0] == self.special("<|t2i|>"):
            w.text([], frame=Frame(lead=(ids[0],)))

    def drop_rates(self) -> tuple[float, float, float]:
        return self.config.drop_text, 0.0, 0.0

    def write_seen(self, w: Writer, seen: Tensor, coded: Tensor, pictures: list[Tensor], views: list[Tensor]) -> None:
        if not pictures or pictures[-1] is not coded:  # one that was just drawn is encoded once
            pictures.append(coded)
        self.write_clean(w, len(pictures) - 1, self.grid(coded))

    def write_clean(self, w: Writer, number: int, grid: Grid) -> None:
        assert self.layout.read is not None
        w.code(number, self.layout.read.plan(grid), drawn=False, mode=Mode.FULL, ahead=False)

    def write_drawn(self, w: Writer, number: int, grid: Grid) -> None:
        """Masked codes, seen by themselves alone. What follows does not count them: it reads the clean picture."""
        before = w.position
        w.code(number, w.plan(grid), drawn=True, mode=Mode.NOISE, ahead=False)
        w.position = before

    def lay_out(self, written: Sequence[tuple[Writer, list[Tensor], list[Tensor]]]) -> Batch:
        return dataclasses.replace(super().lay_out(written), chance=True)

    # -- the network --------------------------------------------------------------------------------------------------

    def code_tokens(self, codes: Tensor) -> Tensor:
        return self.embed(self.first_code + codes)

    def code_logits(self, hidden: Tensor) -> Tensor:
        own = slice(self.first_code, self.first_code + self.values)
        return F.linear(hidden, self.head.weight[own], self.head.bias[own])

    def corrupt(self, codes: list[Tensor], drawn: list[bool], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return masked_token.corrupt(codes, drawn, self.values, generator)

    def picture_errors(self, hidden: list[Tensor], page: Page, codes: Tensor, counted: Tensor) -> Tensor:
        """Over the whole vocabulary; "released" with the marks around every picture."""
        places, labels = page.questions[counted], self.first_code + codes[counted]
        if self.config.variant == "released":
            edges = picture_edges(page.questions)
            places, labels = torch.cat((places, edges)), torch.cat((labels, page.ids.flatten()[edges]))
        return masked_token.loss(self.head(pick(hidden, page.tokens, places)), labels)

    # -- drawing ------------------------------------------------------------------------------------------------------

    def _look_at(self, reader: Reader, pixels: Tensor, x: Tensor | None, grid: Grid | None,
                 copy: bool) -> Generator[Work, Any, None]:
        picture = self.views(pixels)[1]
        codes: Tensor = (yield Encode(picture)) if x is None else x
        w = self.writer(reader)
        self.write_clean(w, 0, grid or self.grid(picture))
        yield Read(reader, w, codes=[codes])

    def paint(self, grid: Grid, contexts: dict[str, Reader], sampling: Sampling, generator: torch.Generator, index: int,
              emit: Emit, more: bool) -> Steps:
        count = grid[0] * grid[1]
        x = torch.full((count,), self.values, device=self.device)
        uniforms = torch.rand((2, sampling.evaluations, count), generator=generator)
        return (yield from self.unmask(x, uniforms[0], uniforms[1], grid, contexts, sampling, index, emit))

    def unmask(self, x: Tensor, uniforms: Tensor, order: Tensor, grid: Grid, contexts: dict[str, Reader],
               sampling: Sampling, index: int, emit: Emit, steps: list[Step] | None = None) -> Steps:
        """Fill in the hidden ones of codes x (n,), the others stay (inpainting). Uniform numbers (T, n) choose codes
        and, through Gumbel noise, their `order`; T is the number of steps. `steps` collects them."""
        names = list(dict.fromkeys(["full", *(b.context for b in sampling.guidance.branches if b.scale != 1)]))
        chain = masked_token.fill(x, uniforms, order, self.values, sampling.codes, sampling.temperature,
                                  self.config.variant, steps)
        x, known, _ = next(chain)
        for k in count(1):
            answers = yield Together([self._asked(contexts[name], x, grid) for name in names])
            try:
                x, known, drawn = chain.send(next_token.guide(dict(zip(names, answers, strict=True)),
                                                              sampling.guidance, known))
            except StopIteration as stop:
                return stop.value
            if drawn is not None:
                yield from show(drawn, grid, sampling, index, emit, Progress(
                    step=k, steps=len(uniforms), time=known, known=(x == drawn).view(grid)))
        raise AssertionError("unreachable")

    def _asked(self, reader: Reader, x: Tensor, grid: Grid) -> Read:
        w = self.writer(reader)
        self.write_drawn(w, 0, grid)
        return Read(reader, w, codes=[x], keep=False)


def picture_edges(questions: Tensor) -> Tensor:
    """The places around every run of consecutive ones among `questions` (m,)."""
    ends = questions.diff() > 1
    edge = torch.ones(min(len(questions), 1), dtype=torch.bool, device=questions.device)
    return torch.cat((questions[torch.cat((edge, ends))] - 1, questions[torch.cat((ends, edge))] + 1))


def magvit() -> VQTokenizerConfig:
    """MAGVIT-v2 of Show-o: 16 x 16 pixels per code of 13 bits."""
    encoder = PyramidConfig(channels=128, channel_mult=(1, 2, 2, 4, 4), blocks=(4, 3, 4, 3, 4), attention=())
    decoder = dataclasses.replace(encoder, channel_mult=(1, 1, 2, 2, 4), blocks=(4, 4, 3, 4, 3))
    return VQTokenizerConfig(encoder=encoder, decoder=decoder, latent_channels=13,
                             quantizer=VectorConfig(codebook=SignConfig(width=13)))


def _phi(width: int, heads: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=heads, head_dim=width // heads, hidden=hidden, qkv_bias=True,
                       qk_norm=True, norm_eps=1e-5, norm="layer", mlp="gelu", bias=True, parallel=True)


def _guided(scale: float, evaluations: int) -> Sampling:
    return Sampling(evaluations=evaluations, guidance=Guidance(branches=(Branch(context="no_text", scale=scale),)))
