"""Codebooks and the quantizer of one grid: codes are the nearest by brute force, gradients go where they should."""
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych import config
from diptych.parts.quantize import (
    AnyQuantizerConfig,
    CodebookConfig,
    CodeLayout,
    JointConfig,
    LossWeights,
    MixConfig,
    ResidualConfig,
    SignConfig,
    VectorConfig,
    codebook,
    health,
    pack,
    unpack,
)
from diptych.parts.vq import VQTokenizerConfig

SCALES = ((1, 1), (2, 2), (3, 4))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def book(values: int = 24, width: int = 5, seed: int = 3, **options: Any) -> codebook.Codebook:
    out = CodebookConfig(values=values, width=width, **options).build()
    out.weight.data = noise(values, width, seed=seed)
    if out.config.decay is not None:
        out.total.copy_(out.weight)
    return out


# -- layouts and figures -----------------------------------------------------------------------------------------------


def test_layout_counts_splits_and_joins() -> None:
    layout = CodeLayout(values=2, grids=SCALES, depth=6)
    assert (layout.positions, layout.count, layout.bits) == (17, 102, 102.0)
    codes = torch.arange(2 * 17 * 6).view(2, 17, 6)
    parts = layout.split(codes)
    assert [tuple(part.shape) for part in parts] == [(2, 1, 1, 6), (2, 2, 2, 6), (2, 3, 4, 6)]
    assert torch.equal(layout.join(parts), codes) and torch.equal(layout.flatten(codes), codes)
    assert layout.scale_ids().tolist() == [0] + [1] * 4 + [2] * 12
    grid = CodeLayout(values=10, grids=((3, 4),), depth=2)
    assert grid.flatten(torch.zeros(5, 3, 4, 2)).shape == (5, 12, 2)
    with pytest.raises(ValueError, match="expected 17 positions"):
        layout.split(codes[:, 1:])
    with pytest.raises(ValueError, match="expected 24 codes per picture"):
        grid.flatten(torch.zeros(5, 3, 4))


def test_health_of_a_codebook() -> None:
    even = health(torch.arange(8).repeat(3).view(4, 6), 16)
    assert even.use == 0.5 and even.dead == 8 and even.perplexity == pytest.approx(8)
    assert health(torch.zeros(9, dtype=torch.long), 4) == (0.25, pytest.approx(1.0), 3)
    skewed = health(torch.tensor([0, 0, 0, 1]), 2)
    assert skewed.perplexity == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    with pytest.raises(ValueError, match="expected codes below 3, got 5"):
        health(torch.tensor([5]), 3)


# -- codebooks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "lookup", "always"])
def test_the_nearest_row_by_brute_force(norm: str) -> None:
    rows, x = book(norm=norm), noise(40, 5) * 3
    wanted_rows = rows.weight if norm == "none" else F.normalize(rows.weight, dim=-1)
    wanted = torch.cdist((x if norm == "none" else F.normalize(x, dim=-1)).double(), wanted_rows.double()).argmin(-1)
    assert torch.equal(rows.nearest(x), wanted)
    lengths = rows.vectors(torch.arange(24)).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(24) if norm == "always" else rows.weight.norm(dim=-1))
    assert torch.equal(rows.nearest(x * 10), wanted) == (norm != "none")


def test_codes_do_not_depend_on_autocast() -> None:
    """Two rows nearer to each other than bfloat16 can tell: the codes stay those of float32."""
    quantizer = VectorConfig(codebook=CodebookConfig(values=2, width=4, norm="none")).build()
    quantizer.codebook.weight.data = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.001, 1.0, 1.0, 1.0]])
    z = torch.tensor([1.0011, 1.0, 1.0, 1.0]).view(1, 4, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z)
    assert out.codes.item() == 1 and all(loss.dtype == torch.float32 for loss in out.losses.values())
    assert quantizer(z.bfloat16()).vectors.dtype == torch.bfloat16


