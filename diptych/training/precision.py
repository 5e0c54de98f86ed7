"""In which arithmetic a training computes. Where bfloat16 has to be emulated, products in it take several times as long
as in float32, so `precision: bf16` means bfloat16 where the device computes in it, and float32 elsewhere.
"""
from functools import cache

import torch

from diptych.training.recipe import Precision


@cache
def native_bf16(kind: str) -> bool:
    """Whether devices of this kind ("cpu", "cuda", ...) compute in bfloat16."""
    if kind == "cpu":
        return any(there for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of large products."""
    return torch.bfloat16 if precision == "bf16" and native_bf16(device.type) else torch.float32


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Around a forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype_of(precision, device) is torch.bfloat16)
