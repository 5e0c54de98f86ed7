"""The diffusion transformer in two streams: what it is told, references, second attention, places; and the connector
that says a vector of the whole."""
from functools import cache
from typing import Any, cast

import pytest
import torch
from filling import filled
from torch import Tensor

from diptych.parts.dit_joint import JointDit, JointDitConfig
from diptych.parts.serial import PooledConnectorConfig


@cache
def joint(**changes: Any) -> JointDit:
    torch.manual_seed(0)
    return filled(JointDit(JointDitConfig(**{
        "token_width": 6, "width": 24, "layers": 3, "heads": 2, "hidden": 48, "condition_width": 10, "pooled_width": 8,
        "dual": (0, 1), "side": 7, "span": 3} | changes)).eval())


def inputs(count: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, condition, pooled = (torch.randn(2, *size, generator=g) for size in ((count, 6), (5, 10), (8,)))
    return x, torch.tensor([0.3, 0.8]), condition, pooled


@torch.no_grad()
def test_everything_told_matters_to_the_joint_transformer() -> None:
    dit, (x, t, condition, pooled) = joint(), inputs()
    reference = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(1))
    usual = dit(x, t, condition, pooled, (2, 3), None, reference)
    assert usual.shape == x.shape
    for other in [(x, 1 - t, condition, pooled, (2, 3), None, reference),
                  (x, t, condition + 1, pooled, (2, 3), None, reference),
                  (x, t, condition, pooled + 1, (2, 3), None, reference),
                  (x, t, condition, pooled, (3, 2), None, reference),
                  (x, t, condition, pooled, (2, 3), None, None),
                  (x, t, condition, pooled, (2, 3), None, reference.roll(1, 1))]:
        assert not torch.allclose(dit(*other), usual, atol=1e-4)
    pair = dit(x, t, condition, pooled, (2, 3), None, torch.cat((reference[:, 6:], reference[:, :6]), 1))
    torch.testing.assert_close(pair, usual, atol=1e-5, rtol=1e-4)  # references of one place: only their order differs


@torch.no_grad()
def test_hidden_words_say_nothing() -> None:
    dit, (x, t, condition, pooled) = joint(), inputs()
    visible = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    masked = dit(x, t, condition, pooled, (2, 3), visible)
    torch.testing.assert_close(masked[1:], dit(x[1:], t[1:], condition[1:, :3], pooled[1:], (2, 3)), atol=1e-5,
                               rtol=1e-4)
    torch.testing.assert_close(masked[:1], dit(x[:1], t[:1], condition[:1], pooled[:1], (2, 3)), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_second_attention_is_among_pictures_only() -> None:
    """Without the joint attention and the pooled vector nothing of the words arrives, but references do."""
    dit, (x, t, condition, pooled) = joint(layers=2, dual=(0, 1)), inputs()
    kept = {k: v.clone() for k, v in dit.state_dict().items()}
    for block in dit.blocks:
        cast(Any, block).attention.out.weight.zero_()
    alike = [dit(x, t, c, pooled, (2, 3), None, x) for c in (condition, condition + 1)]
    assert torch.equal(*alike) and not torch.allclose(alike[0], dit(x, t, condition, pooled, (2, 3), None, 2 * x))
    for block in dit.blocks:
        cast(Any, block).dual.out.weight.zero_()
    assert torch.allclose(dit(x, t, condition, pooled, (2, 3), None, x), dit(x, t, condition, pooled, (2, 3)))
    dit.load_state_dict(kept)


def test_a_picture_lies_in_the_middle_of_the_table() -> None:
    dit, (x, t, condition, pooled) = joint(), inputs()
    dit.positions.requires_grad_()
    dit(x, t, condition, pooled, (2, 3)).sum().backward()
    assert dit.positions.grad is not None
    used = dit.positions.grad.any(-1).view(7, 7)
    dit.positions.requires_grad_(False)
    dit.positions.grad = None
    assert used[2:4, 2:5].all() and used.sum() == 6
    assert "positions" in dit.state_dict()
    with pytest.raises(ValueError, match="at most 7 patches per side, got a grid of 1 x 8"):
        dit(x.new_zeros(2, 8, 6), t, condition, pooled, (1, 8))


def test_what_the_joint_transformer_is_told_has_shapes() -> None:
    dit, (x, t, condition, pooled) = joint(), inputs()
    with pytest.raises(ValueError, match=r"pooled vector of shape \(2, 8\), got \(2, 7\)"):
        dit(x, t, condition, pooled[:, :7], (2, 3))
    with pytest.raises(ValueError, match=r"references of shape \(2, a multiple of 6, 6\), got \(2, 4, 6\); fix"):
        dit(x, t, condition, pooled, (2, 3), None, x[:, :4])
    with pytest.raises(ValueError, match="multiple of heads and of 4, got 26 and 2"):
        JointDitConfig(width=26, heads=2)
    with pytest.raises(ValueError, match=r"dual blocks out of 12, got \(12,\)"):
        JointDitConfig(layers=12, dual=(12,))


@torch.no_grad()
def test_the_whole_is_the_mean_of_what_is_visible() -> None:
    torch.manual_seed(0)
    connector = PooledConnectorConfig(layers=1, width=16, heads=2, hidden=24, pooled_width=5).build(8, 12)
    states, visible = torch.randn(2, 4, 8), torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    said = connector(states, visible)
    assert said.shape == (2, 4, 17)
    torch.testing.assert_close(said[1:, :2], connector(states[1:, :2]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(said[:1], connector(states[:1]), atol=1e-6, rtol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(connector(states[:, order]), connector(states)[:, order], atol=1e-6, rtol=1e-5)
