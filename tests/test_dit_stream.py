"""The diffusion transformer in one stream, and the connector in front of it."""
import dataclasses
from typing import Any

import pytest
import torch
from filling import filled
from torch import Tensor

from diptych.parts.dit_stream import (
    Reference,
    StreamDit,
    StreamDitConfig,
    axis_angles,
    condition_places,
    picture_places,
)
from diptych.parts.qformer import QFormer, QFormerConfig
from diptych.parts.serial import PlanConnector
from diptych.systems import flows

SMALL = StreamDitConfig(token_width=6, width=24, layers=2, refiners=1, heads=2, kv_heads=1, hidden=32, axes=(4, 4, 4),
                        time_width=16, references=2)
QUERIES = QFormerConfig(width=24, mlp_width=32, layers=2, heads=2, norm_eps=1e-5, queries=3, cross_every=1,
                        feature_width=10, form="gated")
CPU = torch.device("cpu")


def build(**changes: Any) -> StreamDit:
    """With everything that starts at zero filled in."""
    torch.manual_seed(0)
    return filled(dataclasses.replace(SMALL, **changes).build())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> tuple[list[Tensor], Tensor, list[Tensor], list[tuple[int, int]], list[list[Reference]]]:
    """Three pictures: one with two references, one without words."""
    x = [noise(12, 6, seed=1), noise(4, 6, seed=2), noise(6, 6, seed=3)]
    conditions = [noise(5, 24, seed=4), noise(7, 24, seed=5), noise(0, 24)]
    references: list[list[Reference]] = [[(noise(6, 6, seed=6), (2, 3)), (noise(4, 6, seed=7), (2, 2))], [],
                                         [(noise(2, 6, seed=8), (1, 2))]]
    return x, torch.tensor([0.2, 0.7, 0.5]), conditions, [(3, 4), (2, 2), (2, 3)], references


@torch.no_grad()
def test_company_does_not_matter() -> None:
    """Pictures, conditions and references of different lengths share a batch."""
    for side in (0, 4):
        dit, (x, t, conditions, grids, references) = build(side=side), inputs()
        together = dit(x, t, conditions, grids, references)
        assert [len(v) for v in together] == [12, 4, 6]
        for i in range(3):
            alone = dit(x[i:i + 1], t[i:i + 1], conditions[i:i + 1], grids[i:i + 1], references[i:i + 1])[0]
            torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(dit(x[1:2], t[1:2], conditions[1:2], grids[1:2])[0], together[1],
                                   atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_every_input_is_heard() -> None:
    dit, (x, t, conditions, grids, references) = build(), inputs()
    usual = dit(x, t, conditions, grids, references)
    one, two = references[0]
    others = [
        dit([x[0] + 1, *x[1:]], t, conditions, grids, references), dit(x, t + 0.1, conditions, grids, references),
        dit(x, t, [-conditions[0], *conditions[1:]], grids, references),
        dit(x, t, [conditions[0].flip(0), *conditions[1:]], grids, references),
        dit(x, t, conditions, [(4, 3), *grids[1:]], references),
        dit(x, t, conditions, grids, [[(one[0] + 1, one[1]), two], *references[1:]]),
        dit(x, t, conditions, grids, [[(one[0], (3, 2)), two], *references[1:]]),
        dit(x, t, conditions, grids, [[two, one], *references[1:]]),
        dit(x, t, conditions, grids, [[one], *references[1:]]),
    ]
    assert all((other[0] - usual[0]).abs().max() > 1e-3 for other in others)


def test_a_fresh_generator_stands_still() -> None:
    x, t, conditions, grids, references = inputs()
    assert not any(v.any() for v in SMALL.build()(x, t, conditions, grids, references))


def test_pictures_stand_behind_the_condition_and_each_other() -> None:
    assert condition_places(2, CPU).tolist() == [[0, 0, 0], [1, 1, 1]]
    first, second = picture_places([(1, 3), (2, 2)], 2, CPU)
    assert first.tolist() == [[2, 0, 0], [2, 0, 1], [2, 0, 2]]
    assert second.tolist() == [[5, 0, 0], [5, 0, 1], [5, 1, 0], [5, 1, 1]]
    angle = axis_angles(second, (2, 4, 2))
    torch.testing.assert_close(angle[3], torch.tensor([5.0, 1.0, 0.01, 1.0]))


def test_bad_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match=r"sum to the 12 channels of a head, got \(4, 4, 2\)"):
        dataclasses.replace(SMALL, axes=(4, 4, 2))
    with pytest.raises(ValueError, match="heads of kv_heads, got 24, 2 and 3"):
        dataclasses.replace(SMALL, kv_heads=3)
    x, t, conditions, grids, references = inputs()
    dit = SMALL.build()
    with pytest.raises(ValueError, match=r"tokens of shape \(9, 6\), got \(12, 6\)"):
        dit(x, t, conditions, [(3, 3), *grids[1:]], references)
    with pytest.raises(ValueError, match=r"conditions of shape \(q, 24\), got \(5, 20\)"):
        dit(x, t, [conditions[0][:, :20], *conditions[1:]], grids, references)
    with pytest.raises(ValueError, match="up to 2 references for each of 3 pictures"):
        dit(x, t, conditions, grids, [references[0] * 2, *references[1:]])


