"""What the golden cases of serial systems share: tensors of a case, a generator asked in published terms, a prompt read
with features that are known, a picture drawn from given noise.

Published conventions: sigma 1 = noise, timestep = 1000 sigma, the network says noise - data, latents (b, c, h, w).
"""
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters.cases import Case
from diptych.parts.dit import NOISE_STEPS
from diptych.parts.dit_stream import Reference
from diptych.parts.interleave import Page, Writer
from diptych.parts.vision import patchify, unpatchify
from diptych.systems.base import Sampling
from diptych.systems.packed import Packed
from diptych.systems.serial import Serial
from diptych.systems.works import Grid, Read, Reader

TOLERANCE, SAMPLED = 1e-4, 2e-4
S = TypeVar("S", bound=Packed)


class Golden:
    """The tensors of one case, and the comparisons made with them so far."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.name, self.tensors, self.values, self.cases = name, tensors, values, list[Case]()
        self.given = {k.removeprefix(f"{name}.input."): v for k, v in tensors.items() if k.startswith(f"{name}.input.")}
        self.wanted = {k.removeprefix(f"{name}.output."): v for k, v in tensors.items()
                       if k.startswith(f"{name}.output.")}

    def compare(self, tolerance: float = TOLERANCE, **own: Tensor) -> None:
        self.compare_all(own, tolerance)

    def compare_all(self, own: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
        self.cases += [Case.compare(f"{self.name}.{k}", v.detach(), self.wanted[k], tolerance) for k, v in own.items()]

    @property
    def grids(self) -> list[Grid]:
        """Of the patches of pictures that are read."""
        found = next((self.given[k] for k in ("image_grid_thw", "grid_thw") if k in self.given), torch.zeros(0, 3))
        return [(int(rows), int(columns)) for _, rows, columns in found.tolist()]

    def rows(self) -> list[list[int]]:
        """Ids without padding."""
        mask = self.given["attention_mask"].bool()
        return [row[keep].tolist() for row, keep in zip(self.given["input_ids"], mask, strict=True)]


def run(model: S, folder: Path, kinds: "Mapping[str, Callable[[S, Golden], None]]") -> list[Case]:
    """Every case of a golden folder, by the function whose name its own begins with (longer names come first)."""
    tensors, values = load_file(folder / "golden.safetensors"), json.loads((folder / "config.json").read_text())
    cases: list[Case] = []
    for name in dict.fromkeys(k.split(".")[0] for k in tensors):
        kind = next((k for k in kinds if name.startswith(k)), None)
        if kind is None:
            raise ValueError(f"expected cases named after {', '.join(kinds)}, got {name!r}")
        golden = Golden(name, tensors, values)
        kinds[kind](model, golden)
        cases += golden.cases
    return cases


def velocity(model: Serial, x: Tensor, timestep: Tensor, condition: Tensor, visible: Tensor | None = None,
             reference: Tensor | None = None) -> Tensor:
    """Published latents (b, c, h, w), timesteps (b,) and latents to draw from -> noise - data, of the same shape."""
    patch = model.config.latent_patch
    grid = (x.shape[2] // patch, x.shape[3] // patch)
    given = None if reference is None else patchify(reference, patch)
    v = model.velocity(patchify(x, patch), 1 - timestep / NOISE_STEPS, condition, grid, visible, given)
    return -unpatchify(v, patch, grid)


def read(model: Serial, reader: Reader, w: Writer, features: Tensor | None) -> None:
    """Read a prompt, with features (n, width) of its pictures."""
    if features is None:
        model.run([Read(reader, w)])
        return
    page = Page.of([[w]])
    run = model.trunk.start([reader.context], page.tokens, model.embed.weight.dtype)
    model.trunk(model.states(page, features, None), page.tokens, model.mask, run)
    run.commit([w.strip.length])
    reader.position, reader.segment = w.position, w.segment


def drawn(model: Serial, x: Tensor, grid: Grid, told: dict[str, Tensor], sampling: Sampling,
          references: Sequence[Reference] = ()) -> Tensor:
    """From noise x (n, d) to latent tokens (n, d), with the condition (q, c) of every context and the same references
    in all."""
    program = model.develop(x, grid, told, sampling, torch.Generator(), 0, lambda event: None,
                            {name: list(references) for name in told})
    return cast(Tensor, model.finish(cast(Any, {0: program}))[0])
