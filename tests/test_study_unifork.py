"""The study of UniFork: controls of equal size, which tokens are compared."""
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diptych import config
from diptych.analysis.layers import Passage
from diptych.parts.interleave import Page
from diptych.replication.runner import recipe_of
from diptych.replication.studies import unifork as study
from diptych.replication.study import Context
from diptych.systems.unifork import UniFork
from diptych.world.tasks import document

FORK = study.STUDY.arm("fork")
CONTEXT = Context(arm=FORK, recipe=study.RECIPE, seed=0, folder=Path(), quick=True)


def test_controls_have_as_many_parameters_or_as_many_per_token() -> None:
    sizes, layers = {}, {}
    for arm in study.STUDY.arms:
        recipe = recipe_of(study.STUDY, arm, 0)
        with torch.device("meta"):
            trunk = UniFork(config.merge(UniFork.small(), recipe.config, where="a study")).trunk
        sizes[arm.name] = sum(p.numel() for p in trunk.parameters())
        layers[arm.name] = {trunk.coupling.layers_of(route) for route in (0, 1)}, trunk.blocks[0].hidden
    assert sizes["wide"] == pytest.approx(sizes["fork"], rel=2e-3)
    assert sizes["fork"] / sizes["dense"] == pytest.approx(1.5, rel=1e-3)
    assert sizes["separate"] / sizes["dense"] == pytest.approx(2, rel=1e-3)
    assert layers["fork"] == layers["dense"] == layers["separate"] == ({6}, 320)


def test_captions_are_compared_without_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = UniFork(UniFork.tiny()).eval()
    seen: list[Page] = []
    forward = model.forward_page
    monkeypatch.setattr(model, "forward_page", lambda page, *a: (seen.append(page), forward(page, *a))[1])
    chosen: list[Tensor] = []
    pooled = Passage.pooled
    monkeypatch.setattr(Passage, "pooled", lambda self, at: (chosen.append(at), pooled(self, at))[1])
    for task in study.TASKS.values():
        own, fixed = study.profile(model, CONTEXT, task)
        assert len(own) == len(fixed) == model.config.depth + 1 and all(0 <= v <= 1 for v in own + fixed)
    v = model.need_vocabulary()
    read, draw = (document(task, 0, split="test", world="few") for task in study.TASKS.values())
    words = [seen[n].ids[0][chosen[2 * n + 1][0]].tolist() for n in (0, 1)]
    assert (read.pieces[2].text or "") in v.decode(words[0])
    assert (read.pieces[1].text or "") not in v.decode(words[0])
    assert (draw.pieces[0].text or "") in v.decode(words[1])
    assert [int(at.sum(1)[0]) for at in chosen[::2]] == [16, 16]
