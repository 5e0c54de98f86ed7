"""What attention between experts costs: counted from the mask and the sizes of a trunk, without running it."""
from dataclasses import dataclass
from typing import cast

from diptych.parts.blocks import AttentionProjections
from diptych.parts.experts import SKIP
from diptych.parts.masks import Predicate
from diptych.parts.tokens import Tokens
from diptych.parts.trunks import Layer, Trunk


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """FLOPs of one forward pass: `attention`, the scores of queries with keys of another route and the sums of their
    values; `maps`, between the head spaces of experts that attend together. `layers` that do."""

    layers: int
    attention: float
    maps: float


def sharing(trunk: Trunk, tokens: Tokens, mask: Predicate) -> Sharing:
    """Only pairs that the mask allows count, each with 2 FLOPs per channel for its score and 2 for its value."""
    allowed = mask.dense(tokens) & tokens.valid()[:, :, None] & tokens.valid()[:, None, :]
    sizes = [len(places) for places in tokens.routes(trunk.coupling.routes)]
    layers, attention, maps = 0, 0.0, 0.0
    for layer, coupling, products in zip(trunk.layers, trunk.coupling.layers, trunk.products, strict=True):
        active = [r for r, e in enumerate(coupling.attention) if e != SKIP]
        if not coupling.joint or len(active) < 2:
            continue
        [product] = products
        block = trunk.blocks[product.host]
        crossing = allowed & (tokens.route[:, :, None] != tokens.route[:, None, :])
        layers += 1
        attention += 4.0 * block.heads * block.head_dim * int(crossing.sum())
        for route in active:
            own = cast(AttentionProjections, cast(Layer, layer).attention[coupling.attention[route]])
            maps += 2.0 * sizes[route] * sum(p.numel() for n, p in own.named_parameters()
                                             if n.startswith(("there.", "back.")))
    return Sharing(layers=layers, attention=attention, maps=maps)
