"""What is inside a model, told by its server: the mask is the model's own, agreement is measured once and kept."""
import base64

import numpy as np
import pytest
import torch

from diptych.analysis import profile
from diptych.serve import create_app, insight
from diptych.systems.base import Sampling
from diptych.systems.batch import Batch
from diptych.systems.latte_flow import LatteFlow
from diptych.systems.works import due
from diptych.world import tasks
from tests.serving import Local, make, tiny


@pytest.fixture(scope="module")
def local():
    with Local(make()) as local:
        yield local


@pytest.mark.parametrize("task", ["caption", "draw", "edit"])
def test_the_mask_is_the_models_own(local, task):
    told = local.get(f"/v1/models/tiny/attention/{task}").json()
    count = told["count"]
    bits = np.unpackbits(np.frombuffer(base64.b64decode(told["mask"]), np.uint8))[: count * count]
    system = tiny()
    batch = Batch.of([system.write(tasks.document(task, insight.SHOWN, split="test"))], [[0]])
    mask = system.mask.dense(batch.page.tokens)[0, :count, :count]
    assert np.array_equal(bits.reshape(count, count), mask.int().numpy())
    assert sum(run["count"] for run in told["tokens"]) == count
    assert any(run["noised"] for run in told["tokens"]) == (task != "caption")
    assert [p["kind"] for p in told["pieces"]].count("image") == (2 if task == "edit" else 1)


def test_agreement_is_measured_once(local, monkeypatch):
    monkeypatch.setattr(insight, "DOCUMENTS", 32)
    told = local.get("/v1/models/tiny/alignment").json()
    assert [c["task"] for c in told["curves"]] == ["caption", "draw"] and told["chance"] == 10 / 31
    for curve in told["curves"]:
        assert len(curve["values"]) == len(tiny().trunk.layers) + 1 and all(0 <= v <= 1 for v in curve["values"])
    monkeypatch.setattr(insight, "sides", lambda *_: pytest.fail("expected what was found before"))
    assert local.get("/v1/models/tiny/alignment").json() == told


def test_a_model_that_cannot_be_looked_into_says_so(monkeypatch):
    monkeypatch.setattr(insight, "DOCUMENTS", 16)
    torch.manual_seed(0)
    with Local(create_app({"parted": LatteFlow(LatteFlow.tiny())})) as local:
        curves = local.get("/v1/models/parted/alignment").json()["curves"]
    assert all(c["values"] is None and "divides a route by time" in c["error"] for c in curves)


def test_states_that_agree_have_all_neighbours_in_common():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    other = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    parts = [([x[:20], x[:20]], [x[:20] * 2, other[:20]]), ([x[20:], x[20:]], [x[20:] * 2, other[20:]])]
    found = profile.curve(parts)
    assert found[0] == pytest.approx(1) and found[1] < 0.5


def test_pictures_on_the_way_are_shown_evenly():
    def shown(steps: int, wanted: int) -> list[int]:
        return [s for s in range(1, steps + 1) if due(s, steps, Sampling(partial=wanted))]

    assert shown(25, 3) == [6, 13, 19] and shown(4, 1) == [2] and shown(5, 0) == []
    assert shown(5, 64) == shown(5, 4) == [1, 2, 3, 4], "all, but not the last"
    assert all(len(shown(steps, wanted)) == min(wanted, steps - 1) for steps in range(1, 40) for wanted in range(1, 40))