@torch.no_grad()
def test_errors_are_means_over_copies_of_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    dit, (x, _, conditions, grids, references) = build(), inputs()
    monkeypatch.setattr(StreamDit, "forward", lambda self, x, t, *rest: [0 * own for own in x])
    drawn: list[Tensor] = []
    sample = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **kw: drawn.append(out := sample(*a, **kw)) or out)
    monkeypatch.setattr(flows.flow, "sample_time", lambda count, generator: torch.full((count,), 0.4))
    found = flows.errors(dit, x, grids, conditions, references, 2, 1.0, torch.Generator().manual_seed(0))
    assert len(found) == 12 + 4 + 6
    parts = drawn[0].split([12, 12, 4, 4, 6, 6])
    own = ((x[1] - parts[2]).square().mean(1) + (x[1] - parts[3]).square().mean(1)) / 2
    torch.testing.assert_close(found[12:16], own)


# -- connector ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_queries_ignore_what_is_not_visible() -> None:
    torch.manual_seed(0)
    former, features = QFormer(QUERIES), noise(2, 7, 10)
    visible = torch.arange(7) < torch.tensor([[7], [4]])
    out = former(features, visible=visible)
    torch.testing.assert_close(out[1:], former(features[1:, :4]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out[1], former(features)[1], atol=1e-3)
    # norms stand in front: what comes out keeps the queries it began with
    for p in (q for name, q in former.named_parameters() if name.endswith(("out.weight", "out.bias", "down.weight"))):
        p.zero_()
    torch.testing.assert_close(former(features)[0], former.queries)


@torch.no_grad()
def test_words_come_first_and_plans_as_queries() -> None:
    torch.manual_seed(0)
    connector, texts = PlanConnector("text_image", QUERIES), [noise(4, 10), noise(0, 10), noise(2, 10, seed=2)]
    plans = [noise(5, 10, seed=3), None, noise(3, 10, seed=4)]
    out = connector(texts, plans)
    assert [len(own) for own in out] == [7, 0, 5]
    text, image = PlanConnector("text", QUERIES), PlanConnector("image", QUERIES)
    text.load_state_dict({k: v for k, v in connector.state_dict().items() if k.startswith("text.")})
    image.load_state_dict({k: v for k, v in connector.state_dict().items() if k.startswith("image.")})
    for whole, said, planned in zip(out, text(texts, plans), image(texts, plans), strict=True):
        torch.testing.assert_close(whole, torch.cat((said, planned)), atol=1e-5, rtol=1e-4)
    assert not {name.partition(".")[0] for name, _ in text.named_parameters()} - {"text"}
