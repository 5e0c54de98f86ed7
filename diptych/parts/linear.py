"""Attention that is linear in the number of tokens, and the feed-forward network with a convolution that goes with it
(EfficientViT, arXiv 2205.14756; DC-AE, 2410.10733; SANA, 2410.10629).

    attention   out_i = sum_j v_j (relu k_j . relu q_i) / sum_j (relu k_j . relu q_i)
    network     narrow(a * silu(g)),   (a, g) = depthwise(silu(widen(x)))

Shape letters: b batch, n tokens, d and e channels of keys and values, c width, h and w cells.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOOR = 1e-15  # of the sum of weights, as published


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k (..., n, d), v (..., n, e) -> (..., n, e) in the dtype of v; sums in float32 whatever the input."""
    with torch.autocast(v.device.type, enabled=False):
        q, k = F.relu(q).float(), F.relu(k).float()
        mixed = q @ (k.transpose(-1, -2) @ v.float())
        total = q @ k.sum(-2)[..., None]
        return (mixed / (total + FLOOR)).to(v.dtype)


class ConvolvedMlp(nn.Module):
    """(b, c, h, w) -> (b, c, h, w), without the residual. The depthwise convolution sees neighbours and borders, which
    is all that networks without positions know of where a cell is."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(width, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.narrow = nn.Conv2d(hidden, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.depthwise(F.silu(self.widen(x))).chunk(2, 1)
        return self.narrow(value * F.silu(gate))
