import dataclasses
import threading

import numpy as np
import pytest
import torch

from diptych.document import Document, Image, Text
from diptych.engine import Engine, QueueFull, generate
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling
from diptych.systems.bagel import Bagel
from diptych.systems.base import Sampling, System
from diptych.systems.interleaved import Look
from diptych.world.tasks import document

SHORT = Sampling(evaluations=3, guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),)),
                 text=TextSampling(temperature=1.0, max_tokens=6), partial=2)


@pytest.fixture(scope="module")
def system() -> Bagel:
    torch.manual_seed(0)
    model = Bagel(Bagel.tiny()).eval()
    torch.nn.init.normal_(model.latent_out.weight, std=0.5)  # a fresh model would draw its noise
    return model


def mixed(count: int) -> list[Document]:
    tasks = ("draw", "question", "edit", "caption", "plan")
    return [document(tasks[i % len(tasks)], i) for i in range(count)]


def answers(documents: list[Document]) -> list[object]:
    return [p.text if isinstance(p, Text) else getattr(p, "pixels", None) for d in documents for p in d.targets]


def equal(one: list[object], two: list[object]) -> bool:
    return all(np.allclose(a, b, atol=2e-4) if isinstance(a, np.ndarray) else a == b
               for a, b in zip(one, two, strict=True))


def test_batched_equals_single_for_the_same_seeds(system: Bagel) -> None:
    documents, seeds = mixed(7), list(range(10, 17))
    together = answers(generate(system, documents, SHORT, seeds=seeds, slots=4))
    alone = [a for d, s in zip(documents, seeds, strict=True) for a in answers(system.generate([d], SHORT, seeds=s))]
    assert equal(together, alone)
    assert not equal(answers(generate(system, documents, SHORT, seeds=99)), alone)


def test_newcomers_join_while_others_run(system: Bagel) -> None:
    engine = Engine(system, slots=2)
    first = [engine.submit(d, SHORT) for d in mixed(3)]
    engine.step()
    assert len(engine.running) == 2 and len(engine.waiting) == 1
    late = engine.submit(document("question", 5), SHORT)
    while engine.step():
        pass
    assert all(r.future.done() for r in [*first, late])


def test_events_stream_text_and_partial_pictures(system: Bagel) -> None:
    with Engine(system) as engine:
        asked = engine.submit(document("question", 1), SHORT, seed=3)
        drawn = engine.submit(document("draw", 1), SHORT, seed=3)
        text = "".join(e.value for e in asked.events() if e.kind == "text")
        kinds = [e.kind for e in drawn.events()]
    assert text.strip() == asked.result().pieces[-1].text
    assert kinds == ["partial", "partial", "picture"]


