"""MammothModa2: a language model plans a picture code by code, and a diffusion transformer renders what was planned
(arXiv 2511.18262).

    plan      words, image start, codes row by row -> language model, whose feed-forward networks have twins for codes
    s         states of what was read and planned, the mean over some layers
    c         [matrix(norm(s of the words)), states of queries that look at the s of the plan]
    render    c, clean latents of given pictures and noisy ones in one stream -> velocity
    L = w_text CE(text) / n_text + w_image CE(codes) / n_codes + w_flow ||v(x_t, t, c) - (data - noise)||^2 / (n_flow d)

- Discrete and continuous in one chain: the flow's gradient reaches the language model through the states.
- Codes have a vocabulary and a head of their own; attention and norms are those of the words.
- Given pictures are read by features and also stand in the stream, each with an index of its own.
- Guidance: logits of the plan against the context without its text; velocities against that text's states without a
  plan, and where pictures are given against no picture.
- Controls: `condition` text or image alone, `condition_layers: [-1]` for the last layer, `expert_layers` for all, some
  or no twins. What planning costs shows `render`, which takes any codes.

Differs from the paper: the heads of words and codes are normalised apart, as the place tells which is asked; row ends
are forced and not learnt; plans are codes of LlamaGen's VQ-16, as many and as wide as those of MammothTok. Not given
there and inferred: weights of the losses, rates of dropped conditions, ids in the plan, layers with twins.
"""
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from diptych.document import Document
from diptych.objectives import flow
from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.cache import Run
from diptych.parts.dit_stream import StreamDitConfig
from diptych.parts.experts import Coupling
from diptych.parts.grammar import Grammar
from diptych.parts.interleave import UNDERSTAND, Page, Writer
from diptych.parts.pictures import fit_sides
from diptych.parts.qformer import QFormerConfig
from diptych.parts.quantize import CodebookConfig, VectorConfig
from diptych.parts.resources import stored_config
from diptych.parts.serial import PlanConnector
from diptych.parts.tokens import Modality
from diptych.parts.trunks import Layer, pick
from diptych.parts.vae import AutoEncoderConfig, LatentCodec
from diptych.parts.vision import VisionConfig
from diptych.parts.vocabulary import Vocabulary
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.parts.windows import WindowConfig
from diptych.systems import flows
from diptych.systems.bagel import Sides
from diptych.systems.base import Emit, Sampling, Work
from diptych.systems.coded import Coded
from diptych.systems.metaquery import QWEN_MARKS
from diptych.systems.packed import Batch
from diptych.systems.vlm import Vlm, VlmConfig
from diptych.systems.works import Denoise, Encode, Grid, Read, Reader, Together

ANSWER = 1  # the role of a plan: its fixed tokens are no words of the condition


