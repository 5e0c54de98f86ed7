"""Diptych: one library for models that both see and draw.

    import diptych
    model = diptych.open_model("mini")
    document = diptych.Document([diptych.Text(text="a red circle"), diptych.Image(target=True, size=(64, 64))])
    [finished] = model.generate([document])

Names are resolved on first use, so that `import diptych` loads neither torch nor numpy.
"""
import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diptych.adapters.published import open_model
    from diptych.document import Actions, Audio, Boxes, Document, Image, Mask, Svg, Text, Video
    from diptych.systems.io import load_system, save_system

__all__ = ["Document", "Text", "Image", "Video", "Audio", "Svg", "Boxes", "Mask", "Actions", "load_system",
           "save_system", "open_model"]

_HOMES = {"diptych.document": __all__[:9], "diptych.systems.io": __all__[9:11],
          "diptych.adapters.published": __all__[11:]}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'diptych' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
