"""Batched generation. `generate(system, documents)` fills documents; `Engine` is the scheduler behind it."""
from diptych.engine.engine import Engine, QueueFull, Request, generate

__all__ = ["Engine", "QueueFull", "Request", "generate"]
