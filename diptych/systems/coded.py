"""What systems share that draw pictures as discrete codes inside the packed sequence.

    input   one token per cell: `code_tokens(codes)`, an embedding of its own (not the tokenizer's codebook row)
    output  one hidden state per cell: `code_logits`, on the token before the cell or on its own
    loss    cross-entropy of text tokens and of codes, each divided by its own count

This file draws code by code in raster order. Other ways to draw replace `paint` (the loop), `corrupt` (what training
shows in place of the codes, and which of them count) and `write_drawn` (how the cells see each other): masked codes,
discrete flow and scales read blocks without keeping them. Codes with a depth have `code_shape = (depth,)`, and replace
`answer`, `pick_code` and `code_error`.

Beside what `systems.packed` asks for, a system provides `code_tokens`, `code_logits` and a `codec`.
"""
import dataclasses
import math
from collections.abc import Generator, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diptych.document import Document
from diptych.objectives import next_token
from diptych.objectives.decisions import Options, ahead, decide
from diptych.parts.grammar import CELL, Grammar
from diptych.parts.interleave import IGNORE, Page, Writer
from diptych.parts.masks import Predicate, packed_causal
from diptych.parts.pictures import crop_to
from diptych.parts.trunks import pick
from diptych.parts.vq import PictureTokenizer
from diptych.systems.base import Emit, Losses, Progress, Sampling, StepLogProbs, Work
from diptych.systems.decoding import Decoding, Trail
from diptych.systems.packed import Batch, Packed
from diptych.systems.works import Grid, Read, Reader, Step, Together, due, show

Steps = Generator[Work, Any, Tensor]


