"""What systems share that interleave texts, semantic features and codec latents in one packed sequence: documents to
batches, and the state machine that fills a document. The network itself is the subclass's.

A subclass provides `views`, `feature_count`, `marks` and `stride` (how pieces become tokens), the inputs of the trunk
(`embed`, `see`, `latent_tokens`), its outputs (`head`, `latent_out`), a `codec`, and a `trunk` with its `mask`.
"""
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from diptych.data.pack import pack
from diptych.document import Boxes, Document, Image, Piece, Text
from diptych.objectives import flow, next_token
from diptych.parts.interleave import IGNORE, Marks, Page, Writer
from diptych.parts.masks import Predicate, interleaved
from diptych.parts.pictures import stack_by_size
from diptych.parts.tokens import Modality
from diptych.parts.trunks import Trunk
from diptych.parts.vae import AutoEncoder
from diptych.parts.vision import patchify, unpatchify
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.base import Emit, Event, Program, Sampling, System, Work
from diptych.systems.works import Develop, Encode, Grid, Look, Read, Reader, kind_of

PARTIAL_CHARACTER = "\ufffd"  # what the bytes of an unfinished character decode to


@dataclass
class Batch:
    """A page of tokens with the pictures it refers to."""

    page: Page
    pictures: list[Tensor]  # for the codec, (3, h, w)
    views: list[Tensor]  # for the tower, (3, h, w), one per feature segment in page order
    latents: list[tuple[int, bool]]  # (picture number, noised), one per latent segment in page order

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.page.to(device), [p.to(device) for p in self.pictures],
                     [v.to(device) for v in self.views], self.latents)

    @property
    def counts(self) -> dict[str, float]:
        """Tokens of each loss term: lets a step of several batches reduce exactly without counting first."""
        tokens = self.page.tokens
        found = {"text": int((self.page.labels != IGNORE).sum()),
                 "image": int(((tokens.modality == Modality.LATENT) & tokens.target).sum())}
        return {name: float(count) for name, count in found.items() if count}

    @property
    def num_tokens(self) -> int:
        return int(self.page.tokens.valid().sum())


