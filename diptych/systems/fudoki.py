"""FUDOKI: the network of Janus, reading and drawing by discrete flow in both modalities (arXiv 2505.20147).

    x_t ~ p_t(. | x1) at the tokens of one target, everything before it clean;  L = CE(x1 | x_t), unweighted
    sampling: N Euler steps of `objectives.discrete_flow`, from uniform tokens or from an answer to correct

- All valid tokens see each other; logits stay shifted by one (the token before predicts), so that weights of an
  autoregressive model start it; the network is never told the time.
- The paths move on frozen tables that serve as metric only: codebook rows for codes, word embeddings for text.
- Text answers are a fixed number of slots, filled with the end mark and pads, which the loss includes; what precedes
  the first end is the answer. Their posterior is greedy and unguided, pictures use scale 6 (the paper's w = 5, plus 1).
- `path` "uniform" and "masked" are the controls: mixtures with the same network and sampler.

Documents with several targets become one sequence per target, as they are also generated: earlier targets clean, what
follows absent. No keys are cached, since every token sees the target. The prompt without text is made of pads.
"""
import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as File
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diptych.document import Boxes, Document, Image, Piece
from diptych.objectives import discrete_flow, next_token
from diptych.objectives.discrete_flow import Chance, Kinetic, MetricPath, MixturePath, Path
from diptych.objectives.flow import schedule
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.interleave import IGNORE, Frame, Layout, Page, Writer
from diptych.parts.masks import same, valid
from diptych.parts.pictures import crop_to, pad_square
from diptych.parts.trunks import pick
from diptych.parts.turns import Turns
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.base import Emit, Event, Losses, Program, Sampling, StepLogProbs
from diptych.systems.coded import Coded, Steps
from diptych.systems.janus import Janus, JanusConfig
from diptych.systems.packed import Batch
from diptych.systems.works import Develop, Grid, Guess, Reader, Sequenced

TURNS = Turns(user=("User:", "\n\n"), assistant=("Assistant:", ""), between="")  # of the released prompts
Written = tuple[Writer, list[Tensor], list[Tensor]]
Drop = tuple[bool, bool, bool]
KEEP: Drop = (False, False, False)
CODEBOOK = "quantizer.codebook.weight"
DROPS: dict[str, Drop] = {"full": KEEP, "no_text": (True, False, False), "no_image": (False, False, True)}


@dataclass(frozen=True, kw_only=True)
class FudokiConfig:
    network: JanusConfig  # of which sampling and dropping are not used
    slots: int = 500  # tokens of a text answer
    path: Literal["metric", "uniform", "masked"] = "metric"
    text_metric: int = 4096  # width of the frozen table
    image_metric: int | None = 8  # None: no table of its own, but the codec's codebook
    text_c: float | None = 3.0  # None: `discrete_flow.calibrate` of the table
    image_c: float | None = 3.0
    exponent: float = 0.9
    text_weight: float = 1.0
    image_weight: float = 1.0
    drop_text: float = 0.1  # condition dropping for guidance
    drop_feature: float = 0.0
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.network.variant != "released" or self.network.pad is None:
            raise ValueError("expected a network with a pad token, got none; fix: set network.pad and variant released")
        if self.slots < 1 or self.path not in ("metric", "uniform", "masked"):
            raise ValueError(f"expected slots >= 1 and a path out of metric, uniform, masked, got {self.slots} and "
                             f"{self.path!r}")

    @property
    def picture(self) -> tuple[int, int]:
        return self.network.picture

    @property
    def row(self) -> int:
        return self.network.row


