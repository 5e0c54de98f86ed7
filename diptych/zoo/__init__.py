"""The zoo: tiny trained ingredients in the roles that systems take from the hub elsewhere.

    codec = zoo.load("codec")       # an ordinary module: eval mode, frozen, float32
    zoo.path("codec")               # its weight file; a card NAME.md beside it says data, cost and quality
    diptych zoo build codec         # makes it again

A weight file is NAME.safetensors (bfloat16, or 8 bits: `diptych.parts.stored`), its config NAME.json, its card NAME.md.
"""
import difflib
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.zoo.build import Ingredient

FORMAT = 1
WEIGHTS = Path(__file__).parent / "weights"

# name -> module:class, imported on use
INGREDIENTS: dict[str, str] = {
    "codec": "diptych.zoo.codec:Codec",
    "clip": "diptych.zoo.clip:Clip",
    "vq": "diptych.zoo.vq:VQ",
    "rq": "diptych.zoo.vq:RQ",
    "bits": "diptych.zoo.vq:Bits",
}


def names() -> tuple[str, ...]:
    """All ingredients that have a recipe."""
    return ("tokenizer", *INGREDIENTS)


def find(name: str) -> "type[Ingredient]":
    """The recipe class of an ingredient."""
    if name not in INGREDIENTS:
        near = difflib.get_close_matches(name, names(), 1, 0.0)
        raise ValueError(f"expected a zoo name out of {', '.join(names())}, got {name!r}; "
                         f"fix: did you mean {near[0]!r}?")
    module, _, attribute = INGREDIENTS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def path(name: str, folder: Path | str | None = None) -> Path:
    """The weight file of an ingredient, in the package or in `folder`."""
    if name == "tokenizer":
        file = Path(folder or WEIGHTS) / "tokenizer.json"
    else:
        file = Path(folder or WEIGHTS) / f"{find(name).name}.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"expected weights at {file}, got none; fix: run `diptych zoo build {name}`")
    return file


def load(name: str, folder: Path | str | None = None) -> Any:
    """The trained module: eval mode, frozen, float32, on the CPU. "tokenizer" gives a `Tokenizer`."""
    if name == "tokenizer":
        from diptych.zoo.tokenizer import Tokenizer

        return Tokenizer.load(path(name, folder))
    import torch

    from diptych.parts.stored import read

    file = path(name, folder)
    stored: dict[str, Any] = json.loads(file.with_suffix(".json").read_text())
    if stored["format"] != FORMAT or stored["name"] != name:
        raise ValueError(f"expected {file.with_suffix('.json')} in format {FORMAT} for {name!r}, "
                         f"got format {stored['format']} for {stored['name']!r}; fix: build it again")
    with torch.random.fork_rng(devices=[]):  # fresh weights are overwritten: leave the caller's random state alone
        model = find(name).restore(stored["config"])
    model.load_state_dict({k: v.float() for k, v in read(file).items()}, strict=True)
    return model.eval().requires_grad_(False)
