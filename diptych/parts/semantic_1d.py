"""Tokenizer of causal 1-D semantic codes: a picture becomes a short sequence of words that mean what it shows, and
these become an embedding of the whole picture again (SEED v2, arXiv 2310.01218). Pixels are drawn from that embedding.

    features    norm(tower(pixels))                                        (b, m, f)
    states      causal Q-Former(features)                                  (b, q, d)
    codes       nearest rows to  z = encode_task(states)                   (b, q)
    expanded    decode_task(code vectors)                                  (b, q, d)
    semantics   blocks(expanded + positions)           towards states      1 - cos
    embedding   head(blocks'(expanded + positions'))   towards a teacher's embedding of the picture, squared error

The head narrows every token and joins them (the released weights), or is a Q-Former of one query (the released
training). Shape letters: b pictures, m features, q codes of a picture, d width, c width of a code, e of the embedding.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.qformer import QFormer, QFormerConfig
from diptych.parts.quantize import CodebookConfig, CodeLayout, LossWeights, Quantized, VectorConfig
from diptych.parts.towers import Tower, TowerConfig
from diptych.parts.vision import Layer, VisionConfig, VisionTransformer

WEIGHTS = {"quantize": 5.0, "image": 0.5, "recon": 2.0}  # of the loss terms (SEED, stage 2)
EVA = TowerConfig(width=1408, mlp_width=6144, layers=39, heads=16, patch=14, gelu="exact", class_token=True)
# both terms of VQ with the weights that the released code gives them: 0.25 on the one that moves the rows
LEGACY = LossWeights(codebook=0.25, commitment=1.0)


@dataclass(frozen=True, kw_only=True)
class SemanticTokenizerConfig:
    """`narrow`: widths of the matrices that narrow every token, without biases; empty where a Q-Former (`reverse`)
    reads the tokens instead. `semantic_layers` of 0 leave that branch out."""

    vision: TowerConfig | VisionConfig = EVA  # ViT-g/14 at 224 px without its last block
    vision_eps: float = 1e-5
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of colours in [0, 1]
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    qformer: QFormerConfig = field(default_factory=lambda: QFormerConfig(causal=True))
    quantizer: VectorConfig = field(default_factory=lambda: VectorConfig(
        codebook=CodebookConfig(values=8192, width=32, norm="none"), weights=LEGACY))
    semantic_layers: int = 4
    image_layers: int = 4
    heads: int = 12  # of both branches
    narrow: tuple[int, ...] = (256, 128, 32)
    reverse: QFormerConfig | None = None
    embedding_width: int = 1024  # CLIP ViT-H/14

    def __post_init__(self) -> None:
        for name in ("narrow", "mean", "std"):  # lists come from YAML
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if bool(self.narrow) == (self.reverse is not None):
            raise ValueError(f"expected either narrow or reverse, got {self.narrow} and {self.reverse}")
        if self.vision.width != self.qformer.feature_width:
            raise ValueError(f"expected qformer.feature_width to be that of the tower, {self.vision.width}, "
                             f"got {self.qformer.feature_width}")
        if self.reverse is not None and (self.reverse.queries, self.reverse.feature_width) != (1, self.qformer.width):
            raise ValueError(f"expected a reverse Q-Former of one query over states of {self.qformer.width}, got "
                             f"{self.reverse.queries} and {self.reverse.feature_width}")

    @property
    def count(self) -> int:
        """Codes of a picture."""
        return self.qformer.queries

    @property
    def cells(self) -> int:
        """Rows and columns of patches in a picture as the tower reads it."""
        return self.vision.side if isinstance(self.vision, TowerConfig) else self.vision.max_side


class Semantics(NamedTuple):
    """A training pass: states (b, q, d) of the queries, what the branches make of their codes, and what the quantizer
    says (its map is (b, c, 1, q))."""

    states: Tensor
    semantics: Tensor | None
    embedding: Tensor
    quantized: Quantized


class Branch(nn.Module):
    """Positions and pre-norm blocks in which all tokens see each other: (b, q, d) -> the same shape, no last norm."""

    def __init__(self, count: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(count, width) * 0.02)
        shape = VisionConfig(width=width, mlp_width=4 * width, num_layers=layers, num_heads=heads, gelu="exact")
        self.layers = nn.ModuleList(Layer(shape) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions
        for layer in cast(Sequence[Layer], self.layers):
            x = layer(x, None)
        return x


def _task(inside: int, middle: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, middle), nn.Tanh(), nn.Linear(middle, outside))


def _narrow(width: int, widths: Sequence[int]) -> nn.Sequential:
    parts: list[nn.Module] = []
    for before, after in zip((width, *widths), widths, strict=False):
        parts += [nn.Linear(before, after, bias=False), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class SemanticTokenizer(nn.Module):
    """Pictures (b, 3, H, W), as `prepare` gives them, -> codes (b, q) -> embeddings (b, e)."""

    def __init__(self, config: SemanticTokenizerConfig) -> None:
        super().__init__()
        c, q, width = config, config.qformer, config.quantizer.width
        self.config = config
        self.vision = Tower(c.vision) if isinstance(c.vision, TowerConfig) else VisionTransformer(c.vision)
        self.vision_norm = nn.LayerNorm(c.vision.width, c.vision_eps)
        self.qformer = QFormer(q)
        self.encode_task = _task(q.width, q.width, width)
        self.quantizer = c.quantizer.build()
        self.decode_task = _task(width, width, q.width)
        self.semantic = Branch(q.queries, q.width, c.semantic_layers, c.heads) if c.semantic_layers else None
        self.image = Branch(q.queries, q.width, c.image_layers, c.heads)
        self.narrow = _narrow(q.width, c.narrow) if c.narrow else None
        self.reverse = None if c.reverse is None else QFormer(c.reverse)
        inside = c.narrow[-1] * q.queries if c.reverse is None else c.reverse.width
        self.project = nn.Linear(inside, c.embedding_width)

    # -- pictures to codes --------------------------------------------------------------------------------------------

    def prepare(self, pictures: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) in [-1, 1] of any size -> what the tower reads: scaled to its square, not cropped,
        with mean and deviation of every colour as it was trained."""
        c, x = self.config, pictures.float()
        size = (c.cells * c.vision.patch,) * 2
        if tuple(x.shape[2:]) != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (c.mean, c.std))
        return ((x + 1) / 2 - mean) / std

    def features(self, pixels: Tensor) -> Tensor:
        """What the tower sees, normalised: (b, m, f)."""
        patch = self.config.vision.patch
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % patch or pixels.shape[3] % patch:
            raise ValueError(f"expected images of shape (b, 3, h, w) with h, w multiples of {patch}, "
                             f"got {tuple(pixels.shape)}; fix: resize or pad the pictures")
        return self.vision_norm(self.vision.encode(pixels.to(self.vision_norm.weight.dtype)))

    def states(self, pixels: Tensor) -> Tensor:
        """The queries after they looked at the picture: (b, q, d)."""
        return self.qformer(self.features(pixels))

    def code_map(self, states: Tensor) -> Tensor:
        """States (b, q, d) as the quantizer takes them, a map (b, c, 1, q)."""
        return self.encode_task(states).transpose(1, 2)[:, :, None]

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes (b, q) int64."""
        return self.quantizer(self.code_map(self.states(pixels))).codes[:, 0]

    # -- codes to what they mean --------------------------------------------------------------------------------------

    def code_vectors(self, codes: Tensor) -> Tensor:
        """The vectors of single codes of any shape: (...) -> (..., c) float32."""
        return self.quantizer.vectors(codes)

    def expand(self, vectors: Tensor) -> Tensor:
        """Code vectors (b, q, c) -> (b, q, d)."""
        return self.decode_task(vectors.to(self.project.weight.dtype))

    def semantics(self, expanded: Tensor) -> Tensor:
        """The states again, up to their lengths: (b, q, d)."""
        if self.semantic is None:
            raise ValueError("expected a tokenizer with a semantic branch, got none; fix: set semantic_layers")
        return self.semantic(expanded)

    def embedding(self, expanded: Tensor) -> Tensor:
        """The embedding of the whole picture, (b, e)."""
        x = self.image(expanded)
        if self.reverse is not None:
            return self.project(self.reverse(x)[:, 0])
        assert self.narrow is not None
        return self.project(self.narrow(x).flatten(1))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (b, q) -> the embedding of the picture (b, e)."""
        if codes.ndim != 2 or codes.shape[1] != self.config.count:
            raise ValueError(f"expected codes of shape (b, {self.config.count}), got {tuple(codes.shape)}")
        return self.embedding(self.expand(self.code_vectors(codes)))

    @property
    def follows(self) -> bool:
        """Whether code vectors are moving averages."""
        book = self.config.quantizer.codebook
        return isinstance(book, CodebookConfig) and book.decay is not None

    def layout(self) -> CodeLayout:
        """The codes of any picture: one row."""
        return self.quantizer.layout((1, self.config.count))

    # -- training -----------------------------------------------------------------------------------------------------

    def forward(self, states: Tensor, generator: torch.Generator | None = None) -> Semantics:
        """From states through codes to both branches, with gradient. With a generator, a codebook of moving averages
        follows."""
        z = self.code_map(states)
        quantized = self.quantizer(z) if generator is None else self.quantizer.follow(z, generator)
        expanded = self.expand(quantized.vectors[:, :, 0].transpose(1, 2))
        semantics = None if self.semantic is None else self.semantic(expanded)
        return Semantics(states, semantics, self.embedding(expanded), quantized)

    def losses(self, found: Semantics, target: Tensor) -> dict[str, Tensor]:
        """Terms without `WEIGHTS`, scalars float32, means over all elements, for the embeddings (b, e) of a teacher.
        The states are a target here: what moves them comes through the codes."""
        terms = {"quantize": torch.stack(list(found.quantized.losses.values())).sum(),
                 "image": F.mse_loss(found.embedding.float(), target.float())}
        if found.semantics is not None:
            alike = F.cosine_similarity(found.semantics.float(), found.states.detach().float(), dim=-1)
            terms["recon"] = (1 - alike).mean()
        return terms
