"""What the model as it was answers and judges does not depend on who learns from it: kept in a folder, it is made once
for all runs that ask the same.

    FOLDER/answers-HASH.jsonl     documents as answered; of the model, its sampling, what was asked, seeds
    FOLDER/judged-HASH.jsonl      judgements of drawings, one per document; of the model, the judge, the drawings

Pictures are kept in 8 bits, and a run that makes them reads them back: all learn from the same.
"""
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from diptych import config
from diptych.alignment.rewards.base import content_hash
from diptych.alignment.self_reward import Judged, read_records, write_records
from diptych.alignment.sifting import read_documents, write_documents
from diptych.document import Document, Text
from diptych.systems.base import Sampling, System
from diptych.systems.io import fingerprint


class AnswerCache:
    """`system` is the model as it was, before anything is learnt."""

    def __init__(self, folder: str | Path, system: System) -> None:
        self.folder, self.model = Path(folder), fingerprint(system)
        self.folder.mkdir(parents=True, exist_ok=True)

    def answers(self, asked: Sequence[Document], sampling: Sampling, seeds: Sequence[int],
                make: Callable[[], Sequence[Document]]) -> list[Document]:
        """These documents answered: as they are kept, or as `make` says."""
        path = self._path("answers", asked, json.dumps([config.to_dict(sampling), list(seeds)], sort_keys=True))
        if not path.is_file():
            write_documents(make(), path)
        return read_documents(path)

    def judged(self, made: Sequence[Document], judge: str, make: Callable[[], Sequence[Judged]]) -> list[Judged]:
        path = self._path("judged", made, judge)
        if not path.is_file():
            write_records(path, make())
        return read_records(path)

    def _path(self, what: str, documents: Sequence[Document], how: str) -> Path:
        own = Document((Text(text=self.model), Text(text=how)))
        return self.folder / f"{what}-{content_hash(own, *documents)}.jsonl"
