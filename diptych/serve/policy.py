"""The content policy: a function of the operator's that sees every text and picture, on both sides of the model.

    def policy(check: Check) -> str | None:
        if check.side == "prompt" and isinstance(check.piece, Text) and "secret" in check.piece.text:
            return "it asks for secrets"

A string refuses and says why; None lets pass. It runs in a thread and must be safe to call from several at once. If it
fails, nothing passes. Streamed answers wait until the piece has been seen: no half of a refused text gets out.
"""
import asyncio
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from diptych.document import Boxes, Piece, Text
from diptych.serve.errors import ApiError

Side = Literal["prompt", "answer"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """`piece` is a Text or an Image; `key` the name of the caller's API key, "" without keys."""

    side: Side
    piece: Piece
    model: str
    key: str


Policy = Callable[[Check], str | None]


class Refused(ApiError):
    """Content that the policy does not let pass."""

    def __init__(self, side: Side, reason: str) -> None:
        super().__init__(400, f"the {side} was refused by the content policy: {reason}",
                         code="content_policy_violation")
        self.reason = reason


def load_policy(spec: str) -> Policy:
    """`module:function`, looked for where Python looks and in the working directory."""
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"expected a policy as module:function, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(f"expected a module {module} for the policy, got none; fix: put {module}.py here, or its "
                         "folder into PYTHONPATH") from None
    if not callable(found):
        raise ValueError(f"expected a function {name} in {module}, got {type(found).__name__}")
    return found  # type: ignore[return-value]


async def enforce(policy: Policy | None, side: Side, pieces: Iterable[Piece], *, model: str, key: str) -> None:
    """Refused for the first piece that does not pass. Labels of boxes are texts too."""
    if policy is None:
        return
    for piece in pieces:
        seen = [Text(text=label) for label in piece.labels] if isinstance(piece, Boxes) else [piece]
        for one in seen:
            reason = await asyncio.to_thread(policy, Check(side=side, piece=one, model=model, key=key))
            if reason is not None:
                raise Refused(side, str(reason))
