"""The connector of a serial coupling: from states of a language model to the condition of a generator
(MetaQuery, arXiv 2504.06256, section 3).

    encode, then project    states -> bidirectional encoder -> Linear, GELU, Linear -> norm
    project, then encode    states -> Linear, GELU, Linear -> bidirectional encoder -> norm (the paper's control)
    nothing                 the states as they are

Another connector says one vector of the whole beside the condition (UniPic 2.0, arXiv 2509.04548):

    e = encoder(matrix(states));   condition = matrix(e),   whole = matrix(mean e)

Yet another joins states of two kinds, words and the picture codes that were planned after them (MammothModa2, arXiv
2511.18262): [matrix(norm(words)), queries that look at the codes].

Shape letters: b batch, q states of one picture, d width of the language model, c of the condition, p of the whole.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.blocks import RMSNorm, SwiGLU, additive, attend
from diptych.parts.dit import mean, uniform_weights
from diptych.parts.positions import rotate
from diptych.parts.qformer import QFormer, QFormerConfig
from diptych.parts.vision import Layer, VisionConfig


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """`layers` of the encoder, 0 for none; `gain` that the last norm starts with, None for no norm."""

    layers: int = 24  # MetaQuery, and all numbers below
    head_dim: int = 64
    hidden_ratio: float = 4.0
    projection: Literal["mlp", "none"] = "mlp"
    order: Literal["encode_first", "project_first"] = "encode_first"
    gain: float | None = 5.5**0.5  # what the caption projection of SANA expects
    norm_eps: float = 1e-6
    rope_theta: float = 1e4

    def __post_init__(self) -> None:
        if self.layers < 0 or self.head_dim % 2:
            raise ValueError(f"expected layers of at least 0 and an even head_dim, got {self.layers} and "
                             f"{self.head_dim}")

    def build(self, in_width: int, out_width: int) -> "StateConnector":
        return StateConnector(self, in_width, out_width)


@dataclass(frozen=True, kw_only=True)
class PooledConnectorConfig:
    """Layers, width, heads and feed-forward width of the encoder; `pooled_width` of the vector of the whole."""

    layers: int = 24  # UniPic 2.0, and all numbers below
    width: int = 1536
    heads: int = 24
    hidden: int = 8960
    pooled_width: int = 2048

    def build(self, in_width: int, out_width: int) -> "PooledConnector":
        return PooledConnector(self, in_width, out_width)


class TurnedNorm(nn.Module):
    """x / |x| * sqrt(head_dim) * gain, a gain per head and channel, for x (b, heads, n, head_dim)."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(heads, 1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return (F.normalize(x.float(), dim=-1) * x.shape[-1] ** 0.5 * self.gain.float()).to(x.dtype)


