"""What systems share whose tokens all see each other: a target is filled in as a whole, many tokens at once and in no
order. No keys are cached, since every token sees the target, and a document is one sequence per target.

    sequence   everything before the target, clean; then the target, what follows is absent
    slots      a text answer has a fixed number of places: its tokens, what closes it, then filling; all are predicted
    sampler    a coroutine of the objective: yields what the network shall read in place of the target, is sent logits

Beside what `systems.coded` asks for, a system provides `closing` and `filling`, `decisions` (what `score` returns), and
runs the samplers of its objectives in `paint` and `answered` through `follow`.
"""
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diptych.document import Boxes, Document, Image
from diptych.objectives import next_token
from diptych.objectives.guidance import Guidance
from diptych.objectives.masked_token import Ask
from diptych.parts.interleave import IGNORE, Layout, Page, Writer
from diptych.parts.masks import Predicate, same, valid
from diptych.parts.trunks import pick
from diptych.systems.base import Emit, Event, Program, Progress, Sampling, StepLogProbs
from diptych.systems.coded import Coded, Steps
from diptych.systems.packed import Batch
from diptych.systems.works import Grid, Guess, Reader, Sequenced, show

Written = tuple[Writer, list[Tensor], list[Tensor]]
Drop = tuple[bool, bool, bool]
# evaluations so far, time, what is drawn, and what is expected of it
Show = Callable[[int, float, Tensor, Tensor], Generator[Any, Any, None]]
KEEP: Drop = (False, False, False)
DROPS: dict[str, Drop] = {"full": KEEP, "no_text": (True, False, False), "no_image": (False, False, True)}