class Coded(Packed):
    mask: Predicate = packed_causal
    codec: PictureTokenizer
    code_shape: tuple[int, ...] = ()  # of the codes in one cell
    scores_codes = True  # whether a picture has log-probs without the steps that drew it

    def code_tokens(self, codes: Tensor) -> Tensor:
        """Codes (n, *code_shape) -> input states (n, width). Provided by the system."""
        raise TypeError("abstract")

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (m, width) -> logits (m, codebook). Provided by the system."""
        raise TypeError("abstract")

    # -- pictures as codes --------------------------------------------------------------------------------------------

    @property
    def stride(self) -> int:  # type: ignore[override]
        return self.codec.config.downsample

    def encode(self, pictures: list[Tensor]) -> list[Tensor]:
        """Pictures for the codec -> codes (n_i, *code_shape) each, cell by cell."""
        return self.codec.tokens(pictures, self.code_shape)

    @torch.no_grad()
    def decode(self, x: Tensor, grid: Grid) -> Tensor:
        """Codes (b, n, *code_shape) of one grid -> pixels (b, 3, h, w), clamped."""
        return self.codec.decode(x.unflatten(1, grid)).float().clamp(-1, 1)

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Read as it is drawn, unless a system reads otherwise."""
        picture = crop_to(pixels, *self.config.picture)
        return picture, picture

    def drop_rates(self) -> tuple[float, float, float]:
        return self.config.drop_text, 0.0, self.config.drop_feature

    def write_drawn(self, w: Writer, number: int, grid: Grid) -> None:
        w.code(number, w.plan(grid), drawn=True)

    def given(self, works: Sequence[Read]) -> Tensor | None:
        codes = [c for w in works for c in w.codes]
        return self.code_tokens(torch.cat(codes).to(self.device)) if codes else None

    def answer(self, hidden: Tensor) -> Tensor:
        return self.code_logits(hidden).float()

    # -- training -----------------------------------------------------------------------------------------------------

    def picture_codes(self, pictures: list[Tensor]) -> list[Tensor]:
        """Codes (n_i, *code_shape) of pictures: what `encode` gives, unless codes only lead to what is drawn."""
        return self.encode(pictures)

    def further(self, batch: Batch, kept: list[Tensor], generator: torch.Generator) -> dict[str, tuple[float, Tensor]]:
        """More loss terms: weight, and the errors (n,) of what counts; `kept` as `think` gives them."""
        return {}

    def lay_out(self, written: Sequence[tuple[Writer, list[Tensor], list[Tensor]]]) -> Batch:
        return dataclasses.replace(super().lay_out(written), code_depth=math.prod(self.code_shape))

    def corrupt(self, codes: list[Tensor], drawn: list[bool], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The codes of every block -> what the network reads in their place (n, *code_shape), and which of the drawn
        ones count in the loss (m,)."""
        given = torch.cat(codes)
        count = sum(len(c) for c, d in zip(codes, drawn, strict=True) if d)
        return given, torch.ones(count, dtype=torch.bool, device=given.device)

    def code_error(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Negative log-likelihoods of codes (m, *code_shape) given the states (m, width) that predict them."""
        return next_token.cross_entropy(self.code_logits(hidden), codes)

    def picture_errors(self, hidden: list[Tensor], page: Page, codes: Tensor, counted: Tensor) -> Tensor:
        """Negative log-likelihoods of the `counted` (m,) ones of all drawn codes."""
        return self.code_error(pick(hidden, page.tokens, page.questions[counted]), codes[counted])

    def forward_page(self, page: Page, views: Sequence[Tensor], codes: Tensor | None) -> list[Tensor]:
        """Hidden states by route of a page without context."""
        return self.read_page(page, views, codes)[0]

    def read_page(self, page: Page, views: Sequence[Tensor], codes: Tensor | None
                  ) -> tuple[list[Tensor], list[Tensor]]:
        """What `think` gives for a page without context."""
        drawn = None if codes is None else self.code_tokens(codes)
        return self.think(page, self.see(views) if views else None, drawn)

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        c, page = self.config, batch.page
        given = counted = None
        answers, found = list[Tensor](), list[Tensor]()
        if batch.codes:
            found = self.picture_codes(batch.pictures)
            codes, drawn = [found[i] for i, _ in batch.codes], [d for _, d in batch.codes]
            given, counted = self.corrupt(codes, drawn, generator)
            answers = [x for x, d in zip(codes, drawn, strict=True) if d]
        hidden, kept = self.read_page(page, batch.views, given)

        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        words = torch.nonzero(page.labels.flatten() != IGNORE).squeeze(1)
        if len(words):
            logits = self.head(pick(hidden, page.tokens, words))
            sums["text"] = next_token.cross_entropy(logits, page.labels.flatten()[words]).sum()
            counts["text"] = torch.tensor(float(len(words)), device=words.device)
        if answers and counted is not None:
            errors = self.picture_errors(hidden, page, torch.cat(answers), counted)
            own = [(i, len(found[i])) for i, d in batch.codes if d]
            sums["image"] = batch.emphasised(errors, own, counted).sum()
            counts["image"] = torch.tensor(float(errors.numel()), device=words.device)
        weights = {"text": c.text_weight, "image": c.image_weight}
        for name, (weight, errors) in self.further(batch, kept, generator).items():
            weights[name], sums[name] = weight, errors.sum()
            counts[name] = torch.tensor(float(len(errors)), device=words.device)
        return Losses(sums, counts, weights)

    def score(self, documents: Sequence[Document]) -> StepLogProbs:
        """Log-probs of the text targets' tokens (closing mark included) and, with `scores_codes`, of the codes of drawn
        pictures, in the order of the document; temperature 1, no guidance."""
        values: list[Tensor] = []
        kinds: list[list[str]] = []
        for document in documents:
            found = [self._decisions(sample) for sample in self.samples(document)]
            places = torch.cat([places for places, _, _ in found])  # a sample begins as its document does
            order = places.argsort(stable=True)
            values.append(-torch.cat([errors for _, errors, _ in found])[order])
            names = [name for _, _, own in found for name in own]
            kinds.append([names[i] for i in order.tolist()])
        return StepLogProbs(values, kinds)

    def _decisions(self, document: Document) -> tuple[Tensor, Tensor, list[str]]:
        """Of the targets of a sample, text first: place, negative log-likelihood and kind of every decision."""
        batch = self.lay_out([self.write(document)]).to(self.device)
        page, found = batch.page, self.picture_codes(batch.pictures)
        codes = torch.cat([found[i] for i, _ in batch.codes]) if batch.codes else None
        hidden = self.forward_page(page, batch.views, codes)
        places = torch.nonzero(page.labels.flatten() != IGNORE).squeeze(1)
        logits = self.head(pick(hidden, page.tokens, places))
        errors = [next_token.cross_entropy(logits, page.labels.flatten()[places])]
        names = ["text"] * len(places)
        if codes is not None and self.scores_codes:
            answers = torch.cat([codes[:0], *[found[i] for i, drawn in batch.codes if drawn]])
            error = self.code_error(pick(hidden, page.tokens, page.questions), answers)
            errors.append(error.flatten())
            places = torch.cat((places, page.questions.repeat_interleave(math.prod(self.code_shape))))
            names += ["code"] * error.numel()
        return places, torch.cat(errors), names

    # -- drawing ------------------------------------------------------------------------------------------------------

    def paint(self, grid: Grid, contexts: dict[str, Reader], sampling: Sampling, generator: torch.Generator, index: int,
              emit: Emit, more: bool) -> Steps:
        uniforms = torch.rand(grid[0] * grid[1], *self.code_shape, generator=generator, dtype=torch.float64)
        return (yield from self.raster(uniforms, grid, contexts, sampling, index, emit, more))

    def raster(self, uniforms: Tensor, grid: Grid, contexts: dict[str, Reader], sampling: Sampling, index: int,
               emit: Emit, more: bool) -> Steps:
        """Codes one after the other, each chosen by its uniform number (n, *code_shape). Every context of the guidance
        reads what was drawn; the fixed tokens of the block's grammar are read, never drawn."""
        names = self.code_contexts(sampling)
        readers = {name: contexts[name] if name == "full" else contexts[name].fork() for name in names}
        plan = self.writer(Reader()).plan(grid)
        *steps, rest = Grammar.steps(plan)
        codes = torch.zeros(len(uniforms), *self.code_shape, dtype=torch.long)
        decoding = Decoding.now(self)
        trails: list[Trail] | None = None
        known = ahead("code")
        passed = list[Tensor]()  # what all contexts say of every code, where one pass can tell
        if len(known) >= codes.numel():
            codes = torch.stack(known[: codes.numel()]).view(codes.shape).cpu()
            whole = slice(steps[0].start, rest.start)
            passed = yield Together([self._step(r, plan, whole, [codes[:-1]]) for r in readers.values()])
        alike = bool(passed) and type(self).pick_code is Coded.pick_code and not sampling.guidance.branches
        if alike:
            self._pick_again(codes, self.code_log_probs(dict(zip(names, passed, strict=True)), sampling, 0.0))
        for k, part in enumerate(() if alike else steps):
            if passed:
                codes[k] = yield from self.pick_code(dict(zip(names, [p[k:k + 1] for p in passed], strict=True)),
                                                     uniforms[k], sampling, k / len(uniforms))
                continue
            if k == 1 and decoding and decoding.codes:
                trails = self._trails(decoding, readers.values(), plan, slice(part.start, rest.start))
            if trails and decoding:
                answers = yield from self._stepped(decoding, trails, plan[part], codes[k - 1])
            else:
                known = [codes[k - 1 : k]] if k else []
                answers = yield Together([self._step(r, plan, part, known) for r in readers.values()])
            codes[k] = yield from self.pick_code(dict(zip(names, answers, strict=True)), uniforms[k], sampling,
                                                 k / len(uniforms))
            if due(k + 1, len(uniforms), sampling):
                codes[k + 1:] = codes[k]  # what is not drawn yet goes on as it is
                yield from show(codes.clone().to(self.device), grid, sampling, index, emit, Progress(
                    step=k + 1, steps=len(uniforms), known=(torch.arange(len(uniforms)) <= k).view(grid)))
        if more:
            for trail in trails or ():
                trail.settle()
            yield self._step(readers["full"], plan, rest, [codes[-1:]])
        return codes.to(self.device)

    def _trails(self, decoding: Decoding, readers: Iterable[Reader], plan: list[int], part: slice
                ) -> list[Trail] | None:
        """Of this part of a block in every reader; None if one of them cannot be decoded that way."""
        trails = []
        for reader in readers:
            write = partial(self._block, reader, plan, part.start)
            trail = decoding.trail(reader, write, part.stop - part.start)
            if trail is None:
                return None
            trails.append(trail)
        return trails

    def _block(self, reader: Reader, plan: list[int], start: int, count: int) -> Writer:
        w = self.writer(reader)
        w.code(0, plan, drawn=True, part=slice(start, start + count))
        return w

    def _stepped(self, decoding: Decoding, trails: Sequence[Trail], tokens: Sequence[int], code: Tensor
                 ) -> Generator[Work, Any, list[Tensor]]:
        """Read a code and the fixed tokens behind it; what every trail (1, codebook) says of the next one."""
        logits = torch.empty(0)
        for token in tokens:
            state = decoding.code_state(self, code) if token == CELL else decoding.words_in[token]
            logits = yield Step(trails, state, codes=True)
        return list(logits)

    def pick_code(self, answers: dict[str, Tensor], uniform: Tensor, sampling: Sampling, t: float) -> Steps:
        """The code of one cell from what the contexts answered; `t` is the share of the picture drawn before."""
        yield from ()
        scores = self.code_log_probs(answers, sampling, t)
        return next_token.pick(scores, uniform[None] if sampling.codes.temperature > 0 else None)[0]

    @staticmethod
    def _pick_again(codes: Tensor, scores: Tensor) -> None:
        """Decisions that are known, codes (n,), as log-probs (n, codebook) have them: as `pick_code` would take them,
        but with the arithmetic of all done at once."""
        found = scores.gather(-1, codes[:, None].to(scores.device))[:, 0]
        for k, (code, log_prob) in enumerate(zip(codes.split(1), found.split(1), strict=True)):
            decide("code", lambda code=code: code, lambda _, log_prob=log_prob: log_prob,
                   options=lambda chosen, k=k: Options(chosen.flatten(), scores[k:k + 1]))

    def code_sampling(self, sampling: Sampling) -> Sampling:
        """How codes are drawn where this is how the document is."""
        return sampling

    @staticmethod
    def code_contexts(sampling: Sampling) -> list[str]:
        """Names of the contexts that answer for every code, in order."""
        return list(dict.fromkeys(["full", *(b.context for b in sampling.guidance.branches if b.scale != 1)]))

    @staticmethod
    def code_log_probs(answers: dict[str, Tensor], sampling: Sampling, t: float) -> Tensor:
        """Of the distribution (1, codebook) that a code is drawn from."""
        return next_token.log_probs(next_token.guide(answers, sampling.guidance, t), sampling.codes)

    def _step(self, reader: Reader, plan: list[int], part: slice, codes: list[Tensor]) -> Read:
        return Read(reader, self._block(reader, plan, part.start, part.stop - part.start), codes=codes)
