"""Preference optimisation on a file of pairs, such as `diptych mine` writes."""
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_aligner import tiny

from diptych.alignment.aligner import Aligner
from diptych.alignment.policy import Trajectory
from diptych.alignment.preference import Preference
from diptych.alignment.recipe import Align, Ask
from diptych.alignment.sifting import Preferred, read_pairs, write_pairs
from diptych.document import Document, Image, Text
from diptych.world.tasks import document


def shade(index: int, level: float) -> Document:
    asked = document("draw", index)
    picture = Image(pixels=np.full((3, 32, 32), level, np.float32), role="assistant", target=True)
    return Document((asked.pieces[0], picture), "draw", asked.meta)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Bright pictures are preferred to dark ones."""
    write_pairs([Preferred(shade(i, 1.0), shade(i, -1.0), (4.0, 1.0)) for i in range(3)], tmp_path / "pairs.jsonl")
    return str(tmp_path / "pairs.jsonl")


def aligner(name: str, pairs: str, folder: Path, **changes: Any) -> Aligner:
    given = {"method": "dpo", "preferred": pairs, "prompts": 2, "iterations": 4, "lr": 1e-3, "freeze": ("codec",),
             "save_every": 2, "dpo": Preference(beta=50.0 if name == "bagel" else 0.1)}
    return Aligner(Align(**(given | changes)), tiny(name), folder)


@pytest.mark.parametrize("name", ["bagel", "janus", "show-o"])
def test_what_is_preferred_becomes_likelier(name: str, pairs: str, tmp_path: Path) -> None:
    a = aligner(name, pairs, tmp_path / "run", iterations=6)
    before = margins(a, pairs)
    lines = [a.iterate() for _ in range(6)]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and lines[0]["used"] == 4
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["answers"] == 24 and lines[-1]["steps"] == 6
    assert (margins(a, pairs) > before).all()


def margins(a: Aligner, pairs: str) -> torch.Tensor:
    with torch.no_grad():
        both = [a.learner._likelihoods(a.system, [Trajectory(d.prompt(), d, 0, ()) for d in side], [3, 4, 5])[0]
                for side in zip(*((p.chosen, p.rejected) for p in read_pairs(pairs)), strict=True)]
    return both[0] - both[1]


@pytest.mark.parametrize("name", ["bagel", "janus", "show-o"])
def test_imitation_holds_what_is_preferred(name: str, pairs: str, tmp_path: Path) -> None:
    """Both may become less likely by preference alone; not what is imitated."""
    chosen = [Trajectory(p.chosen.prompt(), p.chosen, 0, ()) for p in read_pairs(pairs)]

    def likelihoods(a: Aligner) -> torch.Tensor:
        with torch.no_grad():
            return a.learner._likelihoods(a.system, chosen, [3, 4, 5])[0]

    found = []
    for imitation in (0.0, 10.0):
        beta = 50.0 if name == "bagel" else 0.1
        a = aligner(name, pairs, tmp_path / f"{imitation}", dpo=Preference(beta=beta, imitation=imitation))
        before = likelihoods(a)
        for _ in range(6):
            a.iterate()
        found.append((likelihoods(a) - before).mean())
    assert found[1] > max(found[0], 0)


def test_answers_in_words_are_compared_word_by_word(tmp_path: Path) -> None:
    asked = document("question", 0)
    said = [asked.pieces[-1].replace(text=text) for text in ("red", "a red circle")]
    docs = [Document((*asked.pieces[:-1], piece), "question", asked.meta) for piece in said]
    write_pairs([Preferred(docs[0], docs[1], (1.0, 0.0))], tmp_path / "p.jsonl")
    a = aligner("janus", str(tmp_path / "p.jsonl"), tmp_path / "run", prompts=1)
    own = [Trajectory(d.prompt(), d, 0, ()) for d in docs]
    with torch.no_grad():
        sums, sizes = a.learner._likelihoods(a.system, own, [0, 0])
        torch.testing.assert_close(sums, torch.stack([v.sum() for v in a.system.score(docs).values]))
        assert sizes.tolist() == [len(v) for v in a.system.score(docs).values]
    assert a.iterate()["loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_every_pair_is_read_once_in_a_turn_and_a_run_goes_on(pairs: str, tmp_path: Path) -> None:
    a = aligner("bagel", pairs, tmp_path / "a", iterations=3)
    seen: list[int] = []
    prefer = a.learner.prefer

    def noted(found: Any, *rest: Any) -> Any:
        seen.extend(chosen.asked.meta["index"] for chosen, _ in found)
        return prefer(found, *rest)

    a.learner.prefer = noted  # type: ignore[method-assign]
    a.run()
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]
    b = aligner("bagel", pairs, tmp_path / "b", iterations=2)
    b.run()
    c = aligner("bagel", pairs, tmp_path / "b", iterations=3)
    c.run()
    for x, y in zip(a.system.parameters(), c.system.parameters(), strict=True):
        assert torch.equal(x, y)


def test_what_is_no_pair_is_an_error(pairs: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method=dpo to learn from preferred"):
        Align(preferred=pairs, method="best", lr=1e-3)
    for tasks in ({}, {"draw": Ask(reward="scene")}):
        with pytest.raises(ValueError, match="or a file of preferred answers"):
            Align(preferred=pairs if tasks else "", tasks=tasks, method="dpo", lr=1e-3)
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="got an empty file"):
        aligner("bagel", str(tmp_path / "none.jsonl"), tmp_path / "run")
    (tmp_path / "bad.jsonl").write_text(Path(pairs).read_text() + '{"chosen": 1}\n')
    with pytest.raises(ValueError, match="line 4 of .*bad.jsonl"):
        aligner("bagel", str(tmp_path / "bad.jsonl"), tmp_path / "run")
    assert isinstance(read_pairs(pairs)[0].chosen.of(Text)[0].text, str)