class Bidirectional(Coded):
    mask: Predicate = valid & same("document")
    layout = Layout(spread=True)
    ahead = True  # whether the token before a slot predicts it, or its own place
    negatives = False
    config: Any  # with `slots`: tokens of a text answer

    # -- provided by the system ---------------------------------------------------------------------------------------

    @property
    def closing(self) -> tuple[int, ...]:
        """What closes an answer."""
        return (self.marks.end,)

    @property
    def filling(self) -> int:
        """What fills the slots behind it."""
        raise TypeError("abstract")

    def decisions(self, batch: Batch, writers: Sequence[Writer], generator: torch.Generator,
                  **how: Any) -> list[Tensor]:
        """Log-probs (m,) of what is predicted in each of these sequences, in the order of the page."""
        raise TypeError("abstract")

    def answered(self, document: Document, index: int, draft: Tensor | None, sampling: Sampling,
                 generator: torch.Generator) -> Generator[Any, Any, list[int]]:
        """Fill in the slots of text target `index`, from a draft (slots,) if there is one -> the ids of the answer."""
        raise TypeError("abstract")

    # -- documents to sequences ---------------------------------------------------------------------------------------

    def before(self, document: Document, index: int, drop: Drop = KEEP) -> Sequenced:
        """What precedes target `index`, all of it clean, up to what leads to a picture. `drop` as `write` has it."""
        w, pictures, views = self.write(document, drop, clean=index)
        frame = self.frame_at(document.pieces, index)
        if isinstance(document.pieces[index], Image) and frame.lead:
            told = self.writer(Reader()) if drop[0] else w
            told.text([], frame=frame)
            if drop[0]:
                self.write_null(w, told.ids)
        return Sequenced(w, views, pictures=pictures)

    def slot_ids(self, ids: Sequence[int]) -> list[int]:
        """The slots of an answer of these tokens."""
        closed = [*ids, *self.closing]
        if len(closed) > self.config.slots:
            room = self.config.slots - len(self.closing)
            raise ValueError(f"expected an answer of fewer than {room + 1} tokens, got {len(ids)}; "
                             "fix: shorten it, or raise slots")
        return closed + [self.filling] * (self.config.slots - len(closed))

    def add_answer(self, w: Writer, document: Document, index: int, ids: Sequence[int]) -> None:
        frame = dataclasses.replace(self.frame_at(document.pieces, index), close=False)
        w.text(self.slot_ids(ids), frame=frame, target=True, ahead=self.ahead)

    def with_target(self, document: Document, index: int, drop: Drop = KEEP) -> Written:
        """A training sequence: target `index` behind what precedes it."""
        piece = document.pieces[index]
        s = self.before(document, index, drop if isinstance(piece, Image) else KEEP)
        if not isinstance(piece, Image):
            self.add_answer(s.writer, document, index, self.spell(piece, self.frame_at(document.pieces, index).gap))
            return s.writer, s.pictures, s.views
        if piece.pixels is None:
            raise ValueError(f"expected pixels in every image of a training document, got none in piece {index}; "
                             "fix: fill the picture, or use generate")
        picture = self.views(torch.from_numpy(piece.pixels))[1]
        self.write_drawn(s.writer, len(s.pictures), self.grid(picture))
        return s.writer, [*s.pictures, picture], s.views

    def collate(self, documents: Sequence[Document]) -> Batch:
        return self.lay_out([self.with_target(d, i, self._drops(d)) for d in documents
                             for i, p in enumerate(d) if p.target])

    # -- scoring ------------------------------------------------------------------------------------------------------

    def score(self, documents: Sequence[Document], *, seed: int = 0, **how: Any) -> StepLogProbs:
        """Log-probs of the targets' tokens (text slots and codes, in the order of the document), each target noised
        once as in training; `how` as `decisions` has it."""
        values: list[Tensor] = []
        kinds: list[list[str]] = []
        for document in documents:
            written = [self.with_target(document, i) for i, p in enumerate(document) if p.target]
            batch = self.lay_out(written).to(self.device)
            order = [n for row in self.bins(written) for n in row]  # packing may change that of sequences
            found = self.decisions(batch, [written[n][0] for n in order], torch.Generator().manual_seed(seed), **how)
            parts = dict(zip(order, found, strict=True))
            values.append(torch.cat([parts[n] for n in range(len(written))]))
            kinds.append(["code" if w.questions else "text" for n, (w, _, _) in enumerate(written)
                          for _ in range(len(parts[n]))])
        return StepLogProbs(values, kinds)

    # -- generating ---------------------------------------------------------------------------------------------------

    def program(self, document: Document, sampling: Sampling, generator: torch.Generator, emit: Emit) -> Program:
        return self.fill(document, sampling, generator, emit, {})

    def fill(self, document: Document, sampling: Sampling, generator: torch.Generator, emit: Emit,
             drafts: Mapping[int, Tensor]) -> Program:
        """One target after the other; those that have content keep it. `drafts`: tokens to begin with in place of
        noise, by piece. Contexts of guidance are what training drops: `no_text`, `no_image`."""
        pieces = list(document)
        for i, piece in enumerate(document):
            if not piece.target or not piece.empty:
                if isinstance(piece, Image) and piece.pixels is None:
                    raise ValueError(f"expected pixels in the given image (piece {i}), got none; fix: make it a target")
                continue
            known = Document(tuple(pieces))
            if isinstance(piece, Image):
                contexts: Any = {name: self.before(known, i, drop) for name, drop in DROPS.items()}
                if i in drafts:
                    contexts["draft"] = drafts[i]
                _, _, pixels = yield from self._draw(piece, i, contexts, sampling, generator, emit, False)
                pieces[i] = piece.replace(pixels=pixels.cpu().numpy())
            else:
                self.check_spelt(piece)
                ids = yield from self.answered(known, i, drafts.get(i), sampling, generator)
                pieces[i] = self._spelt(piece, ids)
                found = pieces[i] if isinstance(piece, Boxes) else pieces[i].text  # type: ignore[attr-defined]
                emit(Event("boxes" if isinstance(piece, Boxes) else "text", i, found, len(ids)))
        return Document(tuple(pieces), document.task, document.meta)

    def cut(self, slots: Sequence[int], sampling: Sampling) -> list[int]:
        """The ids before the first that closes an answer."""
        ids = list(slots)
        ids = ids[: ids.index(self.closing[0])] if self.closing[0] in ids else ids
        return ids[: sampling.text.max_tokens]

    def follow(self, chain: Generator[Ask, Tensor, Tensor], contexts: Mapping[str, Sequenced], guidance: Guidance,
               watch: Show | None = None) -> Steps:
        """Run a sampler to its end: what it asks for is read in all contexts that guidance needs."""
        x, t, _ = next(chain)
        k = 0
        while True:
            names = list(dict.fromkeys(["full", *(b.context for b in guidance.at(t).active(t))]))
            answers = yield Guess([contexts[n] for n in names], x)
            try:
                x, t, guess = chain.send(next_token.guide(dict(zip(names, answers, strict=True)), guidance, t))
            except StopIteration as stop:
                return stop.value
            k += 1
            if watch is not None and guess is not None:
                yield from watch(k, t, x, guess)

    def partial_pictures(self, grid: Grid, sampling: Sampling, index: int, emit: Emit) -> Show:
        """Show what is drawn so far, as often as asked for."""
        def shown(k: int, t: float, x: Tensor, guess: Tensor) -> Generator[Any, Any, None]:
            yield from show(guess, grid, sampling, index, emit, Progress(
                step=k, steps=sampling.evaluations, time=t, known=(x == guess).view(grid)))

        return shown

    # -- running work together ----------------------------------------------------------------------------------------

    def runners(self, commits: list[Any]) -> dict[str, Any]:
        return super().runners(commits) | {"guess": self._run_guesses}

    def _look(self, sequences: Sequence[Sequenced]) -> None:
        """What is computed once: features of views, codes of pictures."""
        unseen = [s for s in sequences if s.views and s.features is None]
        if unseen:
            seen = self.see([v.to(self.device) for s in unseen for v in s.views])
            counts = [sum(self.feature_count(v) for v in s.views) for s in unseen]
            for s, features in zip(unseen, seen.split(counts), strict=True):
                s.features = features
        uncoded = [s for s in sequences if s.codes is None]
        pictures = [p.to(self.device) for s in uncoded for p in s.pictures]
        codes = iter(self.encode(pictures) if pictures else [])
        for s in uncoded:
            s.codes = [next(codes) for _ in s.pictures]

    def _run_guesses(self, works: Sequence[Guess]) -> list[list[Tensor]]:
        rows = [(s, w.x) for w in works for s in w.sequences]
        self._look([s for s, _ in rows])
        page = Page.of([[s.writer] for s, _ in rows]).to(self.device)
        features = [s.features for s, _ in rows if s.features is not None]
        codes = [c for s, x in rows for c in (*(s.codes or ()), *([x] if s.writer.questions else []))]
        words = [x for s, x in rows if not s.writer.questions]
        places = self.answer_places(page)
        if words:
            page.ids = self.with_words(page, places, torch.cat(words))
        drawn = self.code_tokens(torch.cat(codes)) if codes else None
        hidden = self.trunk(self.states(page, torch.cat(features) if features else None, drawn), page.tokens, self.mask)
        text = iter(self.head(pick(hidden, page.tokens, places)).float().split([len(x) for x in words] or [0]))
        counts = [len(x) for s, x in rows if s.writer.questions]
        image = iter(self.answer(pick(hidden, page.tokens, page.questions)).split(counts or [0]))
        answers = iter([next(image if s.writer.questions else text) for s, _ in rows])
        return [[next(answers) for _ in w.sequences] for w in works]

    @staticmethod
    def answer_places(page: Page) -> Tensor:
        """(n,) flat places of the tokens that predict slots."""
        return torch.nonzero(page.labels.flatten() != IGNORE).squeeze(1)

    def with_words(self, page: Page, places: Tensor, words: Tensor) -> Tensor:
        """The ids of a page with these in the slots that `places` predict."""
        return page.ids.flatten().index_copy(0, places + self.ahead, words).view_as(page.ids)
