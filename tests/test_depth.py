"""The depth transformer is causal over depth, teacher forcing and generation agree, and branches share their codes."""
import pytest
import torch
from torch import Tensor

from diptych.parts.depth import DepthConfig, DepthTransformer

SMALL = DepthConfig(depth=4, values=9, code_width=5, hidden_width=6, width=8, inner=16, heads=2, layers=2)


def model(config: DepthConfig = SMALL) -> DepthTransformer:
    torch.manual_seed(0)
    return DepthTransformer(config).eval()


@pytest.mark.parametrize("inner", [8, 16])
def test_logits_depend_on_the_hidden_state_and_earlier_codes_only(inner: int) -> None:
    head = model(DepthConfig(**{**vars(SMALL), "inner": inner}))
    hidden, vectors = torch.randn(2, 3, 6), torch.randn(2, 3, 4, 5)
    logits = head(hidden, vectors)
    assert logits.shape == (2, 3, 4, 9)
    for d in range(4):
        changed = vectors.clone()
        changed[:, :, d] += 1
        same = [torch.allclose(head(hidden, changed)[:, :, e], logits[:, :, e], atol=1e-5) for e in range(4)]
        assert same == [e <= d for e in range(4)]
    assert not torch.allclose(head(hidden + 1, vectors)[:, :, 0], logits[:, :, 0])
    torch.testing.assert_close(head(hidden, vectors[:, :, :2]), logits[:, :, :3])


def test_tokens_are_sums_of_vectors() -> None:
    """Two codes whose vectors add up to the same say the same about the third."""
    head, hidden = model(), torch.randn(1, 6)
    a, b = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    b[:, 1] = a[:, 0] + a[:, 1] - b[:, 0]
    assert not torch.allclose(head(hidden, a)[:, 1], head(hidden, b)[:, 1])
    for name, p in head.named_parameters():  # without attention to the tokens before
        if "v_proj.weight" in name:
            p.data.zero_()
    torch.testing.assert_close(head(hidden, a)[:, 2], head(hidden, b)[:, 2])


def test_generation_is_teacher_forcing_of_its_own_codes() -> None:
    head, table = model(), torch.randn(4, 9, 5)
    hidden = torch.randn(3, 6)
    seen: list[Tensor] = []

    def draw(d: int, logits: Tensor) -> Tensor:
        seen.append(logits)
        return (logits.argmax(-1) + d) % 9

    codes, sums = head.generate(hidden, lambda d, codes: table[d, codes], draw)
    vectors = torch.stack([table[d, codes[:, d]] for d in range(4)], 1)
    torch.testing.assert_close(torch.stack(seen, 1), head(hidden, vectors))
    torch.testing.assert_close(sums, vectors.sum(1))
    alone, _ = head.generate(hidden[1:2], lambda d, codes: table[d, codes], draw)
    assert torch.equal(alone[0], codes[1])


def test_branches_under_guidance_share_their_codes() -> None:
    head, table = model(), torch.randn(9, 5)

    def draw(d: int, logits: Tensor) -> Tensor:
        c, u = logits.chunk(2)
        return (u + 3 * (c - u)).argmax(-1).repeat(2)

    codes, sums = head.generate(torch.randn(4, 6), lambda d, codes: table[codes], draw)
    assert torch.equal(codes[:2], codes[2:]) and torch.equal(sums[:2], sums[2:])


def test_errors_and_paper_size() -> None:
    with pytest.raises(ValueError, match=r"expected code vectors \(2, depth, 5\)"):
        model()(torch.zeros(2, 6), torch.zeros(2, 4, 6))
    with torch.device("meta"):
        head = DepthTransformer(DepthConfig())
    one = 2 * 896 * 3584 + 3584 + 896 + 4 * (3584 * 3584 + 3584) + 2 * 896 * 3584 + 3584 + 896 + 4 * 896
    ends = 896 * 896 + 896 + 1024 * 896 + 896 + 4 * 896 + 2 * 896 + 896 * 16384 + 16384
    assert sum(p.numel() for p in head.parameters()) == 6 * one + ends