class Fudoki(Coded):
    Config = FudokiConfig
    config: FudokiConfig
    mask = valid & same("document")
    layout = Layout(spread=True)

    def __init__(self, config: FudokiConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        c = self.config = config
        self.network = Janus(c.network, vocabulary)
        codes, words = self.network.code_embed.num_embeddings, c.network.vocabulary_size
        self.values = {"text": words, "image": codes}
        self.metric = nn.ModuleDict()
        if c.path == "metric":
            self.metric["text"] = nn.Embedding(words, c.text_metric)
            if c.image_metric is not None:
                self.metric["image"] = nn.Embedding(codes, c.image_metric)
            self.metric.requires_grad_(False)
        elif c.path == "masked":  # a further token to read
            for name in ("embed", "code_embed"):
                table = getattr(self.network, name)
                setattr(self.network, name, nn.Embedding(table.num_embeddings + 1, table.embedding_dim))
                nn.init.normal_(getattr(self.network, name).weight, std=0.02)
        self._paths: dict[str, tuple[Any, MetricPath]] = {}

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> FudokiConfig:
        """For tests: seconds on a CPU."""
        return cls._world(dataclasses.replace(Janus.tiny(), row=400), text_metric=32)  # fixed lengths: two per row

    @classmethod
    def small(cls) -> FudokiConfig:
        """The world at 64 px; its captions have up to 40 tokens."""
        return cls._world(Janus.small(), text_metric=256)

    @classmethod
    def _world(cls, network: JanusConfig, text_metric: int) -> FudokiConfig:
        return FudokiConfig(network=network, slots=48, text_metric=text_metric, image_metric=None, text_c=None,
                            image_c=None, sampling=_guided(3.0, 16))

    @classmethod
    def paper(cls) -> FudokiConfig:
        """Janus-1.3B, of which the paper counts 1.5B; tables of Janus-Pro-7B's words and LlamaGen's codes."""
        network = dataclasses.replace(Janus.pro_1b(), pad=100015, turns=TURNS)
        return FudokiConfig(network=network, sampling=_guided(6.0, 32))

    # -- parts of the network -----------------------------------------------------------------------------------------

    trunk = property(lambda self: self.network.trunk)  # type: ignore[assignment]
    embed = property(lambda self: self.network.embed)  # type: ignore[assignment]
    head = property(lambda self: self.network.head)  # type: ignore[assignment]
    codec = property(lambda self: self.network.codec)  # type: ignore[assignment]
    vocabulary = property(lambda self: self.network.vocabulary)  # type: ignore[assignment]
    marks = property(lambda self: self.network.marks)  # type: ignore[assignment]

    @classmethod
    def read_vocabulary(cls, config: FudokiConfig, source: str | File) -> Vocabulary:
        return Janus.read_vocabulary(config.network, source)

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vision = self.config.network.vision
        return (pad_square(pixels, vision.max_side * vision.patch, shortest=1, filter="bilinear"),
                crop_to(pixels, *self.config.picture))

    def feature_count(self, view: Tensor) -> int:
        return self.network.feature_count(view)

    def see(self, views: Sequence[Tensor]) -> Tensor:
        return self.network.see(views)

    def code_tokens(self, codes: Tensor) -> Tensor:
        return self.network.code_tokens(codes)

    def code_logits(self, hidden: Tensor) -> Tensor:
        return self.network.code_logits(hidden)

    def frame(self, before: Piece | None, piece: Piece) -> Frame:
        return self.network.frame(before, piece)

    def write_null(self, w: Writer, ids: list[int]) -> None:
        self.network.write_null(w, ids)

    def path(self, kind: Literal["text", "image"]) -> Path:
        """The path of a modality; that of a table is made again when the table changes."""
        c, values = self.config, self.values[kind]
        if c.path != "metric":
            masked = c.path == "masked"
            return MixturePath(values=values, mask=values if masked else None,
                               schedule=Kinetic(0.0 if masked else 1 / values))
        own = kind in self.metric
        table = self.metric.get_parameter(f"{kind}.weight") if own else self.codec.get_parameter(CODEBOOK)
        key = (table.data_ptr(), table._version, table.device)
        if kind not in self._paths or self._paths[kind][0] != key:
            scale = c.text_c if kind == "text" else c.image_c
            scale = discrete_flow.calibrate(table, c.exponent) if scale is None else scale
            self._paths[kind] = key, MetricPath(table, scale, c.exponent)
        return self._paths[kind][1]

    # -- documents to sequences ---------------------------------------------------------------------------------------

    def before(self, document: Document, index: int, drop: Drop = KEEP) -> Sequenced:
        """What precedes target `index`, all of it clean, up to what leads to a picture. `drop` as `write` has it."""
        pieces = tuple(p.replace(target=False) for p in document.pieces[:index])
        w, _, views = self.write(Document(pieces), drop)
        frame = self.frame_at(document.pieces, index)
        if isinstance(document.pieces[index], Image) and frame.lead:
            told = self.writer(Reader()) if drop[0] else w
            told.text([], frame=frame)
            if drop[0]:
                self.write_null(w, told.ids)
        return Sequenced(w, views)

    def add_answer(self, w: Writer, document: Document, index: int, ids: list[int]) -> None:
        """The slots of a text answer: ids, the end mark, pads."""
        if len(ids) >= self.config.slots:
            raise ValueError(f"expected an answer of fewer than {self.config.slots} tokens, got {len(ids)}; "
                             "fix: shorten it, or raise slots")
        frame = self.frame_at(document.pieces, index)
        pad = self.config.network.pad
        filled = [*ids, self.marks.end, *[pad] * (self.config.slots - len(ids) - 1)]
        w.text(filled, frame=dataclasses.replace(frame, close=False), target=True)

    def with_target(self, document: Document, index: int, drop: Drop = KEEP) -> Written:
        """A training sequence: target `index` behind what precedes it."""
        piece = document.pieces[index]
        s = self.before(document, index, drop if isinstance(piece, Image) else KEEP)
        if not isinstance(piece, Image):
            self.add_answer(s.writer, document, index, self.spell(piece, self.frame_at(document.pieces, index).gap))
            return s.writer, [], s.views
        if piece.pixels is None:
            raise ValueError(f"expected pixels in every image of a training document, got none in piece {index}; "
                             "fix: fill the picture, or use generate")
        picture = self.views(torch.from_numpy(piece.pixels))[1]
        self.write_drawn(s.writer, 0, self.grid(picture))
        return s.writer, [picture], s.views

    def collate(self, documents: Sequence[Document]) -> Batch:
        return self.lay_out([self.with_target(d, i, self._drops(d)) for d in documents
                             for i, p in enumerate(d) if p.target])

    # -- training -----------------------------------------------------------------------------------------------------

    def errors(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cross-entropies of the text slots and of the codes, in page order; one time per target."""
        page, device = batch.page, batch.page.ids.device
        found = self.encode(batch.pictures) if batch.pictures else []
        codes = [found[i] for i, _ in batch.codes]
        drawn = torch.cat([self.noised("image", x1, generator) for x1 in codes]) if codes else None
        places = torch.nonzero(page.labels.flatten() != IGNORE).squeeze(1)
        words = page.labels.flatten()[places]
        if len(words):  # the token before each slot predicts it
            noised = torch.cat([self.noised("text", x1, generator) for x1 in words.split(self.config.slots)])
            page = dataclasses.replace(page, ids=page.ids.flatten().index_copy(0, places + 1, noised)
                                       .view_as(page.ids))
        hidden = self.forward_page(page, batch.views, drawn)
        none = torch.zeros(0, device=device)
        text = discrete_flow.cross_entropy(self.head(pick(hidden, page.tokens, places)), words) if len(words) else none
        image = self.code_error(pick(hidden, page.tokens, page.questions), torch.cat(codes)) if codes else none
        return text, image

    def noised(self, kind: Literal["text", "image"], x1: Tensor, generator: torch.Generator) -> Tensor:
        """x_t (n,) at a uniform time."""
        draw = partial(torch.rand, generator=generator, device=generator.device)
        t, uniform = draw((1,)), draw((len(x1),))
        return self.path(kind).corrupt(x1, t.to(x1.device), uniform.to(x1.device))

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        found = dict(zip(("text", "image"), self.errors(batch, generator), strict=True))
        found = {k: v for k, v in found.items() if len(v)}
        return Losses({k: v.sum() for k, v in found.items()},
                      {k: torch.tensor(float(len(v)), device=v.device) for k, v in found.items()},
                      {"text": self.config.text_weight, "image": self.config.image_weight})

    @torch.no_grad()
    def score(self, documents: Sequence[Document], *, seed: int = 0) -> StepLogProbs:
        """Log-probs of the targets' clean tokens (text slots and codes, in the order of the document), each target
        noised once at a random time: minus the terms of the loss for the same seed."""
        values: list[Tensor] = []
        kinds: list[list[str]] = []
        for document in documents:
            written = [self.with_target(document, i) for i, p in enumerate(document) if p.target]
            batch = self.lay_out(written).to(self.device)
            text, image = self.errors(batch, torch.Generator().manual_seed(seed))
            # packing may change the order of sequences
            parts: dict[int, tuple[Tensor, str]] = {}
            words, codes = iter(text.split(self.config.slots)), iter(image)
            for n in (n for row in self.bins(written) for n in row):
                count = len(written[n][0].questions)
                parts[n] = (torch.stack([next(codes) for _ in range(count)]), "code") if count else \
                    (next(words), "text")
            values.append(-torch.cat([parts[n][0] for n in range(len(written))]))
            kinds.append([kind for n in range(len(written)) for kind in [parts[n][1]] * len(parts[n][0])])
        return StepLogProbs(values, kinds)

    # -- generating ---------------------------------------------------------------------------------------------------

    def program(self, document: Document, sampling: Sampling, generator: torch.Generator, emit: Emit) -> Program:
        return self.fill(document, sampling, generator, emit)

    @torch.no_grad()
    def refine(self, documents: Sequence[Document], sampling: Sampling | None = None, *,
               seed: int = 0) -> list[Document]:
        """Correct the targets of filled documents: the same steps, but from what stands there instead of noise. With
        `sampling.start` > 0 they begin at that time of the path."""
        sampling = sampling or self.default_sampling()
        return self.finish({i: self.fill(d.prompt(), sampling, torch.Generator().manual_seed(seed),
                                         lambda event: None, draft=d) for i, d in enumerate(documents)})

    def fill(self, document: Document, sampling: Sampling, generator: torch.Generator, emit: Emit,
             draft: Document | None = None) -> Program:
        """One target after the other. Contexts of guidance as training drops: `no_text` has pads in place of all
        texts, `no_image` no features."""
        pieces = list(document)
        for i, piece in enumerate(document):
            if not piece.target:
                if isinstance(piece, Image) and piece.pixels is None:
                    raise ValueError(f"expected pixels in the given image (piece {i}), got none; fix: make it a target")
                continue
            known = Document((*pieces[:i], piece))
            start = None if draft is None else draft.pieces[i]
            if isinstance(piece, Image):
                contexts: Any = {name: self.before(known, i, drop) for name, drop in DROPS.items()}
                if isinstance(start, Image) and start.pixels is not None:
                    picture = self.views(torch.from_numpy(start.pixels))[1].to(self.device)
                    contexts["draft"] = self.encode([picture])[0]
                _, _, pixels = yield from self._draw(piece, i, contexts, sampling, generator, emit, False)
                pieces[i] = piece.replace(pixels=pixels.cpu().numpy())
            else:
                self.check_spelt(piece)
                ids = yield from self.answered(known, i, start, sampling, generator)
                pieces[i] = self._spelt(piece, ids)
                if not isinstance(piece, Boxes):
                    emit(Event("text", i, pieces[i].text))  # type: ignore[attr-defined]
        return Document(tuple(pieces), document.task, document.meta)

    def answered(self, document: Document, index: int, draft: Piece | None, sampling: Sampling,
                 generator: torch.Generator) -> Generator[Any, Any, list[int]]:
        """The ids before the first end mark."""
        s, gap = self.before(document, index), self.frame_at(document.pieces, index).gap
        self.add_answer(s.writer, document, index, [] if draft is None else self.spell(draft, gap))
        chance = Chance.draw(sampling.evaluations, self.config.slots, generator)
        x = self.path("text").prior(chance.start.to(self.device))
        if draft is not None:
            x = torch.tensor([i for i in s.writer.labels if i != IGNORE], device=self.device)
        tokens, plain = sampling.text, dataclasses.replace(sampling, guidance=Guidance())
        found = yield from self.walk("text", {"full": s}, x, chance, tokens, plain, None)
        ids = found.tolist()
        ids = ids[: ids.index(self.marks.end)] if self.marks.end in ids else ids
        return ids[: tokens.max_tokens]

    def paint(self, grid: Grid, contexts: dict[str, Any], sampling: Sampling,  # type: ignore[override]
              generator: torch.Generator, index: int, emit: Emit, more: bool) -> Steps:
        draft = contexts.pop("draft", None)
        for s in contexts.values():
            self.write_drawn(s.writer, 0, grid)
        chance = Chance.draw(sampling.evaluations, grid[0] * grid[1], generator)
        x = self.path("image").prior(chance.start.to(self.device)) if draft is None else draft

        def show(x1: Tensor) -> Generator[Any, Any, None]:
            emit(Event("partial", index, (yield Develop(x1, grid))))

        return (yield from self.walk("image", contexts, x, chance, sampling.codes, sampling, show))

    def walk(self, kind: Literal["text", "image"], contexts: dict[str, Sequenced], x: Tensor, chance: Chance,
             tokens: TokenSampling, sampling: Sampling, show: Any) -> Steps:
        """Tokens (n,) from x: `sampling.evaluations` steps with the random numbers of `chance`, from `sampling.start`
        on."""
        times = schedule(sampling.evaluations, sampling.shift, sampling.start)
        chain = discrete_flow.euler(self.path(kind), x, times, chance)
        x, t = next(chain)
        for k in range(sampling.evaluations):
            names = list(dict.fromkeys(["full", *(b.context for b in sampling.guidance.at(t).active(t))]))
            answers = yield Guess([contexts[n] for n in names], x)
            scores = next_token.guide(dict(zip(names, answers, strict=True)), sampling.guidance, t)
            x1 = next_token.choose(next_token.log_probs(scores, tokens),
                                   chance.posterior[k] if tokens.temperature > 0 else None)
            try:
                x, t = chain.send(x1)
            except StopIteration as stop:
                return stop.value
            if show and sampling.partial and k % sampling.partial == 0:
                yield from show(x1)
        raise AssertionError("the chain is longer than its times")

    def runners(self, commits: list[Any]) -> dict[str, Any]:
        return super().runners(commits) | {"guess": self._run_guesses}

    def _run_guesses(self, works: Sequence[Guess]) -> list[list[Tensor]]:
        rows = [(s, w.x) for w in works for s in w.sequences]
        unseen = [s for s, _ in rows if s.views and s.features is None]
        if unseen:
            seen = self.see([v.to(self.device) for s in unseen for v in s.views])
            counts = [sum(self.feature_count(v) for v in s.views) for s in unseen]
            for s, features in zip(unseen, seen.split(counts), strict=True):
                s.features = features
        page = Page.of([[s.writer] for s, _ in rows]).to(self.device)
        features = [s.features for s, _ in rows if s.features is not None]
        codes = [x for s, x in rows if s.writer.questions]
        words = [x for s, x in rows if not s.writer.questions]
        places = torch.nonzero(page.labels.flatten() != IGNORE).squeeze(1)
        if words:
            page.ids = page.ids.flatten().index_copy(0, places + 1, torch.cat(words)).view_as(page.ids)
        drawn = self.code_tokens(torch.cat(codes)) if codes else None
        hidden = self.trunk(self.states(page, torch.cat(features) if features else None, drawn), page.tokens, self.mask)
        text = iter(self.head(pick(hidden, page.tokens, places)).float().split([len(x) for x in words] or [0]))
        image = iter(self.answer(pick(hidden, page.tokens, page.questions)).split([len(x) for x in codes] or [0]))
        answers = iter([next(image if s.writer.questions else text) for s, _ in rows])
        return [[next(answers) for _ in w.sequences] for w in works]


def _guided(scale: float, evaluations: int) -> Sampling:
    return Sampling(evaluations=evaluations, guidance=Guidance(branches=(Branch(context="no_text", scale=scale),)))
