"""A transformer block in pieces that a trunk can give to different experts: norms, projections, feed-forward networks.
By default it is that of Qwen2 and Qwen3; Phi is another value of the same config."""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.positions import rotate

SHORT, FEW = 512, 8  # keys; queries


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Sizes and form of one block. Qwen2: `qkv_bias`, no `qk_norm`; Qwen3: the other way round. Phi: `norm` "layer",
    `mlp` "gelu", `parallel` and every bias.

    In a `parallel` block attention and the feed-forward network read the same normalised state and are added at once.
    With `norm_behind` they read the state as it is, and what they say is normalised (TokenFlow's generator).
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  # of the feed-forward network
    qkv_bias: bool = True
    qk_norm: bool = False
    norm_eps: float = 1e-6
    qk_eps: float | None = None  # of the norms of queries and keys; None: norm_eps
    norm: Literal["rms", "layer"] = "rms"  # "layer" with weight and bias, also of queries and keys
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # "gelu" with its tanh approximation
    bias: bool = False  # of the output and feed-forward matrices
    parallel: bool = False
    norm_behind: bool = False
    modulated: bool = False  # both halves are scaled and gated by the time of each token (DiT; Lumina, OmniGen2)
    residual: bool = False  # attention adds the map of the layer before, gated by time in every head (LaTtE-Flow)

    def __post_init__(self) -> None:
        if (self.modulated and self.parallel) or (self.residual and not self.modulated):
            raise ValueError("expected a modulated block not to be parallel, and a residual one to be modulated")
        if self.norm_behind and (self.modulated or self.parallel):
            raise ValueError("expected a block with norms behind to be neither modulated nor parallel")
        if self.norm not in ("rms", "layer") or self.mlp not in ("swiglu", "gelu"):
            raise ValueError(f"expected norm rms or layer and mlp swiglu or gelu, got {self.norm!r} and {self.mlp!r}")
        if self.bias and self.mlp == "swiglu":
            raise ValueError("expected bias in a block with mlp gelu only, got swiglu; fix: set bias=False")
        if self.heads % self.kv_heads:
            raise ValueError(f"expected heads to be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    @property
    def llama_like(self) -> bool:
        """Whether the block has the form of LLaMA and Qwen, which is what their published layouts can hold."""
        odd = self.bias or self.parallel or self.modulated or self.norm_behind
        return self.norm == "rms" and self.mlp == "swiglu" and not odd

    @property
    def geometry(self) -> tuple[int, int, int]:
        """The head space of attention: heads, kv_heads, head_dim."""
        return self.heads, self.kv_heads, self.head_dim


def normal_weights(modules: Iterable[nn.Module], std: float = 0.02) -> None:
    """Fresh weights of linear layers and embeddings from N(0, std^2), biases zero, as Qwen starts."""
    for module in modules:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def working_dtype(x: Tensor) -> torch.dtype:
    """What matrix products will compute in: the autocast dtype where that is on, else that of x. Producing it at once
    saves a pass over memory per product."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Elementwise:
    """The memory-bound steps of a block, in one place so that `compile_elementwise` can fuse them."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        return (y * weight.float()).to(dtype)

    @staticmethod
    def attention_weights(scores: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """scores (B, heads, Q, K), bias (B, Q, K) -> softmax over K in the dtype of the scores."""
        scaled = scores.float() * scale
        scaled = scaled if bias is None else scaled + bias[:, None]
        return torch.softmax(scaled, -1).to(scores.dtype)

    @staticmethod
    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def split_heads(qkv: Tensor, heads: int, kv_heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qk, v = qkv.split((heads + kv_heads, kv_heads), 2)
        q, k = rotate(qk, cos, sin).split((heads, kv_heads), 2)
        return q, k, v


_ops = _Elementwise()


def compile_elementwise() -> None:
    """Fuse norms, rotations and gates with `torch.compile` for this process: a quarter off a training step on a CPU."""
    for name in ("rms_norm", "attention_weights", "gated", "split_heads"):
        setattr(_ops, name, torch.compile(getattr(_Elementwise, name), dynamic=True))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the statistics are float32 whatever the input."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _ops.rms_norm(x, self.weight, self.eps, working_dtype(x))


class LayerNorm(nn.LayerNorm):
    """With weight and bias; the statistics are float32 whatever the input."""

    def forward(self, input: Tensor) -> Tensor:
        y = F.layer_norm(input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(working_dtype(input))


def make_norm(c: BlockConfig, width: int, eps: float | None = None) -> nn.Module:
    eps = c.norm_eps if eps is None else eps
    return LayerNorm(width, eps) if c.norm == "layer" else RMSNorm(width, eps)


class AttentionProjections(nn.Module):
    """Everything of attention that belongs to an expert: q, k, v in one matrix, their norms, and the output matrix.

    Where the product happens in the head space of another block (`host`), linear maps lead there and back: map, then
    norm, then rotation (HBridge). They start as the identity on the channels that both spaces have.
    """

    def __init__(self, c: BlockConfig, host: BlockConfig | None = None) -> None:
        super().__init__()
        self.c, self.host = c, host or c
        self.qkv = nn.Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(c.heads * c.head_dim, c.width, bias=c.bias)
        self.q_norm, self.k_norm = (make_norm(c, self.host.head_dim, c.qk_eps) if c.qk_norm else nn.Identity()
                                    for _ in range(2))
        if self.host.geometry != c.geometry:
            outer = (self.host.heads, self.host.kv_heads, self.host.kv_heads)
            self.there = nn.ModuleList(_identity(n * c.head_dim, m * self.host.head_dim) for n, m in
                                       zip((c.heads, c.kv_heads, c.kv_heads), outer, strict=True))
            self.back = _identity(outer[0] * self.host.head_dim, c.heads * c.head_dim)

    def project(self, x: Tensor) -> Tensor:
        """(n, width) -> (n, heads + 2 kv_heads, head_dim), q and k normalised, not yet rotated."""
        c, host = self.c, self.host
        qkv = self.qkv(x)
        if host.geometry != c.geometry:
            parts = qkv.split([n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)], -1)
            qkv = torch.cat([m(part) for m, part in zip(self.there, parts, strict=True)], -1)
        qkv = qkv.unflatten(-1, (host.heads + 2 * host.kv_heads, host.head_dim))
        if not c.qk_norm:
            return qkv
        q, k, v = qkv.split((host.heads, host.kv_heads, host.kv_heads), -2)
        return torch.cat((self.q_norm(q), self.k_norm(k), v), -2)

    def merge(self, mixed: Tensor) -> Tensor:
        """What attention brought, (n, heads * head_dim) of the host -> (n, width)."""
        return self.out(mixed if self.host.geometry == self.c.geometry else self.back(mixed))


def _identity(inside: int, outside: int) -> nn.Linear:
    """A matrix without bias that passes the channels both sides have."""
    linear = nn.Linear(inside, outside, bias=False)
    nn.init.eye_(linear.weight)
    return linear


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention. q (B, heads, Q, d), k (B, kv_heads, K, d), v (B, kv_heads, K, e), additive bias (B, Q, K) ->
    (B, Q, heads * e).

    Short sequences on a CPU go through plain matrix products: four times faster there than the fused kernel, whose
    backward pass is slow under a mask. So do few queries, for which that kernel is several times slower in bfloat16;
    heads that share keys become rows of one product, so that no key is copied. Everything else uses SDPA.
    """
    plain = q.device.type == "cpu"
    if plain and q.shape[2] <= FEW and k.shape[1] < q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        rows = q.unflatten(1, (k.shape[1], groups)).flatten(2, 3)
        wide = None if bias is None else bias.expand(-1, q.shape[2], -1).repeat(1, groups, 1)
        out = _ops.attention_weights(rows @ k.transpose(-1, -2), wide, q.shape[-1] ** -0.5) @ v
        out = out.view(*q.shape[:-1], v.shape[-1])
        return out.transpose(1, 2).flatten(2)
    k, v = _per_head(q, k), _per_head(q, v)
    if plain and (k.shape[2] <= SHORT or q.shape[2] <= FEW):
        out = _ops.attention_weights(q @ k.transpose(-1, -2), bias, q.shape[-1] ** -0.5) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias[:, None])
    return out.transpose(1, 2).flatten(2)


def attend_after(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gate: Tensor,
                 before: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `attend`, with the map of an earlier product on top of its own: (softmax + gate before) v, gate (B, Q, heads),
    before (B, heads, Q, K). Also gives the map that was used."""
    k, v = _per_head(q, k), _per_head(q, v)
    weights = _ops.attention_weights(q @ k.transpose(-1, -2), bias, q.shape[-1] ** -0.5)
    if before is not None:
        weights = weights + gate.transpose(1, 2)[..., None].to(weights.dtype) * before
    return (weights @ v).transpose(1, 2).flatten(2), weights


def _per_head(q: Tensor, kv: Tensor) -> Tensor:
    """Keys or values of groups of heads, one for each head of q."""
    return kv if kv.shape[1] == q.shape[1] else kv.repeat_interleave(q.shape[1] // kv.shape[1], 1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean mask -> 0 where allowed, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def split_heads(qkv: Tensor, c: BlockConfig, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, heads + 2 kv_heads, d) -> rotated q and k, and v, each (B, T, n, d)."""
    return _ops.split_heads(qkv, c.heads, c.kv_heads, cos, sin)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(_ops.gated(self.gate_up(x)))


class GeluMlp(nn.Module):
    """down(gelu(up(x))), the tanh approximation of GELU."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def make_mlp(c: BlockConfig) -> nn.Module:
    return GeluMlp(c.width, c.hidden, c.bias) if c.mlp == "gelu" else SwiGLU(c.width, c.hidden)