class Interleaved(System):
    trunk: Trunk
    mask: Predicate = interleaved
    vocabulary: Vocabulary | None
    embed: nn.Embedding
    head: nn.Linear
    latent_out: nn.Linear
    codec: AutoEncoder

    # -- provided by the subclass -------------------------------------------------------------------------------------

    marks: Marks
    stride: int  # pixels per latent token and side
    latent_patch: int
    token_width: int  # of a latent token

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """One picture (3, h, w) as the tower and as the codec want it."""
        raise TypeError("abstract")

    def feature_count(self, view: Tensor) -> int:
        raise TypeError("abstract")

    def see(self, views: Sequence[Tensor]) -> Tensor:
        """Pictures -> feature tokens (n, width) in order, positions added."""
        raise TypeError("abstract")

    def latent_tokens(self, x: Tensor, t: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Latent tokens x (n, d) at times t (n,) of pictures with these grids -> (n, width)."""
        raise TypeError("abstract")

    # -- documents to batches -----------------------------------------------------------------------------------------

    def spell(self, piece: Piece) -> list[int]:
        """A piece that is written as text -> ids, marks not included."""
        self.check_spelt(piece)
        if piece.empty:
            raise ValueError(f"expected {piece.kind} with content, got an empty piece; "
                             "fix: fill it, or make it a target")
        v = self.need_vocabulary()
        return v.encode_boxes(piece) if isinstance(piece, Boxes) else v.encode(getattr(piece, "text", ""))

    def check_spelt(self, piece: Piece) -> None:
        if not isinstance(piece, Text | Boxes):
            raise ValueError(f"expected text, boxes or images for {type(self).__name__}, got {piece.kind}; "
                             "fix: leave that piece out, or choose a system that takes it")

    def need_vocabulary(self) -> Vocabulary:
        if self.vocabulary is None:
            raise ValueError("expected a tokenizer to read text, got none; "
                             "fix: set config.tokenizer or pass vocabulary=")
        return self.vocabulary

    def grid(self, picture: Tensor) -> Grid:
        return picture.shape[-2] // self.stride, picture.shape[-1] // self.stride

    def write(self, document: Document, drop: tuple[bool, bool, bool] = (False, False, False)
              ) -> tuple[Writer, list[Tensor], list[Tensor]]:
        """A whole document with its targets -> writer, pictures for the codec, views for the tower.

        `drop` leaves out (texts, clean latents, features). A given picture gets a clean latent copy only if something
        is drawn later; a drawn one gets its clean copies only if another target follows.
        """
        w, pictures, views = Writer(self.marks), [], []
        last_target = max((i for i, p in enumerate(document) if p.target), default=-1)
        for i, piece in enumerate(document):
            if not isinstance(piece, Image):
                if not drop[0]:
                    w.text(self.spell(piece), target=piece.target)
                continue
            if piece.pixels is None:
                raise ValueError(f"expected pixels in every image of a training document, got none in piece {i}; "
                                 "fix: fill the picture, or use generate")
            seen, coded = self.views(torch.from_numpy(piece.pixels))
            rows, columns = self.grid(coded)
            if piece.target:
                w.latent(len(pictures), rows * columns, noised=True)
                pictures.append(coded)
                if i >= last_target:
                    continue
            if self._drawn_after(document, i):
                if drop[1]:
                    w.skip()
                else:
                    if not piece.target:
                        pictures.append(coded)
                    w.latent(len(pictures) - 1, rows * columns, noised=False)
            if drop[2]:
                w.skip()
            else:
                w.feature(len(views), self.feature_count(seen))
                views.append(seen)
        return w, pictures, views

    @staticmethod
    def _drawn_after(document: Document, index: int) -> bool:
        return any(p.target and isinstance(p, Image) for p in document.pieces[index + 1:])

    def collate(self, documents: Sequence[Document]) -> Batch:
        written = [self.write(d, self._drops(d)) for d in documents]
        lengths = [w.strip.length for w, _, _ in written]
        bins = pack(lengths, max([self.config.row, *lengths]))  # a document longer than a row makes longer rows
        pictures: list[Tensor] = []
        views: list[Tensor] = []
        latents: list[tuple[int, bool]] = []
        for n in (n for row in bins for n in row):
            w, own, seen = written[n]
            latents += [(len(pictures) + i, noised) for i, noised in w.latents]
            pictures += own
            views += seen
        return Batch(Page.of([[written[n][0] for n in row] for row in bins]), pictures, views, latents)

    def _drops(self, document: Document) -> tuple[bool, bool, bool]:
        """Which conditions a training document loses: a pure function of the document, so that runs resume exactly.
        Only where the one picture to draw comes last; no text target loses the pictures it depends on."""
        c = self.config
        drawn = [i for i, p in enumerate(document) if p.target and isinstance(p, Image)]
        if drawn != [len(document) - 1]:
            return False, False, False
        meta = document.meta
        facts = (document.task, meta.get("split"), meta.get("index"), [p.text for p in document.of(Text)],
                 *((meta["epoch"], meta.get("file")) if "epoch" in meta else ()))
        key = zlib.crc32(repr(facts).encode())
        u = [(key >> s & 1023) / 1024 for s in (0, 10, 20)]
        given = len(document.of(Image)) > 1 and len(document.targets) == 1
        return u[0] < c.drop_text, given and u[1] < c.drop_latent, given and u[2] < c.drop_feature

    # -- network input ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, pictures: list[Tensor]) -> list[Tensor]:
        """Pictures for the codec -> latent tokens (n_i, d) each: patches of the mean, (row, column, channel) inside."""
        out: dict[int, Tensor] = {}
        for numbers, batch in stack_by_size(pictures):
            out |= zip(numbers, patchify(self.codec.latent(batch).float(), self.latent_patch), strict=True)
        return [out[i] for i in range(len(pictures))]

    @torch.no_grad()
    def decode(self, x: Tensor, grid: Grid) -> Tensor:
        """Latent tokens (b, n, d) of one grid -> pixels (b, 3, h, w), clamped."""
        return self.codec.decode(unpatchify(x, self.latent_patch, grid)).float().clamp(-1, 1)

    def states(self, page: Page, features: Tensor | None, latents: Tensor | None) -> list[Tensor]:
        """Embeddings by route: texts and features in order; latents in order."""
        understand, generate = page.tokens.routes(2)
        words = self.embed(page.ids.flatten()[understand])
        if features is not None:
            at = torch.nonzero(page.tokens.modality.flatten()[understand] == Modality.FEATURE).squeeze(1)
            words = words.index_copy(0, at, features.to(words.dtype))
        if latents is None:
            return [words, words.new_zeros(len(generate), words.shape[1])]
        return [words, latents.to(words.dtype)]

    # -- filling a document -------------------------------------------------------------------------------------------

    def writer(self, reader: Reader) -> Writer:
        return Writer(self.marks, reader.position, reader.segment)

    def program(self, document: Document, sampling: Sampling, generator: torch.Generator, emit: Emit) -> Program:
        """Contexts: `full` reads everything; `no_text` stops before the last text and the boxes that belong to it;
        `no_image` reads texts only."""
        full, no_text, no_image = Reader(), Reader(), Reader()
        pieces = list(document)
        last_target = max((i for i, p in enumerate(document) if p.target), default=-1)
        for i, piece in enumerate(document):
            more = i < last_target
            if isinstance(piece, Image) and piece.target:
                contexts = {"full": full, "no_text": no_text, "no_image": no_image}
                x, grid, pixels = yield from self._draw(piece, i, contexts, sampling, generator, emit)
                pieces[i] = piece.replace(pixels=pixels.cpu().numpy())
                if more:
                    yield from self._look_at(full, pixels, x, grid, self._drawn_after(document, i))
                    no_text = full.fork()
            elif isinstance(piece, Image):
                if piece.pixels is None:
                    raise ValueError(f"expected pixels in the given image (piece {i}), got none; fix: make it a target")
                seen = torch.from_numpy(piece.pixels).to(self.device)
                yield from self._look_at(full, seen, None, None, self._drawn_after(document, i))
                no_text = full.fork()
            elif piece.target:
                self.check_spelt(piece)
                ids = yield from self._say(full, i, sampling, generator, emit, more)
                pieces[i] = self._spelt(piece, ids)
            else:
                ids = self.spell(piece)
                if isinstance(piece, Text):
                    no_text = full.fork()
                for reader in (full, no_image):
                    w = self.writer(reader)
                    w.text(ids)
                    yield Read(reader, w)
        return Document(tuple(pieces), document.task, document.meta)

    def _spelt(self, piece: Piece, ids: list[int]) -> Piece:
        v = self.need_vocabulary()
        return v.decode_boxes(ids, piece) if isinstance(piece, Boxes) else piece.replace(text=v.decode(ids))

    def _look_at(self, reader: Reader, pixels: Tensor, x: Tensor | None, grid: Grid | None,
                 latent: bool) -> Generator[Work, Any, None]:
        """Read a clean picture: its latents if something is drawn later, then its features."""
        seen, coded = self.views(pixels)
        w = self.writer(reader)
        latents: list[tuple[Tensor, Grid]] = []
        if latent:
            known = (x, grid) if x is not None and grid is not None else ((yield Encode(coded)), self.grid(coded))
            latents.append(known)
            w.latent(0, len(known[0]), noised=False)
        w.feature(0, self.feature_count(seen))
        yield Read(reader, w, [seen], latents)

    def _say(self, reader: Reader, index: int, sampling: Sampling, generator: torch.Generator, emit: Emit,
             more: bool) -> Generator[Work, Any, list[int]]:
        """Decode a text span; its last token and the closing mark are read only if more follows."""
        ids: list[int] = []
        shown = ""
        w = self.writer(reader)
        w.text([], close=False)
        for _ in range(sampling.text.max_tokens):
            logits = yield Read(reader, w, predict=True)
            token, _ = next_token.draw(logits, sampling.text, generator)
            w = self.writer(reader)
            if token == self.marks.end:
                break
            ids.append(token)
            w.text([token], open=False, close=False)
            text = self.vocabulary.decode(ids) if self.vocabulary is not None else ""
            if text.startswith(shown) and text != shown and not text.endswith(PARTIAL_CHARACTER):
                emit(Event("text", index, text[len(shown):]))
                shown = text
        if more:
            w.text([], open=False)
            yield Read(reader, w)
        return ids

    def _draw(self, piece: Image, index: int, contexts: dict[str, Reader], sampling: Sampling,
              generator: torch.Generator, emit: Emit) -> Generator[Work, Any, tuple[Tensor, Grid, Tensor]]:
        height, width = piece.size or sampling.size or self.config.picture
        if height % self.stride or width % self.stride or min(height, width) < self.stride:
            raise ValueError(f"expected a picture size in multiples of {self.stride}, got {height} x {width}; "
                             "fix: set the size of the image or of the sampling")
        grid = (height // self.stride, width // self.stride)
        x = torch.randn(grid[0] * grid[1], self.token_width, generator=generator).to(self.device)
        x = yield from self.denoise(x, grid, contexts, sampling, generator, index, emit)
        pixels = yield Develop(x, grid)
        emit(Event("picture", index, pixels))
        return x, grid, pixels

    def denoise(self, x: Tensor, grid: Grid, contexts: dict[str, Reader], sampling: Sampling,
                generator: torch.Generator, index: int, emit: Emit) -> Generator[Work, Any, Tensor]:
        """From noise x (n, d) to data: ODE steps, or with `sampling.stochastic` SDE steps (the last one plain)."""
        unknown = sorted({b.context for b in sampling.guidance.branches} - set(contexts))
        if unknown:
            known = ", ".join(c for c in contexts if c != "full")
            raise ValueError(f"expected guidance branches out of {known}, got {unknown[0]!r}")
        times = flow.schedule(sampling.evaluations, sampling.shift)
        for step, (t, to) in enumerate(pairwise(times)):
            names = list(dict.fromkeys(["full", *(b.context for b in sampling.guidance.active(t))]))
            answers = yield Look([contexts[n] for n in names], x, t, grid)
            v = sampling.guidance.combine(answers[0], dict(zip(names, answers, strict=True)), t)
            if sampling.partial and step % sampling.partial == 0 and to < 1:
                emit(Event("partial", index, (yield Develop(x + (1 - t) * v, grid))))
            if sampling.stochastic > 0 and to < 1:
                x = flow.sde_step(x, v, t, to, sampling.stochastic, times[1]).sample(generator)
            else:
                x = flow.euler_step(x, v, t, to)
        return x

    # -- running work together ----------------------------------------------------------------------------------------

    def run(self, works: Sequence[Work]) -> list[Any]:
        answers: dict[int, Any] = {}
        commits: list[Callable[[], None]] = []  # contexts grow once all has worked: a failed batch can be repeated
        reads = partial(self._run_reads, commits=commits)
        runners = {"prefill": reads, "decode": reads, "look": self._run_looks, "encode": self._run_encodes,
                   "develop": self._run_develops}
        kinds = [kind_of(w) for w in works]
        for kind, runner in runners.items():
            numbers = [i for i, k in enumerate(kinds) if k == kind]
            if numbers:
                answers |= zip(numbers, runner([works[i] for i in numbers]), strict=True)
        for commit in commits:
            commit()
        return [answers[i] for i in range(len(works))]

    def _run_reads(self, works: Sequence[Any], commits: list[Callable[[], None]]) -> list[Tensor | None]:
        readers = [w.reader for w in works]
        start = [r.context.length for r in readers]
        page = Page.of([[w.writer] for w in works], start=start).to(self.device)
        views = [v.to(self.device) for w in works for v in w.views]
        latents = [part for w in works for part in w.latents]
        clean = None
        if latents:
            x = torch.cat([p for p, _ in latents])
            clean = self.latent_tokens(x, torch.ones(len(x), device=x.device), [g for _, g in latents])
        run = self.trunk.start([r.context for r in readers], page.tokens, self.embed.weight.dtype)
        states = self.states(page, self.see(views) if views else None, clean)
        hidden = self.trunk(states, page.tokens, self.mask, run)[0]

        def commit() -> None:
            run.commit([w.writer.strip.length for w in works])
            for reader, work in zip(readers, works, strict=True):
                reader.position, reader.segment = work.writer.position, work.writer.segment

        commits.append(commit)
        ends, at = [], -1  # the last token of every row among the tokens of route 0: always a mark or a word
        for b in range(len(works)):
            at += int((page.tokens.route[b] == 0).sum())
            ends.append(at)
        wanted = [b for b, w in enumerate(works) if w.predict]
        logits = iter(self.head(hidden[[ends[b] for b in wanted]]).float()) if wanted else iter(())
        return [next(logits) if w.predict else None for w in works]

    def _run_looks(self, works: Sequence[Any]) -> list[list[Tensor]]:
        readers = [r for w in works for r in w.readers]
        writers = []
        for w in works:
            for reader in w.readers:
                writer = self.writer(reader)
                writer.latent(0, len(w.x), noised=True)
                writers.append(writer)
        page = Page.of([[w] for w in writers], start=[r.context.length for r in readers]).to(self.device)
        x = torch.cat([w.x for w in works for _ in w.readers])
        t = torch.cat([torch.full((len(w.x),), w.t, device=x.device) for w in works for _ in w.readers])
        tokens = self.latent_tokens(x, t, [w.grid for w in works for _ in w.readers])
        run = self.trunk.start([r.context for r in readers], page.tokens, self.embed.weight.dtype)  # never committed
        drawn = self.trunk(self.states(page, None, tokens), page.tokens, self.mask, run)[1]
        parts = iter(self.latent_out(drawn).float().split([len(w.x) for w in works for _ in w.readers]))
        return [[next(parts) for _ in w.readers] for w in works]

    def _run_encodes(self, works: Sequence[Any]) -> list[Tensor]:
        return self.encode([w.pixels.to(self.device) for w in works])

    def _run_develops(self, works: Sequence[Any]) -> list[Tensor]:
        out: dict[int, Tensor] = {}
        for shape in {(w.x.shape, w.grid) for w in works}:
            numbers = [i for i, w in enumerate(works) if (w.x.shape, w.grid) == shape]
            out |= zip(numbers, self.decode(torch.stack([works[i].x for i in numbers]), shape[1]), strict=True)
        return [out[i] for i in range(len(works))]