def test_entropy_prefers_sure_vectors_and_many_codes() -> None:
    rows = CodebookConfig(values=4, width=4, norm="none").build()
    rows.weight.data = torch.eye(4)
    spread, collapsed, unsure = torch.eye(4), torch.eye(4)[:1].repeat(4, 1), torch.full((4, 4), 0.25)
    assert rows.entropy(spread).item() == pytest.approx(-math.log(4), abs=1e-3)
    assert rows.entropy(collapsed).item() == pytest.approx(0, abs=1e-3)
    assert rows.entropy(unsure).item() == pytest.approx(0, abs=1e-3)
    signs = SignConfig(width=3, temperature=0.1).build()
    both = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    assert signs.entropy(both).item() == pytest.approx(-math.log(2), abs=1e-4)
    assert signs.entropy(both[:1]).item() == pytest.approx(0, abs=1e-4)


def test_signs_to_bits_and_back() -> None:
    codes = torch.arange(32).view(4, 8)
    assert torch.equal(pack(unpack(codes, 5)), codes)
    assert unpack(torch.tensor(4), 3).tolist() == [1, 0, 0]  # the first channel is the most significant bit
    x = torch.tensor([[0.3, -2.0, 0.0], [-0.1, 0.0, 5.0]])
    packed, loose = SignConfig(width=3).build(), SignConfig(width=3, unit=True, packed=False).build()
    assert packed.nearest(x).tolist() == [4, 1] and loose.nearest(x).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert packed.vectors(torch.tensor([4])).tolist() == [[1, -1, -1]]
    torch.testing.assert_close(loose.vectors(loose.nearest(x)).norm(dim=-1), torch.ones(2))
    assert (packed.values, packed.depth, loose.values, loose.depth) == (8, 1, 2, 3)
    with pytest.raises(ValueError, match="at most 62 bits"):
        SignConfig(width=64)


def test_joint_codebook_shares_one_index() -> None:
    parts = (CodebookConfig(values=20, width=3), CodebookConfig(values=20, width=2))
    x = noise(50, 5)
    found = {}
    for weights in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (1.0, 0.3)):
        joint = JointConfig(parts=parts, weights=weights).build()
        joint.parts[0].weight.data, joint.parts[1].weight.data = noise(20, 3, seed=5), noise(20, 2, seed=6)
        books: list[Any] = list(joint.parts)
        rows = [F.normalize(part.weight, dim=-1).double() for part in books]
        halves = [F.normalize(half, dim=-1).double() for half in x.split((3, 2), -1)]
        terms = [w * torch.cdist(h, r).square() for w, h, r in zip(weights, halves, rows, strict=True)]
        found[weights] = joint.nearest(x)
        assert torch.equal(found[weights], (terms[0] + terms[1]).argmin(-1))
        vectors = joint.vectors(found[weights])
        torch.testing.assert_close(vectors, torch.cat([r[found[weights]] for r in rows], -1).float())
        torch.testing.assert_close(vectors.norm(dim=-1), torch.full((50,), 2**0.5))
    assert len({tuple(codes.tolist()) for codes in found.values()}) == 4
    with pytest.raises(ValueError, match=r"equal size with a weight each, got \[4, 5\]"):
        JointConfig(parts=(CodebookConfig(values=4), CodebookConfig(values=5)))


# -- moving averages ---------------------------------------------------------------------------------------------------


def test_rows_follow_the_vectors_they_replace() -> None:
    rows = book(values=6, norm="none", decay=0.9)
    assert not rows.weight.requires_grad
    x = noise(30, 5)
    codes = rows.nearest(x)
    count = torch.full((6,), 0.9) + 0.1 * torch.bincount(codes, minlength=6)
    total = 0.9 * rows.weight + 0.1 * torch.stack([x[codes == k].sum(0) for k in range(6)])
    smooth = count.sum() * (count + 1e-5) / (count.sum() + 6e-5)
    rows.follow(x, codes, generator())
    torch.testing.assert_close(rows.count, count)
    torch.testing.assert_close(rows.weight, total / smooth[:, None])
    before = F.mse_loss(rows.vectors(rows.nearest(x)), x)
    for _ in range(40):
        rows.follow(x, rows.nearest(x), generator())
    assert F.mse_loss(rows.vectors(rows.nearest(x)), x) < before
    with pytest.raises(ValueError, match="fix: set decay"):
        book().follow(x, codes, generator())


