"""What systems share that put whole documents into one packed sequence of texts and pictures: documents to batches, and
the state machine that fills a document. How a picture is predicted is told by `systems.interleaved` (latents by flow)
and `systems.coded` (discrete codes); the network itself is the system's.

A system provides `views`, `feature_count`, `marks` and `stride` (how pieces become tokens), the inputs of the trunk
(`embed`, `see`), its `head`, and a `trunk` with its `mask`.
"""
from collections.abc import Callable, Generator, Sequence
from functools import cached_property, partial
from pathlib import Path
from shutil import copyfile
from typing import Any, Self

import torch
from torch import Tensor, nn

from diptych.data.pack import pack_rows
from diptych.document import Boxes, Document, Image, Piece, Text
from diptych.parts.cache import Run
from diptych.parts.interleave import Frame, Layout, Marks, Page, Writer
from diptych.parts.masks import Predicate, interleaved
from diptych.parts.tokens import Modality
from diptych.parts.trunks import Trunk, pick
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.base import Emit, Event, Program, Sampling, System, Work
from diptych.systems.batch import Batch, dropped, emphasise
from diptych.systems.decoding import Decoding, say
from diptych.systems.works import Develop, Grid, Read, Reader, Step, Together, developed, kind_of, parts_of, told


class Packed(System):
    trunk: Trunk
    mask: Predicate = interleaved
    layout = Layout()
    copies = False  # whether a clean copy in the codec's tokens precedes the features of a picture to draw from
    draws = True  # False: pictures are read only
    negatives = True  # whether guidance can read a negative prompt in place of a text
    int8 = False  # whether single tokens are decoded by copies of the matrices in int8 (on a CPU)
    vocabulary: Vocabulary | None
    embed: nn.Embedding
    head: nn.Linear

    # -- provided by the system ---------------------------------------------------------------------------------------

    @cached_property
    def marks(self) -> Marks:
        stated: Marks | None = getattr(self.config, "marks", None)
        return stated.known(self.vocabulary) if stated else Marks.of(self.need_vocabulary())

    stride: int  # pixels per token of a drawn picture and side

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """One picture (3, h, w) as the tower and as the codec want it."""
        raise TypeError("abstract")

    def feature_count(self, view: Tensor) -> int:
        raise TypeError("abstract")

    def see(self, views: Sequence[Tensor]) -> Tensor:
        """Pictures -> feature tokens (n, width) in order, positions added."""
        raise TypeError("abstract")

    # -- provided by what is drawn ------------------------------------------------------------------------------------

    def encode(self, pictures: list[Tensor]) -> list[Tensor]:
        """Pictures for the codec -> its tokens of each, (n_i, ...)."""
        raise TypeError("abstract")

    def decode(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (b, n, ...) of one grid -> pixels (b, 3, h, w), clamped."""
        raise TypeError("abstract")

    def write_drawn(self, w: Writer, number: int, grid: Grid) -> None:
        """Write picture `number` as it is predicted."""
        raise TypeError("abstract")

    def write_copy(self, w: Writer, number: int, grid: Grid) -> None:
        """Write the clean copy of picture `number` (only with `copies`)."""
        raise TypeError("abstract")

    def given(self, works: Sequence[Read]) -> Tensor | None:
        """States (n, width) of the codec's tokens that these works read."""
        raise TypeError("abstract")

    def answer(self, hidden: Tensor) -> Tensor:
        """What a program is told of the hidden states (m, width) that predict codes."""
        raise TypeError("abstract")

    def paint(self, grid: Grid, contexts: dict[str, Reader], sampling: Sampling, generator: torch.Generator, index: int,
              emit: Emit, more: bool) -> Generator[Work, Any, Tensor]:
        """Draw the codec's tokens (n, ...) of one picture; `more` tells whether anything will read on."""
        raise TypeError("abstract")

    def drop_rates(self) -> tuple[float, float, float]:
        """How often training leaves out (texts, clean copies, features)."""
        return self.config.drop_text, self.config.drop_latent, self.config.drop_feature

    def write_null(self, w: Writer, ids: list[int]) -> None:
        """What stands where these tokens of a text are left out: nothing, unless the system writes something."""

    def frame(self, before: Piece | None, piece: Piece) -> Frame:
        """How a piece is introduced and closed; chat templates say something here."""
        text = not isinstance(piece, Image)
        return Frame(open=text, close=text)

    def frame_at(self, pieces: Sequence[Piece], i: int) -> Frame:
        """The frame of piece i of a document; task tokens depend on what follows and are found here."""
        return self.frame(pieces[i - 1] if i else None, pieces[i])

    def write_seen(self, w: Writer, seen: Tensor, coded: Tensor, pictures: list[Tensor], views: list[Tensor]) -> None:
        """Write a picture that is read, one of the two forms that `views` gives; it joins `views` or `pictures`."""
        w.feature(len(views), self.feature_count(seen))
        views.append(seen)

    @classmethod
    def read_vocabulary(cls, config: Any, source: str | Path) -> Vocabulary:
        return Vocabulary(source)

    @classmethod
    def from_folder(cls, config: Any, folder: Path) -> Self:
        own = folder / "tokenizer.json"
        return cls(config, cls.read_vocabulary(config, own) if own.is_file() else None)  # type: ignore[call-arg]

    def save_files(self, folder: Path) -> None:
        if self.vocabulary is not None:
            copyfile(self.vocabulary.path, folder / "tokenizer.json")

    # -- documents to batches -----------------------------------------------------------------------------------------

    def spell(self, piece: Piece, gap: str = "") -> list[int]:
        """A piece that is written as text, behind a gap -> ids, marks not included."""
        self.check_spelt(piece)
        if piece.empty:
            raise ValueError(f"expected {piece.kind} with content, got an empty piece; "
                             "fix: fill it, or make it a target")
        v = self.need_vocabulary()
        return v.encode_boxes(piece) if isinstance(piece, Boxes) else v.encode(gap + getattr(piece, "text", ""))

    def check_spelt(self, piece: Piece) -> None:
        if not isinstance(piece, Text | Boxes):
            raise ValueError(f"expected text, boxes or images for {type(self).__name__}, got {piece.kind}; "
                             "fix: leave that piece out, or choose a system that takes it")

    def need_vocabulary(self) -> Vocabulary:
        if self.vocabulary is None:
            raise ValueError("expected a tokenizer to read text, got none; "
                             "fix: put its tokenizer.json into the model's folder, or set config.tokenizer")
        return self.vocabulary

    def grid(self, picture: Tensor) -> Grid:
        return picture.shape[-2] // self.stride, picture.shape[-1] // self.stride

    def write(self, document: Document, drop: tuple[bool, bool, bool] = (False, False, False),
              clean: int | None = None) -> tuple[Writer, list[Tensor], list[Tensor]]:
        """A whole document with its targets -> writer, pictures for the codec, views for the tower.

        `drop` leaves out (texts, clean copies, features). A given picture gets a clean copy only if something is drawn
        later; a drawn one is read back only if another target follows. `clean`: only what precedes this piece, none of
        it as a target.
        """
        start = self.reader(document)
        w, pictures, views = self.writer(start), [], []
        last_target = max((i for i, p in enumerate(document) if p.target), default=-1)
        for i, piece in enumerate(document.pieces[:clean]):
            piece = piece if clean is None else piece.replace(target=False)
            text = not isinstance(piece, Image)
            frame = self.frame_at(document.pieces, i)
            if text or frame.lead:
                told = self.writer(start) if drop[0] else w
                told.text(self.spell(piece, frame.gap) if text else [], frame=frame, target=text and piece.target)
                if drop[0]:
                    self.write_null(w, told.ids)
            if not isinstance(piece, Image):
                continue
            if piece.pixels is None:
                raise ValueError(f"expected pixels in every image of a training document, got none in piece {i}; "
                                 "fix: fill the picture, or use generate")
            seen, coded = self.views(torch.from_numpy(piece.pixels))
            if piece.target:
                self.write_drawn(w, len(pictures), self.grid(coded))
                pictures.append(coded)
                if i >= last_target:
                    continue
            if self.copies and self._drawn_after(document, i):
                if drop[1]:
                    w.skip()
                else:
                    if not piece.target:
                        pictures.append(coded)
                    self.write_copy(w, len(pictures) - 1, self.grid(coded))
            if drop[2]:
                w.skip()
            else:
                self.write_seen(w, seen, coded, pictures, views)
        return w, pictures, views

    @staticmethod
    def _drawn_after(document: Document, index: int) -> bool:
        return any(p.target and isinstance(p, Image) for p in document.pieces[index + 1:])

    def samples(self, document: Document) -> list[Document]:
        """What a document is learnt as: several where its targets are predicted apart, each a beginning of it."""
        return [document]

    def collate(self, documents: Sequence[Document], emphasis: Sequence[Tensor | None] | None = None) -> Batch:
        """`emphasis`: for every document factors (n,) on the errors of the tokens of its one drawing, None: all 1."""
        samples = [(n, s) for n, d in enumerate(documents) for s in self.samples(d)]
        written = [self.write(s, self._drops(s)) for _, s in samples]
        batch = self.lay_out(written)
        if emphasis is None:
            return batch
        return emphasise(batch, written, self.bins(written), [emphasis[n] for n, _ in samples])

    def bins(self, written: Sequence[tuple[Writer, list[Tensor], list[Tensor]]]) -> list[list[int]]:
        """Which of them share a row."""
        return pack_rows([w.strip.length for w, _, _ in written], self.config.row)

    def lay_out(self, written: Sequence[tuple[Writer, list[Tensor], list[Tensor]]]) -> Batch:
        """What `write` gives for several documents, packed into rows."""
        return Batch.of(written, self.bins(written))

    def _drops(self, document: Document) -> tuple[bool, bool, bool]:
        return dropped(document, self.drop_rates())

    # -- network input -------------------------------------------------------------------------------------------------

    def states(self, page: Page, features: Tensor | None, drawn: Tensor | None) -> list[Tensor]:
        """Embeddings by route: texts and features in order; tokens of the codec in order."""
        understand, generate = page.tokens.routes(2)
        words = self.embed(page.ids.flatten()[understand])
        if features is not None:
            at = torch.nonzero(page.tokens.modality.flatten()[understand] == Modality.FEATURE).squeeze(1)
            words = words.index_copy(0, at, features.to(words.dtype))
        if drawn is None:
            return [words, words.new_zeros(len(generate), self.trunk.widths[1])]
        return [words, drawn.to(words.dtype)]

    def think(self, page: Page, features: Tensor | None, drawn: Tensor | None, run: Run | None = None
              ) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states by route: those that predict, and those that `keep_states` is told (here the same)."""
        hidden = self.trunk(self.states(page, features, drawn), page.tokens, self.mask, run)
        return hidden, hidden

    @property
    def plain(self) -> bool:
        """Whether `trunk` is all that stands between what single tokens are and what is predicted from them."""
        return all(getattr(type(self), name) is getattr(Packed, name)
                   for name in ("states", "think", "keep_states", "_run_reads"))

    def drawing_head(self) -> nn.Module | Tensor | None:
        """What makes the logits of the next code out of a state, where that is a matrix or a few."""
        return None

    # -- filling a document -------------------------------------------------------------------------------------------

    def reader(self, document: Document) -> Reader:
        """An empty context for a document."""
        return Reader()

    def writer(self, reader: Reader) -> Writer:
        return Writer(self.marks, reader.position, reader.segment, self.layout, branch=reader.branch)

    def program(self, document: Document, sampling: Sampling, generator: torch.Generator, emit: Emit) -> Program:
        """Contexts: `full` reads everything; `no_text` has nothing (or what `write_null` says) in place of the last
        text and the boxes that belong to it; `no_image` reads texts only."""
        full, no_text, no_image = (self.reader(document) for _ in range(3))
        pieces = list(document)
        last_target = max((i for i, p in enumerate(document) if p.target), default=-1)
        for i, piece in enumerate(document):
            more = i < last_target
            frame = self.frame_at(pieces, i)
            if isinstance(piece, Image) and frame.lead:
                yield from self._tell((full, no_image), no_text, [], frame)
            if isinstance(piece, Image) and piece.target:
                contexts = {"full": full, "no_text": no_text, "no_image": no_image}
                x, grid, pixels = yield from self._draw(piece, i, contexts, sampling, generator, emit, more)
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
                ids = yield from say(self, full, i, frame, sampling, generator, emit, more)
                pieces[i] = self._spelt(piece, ids)
                if isinstance(piece, Boxes):
                    emit(Event("boxes", i, pieces[i], len(ids)))
            else:
                ids = self.spell(piece, frame.gap)
                if isinstance(piece, Text):
                    no_text = full.fork()
                against = sampling.negative if isinstance(piece, Text) else ""
                yield from self._tell((full, no_image), no_text, ids, frame, against)
        return Document(tuple(pieces), document.task, document.meta)

    def _spelt(self, piece: Piece, ids: list[int]) -> Piece:
        v = self.need_vocabulary()
        return v.decode_boxes(ids, piece) if isinstance(piece, Boxes) else piece.replace(text=v.decode(ids))

    def _tell(self, readers: Sequence[Reader], without: Reader, ids: list[int], frame: Frame, against: str = ""
              ) -> Generator[Work, Any, None]:
        """Read a text, and in the context `without` what stands in its place: this one, or what the system says."""
        null = self.writer(without)
        if against:
            null.text(self.need_vocabulary().encode(frame.gap + against), frame=frame)
        for n, reader in enumerate(readers):
            w = self.writer(reader)
            w.text(ids, frame=frame)
            if n == 0 and not against:
                self.write_null(null, w.ids)
            yield Read(reader, w)
        if null.ids:
            yield Read(without, null)

    def _look_at(self, reader: Reader, pixels: Tensor, x: Tensor | None, grid: Grid | None,
                 copy: bool) -> Generator[Work, Any, None]:
        """Read a clean picture: its copy in the codec's tokens x if something is drawn later, then its features."""
        seen, _ = self.views(pixels)
        w = self.writer(reader)
        w.feature(0, self.feature_count(seen))
        yield Read(reader, w, [seen])

    def _draw(self, piece: Image, index: int, contexts: dict[str, Reader], sampling: Sampling,
              generator: torch.Generator, emit: Emit, more: bool) -> Generator[Work, Any, tuple[Tensor, Grid, Tensor]]:
        height, width = piece.size or sampling.size or self.config.picture
        if height % self.stride or width % self.stride or min(height, width) < self.stride:
            raise ValueError(f"expected a picture size in multiples of {self.stride}, got {height} x {width}; "
                             "fix: set the size of the image or of the sampling")
        if sampling.negative and not self.negatives:
            raise ValueError(f"expected no negative prompt for {type(self).__name__}, got one; fix: leave it out")
        sampling.guidance.check(contexts)
        grid = (height // self.stride, width // self.stride)
        x = yield from self.paint(grid, contexts, sampling, generator, index, emit, more)
        pixels = yield Develop(x, grid)
        emit(Event("picture", index, pixels, len(x)))
        return x, grid, pixels

    # -- running work together ----------------------------------------------------------------------------------------

    def run(self, works: Sequence[Work]) -> list[Any]:
        leaves = [leaf for w in works for leaf in parts_of(w)]
        results: dict[int, Any] = {}
        commits: list[Callable[[], None]] = []  # contexts grow once all has worked: a failed batch can be repeated
        kinds = [kind_of(w) for w in leaves]
        for kind, runner in self.runners(commits).items():
            numbers = [i for i, k in enumerate(kinds) if k == kind]
            if numbers:
                results |= zip(numbers, runner([leaves[i] for i in numbers]), strict=True)
        for commit in commits:
            commit()
        answers = iter([results[i] for i in range(len(leaves))])
        return [[next(answers) for _ in w.works] if isinstance(w, Together) else next(answers) for w in works]

    def runners(self, commits: list[Callable[[], None]]) -> dict[str, Callable[[Sequence[Any]], Sequence[Any]]]:
        """What executes each kind of work, in this order."""
        reads = partial(self._run_reads, commits=commits)
        steps = partial(self._run_steps, commits=commits)
        return {"prefill": reads, "decode": reads, "step": steps, "develop": partial(developed, self.decode),
                "encode": lambda works: self.encode([w.pixels.to(self.device) for w in works])}

    def _run_reads(self, works: Sequence[Read], commits: list[Callable[[], None]]) -> list[Tensor | None]:
        readers = [w.reader for w in works]
        start = [r.context.length for r in readers]
        page = Page.of([[w.writer] for w in works], start=start).to(self.device)
        views = [v.to(self.device) for w in works for v in w.views]
        run = self.trunk.start([r.context for r in readers], page.tokens, self.embed.weight.dtype)
        hidden, kept = self.think(page, self.see(views) if views else None, self.given(works), run)

        def commit() -> None:
            run.commit([w.writer.strip.length if w.keep else 0 for w in works])
            for reader, work in zip(readers, works, strict=True):
                if work.keep:
                    reader.position, reader.segment = work.writer.position, work.writer.segment

        commits += [commit, partial(self.keep_states, works, page, kept)]
        answers: list[Tensor | None] = [None] * len(works)
        counts = [w.recite or int(w.predict) for w in works]
        if any(counts):
            ends = [b * page.tokens.shape[1] + w.writer.strip.length for b, w in enumerate(works)]
            last = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, counts, strict=True)])
            states = told(works, pick(hidden, page.tokens, last.to(self.device)), counts)
            parts = self.head(states).float().split(counts)
            answers = [p if w.recite else p[0] if w.predict else None for p, w in zip(parts, works, strict=True)]
        if len(page.questions):
            counts = [len(w.writer.questions) for w in works]
            parts = self.answer(told(works, pick(hidden, page.tokens, page.questions), counts)).split(counts)
            answers = [part if n else a for n, part, a in zip(counts, parts, answers, strict=True)]
        return answers

    def _run_steps(self, works: Sequence[Step], commits: list[Callable[[], None]]) -> list[Tensor]:
        commits.append(partial(Decoding.advance, works))
        return Decoding.run_all(works)

    def keep_states(self, works: Sequence[Read], page: Page, hidden: list[Tensor]) -> None:
        """Called with the states of what was read once all has worked: systems that look back put them into readers."""
