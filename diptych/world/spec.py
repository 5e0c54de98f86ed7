"""What a picture must show, in clauses: prompts state them, the verifier checks them."""
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diptych.world.scene import Object


@dataclass(frozen=True, kw_only=True)
class Item:
    """`count` objects that share the stated attributes; None leaves an attribute open. `place` is a 3x3 cell name."""

    count: int = 1
    color: str | None = None
    shape: str | None = None
    size: str | None = None
    texture: str | None = None
    place: str | None = None

    def matches(self, obj: Object) -> bool:
        """Attributes only; places have their own tolerance in the verifier."""
        pairs = ((self.color, obj.color), (self.shape, obj.shape), (self.size, obj.size), (self.texture, obj.texture))
        return all(wanted is None or wanted == has for wanted, has in pairs)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Items, relations between items as (item index, relation name, item index), and the background.

    `closed`: nothing besides the items may be in the picture.
    """

    items: tuple[Item, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None
    closed: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Spec":
        return cls(items=tuple(Item(**i) for i in data["items"]),
                   relations=tuple((a, name, b) for a, name, b in data["relations"]),
                   background=data["background"], closed=data["closed"])
