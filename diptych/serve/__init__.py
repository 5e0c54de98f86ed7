"""The HTTP server: an OpenAI-compatible API in front of the engine. `create_app(systems, settings)` makes it."""
from diptych.serve.app import create_app
from diptych.serve.settings import Settings

__all__ = ["Settings", "create_app"]
