"""Generators of serial couplings: injection of the condition, linear attention, the gated variant, connectors."""
import dataclasses

import pytest
import torch
from filling import filled
from torch import Tensor, nn

from diptych.parts.dit import Dit, DitConfig
from diptych.parts.dit_gated import GatedDit, GatedDitConfig
from diptych.parts.linear import ConvolvedMlp, linear_attention
from diptych.parts.serial import ConnectorConfig, StateConnector

SANA = DitConfig(token_width=6, width=24, layers=2, heads=3, hidden=32, condition_width=10, cross_heads=2)
PLAIN = dataclasses.replace(SANA, attention="softmax", mlp="gelu", side=4)
GATED = GatedDitConfig(token_width=6, width=24, layers=2, heads=3, hidden=32, condition_width=10, time_width=16)
ALL = [SANA, dataclasses.replace(SANA, injection="norm"), PLAIN, dataclasses.replace(PLAIN, injection="prefix"),
       dataclasses.replace(PLAIN, injection="norm"), GATED]
GRID = (3, 4)


def build(config: DitConfig | GatedDitConfig) -> nn.Module:
    """With everything that starts at zero filled in."""
    torch.manual_seed(0)
    return filled(config.build())


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(2, 12, 6, generator=generator), torch.tensor([0.2, 0.7]),
            torch.randn(2, 5, 10, generator=generator))


@pytest.mark.parametrize("config", ALL, ids=str)
@torch.no_grad()
def test_every_generator_listens(config: DitConfig | GatedDitConfig) -> None:
    dit, (x, t, condition) = build(config), inputs()
    usual = dit(x, t, condition, GRID)
    assert usual.shape == x.shape
    for other in (dit(x + 1, t, condition, GRID), dit(x, t + 0.1, condition, GRID), dit(x, t, -condition, GRID)):
        assert ((usual - other).abs().amax((1, 2)) > 1e-3).all()
    torch.testing.assert_close(dit(x[1:], t[1:], condition[1:], GRID), usual[1:])
    # hidden tokens of the condition say nothing, and padding them changes nothing
    padded = torch.cat((condition, torch.full((2, 3, 10), 9.0)), 1)
    visible = torch.arange(8).expand(2, -1) < 5
    torch.testing.assert_close(dit(x, t, padded, GRID, visible), usual, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(dit(x, t, padded, GRID), usual, atol=1e-3)


@pytest.mark.parametrize("config", [SANA, PLAIN, GATED], ids=str)
def test_a_fresh_generator_stands_still(config: DitConfig | GatedDitConfig) -> None:
    x, t, condition = inputs()
    assert not config.build()(x, t, condition, GRID).any()


@torch.no_grad()
def test_places_matter() -> None:
    """Tokens in another order are another picture: to convolutions by their borders, to the gated one by rotation."""
    x, t, condition = inputs()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for config in (SANA, PLAIN, GATED):
        dit = build(config)
        assert not torch.allclose(dit(x[:, order], t, condition, GRID), dit(x, t, condition, GRID)[:, order], atol=1e-3)
    nowhere = build(dataclasses.replace(PLAIN, side=0))
    torch.testing.assert_close(nowhere(x[:, order], t, condition, GRID), nowhere(x, t, condition, GRID)[:, order])


@torch.no_grad()
def test_the_gates_of_heads_open_cross_attention() -> None:
    """The order of the condition says nothing; behind closed gates only its mean does."""
    dit, (x, t, condition) = build(GATED), inputs()
    assert isinstance(dit, GatedDit)
    usual = dit(x, t, condition, GRID)
    torch.testing.assert_close(dit(x, t, condition.flip(1), GRID), usual, atol=1e-5, rtol=1e-4)
    dit.mean[1].weight.zero_()  # which leaves cross-attention
    assert not torch.allclose(dit(x, t, condition, GRID), dit(x, t, -condition, GRID), atol=1e-3)
    for block in dit.blocks:
        block.gate.zero_()
    assert torch.equal(dit(x, t, condition, GRID), dit(x, t, -condition, GRID))


def test_linear_attention_is_attention_with_products_for_weights() -> None:
    q, k, v = (torch.randn(2, 3, 7, 4) for _ in range(3))
    weights = q.relu() @ k.relu().transpose(-1, -2)
    expected = weights @ v / (weights.sum(-1, keepdim=True) + 1e-15)
    torch.testing.assert_close(linear_attention(q, k, v), expected, atol=1e-5, rtol=1e-4)
    assert linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16
    assert ConvolvedMlp(4, 6)(torch.randn(2, 4, 3, 5)).shape == (2, 4, 3, 5)


def test_what_does_not_fit_is_an_error() -> None:
    x, t, condition = inputs()
    with pytest.raises(ValueError, match=r"tokens of shape \(b, 12, 6\), got \(2, 11, 6\)"):
        Dit(SANA)(x[:, 1:], t, condition, GRID)
    with pytest.raises(ValueError, match=r"condition of shape \(2, q, 10\), got \(2, 5, 9\)"):
        GatedDit(GATED)(x, t, condition[..., 1:], GRID)
    with pytest.raises(ValueError, match="softmax attention and mlp gelu with a prefix"):
        dataclasses.replace(SANA, injection="prefix")
    with pytest.raises(ValueError, match="multiple of heads and cross_heads"):
        dataclasses.replace(SANA, cross_heads=5)
    with pytest.raises(ValueError, match="from width 8 to the 10 of the condition"):
        StateConnector(ConnectorConfig(layers=0, projection="none"), 8, 10)
    with pytest.raises(ValueError, match="multiple of head_dim=64, got 8"):
        StateConnector(ConnectorConfig(layers=1), 8, 10)


@pytest.mark.parametrize("order", ["encode_first", "project_first"])
@torch.no_grad()
def test_connectors_see_both_ways_and_nothing_hidden(order: str) -> None:
    torch.manual_seed(0)
    c = ConnectorConfig(layers=2, head_dim=4, order=order)  # type: ignore[arg-type]
    connector, states = StateConnector(c, 8, 12), torch.randn(2, 5, 8)
    out = connector(states)
    assert out.shape == (2, 5, 12)
    torch.testing.assert_close(out.square().mean(-1).sqrt(), torch.full((2, 5), 5.5**0.5), atol=1e-2, rtol=0)
    moved = states.clone()
    moved[:, 4] += 1
    assert ((connector(moved) - out).abs().amax(-1) > 1e-6).all()  # the first hears of the last
    padded, visible = torch.cat((states, states), 1), torch.arange(10).expand(2, -1) < 5
    torch.testing.assert_close(connector(padded, visible)[:, :5], out, atol=1e-5, rtol=1e-4)
    nothing = StateConnector(ConnectorConfig(layers=0, projection="none", gain=None), 8, 8)
    assert nothing(states) is states and not list(nothing.parameters())
