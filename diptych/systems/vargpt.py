"""VARGPT-v1.1: a language model says texts token by token and pictures scale by scale, with a second transformer behind
it that turns what it says into bits (arXiv 2504.02949; the decoder is that of Infinity, 2412.04431).

    read    tower -> trunk, which answers
    draw    start vector, then word(F resized) per cell -> Linear, GELU, Linear -> trunk -> Linear, GELU, Linear
            -> scale transformer, which sees whole scales, and through cross-attention all that stood before the picture
            -> bits of the next scale, each a choice between two
    L = w_text CE(text) / n_text + 3 CE(bits) / n_bits

- F is the sum of the scales so far. Inside a scale the trunk is causal although the decoder sees all of it.
- Training turns bits over, each scale with a share of its own; labels then ask for what is missing (self-correction).
- Guidance on logits, 3 c - 2 u. With nothing before a picture, learned null vectors are its memory and its start.

`variant` is what the branch without text sees when a picture is drawn. "released": no context at all, in the trunk only
the cells of the scale at hand, in the decoder as many null vectors as the text has states; "paper": what is left of its
context, and its own earlier scales, as documents that lost their text in training.

Differs from the paper: only targets count in the text loss; documents may draw several pictures, and one that is
followed by more is read back through the tower; positions of read pictures are those of Qwen2-VL in training too.
"""
import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.document import Document
from diptych.objectives import next_scale, next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_scale import Lesson
from diptych.objectives.next_token import TokenSampling
from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.grammar import CELL, Grammar
from diptych.parts.interleave import IGNORE, Marks, Page, Writer
from diptych.parts.pictures import crop_to, stack_by_size
from diptych.parts.quantize import LossWeights, ResidualConfig, ResidualQuantizer, SignConfig, draw_flips
from diptych.parts.quantize.residual import Change
from diptych.parts.resources import stored_config
from diptych.parts.scales import ScaleConfig, Scales, ScaleTransformer, TextCondition
from diptych.parts.trunks import pick
from diptych.parts.vision import VisionConfig
from diptych.parts.vocabulary import Vocabulary
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.parts.windows import WindowConfig
from diptych.systems.base import Emit, Losses, Progress, Sampling, StepLogProbs, Work
from diptych.systems.packed import Batch
from diptych.systems.vlm import Vlm, VlmConfig
from diptych.systems.works import Canvas, Decide, Grid, Read, Reader, Together, show

# released `dynamic_resolution`: squares of 1 M pixels; 512 px has the first ten, 256 px the first seven
SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)


