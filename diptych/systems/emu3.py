"""Emu3: one language model from scratch and one vocabulary of words and picture codes; everything is the next token
(arXiv 2409.18869).

    picture    boi  "H*W"  img   W codes eol, H times   eof eoi          W and H in codes, said with the digits of texts
    draw       bos, prompt, picture                    read    bos, ... USER:, picture, question, ... ASSISTANT:, answer
    L = w_text CE(text) / n_text + w_image CE(codes) / n_codes + w_block CE(the rest of drawn blocks) / n_block

- No tower and no diffusion: pictures are read through the codes that they are drawn in, all of it is causal, and one
  softmax is over all words.
- The size stands in the sequence and eol closes every row, so that a picture may have any aspect. Whoever asks for a
  drawing gives its size; the grammar then forces everything but the codes.
- w_block teaches size, row ends and closing marks too, as pretraining does; the released fine-tuning for drawing learns
  codes alone (`block_weight: 0`) and leaves the rest to the grammar.
- Guidance: s = l_u + w (l_c - l_u) with log-probs of the whole vocabulary, w = 3, before the grammar and top_k; among
  codes that is the distribution of guidance on logits. l_u reads a prompt of defects (`negative`) and has a context of
  its own; training drops a prompt by leaving it empty.
- The tokenizer of pictures is one of two: of clips, in which a picture is four equal frames (`parts.video_codec`, the
  published one), or of pictures alone (`parts.vq`).

Drawing and answering are released as two models of this one form. `small` draws with the zoo's `vq`, which is 2-D: the
zoo has no tokenizer of clips.

Differs from the paper: no video in documents, though the tokenizer takes clips; texts, codes and blocks are averaged
apart, and of a document only the targets are learnt; no dropout (0.1, on embeddings and residuals too). Prompts of the
release end with " masterpiece, film grained, best quality.", which is left to those who write them. Texts of `small`
have the marks of this library in place of the template.
"""
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from diptych.document import Document, Image, Piece, Text
from diptych.objectives import next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.experts import Coupling
from diptych.parts.grammar import Grammar
from diptych.parts.interleave import Frame, Layout, Marks, Page, Writer
from diptych.parts.pictures import scale_to, size_of_area, size_within
from diptych.parts.positions import Rope
from diptych.parts.quantize import CodebookConfig, VectorConfig
from diptych.parts.tokens import Modality
from diptych.parts.trunks import Trunk, pick
from diptych.parts.turns import Turns
from diptych.parts.video_codec import VideoTokenizerConfig
from diptych.parts.vocabulary import Vocabulary
from diptych.parts.vq import VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.base import Sampling
from diptych.systems.batch import Batch
from diptych.systems.flat import Flat
from diptych.systems.janus import WORLD_MARKS

CHAT = Turns(system=("", ""), user=("You are a helpful assistant. USER: ", ". ASSISTANT:"), assistant=("", ""), gap="",
             between="")
MARK_NAMES = ("<|extra_203|>", "<|extra_204|>", "<|image start|>", "<|image end|>")
NEGATIVE = ("lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
            "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry.")
SIZE = "0123456789*"  # characters that state a size, each one token


@dataclass(frozen=True, kw_only=True)
class Emu3Config:
    """Ids below `first_code` are texts, marks and what stands between codes; the codes follow. `grammar` of a picture's
    block; None: the marks of the tokenizer around it, with the last three ids before the codes for img, eol and eof."""

    block: BlockConfig
    depth: int
    rope_theta: float = 1e6
    first_code: int
    tokenizer: str = ""  # a tokenizer.json, zoo/NAME, or a file of the model's folder
    mark_names: tuple[str, str, str, str] = MARK_NAMES
    marks: Marks | None = None  # ids of start, end, image start, image end; None = from the tokenizer
    grammar: Grammar | None = None
    turns: Turns | None = None  # the template around an answer; None = every text between the marks
    codec: VQTokenizerConfig | VideoTokenizerConfig
    picture: tuple[int, int] = (720, 720)  # pixels drawn by default; pictures to learn to draw have this area
    read_area: tuple[int, int] = (512**2, 1024**2)  # fewest and most pixels of pictures that are read
    negative: str = ""  # what guidance reads in place of a prompt
    text_weight: float = 1.0
    image_weight: float = 0.5  # of codes against words, in the mean of all in the paper
    block_weight: float = 1.0
    drop_text: float = 0.05  # condition dropping for guidance (released fine-tuning)
    row: int = 4096  # tokens of a packed row at least (longer documents make longer rows)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name in ("picture", "read_area", "mark_names"):  # lists come from YAML
            object.__setattr__(self, name, tuple(getattr(self, name)))
        stride = self.codec.downsample
        if any(side % stride or side < stride for side in self.picture):
            raise ValueError(f"expected picture in multiples of {stride}, the stride of the codec, got {self.picture}")
        if not stride**2 <= self.read_area[0] <= self.read_area[1]:
            raise ValueError(f"expected read_area of at least {stride**2} pixels, the fewest first, "
                             f"got {self.read_area}")


