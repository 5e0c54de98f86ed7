"""Batched generation. `generate(system, documents)` fills documents; `Engine` is the scheduler behind it."""
from diptych.engine.engine import Engine, Listen, QueueFull, Request, admit, generate

__all__ = ["Engine", "Listen", "QueueFull", "Request", "admit", "generate"]
