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
from itertools import count
from pathlib import Path as File
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diptych.document import Document, Image, Piece
from diptych.objectives import discrete_flow, next_token
from diptych.objectives.discrete_flow import Chance, Kinetic, MetricPath, MixturePath, Path
from diptych.objectives.flow import schedule
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.masked_token import Ask
from diptych.objectives.next_token import TokenSampling
from diptych.parts.interleave import Frame, Writer
from diptych.parts.pictures import crop_to, pad_square
from diptych.parts.trunks import pick
from diptych.parts.turns import Turns
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.base import Emit, Losses, Sampling
from diptych.systems.bidirectional import Bidirectional, Show
from diptych.systems.coded import Steps
from diptych.systems.janus import Janus, JanusConfig
from diptych.systems.packed import Batch
from diptych.systems.works import Grid, Sequenced

TURNS = Turns(user=("User:", "\n\n"), assistant=("Assistant:", ""), between="")  # of the released prompts
CODEBOOK = "quantizer.codebook.weight"


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


class Fudoki(Bidirectional):
    Config = FudokiConfig
    config: FudokiConfig

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
                table = getattr(self.network, name).weight
                grown = nn.Embedding(len(table) + 1, table.shape[1])
                with torch.no_grad():  # rows keep their scale, and the new one has it too
                    grown.weight[:-1] = table
                    grown.weight[-1] *= table.std()
                setattr(self.network, name, grown)
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
    filling = property(lambda self: self.config.network.pad)  # type: ignore[assignment]

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

    # -- training -----------------------------------------------------------------------------------------------------

    def errors(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cross-entropies of the text slots and of the codes, in page order; one time per target."""
        page, device = batch.page, batch.page.ids.device
        found = self.encode(batch.pictures) if batch.pictures else []
        codes = [found[i] for i, _ in batch.codes]
        drawn = torch.cat([self.noised("image", x1, generator) for x1 in codes]) if codes else None
        places = self.answer_places(page)
        words = page.labels.flatten()[places]
        if len(words):
            noised = torch.cat([self.noised("text", x1, generator) for x1 in words.split(self.config.slots)])
            page = dataclasses.replace(page, ids=self.with_words(page, places, noised))
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

    def decisions(self, batch: Batch, writers: Sequence[Writer], generator: torch.Generator,
                  **how: Any) -> list[Tensor]:
        """Of all tokens of the targets, each noised once at a random time: minus the terms of the loss."""
        text, image = self.errors(batch, generator)
        words = iter(text.split(self.config.slots))
        codes = iter(image.split([len(w.questions) for w in writers if w.questions] or [0]))
        return [-next(codes if w.questions else words) for w in writers]

    # -- generating ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refine(self, documents: Sequence[Document], sampling: Sampling | None = None, *,
               seed: int = 0) -> list[Document]:
        """Correct the targets of filled documents: the same steps, but from what stands there instead of noise. With
        `sampling.start` > 0 they begin at that time of the path."""
        sampling = sampling or self.default_sampling()
        return self.finish({i: self.fill(d.prompt(), sampling, torch.Generator().manual_seed(seed),
                                         lambda event: None, self.drafts(d)) for i, d in enumerate(documents)})

    def drafts(self, document: Document) -> dict[int, Tensor]:
        """The tokens of the targets that have content."""
        out: dict[int, Tensor] = {}
        for i, piece in enumerate(document):
            if piece.target and isinstance(piece, Image) and piece.pixels is not None:
                out[i] = self.encode([self.views(torch.from_numpy(piece.pixels))[1].to(self.device)])[0]
            elif piece.target and not piece.empty:
                ids = self.slot_ids(self.spell(piece, self.frame_at(document.pieces, i).gap))
                out[i] = torch.tensor(ids, device=self.device)
        return out

    def answered(self, document: Document, index: int, draft: Tensor | None, sampling: Sampling,
                 generator: torch.Generator) -> Generator[Any, Any, list[int]]:
        s = self.before(document, index)
        self.add_answer(s.writer, document, index, [])
        chance = Chance.draw(sampling.evaluations, self.config.slots, generator)
        x = self.path("text").prior(chance.start.to(self.device)) if draft is None else draft
        plain = dataclasses.replace(sampling, guidance=Guidance())
        found = yield from self.walk("text", {"full": s}, x, chance, sampling.text, plain, None)
        return self.cut(found.tolist(), sampling)

    def paint(self, grid: Grid, contexts: dict[str, Any], sampling: Sampling,  # type: ignore[override]
              generator: torch.Generator, index: int, emit: Emit, more: bool) -> Steps:
        draft = contexts.pop("draft", None)
        for s in contexts.values():
            self.write_drawn(s.writer, len(s.pictures), grid)
        chance = Chance.draw(sampling.evaluations, grid[0] * grid[1], generator)
        x = self.path("image").prior(chance.start.to(self.device)) if draft is None else draft
        show = self.partial_pictures(grid, sampling, index, emit)
        return (yield from self.walk("image", contexts, x, chance, sampling.codes, sampling, show))

    def walk(self, kind: Literal["text", "image"], contexts: dict[str, Sequenced], x: Tensor, chance: Chance,
             tokens: TokenSampling, sampling: Sampling, show: Show | None) -> Steps:
        """Tokens (n,) from x: `sampling.evaluations` steps with the random numbers of `chance`, from `sampling.start`
        on."""
        times = schedule(sampling.evaluations, sampling.shift, sampling.start, sampling.end)
        kinds = {"text": "posterior text", "image": "posterior code"}
        chain = _guessing(discrete_flow.euler(self.path(kind), x, times, chance), tokens, chance, kinds[kind])
        return (yield from self.follow(chain, contexts, sampling.guidance, show))


def _guessing(chain: Generator[tuple[Tensor, float], Tensor, Tensor], tokens: TokenSampling,
              chance: Chance, kind: str) -> Generator[Ask, Tensor, Tensor]:
    """The chain with its posterior samples drawn from logits, as decisions of that kind."""
    x, t = next(chain)
    guess = None
    for k in count():
        logits = yield x, t, guess
        guess = next_token.pick(next_token.log_probs(logits, tokens),
                                chance.posterior[k] if tokens.temperature > 0 else None, kind)
        try:
            x, t = chain.send(guess)
        except StopIteration as stop:
            return stop.value
    raise AssertionError("unreachable")


def _guided(scale: float, evaluations: int) -> Sampling:
    return Sampling(evaluations=evaluations, guidance=Guidance(branches=(Branch(context="no_text", scale=scale),)))
