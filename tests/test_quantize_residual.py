"""Quantizers that go in steps: each way of walking a map is that of its definition written out."""
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.parts.quantize import (
    CodebookConfig,
    CodeLayout,
    LossWeights,
    MixConfig,
    ResidualConfig,
    ResidualQuantizer,
    SignConfig,
    draw_flips,
    flip_bits,
    resize,
    scale_inputs,
)
from diptych.parts.quantize.residual import Mix

SCALES = ((1, 1), (2, 2), (3, 4))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def multi_scale(**options: Any) -> ResidualQuantizer:
    given: dict[str, Any] = {"codebook": CodebookConfig(values=24, width=5, norm="none"), "scales": SCALES} | options
    out = ResidualConfig(**given).build()
    for k, each in enumerate(out.codebooks):
        if hasattr(each, "weight"):
            each.weight.data = noise(24, 5, seed=10 + k)
    return out


# -- step by step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_residual_depth_is_its_definition(shared: bool) -> None:
    quantizer = multi_scale(scales=(), depth=3, shared=shared)
    z = noise(2, 5, 3, 4)
    out = quantizer(z)
    assert out.codes.shape == (2, 3, 4, 3)
    rest, total, losses = z, torch.zeros_like(z), []
    for d in range(3):
        rows = quantizer.codebooks[0 if shared else d].weight.detach()
        codes = torch.cdist(rest.movedim(1, -1).flatten(0, 2), rows).argmin(-1).view(2, 3, 4)
        assert torch.equal(out.codes[..., d], codes)
        total, rest = total + rows[codes].movedim(-1, 1), rest - rows[codes].movedim(-1, 1)
        torch.testing.assert_close(out.partials[d], total)
        losses.append(F.mse_loss(total, z))
    torch.testing.assert_close(out.losses["codebook"], torch.stack(losses).mean())
    torch.testing.assert_close(quantizer.lookup(out.codes), total)
    torch.testing.assert_close(quantizer.lookup(out.codes[..., :2]), out.partials[1])
    torch.testing.assert_close(quantizer.vectors(out.codes).sum(-2).movedim(-1, 1), total)
    assert quantizer.layout((3, 4)).count == 36
    with pytest.raises(ValueError, match="expected no scales with depth 3"):
        quantizer(z, scales=SCALES)


@pytest.mark.parametrize("mix", [None, MixConfig(count=2, ratio=0.5)])
@pytest.mark.parametrize("compare", ["sum", "step"])
def test_scales_are_their_definition(mix: MixConfig | None, compare: str) -> None:
    quantizer = multi_scale(mix=mix, compare=compare)
    z, rows = noise(2, 5, 3, 4), quantizer.codebook.weight.detach()
    out = quantizer(z)
    parts = quantizer.layout((3, 4)).split(out.codes)
    rest, total, losses = z, torch.zeros_like(z), []
    for k, (grid, part) in enumerate(zip(SCALES, parts, strict=True)):
        x = F.interpolate(rest, size=grid, mode="area")
        assert torch.equal(torch.cdist(x.movedim(1, -1).flatten(0, 2), rows).argmin(-1), part.flatten())
        q = rows[part].movedim(-1, 1)
        losses.append(F.mse_loss(q, x))
        q = F.interpolate(q, size=(3, 4), mode="bicubic")
        if quantizer.mix is not None:
            q = 0.5 * q + 0.5 * quantizer.mix.convs[(0, 0, 1)[k]](q).detach()
        total, rest = total + q, rest - q
        torch.testing.assert_close(out.partials[k].detach(), total)
        losses[-1] = F.mse_loss(total, z) if compare == "sum" else losses[-1]
    torch.testing.assert_close(out.losses["codebook"].detach(), torch.stack(losses).mean())
    torch.testing.assert_close(out.vectors.detach(), total)
    torch.testing.assert_close(quantizer.lookup(out.codes).detach(), total)
    torch.testing.assert_close(quantizer.lookup(out.codes[:, :5]).detach(), out.partials[1].detach())
    with pytest.raises(ValueError, match="17 positions for all, got 16"):
        quantizer.lookup(out.codes[:, :16])


def test_where_the_gradient_of_a_sum_and_of_steps_goes() -> None:
    weights = noise(2, 5, 3, 4, seed=1)
    for compare, mode in (("sum", "identity"), ("step", "pooled")):
        quantizer = multi_scale(compare=compare)
        z = noise(2, 5, 3, 4).requires_grad_()
        (quantizer(z).vectors * weights).sum().backward()
        if mode == "identity":
            torch.testing.assert_close(z.grad, weights)
            assert quantizer.codebook.weight.grad is None
        else:  # every step passes the gradient through its own pooling: more than once in all
            x = noise(2, 5, 3, 4).requires_grad_()
            ways = [resize(resize(x, grid, "area"), (3, 4), "bicubic") for grid in SCALES]
            (torch.stack(ways).sum(0) * weights).sum().backward()
            torch.testing.assert_close(z.grad, x.grad)


