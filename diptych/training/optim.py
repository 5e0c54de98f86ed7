"""AdamW over named parameters: decay where it belongs, state that exists before the first step, steps that skip.

State is made up front (zeros), so a checkpoint always has the same tensors and is loaded in place, sharded or not.
"""
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from diptych.training.recipe import Optimizer, Stage
from diptych.training.stages import rate_factor


def undecayed(system: nn.Module) -> set[str]:
    """Names of parameters without weight decay: embeddings, norms, biases, any vector or scalar."""
    names = {n for n, p in system.named_parameters() if p.ndim < 2}
    for prefix, module in system.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "norm" in type(module).__name__.lower():
            names |= {f"{prefix}.{n}" if prefix else n for n, _ in module.named_parameters(recurse=False)}
    return names


class AdamW(torch.optim.AdamW):
    """The fused AdamW of torch with names, rates as factors, and a step that an on-device flag can cancel."""

    def __init__(self, system: nn.Module, names: Iterable[str], c: Optimizer, stage: Stage) -> None:
        parameters = dict(system.named_parameters())
        self.names = sorted(names)
        bare = undecayed(system)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name in self.names:
            key = (0.0 if name in bare else c.weight_decay, rate_factor(name, stage))
            groups.setdefault(key, []).append(parameters[name])
        super().__init__([{"params": p, "weight_decay": decay, "rate": rate} for (decay, rate), p in groups.items()],
                         lr=stage.lr, betas=c.betas, eps=c.eps, fused=True)
        self.named = {n: parameters[n] for n in self.names}
        for p in self.named.values():
            self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                             "exp_avg_sq": torch.zeros_like(p)}

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr * group["rate"]

    def step_unless(self, bad: Tensor) -> None:
        """One step, or none at all where the scalar `bad` is true; without waiting for the device."""
        self.found_inf = bad.float()  # the fused kernel's own way of cancelling a step
        self.step()

    def tensors(self) -> dict[str, Tensor]:
        """`name/exp_avg`, `name/exp_avg_sq`, `name/step`: the state itself, to be saved or copied into."""
        return {f"{n}/{k}": v for n, p in self.named.items() for k, v in self.state[p].items()}

    def carry(self, old: Mapping[str, Tensor]) -> None:
        """Take over the moments of the parameters that an earlier stage trained."""
        for key, value in self.tensors().items():
            if key in old:
                value.copy_(old[key])


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The float32 norm over all gradients, a plain scalar on the device also when gradients are sharded."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        raise ValueError("expected a gradient for at least one trained parameter, got none; "
                         "fix: train parameters that the loss reaches")
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    return getattr(norm, "full_tensor", lambda: norm)()


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, largest: float) -> None:
    if largest > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
