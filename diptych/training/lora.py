"""LoRA (arXiv 2106.09685): W x + (alpha / rank) B A x on chosen linear layers, saved in the layout of PEFT."""
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.training.stages import check_patterns, matches

_PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """A linear layer with a low-rank addition; `base` keeps the original weights. `active` says whether it is added."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base, self.rank, self.alpha, self.active = base, rank, alpha, True
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)  # training starts from the base model

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return out + self.lora_B(self.lora_A(x)) * (self.alpha / self.rank) if self.active else out

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with the addition in its weights (changed in place)."""
        self.base.weight += self.lora_B.weight.float().mm(self.lora_A.weight.float()).mul(self.alpha / self.rank)
        return self.base


def attach(model: nn.Module, patterns: Iterable[str], rank: int, alpha: float, seed: int = 0) -> list[str]:
    """Replace the linear layers that the patterns match; all other parameters stop training. Names of the layers."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    check_patterns(names, patterns := list(patterns), "lora layers")
    chosen = [n for n in names if matches(n, patterns)]
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        layer = LoraLinear(model.get_submodule(name), rank, alpha)  # type: ignore[arg-type]
        bound = 1 / math.sqrt(layer.base.in_features)  # PEFT: kaiming_uniform with a = sqrt(5)
        start = torch.rand(layer.lora_A.weight.shape, generator=generator) * 2 * bound - bound
        with torch.no_grad():
            layer.lora_A.weight.copy_(start)
        model.set_submodule(name, layer)
    return chosen


def layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}


@contextmanager
def inactive(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that the layers were attached to: the reference of a policy that trains them."""
    before = {layer: layer.active for layer in layers(model).values()}
    for layer in before:
        layer.active = False
    try:
        yield
    finally:
        for layer, active in before.items():
            layer.active = active


def merge(model: nn.Module) -> None:
    """Put every addition into the weights and the plain linear layers back."""
    for name, layer in layers(model).items():
        model.set_submodule(name, layer.merged())


def save(model: nn.Module, folder: str | Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does."""
    found = layers(model)
    if not found:
        raise ValueError("expected a model with LoRA layers, got none; fix: attach them first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(found.values()))
    tensors = {f"{_PREFIX}{n}.{k}.weight": getattr(m, k).weight.detach().cpu().contiguous()
               for n, m in found.items() for k in ("lora_A", "lora_B")}
    about = {"peft_type": "LORA", "r": first.rank, "lora_alpha": first.alpha, "target_modules": sorted(found),
             "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "inference_mode": True}
    for path, write in ((folder / "adapter_model.safetensors", lambda p: save_file(tensors, p)),
                        (folder / "adapter_config.json", lambda p: p.write_text(json.dumps(about, indent=1)))):
        temporary = path.with_name("." + path.name)
        write(temporary)
        temporary.replace(path)


def load(model: nn.Module, folder: str | Path) -> None:
    """Attach the layers of a saved adapter to a plain model and load them."""
    folder = Path(folder)
    about = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    attach(model, about["target_modules"], about["r"], about["lora_alpha"])
    found = layers(model)
    expected = {f"{_PREFIX}{n}.{k}.weight" for n in found for k in ("lora_A", "lora_B")}
    if expected != set(tensors):
        raise ValueError(f"expected the {len(expected)} tensors of {', '.join(found)}, "
                         f"got {', '.join(sorted(tensors)[:4])}")
    with torch.no_grad():
        for name, layer in found.items():
            for part in ("lora_A", "lora_B"):
                getattr(layer, part).weight.copy_(tensors[f"{_PREFIX}{name}.{part}.weight"])
