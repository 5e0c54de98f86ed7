"""The Studio: one page for people on a server's own address, and what it needs beyond the API of the models."""
from diptych.serve.studio.routes import add_studio

__all__ = ["add_studio"]
