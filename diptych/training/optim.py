"""AdamW, and Muon for inner matrices, over named parameters: decay where it belongs, steps that a flag cancels.

State is made up front (zeros), so a checkpoint always has the same tensors and is loaded in place, sharded or not.
"""
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from diptych.training.precision import dtype_of
from diptych.training.recipe import Optimizer, Stage
from diptych.training.stages import rate_factor


def undecayed(system: nn.Module) -> set[str]:
    """Names of parameters without weight decay: embeddings, norms, biases, any vector or scalar."""
    names = {n for n, p in system.named_parameters() if p.ndim < 2}
    for prefix, module in system.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "norm" in type(module).__name__.lower():
            names |= {f"{prefix}.{n}" if prefix else n for n, _ in module.named_parameters(recurse=False)}
    return names


def inner_matrices(system: nn.Module) -> set[str]:
    """Names of what Muon trains: weights of linear layers and kernels of convolutions between hidden states. Embeddings
    and the layers next to data (`head`, `*_in`, `*_out`, patch embeddings) stay with AdamW."""
    outer = ("head", "_in", "_out", "patch_embedding")
    return {f"{prefix}.weight" for prefix, module in system.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not prefix.endswith(outer)}


class AdamW(torch.optim.AdamW):
    """The fused AdamW of torch with names, rates as factors, and a step that an on-device flag can cancel.

    With `muon` in the config, inner matrices take an orthogonalised momentum step instead (Jordan et al. 2024, scaled
    to AdamW's rates as in arXiv 2502.16982, eq. 4).
    """

    def __init__(self, system: nn.Module, names: Iterable[str], c: Optimizer, stage: Stage) -> None:
        parameters = dict(system.named_parameters())
        self.names = sorted(names)
        bare = undecayed(system)
        matrices = inner_matrices(system) if c.kind == "muon" else set()
        self.muon = {n: (parameters[n], rate_factor(n, stage)) for n in self.names if n in matrices}
        self.momentum, self.decay, self.lr = c.momentum, c.weight_decay, stage.lr
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name in self.names:
            if name not in self.muon:
                key = (0.0 if name in bare else c.weight_decay, rate_factor(name, stage))
                groups.setdefault(key, []).append(parameters[name])
        super().__init__([{"params": p, "weight_decay": decay, "rate": rate} for (decay, rate), p in groups.items()],
                         lr=stage.lr, betas=c.betas, eps=c.eps, fused=True)
        self.named = {n: parameters[n] for n in self.names}
        self.speed = {n: torch.zeros_like(p) for n, (p, _) in self.muon.items()}
        for n, p in self.named.items():
            if n not in self.muon:
                self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                 "exp_avg_sq": torch.zeros_like(p)}

    def set_lr(self, lr: float) -> None:
        self.lr = lr
        for group in self.param_groups:
            group["lr"] = lr * group["rate"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for p, _ in self.muon.values():  # in no group of AdamW's
            p.grad = None

    def step_unless(self, bad: Tensor) -> None:
        """One step, or none at all where the scalar `bad` is true; without waiting for the device unless Muon is on."""
        self.found_inf = bad.float()  # the fused kernel's own way of cancelling a step
        self.step()
        if self.muon and not bool(bad):
            self._step_matrices()

    def clipped_step(self, largest: float, bad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clip all gradients to a norm of `largest` and take one step, unless the norm is not finite or `bad` says so.
        Returns the norm before, and whether the step was left out; both scalars on the device."""
        parameters = list(self.named.values())
        norm = gradient_norm(parameters)
        bad = ~torch.isfinite(norm) if bad is None else bad | ~torch.isfinite(norm)
        clip(parameters, norm, largest)
        self.step_unless(bad)
        return norm, bad

    @torch.no_grad()
    def _step_matrices(self) -> None:
        """Matrices of one shape are orthogonalised together: a few batched products instead of many small ones. Kernels
        are matrices (out, everything else)."""
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, (p, _) in self.muon.items():
            if p.grad is not None:
                shapes.setdefault(tuple(p.shape), []).append(name)
        for shape, names in shapes.items():
            speeds = [self.speed[n] for n in names]
            gradients = [cast(Tensor, self.muon[n][0].grad) for n in names]
            torch._foreach_lerp_(speeds, gradients, 1 - self.momentum)
            updates = orthogonalize(torch.stack(torch._foreach_lerp(gradients, speeds, self.momentum)).flatten(2))
            longest = max(updates.shape[1:])
            for name, update in zip(names, updates, strict=True):
                p, rate = self.muon[name]
                lr = self.lr * rate
                p.mul_(1 - lr * self.decay).add_(update.view(shape), alpha=-lr * 0.2 * longest ** 0.5)

    def tensors(self) -> dict[str, Tensor]:
        """`name/exp_avg`, `name/exp_avg_sq`, `name/step` or `name/momentum`: the state itself, to save or copy into."""
        state = {f"{n}/{k}": v for n, p in self.named.items() if n not in self.muon for k, v in self.state[p].items()}
        return state | {f"{n}/momentum": v for n, v in self.speed.items()}

    def carry(self, old: Mapping[str, Tensor]) -> None:
        """Take over the moments of the parameters that an earlier stage trained."""
        for key, value in self.tensors().items():
            if key in old:
                value.copy_(old[key])


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices of a batch (b, n, m), roughly: singular values end in about [0.7, 1.2]
    (Newton-Schulz, in bf16 where the device computes in it)."""
    if type(matrices).__name__ == "DTensor":
        raise ValueError("expected whole matrices for Muon, got sharded ones; fix: optimizer.kind=adamw under torchrun")
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype_of("bf16", matrices.device))
    x = x.transpose(1, 2).contiguous() if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if tall else x).to(matrices.dtype)


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
