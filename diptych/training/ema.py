"""An exponential moving average of the trained parameters, in float32."""
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """`shadow[name]` follows the parameter, at every `interval`-th step. The decay grows as (1 + k) / (10 + k) in the
    step k to its final value."""

    def __init__(self, system: nn.Module, names: Iterable[str], decay: float, interval: int = 1) -> None:
        if not 0 < decay < 1 or interval < 1:
            raise ValueError(f"expected an ema decay in (0, 1) and an interval >= 1, got {decay} and {interval}")
        parameters = dict(system.named_parameters())
        self.decay, self.interval = decay, interval
        self.named = {n: parameters[n] for n in sorted(names)}
        self.shadow = {n: p.detach().float().clone() for n, p in self.named.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the 0-based `step`."""
        if (step + 1) % self.interval:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        shadow = [local(s) for s in self.shadow.values()]
        values = [local(p.detach()) for p in self.named.values()]
        values = [v if v.dtype == torch.float32 else v.float() for v in values]
        torch._foreach_lerp_(shadow, values, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the system's parameters are the averages."""
        kept = {n: p.detach().clone() for n, p in self.named.items()}
        with torch.no_grad():
            for n, p in self.named.items():
                p.copy_(self.shadow[n])
        try:
            yield
        finally:
            with torch.no_grad():
                for n, p in self.named.items():
                    p.copy_(kept[n])


def local(tensor: Tensor) -> Tensor:
    """The shard this process holds; the tensor itself when it is not sharded."""
    return getattr(tensor, "to_local", lambda: tensor)()
