"""Answers of the model as it was are made once for all runs that ask the same."""
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filling import filled

from diptych.alignment import regions
from diptych.alignment.aligner import Aligner
from diptych.alignment.answer_cache import AnswerCache
from diptych.alignment.recipe import Align, Ask
from diptych.alignment.self_reward import Judged
from diptych.alignment.workers import roles
from diptych.document import Document, Image, Text
from diptych.systems.bagel import Bagel

TINY: dict[str, Any] = {
    "tasks": {"draw": Ask()}, "method": "own", "group": 1, "prompts": 2, "iterations": 2, "offline": True, "lr": 2e-3,
    "sampling": {"evaluations": 2, "guidance": {"branches": []}}, "freeze": ("codec",), "save_every": 5}


def bagel(seed: int = 0) -> Bagel:
    torch.manual_seed(seed)
    return filled(Bagel(Bagel.tiny())).eval()


def aligned(folder: Path, system: Bagel | None = None, **changes: Any) -> list[torch.Tensor]:
    system = system or bagel()
    Aligner(Align(**(TINY | changes)), system, folder).run()
    return [p.detach().clone() for p in system.parameters()]


@pytest.fixture
def acts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents were answered, call by call."""
    counts: list[int] = []

    def counted(system: Any, documents: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(len(documents))
        return act(system, documents, *args, **kwargs)

    act = roles.act
    monkeypatch.setattr(roles, "act", counted)
    return counts


def test_runs_share_what_does_not_depend_on_them(tmp_path: Path, acts: list[int], monkeypatch: pytest.MonkeyPatch
                                                 ) -> None:
    place = str(tmp_path / "cache")
    first = aligned(tmp_path / "a", cache=place)
    assert acts == [2, 2] and len(list((tmp_path / "cache").glob("answers-*.jsonl"))) == 2
    again = aligned(tmp_path / "b", cache=place)
    assert acts == [2, 2] and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    asked: list[int] = []
    monkeypatch.setattr(regions, "by_questions", lambda model, made: asked.append(len(made)) or [
        Judged(prompt="", overall=1.0 - k) for k in range(len(made))])
    weighed = aligned(tmp_path / "c", cache=place, regions=regions.Regions())
    aligned(tmp_path / "d", cache=place, regions=regions.Regions(parts="whole"))
    assert acts == [2, 2] and asked == [2, 2], "one judgement, read in two ways"
    assert not all(torch.equal(a, b) for a, b in zip(first, weighed, strict=True))
    aligned(tmp_path / "e", cache=place, seed=1)
    aligned(tmp_path / "f", bagel(1), cache=place)
    assert acts == [2] * 6, "other drawings for another seed and another model"


def test_what_is_kept_is_what_was_made(tmp_path: Path) -> None:
    kept, pixels = AnswerCache(tmp_path, bagel()), np.linspace(-1, 1, 192, dtype=np.float32).reshape(3, 8, 8)
    made = Document((Text(text="a\u2028b"), Image(pixels=pixels, role="assistant", target=True)), "draw", {"n": 1})
    sampling = bagel().default_sampling()
    [first] = kept.answers([made.prompt()], sampling, [3], lambda: [made])
    [again] = kept.answers([made.prompt()], sampling, [3], lambda: pytest.fail("it is there"))
    assert first == again and first.pieces[0] == made.pieces[0] and first.meta == made.meta
    assert np.abs(first.of(Image)[0].pixels - pixels).max() <= 1 / 255
    with pytest.raises(KeyError):
        kept.answers([made.prompt()], sampling, [4], lambda: {}["another seed"])
    judged = [Judged(prompt="a\u2028b", overall=0.5)]
    assert kept.judged([made], "questions", lambda: judged) == judged
    assert kept.judged([made], "questions", list) == judged and kept.judged([made], "oracle", list) == []


def test_only_answers_that_stay_are_kept() -> None:
    with pytest.raises(ValueError, match="offline, method=own or best"):
        Align(**(TINY | {"offline": False, "cache": "x"}))
    with pytest.raises(ValueError, match="got offline, method=dpo"):
        Align(**(TINY | {"method": "dpo", "group": 2, "tasks": {"draw": Ask(reward="scene")}, "cache": "x"}))