@pytest.mark.parametrize(("count", "steps"), [(4, 10), (4, 5), (4, 13), (3, 10), (1, 4), (6, 6), (2, 5), (4, 1)])
def test_mixing_ticks_are_those_of_the_published_code(count: int, steps: int) -> None:
    parts = (1 / 3 / count) if count == 4 else (1 / 2 / count)
    ticks = np.linspace(parts, 1 - parts, count)
    mix = Mix(MixConfig(count=count), 2)
    wanted = [int(np.argmin(np.abs(ticks - k / max(steps - 1, 1)))) for k in range(steps)]
    assert [mix.which(k, steps) for k in range(steps)] == wanted


def test_other_scales_than_the_configured() -> None:
    quantizer, z = multi_scale(), noise(1, 5, 6, 6)
    with pytest.raises(ValueError, match=r"a map of \(3, 4\) cells .* got \(6, 6\); fix: pass the scales"):
        quantizer(z)
    scales = ((1, 1), (3, 3), (6, 6))
    out = quantizer(z, scales)
    assert out.codes.shape == (1, 46) and quantizer.layout((6, 6), scales).positions == 46
    torch.testing.assert_close(quantizer.lookup(out.codes, scales), out.vectors)
    dropped = quantizer(z, (scales[0], scales[2]))
    assert dropped.codes.shape == (1, 37) and torch.equal(dropped.codes[:, :1], out.codes[:, :1])
    assert dropped.vectors.shape == z.shape
    with pytest.raises(ValueError, match="either depth or scales"):
        ResidualConfig(depth=2, scales=SCALES)


def test_what_a_next_scale_model_reads() -> None:
    quantizer = multi_scale(up="bilinear")
    out = quantizer(noise(2, 5, 3, 4))
    inputs = scale_inputs(out.partials, SCALES, "area")
    assert inputs.shape == (2, 16, 5)
    torch.testing.assert_close(inputs[:, :4], resize(out.partials[0], (2, 2), "area").flatten(2).transpose(1, 2))
    torch.testing.assert_close(inputs[:, 4:], out.partials[1].flatten(2).transpose(1, 2))
    running, again = quantizer.running_inputs(out.codes), quantizer.running_inputs(out.codes, again=1)
    one, four = quantizer.vectors(out.codes[:, :1]), quantizer.vectors(out.codes[:, 1:5])
    torch.testing.assert_close(running[:, :4], one.expand(-1, 4, -1))
    torch.testing.assert_close(again[:, :4], one + four)
    assert torch.equal(running[:, 4:], again[:, 4:])
    fine = resize((one + four).transpose(1, 2).unflatten(2, (2, 2)), (3, 4), "bilinear")
    torch.testing.assert_close(running[:, 4:], fine.flatten(2).transpose(1, 2))


# -- self-correction ---------------------------------------------------------------------------------------------------


def bits() -> ResidualQuantizer:
    return multi_scale(codebook=SignConfig(width=5, unit=True, packed=False), up="bilinear", compare="step",
                       weights=LossWeights(codebook=0.0))


def test_flips_change_the_map_and_later_labels_repair() -> None:
    quantizer, z = bits(), noise(2, 5, 3, 4)
    layout = quantizer.layout((3, 4))
    clean = quantizer(z)
    assert clean.codes.shape == (2, 17, 5) and layout.count == 85 and layout.bits == 85
    uniforms = [torch.rand(2, h, w, 5, generator=generator(k)) for k, (h, w) in enumerate(SCALES)]
    none = quantizer(z, change=flip_bits(uniforms, [0.0, 0.0]))
    assert torch.equal(none.codes, clean.codes) and torch.equal(none.vectors, clean.vectors)
    all_first = quantizer(z, change=flip_bits(uniforms, [1.0]))
    assert torch.equal(all_first.codes[:, :1], clean.codes[:, :1])  # the label is the true bit
    torch.testing.assert_close(all_first.partials[0], -clean.partials[0])  # the map holds the wrong one
    assert not torch.equal(all_first.codes[:, 1:], clean.codes[:, 1:])
    blind = quantizer.lookup(torch.cat((1 - clean.codes[:, :1], clean.codes[:, 1:]), 1))
    cosine = {name: F.cosine_similarity(x.flatten(1), z.flatten(1)).mean()
              for name, x in (("blind", blind), ("repaired", all_first.vectors))}
    assert cosine["repaired"] > cosine["blind"] + 0.05


def test_drawn_flips_have_their_strength_and_seed() -> None:
    layout = CodeLayout(values=2, grids=((40, 40), (40, 40)), depth=8)
    zeros = torch.zeros(2, 40, 40, 8, dtype=torch.long)

    def flipped(seed: int, step: int) -> Tensor:
        return draw_flips(layout, 1, 2, 0.3, generator(seed))(step, zeros)

    assert torch.equal(flipped(1, 0), flipped(1, 0))
    assert torch.equal(flipped(1, 1), zeros)  # only the first scale
    shares = [flipped(seed, 0).float().mean().item() for seed in range(30)]
    assert max(shares) < 0.32 and max(shares) - min(shares) > 0.15  # strengths from 0 to 0.3
    assert all(abs(share - round(share, 2)) < 0.01 for share in shares)
