"""A tokenizer of causal semantic codes with the generator that draws from its embeddings, trained on documents with
pictures: what SEED takes. A tool for systems, not a paper; the losses are those of SEED (arXiv 2310.01218, section 3).

    contrast    last query against the text, temperature-scaled cosines of a batch, label smoothing     [Q-Former, text]
    quantize    5 (|sg rows - z|^2 + 0.25 |rows - sg z|^2)                                              [codes]
    recon       2 (1 - cos(semantics, states))                                                          [codes]
    image       0.5 |embedding - teacher|^2                                                             [codes]
    flow        velocities of latents under the embedding, which it does not move                       [detokenizer]

- A stage that trains nothing of what stands in brackets leaves the term out, so stages cost what they train. The paper
  has three: the Q-Former by contrast, the codes behind it, and a generator that somebody else has trained.
- Only the last query meets the text: those before it learn by what it reads of them.

Differs from the paper: the text is read by a small causal transformer of its own; the teacher is the tokenizer's own
tower, its features averaged over `pool` x `pool` parts of the picture; the generator is trained on embeddings of codes,
so that it knows their errors; without a pretrained Q-Former to start from, recipes let the codes move it too.
"""
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.document import Document, Image, Text
from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.experts import Coupling
from diptych.parts.interleave import Marks, Page, Writer
from diptych.parts.masks import packed_causal
from diptych.parts.positions import Rope
from diptych.parts.semantic_1d import WEIGHTS, SemanticTokenizer, SemanticTokenizerConfig
from diptych.parts.trunks import Trunk
from diptych.parts.vocabulary import Vocabulary
from diptych.systems.base import Losses, System
from diptych.systems.detokenizer import Detokenizer, DetokenizerConfig, SemanticCodes
from diptych.systems.seed import Seed


@dataclass(frozen=True, kw_only=True)
class SemanticCodecConfig:
    codec: SemanticTokenizerConfig
    detokenizer: DetokenizerConfig
    pool: int  # rows and columns of the teacher's averaged features
    block: BlockConfig  # of the transformer that reads texts
    depth: int
    vocabulary_size: int = 1024
    tokenizer: str = "zoo/tokenizer"
    common_width: int = 256  # of the space in which query and text meet
    temperature: float = 0.07  # to begin with
    smoothing: float = 0.1
    contrast_weight: float = 1.0
    quantize_weight: float = WEIGHTS["quantize"]
    recon_weight: float = WEIGHTS["recon"]
    image_weight: float = WEIGHTS["image"]
    flow_weight: float = 1.0

    def __post_init__(self) -> None:
        width = self.pool**2 * self.codec.vision.width
        if self.codec.embedding_width != width:
            raise ValueError(f"expected codec.embedding_width to be {width}, as pool and the tower imply, "
                             f"got {self.codec.embedding_width}")


class TextReader(nn.Module):
    """Texts of a page, one per row -> the state of the last token of each, in the common space (b, e)."""

    def __init__(self, c: SemanticCodecConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(c.vocabulary_size, c.block.width)
        self.trunk = Trunk(c.block, Coupling.dense(c.depth), Rope(c.block.head_dim))
        self.project = nn.Linear(c.block.width, c.common_width)
        normal_weights(self.modules())

    def forward(self, page: Page) -> Tensor:
        valid = page.tokens.valid()
        hidden = self.trunk([self.embed(page.ids[valid])], page.tokens, packed_causal)[0]
        return self.project(hidden[valid.sum(1).cumsum(0) - 1])


@dataclass
class Batch:
    """Pictures (b, 3, h, w) of one size in [-1, 1], and a text to each."""

    pictures: Tensor
    texts: Page

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.pictures.to(device), self.texts.to(device))

    @property
    def groups(self) -> list[Tensor]:
        return [self.pictures]

    @property
    def num_tokens(self) -> int:
        return int(self.texts.tokens.valid().sum())


