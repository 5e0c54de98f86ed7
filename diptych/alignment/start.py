"""From a recipe of `recipes/align` to the loop that does what it says. A recipe with the key `game` is played."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych import config
from diptych.alignment.aligner import Aligner
from diptych.alignment.game import Contest, Player
from diptych.alignment.loop import Loop
from diptych.alignment.recipe import Align
from diptych.alignment.workers.setup import Workers
from diptych.systems.base import System


def load(path: str | Path, overrides: Sequence[str] = ()) -> Align | Contest:
    return read(config.override(config.read_yaml(path), overrides, where=str(path)), str(path))


def read(plain: Mapping[str, Any], where: str = "config") -> Align | Contest:
    return config.from_dict(Contest if "game" in plain else Align, plain, where=where)  # type: ignore[arg-type]


def start(recipe: Align | Contest, system: System, run: str | Path, workers: Workers | None = None) -> Loop:
    if isinstance(recipe, Align):
        return Aligner(recipe, system, run, workers=workers)
    if workers not in (None, Workers()):
        raise ValueError("expected a game to be played in one process, got workers elsewhere; fix: leave them out")
    return Player(recipe, system, run)
