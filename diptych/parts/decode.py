"""One more token in several contexts, by a compiled step over all layers: what decoding word by word or code by code
spends its time on. Weights and caches stay where they are, in float32 or bfloat16; `int8` makes copies of the matrices
with one scale per row.

A matrix of one token is bound by reading the weights, so all contexts (those of guidance, and of other requests) share
one pass over them. A row's result does not depend on its company.
"""
import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from diptych.parts import native
from diptych.parts.blocks import AttentionProjections, BlockConfig, GeluMlp, LayerNorm, RMSNorm
from diptych.parts.cache import Context
from diptych.parts.experts import SKIP
from diptych.parts.trunks import Layer, Trunk

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
NORMS = {"rms": 0, "layer": 1}
SWIGLU, GELU_TANH, GELU_ERF, NONE = range(4)


class _Matrix(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("sums", ctypes.c_void_p),
                ("bias", ctypes.c_void_p),
                ("kind", ctypes.c_int64), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64)]


class _Layer(ctypes.Structure):
    _fields_ = ([(n, _Matrix) for n in ("qkv", "out", "up", "down")]
                + [(n, ctypes.c_void_p) for n in ("norm", "norm_bias", "mlp_norm", "mlp_norm_bias", "q_norm",
                                                  "q_norm_bias", "k_norm", "k_norm_bias")])


class _Shape(ctypes.Structure):
    _fields_ = ([(n, ctypes.c_int64) for n in ("width", "heads", "kv_heads", "head_dim", "hidden", "layers", "norm",
                                               "mlp", "parallel", "cache")]
                + [("eps", ctypes.c_float), ("qk_eps", ctypes.c_float)])


_tallies: list[list[float]] = []


@contextmanager
def tallied(total: list[float]) -> Iterator[None]:
    """Inside, the FLOPs of compiled products are added to the one number of the list."""
    _tallies.append(total)
    try:
        yield
    finally:
        _tallies.remove(total)


def counting(hook: Callable[..., None]) -> Callable[..., None]:
    """Mark a forward hook that only counts what layers do: with `tallied`, it misses nothing of what is compiled."""
    hook.counts = True  # type: ignore[attr-defined]
    return hook


def counts(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "counts", False)


class Held:
    """Tensors that compiled code points at."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.weights = 0  # of matrices

    def pointer(self, x: Tensor | None) -> int | None:
        if x is None:
            return None
        self.tensors.append(x)
        return x.data_ptr()

    def vector(self, x: Tensor | None) -> int | None:
        return self.pointer(None if x is None else x.detach().float().contiguous())

    def matrix(self, weight: Tensor, bias: Tensor | None = None, int8: bool = False) -> _Matrix:
        """(rows, columns)."""
        weight, scale, sums = weight.detach(), None, None
        if int8:
            weight, scale = quantized(weight)
            sums = weight.sum(1, dtype=torch.int32)
        self.weights += weight.numel()
        return _Matrix(self.pointer(weight), self.pointer(scale), self.pointer(sums), self.vector(bias),
                       KINDS[weight.dtype], *weight.shape)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (rows, columns) and float32 scales (rows,) whose product is nearest to the weight."""
    scale = (weight.float().abs().amax(1) / 127).clamp_min(1e-12)
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def usable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and weight.is_contiguous()


def path(trunk: Trunk, route: int) -> list[tuple[int, int, int, int]] | None:
    """Where a causal token of this route goes if nothing but plain attention to all before it is asked for: for every
    layer its sets of attention and network, the host of its product, and the number of the product. None: it is not
    so."""
    if trunk.coupling.intervals != 1:
        return None
    found, number = list[tuple[int, int, int, int]](), 0
    stream = next(s for s, group in enumerate(trunk.groups) if route in group)
    for coupling, products in zip(trunk.coupling.layers, trunk.products, strict=True):
        own = [(number + n, p) for n, p in enumerate(products) if stream in p.streams]
        number += len(products)
        attention, mlp = coupling.attention[route], coupling.mlp[route]
        if len(own) != 1 or SKIP in (attention, mlp):
            return None
        entry, product = own[0]
        alone = len(trunk.groups) == 1 or (product.joint and len(product.streams) == len(trunk.groups))
        block = trunk.blocks[attention]
        if (not alone or product.residual or block.modulated or block.norm_behind
                or block.geometry != trunk.blocks[product.host].geometry):
            return None
        found.append((attention, mlp, product.host, entry))
    return found