class SemanticCodec(System):
    Config = SemanticCodecConfig
    config: SemanticCodecConfig

    def __init__(self, config: SemanticCodecConfig) -> None:
        super().__init__()
        c = self.config = config
        self.vocabulary = Vocabulary(c.tokenizer)
        self.codec = SemanticTokenizer(c.codec)
        self.codec.vision.requires_grad_(False)
        self.detokenizer = Detokenizer(c.detokenizer)
        self.text = TextReader(c)
        self.project = nn.Linear(c.codec.qformer.width, c.common_width)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(c.temperature)))

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> SemanticCodecConfig:
        """For tests: seconds on a CPU."""
        seed = Seed.tiny()
        codec = dataclasses.replace(seed.codec, embedding_width=4 * seed.codec.vision.width)
        network = dataclasses.replace(seed.detokenizer.network, condition_width=seed.codec.vision.width)
        return SemanticCodecConfig(codec=codec, detokenizer=dataclasses.replace(seed.detokenizer, network=network),
                                   pool=2, block=_block(32, 2, 64), depth=1, common_width=32)

    @classmethod
    def small(cls) -> SemanticCodecConfig:
        """Tokenizer and detokenizer of SEED's `small`."""
        seed = Seed.small()
        return SemanticCodecConfig(codec=seed.codec, detokenizer=seed.detokenizer, pool=4, block=_block(128, 4, 256),
                                   depth=3, common_width=128)

    @classmethod
    def paper(cls) -> SemanticCodecConfig:
        """The published tokenizer, taught by its tower's mean feature. A reader of texts as large as BERT-base."""
        seed = Seed.paper()
        codec = dataclasses.replace(seed.codec, embedding_width=seed.codec.vision.width)
        network = dataclasses.replace(seed.detokenizer.network, condition_width=codec.embedding_width // 4)
        return SemanticCodecConfig(codec=codec, detokenizer=dataclasses.replace(seed.detokenizer, network=network),
                                   pool=1, block=_block(768, 12, 3072), depth=12)

    # -- training -----------------------------------------------------------------------------------------------------

    def collate(self, documents: Sequence[Document]) -> Batch:
        """Of every document its one picture and its last text, such as caption or prompt."""
        pictures, rows = list[Tensor](), list[list[Writer]]()
        marks = Marks.of(self.vocabulary)
        for document in documents:
            found = [p.pixels for p in document.of(Image) if p.pixels is not None]
            texts = [p.text for p in document.of(Text) if p.text]
            if len(found) != 1 or not texts:
                raise ValueError(f"expected documents of one picture and a text, got {len(found)} pictures and "
                                 f"{len(texts)} texts in one of task {document.task!r}; fix: train on captions and "
                                 "drawings")
            pictures.append(torch.from_numpy(found[0]))
            w = Writer(marks)
            w.text(self.vocabulary.encode(texts[-1]))
            rows.append([w])
        if len(sizes := {tuple(p.shape) for p in pictures}) > 1:
            raise ValueError(f"expected pictures of one size in a batch, got {len(sizes)} sizes; "
                             "fix: give the data source a size")
        return Batch(torch.stack(pictures), Page.of(rows))

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        c, codec = self.config, self.codec
        codes = [codec.encode_task, codec.quantizer, codec.decode_task, codec.image, codec.project]
        features = codec.features(codec.prepare(batch.pictures))
        states = codec.qformer(features)
        terms: dict[str, Tensor] = {}
        if _trains(codec.qformer, self.text, self.project):
            terms["contrast"] = self.contrast(states[:, -1], batch.texts)
        learns = _trains(*codes)
        if learns or _trains(self.detokenizer):
            follows = learns and torch.is_grad_enabled() and codec.follows
            found = codec(states, generator if follows else None)
            if learns:
                terms |= {k: v[None] for k, v in codec.losses(found, self.teach(features)).items()}
            if _trains(self.detokenizer):
                terms["flow"] = self.detokenizer.errors(batch.pictures, found.embedding.detach(), generator)
        # means over all elements count as one per picture
        sums = {k: v.sum() * (len(states) if v.shape == (1,) else 1) for k, v in terms.items()}
        counts = {k: float(len(states) if v.shape == (1,) else v.numel()) for k, v in terms.items()}
        weights = {k: getattr(c, f"{k}_weight") for k in ("contrast", *WEIGHTS, "flow")}
        return Losses(sums, {k: torch.tensor(v, device=states.device) for k, v in counts.items()}, weights)

    def contrast(self, last: Tensor, texts: Page) -> Tensor:
        """Cross-entropies (b,) of finding the text of a picture and the picture of a text within the batch, averaged;
        `last` (b, d) are states of the last query."""
        a, b = (F.normalize(x.float(), dim=-1) for x in (self.project(last), self.text(texts)))
        logits = a @ b.T * self.log_scale.exp().clamp(max=100)
        target = torch.arange(len(a), device=a.device)
        both = [F.cross_entropy(x, target, reduction="none", label_smoothing=self.config.smoothing)
                for x in (logits, logits.T)]
        return torch.stack(both).mean(0)

    def teach(self, features: Tensor) -> Tensor:
        """The embedding of a picture to reach: its features (b, m, f) averaged over parts, (b, pool^2 f), part by
        part."""
        side = self.config.codec.cells
        cells = features[:, -side * side:].detach().float().transpose(1, 2).unflatten(2, (side, side))
        return F.adaptive_avg_pool2d(cells, self.config.pool).flatten(2).transpose(1, 2).flatten(1)

    # -- use ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, images: Tensor, batch: int = 64) -> Tensor:
        """Pictures (b, 3, h, w) in [-1, 1] through their codes and back, clamped: what the codes say, drawn again."""
        codes, size = SemanticCodes(self.codec, self.detokenizer), images.shape[2:]
        return torch.cat([codes.decode(codes.encode(p.to(self.device)), *size) for p in images.split(batch)])


def _trains(*modules: nn.Module) -> bool:
    return any(p.requires_grad for m in modules for p in m.parameters())


def _block(width: int, heads: int, hidden: int) -> BlockConfig:
    return BlockConfig(width=width, heads=heads, kv_heads=heads, head_dim=width // heads, hidden=hidden, qk_norm=True)