@dataclass(frozen=True, kw_only=True)
class MammothModa2Config(VlmConfig):
    """`expert_layers`: first layer with a twin for codes, and the first behind that has none. `condition_layers` count
    from the end: -1 are the states behind the last one, not yet normalised. The vocabulary of codes has `code_rows`,
    code k in row `first_code` + k. `null`: what stands in place of a text that is left out."""

    features: Literal["full", "causal"] = "causal"
    positions: Literal["shared", "spread", "spatial"] = "spatial"
    expert_layers: tuple[int, int]
    codes: int
    code_rows: int
    first_code: int = 0
    row_end: int | None = None  # row of that vocabulary that closes a row of the plan
    grammar: Grammar | None = None  # of a plan; None: the image marks around its rows
    plan_codec: VQTokenizerConfig | None  # None: plans are drawn, never learnt from pictures
    condition: Literal["text", "image", "text_image"] = "text_image"
    condition_layers: tuple[int, ...] = (-2, -5, -8, -11, -14, -17)
    queries: QFormerConfig
    generator: StreamDitConfig
    codec: AutoEncoderConfig
    latent_patch: int = 2
    latent_sides: Sides
    picture: tuple[int, int]  # drawn when nothing says otherwise
    null: Literal["nothing", "prompt"] = "prompt"
    noised_copies: int = 1  # of each picture to draw in training
    time_shift: flow.Shift = "linear"
    sampling_shift: flow.Shift = "root"  # times that of the sampling
    text_weight: float = 1.0
    image_weight: float = 1.0
    flow_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("expert_layers", "condition_layers", "picture"):  # lists come from JSON and YAML
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = self.codec.latent_channels * self.latent_patch**2, self.generator.width, self.block.width
        given = self.generator.token_width, self.queries.width, self.queries.feature_width
        if sizes != given or self.queries.form != "gated":
            raise ValueError(f"expected generator.token_width, queries.width and feature_width to be {sizes} and gated "
                             f"queries, got {given} and {self.queries.form}")
        if any(not -self.depth - 1 <= i < 0 for i in self.condition_layers) or not self.condition_layers:
            raise ValueError(f"expected condition_layers from -{self.depth + 1} to -1, got {self.condition_layers}")
        if self.plan_codec is not None and self.stride % self.plan_codec.downsample:
            raise ValueError(f"expected plan_codec.downsample to divide {self.stride} pixels, those of a latent token, "
                             f"got {self.plan_codec.downsample}")
        rows = max(self.first_code + self.codes, (self.row_end or 0) + 1)
        if self.positions == "shared" or rows > self.code_rows or self.noised_copies < 1:
            raise ValueError(f"expected positions not shared, at least {rows} code_rows and noised_copies >= 1, got "
                             f"{self.positions}, {self.code_rows} and {self.noised_copies}")

    @property
    def coupling(self) -> Coupling:
        return Coupling.feed_forward(self.depth, layers=self.expert_layers)

    @property
    def stride(self) -> int:
        return self.codec.downsample * self.latent_patch