def test_calls_come_between_the_ticks(system: Bagel) -> None:
    engine = Engine(system)
    request = engine.submit(document("question", 5), SHORT)
    good, bad, late = (engine.between(work) for work in (lambda: len(engine.running), lambda: 1 // 0, lambda: 3))
    engine.step()
    assert good.result(0) == 0 and not bad.done(), "one at a time"
    engine.step()
    with pytest.raises(ZeroDivisionError):
        bad.result(0)
    engine.close(cancel=True)
    assert late.cancelled() and request.future.done()
    with pytest.raises(RuntimeError, match="open engine"):
        engine.between(lambda: 1)


def test_a_failing_request_harms_no_other(system: Bagel) -> None:
    bad = Document((Text(text="a red circle"), Image(target=True, size=(60, 61))))
    with Engine(system) as engine:
        wrong, right = engine.submit(bad, SHORT), engine.submit(document("draw", 0), SHORT)
        assert right.result(60).pieces[-1].pixels is not None
        with pytest.raises(ValueError, match="multiples of"):
            wrong.result(60)


def test_a_work_that_breaks_the_batch_is_isolated(system: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Bagel.run
    noise = torch.randn(16, system.token_width, generator=torch.Generator().manual_seed(7))

    def fragile(self, works):
        if any(isinstance(w, Look) and torch.equal(w.x, noise) for w in works):
            raise RuntimeError("broken batch")
        return run(self, works)

    monkeypatch.setattr(Bagel, "run", fragile)
    engine = Engine(system)
    good, bad = engine.submit(document("draw", 0), SHORT, seed=1), engine.submit(document("draw", 1), SHORT, seed=7)
    while engine.step():
        pass
    assert good.result(0).pieces[-1].pixels is not None
    with pytest.raises(RuntimeError, match="broken batch"):
        bad.result(0)


def test_cancelled_requests_free_their_slot(system: Bagel) -> None:
    engine = Engine(system, slots=1)
    first, second = engine.submit(document("draw", 0), SHORT), engine.submit(document("question", 0), SHORT)
    engine.step()
    first.cancel()
    while engine.step():
        pass
    assert first.future.exception() is not None and second.result(0).pieces[-1].text is not None


def test_closing_finishes_what_runs_and_refuses_more(system: Bagel) -> None:
    engine = Engine(system).start()
    request = engine.submit(document("question", 2), SHORT)
    closer = threading.Thread(target=engine.close)
    closer.start()
    closer.join(60)
    assert request.future.done() and not closer.is_alive()
    with pytest.raises(RuntimeError, match="closing"):
        engine.submit(document("question", 2), SHORT)


def test_documents_without_targets_are_refused(system: Bagel) -> None:
    with pytest.raises(ValueError, match="target"):
        Engine(system).submit(Document((Text(text="hello"),)))


# -- who comes first --------------------------------------------------------------------------------------------------

class Clockwork(System):
    """Answers need 3 units of work of 1 second each, pictures 4 of 10 seconds; a clock that only work moves."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.now = None, 0.0
        self.ran: list[list[str]] = []

    def program(self, document, sampling, generator, emit):
        def going():
            draws = isinstance(document.targets[0], Image)
            for _ in range(4 if draws else 3):
                yield "picture" if draws else "text"
            return document
        return going()

    def run(self, works):
        self.ran.append(list(works))
        self.now += 10 * ("picture" in works) + ("text" in works)
        return [None] * len(works)


PICTURE, ANSWER = Document((Image(target=True),)), Document((Text(target=True),))


def clockwork(**how) -> tuple[Engine, Clockwork]:
    system = Clockwork()
    return Engine(system, clock=lambda: system.now, **how), system


def test_pictures_leave_slots_to_answers_and_none_starves() -> None:
    engine, _ = clockwork(slots=3, reserve=1)
    pictures = [engine.submit(PICTURE) for _ in range(4)]
    late = engine.submit(ANSWER)
    engine.step()
    assert engine.running == [pictures[0], pictures[1], late] and list(engine.waiting) == pictures[2:]
    order: list[int] = []
    for request in (*pictures, late):
        request.future.add_done_callback(lambda f, number=request.number: order.append(number))
    # Answers keep coming; the pictures still get their slots in turn.
    for _ in range(60):
        if not engine.waiting or all(r.draws for r in engine.waiting):
            engine.submit(ANSWER)
        engine.step()
    assert [n for n in order if n < 5] == [4, 0, 1, 2, 3] and all(p.future.done() for p in pictures)
    engine, _ = clockwork(slots=3, reserve=1)
    answers = [engine.submit(ANSWER) for _ in range(6)]
    picture = engine.submit(PICTURE)
    later = [engine.submit(ANSWER) for _ in range(6)]
    while picture.started is None:
        engine.step()
    assert all(a.started is not None for a in answers) and sum(a.started is not None for a in later) <= 2


def test_answers_get_their_share_of_the_time() -> None:
    for share, slowest in ((0.0, 33.0), (0.5, 13.0)):
        engine, system = clockwork(slots=4, share=share)
        picture, answer = engine.submit(PICTURE), engine.submit(ANSWER)
        while engine.step():
            pass
        assert answer.finished == slowest, "a tick with the picture, then alone"
        assert picture.finished == 43.0, "a picture alone has all the time"
        assert sum("picture" in works for works in system.ran) == 4
    engine, system = clockwork(slots=2, share=0.5)
    picture = engine.submit(PICTURE)
    while not picture.future.done():
        if len(engine.running) + len(engine.waiting) < 2:
            engine.submit(ANSWER)
        engine.step()
    assert picture.finished is not None and picture.finished <= 2 * 44 + 10, "at most twice its time"


def test_a_full_queue_is_told_and_cancelled_requests_leave_it() -> None:
    engine, _ = clockwork(slots=1, queue=1)
    first, second = engine.submit(ANSWER), engine.submit(ANSWER)
    assert engine.room == 0
    with pytest.raises(QueueFull, match="at most 1 requests to wait"):
        engine.submit(ANSWER)
    engine.step()
    first.cancel()
    third_waits = engine.running == [first] and list(engine.waiting) == [second]
    engine.step()
    assert third_waits and engine.running == [second] and not engine.waiting, "the slot is free at the next tick"
    second.cancel()
    engine.step()
    assert not engine.running and engine.room == 2 and second.future.done()
    with pytest.raises(ValueError, match="reserve"):
        Engine(Clockwork(), slots=2, reserve=2)


def test_a_broken_tick_or_listener_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(event) -> None:
        raise OSError("gone")

    engine, system = clockwork(slots=2)
    with engine:
        deaf = engine.submit(ANSWER, listen=broken)
        assert deaf.result(10) is not None
        monkeypatch.setattr(engine, "_account", lambda *_: 1 / 0)
        lost = engine.submit(ANSWER)
        with pytest.raises(ZeroDivisionError):
            lost.result(10)
        monkeypatch.undo()
        assert engine.submit(ANSWER).result(10) is not None and len(system.ran) > 4


def test_events_tell_tokens_and_boxes(system: Bagel) -> None:
    with Engine(system) as engine:
        asked = engine.submit(document("question", 1), SHORT, seed=3)
        planned = engine.submit(document("plan", 1), SHORT, seed=3)
        told = [e.tokens for e in asked.events()]
        kinds = [(e.kind, e.tokens) for e in planned.events() if e.kind in ("boxes", "picture")]
    assert told == sorted(told) and 0 < told[-1] <= 6
    assert [k for k, _ in kinds] == ["boxes", "picture"] and kinds[1][1] == 16


def test_a_negative_prompt_is_read_by_guidance(system: Bagel) -> None:
    asked = document("draw", 0)
    plain, against = (generate(system, [asked], dataclasses.replace(SHORT, negative=n))[0].pieces[-1].pixels
                      for n in ("", "a blue square"))
    assert not np.array_equal(plain, against)
    off = dataclasses.replace(SHORT, guidance=Guidance(), negative="a blue square")
    assert np.array_equal(generate(system, [asked], off)[0].pieces[-1].pixels,
                          generate(system, [asked], dataclasses.replace(off, negative=""))[0].pieces[-1].pixels)
