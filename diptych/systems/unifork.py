"""UniFork: lower layers for both tasks, above them one branch that understands and one that draws (arXiv 2506.17202).

    shared   layers 0 .. S - 1 serve every sample
    branch   layers S .. L - 1 and the last norm exist twice; a sample takes one of them with all of its tokens
    picture  BOI, one token per cell, EOI: projector(v_1 + ... + v_D), v_d the vector of the cell's d-th residual code
    text  = head(h)      codes = depth transformer(h of the token before the cell; v_1, ..., v_D)
    L = w_text CE(text) / n_text + w_image CE(codes) / (n_cells D)

- Pictures are read and drawn through the same codes; everything is causal, with one position per token.
- Parameters per token are those of the dense model; what follows the fork can be tuned for one task without touching
  the other.
- Guidance at every depth: l = l_u + w (l_c - l_u), w = 4, the unconditional prompt naming defects (`negative`).

`shared` = depth is the dense control, 0 two models that share their embeddings.

Differs from the paper: a document with targets of both kinds is learnt as two samples, and filled target by target,
each by its own branch after all that precedes it; texts stand between marks instead of the chat template. The public
code trains the first 256 cells of a picture only, whatever its size; here all count.
"""
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diptych.objectives import next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.depth import DepthConfig, DepthTransformer
from diptych.parts.experts import Coupling
from diptych.parts.interleave import Layout, Marks, Page, Writer
from diptych.parts.pictures import crop_to, pad_square
from diptych.parts.positions import Rope
from diptych.parts.quantize import CodebookConfig, LossWeights, ResidualConfig
from diptych.parts.tokens import Modality, Mode
from diptych.parts.towers import TowerConfig
from diptych.parts.trunks import Trunk
from diptych.parts.vocabulary import Vocabulary
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.base import Sampling, Work
from diptych.systems.branched import Branched
from diptych.systems.coded import Steps
from diptych.systems.works import Deepen, Encode, Grid, Read, Reader


@dataclass(frozen=True, kw_only=True)
class UniForkConfig:
    block: BlockConfig
    depth: int  # layers that a token goes through
    shared: int  # of them, those before the fork
    rope_theta: float = 1e6
    vocabulary_size: int
    tie_embeddings: bool = False
    tokenizer: str = ""  # a tokenizer.json, zoo/NAME, or a file of the model's folder
    ends: tuple[int, int] | None = None  # ids of the marks that open and close a text; None = from the tokenizer
    codec: VQTokenizerConfig
    head: DepthConfig
    picture: tuple[int, int] = (384, 384)  # pixels of pictures, read or drawn by default
    negative: str = ""  # what guidance (and training without the text) reads in place of a text
    text_weight: float = 1.0
    image_weight: float = 1.0
    drop_text: float = 0.1  # condition dropping for guidance
    drop_feature: float = 0.0
    row: int = 4096  # tokens of a packed row at least (longer documents make longer rows)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.ends is not None:
            object.__setattr__(self, "ends", tuple(self.ends))  # lists come from YAML
        q, h = self.codec.quantizer, self.head
        if not isinstance(q, ResidualConfig) or not q.depth:
            raise ValueError(f"expected a residual quantizer with a depth, got {type(q).__name__}")
        codes = (q.depth, getattr(q.codebook, "values", 0), q.width, self.block.width)
        if codes != (h.depth, h.values, h.code_width, h.hidden_width):
            raise ValueError(f"expected head.depth, values, code_width and hidden_width to be {codes}, "
                             f"got {(h.depth, h.values, h.code_width, h.hidden_width)}")


