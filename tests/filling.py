"""What starts at zero hides everything behind it."""
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def filled(module: M) -> M:
    """With trained parameters that are all zero drawn from N(0, 0.3^2), always the same."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad and not p.any():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return module
