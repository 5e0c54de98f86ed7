"""What a policy expects to earn from here, read off its own states."""
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

LAST_STD = 0.02


class ValueHead(nn.Module):
    """States (..., width) -> values (..., outputs) float32: one per decision, or one per action of a chunk. It reads
    the trunk that the policy itself has, so that both share what they see (RLinf-VLA, arXiv 2510.06710)."""

    def __init__(self, width: int, outputs: int = 1, hidden: Sequence[int] = (512, 128)) -> None:
        super().__init__()
        sizes = [width, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, hidden, strict=False))
        self.last = nn.Linear(sizes[-1], outputs, bias=False)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.last.weight, std=LAST_STD)  # no opinion at first

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers:
            states = F.gelu(layer(states))
        return self.last(states).float()
