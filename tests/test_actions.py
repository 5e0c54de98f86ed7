"""Actions as tokens and as fractions of a range; the value head."""
import numpy as np
import pytest
import torch
from torch import nn

from diptych.alignment.critic import ValueHead
from diptych.parts.actions import ActionRange, ActionTokenizer

TOKENIZER = ActionTokenizer(vocabulary_size=32000)
RANGE = ActionRange.from_published({"q01": [-0.03, -0.2, 0.0], "q99": [0.04, 0.5, 1.0], "mask": [True, True, False]})


def test_bins_are_the_last_ids_counted_backwards() -> None:
    edges = np.linspace(-1, 1, 256)
    actions = np.concatenate((edges, np.random.default_rng(0).uniform(-1.5, 1.5, 500)))
    expected = 32000 - np.digitize(np.clip(actions, -1, 1), edges)
    ids = TOKENIZER.encode(torch.from_numpy(actions))
    assert ids.tolist() == expected.tolist()
    assert TOKENIZER.ids == range(31744, 32000) and {int(ids.min()), int(ids.max())} == {31744, 31999}


def test_decoding_comes_back_within_half_a_bin() -> None:
    actions = torch.rand(200, 7, dtype=torch.float64) * 2 - 1
    back = TOKENIZER.decode(TOKENIZER.encode(actions))
    assert float((back - actions).abs().max()) <= 1 / 255 + 1e-12
    ids = torch.arange(31745, 32000)
    assert torch.equal(TOKENIZER.encode(TOKENIZER.decode(ids)), ids)
    assert TOKENIZER.decode(torch.tensor(31744)) == TOKENIZER.decode(torch.tensor(31745))  # the end's own bin
    small = ActionTokenizer(vocabulary_size=96, bins=3, low=0, high=4)
    assert small.encode(torch.tensor([-9.0, 1.9, 2.0, 4.0])).tolist() == [95, 95, 94, 93]
    assert small.decode(torch.tensor([95, 94, 93])).tolist() == [1, 3, 3]
    with pytest.raises(ValueError, match="2 <= bins"):
        ActionTokenizer(vocabulary_size=10, bins=11)


def test_fractions_are_restored_where_they_are_scaled() -> None:
    own = RANGE.restore(torch.tensor([[-1.0, 1.0, -0.7], [1.0, 0.0, 0.3]]))
    torch.testing.assert_close(own, torch.tensor([[-0.03, 0.5, -0.7], [0.04, 0.15, 0.3]], dtype=torch.float64),
                               atol=1e-7, rtol=0)
    torch.testing.assert_close(RANGE.fractions(own)[0].float(), torch.tensor([-1.0, 1.0, -0.7]))
    with pytest.raises(ValueError, match="actions of 3 dimensions, got 2"):
        RANGE.restore(torch.zeros(2))
    with pytest.raises(ValueError, match="low < high"):
        ActionRange((0.0,), (0.0,), (True,))


def test_the_value_head_starts_without_an_opinion() -> None:
    torch.manual_seed(0)
    head, states = ValueHead(32, outputs=3), torch.randn(64, 32)
    values = head(states)
    assert values.shape == (64, 3) and values.abs().mean() < 0.5 and head.last.bias is None
    first, second = head.layers
    expected = head.last(nn.functional.gelu(second(nn.functional.gelu(first(states)))))
    assert torch.equal(values, expected) and (first.out_features, second.out_features) == (512, 128)
    values.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert head.bfloat16()(states.bfloat16()).dtype == torch.float32
