"""Rejection sampling: a model answers documents, and what it got right goes another way than what it got wrong
(UnifiedReward-Think, arXiv 2505.03318). Right answers are trained on as they were given; documents that were answered
wrongly are what is learnt by reinforcement.

    sift(model, documents, Thought())     -> right, with the model's own answers; wrong, with empty targets
    FOLDER/right.jsonl, wrong.jsonl       a document per line, as `messages` of a training recipe and `documents` of an
                                          alignment recipe read them

Pairs to prefer by (`alignment.rewards.mining`) have their file here, too.
"""
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from diptych.alignment.rewards.base import Reward
from diptych.alignment.rewards.verdicts import supported
from diptych.benchmarks.world import said
from diptych.data.journal import Journal
from diptych.document import Document
from diptych.systems.base import Sampling, System

RIGHT, WRONG = "right.jsonl", "wrong.jsonl"
Verdict = Literal["right", "wrong", "unkept", "failed"]


@dataclass
class Kept:
    """`unkept`: right answers that `keep` refused; `failed`: answers that the reward could not judge. Both are in
    neither list."""

    right: list[Document] = field(default_factory=list)
    wrong: list[Document] = field(default_factory=list)
    unkept: int = 0
    failed: int = 0

    def add(self, verdict: Verdict, document: Document | None) -> None:
        if document is not None:
            (self.right if verdict == "right" else self.wrong).append(document)
        self.unkept += verdict == "unkept"
        self.failed += verdict == "failed"

    def write(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, documents in ((RIGHT, self.right), (WRONG, self.wrong)):
            write_documents(documents, folder / name)


def sift(system: System, documents: Sequence[Document], reward: Reward, *,
         keep: Callable[[Document], bool] | None = None, sampling: Sampling | None = None, seed: int = 0,
         batch: int = 64, journal: Journal | None = None, progress: bool = False) -> Kept:
    """Answer i has the seed `seed` + i. Right is what has the best value of the reward; `keep` may refuse an answer
    that is right for a wrong reason. What is in the `journal` is not asked again: it belongs to this model, this way of
    asking and documents that begin alike."""
    facts, kept = reward.facts, Kept()
    best = facts.high if facts.sign > 0 else facts.low
    done = [] if journal is None else journal.rows[:len(documents)]
    for row in done:
        kept.add(row["verdict"], Document.from_dict(row["document"]) if row["document"] else None)
    with tqdm(total=len(documents), initial=len(done), disable=None if progress else True, leave=False) as bar:
        for start in range(len(done), len(documents), batch):
            asked = [d.prompt() for d in documents[start:start + batch]]
            made = system.generate(asked, sampling, seeds=[seed + start + i for i in range(len(asked))])
            rows: list[dict[str, Any]] = []
            for a, m, score in zip(asked, made, reward(asked, made), strict=True):
                verdict: Verdict = (
                    "failed" if score.failure else
                    "wrong" if (score.value < best if facts.sign > 0 else score.value > best) else
                    "unkept" if keep is not None and not keep(m) else "right")
                document = {"right": m, "wrong": a}.get(verdict)
                kept.add(verdict, document)
                if journal is not None:
                    rows.append({"verdict": verdict, "document": document.to_dict() if document else None})
            if journal is not None:
                journal.add(rows)
            bar.update(len(asked))
    return kept


def consistent(made: Document) -> bool:
    """Whether the totals in the thoughts speak for the verdict; False where they cannot be read."""
    return supported(said(made)) is True


# -- files ------------------------------------------------------------------------------------------------------------

def write_documents(documents: Iterable[Document], path: str | Path) -> None:
    """A document per line; pictures in 8 bits."""
    _write(path, (document.to_json() for document in documents))


def read_documents(path: str | Path) -> list[Document]:
    # not splitlines, which also ends lines where a text holds a separator of its own
    return [Document.from_json(line) for line in Path(path).read_text("utf-8").split("\n") if line.strip()]


@dataclass(frozen=True)
class Preferred:
    """Two answers to the same, the better one first, with their scores (NaN: none)."""

    chosen: Document
    rejected: Document
    scores: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"chosen": self.chosen.to_dict(), "rejected": self.rejected.to_dict(),
                "scores": [None if s != s else s for s in self.scores]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Preferred":
        low, high = (float("nan") if s is None else float(s) for s in data["scores"])
        return cls(Document.from_dict(data["chosen"]), Document.from_dict(data["rejected"]), (low, high))


def write_pairs(pairs: Iterable[Preferred], path: str | Path) -> None:
    """A pair per line."""
    _write(path, (json.dumps(pair.to_dict()) for pair in pairs))


def read_pairs(path: str | Path) -> list[Preferred]:
    """Raises ValueError where a line is no pair, or there is none."""
    found = []
    for n, line in enumerate(Path(path).read_text("utf-8").split("\n"), 1):
        if line.strip():
            try:
                found.append(Preferred.from_dict(json.loads(line)))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"expected two answers, chosen and rejected, in line {n} of {path}, got {error!r}; "
                                 "fix: a file of `diptych mine`") from error
    if not found:
        raise ValueError(f"expected pairs of answers in {path}, got an empty file")
    return found


def _write(path: str | Path, lines: Iterable[str]) -> None:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    temporary.replace(path)