class Decoder:
    """The layers of a trunk as one route goes through them. `Decoder.of` says whether that can be."""

    def __init__(self, trunk: Trunk, route: int, where: Sequence[tuple[int, int, int, int]], library: Any,
                 int8: bool = False) -> None:
        self.library, self.held = library, Held()
        block, self.rope = trunk.blocks[where[0][0]], trunk.ropes[where[0][2]]
        self.entries = [entry for *_, entry in where]
        layers = [self._layer(cast(Layer, trunk.layers[n]), block, a, e, int8) for n, (a, e, *_) in enumerate(where)]
        self.layers = (_Layer * len(layers))(*layers)
        final: Any = trunk.norm[trunk.coupling.final[route]]
        self.final = self.held.vector(final.weight), self.held.vector(getattr(final, "bias", None))
        self.shape = _Shape(block.width, block.heads, block.kv_heads, block.head_dim, block.hidden, len(layers),
                            NORMS[block.norm], SWIGLU if block.mlp == "swiglu" else GELU_TANH, int(block.parallel), 0,
                            block.norm_eps, block.norm_eps if block.qk_eps is None else block.qk_eps)
        self.scratch = torch.empty(0)

    @classmethod
    def of(cls, trunk: Trunk, route: int, int8: bool = False) -> "Decoder | None":
        """None where the machine, the form of the trunk or the type of its weights asks for the general way."""
        where = path(trunk, route)
        if where is None or not all(usable(p) for p in trunk.parameters()):
            return None
        parts = [part for n, (a, e, *_) in enumerate(where)
                 for part in (cast(Layer, trunk.layers[n]).attention[a], cast(Layer, trunk.layers[n]).mlp[e])]
        norms = RMSNorm | LayerNorm | nn.Identity
        if not all(type(m) is nn.Linear for part in parts for m in part.children() if not isinstance(m, norms)):
            return None  # low-rank additions, say
        blocks, ropes = {trunk.blocks[a] for a, *_ in where}, {id(trunk.ropes[host]) for *_, host, _ in where}
        if len(blocks) > 1 or len(ropes) > 1 or (library := native.library()) is None:
            return None
        return cls(trunk, route, where, library, int8)

    def _layer(self, layer: Layer, block: BlockConfig, a: int, e: int, int8: bool) -> _Layer:
        held, attention, mlp = self.held, cast(AttentionProjections, layer.attention[a]), layer.mlp[e]
        up = mlp.up if isinstance(mlp, GeluMlp) else cast(nn.Linear, mlp.gate_up)
        matrices = [held.matrix(m.weight, m.bias, int8) for m in (attention.qkv, attention.out, up,
                                                                  cast(nn.Linear, mlp.down))]
        norms: list[int | None] = []
        mlp_norm = None if block.parallel else layer.mlp_norm[e]
        for norm in (layer.attention_norm[a], mlp_norm, *((attention.q_norm, attention.k_norm) if block.qk_norm else
                                                          (None, None))):
            norms += [held.vector(None if norm is None else cast(Tensor, norm.weight)),
                      held.vector(cast(Tensor, norm.bias) if isinstance(norm, LayerNorm) else None)]
        return _Layer(*matrices, *norms)

    def step(self, states: Tensor, angles: tuple[Tensor, Tensor], contexts: Sequence[Context]) -> Tensor:
        """States (b, width) of one new token in each context, cos and sin (b, pairs) float32 of where they are ->
        hidden states (b, width) float32 behind the final norm. Keys and values are written behind what the contexts
        hold (make room with `Context.reserve`); their length is for the caller to advance."""
        b, layers = len(contexts), len(self.entries)
        cos, sin = (a.contiguous() for a in angles)
        x = states.float().contiguous().clone()
        rows = [c.pointers(self.entries) for c in contexts]
        table = torch.tensor(rows).permute(1, 2, 0).contiguous()  # keys and values, layers, b
        sizes = torch.tensor([[c.length for c in contexts], [c.capacity for c in contexts]])
        store = contexts[0].store
        if store is None or any(c.length >= c.capacity for c in contexts):
            raise ValueError("expected room for one more token in every context, got none; fix: reserve it")
        self.shape.cache = KINDS[store.keys[0].dtype]
        threads = torch.get_num_threads()
        needed = self.library.decode_scratch(ctypes.byref(self.shape), b, int(sizes[0].max()) + 1, threads)
        if self.scratch.numel() < needed:
            self.scratch = torch.empty(2 * needed)
        keys = table.data_ptr()
        self.library.decode_step(ctypes.byref(self.shape), self.layers, *self.final, b, x.data_ptr(), cos.data_ptr(),
                                 sin.data_ptr(), cos.shape[-1], keys, keys + 8 * layers * b, sizes.data_ptr(),
                                 sizes.data_ptr() + 8 * b, self.scratch.data_ptr(), threads)
        _tally(2.0 * b * self.held.weights)
        return x


