"""MMaDA: one transformer that fills in masked tokens, of texts and of pictures, under one mask (arXiv 2505.15809).

    draw     <t2i> start text end  <soi> codes <eoi>          some codes hidden: cos(pi u / 2) of them, u ~ U(0, 1)
    read     <mmu> <soi> codes <eoi>  start text end  start answer end end ...    each token hidden with p ~ U(0, 1)
    reason   <r2i> start text end  start reasoning end end ...;  then as a text that leads to  <soi> codes <eoi>
    L = w_text sum(CE / p) / n_answer + w_image CE(hidden codes) / n_hidden              in place: nothing is shifted

- The trunk is that of LLaDA (LLaMA without a causal mask): all tokens see each other, the network is never told the
  time. One table and one head over texts, special tokens, [MASK] and codes; codes are signs of a frozen tokenizer.
- Pictures are drawn in few steps that keep the surest codes (`objectives.masked_token`), guided by an empty prompt.
- Texts are drawn block by block in a given number of slots (`objectives.masked_diffusion`), guided, if at all, by a
  prompt of masks. What follows an answer is the end mark again and again, which the loss includes.
- Known tokens stay: `inpaint` draws a region of a picture anew.
- `score` hides each target once, a `share` of it if one is given, and gives log-probs of its hidden tokens alone.

`variant` "released", of checkpoints and not of the paper: pads before a prompt to draw from are seen in training
(scores of real pairs are higher by 1, where pads were meant to be hidden), <soi> and <eoi> are asked too, as part of
the mean over hidden codes, and codes are sampled as `objectives.masked_token` says of it.

Differs from the paper: documents may hold several pictures and texts; reasoning and the picture it leads to are two
sequences, as they are also generated, where the paper hides both by one p. Texts without pictures have no weight of
their own; mix the data instead. UniGRPO is no part of it.
"""
import copy
import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.document import Document, Image, Piece
from diptych.objectives import masked_diffusion, masked_token, next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.masked_token import Variant
from diptych.objectives.next_token import TextSampling
from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.experts import Coupling
from diptych.parts.grammar import Grammar
from diptych.parts.interleave import Frame, Layout, Marks, Page, Writer
from diptych.parts.masks import key_is, query_is
from diptych.parts.positions import Rope
from diptych.parts.quantize import SignConfig, VectorConfig
from diptych.parts.tokens import Modality, Mode
from diptych.parts.trunks import Trunk, pick
from diptych.parts.turns import Turns
from diptych.parts.vocabulary import Vocabulary
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.base import Emit, Losses, Sampling
from diptych.systems.batch import Batch
from diptych.systems.bidirectional import KEEP, Bidirectional, Drop, Written
from diptych.systems.coded import Steps
from diptych.systems.show_o import magvit, picture_edges
from diptych.systems.works import Grid, Sequenced

REAL = ~(key_is("modality", Modality.FILL) | query_is("modality", Modality.FILL))
PADS_SEEN = Bidirectional.mask.favour(REAL, 1.0)
WORLD_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
EOT = "<|eot_id|>"


def _turn(role: str) -> tuple[str, str]:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n", EOT


TURNS = Turns(system=_turn("system"), user=_turn("user"), assistant=_turn("assistant"), gap="")  # of LLaDA-Instruct


@dataclass(frozen=True, kw_only=True)
class Specials:
    """Ids among those of texts: marks of a picture, tasks, what pads a prompt, and the mask."""

    image_start: int
    image_end: int
    draw: int  # <|t2i|>
    read: int  # <|mmu|>
    reason: int  # <|r2i|>
    pad: int
    mask: int


