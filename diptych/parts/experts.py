"""Couplings: which parameter set serves which route in every layer, and whether routes attend to each other.

One value of type `Coupling` is all that tells a dense trunk from a mixture of transformers, feed-forward experts, a
forked trunk (Y), one whose experts meet in the middle only (H) and one whose layers are shared out over time. Routes
are per-token labels (text and features 0, latents 1, ...; or the branch of a whole sample); a parameter set may serve
several, and its number says which of the trunk's blocks it is: sets may differ in width.
"""
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Self

SKIP = -1  # in place of a parameter set: the route has no such layer


@dataclass(frozen=True, kw_only=True)
class LayerCoupling:
    """`attention[r]`, `mlp[r]`: the parameter set that serves route r, or `SKIP` for both; `joint`: routes see each
    other."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    joint: bool = True

    def __post_init__(self) -> None:
        absent = [tuple(r for r, e in enumerate(sets) if e < 0) for sets in (self.attention, self.mlp)]
        if absent[0] != absent[1] or len(absent[0]) == len(self.attention):
            raise ValueError(f"expected a layer that is there for some route, with attention and feed-forward network "
                             f"or neither, got {self.attention} and {self.mlp}")


@dataclass(frozen=True)
class Coupling:
    """`intervals`: of time, into which the trunk divides the last route that it is given (1: it does not)."""

    layers: tuple[LayerCoupling, ...]
    intervals: int = 1

    def __post_init__(self) -> None:
        counts = {len(t) for layer in self.layers for t in (layer.attention, layer.mlp)}
        if len(counts) != 1:
            raise ValueError(f"expected every layer to name a set per route, got route counts {sorted(counts)}")
        bare = [r for r in range(self.routes) if all(layer.attention[r] < 0 for layer in self.layers)]
        if bare:
            raise ValueError(f"expected every route to have a layer, got none for {bare}")

    @property
    def routes(self) -> int:
        return len(self.layers[0].attention)

    @property
    def given(self) -> int:
        """Routes as callers count them."""
        return self.routes - self.intervals + 1

    def layers_of(self, route: int) -> int:
        """How many layers its tokens go through."""
        return sum(layer.attention[route] != SKIP for layer in self.layers)

    @property
    def final(self) -> tuple[int, ...]:
        """The parameter set of the final norm per route: that of its last layer's attention."""
        return tuple(next(layer.attention[r] for layer in reversed(self.layers) if layer.attention[r] >= 0)
                     for r in range(self.routes))

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
    def feed_forward(cls, depth: int, routes: int = 2, layers: tuple[int, int] | None = None) -> Self:
        """Only the feed-forward network exists once per route (BAGEL's MoE variant), in layers from the first up to and
        without the second (MammothModa2)."""
        first, end = (0, depth) if layers is None else layers
        if not 0 <= first <= end <= depth:
            raise ValueError(f"expected layers from 0 to {depth} in order, got {first} and {end}")
        own = LayerCoupling(attention=(0,) * routes, mlp=tuple(range(routes)))
        shared = cls.dense(1, routes).layers
        return cls((*shared * first, *(own,) * (end - first), *shared * (depth - end)))

    @classmethod
    def named(cls, name: str, depth: int, routes: int = 2) -> Self:
        makers = {"dense": cls.dense, "mixture": cls.mixture, "feed_forward": cls.feed_forward}
        if name not in makers:
            raise ValueError(f"expected coupling to be one of {', '.join(makers)}, got {name!r}")
        return makers[name](depth, routes)

    @classmethod
    def fork(cls, depth: int, shared: int, routes: int = 2) -> Self:
        """Y: the first `shared` layers serve all, then every route has its own (UniFork). Route = branch of a sample;
        samples of different branches do not see each other anyway."""
        if not 0 <= shared <= depth:
            raise ValueError(f"expected 0 to {depth} shared layers, got {shared}")
        return cls((*cls.dense(shared, routes).layers, *cls.mixture(depth - shared, routes).layers)
                   if 0 < shared < depth else (cls.dense if shared else cls.mixture)(depth, routes).layers)

    @classmethod
    def apart(cls, *depths: int) -> Self:
        """As many models side by side, each with layers and parameters of its own, that never see each other."""
        served = [tuple(r if n < depth else SKIP for r, depth in enumerate(depths)) for n in range(max(depths))]
        return cls(tuple(LayerCoupling(attention=sets, mlp=sets, joint=False) for sets in served))

    @classmethod
    def bridge(cls, depth: int, first: int, last: int, before: int = 0) -> Self:
        """H: two experts that see each other only between the first `first` and the last `last` of their `depth` common
        layers (HBridge). `before` those the second has more of its own."""
        if min(first, last, before) < 0 or first + last > depth:
            raise ValueError(f"expected first + last of at most {depth} layers, got {first} and {last}")
        own = (0, 1)
        more = LayerCoupling(attention=(SKIP, 1), mlp=(SKIP, 1))
        apart = LayerCoupling(attention=own, mlp=own, joint=False)
        return cls((more,) * before + (apart,) * first + (LayerCoupling(attention=own, mlp=own),) *
                   (depth - first - last) + (apart,) * last)

    @classmethod
    def timestep(cls, depth: int, groups: int, twins: int | None = None) -> Self:
        """Two parameter sets in the first `twins` layers, all of them by default; what the second serves goes through
        the k-th of `groups` equal groups of these layers only, where its time is in the k-th part of [0, 1]
        (LaTtE-Flow)."""
        twins = depth if twins is None else twins
        if groups < 1 or twins % groups or not 0 < twins <= depth:
            raise ValueError(f"expected groups of equal size, got {twins} of {depth} layers in {groups} groups")
        served = [(0, *(1 if n < twins and n * groups // twins == k else SKIP for k in range(groups)))
                  for n in range(depth)]
        return cls(tuple(LayerCoupling(attention=sets, mlp=sets) for sets in served), groups)


def streams(coupling: Coupling) -> list[list[int]]:
    """Routes that are served alike in every layer form one stream: a dense trunk runs one matrix product, not two."""
    joint = all(layer.joint for layer in coupling.layers)
    groups: dict[Hashable, list[int]] = {}
    for route in range(coupling.routes):
        key = tuple((layer.attention[route], layer.mlp[route]) for layer in coupling.layers), None if joint else route
        groups.setdefault(key, []).append(route)
    return list(groups.values())
