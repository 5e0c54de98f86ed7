"""What a trunk computes layer by layer, whatever system it belongs to and whoever calls it.

    with watched(system.trunk) as passes:
        system.loss(batch, generator)
    pooled = passes[0].pooled(passes[0].tokens.modality == Modality.CODE)    # [(rows, width)] by depth
"""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diptych.parts.tokens import Tokens
from diptych.parts.trunks import Trunk

BETWEEN = 4  # which argument of a trunk that is


@dataclass
class Passage:
    """One forward pass: its tokens, and for every depth (before the first layer, behind each) the states by route."""

    tokens: Tokens
    states: list[list[Tensor]] = field(default_factory=list)

    def pooled(self, chosen: Tensor) -> list[Tensor]:
        """For every depth the mean state of the chosen (B, T) tokens of each row, (B, width) float32. All of them must
        be of routes with the same width, and every row must have some."""
        counts = chosen.sum(1)
        if chosen.shape != self.tokens.shape or not bool(counts.all()):
            raise ValueError(f"expected chosen tokens {self.tokens.shape} in every row, got {tuple(chosen.shape)}, "
                             f"{int((counts == 0).sum())} rows without")
        width = self.tokens.shape[1]
        flat, out = chosen.flatten(), list[Tensor]()
        for by_route in self.states:
            total: Tensor | None = None
            for places, states in zip(self.tokens.routes(len(by_route)), by_route, strict=True):
                own = flat[places]
                if bool(own.any()):
                    total = states.new_zeros(len(counts), states.shape[1]).float() if total is None else total
                    total.index_add_(0, places[own] // width, states[own].float())
            assert total is not None
            out.append(total / counts[:, None])
        return out


@contextmanager
def watched(trunk: Trunk) -> Iterator[list[Passage]]:
    """Collects every pass through the trunk while it lasts; states are detached, nothing is changed."""
    passes: list[Passage] = []

    def enter(module: Trunk, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        passage, inner = Passage(args[1]), args[BETWEEN] if len(args) > BETWEEN else kwargs.get("between")
        passes.append(passage)

        def look(done: int, states: list[Tensor]) -> list[Tensor]:
            states = states if inner is None else inner(done, states)
            passage.states.append([s.detach() for s in states])
            return states

        return args[:BETWEEN], kwargs | {"between": look}

    handle = trunk.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()