class MammothModa2(Coded, Vlm):
    Config = MammothModa2Config
    config: MammothModa2Config
    draws = True
    copies = True
    codec: LatentCodec  # type: ignore[assignment]

    def __init__(self, config: MammothModa2Config, vocabulary: Vocabulary | None = None) -> None:
        super().__init__(config, vocabulary)
        c, width, marks = config, config.block.width, self.marks
        row_end = () if c.row_end is None else (c.vocabulary_size + c.row_end,)
        block = c.grammar or Grammar(start=(marks.image_start,), row_end=row_end, end=(marks.image_end,))
        self.layout = replace(self.layout, code=block, drawn=c.vocabulary_size)
        for layer in cast(Sequence[Layer], self.trunk.layers):
            for n in range(1, len(layer.mlp_norm)):
                layer.mlp_norm[n] = layer.mlp_norm[0]  # only the networks have twins
        self.code_embed, self.code_head = nn.Embedding(c.code_rows, width), nn.Linear(width, c.code_rows, bias=False)
        normal_weights((self.code_embed, self.code_head))
        self.generator = c.generator.build()
        self.conditions = PlanConnector(c.condition, c.queries)
        self.codec = c.codec.build().requires_grad_(False)
        if c.plan_codec is not None:
            self.plan_codec = VQTokenizer(c.plan_codec).requires_grad_(False)
            values = self.plan_codec.layout(*c.picture).values
            if values != c.codes:
                raise ValueError(f"expected as many codes as plan_codec has, {values}, got {c.codes}")

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> MammothModa2Config:
        """For tests: seconds on a CPU."""
        side = PyramidConfig(channels=8, channel_mult=(1, 1, 2, 2), blocks=(1,) * 4, attention=(3,), norm_groups=4)
        return cls._world(
            block=BlockConfig(width=64, heads=2, kv_heads=1, head_dim=32, hidden=128, qkv_bias=False, qk_norm=True),
            depth=2, expert_layers=(1, 2), condition_layers=(-1, -2), noised_copies=4,
            vision=WindowConfig(width=32, hidden=64, layers=2, heads=2, patch=8, full=(0, 1), out_width=64, table=4,
                                norm="layer", mlp="tanh", patch_bias=True, deep=(0,)),
            codes=64, plan_codec=VQTokenizerConfig(encoder=side, decoder=side, latent_channels=16,
                                         quantizer=VectorConfig(codebook=CodebookConfig(values=64))),
            codec=AutoEncoderConfig(channels=16, channel_mult=(1, 1), num_res_blocks=1, latent_channels=6, patch=4,
                                    norm_groups=4, shift=0.0, scale=1.0),
            queries=4, generator=StreamDitConfig(token_width=24, width=64, layers=2, refiners=1, heads=2, kv_heads=1,
                                                 hidden=128, axes=(8, 12, 12), time_width=64, side=4))

    @classmethod
    def small(cls) -> MammothModa2Config:
        """The world at 64 px: 64 codes of the zoo's `vq` plan 16 latent tokens of its `codec`; about 9M trained
        parameters."""
        return cls._world(
            block=BlockConfig(width=224, heads=7, kv_heads=7, head_dim=32, hidden=576, qkv_bias=False, qk_norm=True),
            depth=6, expert_layers=(3, 6), condition_layers=(-2, -3, -4, -5), noised_copies=2,
            vision=VisionConfig(**stored_config("zoo/clip")["vision"]), codes=1024,
            plan_codec=VQTokenizerConfig.small(), codec=AutoEncoderConfig(**stored_config("zoo/codec")),
            queries=16, generator=StreamDitConfig(token_width=24, width=192, layers=5, refiners=1, heads=6, kv_heads=2,
                                                  hidden=384, axes=(8, 12, 12), time_width=192, side=4))

    @classmethod
    def _world(cls, *, block: BlockConfig, queries: int, generator: StreamDitConfig, codes: int,
               **rest: Any) -> MammothModa2Config:
        return MammothModa2Config(
            block=block, generator=generator, vocabulary_size=1024, rope_sections=(6, 5, 5), rope_interleaved=True,
            codes=codes, code_rows=codes + 1, row_end=codes, picture=(64, 64),
            queries=_queries(queries, 1, generator.heads, generator.hidden, generator.width, block.width),
            latent_sides=Sides(shortest=64, longest=64), sampling_shift=1.0, drop_text=0.1, drop_feature=0.1, row=192,
            sampling=_guided(2.0), **rest)

    @classmethod
    def paper(cls) -> MammothModa2Config:
        """Qwen3-VL-8B with twins in its deeper half, a transformer of 26 layers at 512 px (released configs)."""
        return MammothModa2Config(
            block=BlockConfig(width=4096, heads=32, kv_heads=8, head_dim=128, hidden=12288, qkv_bias=False,
                              qk_norm=True), depth=36,
            vocabulary_size=152064, tie_embeddings=False, rope_theta=5e6, rope_sections=(24, 20, 20),
            rope_interleaved=True, tokenizer="", marks=QWEN_MARKS,
            vision=WindowConfig(width=1152, hidden=4304, layers=27, heads=16, patch=16, window=32, out_width=4096,
                                full=tuple(range(27)), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), norm="layer",
                                mlp="tanh", patch_bias=True, table=48, deep=(8, 16, 24)), side=1024,
            expert_layers=(18, 36), codes=16384, code_rows=32800, row_end=32799,
            grammar=Grammar(start=(151652,), digits=tuple(range(15, 25)), times=(9,), opened=(151655,),
                            row_end=(152064 + 32799,), end=(151653,)),
            plan_codec=VQTokenizerConfig.paper(), queries=_queries(128, 2, 18, 9216, 2304, 4096),
            generator=StreamDitConfig(), codec=AutoEncoderConfig.paper(),
            latent_sides=Sides(shortest=512, longest=1024), picture=(512, 512), drop_text=0.1, drop_feature=0.1,
            row=4096, sampling=replace(_guided(9.0), evaluations=50, plan_guidance=_guided(7.0).guidance))

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    @property
    def stride(self) -> int:  # type: ignore[override]
        return self.config.stride

    def plan_grid(self, grid: Grid) -> Grid:
        """Rows and columns of codes that plan so many latent tokens."""
        each = 1 if self.config.plan_codec is None else self.stride // self.config.plan_codec.downsample
        return grid[0] * each, grid[1] * each

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        sides = self.config.latent_sides
        return Vlm.views(self, pixels)[0], fit_sides(pixels, sides.shortest, sides.longest, self.stride)

    def write_null(self, w: Writer, ids: list[int]) -> None:
        if self.config.null == "prompt":
            w.text([])

    def write_drawn(self, w: Writer, number: int, grid: Grid) -> None:
        w.code(number, w.plan(self.plan_grid(grid)), drawn=True, role=ANSWER)

    def write_copy(self, w: Writer, number: int, grid: Grid) -> None:
        w.latents.append((number, False))  # the renderer alone sees it: no token stands for it

    def _drops(self, document: Document) -> tuple[bool, bool, bool]:
        text, _, feature = super()._drops(document)
        return text, feature, feature  # a picture that is left out is neither read nor drawn from

    def lay_out(self, written: Sequence[tuple[Writer, list[Tensor], list[Tensor]]]) -> Batch:
        batch = super().lay_out(written)
        grids = [self.grid(batch.pictures[i]) for i, _ in batch.codes]
        return replace(batch, further={"flow": float(sum(rows * columns for rows, columns in grids))})

    def picture_codes(self, pictures: list[Tensor]) -> list[Tensor]:
        if self.config.plan_codec is None:
            raise ValueError("expected a tokenizer of pictures to learn plans from, got none; fix: set plan_codec")
        return self.plan_codec.tokens(pictures)

    def encode(self, pictures: list[Tensor]) -> list[Tensor]:
        return self.codec.tokens(pictures, self.config.latent_patch)

    def decode(self, x: Tensor, grid: Grid) -> Tensor:
        return self.codec.from_tokens(x, self.config.latent_patch, grid)

    # -- the language model -------------------------------------------------------------------------------------------

    def code_tokens(self, codes: Tensor) -> Tensor:
        return self.code_embed(codes + self.config.first_code)

    def code_logits(self, hidden: Tensor) -> Tensor:
        return self.code_head(hidden)[..., self.config.first_code:self.config.first_code + self.config.codes]

    def states(self, page: Page, features: Tensor | None, drawn: Tensor | None) -> list[Tensor]:
        """Beside codes, their route has fixed tokens with ids behind those of words."""
        places = page.tokens.routes(2)[1]
        x = self.code_embed((page.ids.flatten()[places] - self.config.vocabulary_size).clamp_min(0))
        if drawn is not None:
            cells = torch.nonzero(page.tokens.modality.flatten()[places] == Modality.CODE).squeeze(1)
            x = x.index_copy(0, cells, drawn.to(x.dtype))
        return [Vlm.states(self, page, features, None)[0], x]

    def think(self, page: Page, features: Tensor | None, drawn: Tensor | None, run: Run | None = None
              ) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states by route, and the mean over `condition_layers`."""
        layers = {self.config.depth + 1 + i for i in self.config.condition_layers}
        deepen, found = self.deepen(page, features), list[list[Tensor]]()

        def between(done: int, states: list[Tensor]) -> list[Tensor]:
            states = states if deepen is None else deepen(done, states)
            found.extend([states] * (done in layers))
            return states

        hidden = self.trunk(self.states(page, features, drawn), page.tokens, self.mask, run, between)
        return hidden, [torch.stack(route).mean(0) for route in zip(*found, strict=True)]

    # -- what the renderer is told ------------------------------------------------------------------------------------

    def said(self, page: Page, silent: Sequence[int] | None = None) -> Tensor:
        """(B, T) bool: the words and their marks, without pictures, plans and `silent` ids (those of image marks)."""
        tokens, silent = page.tokens, silent or (self.marks.image_start, self.marks.image_end)
        words = (tokens.modality == Modality.TEXT) & (tokens.route == UNDERSTAND) & (tokens.role != ANSWER)
        return words & ~torch.isin(page.ids, torch.tensor(silent, device=page.ids.device))

    def exported(self, kept: list[Tensor], page: Page) -> tuple[list[Tensor], list[Tensor | None]]:
        """For every plan on a page the states of what was said before it, and its own where there were words."""
        tokens, length, said = page.tokens, page.tokens.shape[1], self.said(page)
        spoken = said & ~torch.isin(page.ids, torch.tensor((self.marks.start, self.marks.end), device=page.ids.device))
        codes = tokens.routes(2)[1]
        key = torch.stack((codes // length, tokens.document.flatten()[codes], tokens.segment.flatten()[codes]), 1)
        blocks = codes.split(torch.unique_consecutive(key, dim=0, return_counts=True)[1].tolist())
        places, worded = list[Tensor](), list[bool]()
        for block in blocks:
            row, first = divmod(int(block[0]), length)
            before = tokens.document[row] == tokens.document[row, first]
            before = before & (tokens.index[row] < tokens.index[row, first])
            places.append(row * length + torch.nonzero(said[row] & before).squeeze(1))
            worded.append(bool((spoken[row] & before).any()))
        states = pick(kept, tokens, torch.cat((*places, *blocks))).split([len(p) for p in (*places, *blocks)])
        plans = zip(states[len(blocks):], worded, strict=True)
        return list(states[:len(blocks)]), [plan if shown else None for plan, shown in plans]

    # -- training -----------------------------------------------------------------------------------------------------

    def further(self, batch: Batch, kept: list[Tensor], generator: torch.Generator) -> dict[str, tuple[float, Tensor]]:
        if not batch.codes:
            return {}
        c, conditions = self.config, self.conditions(*self.exported(kept, batch.page))
        latents = [(x, self.grid(p)) for x, p in zip(self.encode(batch.pictures), batch.pictures, strict=True)]
        data, grids = zip(*(latents[i] for i, _ in batch.codes), strict=True)
        given = [[latents[i] for i in own[-c.generator.references:]] for own in batch.references]
        return {"flow": (c.flow_weight, flows.errors(self.generator, data, grids, conditions, given, c.noised_copies,
                                                     c.time_shift, generator))}

    # -- drawing ------------------------------------------------------------------------------------------------------

    def _look_at(self, reader: Reader, pixels: Tensor, x: Tensor | None, grid: Grid | None,
                 copy: bool) -> Generator[Work, Any, None]:
        if copy:
            coded = self.views(pixels)[1]
            known = (x, grid) if x is not None and grid is not None else ((yield Encode(coded)), self.grid(coded))
            reader.latents.append(known)
        yield from Vlm._look_at(self, reader, pixels, x, grid, copy)

    def _step(self, reader: Reader, plan: list[int], part: slice, codes: list[Tensor], drawn: bool = True) -> Read:
        w = self.writer(reader)
        w.code(0, plan, drawn=drawn, part=part, role=ANSWER)
        return Read(reader, w, codes=codes)

    def code_sampling(self, sampling: Sampling) -> Sampling:
        return replace(sampling, guidance=sampling.plan_guidance or sampling.guidance, partial=0)

    def paint(self, grid: Grid, contexts: dict[str, Reader], sampling: Sampling, generator: torch.Generator, index: int,
              emit: Emit, more: bool) -> Generator[Work, Any, Tensor]:
        uniforms = torch.rand(self.plan_grid(grid), generator=generator, dtype=torch.float64).flatten()
        noise = torch.randn(grid[0] * grid[1], self.config.generator.token_width, generator=generator).to(self.device)
        planning = self.code_sampling(sampling)
        planning.guidance.check(contexts)
        before = {n: contexts[n].fork() for n in ("full", *(b.context for b in sampling.guidance.branches))}
        codes = yield from self.raster(uniforms, self.plan_grid(grid), contexts, planning, index, emit, more)
        return (yield from self.render(codes, noise, grid, before, sampling, generator, index, emit))

    def render(self, codes: Tensor, noise: Tensor, grid: Grid, contexts: dict[str, Reader], sampling: Sampling,
               generator: torch.Generator, index: int, emit: Emit) -> Generator[Work, Any, Tensor]:
        """From noise (n, d) to latent tokens as codes (m,) plan them. The plan is read once more in every context that
        knows the text; contexts are used up."""
        nothing = self.embed.weight.new_zeros(0, self.config.block.width)
        texts = {name: torch.cat((nothing, *reader.states)) for name, reader in contexts.items()}
        shown = [n for n in contexts if len(texts[n]) and n != "no_text" and self.conditions.image is not None]
        plan = self.writer(Reader()).plan(self.plan_grid(grid))
        yield Together([self._step(contexts[name], plan, slice(None), [codes], drawn=False) for name in shown])
        plans = [contexts[name].states[-1] if name in shown else None for name in contexts]
        told = self.conditions(list(texts.values()), plans)
        references = {name: reader.latents[-self.config.generator.references:] for name, reader in contexts.items()}
        return (yield from self.develop(noise, grid, dict(zip(contexts, told, strict=True)), references, sampling,
                                        generator, index, emit))

    def develop(self, x: Tensor, grid: Grid, told: dict[str, Tensor], references: dict[str, list[tuple[Tensor, Grid]]],
                sampling: Sampling, generator: torch.Generator, index: int, emit: Emit) -> Generator[Work, Any, Tensor]:
        """From noise x (n, d) to latent tokens, under the condition (q, c) and the references of every context."""
        def look(names: list[str], x: Tensor, t: float) -> Work:
            return Denoise([told[n] for n in names], x, t, grid, [references[n] for n in names])

        shift = sampling.shift * flow.shift_for(len(x), self.config.sampling_shift)
        return (yield from flows.denoise(x, grid, look, replace(sampling, shift=shift), generator, index, emit))

    def keep_states(self, works: Sequence[Read], page: Page, hidden: list[Tensor]) -> None:
        """States of words; of a plan that is read once more those of its codes and row ends."""
        said, codes = self.said(page), page.tokens.route != UNDERSTAND
        for row, work in enumerate(works):
            known = any(not drawn for _, drawn in work.writer.codes)
            own = torch.nonzero((codes & page.tokens.valid() if known else said)[row]).squeeze(1)
            if work.keep and len(own):
                work.reader.states.append(pick(hidden, page.tokens, row * page.tokens.shape[1] + own))

    def runners(self, commits: list[Callable[[], None]]) -> dict[str, Callable[[Sequence[Any]], Sequence[Any]]]:
        return super().runners(commits) | {"denoise": self._run_denoises}

    def _run_denoises(self, works: Sequence[Denoise]) -> list[list[Tensor]]:
        rows = [(w, *told) for w in works for told in zip(w.conditions, w.references, strict=True)]
        t = torch.tensor([w.t for w, *_ in rows], device=self.device)
        answers = iter(self.generator([w.x for w, *_ in rows], t, [c for _, c, _ in rows], [w.grid for w, *_ in rows],
                                      [given for *_, given in rows]))
        return [[next(answers).float() for _ in w.conditions] for w in works]


def _queries(count: int, layers: int, heads: int, hidden: int, width: int, feature_width: int) -> QFormerConfig:
    return QFormerConfig(width=width, mlp_width=hidden, layers=layers, heads=heads, norm_eps=1e-5, queries=count,
                         cross_every=1, feature_width=feature_width, form="gated")


def _guided(scale: float) -> Sampling:
    return Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=scale),)))