class Emu3(Flat):
    Config = Emu3Config
    config: Emu3Config

    def __init__(self, config: Emu3Config, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        c = self.config = config
        if vocabulary is None and c.tokenizer:
            vocabulary = self.read_vocabulary(c, c.tokenizer)
        self.vocabulary = vocabulary
        self.codec = c.codec.build().requires_grad_(False)
        self.first_code, self.values = c.first_code, self.codec.layout(*c.picture).values
        size = c.first_code + self.values
        self.embed = nn.Embedding(size, c.block.width)
        self.trunk = Trunk(c.block, Coupling.dense(c.depth, 2), Rope(c.block.head_dim, c.rope_theta))
        self.head = nn.Linear(c.block.width, size, bias=False)
        normal_weights(m for part in (self.embed, self.trunk, self.head) for m in part.modules())

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> Emu3Config:
        """For tests: seconds on a CPU."""
        pyramid = PyramidConfig(channels=8, channel_mult=(1, 1, 2, 2), blocks=(1,) * 4, attention=(3,), norm_groups=4)
        book = VectorConfig(codebook=CodebookConfig(values=64))
        return cls._world(width=64, heads=2, hidden=128, depth=2, codec=VQTokenizerConfig(
            encoder=pyramid, decoder=pyramid, latent_channels=16, quantizer=book))

    @classmethod
    def small(cls) -> Emu3Config:
        """The world at 64 px, 64 codes, about 8M parameters; the tokenizer has the shape of the zoo's `vq`."""
        return cls._world(width=256, heads=4, hidden=640, depth=8, codec=VQTokenizerConfig.small())

    @classmethod
    def _world(cls, *, width: int, heads: int, hidden: int, depth: int, codec: VQTokenizerConfig) -> Emu3Config:
        return Emu3Config(block=_llama(width, heads, heads // 2, hidden), depth=depth, rope_theta=1e4,
                          first_code=1024 + 3, tokenizer="zoo/tokenizer", mark_names=WORLD_MARKS, codec=codec,
                          picture=(64, 64), read_area=(32**2, 64**2), image_weight=1.0, drop_text=0.1,
                          row=224, sampling=_guided(2.0, TextSampling()))

    @classmethod
    def paper(cls) -> Emu3Config:
        """Emu3-Stage1, Emu3-Gen and Emu3-Chat: 8B parameters and the tokenizer of clips (released `config.json`)."""
        return Emu3Config(
            block=_llama(4096, 32, 8, 14336), depth=32, first_code=151854,
            marks=Marks(151849, 151850, 151852, 151853), turns=CHAT, codec=VideoTokenizerConfig.paper(),
            grammar=Grammar(start=(151852,), digits=tuple(range(15, 25)), times=(9,), opened=(151851,),
                            row_end=(151846,), end=(151847, 151853)),
            negative=NEGATIVE, sampling=_guided(3.0, TextSampling(max_tokens=1024), top_k=2048))

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    @classmethod
    def read_vocabulary(cls, config: Emu3Config, source: str | Path) -> Vocabulary:
        return Vocabulary(source, marks=config.mark_names)

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]
        grammar, first, marks = self.config.grammar, self.config.first_code, self.marks
        if grammar is None:
            known = self.need_vocabulary().tokenizer.token_to_id
            ids = [i for character in SIZE if (i := known(character)) is not None]
            if len(ids) < len(SIZE):
                raise ValueError(f"expected a token for each of {SIZE}, to state sizes with, got {ids}; "
                                 "fix: set grammar")
            grammar = Grammar(start=(marks.image_start,), digits=tuple(ids[:-1]), times=(ids[-1],), opened=(first - 3,),
                              row_end=(first - 2,), end=(first - 1, marks.image_end))
        return Layout(code=grammar, spread=True)

    def frame_at(self, pieces: Sequence[Piece], i: int) -> Frame:
        """The template is for answers; a drawing is asked for in its words alone."""
        turns, piece = self.config.turns, pieces[i]
        if turns is None:
            return super().frame_at(pieces, i)
        if any(p.target and isinstance(p, Image) for p in pieces):
            return Frame(lead=(self.marks.start,) * (i == 0), open=False,
                         close=piece.target and not isinstance(piece, Image))
        return turns.frame(pieces[i - 1] if i else None, piece, self.need_vocabulary(), self.marks.start)

    def write(self, document: Document, drop: tuple[bool, bool, bool] = (False, False, False)
              ) -> tuple[Writer, list[Tensor], list[Tensor]]:
        """A prompt that is dropped is empty, not the negative one."""
        if drop[0]:
            pieces = tuple(p if isinstance(p, Image) else Text(text="", role=p.role) for p in document
                           if isinstance(p, Image) or not p.target)
            document = dataclasses.replace(document, pieces=pieces)
        return super().write(document, (False, *drop[1:]))

    def write_null(self, w: Writer, ids: list[int]) -> None:
        words = self.need_vocabulary().encode(self.config.negative) if self.config.negative else []
        if self.config.turns is None:
            w.text(words)
        else:
            w.text([*ids[: w.position == 0], *words], open=False, close=False)

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As it is read, and as it is drawn; either in its own aspect."""
        c, (height, width) = self.config, pixels.shape[1:]
        drawn = size_of_area(height, width, c.picture[0] * c.picture[1], self.stride)
        return scale_to(pixels, size_within(height, width, *c.read_area, self.stride)), scale_to(pixels, drawn)

    # -- training -----------------------------------------------------------------------------------------------------

    def lay_out(self, written: Sequence[tuple[Writer, list[Tensor], list[Tensor]]]) -> Batch:
        batch = super().lay_out(written)
        counted = len(forced_places(batch.page)) if self.config.block_weight else 0
        return dataclasses.replace(batch, further={"block": float(counted)})

    def further(self, batch: Batch, kept: list[Tensor], generator: torch.Generator) -> dict[str, tuple[float, Tensor]]:
        """What the grammar forces when a block is drawn."""
        page, weight = batch.page, self.config.block_weight
        places = forced_places(page)
        if not weight or not len(places):
            return {}
        logits = self.head(pick(kept, page.tokens, places - 1))
        return {"block": (weight, next_token.cross_entropy(logits, page.ids.flatten()[places]))}


def forced_places(page: Page) -> Tensor:
    """Flat places (m,) of the fixed tokens in drawn blocks, but for the marks that open a block."""
    t = page.tokens
    starts = torch.ones(t.shape, dtype=torch.bool, device=t.segment.device)
    starts[:, 1:] = (t.document.diff(dim=1) != 0) | (t.segment.diff(dim=1) != 0)
    run = starts.flatten().cumsum(0) - 1
    drawn = torch.zeros(t.segment.numel(), dtype=torch.bool, device=run.device)
    drawn[run[((t.modality == Modality.CODE) & t.target).flatten()]] = True
    return torch.nonzero(drawn[run] & (t.modality == Modality.TEXT).flatten() & ~starts.flatten()).squeeze(1)


def _llama(width: int, heads: int, kv_heads: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=kv_heads, head_dim=width // heads, hidden=hidden,
                       qkv_bias=False, norm_eps=1e-5)


def _guided(scale: float, text: TextSampling, top_k: int = 0) -> Sampling:
    return Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=scale),)), text=text,
                    codes=TokenSampling(top_k=top_k))
