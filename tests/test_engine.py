import threading

import numpy as np
import pytest
import torch

from diptych.document import Document, Image, Text
from diptych.engine import Engine, generate
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling
from diptych.systems.bagel import Bagel
from diptych.systems.base import Sampling
from diptych.systems.interleaved import Look
from diptych.world.tasks import document

SHORT = Sampling(evaluations=3, guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),)),
                 text=TextSampling(temperature=1.0, max_tokens=6), partial=1)


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