class EncoderLayer(nn.Module):
    """Pre-norm, bidirectional. Queries and keys are turned first and normalised then: the gain of a channel follows
    its place in the sequence, which norms in front of the rotation cannot express."""

    def __init__(self, c: ConnectorConfig, width: int) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        heads = width // c.head_dim
        self.attention_norm, self.mlp_norm = RMSNorm(width, c.norm_eps), RMSNorm(width, c.norm_eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = TurnedNorm(heads, c.head_dim), TurnedNorm(heads, c.head_dim)
        self.mlp = SwiGLU(width, int(width * c.hidden_ratio))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        q, k = (norm(rotate(y, cos, sin).transpose(1, 2)) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        x = x + self.out(attend(q, k, v.transpose(1, 2), bias))
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    """(b, q, width) -> the same shape; positions count from 0, there is no last norm."""

    def __init__(self, c: ConnectorConfig, width: int) -> None:
        super().__init__()
        if width % c.head_dim:
            raise ValueError(f"expected an encoder width that is a multiple of head_dim={c.head_dim}, got {width}")
        self.c = c
        self.layers = nn.ModuleList(EncoderLayer(c, width) for _ in range(c.layers))

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        exponent = torch.arange(0, self.c.head_dim, 2, device=x.device, dtype=torch.float32) / self.c.head_dim
        angle = torch.arange(x.shape[1], device=x.device)[None, :, None] * self.c.rope_theta**-exponent
        bias = None if visible is None else additive(visible[:, None], x.dtype)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin(), bias)
        return x


class StateConnector(nn.Module):
    """States (b, q, d), of which `visible` (b, q) bool count -> condition (b, q, c)."""

    def __init__(self, config: ConnectorConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        c = self.config = config
        if c.projection == "none" and in_width != out_width:
            raise ValueError(f"expected a projection from width {in_width} to the {out_width} of the condition, got "
                             "none; fix: set projection to mlp, or condition_width to the width of the states")
        first = c.order == "encode_first"
        self.encoder = Encoder(c, in_width if first else out_width) if c.layers else nn.Identity()
        self.project = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU("tanh"), nn.Linear(out_width, out_width)) \
            if c.projection == "mlp" else nn.Identity()
        self.norm = RMSNorm(out_width, eps=1e-5) if c.gain is not None else nn.Identity()
        # published: N(0, 0.014^2), which at a small width leaves the last norm next to nothing to normalise
        uniform_weights(self.modules())
        if isinstance(self.norm, RMSNorm) and c.gain is not None:
            nn.init.constant_(self.norm.weight, c.gain)

    def forward(self, states: Tensor, visible: Tensor | None = None) -> Tensor:
        x = states if self.config.order == "encode_first" else self.project(states)
        x = self.encoder(x, visible) if self.config.layers else x
        x = self.project(x) if self.config.order == "encode_first" else x
        return self.norm(x)


class PooledConnector(nn.Module):
    """States (b, q, d), of which `visible` (b, q) bool count -> (b, q, c + p): behind the condition that each becomes
    stands the vector of the whole, the same for all. The encoder knows no positions: those of the states suffice."""

    def __init__(self, config: PooledConnectorConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        c = self.config = config
        form = VisionConfig(width=c.width, mlp_width=c.hidden, num_heads=c.heads)
        self.input = nn.Linear(in_width, c.width)
        self.layers = nn.ModuleList(Layer(form) for _ in range(c.layers))
        self.whole, self.output = nn.Linear(c.width, c.pooled_width), nn.Linear(c.width, out_width)
        uniform_weights(self.modules())

    def forward(self, states: Tensor, visible: Tensor | None = None) -> Tensor:
        x, mask = self.input(states), None if visible is None else visible[:, None]
        for layer in self.layers:
            x = layer(x, mask)
        whole = self.whole(mean(x, visible))[:, None].expand(-1, x.shape[1], -1)
        return torch.cat((self.output(x), whole), -1)


class PlanConnector(nn.Module):
    """`connector(texts, plans)`: states (n_i, d) of words and (m_i, d) of codes, None where there is no plan ->
    conditions (q_i, c). Of a `kind` "text" or "image" alone, the other states are not looked at."""

    def __init__(self, kind: Literal["text", "image", "text_image"], queries: QFormerConfig) -> None:
        super().__init__()
        self.width = queries.width
        self.text = nn.Sequential(RMSNorm(queries.feature_width, 1e-5), nn.Linear(queries.feature_width, self.width)) \
            if "text" in kind else None
        self.image = QFormer(queries) if "image" in kind else None

    def forward(self, texts: Sequence[Tensor], plans: Sequence[Tensor | None]) -> list[Tensor]:
        parts = [[text.new_zeros(0, self.width)] for text in texts]
        if self.text is not None:
            for own, text in zip(parts, self.text(torch.cat(list(texts))).split([len(x) for x in texts]), strict=True):
                own.append(text)
        shown = [plan for plan in plans if plan is not None]
        if self.image is not None and shown:
            states, visible = padded(shown)
            drawn = [own for own, plan in zip(parts, plans, strict=True) if plan is not None]
            for own, image in zip(drawn, self.image(states, visible=visible), strict=True):
                own.append(image)
        return [torch.cat(own) for own in parts]


def padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Tensors (q_i, w) of any lengths -> (k, q, w), and where there is something (k, q) bool; None if everywhere."""
    lengths = torch.tensor([len(p) for p in parts], device=parts[0].device)
    stacked = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    if bool((lengths == stacked.shape[1]).all()):
        return stacked, None
    return stacked, torch.arange(stacked.shape[1], device=lengths.device) < lengths[:, None]