@dataclass(frozen=True, kw_only=True)
class VargptConfig(VlmConfig):
    """`drawing`: ids before and after a drawn picture; None for the image marks. `slot_multiple`: in training the cells
    of a picture are followed by empty ones up to a multiple of it."""

    decoder: ScaleConfig
    codec: VQTokenizerConfig
    picture: tuple[int, int] = (512, 512)  # pixels of pictures to learn to draw, and drawn by default
    drawing: tuple[int, int] | None = None
    slot_multiple: int = 1
    pool_heads: int = 16
    null_rows: int = 512
    flips: float = 0.3  # the largest share of bits turned over in a scale
    flipped_scales: int = 13
    variant: Literal["paper", "released"] = "paper"
    text_weight: float = 1.0
    image_weight: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drawing is not None:
            object.__setattr__(self, "drawing", tuple(self.drawing))  # lists come from JSON and YAML
        if self.variant not in ("paper", "released"):
            raise ValueError(f"expected variant paper or released, got {self.variant!r}")
        finest, scales = tuple(side // self.codec.downsample for side in self.picture), self.decoder.scales
        if getattr(self.codec.quantizer, "scales", ()) != scales or scales[-1] != finest:
            raise ValueError(f"expected decoder and codec of the same scales, up to the {finest} cells of a picture, "
                             f"got {list(scales)}; fix: set decoder.scales, codec.quantizer.scales or picture")


class Vargpt(Vlm):
    Config = VargptConfig
    config: VargptConfig
    draws = True

    def __init__(self, config: VargptConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__(config, vocabulary)
        c, inner, width = config, config.decoder.width, config.block.width
        if c.drawing is not None:
            block = Grammar(start=c.drawing[:1], end=c.drawing[1:])
            self.layout = dataclasses.replace(self.layout, code=block)
        self.start = nn.Parameter(torch.randn(inner) * inner**-0.5)
        self.told = TextCondition(inner, inner, c.pool_heads, c.null_rows, project=False)
        self.told.pool.query.requires_grad_(False)  # one vector is pooled: nothing to choose
        self.told.null.requires_grad_(c.drop_text > 0)
        self.to_language, self.from_language = (
            nn.Sequential(nn.Linear(a, a), nn.GELU(), nn.Linear(a, b)) for a, b in ((inner, width), (width, inner)))
        normal_weights(self.to_language)  # cells enter at the scale of words
        normal_weights(self.from_language, std=width**-0.5)  # and reach the decoder at full scale
        self.decoder = ScaleTransformer(c.decoder)
        self.codec = VQTokenizer(c.codec).requires_grad_(False)

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> VargptConfig:
        """For tests: seconds on a CPU. No bit is turned over."""
        pyramid = PyramidConfig(channels=8, channel_mult=(1, 1, 2, 2), blocks=(1,) * 4, attention=(3,), norm_groups=4)
        return cls._world(
            block=_block(64, 2, 128), depth=2, flips=0.0,
            codec=_codec(pyramid, pyramid, tuple((side, side) for side in (1, 2, 4, 8)), 6),
            vision=WindowConfig(width=32, hidden=64, layers=1, heads=2, patch=8, window=16, full=(0,), out_width=64,
                                norm="layer", mlp="quick"),
            inner=64, layers=2, heads=2, null_rows=4, pool_heads=2)

    @classmethod
    def small(cls) -> VargptConfig:
        """The world at 64 px, 130 cells of 12 bits in six scales, about 9M parameters."""
        return cls._world(
            block=_block(256, 4, 640), depth=5, flips=0.1, codec=VQTokenizerConfig.bitwise(),
            vision=VisionConfig(**stored_config("zoo/clip")["vision"]), inner=192, layers=5, heads=6, null_rows=16,
            pool_heads=4)

    @classmethod
    def _world(cls, *, codec: VQTokenizerConfig, inner: int, layers: int, heads: int, **rest: Any) -> VargptConfig:
        bits, scales = codec.quantizer.width, getattr(codec.quantizer, "scales", ())
        decoder = ScaleConfig(width=inner, layers=layers, heads=heads, hidden=2 * inner, code_width=bits,
                              code_shape=(bits,), scales=scales)
        return VargptConfig(vocabulary_size=1024, tie_embeddings=False, positions="spatial", drop_text=0.1,
                            decoder=decoder, codec=codec, picture=(64, 64), row=224,
                            sampling=_guided(2.0, TokenSampling()), **rest)

    @classmethod
    def paper(cls) -> VargptConfig:
        """VARGPT-v1.1 at 512 px: Qwen2-VL-7B, Infinity-2B, its tokenizer of 32 bits (released `modeling_vargpt`)."""
        scales = tuple((side, side) for side in SIDES[:10])
        encoder = PyramidConfig(channels=128, channel_mult=(1, 2, 4, 4, 4), blocks=(2,) * 5, attention=())
        codec = _codec(encoder, dataclasses.replace(encoder, blocks=(3,) * 5), scales, 32)
        return VargptConfig(
            block=BlockConfig(width=3584, heads=28, kv_heads=4, head_dim=128, hidden=18944), depth=28,
            vocabulary_size=152064, rope_theta=1e6, rope_sections=(16, 24, 24), tie_embeddings=False, tokenizer="",
            marks=Marks(151644, 151645, 151652, 151653), features="causal", positions="spatial", side=1008,
            vision=WindowConfig(hidden=5120, out_width=3584, full=tuple(range(32)), norm="layer", mlp="quick"),
            decoder=ScaleConfig(scales=scales, levels=15, rotary_scales=tuple((s, s) for s in SIDES)), codec=codec,
            drawing=(151657, 151658),  # behind the tokens of Qwen2-VL (inferred)
            slot_multiple=128, drop_text=0.1, row=4096, variant="released",
            sampling=_guided(3.0, TokenSampling(temperature=0.5, top_k=900, top_p=0.97)))

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    @property
    def stride(self) -> int:  # type: ignore[override]
        return self.codec.config.downsample

    @property
    def quantizer(self) -> ResidualQuantizer:
        assert isinstance(self.codec.quantizer, ResidualQuantizer)
        return self.codec.quantizer

    def scales(self, grid: Grid) -> Scales:
        return next_scale.scales_for(self.config.decoder.scales, grid)

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return super().views(pixels)[0], crop_to(pixels, *self.config.picture)

    def drop_rates(self) -> tuple[float, float, float]:
        return self.config.drop_text, 0.0, self.config.drop_feature

    def write_drawn(self, w: Writer, number: int, grid: Grid) -> None:
        """The cells of all scales predict their own codes; empty ones behind them predict nothing."""
        before, *cells, after = w.plan(*self.scales(grid))
        stop = 1 + len(cells)
        plan = [before, *cells, *[CELL] * (-len(cells) % self.config.slot_multiple), after]
        w.code(number, plan, drawn=True, ahead=False, part=slice(0, stop))
        w.code(number, plan, drawn=False, ahead=False, part=slice(stop, None))

    def lay_out(self, written: Sequence[tuple[Writer, list[Tensor], list[Tensor]]]) -> Batch:
        return dataclasses.replace(super().lay_out(written), code_depth=math.prod(self.config.decoder.code_shape))

    # -- pictures as bits ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def lesson(self, pictures: Tensor, change: Change | None = None) -> Lesson:
        """Bits (b, L, d) and what is read for them (b, L - 1, d), of pictures (b, 3, h, w)."""
        features = self.codec.features(pictures.to(self.embed.weight.dtype))
        scales = self.scales((features.shape[2], features.shape[3]))
        return next_scale.lesson(self.quantizer, features, scales, "bilinear", change)

    def encode(self, pictures: list[Tensor]) -> list[Tensor]:
        found = [pair for n, batch in stack_by_size(pictures) for pair in zip(n, self.lesson(batch).codes, strict=True)]
        return [codes for _, codes in sorted(found, key=lambda pair: pair[0])]

    @torch.no_grad()
    def decode(self, x: Tensor, grid: Grid) -> Tensor:
        """Bits (b, n, d) of all scales of a grid, or of the first, -> pixels (b, 3, h, w), clamped."""
        return self.codec.decode_vectors(self.quantizer.lookup(x, self.scales(grid))).float().clamp(-1, 1)

    # -- the network --------------------------------------------------------------------------------------------------

    def conditions(self, bare: Tensor) -> Tensor:
        """What a picture starts from and is modulated by, (b, w); `bare` (b,) bool: nothing stands before it."""
        states = torch.where(bare[:, None], self.told.null[0], self.start)[:, None]
        return self.told.condition(states, torch.ones_like(bare)[:, None])

    def slots(self, inputs: Tensor, condition: Tensor) -> Tensor:
        """What stands for pictures in training (b, n, w), empty slots included, from inputs (b, L - 1, c)."""
        x = self.decoder.enter(inputs, condition)
        return F.pad(x, (0, 0, 0, -x.shape[1] % self.config.slot_multiple))

    def before(self, page: Page) -> tuple[Tensor, Tensor]:
        """For every drawn picture of a page the flat places (b, m) of what its document has before it, and which of
        them there are (b, m) bool."""
        tokens, cells = page.tokens, sum(rows * columns for rows, columns in self.config.decoder.scales)
        length = tokens.shape[1]
        mark = page.questions[::cells] - 1
        row, place = mark // length, mark % length
        index = torch.arange(length, device=mark.device)
        mine = (tokens.document[row] == tokens.document.flatten()[mark][:, None]) & (index < place[:, None])
        order = (~mine).to(torch.uint8).sort(dim=1, stable=True).indices[:, :int(mine.sum(1).amax())]
        return row[:, None] * length + order, mine.gather(1, order)

    def remember(self, hidden: Sequence[Tensor], page: Page) -> tuple[Tensor, Tensor]:
        """What every drawn picture looks back at, (b, m, w) and which of it counts (b, m) bool."""
        places, known = self.before(page)
        states = self.from_language(pick(hidden, page.tokens, places.flatten())).unflatten(0, places.shape)
        bare = ~known.any(1)
        if bool(bare.any()):
            states = torch.cat((states, self.told.null.to(states.dtype).expand(len(states), -1, -1)), 1)
            known = torch.cat((known, bare[:, None].expand(-1, len(self.told.null))), 1)
        return states, known

    def read(self, batch: Batch, lesson: Lesson | None) -> tuple[list[Tensor], Tensor]:
        """Hidden states by route, and the logits (b, L, d, 2) of what is drawn."""
        page = batch.page
        features, drawn = self.see(batch.views) if batch.views else None, None
        condition = torch.zeros(0, device=page.ids.device)
        if lesson is not None:
            condition = self.conditions(~self.before(page)[1].any(1))
            drawn = self.to_language(self.slots(lesson.inputs, condition)).flatten(0, 1)
        hidden = self.trunk(self.states(page, features, drawn), page.tokens, self.mask)
        if lesson is None:
            return hidden, condition
        x = self.from_language(pick(hidden, page.tokens, page.questions)).unflatten(0, (len(condition), -1))
        return hidden, self.decoder(x, condition, self.config.decoder.scales, *self.remember(hidden, page))

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        c, lesson, count = self.config, None, len(batch.codes)
        if count:
            layout, change = self.quantizer.layout(c.decoder.scales[-1]), None
            if c.flips > 0:
                change = draw_flips(layout, min(c.flipped_scales, len(layout.grids)), count, c.flips, generator)
            lesson = self.lesson(torch.stack(batch.pictures), change)
        hidden, logits = self.read(batch, lesson)
        sums, counts = dict[str, Tensor](), dict[str, Tensor]()
        error, words = self.text_error(hidden[0], batch.page)
        if words > 0:
            sums["text"], counts["text"] = error, words
        if lesson is not None:
            errors = next_scale.loss(logits, lesson.codes)
            sums["image"], counts["image"] = errors.sum(), torch.tensor(float(errors.numel()), device=errors.device)
        return Losses(sums, counts, {"text": c.text_weight, "image": c.image_weight})

    def score(self, documents: Sequence[Document]) -> StepLogProbs:
        """Log-probs of the text targets' tokens (closing mark included) and of the bits of drawn pictures, in the order
        of the document; temperature 1, no guidance."""
        values, kinds = list[Tensor](), list[list[str]]()
        for document in documents:
            batch = self.lay_out([self.write(document)]).to(self.device)
            lesson = self.lesson(torch.stack(batch.pictures)) if batch.codes else None
            hidden, logits = self.read(batch, lesson)
            labels = batch.page.labels.flatten()
            places = torch.nonzero(labels != IGNORE).squeeze(1)
            errors = [next_token.cross_entropy(self.head(pick(hidden, batch.page.tokens, places)), labels[places])]
            names = ["text"] * len(places)
            if lesson is not None:
                errors.append(next_scale.loss(logits, lesson.codes).flatten())
                places = torch.cat((places, batch.page.questions.repeat_interleave(lesson.codes.shape[-1])))
                names += ["code"] * len(errors[-1])
            order = places.argsort(stable=True)
            values.append(-torch.cat(errors)[order])
            kinds.append([names[i] for i in order.tolist()])
        return StepLogProbs(values, kinds)

    # -- drawing ------------------------------------------------------------------------------------------------------

    def paint(self, grid: Grid, contexts: dict[str, Reader], sampling: Sampling, generator: torch.Generator, index: int,
              emit: Emit, more: bool) -> Generator[Work, Any, Tensor]:
        numbers = next_scale.uniforms(self.scales(grid), self.config.decoder.code_shape, generator)
        return (yield from self.draw(numbers, grid, contexts, sampling, index, emit, more))

    def draw(self, uniforms: Sequence[Tensor], grid: Grid, contexts: dict[str, Reader], sampling: Sampling, index: int,
             emit: Emit, more: bool) -> Generator[Work, Any, Tensor]:
        """Bits (L, d) of a picture, chosen by uniform numbers (n, d) per scale. For every scale the trunk reads its
        cells in each context, then the decoder says their logits."""
        scales = self.scales(grid)
        spans, plan = next_scale.spans(scales), self.writer(Reader()).plan(*scales)
        canvases = self.canvases(contexts, scales, sampling.guidance)
        yield Together([self._part(c.reader, plan, slice(0, 1)) for c in canvases.values() if c.reader])
        how = next_scale.every_scale(len(scales), sampling.guidance, sampling.codes)
        sampler = next_scale.sample(self.quantizer, scales, "bilinear", how, uniforms)
        try:
            ask = next(sampler)
            while True:
                part = slice(1 + spans[ask.scale].start, 1 + spans[ask.scale].stop)
                inputs = None if ask.inputs is None else ask.inputs[None]
                told = yield Together([
                    self._part(c.reader, plan, part, self.decoder.enter(inputs, None if inputs is not None else
                                                                        c.condition[None])[0])
                    for c in canvases.values()])
                logits = yield Together([Decide(x, c, ask.scale) for c, x in zip(canvases.values(), told, strict=True)])
                ask = sampler.send(dict(zip(canvases, logits, strict=True)))
                if ask.codes is not None:
                    yield from show(ask.codes, grid, sampling, index, emit, Progress(
                        step=ask.scale, steps=len(scales), scale=scales[ask.scale - 1]))
        except StopIteration as stop:
            codes = torch.cat([step.codes for step in stop.value])
        if more:
            yield self._part(contexts["full"], plan, slice(len(plan) - 1, None))
        return codes

    def canvases(self, contexts: dict[str, Reader], scales: Scales, guidance: Guidance) -> dict[str, Canvas]:
        """The picture to draw as each context of the guidance sees it."""
        out: dict[str, Canvas] = {}
        for name in dict.fromkeys(["full", *(b.context for b in guidance.branches if b.scale != 1)]):
            reader: Reader | None = contexts[name] if name == "full" else contexts[name].fork()
            states = reader.states if reader else []
            alone = self.config.variant == "released" and name != "full"
            bare = alone or not states
            memory = self.told.null if bare else self.from_language(torch.cat(states))
            if alone:
                reader, memory = None, memory[:len(out["full"].memory)]
            condition = self.conditions(torch.tensor([bare], device=self.device))[0]
            out[name] = Canvas(reader, scales, condition, memory)
        return out

    def _part(self, reader: Reader | None, plan: list[int], part: slice, cells: Tensor | None = None) -> Read:
        """A part of the block of a picture: fixed tokens, or cells (n, w), whose states are answered."""
        own = reader or Reader()
        w = self.writer(own)
        w.code(0, plan, drawn=cells is not None, ahead=False, part=part)
        return Read(own, w, codes=[] if cells is None else [cells], keep=reader is not None)

    def given(self, works: Sequence[Read]) -> Tensor | None:
        cells = [x for w in works for x in w.codes]
        return self.to_language(torch.cat(cells)) if cells else None

    def answer(self, hidden: Tensor) -> Tensor:
        return hidden

    def keep_states(self, works: Sequence[Read], page: Page, hidden: list[Tensor]) -> None:
        for row, work in enumerate(works):
            if work.keep:
                places = row * page.tokens.shape[1] + torch.arange(work.writer.strip.length, device=self.device)
                work.reader.states.append(pick(hidden, page.tokens, places))

    def runners(self, commits: list[Callable[[], None]]) -> dict[str, Callable[[Sequence[Any]], Sequence[Any]]]:
        return super().runners(commits) | {"decide": partial(self._run_decisions, commits=commits)}

    def _run_decisions(self, works: Sequence[Decide], commits: list[Callable[[], None]]) -> list[Tensor]:
        alike: dict[tuple[Scales, int], list[int]] = {}
        for i, w in enumerate(works):
            alike.setdefault((w.canvas.scales, w.scale), []).append(i)
        out: dict[int, Tensor] = {}
        for (scales, at), numbers in alike.items():
            canvases = [works[i].canvas for i in numbers]
            x = self.from_language(torch.stack([works[i].states for i in numbers]))
            memory = nn.utils.rnn.pad_sequence([c.memory for c in canvases], batch_first=True)
            lengths = torch.tensor([len(c.memory) for c in canvases], device=x.device)
            known = torch.arange(memory.shape[1], device=x.device) < lengths[:, None]
            logits, past = self.decoder.step(x, torch.stack([c.condition for c in canvases]), scales, at,
                                             [c.past for c in canvases], memory, known)
            out |= zip(numbers, logits.float(), strict=True)
            commits += [partial(setattr, c, "past", own) for c, own in zip(canvases, past, strict=True)]
        return [out[i] for i in range(len(works))]


def _block(width: int, heads: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=heads // 2, head_dim=width // heads, hidden=hidden)


def _codec(encoder: PyramidConfig, decoder: PyramidConfig, scales: Scales, bits: int) -> VQTokenizerConfig:
    """A tokenizer by bits (BSQ) on scales, as Infinity's."""
    quantizer = ResidualConfig(codebook=SignConfig(width=bits, unit=True, packed=False), scales=scales, up="bilinear",
                               compare="step", weights=LossWeights(codebook=0.0, commitment=0.25))
    return VQTokenizerConfig(encoder=encoder, decoder=decoder, in_kernel=0, out_kernel=0,
                             quantizer=quantizer)


def _guided(scale: float, codes: TokenSampling) -> Sampling:
    return Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=scale),)), codes=codes)
