"""What systems share that draw codec latents by flow inside the packed sequence: a picture to draw is a noised copy
that nothing else sees, and its clean copy stands before its features wherever something is drawn later.

    L = w_text CE(text) / n_text + w_image ||v(x_t, t) - (data - noise)||^2 / (n_noised d)

Beside what `systems.packed` asks for, a system provides `latent_tokens` (inputs), `latent_out` (velocities) and a
`codec`.
"""
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diptych.document import Document
from diptych.objectives import flow, next_token
from diptych.parts.deep_codec import DeepCodecConfig
from diptych.parts.interleave import GENERATE, IGNORE, UNDERSTAND, Marks, Page, Writer
from diptych.parts.tokens import Modality, Tokens
from diptych.parts.vae import AutoEncoderConfig, LatentCodec
from diptych.parts.vision import VisionConfig
from diptych.systems import flows
from diptych.systems.base import Emit, Losses, Sampling, StepLogProbs, Work
from diptych.systems.packed import Batch, Packed
from diptych.systems.works import Develop, Encode, Grid, Look, Read, Reader

__all__ = ["Batch", "Develop", "Encode", "Grid", "Interleaved", "Look", "Read", "Reader"]


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """What the configs of systems share that read features of a tower and draw latents of a codec."""

    vocabulary_size: int
    tie_embeddings: bool = False
    tokenizer: str = ""  # a tokenizer.json, zoo/NAME, or a file of the model's folder
    marks: Marks | None = None  # ids of start, end, image start, image end; None = from the tokenizer
    vision: VisionConfig
    feature_merge: int = 1  # n x n neighbouring features become one token
    codec: AutoEncoderConfig | DeepCodecConfig
    latent_patch: int = 2
    latent_table_side: int = 64  # rows and columns of the position table of latent tokens
    picture: tuple[int, int] = (1024, 1024)  # drawn when nothing says otherwise
    time_shift: float = 1.0  # training
    noise_steps: int = 0  # training: times are uniform on a grid of so many; 0: logit-normal
    text_weight: float = 1.0
    image_weight: float = 1.0
    drop_text: float = 0.1  # condition dropping for guidance
    drop_latent: float = 0.1
    drop_feature: float = 0.1
    noised_copies: int = 1  # of each picture to draw in training; they share what they are conditioned on
    row: int = 256  # tokens of a packed row at least (longer documents make longer rows)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if min(self.latent_table_side, self.feature_merge, self.noised_copies) < 1:
            raise ValueError("expected latent_table_side, feature_merge and noised_copies of at least 1")


class Expected(NamedTuple):
    """What a training step expects at the end of the flow: latent tokens (n, d) of a noised copy, one step of the
    predicted velocity away from its time; the grid; and which picture of the batch it is a copy of."""

    latents: Tensor
    grid: Grid
    picture: int
    time: float


