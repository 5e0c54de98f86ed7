"""What systems of the serial coupling share: a language model that reads (`systems.vlm`) hands states through a
connector to a generator that draws. Four axes, all of them values of the config and of the recipe:

    states      `exports` "queries": learnt tokens behind the context, which see it; "context": everything that was read
    connector   `connector`: encoder and projection, in either order, or nothing; or with a vector of the whole beside
    injection   `generator`: cross-attention, prefix, modulation, sums with self-attention, or a stream beside its own
    freezing    `freeze` of a stage of the recipe (`[trunk, embed, head, vision, ...]`); the codec is always frozen

    L = w_text CE(text) / n_text + w_image mean over pictures |v(x_t, t, c) - (data - noise)|^2

With `objective` "regression" the generator says the tokens themselves, v(0, 0, c), at once: the one step of a flow that
starts from zeros instead of noise.

The block of a picture to draw is private: nothing after it sees it, so that answers are those of the language model
alone. What follows a drawn picture reads its features. A generator with a stream of its own may also look at clean
latents of the last pictures before (`references`): a draw of the codec from them, scaled to the size to draw.
"""
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from diptych.objectives import flow, regression
from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.deep_codec import DeepCodecConfig
from diptych.parts.dit import DitConfig
from diptych.parts.dit_gated import GatedDitConfig
from diptych.parts.dit_joint import JointDit, JointDitConfig
from diptych.parts.dit_stream import Reference
from diptych.parts.feature_codec import FeatureCodec, FeatureCodecConfig
from diptych.parts.grammar import CELL
from diptych.parts.interleave import Page, Writer
from diptych.parts.pictures import fit_sides, scale_to, stack_by_size
from diptych.parts.serial import ConnectorConfig, PooledConnectorConfig, padded
from diptych.parts.tokens import Mode, Tokens
from diptych.parts.trunks import pick
from diptych.parts.vae import AutoEncoderConfig
from diptych.parts.vocabulary import Vocabulary
from diptych.systems import flows
from diptych.systems.bagel import Sides
from diptych.systems.base import Emit, Losses, Sampling, Work
from diptych.systems.packed import Batch
from diptych.systems.vlm import Vlm, VlmConfig
from diptych.systems.works import Denoise, Encode, Grid, Read, Reader, Together


@dataclass(frozen=True, kw_only=True)
class SerialConfig(VlmConfig):
    """`opening`: what stands in front of the queries, a row learnt with them, the image mark, another id or nothing.
    `null`: what guidance and dropping put for a text, an empty one (or `negative`) or a condition of zeros."""

    exports: Literal["queries", "context"] = "queries"
    queries: int = 64
    opening: Literal["learnt", "mark", "none"] | int = "learnt"
    connector: ConnectorConfig | PooledConnectorConfig
    generator: DitConfig | GatedDitConfig | JointDitConfig
    codec: AutoEncoderConfig | DeepCodecConfig | FeatureCodecConfig
    latent_patch: int = 1
    latent_sides: Sides
    picture: tuple[int, int]  # drawn when nothing says otherwise
    references: int = 0  # how many of the last pictures before it the generator sees
    null: Literal["prompt", "zeros"] = "prompt"
    negative: str = ""  # what guidance (and training without the text) reads in place of a text
    objective: Literal["flow", "regression"] = "flow"
    drop_condition: float = 0.0  # share of pictures trained under a condition of zeros
    noised_copies: int = 1  # noise levels per picture and condition in training
    noise_steps: int = 1000  # levels of the grid that training draws from; 0: logit-normal levels
    whole_steps: bool = False  # sampling tells the generator the level rounded down to that grid, as released
    text_weight: float = 1.0
    image_weight: float = 1.0
    pixel_weight: float = 1.0  # of the decoder of features, which learns beside the rest and touches nothing else

    def __post_init__(self) -> None:
        super().__post_init__()
        width = self.codec.latent_channels * self.latent_patch**2
        if self.generator.token_width != width:
            raise ValueError(f"expected generator.token_width to be {width}, as the codec and latent_patch imply, "
                             f"got {self.generator.token_width}")
        if (self.queries < 1) != (self.exports == "context") or self.noised_copies < 1:
            raise ValueError(f"expected queries exactly where they are exported, and noised_copies of at least 1, got "
                             f"{self.queries} and {self.noised_copies}")
        if self.noise_steps < self.whole_steps:
            raise ValueError(f"expected noise_steps of at least 1 to tell whole ones, got {self.noise_steps}")
        if self.exports == "context" and self.opening != "learnt":
            raise ValueError(f"expected a learnt opening where the context is exported, got {self.opening!r}")
        whole, asked = (getattr(part, "pooled_width", None) for part in (self.connector, self.generator))
        if whole != asked:
            raise ValueError(f"expected a connector that says a vector of the whole as the generator asks for, of "
                             f"width {asked}, got {whole}")
        if self.references and not isinstance(self.generator, JointDitConfig):
            raise ValueError(f"expected a generator that looks at references, got {type(self.generator).__name__}; "
                             "fix: set references to 0")