@dataclass(frozen=True, kw_only=True)
class MmadaConfig:
    block: BlockConfig
    depth: int
    rope_theta: float = 5e5
    text_size: int  # tokens of the text vocabulary, special ones and the mask among them; codes follow
    specials: Specials
    tokenizer: str = ""  # a tokenizer.json, zoo/NAME, or a file of the model's folder
    mark_names: tuple[str, str, str, str] = WORLD_MARKS
    ends: tuple[int, int] | None = None  # ids of the marks that open and close a text; None = from the tokenizer
    turns: Turns | None = None  # the chat template of texts that draw nothing; None = every text between the marks
    codec: VQTokenizerConfig
    picture: tuple[int, int] = (512, 512)  # pixels of pictures, read or drawn by default
    slots: int = 1024  # tokens of a text answer
    prompt: int = 513  # tokens before a drawn picture, its task among them, that "released" pads to
    variant: Variant = "paper"
    text_weight: float = 1.0
    image_weight: float = 1.0
    drop_text: float = 0.1  # condition dropping for guidance
    row: int = 4096  # tokens of a packed row at least (longer sequences make longer rows)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released") or self.slots < 1:
            raise ValueError("expected variant paper or released and slots >= 1, "
                             f"got {self.variant!r} and {self.slots}")
        if max(dataclasses.astuple(self.specials)) >= self.text_size:
            raise ValueError(f"expected special tokens within {self.text_size} text tokens, got {self.specials}; "
                             "fix: count them in text_size")
        for name in ("mark_names", "ends"):  # lists come from YAML
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))


@dataclass
class Hidden:
    """A batch with its targets partly hidden: `page` and `codes` as the network reads them; of all n slots where they
    are asked, what they hold, whether they are hidden and with which probability; of all m codes to draw the same."""

    page: Page
    codes: Tensor | None
    slots: Tensor
    words: Tensor
    hidden: Tensor
    p: Tensor
    answers: Tensor
    asked: Tensor


