"""Long work by rows: what a journal keeps, and sifting and mining that go on where they were interrupted."""
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filling import filled

from diptych.alignment.rewards.base import Reward
from diptych.alignment.rewards.judges import PairJudge, PointJudge, Thought
from diptych.alignment.rewards.mining import mine
from diptych.alignment.sifting import read_documents, read_pairs, sift
from diptych.data.journal import Journal
from diptych.document import Document, Image, Text
from diptych.systems.base import Sampling, System
from diptych.systems.io import save_system
from diptych.systems.table import find
from diptych.world.tasks import document


def test_a_journal_keeps_rows_and_knows_whose_they_are(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    Journal(path, {"seed": 0, "of": (1, 2)}, "rows").add([{"a": 1}, {"text": "one\u2028line"}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"a": 3, "te')  # killed inside a line
    again = Journal(path, {"seed": 0, "of": (1, 2)}, "rows")
    assert again.rows == [{"a": 1}, {"text": "one\u2028line"}] and path.read_bytes() == whole
    other = Journal(path, {"seed": 0, "of": [1, 2]}, "rows")
    again.add([{"a": 2}])
    other.add([{"a": 3}])
    assert [r.get("a") for r in Journal(path, {"seed": 0, "of": [1, 2]}, "rows").rows] == [1, None, 2, 3]
    with pytest.raises(ValueError, match="expected rows in .*rows.jsonl, got others; fix: another file, or remove it"):
        Journal(path, {"seed": 1, "of": [1, 2]}, "rows")
    again.remove()
    assert not list(path.parent.iterdir())


class Saying(System):
    """Thinks of documents whose number is even as their teacher does, of others nothing; draws by its seed; judges by
    brightness. Interrupted once it has answered `most` documents."""

    def __init__(self, most: int = 10_000) -> None:
        super().__init__()
        self.most, self.seen = most, 0

    def default_sampling(self) -> Sampling:
        return Sampling()

    def generate(self, documents: Sequence[Document], sampling: Sampling | None = None, *,
                 seeds: Sequence[int] | int = 0, **kwargs: Any) -> list[Document]:
        self.seen += len(documents)
        if self.seen > self.most:
            raise KeyboardInterrupt
        assert all(p.empty for d in documents for p in d.targets)
        seeds = [seeds] * len(documents) if isinstance(seeds, int) else seeds
        return [Document((*d.pieces[:-1], self.fill(d, seed)), d.task, d.meta)
                for d, seed in zip(documents, seeds, strict=True)]

    def fill(self, asked: Document, seed: int) -> Any:
        target = asked.targets[-1]
        if isinstance(target, Image):
            return Image.from_uint8(np.full((8, 8, 3), seed * 37 % 256, np.uint8), role="assistant", target=True)
        if asked.task.endswith("think"):
            true = document(asked.task, asked.meta["index"], world="one").targets[0].text
            return target.replace(text=true if asked.meta["index"] % 2 == 0 else "no idea")
        light = [float(p.pixels.mean()) for p in asked.of(Image)]
        return target.replace(text=f"image {1 + (light[0] < light[1])} is better" if len(light) == 2 else
                              f"final score : {1 + round(3 * light[0])}")


def test_an_interrupted_sift_goes_on(tmp_path: Path) -> None:
    rows = [document("draw-think", i, world="one") for i in range(10)]
    whole = sift(Saying(), rows, Thought(), batch=3)
    assert len(whole.right) == 5 == len(whole.wrong)
    with pytest.raises(KeyboardInterrupt):
        sift(Saying(most=6), rows, Thought(), batch=3, journal=Journal(tmp_path / "j", {}, "rows"))
    rest = Saying()
    kept = sift(rest, rows, Thought(), batch=3, journal=Journal(tmp_path / "j", {}, "rows"))
    assert rest.seen == 4, "what is done is not asked again"
    for folder, found in (("whole", whole), ("rest", kept)):
        found.write(tmp_path / folder)
    for name in ("right.jsonl", "wrong.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "rest" / name).read_bytes()
    none = Saying(most=0)
    assert len(sift(none, rows[:4], Thought(), journal=Journal(tmp_path / "j", {}, "rows")).right) == 2, "a shorter one"


def test_an_interrupted_mining_goes_on(tmp_path: Path) -> None:
    prompts = [document("draw", i, world="one") for i in range(5)]

    def judges() -> tuple[PairJudge, Reward]:
        return PairJudge(Saying(), "world-draw-pair"), PointJudge(Saying(), "world-draw-point")

    whole = mine(Saying(), prompts, *judges(), candidates=4, batch=2, seed=3)
    assert whole and all(p.chosen.of(Image)[0].pixels.mean() > p.rejected.of(Image)[0].pixels.mean() for p in whole)
    assert all(p.scores[0] > p.scores[1] for p in whole)
    with pytest.raises(KeyboardInterrupt):
        mine(Saying(most=8), prompts, *judges(), candidates=4, batch=2, seed=3,
             journal=Journal(tmp_path / "j", {}, "rows"))
    rest = Saying()
    found = mine(rest, prompts, *judges(), candidates=4, batch=2, seed=3, journal=Journal(tmp_path / "j", {}, "rows"))
    assert rest.seen == 12, "what is done is not drawn again"
    assert [json.dumps(p.to_dict()) for p in found] == [json.dumps(p.to_dict()) for p in whole]


@pytest.fixture(scope="module", params=["janus", "show-o", "bagel"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, and says at most three tokens."""
    config = find(request.param).tiny()
    short = dataclasses.replace(config.sampling, text=dataclasses.replace(config.sampling.text, max_tokens=3))
    torch.manual_seed(0)
    system = filled(find(request.param)(dataclasses.replace(config, sampling=short)))
    folder = tmp_path_factory.mktemp("tiny")
    save_system(system, folder)
    return folder


def test_sift_and_mine_on_the_command_line(diptych_run: Any, tiny: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows"
    asked = ("sift", "--model", tiny, "--world", "one", "--tasks", "draw-think,answer-think", "--n", 2, "--out", rows)
    code, out, err = diptych_run(*asked)
    assert code == 0 and out.startswith("0 right in ") and "4 wrong in" in out, err
    assert [d.task for d in read_documents(rows / "wrong.jsonl")] == ["draw-think", "answer-think"] * 2
    assert sorted(p.name for p in rows.iterdir()) == ["right.jsonl", "wrong.jsonl"], "nothing unfinished is left"
    _goes_on(diptych_run, asked, 4, rows / "wrong.jsonl", monkeypatch)
    (rows / ".right.jsonl.unfinished").write_text('{"weights": "of another model"}\n')
    code, _, err = diptych_run(*asked)
    assert code == 2 and "expected unfinished work of this model" in err and "remove it" in err

    pairs = tmp_path / "new" / "pairs.jsonl"
    mined = ("mine", "--model", tiny, "--world", "one", "--judge", tiny, "--n", 2, "--rule", "random", "--out", pairs)
    code, out, err = diptych_run(*mined, "--candidates", 2)
    assert code == 0 and "2 pairs of 2 prompts" in out, err
    found = read_pairs(pairs)
    assert len(found) == 2 and found[0].chosen.pieces[0] == found[0].rejected.pieces[0]
    assert isinstance(found[0].chosen.pieces[0], Text) and list(pairs.parent.iterdir()) == [pairs]
    _goes_on(diptych_run, (*mined, "--candidates", 2), 2, pairs, monkeypatch)
    assert diptych_run(*mined, "--candidates", 3)[0] == 2
    code, _, err = diptych_run(*mined[:-1], tmp_path, "--candidates", 2)
    assert code == 2 and "got the folder" in err


def _goes_on(diptych_run: Any, argv: Sequence[Any], done: int, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is killed before it has tidied up finds what it did."""
    whole = result.read_bytes()
    with monkeypatch.context() as killed:
        killed.setattr(Journal, "remove", lambda self: None)
        assert "going on" not in diptych_run(*argv)[2]
    result.unlink()
    code, _, err = diptych_run(*argv)
    assert code == 0 and f"going on: {done} are done" in err and result.read_bytes() == whole