def of_world(**sizes: Any) -> SerialConfig:
    """A config for the world at 64 px, with guidance of 2."""
    return SerialConfig(vocabulary_size=1024, latent_sides=Sides(shortest=64, longest=64), picture=(64, 64),
                        sampling=Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),))), **sizes)


class Serial(Vlm):
    Config = SerialConfig
    config: SerialConfig
    draws = True

    def __init__(self, config: SerialConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__(config, vocabulary)
        c, width = config, config.block.width
        self.token_width = c.generator.token_width
        self.queries = nn.Parameter(0.02 * torch.randn(c.queries + (c.opening == "learnt"), width))
        self.connector_out = c.connector.build(width, c.generator.condition_width)
        self.generator = c.generator.build()
        self.codec = c.codec.build().requires_grad_(False)
        self.copies, self.negatives = c.references > 0, c.null == "prompt"
        self.shows = isinstance(self.codec, FeatureCodec) and self.codec.config.decoder is not None
        if isinstance(self.codec, FeatureCodec) and self.shows:
            self.codec.decoder.requires_grad_(c.pixel_weight > 0)

    # -- pictures -----------------------------------------------------------------------------------------------------

    @property
    def stride(self) -> int:  # type: ignore[override]
        return self.config.codec.downsample * self.config.latent_patch

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        sides = self.config.latent_sides
        return super().views(pixels)[0], fit_sides(pixels, sides.shortest, sides.longest, self.stride)

    def encode(self, pictures: list[Tensor], noises: Sequence[Tensor] | None = None) -> list[Tensor]:
        return self.codec.tokens(pictures, self.config.latent_patch, noises)

    def decode(self, x: Tensor, grid: Grid) -> Tensor:
        return self.codec.from_tokens(x, self.config.latent_patch, grid)

    def write_null(self, w: Writer, ids: list[int]) -> None:
        if self.config.null == "prompt":
            w.text(self.need_vocabulary().encode(self.config.negative) if self.config.negative else [])

    def write_copy(self, w: Writer, number: int, grid: Grid) -> None:
        w.latents.append((number, False))  # the generator alone sees it: no token stands for it

    def write_drawn(self, w: Writer, number: int, grid: Grid) -> None:
        """A private block, whose positions nothing after it counts."""
        c, before, asked = self.config, w.position, len(w.questions)
        kinds = {"learnt": [CELL], "mark": [self.marks.image_start], "none": []}
        opening = kinds[c.opening] if isinstance(c.opening, str) else [c.opening]
        w.code(number, [*opening, *[CELL] * c.queries], drawn=True, mode=Mode.NOISE, ahead=False)
        if opening == [CELL] and c.queries:
            del w.questions[asked]  # the opening is not exported
        w.position = before

    # -- states to conditions -----------------------------------------------------------------------------------------

    def blank(self, count: int) -> Tensor | None:
        return self.queries.repeat(count, 1) if count else None

    def answer(self, hidden: Tensor) -> Tensor:
        """Conditions of queries; states of openings, which conditions are made of together with those of contexts."""
        if self.config.exports == "context":
            return hidden
        return self.connector_out(hidden.unflatten(0, (-1, self.config.queries))).flatten(0, 1)

    def conditions(self, hidden: Sequence[Tensor], page: Page) -> tuple[Tensor, Tensor | None]:
        """Of every picture to draw on a page, in order: (k, q, c), and which of the q count (k, q) bool."""
        own = pick(hidden, page.tokens, page.questions)
        if self.config.exports == "queries":
            return self.answer(own).unflatten(0, (-1, self.config.queries)), None
        parts = [pick(hidden, page.tokens, _read_by(page.tokens, int(cell))) for cell in page.questions]
        states, visible = padded(parts)
        return self.connector_out(states, visible), visible

    # -- training -----------------------------------------------------------------------------------------------------

    def lay_out(self, written: Sequence[tuple[Writer, list[Tensor], list[Tensor]]]) -> Batch:
        # pixels are no tokens: only the loss itself counts them
        return replace(super().lay_out(written), chance=self.shows and self.config.pixel_weight > 0)

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        c, hidden = self.config, self.hidden(batch)
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        error, count = self.text_error(hidden[0], batch.page)
        if count > 0:
            sums["text"], counts["text"] = error, count
        if batch.codes:
            conditions, visible = self.conditions(hidden, batch.page)
            if c.drop_condition:
                gone = torch.rand(len(conditions), generator=generator, device=generator.device) < c.drop_condition
                conditions = conditions.masked_fill(gone.to(conditions.device)[:, None, None], 0.0)
            # pictures count alike whatever their size, in the unit of the tokens that stand for them
            each = len(self.queries)
            sums["image"] = each * self.picture_error(conditions, visible, batch, generator).sum()
            counts["image"] = torch.tensor(float(each * len(batch.codes)), device=conditions.device)
            if self.shows and c.pixel_weight:
                sums["pixels"], counts["pixels"] = self.pixel_error([batch.pictures[i] for i, _ in batch.codes])
        return Losses(sums, counts, {"text": c.text_weight, "image": c.image_weight, "pixels": c.pixel_weight})

    def pixel_error(self, pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of the squared errors of what the decoder shows of true features, and the number of pixel values."""
        errors = []
        for _, images in stack_by_size(pictures):
            with torch.no_grad():
                features = self.codec.latent(images)
            errors.append((self.codec.decode(features).float() - images).square().flatten())
        every = torch.cat(errors)
        return every.sum(), torch.tensor(float(len(every)), device=every.device)

    def picture_error(self, conditions: Tensor, visible: Tensor | None, batch: Batch,
                      generator: torch.Generator) -> Tensor:
        """(k,) squared error per picture to draw, mean over its copies, tokens and channels."""
        c, codes, device = self.config, self.encode(batch.pictures), conditions.device
        said = c.objective == "regression"
        copies = 1 if said else c.noised_copies
        numbers = [i for i, _ in batch.codes for _ in range(copies)]
        sizes = [len(codes[i]) for i in numbers]
        if said:
            t, noise = torch.zeros(len(numbers), device=device), torch.zeros(sum(sizes), self.token_width)
        else:
            t = flow.sample_time(len(numbers), generator, steps=c.noise_steps).to(device)
            noise = torch.randn((sum(sizes), self.token_width), generator=generator, device=generator.device)
        noises = noise.to(device).split(sizes)
        given = self.given_latents(batch, generator)
        errors: dict[int, Tensor] = {}
        alike: dict[tuple[Grid, int], list[int]] = {}
        for row, i in enumerate(numbers):
            alike.setdefault((self.grid(batch.pictures[i]), len(given[row // copies])), []).append(row)
        for (grid, shown), rows in alike.items():
            data, own = torch.stack([codes[numbers[r]] for r in rows]), torch.stack([noises[r] for r in rows])
            at, of = t[rows], torch.tensor(rows, device=device) // copies
            x = flow.interpolate(data, own, at[:, None, None])
            references = torch.stack([given[r // copies] for r in rows]) if shown else None
            v = self.velocity(x, at, conditions[of], grid, None if visible is None else visible[of], references)
            error = regression.losses(v, data) if said else flow.squared_error(v, data, own)
            errors |= zip(rows, error.mean(1), strict=True)
        return torch.stack([errors[r] for r in range(len(numbers))]).unflatten(0, (-1, copies)).mean(1)

    def given_latents(self, batch: Batch, generator: torch.Generator) -> list[Tensor]:
        """For every picture to draw the latent tokens (m, d) of its references, one behind the other."""
        last = [own[-self.config.references:] if self.copies else () for own in batch.references]
        pictures, noises = list[Tensor](), list[Tensor]()
        for (i, _), own in zip(batch.codes, last, strict=True):
            size = batch.pictures[i].shape[1], batch.pictures[i].shape[2]
            rows, columns = self.grid(batch.pictures[i])
            for r in own:
                pictures.append(scale_to(batch.pictures[r], size))
                noise = torch.randn((rows * columns, self.token_width), generator=generator, device=generator.device)
                noises.append(noise.to(self.device))
        latents = iter(self.encode(pictures, noises))
        nothing = torch.zeros(0, self.token_width, device=self.device)
        return [torch.cat([nothing, *(next(latents) for _ in own)]) for own in last]

    def velocity(self, x: Tensor, t: Tensor, conditions: Tensor, grid: Grid, visible: Tensor | None = None,
                 references: Tensor | None = None) -> Tensor:
        """Of latent tokens x (b, n, d) at times t (b,) under what the connector says (b, q, c), with latent tokens of
        references (b, m, d)."""
        if not isinstance(self.generator, JointDit):
            return self.generator(x, t, conditions, grid, visible)
        own = self.generator.config
        states, whole = conditions.split((own.condition_width, own.pooled_width), -1)
        return self.generator(x, t, states, whole[:, 0], grid, visible, references)

    # -- drawing ------------------------------------------------------------------------------------------------------

    def _look_at(self, reader: Reader, pixels: Tensor, x: Tensor | None, grid: Grid | None,
                 copy: bool) -> Generator[Work, Any, None]:
        if copy and self.copies:
            reader.pictures.append(self.views(pixels)[1])
        yield from super()._look_at(reader, pixels, x, grid, copy)

    def paint(self, grid: Grid, contexts: dict[str, Reader], sampling: Sampling, generator: torch.Generator, index: int,
              emit: Emit, more: bool) -> Generator[Work, Any, Tensor]:
        """The language model is asked once per context, the generator at every step."""
        x = torch.randn(grid[0] * grid[1], self.token_width, generator=generator).to(self.device)
        names = list(dict.fromkeys(["full", *(b.context for b in sampling.guidance.branches)]))
        asked = [n for n in names if self.config.null == "prompt" or n != "no_text"]
        answers = yield Together([self.ask(contexts[n]) for n in asked])
        told = dict(zip(asked, answers, strict=True))
        if self.config.exports == "context":
            for name, opening in told.items():
                states = yield from self.reread(contexts[name])
                told[name] = self.connector_out(torch.cat((*states, opening))[None])[0]
        told |= {n: torch.zeros_like(told["full"]) for n in names if n not in told}
        references = yield from self.look_back({n: contexts[n] for n in names}, grid, generator)
        return (yield from self.develop(x, grid, told, sampling, generator, index, emit, references))

    def look_back(self, contexts: Mapping[str, Reader], grid: Grid, generator: torch.Generator
                  ) -> Generator[Work, Any, dict[str, list[Reference]]]:
        """The references of every context for a picture of this grid; each is drawn by the codec once."""
        last = {n: reader.pictures[-self.config.references:] if self.copies else [] for n, reader in contexts.items()}
        every, works = {id(p): p for own in last.values() for p in own}, list[Work]()
        for picture in every.values():
            noise = torch.randn((grid[0] * grid[1], self.token_width), generator=generator).to(self.device)
            works.append(Encode(scale_to(picture, (grid[0] * self.stride, grid[1] * self.stride)), noise))
        latents = dict(zip(every, (yield Together(works)) if works else [], strict=True))
        return {n: [(latents[id(p)], grid) for p in own] for n, own in last.items()}

    def develop(self, x: Tensor, grid: Grid, told: dict[str, Tensor], sampling: Sampling, generator: torch.Generator,
                index: int, emit: Emit, references: Mapping[str, list[Reference]] | None = None
                ) -> Generator[Work, Any, Tensor]:
        """From noise x (n, d) to latent tokens, under the condition (q, c) and the references of every context."""
        shown = references or {}

        if self.config.objective == "regression":
            x, sampling = torch.zeros_like(x), replace(sampling, evaluations=1, shift=1.0, start=0.0, stochastic=0.0)

        def look(names: list[str], x: Tensor, t: float) -> Work:
            return Denoise([told[n] for n in names], x, t, grid, [shown.get(n, []) for n in names])

        return (yield from flows.denoise(x, grid, look, sampling, generator, index, emit))

    def ask(self, reader: Reader) -> Read:
        w = self.writer(reader)
        self.write_drawn(w, 0, (1, 1))
        return Read(reader, w, keep=False)

    def reread(self, reader: Reader) -> Generator[Work, Any, list[Tensor]]:
        """States (n, width) of all that a context has read, by reading it again: contexts keep keys and values only."""
        again, states = Reader(), list[Tensor]()
        for past in reader.log:
            every = replace(past.writer, questions=list(range(past.writer.strip.length)))
            states.append((yield Read(again, every, past.views)))
        return states

    def _run_reads(self, works: Sequence[Read], commits: list[Callable[[], None]]) -> list[Tensor | None]:
        answers = super()._run_reads(works, commits)

        def remember() -> None:
            for work in works:
                if work.keep:
                    work.reader.log.append(work)

        if self.config.exports == "context":
            commits.append(remember)
        return answers

    def runners(self, commits: list[Callable[[], None]]) -> dict[str, Callable[[Sequence[Any]], Sequence[Any]]]:
        return super().runners(commits) | {"denoise": self._run_denoises, "encode": self._run_encodes}

    def _run_encodes(self, works: Sequence[Encode]) -> list[Tensor]:
        return self.encode([w.pixels for w in works], [cast(Tensor, w.noise) for w in works])

    def level(self, t: float) -> float:
        """The time that the generator is told at time t of sampling."""
        steps = self.config.noise_steps
        # the product may fall short of a whole number by its rounding
        return 1 - int((1 - t) * steps + 1e-6) / steps if self.config.whole_steps else t

    def _run_denoises(self, works: Sequence[Denoise]) -> list[list[Tensor]]:
        alike: dict[tuple[Grid, int], list[tuple[int, int]]] = {}
        for i, w in enumerate(works):
            for k in range(len(w.conditions)):
                alike.setdefault((w.grid, len(w.references[k]) if w.references else 0), []).append((i, k))
        out: dict[tuple[int, int], Tensor] = {}
        for (grid, shown), rows in alike.items():
            conditions, visible = padded([works[i].conditions[k] for i, k in rows])
            x = torch.stack([works[i].x for i, _ in rows])
            t = torch.tensor([self.level(works[i].t) for i, _ in rows], device=x.device)
            given = torch.stack([torch.cat([r for r, _ in works[i].references[k]]) for i, k in rows]) if shown else None
            out |= zip(rows, self.velocity(x, t, conditions, grid, visible, given).float(), strict=True)
        return [[out[i, k] for k in range(len(w.conditions))] for i, w in enumerate(works)]


def _read_by(tokens: Tokens, cell: int) -> Tensor:
    """Flat places of what an opening at the flat place `cell` sees: what its document kept before it, and itself."""
    row, place = divmod(cell, tokens.shape[1])
    own = (tokens.document[row] == tokens.document[row, place]) & (tokens.mode[row] != Mode.NOISE)
    own = own & (tokens.index[row] < tokens.index[row, place])
    own[place] = True
    return row * tokens.shape[1] + torch.nonzero(own).squeeze(1)