class Mmada(Bidirectional):
    Config = MmadaConfig
    config: MmadaConfig
    ahead = False

    def __init__(self, config: MmadaConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        c = self.config = config
        if vocabulary is None and c.tokenizer:
            vocabulary = self.read_vocabulary(c, c.tokenizer)
        self.vocabulary = vocabulary
        if c.variant == "released":
            self.mask = PADS_SEEN
        self.codec = VQTokenizer(c.codec).requires_grad_(False)
        self.values = self.codec.layout(*c.picture).values
        size = c.text_size + self.values
        self.embed = nn.Embedding(size, c.block.width)
        self.trunk = Trunk(c.block, Coupling.dense(c.depth, 2), Rope(c.block.head_dim, c.rope_theta))
        self.head = nn.Linear(c.block.width, size, bias=False)
        for part in (self.embed, self.trunk, self.head):
            normal_weights(part.modules())

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> MmadaConfig:
        """For tests: seconds on a CPU."""
        pyramid = PyramidConfig(channels=8, channel_mult=(1, 1, 2, 2), blocks=(1,) * 4, attention=(3,), norm_groups=4)
        return cls._world(width=64, heads=2, hidden=128, depth=2, row=400, codec=VQTokenizerConfig(
            encoder=pyramid, decoder=pyramid, latent_channels=16, quantizer=VectorConfig(codebook=SignConfig(width=6))))

    @classmethod
    def small(cls) -> MmadaConfig:
        """The world at 64 px, 64 codes, about 8M parameters; the tokenizer has the shape of the zoo's `vq`."""
        return cls._world(width=256, heads=4, hidden=640, depth=8, row=256, codec=VQTokenizerConfig.small())

    @classmethod
    def _world(cls, *, width: int, heads: int, hidden: int, depth: int, row: int,
               codec: VQTokenizerConfig) -> MmadaConfig:
        names = [f.name for f in dataclasses.fields(Specials)]
        special = Specials(**{name: 1024 + i for i, name in enumerate(names)})  # behind the words
        return MmadaConfig(block=_llada(width, heads, hidden), depth=depth, text_size=1031, specials=special,
                           tokenizer="zoo/tokenizer", codec=codec, picture=(64, 64), slots=48, prompt=64, row=row,
                           sampling=_sampling(2.0, 12, TextSampling(steps=24, block=16)))

    @classmethod
    def paper(cls) -> MmadaConfig:
        """MMaDA-8B at 512 px: LLaDA-8B, MAGVIT-v2 of Show-o with 8192 codes; the sampling of the paper."""
        special = Specials(image_start=126084, image_end=126085, draw=126088, read=126089, reason=126094, pad=126093,
                           mask=126336)
        marks = ("<|startoftext|>", "<|endoftext|>", "<|startoftext|>", "<|endoftext|>")  # pictures have `specials`
        text = TextSampling(max_tokens=1024, steps=512, block=64)
        return MmadaConfig(block=_llada(4096, 32, 12288), depth=32, text_size=126464, specials=special,
                           mark_names=marks, ends=(126080, 126081), turns=TURNS, codec=magvit(), variant="released",
                           sampling=_sampling(1 + 3.5, 50, text))

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    @classmethod
    def read_vocabulary(cls, config: MmadaConfig, source: str | Path) -> Vocabulary:
        return Vocabulary(source, marks=config.mark_names)

    @cached_property
    def marks(self) -> Marks:  # type: ignore[override]
        c = self.config
        ends = c.ends or (self.need_vocabulary().start, self.need_vocabulary().end)
        return Marks(*ends, c.specials.image_start, c.specials.image_end)

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]
        m = self.marks
        return Layout(read=Grammar(start=(self.config.specials.read, m.image_start), end=(m.image_end,)),
                      code=Grammar(start=(m.image_start,), end=(m.image_end,)), spread=True)

    @cached_property
    def closing(self) -> tuple[int, ...]:  # type: ignore[override]
        turns = self.config.turns
        own = () if turns is None else self.need_vocabulary().encode_frame(turns.assistant[1])
        return tuple(own) or (self.marks.end,)

    @property
    def filling(self) -> int:
        return self.marks.end

    def cut(self, slots: Sequence[int], sampling: Sampling) -> list[int]:
        ids = super().cut(slots, sampling)
        return ids[: ids.index(self.filling)] if self.filling in ids else ids

    def frame_at(self, pieces: Sequence[Piece], i: int) -> Frame:
        """The first of the texts that lead to a drawn picture begins with the task token. With a chat template, all
        texts are turns of the chat but those that only lead to a picture; a chat that leads to one is closed there."""
        c, piece = self.config, pieces[i]
        pictures = [n for n, p in enumerate(pieces) if isinstance(p, Image)]
        since = max((n + 1 for n in pictures if n < i), default=0)
        until = next((n for n in pictures if n >= i), None)
        draws = until is not None and pieces[until].target
        reasons = draws and any(p.target for p in pieces[since:until])
        if isinstance(piece, Image):
            return Frame(lead=self.closing if reasons and c.turns is not None else (), open=False, close=False)
        lead = (c.specials.reason if reasons else c.specials.draw,) * (draws and i == since)
        if c.turns is None or (draws and not reasons):
            return dataclasses.replace(super().frame_at(pieces, i), lead=lead)
        before = next((p for p in reversed(pieces[:i]) if not isinstance(p, Image)), None)
        frame = c.turns.frame(before, piece, self.need_vocabulary(), self.marks.start)
        return dataclasses.replace(frame, lead=(*lead, *frame.lead), close=False)

    def write_null(self, w: Writer, ids: list[int]) -> None:
        """The task token and an empty text."""
        if ids and ids[0] in (self.config.specials.draw, self.config.specials.reason):
            w.text([], frame=Frame(lead=(ids[0],)))

    def drop_rates(self) -> tuple[float, float, float]:
        return self.config.drop_text, 0.0, 0.0

    def write_seen(self, w: Writer, seen: Tensor, coded: Tensor, pictures: list[Tensor], views: list[Tensor]) -> None:
        assert self.layout.read is not None
        w.code(len(pictures), self.layout.read.plan(self.grid(coded)), drawn=False, mode=Mode.FULL, ahead=False)
        pictures.append(coded)

    def write_drawn(self, w: Writer, number: int, grid: Grid) -> None:
        w.code(number, w.plan(grid), drawn=True, mode=Mode.NOISE, ahead=False)

    def with_target(self, document: Document, index: int, drop: Drop = KEEP) -> Written:
        """With the pads of "released", which stand before everything."""
        w, pictures, views = super().with_target(document, index, drop)
        missing = self.config.prompt - (w.questions[0] - 1) if w.questions else 0
        if self.config.variant == "released" and missing > 0:
            w.fill(missing, self.config.specials.pad, position=-missing)
        return w, pictures, views

    def lay_out(self, written: Sequence[Written]) -> Batch:
        return dataclasses.replace(super().lay_out(written), chance=True)

    # -- the network --------------------------------------------------------------------------------------------------

    def code_tokens(self, codes: Tensor) -> Tensor:
        ids = self.config.text_size + codes
        return self.embed(ids.masked_fill(codes == self.values, self.config.specials.mask))

    def code_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.head.weight[self.config.text_size :])

    def hide(self, batch: Batch, generator: torch.Generator, share: float | None = None) -> Hidden:
        """Hide part of every target: as much as is drawn by chance, or this share of it."""
        page, given = batch.page, None
        answers, asked = page.ids.new_zeros(0), page.ids.new_zeros(0, dtype=torch.bool)
        if batch.codes:
            found, drawn = self.encode(batch.pictures), [d for _, d in batch.codes]
            blocks = [found[i] for i, _ in batch.codes]
            given, asked = masked_token.corrupt(blocks, drawn, self.values, generator, share)
            answers = torch.cat([answers, *[b for b, d in zip(blocks, drawn, strict=True) if d]])
        slots = self.answer_places(page)
        words = page.labels.flatten()[slots]
        hidden, p = asked.new_zeros(0), torch.zeros(0, device=words.device)
        if len(words):
            shown, hidden, p = masked_diffusion.corrupt(words.split(self.config.slots), self.config.specials.mask,
                                                        generator, share)
            page = dataclasses.replace(page, ids=self.with_words(page, slots, shown))
        return Hidden(page, given, slots, words, hidden, p, answers, asked)

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        c, h = self.config, self.hide(batch, generator)
        states, sums, counts = self.forward_page(h.page, batch.views, h.codes), {}, {}
        if len(h.words):
            logits = self.head(pick(states, h.page.tokens, h.slots[h.hidden]))
            sums["text"] = masked_diffusion.loss(logits, h.words[h.hidden], h.p[h.hidden]).sum()
            counts["text"] = len(h.words)
        if len(h.answers):
            places, labels = h.page.questions[h.asked], c.text_size + h.answers[h.asked]
            if c.variant == "released":
                edges = picture_edges(h.page.questions)
                places, labels = torch.cat((places, edges)), torch.cat((labels, h.page.ids.flatten()[edges]))
            sums["image"] = masked_token.loss(self.head(pick(states, h.page.tokens, places)), labels).sum()
            counts["image"] = len(labels)
        return Losses(sums, {k: torch.tensor(float(n), device=h.words.device) for k, n in counts.items()},
                      {"text": c.text_weight, "image": c.image_weight})

    def decisions(self, batch: Batch, writers: Sequence[Writer], generator: torch.Generator,
                  share: float | None = None, **how: Any) -> list[Tensor]:
        """Of the hidden tokens alone, among all of the vocabulary. The same seed and share hide the same places, so
        that networks can be compared; without `torch.no_grad` it can be learnt from."""
        h = self.hide(batch, generator, share)
        states = self.forward_page(h.page, batch.views, h.codes)
        places = torch.cat((h.slots[h.hidden], h.page.questions[h.asked]))
        labels = torch.cat((h.words[h.hidden], self.config.text_size + h.answers[h.asked]))
        found = -next_token.cross_entropy(self.head(pick(states, h.page.tokens, places)), labels)
        texts, codes = found.split([int(h.hidden.sum()), int(h.asked.sum())])
        own = iter(h.asked.split([len(w.questions) for w in writers if w.questions] or [0]))
        slots = iter(h.hidden.split(self.config.slots))
        counts = [int(next(own if w.questions else slots).sum()) for w in writers]
        image = iter(codes.split([n for n, w in zip(counts, writers, strict=True) if w.questions] or [0]))
        text = iter(texts.split([n for n, w in zip(counts, writers, strict=True) if not w.questions] or [0]))
        return [next(image if w.questions else text) for w in writers]

    # -- filling a document -------------------------------------------------------------------------------------------

    def answered(self, document: Document, index: int, draft: Tensor | None, sampling: Sampling,
                 generator: torch.Generator) -> Generator[Any, Any, list[int]]:
        text, slots, mask = sampling.text, self.config.slots, self.config.specials.mask
        guidance = sampling.text_guidance or Guidance()
        guidance.check(("full", "no_prompt"))
        s = self.before(document, index)
        self.add_answer(s.writer, document, index, [])
        plan = masked_diffusion.plan(slots, text.block, text.steps or sampling.evaluations)
        uniforms = torch.rand((2, sum(steps for _, steps in plan), slots), generator=generator)
        x = torch.full((slots,), mask, device=self.device) if draft is None else draft
        chain = masked_diffusion.fill(x, mask, plan, text, uniforms[0], uniforms[1] if text.order == "random" else None,
                                      done=lambda block: len(self.cut(block.tolist(), sampling)) < len(block))
        found = yield from self.follow(chain, {"full": s, "no_prompt": self.without_prompt(s)}, guidance)
        return self.cut(found.tolist(), sampling)

    def without_prompt(self, s: Sequenced) -> Sequenced:
        """The same sequence with everything but the target hidden."""
        w = copy.copy(s.writer)
        w.ids = [self.config.specials.mask] * len(w.ids)
        sizes = [rows * columns for rows, columns in map(self.grid, s.pictures)]
        return Sequenced(w, codes=[torch.full((n,), self.values, device=self.device) for n in sizes])

    def paint(self, grid: Grid, contexts: dict[str, Any], sampling: Sampling,  # type: ignore[override]
              generator: torch.Generator, index: int, emit: Emit, more: bool) -> Steps:
        count = grid[0] * grid[1]
        x = contexts.pop("draft", torch.full((count,), self.values, device=self.device))
        for s in contexts.values():
            self.write_drawn(s.writer, len(s.pictures), grid)
        uniforms = torch.rand((2, sampling.evaluations, count), generator=generator)
        chain = masked_token.fill(x, uniforms[0], uniforms[1], self.values, sampling.codes, sampling.temperature,
                                  self.config.variant)
        return (yield from self.follow(chain, contexts, sampling.guidance,
                                       self.partial_pictures(grid, sampling, index, emit)))

    @torch.no_grad()
    def inpaint(self, document: Document, piece: int, region: Tensor, sampling: Sampling | None = None, *,
                seed: int = 0) -> Document:
        """Draw the part of a drawn picture anew where `region` (rows, columns) bool is true of its codes; the other
        codes and all other pieces stay."""
        found = document.pieces[piece]
        if not isinstance(found, Image) or not found.target or found.pixels is None:
            raise ValueError(f"expected piece {piece} to be a drawn picture, got {found.kind}; "
                             "fix: choose a target that is filled")
        picture = self.views(torch.from_numpy(found.pixels))[1].to(self.device)
        if tuple(region.shape) != self.grid(picture) or not bool(region.any()):
            raise ValueError(f"expected a region of {self.grid(picture)} codes with some to draw, got "
                             f"{int(region.sum())} of {tuple(region.shape)}")
        x = self.encode([picture])[0].masked_fill(region.flatten().to(self.device), self.values)
        asked = found.emptied().replace(size=tuple(picture.shape[-2:]))
        known = dataclasses.replace(document, pieces=(*document.pieces[:piece], asked, *document.pieces[piece + 1 :]))
        sampling = sampling or self.default_sampling()
        return self.finish({0: self.fill(known, sampling, torch.Generator().manual_seed(seed), lambda event: None,
                                         {piece: x})})[0]


def _llada(width: int, heads: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=heads, head_dim=width // heads, hidden=hidden, qkv_bias=False,
                       norm_eps=1e-5)


def _sampling(scale: float, evaluations: int, text: TextSampling) -> Sampling:
    return Sampling(evaluations=evaluations, text=text,
                    guidance=Guidance(branches=(Branch(context="no_text", scale=scale),)))