class UniFork(Branched):
    Config = UniForkConfig
    config: UniForkConfig
    layout = Layout(spread=True)

    def __init__(self, config: UniForkConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        c = self.config = config
        if vocabulary is None and c.tokenizer:
            vocabulary = self.read_vocabulary(c, c.tokenizer)
        self.vocabulary, self.code_shape = vocabulary, (c.head.depth,)
        width = c.block.width
        self.embed, self.edges = nn.Embedding(c.vocabulary_size, width), nn.Embedding(2, width)
        self.trunk = Trunk(c.block, Coupling.fork(c.depth, c.shared), Rope(c.block.head_dim, c.rope_theta))
        self.head = nn.Linear(width, c.vocabulary_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        self.codec = VQTokenizer(c.codec).requires_grad_(False)
        self.projector = nn.Sequential(nn.Linear(c.head.code_width, width), nn.GELU(), nn.Linear(width, width))
        self.depth_head = DepthTransformer(c.head)
        normal_weights(m for part in (self.embed, self.edges, self.trunk, self.head) for m in part.modules())

    # -- sizes --------------------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls) -> UniForkConfig:
        """For tests: seconds on a CPU."""
        side = PyramidConfig(channels=8, channel_mult=(1, 1, 2), blocks=(1,) * 3, attention=(), norm_groups=4)
        book = CodebookConfig(values=64, width=16)  # vectors of length 1: fresh ones differ
        codec = VQTokenizerConfig(encoder=side, decoder=side, latent_channels=16, patch=4,
                                  quantizer=ResidualConfig(codebook=book, depth=2))
        return cls._world(width=64, heads=2, hidden=128, depth=2, codec=codec,
                          head=DepthConfig(depth=2, values=64, code_width=16, hidden_width=64, width=32, inner=32,
                                           heads=2, layers=1))

    @classmethod
    def small(cls) -> UniForkConfig:
        """The world at 64 px, 16 cells of 4 codes, 8 layers of which 4 are shared, about 15M parameters; the tokenizer
        has the shape of the zoo's `rq`."""
        return cls._world(width=256, heads=4, hidden=640, depth=8, codec=VQTokenizerConfig.residual(),
                          head=DepthConfig(values=1024, code_width=16, hidden_width=256, width=256, inner=256, heads=4,
                                           layers=2))

    @classmethod
    def _world(cls, *, width: int, heads: int, hidden: int, depth: int, codec: VQTokenizerConfig,
               head: DepthConfig) -> UniForkConfig:
        return UniForkConfig(
            block=BlockConfig(width=width, heads=heads, kv_heads=heads // 2, head_dim=width // heads, hidden=hidden,
                              qk_norm=True),
            depth=depth, shared=depth // 2, rope_theta=1e4, vocabulary_size=1024, tie_embeddings=True,
            tokenizer="zoo/tokenizer", codec=codec, head=head, picture=(64, 64), row=128, sampling=_guided(2.0))

    @classmethod
    def paper(cls) -> UniForkConfig:
        """Qwen2.5-0.5B with its upper half twice, the tower of VILA-U at 384 px (released scripts)."""
        return UniForkConfig(
            block=BlockConfig(width=896, heads=14, kv_heads=2, head_dim=64, hidden=4864), depth=24, shared=12,
            vocabulary_size=151936, tie_embeddings=True, ends=(151644, 151645), codec=vila_u(), head=DepthConfig(),
            drop_text=0.0, sampling=_guided(4.0, top_k=900, top_p=0.96))

    # -- pieces to tokens ---------------------------------------------------------------------------------------------

    @cached_property
    def marks(self) -> Marks:  # type: ignore[override]
        """Those of pictures are no words: their ids follow the vocabulary's."""
        size, ends = self.config.vocabulary_size, self.config.ends
        if ends is None:
            v = self.need_vocabulary()
            ends = v.start, v.end
        return Marks(*ends, size, size + 1)

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config.picture
        return pad_square(pixels, size[0]) if size[0] == size[1] else crop_to(pixels, *size), crop_to(pixels, *size)

    def write_null(self, w: Writer, ids: list[int]) -> None:
        if self.config.negative:
            w.text(self.need_vocabulary().encode(self.config.negative))

    def write_seen(self, w: Writer, seen: Tensor, coded: Tensor, pictures: list[Tensor], views: list[Tensor]) -> None:
        """A drawn picture has been read by being drawn."""
        if not pictures or pictures[-1] is not coded:
            pictures.append(seen)
            self.write_clean(w, len(pictures) - 1, self.grid(seen))

    def write_clean(self, w: Writer, number: int, grid: Grid) -> None:
        w.code(number, w.plan(grid), drawn=False, mode=Mode.CAUSAL)

    # -- the network --------------------------------------------------------------------------------------------------

    def states(self, page: Page, features: Tensor | None, drawn: Tensor | None) -> list[Tensor]:
        """Embeddings by branch; codes stand where the tokens are cells, whatever their branch."""
        ids, size = page.ids.flatten(), self.config.vocabulary_size
        edge = (ids >= size)[:, None]
        x = torch.where(edge, self.edges((ids - size).clamp_min(0)), self.embed(ids.clamp_max(size - 1)))
        if drawn is not None:
            at = torch.nonzero(page.tokens.modality.flatten() == Modality.CODE).squeeze(1)
            x = x.index_copy(0, at, drawn.to(x.dtype))
        return [x[index] for index in page.tokens.routes(2)]

    def code_tokens(self, codes: Tensor) -> Tensor:
        return self.projector(self.codec.code_vectors(codes).sum(-2).to(self.embed.weight.dtype))

    def code_error(self, hidden: Tensor, codes: Tensor) -> Tensor:
        return next_token.cross_entropy(self.depth_head(hidden, self.codec.code_vectors(codes)), codes)

    def answer(self, hidden: Tensor) -> Tensor:
        """The state itself: the codes of a cell are asked one after the other."""
        return hidden

    # -- drawing ------------------------------------------------------------------------------------------------------

    def _look_at(self, reader: Reader, pixels: Tensor, x: Tensor | None, grid: Grid | None,
                 copy: bool) -> Generator[Work, Any, None]:
        if x is None:
            picture = self.views(pixels)[0]
            codes: Tensor = yield Encode(picture)
            w = self.writer(reader)
            self.write_clean(w, 0, self.grid(picture))
            yield Read(reader, w, codes=[codes])

    def pick_code(self, answers: Mapping[str, Tensor], uniform: Tensor, sampling: Sampling, t: float) -> Steps:
        """Depth by depth, guided at each; all contexts go on with the same code."""
        hidden, codes = torch.cat(list(answers.values())), torch.zeros(0, dtype=torch.long)
        for u in uniform:
            logits = yield Deepen(hidden, codes)
            told = dict(zip(answers, logits.split(1), strict=True))
            scores = next_token.log_probs(next_token.guide(told, sampling.guidance, t), sampling.codes)
            code = next_token.pick(scores, u[None] if sampling.codes.temperature > 0 else None)
            codes = torch.cat((codes, code.cpu()))
        return codes

    def runners(self, commits: list[Callable[[], None]]) -> dict[str, Callable[[Sequence[Any]], Sequence[Any]]]:
        return super().runners(commits) | {"deepen": self._run_deepens}

    def _run_deepens(self, works: Sequence[Any]) -> list[Tensor]:
        out: dict[int, Tensor] = {}
        for known in {len(w.codes) for w in works}:
            numbers = [i for i, w in enumerate(works) if len(w.codes) == known]
            hidden = torch.cat([works[i].hidden for i in numbers])
            vectors = hidden.new_zeros(len(hidden), 0, self.config.head.code_width)
            if known:
                codes = torch.cat([works[i].codes.expand(len(works[i].hidden), known) for i in numbers])
                vectors = self.codec.code_vectors(codes.to(self.device))
            logits = self.depth_head(hidden, vectors)[:, -1].float()
            out |= zip(numbers, logits.split([len(works[i].hidden) for i in numbers]), strict=True)
        return [out[i] for i in range(len(works))]


def vila_u() -> VQTokenizerConfig:
    """The tower of VILA-U: SigLIP-L/16 without its last block, 4 residual codes of one codebook per cell."""
    book = CodebookConfig(values=16384, width=1024, norm="none", decay=0.99, restart=True)
    return VQTokenizerConfig(encoder=TowerConfig(), in_kernel=0, latent_channels=256, quantizer=ResidualConfig(
        codebook=book, depth=4, weights=LossWeights(codebook=0.0, commitment=1.0)))


def _guided(scale: float, **filters: Any) -> Sampling:
    return Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=scale),)),
                    codes=TokenSampling(**filters))
