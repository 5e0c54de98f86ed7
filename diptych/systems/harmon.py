"""Harmon: one masked-autoregressive encoder sees and draws, with a language model in its middle (arXiv 2503.21979).

    L = w_ce CE(text) / n_text + w_mar mean over hidden tokens (|eps - noise|^2 + variational bits)

- The terms are `text`, `image` and `variance`: the bits teach the variance only.
- The encoder of MAR is the only eye. To understand, it sees all tokens of a picture; its buffers follow the tokens, so
  that under the causal mask of the language model they have read them all. Gradients into both are scaled by 0.1.
- To draw, it sees the revealed tokens. The language model reads them behind the prompt, and what it says is added to
  the encoder's states: without it, MAR is left. MAR's decoder then tells the diffusion head about every place.
- Training hides at least 0.7 of the tokens, one share per batch. Sampling reveals them in 64 sets of random order.
- Guidance acts on the predicted noise; the null prompt is "Generate an image.".

Differs from the paper: no dropout, marks of this library's texts instead of the chat template, pictures scaled instead
of padded to squares, hidden tokens averaged per picture; edits and stories, which read pictures and draw from them.
`limit` clips the latents that the noise implies (the paper does not): small models need it at the noisiest steps.
"""
import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diptych.document import Document
from diptych.objectives import masked_autoregression, next_token
from diptych.objectives.decisions import ahead, decide, recording
from diptych.objectives.diffusion import Diffusion
from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.experts import Coupling
from diptych.parts.grammar import Grammar
from diptych.parts.interleave import GENERATE, IGNORE, Layout, Marks, Page, Writer
from diptych.parts.mar import DiffusionHead, HeadConfig, Mar, MarConfig
from diptych.parts.masks import causal, hide_noise, same, valid
from diptych.parts.pictures import fit_sides, stack_by_size
from diptych.parts.positions import Rope
from diptych.parts.resources import stored_config
from diptych.parts.tokens import Modality, Mode, Tokens
from diptych.parts.trunks import Trunk
from diptych.parts.vae import AutoEncoder, AutoEncoderConfig
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.bagel import Sides
from diptych.systems.base import Emit, Losses, Progress, Sampling, StepLogProbs, Work
from diptych.systems.packed import Batch, Packed
from diptych.systems.works import Grid, Read, Reader, Reveal, show

READ, DRAWN = Sides(shortest=512, longest=512), Sides(shortest=256, longest=512)


@dataclass(frozen=True, kw_only=True)
class HarmonConfig:
    block: BlockConfig
    depth: int
    rope_theta: float = 1e6
    vocabulary_size: int
    tie_embeddings: bool = True
    tokenizer: str = ""  # a tokenizer.json, zoo/NAME, or a file of the model's folder
    marks: Marks | None = None  # ids of start, end, image start, image end; None = from the tokenizer
    mar: MarConfig
    head: HeadConfig
    codec: AutoEncoderConfig
    latent_patch: int = 1
    sides: Sides = READ
    drawn_sides: Sides = DRAWN
    picture: tuple[int, int] = (512, 512)  # drawn when nothing says otherwise
    gradient_scale: float = 0.1  # from what is read of a picture into proj_in and the encoder
    least_hidden: float = 0.7  # mask ratio of training
    copies: int = 4  # draws of step and noise per hidden token (released: diffusion_batch_mul)
    diffusion_steps: int = 1000
    sampling_steps: tuple[int, ...] = (100,)  # of them, evenly strided in as many sections
    limit: float | None = None
    null_prompt: str = "Generate an image."
    text_weight: float = 1.0
    image_weight: float = 1.0
    drop_text: float = 0.1  # condition dropping for guidance
    drop_feature: float = 0.0
    row: int = 256  # tokens of a packed row at least (longer documents make longer rows)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampling_steps", tuple(self.sampling_steps))  # lists come from JSON and YAML
        width = self.codec.latent_channels * self.latent_patch**2
        if self.mar.token_width != width:
            raise ValueError(f"expected mar.token_width to be {width}, as latent_channels and latent_patch imply, "
                             f"got {self.mar.token_width}")