class Chain:
    """Matrices one behind the other, with GELU between them: the way from a state to logits."""

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor | None, int]], library: Any, int8: bool = False) -> None:
        self.held, self.library = Held(), library
        self.parts = [(self.held.matrix(weight, bias, int8), then) for weight, bias, then in parts]
        self.scratch = torch.empty(0)

    @classmethod
    def of(cls, head: nn.Module | Tensor, int8: bool = False) -> "Chain | None":
        """Of a matrix (rows, columns), a linear layer, or several with GELU in a `Sequential`; None for others."""
        library = native.library()
        parts: list[tuple[Tensor, Tensor | None, int]] = []
        for module in head if isinstance(head, nn.Sequential) else [head]:
            if isinstance(module, nn.GELU) and parts and parts[-1][2] == NONE:
                then = GELU_ERF if module.approximate == "none" else GELU_TANH
                parts[-1] = (*parts[-1][:2], then)
            elif isinstance(module, nn.Linear):
                parts.append((module.weight, module.bias, NONE))
            elif isinstance(module, Tensor):
                parts.append((module, None, NONE))
            else:
                return None
        if library is None or not parts or not all(usable(weight) for weight, *_ in parts):
            return None
        return cls(parts, library, int8)

    @property
    def rows(self) -> int:
        return self.parts[-1][0].rows

    def __call__(self, x: Tensor) -> Tensor:
        """(b, columns) float32 -> (b, rows) float32."""
        b, threads = len(x), torch.get_num_threads()
        for matrix, then in self.parts:
            if self.scratch.numel() < threads * b * matrix.columns:
                self.scratch = torch.empty(2 * threads * b * matrix.columns)
            y = torch.empty(b, matrix.rows)
            self.library.decode_product(ctypes.byref(matrix), b, x.data_ptr(), y.data_ptr(), then,
                                        self.scratch.data_ptr(), threads)
            x = y
        _tally(2.0 * b * self.held.weights)
        return x


def _tally(flops: float) -> None:
    for total in _tallies:
        total[0] += flops


Fingerprint = tuple[int, list[tuple[int, int]]]
_steps = [0]  # of any optimizer of this process, since somebody asked


@cache
def _count_steps() -> None:
    def count(*_: object) -> None:
        _steps[0] += 1

    register_optimizer_step_post_hook(count)


def fingerprint(module: nn.Module) -> Fingerprint:
    """Of all weights: changes when they do. Fused optimizers change them without a trace in the tensors, so their
    steps are counted."""
    _count_steps()
    return _steps[0], [(p.data_ptr(), p._version) for p in module.parameters()]
