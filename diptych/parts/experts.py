"""Couplings: which parameter set serves which route in every layer, and whether routes attend to each other.

One value of type `Coupling` is all that tells a dense trunk from a mixture of transformers, feed-forward experts or a
forked trunk. Routes are per-token labels (text and features 0, latents 1, ...); a parameter set may serve several.
"""
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True)
class LayerCoupling:
    """`attention[r]`, `mlp[r]`: the parameter set that serves route r; `joint`: routes see each other."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    joint: bool = True


@dataclass(frozen=True)
class Coupling:
    layers: tuple[LayerCoupling, ...]

    def __post_init__(self) -> None:
        counts = {len(t) for layer in self.layers for t in (layer.attention, layer.mlp)}
        if len(counts) != 1:
            raise ValueError(f"expected every layer to name a set per route, got route counts {sorted(counts)}")

    @property
    def routes(self) -> int:
        return len(self.layers[0].attention)

    @property
    def final(self) -> tuple[int, ...]:
        """The parameter set of the final norm per route: that of the last layer's attention."""
        return self.layers[-1].attention

    @classmethod
    def dense(cls, depth: int, routes: int = 1) -> Self:
        """One parameter set for all routes."""
        return cls((LayerCoupling(attention=(0,) * routes, mlp=(0,) * routes),) * depth)

    @classmethod
    def mixture(cls, depth: int, routes: int = 2) -> Self:
        """Mixture of transformers: every parameter exists once per route, attention is joint (BAGEL)."""
        own = tuple(range(routes))
        return cls((LayerCoupling(attention=own, mlp=own),) * depth)

    @classmethod
    def feed_forward(cls, depth: int, routes: int = 2) -> Self:
        """Only the feed-forward network exists once per route (BAGEL's MoE variant, MammothModa2)."""
        return cls((LayerCoupling(attention=(0,) * routes, mlp=tuple(range(routes))),) * depth)

    @classmethod
    def named(cls, name: str, depth: int, routes: int = 2) -> Self:
        makers = {"dense": cls.dense, "mixture": cls.mixture, "feed_forward": cls.feed_forward}
        if name not in makers:
            raise ValueError(f"expected coupling to be one of {', '.join(makers)}, got {name!r}")
        return makers[name](depth, routes)


def streams(coupling: Coupling) -> list[list[int]]:
    """Routes that are served alike in every layer form one stream: a dense trunk runs one matrix product, not two."""
    joint = all(layer.joint for layer in coupling.layers)
    groups: dict[Hashable, list[int]] = {}
    for route in range(coupling.routes):
        key = tuple((layer.attention[route], layer.mlp[route]) for layer in coupling.layers), None if joint else route
        groups.setdefault(key, []).append(route)
    return list(groups.values())
