"""A small world with exact ground truth: scenes, pictures, language, questions, edits, stories."""
from importlib import import_module
from typing import Any

_HOME = {"Object": "scene", "Scene": "scene", "WorldConfig": "scene", "WORLDS": "scene", "Item": "spec", "Spec": "spec",
"sample_scene": "sample", "document": "tasks", "TASKS": "tasks", "SPLITS": "sample"}
__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diptych.world' has no attribute {name!r}")
    return getattr(import_module(f"diptych.world.{_HOME[name]}"), name)