class Interleaved(Packed):
    copies = True
    expecting: list[Expected] | None = None  # see `expect`
    noised_copies = 1  # of each drawn picture in training, every one at a time and with a noise of its own
    latent_out: nn.Linear
    codec: LatentCodec
    latent_patch: int
    token_width: int  # of a latent token
    registers = 0  # learnt tokens beside the latents of every noised copy

    def latent_tokens(self, x: Tensor, t: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Latent tokens x (n, d) at times t (n,) of pictures with these grids -> (n, width). Provided by the system."""
        raise TypeError("abstract")

    # -- pictures as latents ------------------------------------------------------------------------------------------

    def encode(self, pictures: list[Tensor]) -> list[Tensor]:
        """Pictures for the codec -> latent tokens (n_i, d) each."""
        return self.codec.tokens(pictures, self.latent_patch)

    def decode(self, x: Tensor, grid: Grid) -> Tensor:
        """Latent tokens (b, n, d) of one grid -> pixels (b, 3, h, w), clamped."""
        return self.codec.from_tokens(x, self.latent_patch, grid)

    def write_drawn(self, w: Writer, number: int, grid: Grid) -> None:
        for _ in range(self.noised_copies):
            self.write_noised(w, number, grid)

    def write_noised(self, w: Writer, number: int, grid: Grid) -> None:
        w.latent(number, grid[0] * grid[1], noised=True, queries=self.registers)

    def write_copy(self, w: Writer, number: int, grid: Grid) -> None:
        w.latent(number, grid[0] * grid[1], noised=False)

    def given(self, works: Sequence[Read]) -> Tensor | None:
        latents = [part for w in works for part in w.latents]
        if not latents:
            return None
        x = torch.cat([p for p, _ in latents])
        return self.latent_tokens(x, torch.ones(len(x), device=x.device), [g for _, g in latents])

    def timed(self, tokens: Tokens, times: Tensor) -> Tokens:
        """With the times (n,) of all tokens of the codec's route, in order: what modulated blocks read."""
        time = tokens.time.flatten().index_copy(0, tokens.routes(2)[GENERATE], times.to(tokens.time.dtype))
        return dataclasses.replace(tokens, time=time.view(tokens.shape))

    def of_kind(self, hidden: Sequence[Tensor], tokens: Tokens, kind: Modality) -> Tensor:
        """The states of one kind of tokens of the codec's route: latents, or what stands beside them."""
        return hidden[GENERATE][tokens.modality.flatten()[tokens.routes(2)[GENERATE]] == kind]

    # -- training -----------------------------------------------------------------------------------------------------

    def further(self, batch: Batch, hidden: Sequence[Tensor]) -> dict[str, tuple[float, Tensor]]:
        """More loss terms: weight, and the errors (n,) of the tokens that count."""
        return {}

    @contextmanager
    def expect(self) -> Iterator[list[Expected]]:
        """Inside, every `loss` adds what it expects of all noised copies to the list."""
        if self.expecting is not None:
            raise ValueError("expected one list of expectations at a time, got one inside another; fix: in turns")
        self.expecting = []
        try:
            yield self.expecting
        finally:
            self.expecting = None

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        c, page = self.config, batch.page
        device, tokens = page.ids.device, page.tokens
        features = self.see(batch.views) if batch.views else None
        data = noise = torch.zeros(0, self.token_width, device=device)
        codes: list[Tensor] = []
        noised, inputs = torch.zeros(0, dtype=torch.bool, device=device), None
        if batch.latents:
            codes = self.encode(batch.pictures)
            sizes = torch.tensor([len(codes[i]) for i, _ in batch.latents], device=device)
            data = torch.cat([codes[i] for i, _ in batch.latents]).float()
            noise = torch.randn(data.shape, generator=generator, device=device)
            flags = torch.tensor([n for _, n in batch.latents], device=device)
            times = flow.sample_time(len(flags), generator, shift=c.time_shift, steps=c.noise_steps)
            times = times.masked_fill(~flags, 1.0)
            t = times.repeat_interleave(sizes)
            noised = flags.repeat_interleave(sizes)
            grids = [self.grid(batch.pictures[i]) for i, _ in batch.latents]
            inputs = self.latent_tokens(flow.interpolate(data, noise, t[:, None]), t, grids)
            tokens = self.timed(tokens, times.repeat_interleave(sizes + self.registers * flags))
        hidden = self.trunk(self.states(page, features, inputs), tokens, self.mask)

        labels = page.labels.flatten()[tokens.routes(2)[UNDERSTAND]]
        rows = torch.nonzero(labels != IGNORE).squeeze(1)
        weights = {"text": c.text_weight, "image": c.image_weight}
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        if len(rows):
            sums["text"] = next_token.cross_entropy(self.head(hidden[UNDERSTAND][rows]), labels[rows]).sum()
            counts["text"] = torch.tensor(float(len(rows)), device=device)
        if bool(noised.any()):
            drawn = self.of_kind(hidden, tokens, Modality.LATENT)[noised]
            velocity = self.latent_out(drawn)
            error = flow.squared_error(velocity, data[noised], noise[noised])
            own = [(i, len(codes[i])) for i, n in batch.latents if n]
            if self.expecting is not None:
                now = flow.interpolate(data[noised], noise[noised], t[noised, None])
                ends = (now + (1 - t[noised, None]) * velocity).split([count for _, count in own])
                self.expecting += [Expected(x, self.grid(batch.pictures[i]), i, time) for x, (i, _), time in zip(
                    ends, own, times[flags].tolist(), strict=True)]
            sums["image"], counts["image"] = batch.emphasised(error, own).sum(), noised.sum().float()
        for name, (weight, errors) in self.further(batch, hidden).items():
            weights[name] = weight
            sums[name], counts[name] = errors.sum(), torch.tensor(float(len(errors)), device=device)
        return Losses(sums, counts, weights)

    def score(self, documents: Sequence[Document]) -> StepLogProbs:
        """Log-probs of the text targets' tokens (closing mark included), document by document."""
        values: list[Tensor] = []
        for document in documents:
            w, pictures, views = self.write(document)
            page = Page.of([[w]]).to(self.device)
            tokens, latents = page.tokens, None
            if w.latents:  # what a noised copy holds does not matter here: no text sees it
                codes = self.encode([p.to(self.device) for p in pictures])
                x = torch.cat([codes[i] for i, _ in w.latents])
                grids = [self.grid(pictures[i]) for i, _ in w.latents]
                latents = self.latent_tokens(x, torch.ones(len(x), device=x.device), grids)
                tokens = self.timed(tokens, torch.ones(len(tokens.routes(2)[GENERATE]), device=x.device))
            features = self.see([v.to(self.device) for v in views]) if views else None
            hidden = self.trunk(self.states(page, features, latents), tokens, self.mask)[UNDERSTAND]
            labels = page.labels.flatten()[tokens.routes(2)[UNDERSTAND]]
            rows = labels != IGNORE
            logits = self.head(hidden[rows]).float().log_softmax(-1)
            values.append(logits.gather(1, labels[rows][:, None])[:, 0])
        return StepLogProbs(values, [["text"] * len(v) for v in values])

    # -- drawing ------------------------------------------------------------------------------------------------------

    def _look_at(self, reader: Reader, pixels: Tensor, x: Tensor | None, grid: Grid | None,
                 copy: bool) -> Generator[Work, Any, None]:
        """Read a clean picture: its latents if something is drawn later, then its features."""
        seen, coded = self.views(pixels)
        w = self.writer(reader)
        latents: list[tuple[Tensor, Grid]] = []
        if copy:
            known = (x, grid) if x is not None and grid is not None else ((yield Encode(coded)), self.grid(coded))
            latents.append(known)
            w.latent(0, len(known[0]), noised=False)
        w.feature(0, self.feature_count(seen))
        yield Read(reader, w, [seen], latents)

    def paint(self, grid: Grid, contexts: dict[str, Reader], sampling: Sampling, generator: torch.Generator, index: int,
              emit: Emit, more: bool) -> Generator[Work, Any, Tensor]:
        x = torch.randn(grid[0] * grid[1], self.token_width, generator=generator).to(self.device)
        return (yield from self.denoise(x, grid, contexts, sampling, generator, index, emit))

    def denoise(self, x: Tensor, grid: Grid, contexts: dict[str, Reader], sampling: Sampling,
                generator: torch.Generator, index: int, emit: Emit) -> Generator[Work, Any, Tensor]:
        def ask(names: list[str], x: Tensor, t: float) -> Work:
            return Look([contexts[n] for n in names], x, t, grid)

        return (yield from flows.denoise(x, grid, ask, sampling, generator, index, emit))

    def runners(self, commits: list[Callable[[], None]]) -> dict[str, Callable[[Sequence[Any]], Sequence[Any]]]:
        return super().runners(commits) | {"look": self._run_looks}

    def _run_looks(self, works: Sequence[Any]) -> list[list[Tensor]]:
        readers = [r for w in works for r in w.readers]
        writers = []
        for w in works:
            for reader in w.readers:
                writers.append(self.writer(reader))
                self.write_noised(writers[-1], 0, w.grid)
        page = Page.of([[w] for w in writers], start=[r.context.length for r in readers]).to(self.device)
        x = torch.cat([w.x for w in works for _ in w.readers])
        t = torch.cat([torch.full((len(w.x),), w.t, device=x.device) for w in works for _ in w.readers])
        latents = self.latent_tokens(x, t, [w.grid for w in works for _ in w.readers])
        times = [torch.full((len(w.x) + self.registers,), w.t, device=x.device) for w in works for _ in w.readers]
        tokens = self.timed(page.tokens, torch.cat(times))
        run = self.trunk.start([r.context for r in readers], tokens, self.embed.weight.dtype)  # never committed
        hidden = self.trunk(self.states(page, None, latents), tokens, self.mask, run)
        drawn = self.of_kind(hidden, tokens, Modality.LATENT)
        parts = iter(self.latent_out(drawn).float().split([len(w.x) for w in works for _ in w.readers]))
        return [[next(parts) for _ in w.readers] for w in works]
