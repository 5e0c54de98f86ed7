import itertools

import pytest
import torch
from torch import Tensor

from diptych.adapters.bagel import guidance
from diptych.objectives.guidance import Branch, Guidance, renormalise

G = torch.Generator().manual_seed(0)
FULL, NO_TEXT, NO_IMAGE = (torch.randn(5, 4, generator=G) for _ in range(3))
OTHERS = {"no_text": NO_TEXT, "no_image": NO_IMAGE}


def released(text: float, image: float, renorm: str, floor: float) -> Tensor:
    """The formulas of BAGEL's sampler, option by option; the sign of a velocity does not matter to them."""
    def factor(now: Tensor, dims: tuple[int, ...]) -> Tensor:
        wanted = FULL.pow(2).sum(dims, keepdim=True).sqrt()
        return (wanted / (now.pow(2).sum(dims, keepdim=True).sqrt() + 1e-8)).clamp(min=floor, max=1.0)

    if text <= 1:
        return FULL
    by_text = NO_TEXT + text * (FULL - NO_TEXT)
    if renorm == "text_channel":
        by_text = by_text * factor(by_text, (1,))
        return NO_IMAGE + image * (by_text - NO_IMAGE) if image > 1 else by_text
    both = NO_IMAGE + image * (by_text - NO_IMAGE) if image > 1 else by_text
    return both * factor(both, (0, 1) if renorm == "global" else (1,))


@pytest.mark.parametrize("text, image, renorm, floor", list(itertools.product(
    (1.0, 4.0), (1.0, 2.0), ("global", "channel", "text_channel"), (0.0, 0.5, 1.0))))
def test_chain_equals_the_released_options(text: float, image: float, renorm: str, floor: float) -> None:
    chain = guidance(text, image, renorm, (0.4, 1.0), floor)
    torch.testing.assert_close(chain.combine(FULL, OTHERS, 0.3), released(text, image, renorm, floor))
    names = [b.context for b in chain.active(0.3)]
    assert names == (["no_text"] if text > 1 else []) + (["no_image"] if text > 1 and image > 1 else [])


def test_branches_apply_in_order() -> None:
    chain = Guidance(branches=(Branch(context="no_text", scale=3.0), Branch(context="no_image", scale=0.5)))
    first = NO_TEXT + 3 * (FULL - NO_TEXT)
    torch.testing.assert_close(chain.combine(FULL, OTHERS, 0.0), NO_IMAGE + 0.5 * (first - NO_IMAGE))
    other = Guidance(branches=chain.branches[::-1]).combine(FULL, OTHERS, 0.0)
    assert not torch.allclose(chain.combine(FULL, OTHERS, 0.0), other)


def test_a_scale_of_one_needs_no_evaluation() -> None:
    chain = Guidance(branches=(Branch(context="no_text", scale=1.0), Branch(context="no_image", scale=2.0)))
    assert [b.context for b in chain.active(0.5)] == ["no_image"]
    torch.testing.assert_close(chain.combine(FULL, {"no_image": NO_IMAGE}, 0.5), NO_IMAGE + 2 * (FULL - NO_IMAGE))


def test_outside_the_interval_nothing_is_guided() -> None:
    """The released interval (0.4, 1] in noise is [0, 0.6) in time."""
    chain = guidance(4.0, 1.0, "global", (0.4, 1.0), 0.0)
    assert chain.interval == (0.0, 0.6)
    assert chain.active(0.0) and chain.active(0.59) and not chain.active(0.6) and not chain.active(0.9)
    assert torch.equal(chain.combine(FULL, {}, 0.7), FULL)
    assert torch.equal(Guidance().combine(FULL, {}, 0.0), FULL)


def test_renormalisation_shrinks_and_never_stretches() -> None:
    big = FULL * torch.linspace(0.5, 4, 5)[:, None]
    token = renormalise(big, FULL, "channel")
    assert torch.allclose(token.norm(dim=1), torch.minimum(FULL.norm(dim=1), big.norm(dim=1)))
    whole = renormalise(big, FULL, "global")
    torch.testing.assert_close(whole, big * FULL.norm() / big.norm())
    small = FULL * 0.3
    assert torch.equal(renormalise(small, FULL, "global"), small)
    assert torch.equal(renormalise(big, FULL, "none"), big)
    assert FULL.norm() / big.norm() < 0.9
    torch.testing.assert_close(renormalise(big, FULL, "global", floor=0.9), big * 0.9)


def test_pictures_of_a_batch_are_renormalised_apart() -> None:
    stack = torch.stack((FULL * 3, FULL * 0.5))
    together = renormalise(stack, torch.stack((FULL, FULL)), "global")
    torch.testing.assert_close(together[0], FULL)
    torch.testing.assert_close(together[1], FULL * 0.5)


def test_norms_are_float32() -> None:
    large = torch.full((64, 64), 200.0, dtype=torch.float16)  # its squares overflow float16
    out = renormalise(large, large / 2, "global")
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, large / 2)


def test_unknown_renormalisation_is_an_error() -> None:
    with pytest.raises(ValueError, match="none, global, channel, got 'local'"):
        Branch(context="no_text", scale=2.0, renorm="local")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="global, channel, text_channel, got 'local'"):
        guidance(4.0, 1.0, "local", (0.0, 1.0), 0.0)


def test_linear_schedules_reach_their_scales_at_the_end() -> None:
    chain = Guidance(branches=(Branch(context="a", scale=3.0), Branch(context="b", scale=1.0)), schedule="linear")
    assert [b.scale for b in chain.at(0.25).branches] == [1.5, 1.0] and chain.at(0.25).at(0.9) == chain.at(0.25)
    assert not chain.at(0.0).active(0.5) and [b.scale for b in chain.at(1.0).active(0.5)] == [3.0]
    constant = Guidance(branches=chain.branches)
    assert constant.at(0.25) is constant
    with pytest.raises(ValueError, match="schedule to be one of constant, linear, got 'cosine'"):
        Guidance(schedule="cosine")  # type: ignore[arg-type]
