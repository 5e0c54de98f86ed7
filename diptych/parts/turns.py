"""Chat templates as data: the strings that stand between what a user and what a model says."""
from dataclasses import dataclass

from diptych.document import Image, Piece
from diptych.parts.interleave import Frame
from diptych.parts.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What opens and what closes the turn of each role, before `gap` and a text. The start mark stands once, in front
    of all; the end mark closes what the assistant says in words. Defaults: DeepSeek's, as Janus uses it."""

    system: tuple[str, str] = ("", "\n\n")
    user: tuple[str, str] = ("<|User|>:", "\n\n")
    assistant: tuple[str, str] = ("<|Assistant|>:", "")
    gap: str = " "
    between: str = "\n"  # two pieces of one turn

    def lead(self, before: Piece | None, piece: Piece) -> str:
        """The string between two pieces, without the gap."""
        if before is not None and before.role == piece.role:
            return self.between
        closed = "" if before is None else getattr(self, before.role)[1]
        return closed + getattr(self, piece.role)[0]

    def frame(self, before: Piece | None, piece: Piece, vocabulary: Vocabulary, start: int) -> Frame:
        text, opens = not isinstance(piece, Image), before is None or before.role != piece.role
        ids = vocabulary.encode_frame(self.lead(before, piece))
        # a picture of the assistant follows the colon directly, one of the user stands behind the gap
        gap = self.gap if opens and getattr(self, piece.role)[0] else ""
        if gap and not text and piece.role != "assistant":
            ids += vocabulary.encode_frame(gap)
        return Frame(lead=(start,) * (before is None) + tuple(ids), open=False, gap=gap if text else "",
                     close=text and piece.role == "assistant")
