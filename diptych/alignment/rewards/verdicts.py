"""Reading the replies of judges (UnifiedReward, arXiv 2503.05236; UnifiedReward-Think, arXiv 2505.03318).

Every form of reply has two readers: the published one, kept exact with its oddities (`published_*`), and a strict one
that says None where the reply is not of the form that was asked for. Published readers never say None: what they cannot
read is a verdict for the first candidate, or a score of 0.
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")
NUMBER = r"-?\d+(?:\.\d+)?"
FRAMES = 8  # of a pair of videos, half of them each

# -- pairs ------------------------------------------------------------------------------------------------------------

_BETTER = re.compile(r"\b(?:image|video|answer|response)\s+([12])\s+is\s+better\b", re.IGNORECASE)
_EQUAL = re.compile(r"\b(?:both\s+\w+\s+(?:are|is)\s+)?equally\s+(?:good|bad)\b|\bboth\s+equal\b", re.IGNORECASE)


def pair(text: str) -> int | None:
    """1 or 2, 0 for a tie, None if the reply does not say. Of several statements the last counts."""
    found = [(m.start(), int(m[1])) for m in _BETTER.finditer(text)] + [(m.start(), 0) for m in _EQUAL.finditer(text)]
    return max(found)[1] if found else None


def published_pair_generation(text: str, kind: str = "Image") -> int:
    """2 where the exact phrase "KIND 2 is better than KIND 1" occurs, whatever else is said."""
    return 2 if f"{kind} 2 is better than {kind} 1" in text else 1


def published_pair_understanding(text: str, kind: Literal["image", "video"] = "image") -> int:
    """From the last "Overall Judgment" (or the beginning) to the first full stop. For videos it looks for "Answer 2 is
    better than Answer 1", a form that its own prompt does not ask for."""
    verdict = text.rpartition("Overall Judgment")[2].partition(".")[0]
    endings = ("", "") if kind == "image" else (" than Answer 2", " than Answer 1")
    said = [f"Answer {k} is better{ending}" in verdict for k, ending in zip((1, 2), endings, strict=True)]
    return 2 if said[1] and not said[0] else 1


# -- points -----------------------------------------------------------------------------------------------------------

_MARKER = re.compile(r"final\s+score\s*(?:\*\*)?\s*:\s*(?:\*\*)?", re.IGNORECASE)
_RANGE = re.compile(rf"\(?\b\d+\s*(?:-|to)\s*\d+\b\)?(?:\s*scale)?\s*:?|(?:/|\bout of\b)\s*{NUMBER}")


def point(text: str, low: float, high: float) -> float | None:
    """The number behind the last "Final Score:", in the line it begins; None unless there is exactly one and it lies
    in the range. A range ("1-5 scale:", "/5", "out of 10") is no score."""
    *before, last = _MARKER.split(text)
    line = next((part for part in last.splitlines() if part.strip()), "")
    found = re.findall(NUMBER, _RANGE.sub(" ", line))
    if not before or len(found) != 1 or not low <= float(found[0]) <= high:
        return None
    return float(found[0])


def published_point_sift(text: str) -> str | int:
    """The first digits behind the last "Final Score:" (without the marker, of the whole text), as a string; 0 without
    any."""
    found = re.search(r"\d+", text.rpartition("Final Score:")[2])
    return found[0] if found else 0


def published_point_understanding(text: str) -> int:
    return int(published_point_sift(text))


def published_point_served(text: str) -> float:
    """A number that begins with a digit from 1 to 5 behind "Final Score:", else 0; divided by 5 it is the reward."""
    found = re.search(r"Final Score:\s*([1-5](?:\.\d+)?)", text)
    return float(found[1]) if found else 0.0


def axes(text: str, names: Sequence[str] = ("Alignment", "Coherence", "Style"), low: float = 1.0,
         high: float = 5.0) -> dict[str, float] | None:
    """The lines "NAME Score (1-5): 2.6947" of every axis, or None if one is missing or out of range."""
    out: dict[str, float] = {}
    for name in names:
        found = re.findall(rf"{name}\s+Score\s*(?:\([^)]*\))?\s*:\s*({NUMBER})", text, re.IGNORECASE)
        if not found or not low <= float(found[-1]) <= high:
            return None
        out[name] = float(found[-1])
    return out


# -- sifting ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sifted(Generic[T]):
    """Numbers of the best chosen and the worst rejected candidate (the first of equals) with their scores."""

    chosen: int
    rejected: int
    chosen_score: T
    rejected_score: T

    @property
    def kept(self) -> bool:
        """Whether the pair says anything: the chosen one scores higher."""
        return float(self.chosen_score) > float(self.rejected_score)  # type: ignore[arg-type]


def sift(chosen: Sequence[T], rejected: Sequence[T]) -> Sifted[T]:
    """From the point scores of those that won a comparison and of those that lost one. Scores compare as what they
    are: pass numbers (as strings "10" < "9", which is how the published script for pictures sifts)."""
    if not chosen or not rejected:
        raise ValueError(f"expected scores of chosen and of rejected ones, got {len(chosen)} and {len(rejected)}")
    best: Any = max(range(len(chosen)), key=lambda i: (chosen[i], -i))  # type: ignore[arg-type,return-value]
    worst: Any = min(range(len(rejected)), key=lambda i: (rejected[i], i))  # type: ignore[arg-type,return-value]
    return Sifted(best, worst, chosen[best], rejected[worst])


# -- thinking judges --------------------------------------------------------------------------------------------------

_FORM = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TOTAL = re.compile(rf"(?:image|video|answer)\s+([12])\s*:\s*[^\n;]*?=?\s*({NUMBER})\s*(?:;|$)",
                    re.IGNORECASE | re.MULTILINE)


def well_formed(reply: str) -> bool:
    """Thoughts and answer in their tags from the start; what follows does not matter."""
    return _FORM.match(reply) is not None


def answer(reply: str) -> str:
    """What stands in the first answer tags, without spaces around; the whole reply if there are none."""
    found = _ANSWER.search(reply)
    return (found[1] if found else reply).strip()


def accurate(reply: str, solution: str, *, lenient: bool = False) -> bool:
    """Whether the answer equals the solution; `lenient`: up to case and a full stop."""
    said, wanted = answer(reply), solution.strip()
    if lenient:
        said, wanted = said.rstrip(".").lower(), wanted.rstrip(".").lower()
    return said == wanted


def supported(reply: str) -> bool | None:
    """Whether the totals behind "Total score" speak for the verdict; None where totals or verdict cannot be read."""
    totals = dict(_TOTAL.findall(reply.lower().rpartition("total score")[2].partition("</think>")[0]))
    verdict = pair(answer(reply))
    if set(totals) != {"1", "2"} or verdict is None:
        return None
    gap = float(totals["1"]) - float(totals["2"])
    return verdict == (1 if gap > 0 else 2 if gap < 0 else 0)


def thinned(count: int, most: int = FRAMES) -> list[int]:
    """Which frames of a pair of videos, one behind the other, are shown: all, or so many evenly of either half."""
    if count <= most:
        return list(range(count))
    half, each = count // 2, most // 2
    return [start + i * half // each for start in (0, half) for i in range(each)]
