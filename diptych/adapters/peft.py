"""Published LoRA adapters (PEFT: `adapter_config.json`, `*.safetensors`) on networks whose layers are fused here.

A layer here may hold several published ones, one behind the other (queries, keys and values). Their additions become
one of as many ranks: the A below each other, the B along the diagonal. Sums, gradients and strength stay theirs.
"""
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.adapters.keys import Rule
from diptych.adapters.tensors import read_json
from diptych.training import lora

PREFIX = "base_model.model."
# settings that would change what is added, with the one value that is built here
FIXED = {"peft_type": "LORA", "use_rslora": False, "use_dora": False, "bias": "none", "fan_in_fan_out": False}


@dataclass(frozen=True)
class Place:
    """Where a published pair lies: `columns` of the ranks and `rows` of the outputs of the layer `ours`."""

    ours: str
    ranks: slice
    rows: slice


def attach(model: nn.Module, rules: Iterable[Rule], folder: Path,
           file: str = "adapter_model.safetensors") -> dict[str, Place]:
    """Attach the LoRA layers of a folder to a model and load them; the place of every published layer, by its name
    without `.lora_A.weight`. `rules` are those of the weights that the adapter changes."""
    about, tensors = read_json(folder / "adapter_config.json"), load_file(folder / file)
    for key, only in FIXED.items():
        if about.get(key, only) != only:
            raise ValueError(f"expected an adapter with {key} {only!r}, got {about[key]!r}")
    names = {k.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for k in tensors}
    places, sizes = dict[str, Place](), dict[str, int]()
    for rule in rules:
        layers = [t.removesuffix(".weight") for t in rule.theirs]
        if not rule.ours.endswith(".weight") or not names.intersection(layers):
            continue
        if rule.op != "copy" or rule.part != (0, 1) or rule.rotary or rule.row is not None:
            raise ValueError(f"expected layers that are the published ones, got {rule.ours}; fix: merge the adapter")
        ours, row, rank = rule.ours.removesuffix(".weight"), 0, 0
        for i, layer in enumerate(layers):
            if layer in names:
                a, b = _pair(tensors, layer)
                places[layer] = Place(ours, slice(rank, rank + len(a)), slice(row, row + len(b)))
                rank += len(a)
            row += rule.sizes[i] if rule.sizes else 0
        sizes[ours] = rank
    if names - set(places):
        raise ValueError(f"expected layers of the network, got {', '.join(sorted(names - set(places))[:3])}")
    scale = about["lora_alpha"] / about["r"]
    for rank in sorted(set(sizes.values())):
        chosen = [name for name, size in sizes.items() if size == rank]
        lora.attach(model, chosen, rank, scale * rank)
    found = lora.layers(model)
    for layer in found.values():  # layers of one size freeze those of another
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    with torch.no_grad():
        for name, place in places.items():
            a, b = _pair(tensors, name)
            found[place.ours].lora_A.weight[place.ranks] = a
            found[place.ours].lora_B.weight[place.rows, place.ranks] = b
    return places


def _pair(tensors: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    return tensors[f"{PREFIX}{layer}.lora_A.weight"], tensors[f"{PREFIX}{layer}.lora_B.weight"]


def gradients(model: nn.Module, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Gradients of the published tensors, by their names without prefix."""
    found, out = lora.layers(model), dict[str, Tensor]()
    for layer, place in places.items():
        for part, block in (("A", (place.ranks,)), ("B", (place.rows, place.ranks))):
            weight = getattr(found[place.ours], f"lora_{part}").weight
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            out[f"{layer}.lora_{part}.weight"] = gradient[block]
    return out