@pytest.mark.parametrize("vectors", [40, 3])
def test_dead_rows_restart_from_the_batch(vectors: int) -> None:
    def after(seed: int, **options: Any) -> codebook.Codebook:
        rows = book(values=8, norm="none", decay=0.5, **options)
        rows.weight.data[1:] += 100  # nothing is near them
        rows.total.copy_(rows.weight)
        rows.follow(x, rows.nearest(x), generator(seed))
        return rows

    x = noise(vectors, 5)
    assert health(after(0).nearest(x), 8).dead == 7
    restarted = after(0, restart=True)
    assert health(restarted.nearest(x), 8).dead <= 8 - min(vectors, 7)
    assert torch.cdist(restarted.weight[1:], x).min(-1).values.max() < 0.1
    assert torch.equal(restarted.weight, after(0, restart=True).weight)
    assert not torch.equal(restarted.weight, after(1, restart=True).weight)


def test_processes_of_one_training_keep_equal_codebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same vectors: sums double, so rows move as with every vector given twice."""
    alone, together, x = (book(values=6, norm="none", decay=0.9) for _ in range(2)), [], noise(30, 5)
    first, second = alone
    first.follow(x.repeat(2, 1), first.nearest(x.repeat(2, 1)), generator())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: together.append(t.mul_(2)))
    second.follow(x, second.nearest(x), generator())
    assert len(together) == 2
    torch.testing.assert_close(second.weight, first.weight)


# -- one grid ----------------------------------------------------------------------------------------------------------


def test_a_grid_of_codes_and_its_gradients() -> None:
    quantizer = VectorConfig(codebook=CodebookConfig(values=24, width=5, norm="none")).build()
    quantizer.codebook.weight.data = noise(24, 5, seed=3)
    z = noise(2, 5, 3, 4).requires_grad_()
    out = quantizer(z)
    assert out.codes.shape == (2, 3, 4) and set(out.losses) == {"codebook", "commitment"}
    torch.testing.assert_close(out.vectors, quantizer.lookup(out.codes))
    assert quantizer.layout((3, 4)) == CodeLayout(values=24, grids=((3, 4),))
    weights = noise(2, 5, 3, 4, seed=1)
    (out.vectors * weights).sum().backward(retain_graph=True)
    torch.testing.assert_close(z.grad, weights)  # straight through
    assert quantizer.codebook.weight.grad is None
    z.grad = None
    out.losses["codebook"].backward(retain_graph=True)
    grad = quantizer.codebook.weight.grad
    assert z.grad is None and grad is not None and grad.abs().sum() > 0
    quantizer.codebook.weight.grad = None
    out.losses["commitment"].backward()
    torch.testing.assert_close(z.grad, 0.25 * 2 * (z - quantizer.lookup(out.codes)).detach() / z.numel())
    assert quantizer.codebook.weight.grad is None


def test_weights_choose_the_terms() -> None:
    weights = LossWeights(codebook=0.0, commitment=2.0, entropy=0.1)
    quantizer = VectorConfig(codebook=CodebookConfig(values=24, width=5), weights=weights).build()
    z = noise(2, 5, 3, 4)
    out = quantizer(z)
    assert set(out.losses) == {"commitment", "entropy"}
    x = F.normalize(z, dim=1)
    torch.testing.assert_close(out.losses["commitment"], 2 * F.mse_loss(x, quantizer.lookup(out.codes)))
    torch.testing.assert_close(out.losses["entropy"], 0.1 * quantizer.codebook.entropy(x.movedim(1, -1)))


@pytest.mark.parametrize("quantizer", [
    VectorConfig(), VectorConfig(codebook=SignConfig(width=6)), ResidualConfig(depth=4),
    ResidualConfig(codebook=JointConfig(parts=(CodebookConfig(width=3), CodebookConfig(width=2))), scales=SCALES,
                   mix=MixConfig(), compare="step")])
def test_configs_survive_plain_data(quantizer: AnyQuantizerConfig) -> None:
    whole = replace(VQTokenizerConfig(), quantizer=quantizer)
    assert config.from_dict(VQTokenizerConfig, config.to_dict(whole)) == whole
    assert quantizer.build().codebook.width == quantizer.width
