import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from diptych.document import Document, Image, Text
from diptych.engine.forecast import Measured, forecast, stored_size
from diptych.objectives.next_token import TextSampling
from diptych.systems.base import Sampling, Work
from diptych.systems.io import save_system
from diptych.systems.janus import Janus
from diptych.systems.table import TABLE, find

DRAW = Document((Text(text="a red circle"), Image(target=True)))
SAY = Document((Text(text="say something"), Text(target=True)))
SAMPLING = Sampling(evaluations=12, text=TextSampling(max_tokens=40))


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    return find(name)(find(name).tiny()).eval()


def counting(system: Any) -> list[Sequence[Work]]:
    """Whenever the system works from now on, what it does."""
    ran: list[Sequence[Work]] = []
    run = system.run

    def listening(works: Sequence[Work]) -> list[Any]:
        if works:
            ran.append(works)
        return run(works)

    system.run = listening
    return ran


def test_what_was_not_measured_lies_between_its_neighbours() -> None:
    m = Measured(count=10, seconds={0: 5.0, 1: 1.0, 2: 1.0, 5: 3.0})
    assert m.total == 5 + 1 + 1 + 3 + 2 * 2.0 + 4 * 2.0  # 3 and 4; then 6 to 9 like the last two
    due = []
    for n in range(300):
        m = Measured(count=n)
        due += [n] if m.due() else []
    assert due[:9] == [0, 1, 2, 3, 4, 5, 8, 9, 16] and len(due) < 20


@pytest.mark.parametrize("name", TABLE)
def test_as_many_ticks_as_the_drawing_has(name: str) -> None:
    system = tiny(name)
    ran = counting(system)
    torch.manual_seed(1)
    system.generate([DRAW, DRAW], SAMPLING, seeds=[0, 1])
    real = len(ran)
    ran.clear()
    found = forecast(system, [DRAW, DRAW], SAMPLING)
    assert sum(count for _, count, _ in found.kinds) == real and found.documents == 2
    assert len(ran) <= real and found.seconds > 0
    assert any("develop" in kind for kind, *_ in found.kinds)


def test_most_of_a_long_answer_is_not_worked_out() -> None:
    system = tiny("janus")
    ran = counting(system)
    found = forecast(system, [SAY], SAMPLING, words=200)
    assert sum(count for _, count, _ in found.kinds) >= 200, "no answer ends before it is as long as was said"
    assert len(ran) < 40


@pytest.mark.parametrize("compiled", ["1", "0"])
def test_contexts_are_as_long_as_they_would_be(compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_NATIVE", compiled)
    system = tiny("janus")
    lengths: list[int] = []
    forecast(system, [SAY], SAMPLING, words=8)
    ran = counting(system)
    forecast(system, [SAY], SAMPLING, words=130)
    for works in ran:
        for work in works:
            readers = [t.reader for t in getattr(work, "trails", ())] or [work.reader]  # type: ignore[attr-defined]
            lengths += [r.context.length for r in readers]
    assert max(lengths) >= 125


def test_size_of_weights_is_read_from_their_heads(tmp_path: Any) -> None:
    system = Janus(Janus.tiny())
    save_system(system.bfloat16(), tmp_path)
    count, stored = stored_size(tmp_path)
    assert stored == 2 * count and abs(count / system.num_parameters() - 1) < 0.1  # buffers are weights there
    os.remove(tmp_path / "model.safetensors")
    (tmp_path / "model.bin").write_bytes(bytes(100))
    assert stored_size(tmp_path) == (50, 100)
