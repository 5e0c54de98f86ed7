"""Where and when a token is: rotary embeddings, fixed sine tables, time embeddings. Angles are float32 throughout."""
import math

import torch
from torch import Tensor, nn

from diptych.parts.tokens import Tokens


class Rope:
    """Rotary position embedding over (frame, row, column).

    With `sections` (per-axis numbers of rotated pairs, summing to head_dim / 2) each axis turns its own pairs, as in
    multimodal RoPE; without, all pairs follow the first axis (one-dimensional RoPE). The pairs of an axis stand side by
    side, or `interleaved` with those of the others, the first axis taking what is left over (Qwen3-VL). A `head_dim`
    less than that of the heads turns their first channels only (partial RoPE). `precision` is that of the frequencies:
    a network that was turned to half precision as a whole has rounded ones.
    """

    precision: torch.dtype = torch.float32

    def __init__(self, head_dim: int, theta: float = 10_000.0, sections: tuple[int, ...] | None = None,
                 interleaved: bool = False) -> None:
        if sections is not None and sum(sections) != head_dim // 2:
            raise ValueError(f"expected rope sections that sum to head_dim / 2 = {head_dim // 2}, got {sections}")
        self.head_dim, self.theta, self.sections, self.interleaved = head_dim, theta, sections, interleaved

    def __call__(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """cos, sin (B, T, head_dim / 2), float32."""
        device = tokens.position.device
        exponent = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        inverse = (self.theta**-exponent).to(self.precision).float()
        if self.sections is None:
            angle = tokens.position[..., :1] * inverse
        else:
            angle = tokens.position[..., self.axes(device)] * inverse
        return angle.cos(), angle.sin()

    def axes(self, device: torch.device) -> Tensor:
        """The axis that every pair follows (head_dim / 2,)."""
        sections = torch.tensor(self.sections, device=device)
        count = len(sections)
        if not self.interleaved:
            return torch.repeat_interleave(torch.arange(count, device=device), sections)
        pair = torch.arange(self.head_dim // 2, device=device)
        return torch.where(pair < count * sections[pair % count], pair % count, 0)


def axial_angles(places: Tensor, head_dim: int, theta: float = 10_000.0,
                 precision: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos, sin (..., head_dim / 2) float32 of places (..., 2): the first half of the pairs turns with the row, the
    second with the column, each with all frequencies (vision towers, Infinity). `precision` as in `Rope`."""
    quarter = head_dim // 2
    inverse = theta ** -(torch.arange(0, quarter, 2, device=places.device, dtype=torch.float32) / quarter)
    angle = (places.float()[..., None] * inverse.to(precision).float()).flatten(-2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, heads, head_dim): pairs are (i, i + head_dim / 2), the Llama and Qwen convention. Channels beyond
    those that have angles pass."""
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat((rotate(x[..., :turned], cos, sin), x[..., turned:]), -1)
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def sincos_2d(width: int, side: int, step: float = 1.0) -> Tensor:
    """Fixed table (side * side, width), id = row * side + column. First half of the channels encodes the column,
    second half the row, each as sin | cos (DiT, BAGEL). `step` from one row or column to the next."""
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = []
    for axis in (column, row):
        angle = axis.reshape(-1, 1).double() * step * omega
        halves.append(torch.cat((angle.sin(), angle.cos()), 1))
    return torch.cat(halves, 1).float()


class TimeEmbedding(nn.Module):
    """Sinusoid of a scalar (cos | sin) followed by Linear-SiLU-Linear: (n,) -> (n, width). `t` is fed as it is, or its
    angles times `scale`, which rounds otherwise than t times it."""

    def __init__(self, width: int, frequencies: int = 256, max_period: float = 10_000.0, scale: float = 1.0) -> None:
        super().__init__()
        self.frequencies, self.max_period, self.scale = frequencies, max_period, scale
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        decay = torch.exp(-math.log(self.max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angle = t.float()[:, None] * decay * self.scale
        return self.mlp(torch.cat((angle.cos(), angle.sin()), 1).to(next(self.mlp.parameters()).dtype))