class Harmon(Packed):
    Config = HarmonConfig
    config: HarmonConfig
    mask = valid & same("document") & causal & hide_noise
    layout = Layout(read=Grammar(), spread=True)  # pictures stand among words without marks

    def __init__(self, config: HarmonConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        c = self.config = config
        self.vocabulary = Vocabulary(c.tokenizer) if vocabulary is None and c.tokenizer else vocabulary
        width = c.block.width
        self.embed = nn.Embedding(c.vocabulary_size, width)
        self.trunk = Trunk(c.block, Coupling.dense(c.depth, 2), Rope(c.block.head_dim, c.rope_theta))
        self.head = nn.Linear(width, c.vocabulary_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        normal_weights(self.modules())
        self.proj_in = nn.Sequential(nn.Linear(c.mar.width, width), nn.SiLU(), nn.Linear(width, width))
        self.proj_out = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, c.mar.width))
        self.mar = Mar(c.mar)
        self.denoiser = DiffusionHead(c.head, c.mar.token_width, c.mar.decoder[0])
        self.codec = AutoEncoder(c.codec).requires_grad_(False)
        self.diffusion = Diffusion.cosine(c.diffusion_steps)
        self.sampler = self.diffusion.respaced(c.sampling_steps)

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> HarmonConfig:
        """For tests: seconds on a CPU."""
        return cls._world(
            block=BlockConfig(width=64, heads=2, kv_heads=1, head_dim=32, hidden=128), depth=2,
            mar=MarConfig(width=64, layers=2, heads=2, token_width=24, side=4, buffers=4),
            head=HeadConfig(width=128, layers=2), copies=16, sampling_steps=(50,),
            codec=AutoEncoderConfig(channels=16, channel_mult=(1, 1), num_res_blocks=1, latent_channels=6, patch=4,
                                    norm_groups=4, shift=0.0, scale=2.5))

    @classmethod
    def small(cls) -> HarmonConfig:
        """The world at 64 px: 16 latent tokens, about 10M parameters."""
        return cls._world(
            block=BlockConfig(width=192, heads=6, kv_heads=2, head_dim=32, hidden=640), depth=6,
            mar=MarConfig(width=192, layers=4, heads=6, token_width=24, side=4, buffers=8),
            head=HeadConfig(width=256, layers=3), sampling_steps=(50,),
            codec=AutoEncoderConfig(**stored_config("zoo/codec")))

    @classmethod
    def _world(cls, **sizes: Any) -> HarmonConfig:
        sides = Sides(shortest=64, longest=64)
        return HarmonConfig(
            rope_theta=1e4, vocabulary_size=1024, tokenizer="zoo/tokenizer", latent_patch=2, sides=sides,
            drawn_sides=sides, picture=(64, 64), limit=4.0, row=128,
            sampling=Sampling(evaluations=8, guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),))),
            **sizes)

    @classmethod
    def paper(cls) -> HarmonConfig:
        """Harmon-1.5B: MAR-H, Qwen2.5-1.5B-Instruct, the kl16 codec of MAR (released `harmon_1.5b`)."""
        return HarmonConfig(
            block=BlockConfig(width=1536, heads=12, kv_heads=2, head_dim=128, hidden=8960), depth=28,
            vocabulary_size=151936, marks=Marks(151644, 151645, 151652, 151653),
            mar=MarConfig(width=1280, layers=20, heads=16), head=HeadConfig(width=1536, layers=12),
            codec=AutoEncoderConfig(channel_mult=(1, 1, 2, 2, 4), encoder_attention=(4,), quant_conv=True, shift=0.0,
                                    scale=0.2325),
            sampling=Sampling(evaluations=64, guidance=Guidance(branches=(Branch(context="no_text", scale=3.0),))))

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    @property
    def stride(self) -> int:
        return self.config.codec.downsample * self.config.latent_patch

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        read, drawn = self.config.sides, self.config.drawn_sides
        return (fit_sides(pixels, read.shortest, read.longest, self.stride),
                fit_sides(pixels, drawn.shortest, drawn.longest, self.stride))

    def feature_count(self, view: Tensor) -> int:
        rows, columns = self.grid(view)
        return rows * columns + self.config.mar.buffers

    def drop_rates(self) -> tuple[float, float, float]:
        return self.config.drop_text, 0.0, self.config.drop_feature

    def write_null(self, w: Writer, ids: list[int]) -> None:
        w.text(self.need_vocabulary().encode(self.config.null_prompt))

    def write_drawn(self, w: Writer, number: int, grid: Grid) -> None:
        self.write_tokens(w, number, grid[0] * grid[1])

    def write_tokens(self, w: Writer, number: int, count: int) -> None:
        """So many tokens of a picture to draw, then its buffers. The texts that follow do not count them."""
        before, buffers = w.position, self.config.mar.buffers
        w.latent(number, count, noised=True)
        w.strip.add(buffers, segment=w.segment, modality=Modality.LATENT, mode=Mode.NOISE, route=GENERATE,
                    position=w.position + np.arange(buffers))
        w.ids += [0] * buffers
        w.labels += [IGNORE] * buffers
        w.position = before

    # -- the network --------------------------------------------------------------------------------------------------

    def encode(self, pictures: list[Tensor]) -> list[Tensor]:
        return self.codec.tokens(pictures, self.config.latent_patch)

    def decode(self, x: Tensor, grid: Grid) -> Tensor:
        return self.codec.from_tokens(x, self.config.latent_patch, grid)

    def to_language(self, states: Tensor) -> Tensor:
        """States of the encoder (b, B + m, w) -> (b, m + B, width): what the language model reads, buffers last."""
        return self.proj_in(states).roll(-self.config.mar.buffers, 1)

    def from_language(self, states: Tensor, said: Tensor) -> Tensor:
        """States of the encoder with what the language model said (b, m + B, width) added: (b, B + m, w)."""
        return states + self.proj_out(said.to(states.dtype)).roll(self.config.mar.buffers, 1)

    def see(self, views: Sequence[Tensor]) -> Tensor:
        out: dict[int, Tensor] = {}
        codes = self.encode(list(views))
        for numbers, pixels in stack_by_size(list(views)):
            x = torch.stack([codes[i] for i in numbers])
            states = self.mar.encode(x, torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device), self.grid(pixels))
            tokens = self.to_language(states)
            still = tokens.detach()
            out |= zip(numbers, still + self.config.gradient_scale * (tokens - still), strict=True)
        return torch.cat([out[i] for i in range(len(views))])

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        c, page = self.config, batch.page
        features = self.see(batch.views) if batch.views else None
        sketches = self.sketch(batch.pictures, generator) if batch.pictures else []
        words = {i: t for s in sketches for i, t in zip(s.numbers, self.to_language(s.states), strict=True)}
        order = [words[i] for i, _ in batch.latents]
        hidden = {i: h for s in sketches for i, h in zip(s.numbers, s.hidden, strict=True)}
        tokens = self.thinned(page.tokens, [hidden[i] for i, _ in batch.latents])
        page = dataclasses.replace(page, tokens=tokens)
        said, drawn = self.trunk(self.states(page, features, torch.cat(order) if order else None), tokens, self.mask)

        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        labels = page.labels.flatten()[tokens.routes(2)[0]]
        rows = torch.nonzero(labels != IGNORE).squeeze(1)
        if len(rows):
            sums["text"] = next_token.cross_entropy(self.head(said[rows]), labels[rows]).sum()
            counts["text"] = torch.tensor(float(len(rows)), device=tokens.index.device)
        if sketches:
            parts = drawn.split([len(t) for t in order])
            errors = [self.error(s, torch.stack([parts[i] for i in s.numbers]), generator) for s in sketches]
            count = torch.tensor(float(sum(s.hidden.numel() for s in sketches)), device=tokens.index.device)
            for name, own in zip(("image", "variance"), zip(*errors, strict=True), strict=True):
                sums[name], counts[name] = torch.stack(own).sum(), count
        return Losses(sums, counts, {"text": c.text_weight, "image": c.image_weight, "variance": c.image_weight})

    def lay_out(self, written: Sequence[tuple[Writer, list[Tensor], list[Tensor]]]) -> Batch:
        batch = super().lay_out(written)
        count = (batch.counts or {}).get("image")
        return dataclasses.replace(batch, further={"variance": count}) if count else batch

    def sketch(self, pictures: list[Tensor], generator: torch.Generator) -> "list[Sketch]":
        """Pictures of a batch with the same share of their tokens hidden, by size."""
        draw = partial(torch.rand, generator=generator, device=generator.device)
        share = masked_autoregression.mask_ratio(draw((1,)), self.config.least_hidden).item()
        codes = self.encode(pictures)
        orders = [masked_autoregression.random_order(draw((len(code),))).to(code.device) for code in codes]
        out = []
        for numbers, pixels in stack_by_size(pictures):
            x, order = (torch.stack([v[i] for i in numbers]) for v in (codes, orders))
            hidden = masked_autoregression.hide(order, math.ceil(share * x.shape[1]))
            out.append(Sketch(numbers, x, hidden, self.grid(pixels), self.mar.encode(x, hidden, self.grid(pixels))))
        return out

    def error(self, sketch: "Sketch", said: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Of noise and variance, the sum over pictures: the mean over hidden tokens, times all tokens, so that counts
        need no random draws."""
        conditions = self.mar.decode(self.from_language(sketch.states, said), sketch.hidden, sketch.grid)
        asked, data = conditions[sketch.hidden], sketch.x[sketch.hidden]
        found = masked_autoregression.loss(self.denoiser, self.diffusion, data, asked, generator, self.config.copies)
        return [error.mean() * sketch.hidden.numel() for error in found]

    def thinned(self, tokens: Tokens, hidden: Sequence[Tensor] | None) -> Tokens:
        """Pictures to draw without their hidden tokens (None: without any token at all): these become padding, the
        others close up."""
        at = torch.nonzero((tokens.mode == Mode.NOISE).flatten()).squeeze(1)
        keep, shift = torch.zeros_like(at, dtype=torch.bool), torch.zeros_like(at)
        if hidden:
            flags = [torch.cat((~h, h.new_ones(self.config.mar.buffers))) for h in hidden]
            keep = torch.cat(flags)
            shift = torch.cat([f.cumsum(0) - 1 - torch.arange(len(f), device=f.device) for f in flags])
        position = tokens.position.flatten(0, 1).index_add(0, at, shift[:, None].expand(-1, 3).float())
        return dataclasses.replace(tokens, position=position.view_as(tokens.position)).without(at[~keep])

    def score(self, documents: Sequence[Document]) -> StepLogProbs:
        """Log-probs of the text targets' tokens (closing mark included), document by document."""
        values: list[Tensor] = []
        for document in documents:
            w, _, views = self.write(document)
            page = Page.of([[w]]).to(self.device)
            page = dataclasses.replace(page, tokens=self.thinned(page.tokens, None))  # no text sees what is drawn
            features = self.see([v.to(self.device) for v in views]) if views else None
            said = self.trunk(self.states(page, features, None), page.tokens, self.mask)[0]
            labels = page.labels.flatten()[page.tokens.routes(2)[0]]
            rows = labels != IGNORE
            values.append(self.head(said[rows]).float().log_softmax(-1).gather(1, labels[rows][:, None])[:, 0])
        return StepLogProbs(values, [["text"] * len(v) for v in values])

    # -- drawing ------------------------------------------------------------------------------------------------------

    def paint(self, grid: Grid, contexts: dict[str, Reader], sampling: Sampling, generator: torch.Generator, index: int,
              emit: Emit, more: bool) -> Generator[Work, Any, Tensor]:
        order = masked_autoregression.random_order(torch.rand(grid[0] * grid[1], generator=generator))
        draw = partial(torch.randn, generator=generator)
        return (yield from self.reveal(grid, order, draw, contexts, sampling, index, emit))

    def reveal(self, grid: Grid, order: Tensor, draw: Callable[..., Tensor], contexts: dict[str, Reader],
               sampling: Sampling, index: int, emit: Emit) -> Generator[Work, Any, Tensor]:
        """`sampling.evaluations` sets of tokens in `order` (N,); `draw(*shape)` gives the noise that a set starts from,
        (m, d), and that of its steps, (K, m, d). For guidance, time is the share of revealed tokens."""
        count, width = len(order), self.config.mar.token_width
        x, hidden = torch.zeros(count, width, device=self.device), torch.ones(count, dtype=torch.bool)
        plan = masked_autoregression.schedule(count, sampling.evaluations)
        plan = [left for before, left in pairwise([count, *plan]) if left < before]  # more iterations than tokens
        for step, left in enumerate(plan):
            known, remaining = 1 - int(hidden.sum()) / count, masked_autoregression.hide(order, left)
            chosen = hidden & ~remaining
            size = int(chosen.sum())
            noise, step_noise = draw(size, width), draw(len(self.sampler.steps), size, width)
            guidance = sampling.guidance.at((count - max(left, 1)) / count)  # released: never quite the full scale
            names = list(dict.fromkeys(["full", *(b.context for b in guidance.active(known))]))
            guide = partial(_guide, guidance, names, known)
            own = masked_autoregression.Set((), noise.to(self.device), step_noise.to(self.device), guide,
                                            sampling.temperature)
            path, log_prob = yield Reveal([contexts[n] for n in names], x, hidden, chosen, grid, own,
                                          next(iter(ahead("diffusion")), None), recording())
            path = decide("diffusion", lambda path=path: path, lambda _, log_prob=log_prob: log_prob)
            x = x.index_put((chosen.to(self.device),), path[-1])
            hidden = remaining
            yield from show(x, grid, sampling, index, emit, Progress(
                step=step + 1, steps=len(plan), time=1 - left / count, known=~hidden.view(grid)))
        return x

    def runners(self, commits: list[Callable[[], None]]) -> dict[str, Callable[[Sequence[Any]], Sequence[Any]]]:
        return super().runners(commits) | {"reveal": self._run_reveals}

    def given(self, works: Sequence[Read]) -> Tensor | None:
        return None

    def _run_reveals(self, works: Sequence[Reveal]) -> list[tuple[Tensor, Tensor | None]]:
        sets = []
        for work, conditions in zip(works, self.conditions(works), strict=True):
            chosen = work.chosen.to(self.device)
            sets.append(dataclasses.replace(work.set, conditions=[c[chosen] for c in conditions]))
        how = self.denoiser, self.sampler
        new = [s for w, s in zip(works, sets, strict=True) if w.again is None]
        drawn = iter(masked_autoregression.draw(*how, new, self.config.limit))
        paths = [next(drawn) if w.again is None else w.again.to(self.device) for w in works]
        return [(path, masked_autoregression.mean_log_prob(*how, s, path, self.config.limit) if w.tell else None)
                for w, s, path in zip(works, sets, paths, strict=True)]

    def conditions(self, works: Sequence[Reveal]) -> list[list[Tensor]]:
        """What the diffusion head is told of every place, (N, w), in each context of each work."""
        alike: dict[tuple[Grid, int], list[int]] = {}
        for i, w in enumerate(works):
            alike.setdefault((w.grid, int(w.hidden.sum())), []).append(i)
        states: dict[int, Tensor] = {}
        for (grid, _), numbers in alike.items():
            x, hidden = (torch.stack([v.to(self.device) for v in values])
                         for values in ([works[i].x for i in numbers], [works[i].hidden for i in numbers]))
            states |= zip(numbers, self.mar.encode(x, hidden, grid), strict=True)
        rows = [(i, reader) for i, w in enumerate(works) for reader in w.readers]
        writers = [self.writer(reader) for _, reader in rows]
        for writer, (i, _) in zip(writers, rows, strict=True):
            self.write_tokens(writer, 0, len(states[i]) - self.config.mar.buffers)
        contexts = [reader.context for _, reader in rows]
        page = Page.of([[w] for w in writers], start=[c.length for c in contexts]).to(self.device)
        run = self.trunk.start(contexts, page.tokens, self.embed.weight.dtype)  # never committed
        tokens = torch.cat([self.to_language(states[i][None])[0] for i, _ in rows])
        said = self.trunk(self.states(page, None, tokens), page.tokens, self.mask, run)[1]
        parts = said.split([len(states[i]) for i, _ in rows])
        out: dict[int, Tensor] = {}
        for (grid, _), numbers in alike.items():
            same_size = [r for r, (i, _) in enumerate(rows) if i in numbers]
            of = [rows[r][0] for r in same_size]
            full = self.from_language(torch.stack([states[i] for i in of]), torch.stack([parts[r] for r in same_size]))
            hidden = torch.stack([works[i].hidden for i in of]).to(self.device)
            out |= zip(same_size, self.mar.decode(full, hidden, grid), strict=True)
        ordered = iter([out[r] for r in range(len(rows))])
        return [[next(ordered) for _ in w.readers] for w in works]


@dataclass
class Sketch:
    """Pictures of one grid in training: x (b, N, d) with `hidden` (b, N), and the encoder's states of the others."""

    numbers: list[int]
    x: Tensor
    hidden: Tensor
    grid: Grid
    states: Tensor


def _guide(guidance: Guidance, names: Sequence[str], known: float, noise: Sequence[Tensor]) -> Tensor:
    return guidance.combine(noise[0], dict(zip(names, noise, strict=True)), known)
