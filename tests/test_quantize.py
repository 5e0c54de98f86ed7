"""Quantizers: codes are the nearest by brute force, gradients go where they should, and each way of walking a map is
that of its definition written out."""
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych import config
from diptych.parts.quantize import (
    CodebookConfig,
    CodeLayout,
    JointConfig,
    LossWeights,
    MixConfig,
    ResidualConfig,
    ResidualQuantizer,
    SignConfig,
    VectorConfig,
    codebook,
    draw_flips,
    flip_bits,
    health,
    pack,
    resize,
    scale_inputs,
    unpack,
)
from diptych.parts.quantize.residual import Mix

SCALES = ((1, 1), (2, 2), (3, 4))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def book(values: int = 24, width: int = 5, seed: int = 3, **options: object) -> codebook.Codebook:
    out = CodebookConfig(values=values, width=width, **options).build()  # type: ignore[arg-type]
    out.weight.data = noise(values, width, seed=seed)
    if out.config.decay is not None:
        out.total.copy_(out.weight)
    return out


def multi_scale(**options: object) -> ResidualQuantizer:
    given = {"codebook": CodebookConfig(values=24, width=5, norm="none"), "scales": SCALES} | options
    out = ResidualConfig(**given).build()  # type: ignore[arg-type]
    for k, each in enumerate(out.codebooks):
        if hasattr(each, "weight"):
            each.weight.data = noise(24, 5, seed=10 + k)
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
        rows = [F.normalize(part.weight, dim=-1).double() for part in joint.parts]
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
    def after(seed: int, **options: object) -> codebook.Codebook:
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
    assert z.grad is None and quantizer.codebook.weight.grad.abs().sum() > 0
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
    change: Callable[[int], Callable[[int, Tensor], Tensor]] = lambda seed: draw_flips(  # noqa: E731
        layout, 1, 2, 0.3, generator(seed))
    assert torch.equal(change(1)(0, zeros), change(1)(0, zeros))
    assert torch.equal(change(1)(1, zeros), zeros)  # only the first scale
    shares = [change(seed)(0, zeros).float().mean().item() for seed in range(30)]
    assert max(shares) < 0.32 and max(shares) - min(shares) > 0.15  # strengths from 0 to 0.3
    assert all(abs(share - round(share, 2)) < 0.01 for share in shares)


@pytest.mark.parametrize("quantizer", [
    VectorConfig(), VectorConfig(codebook=SignConfig(width=6)), ResidualConfig(depth=4),
    ResidualConfig(codebook=JointConfig(parts=(CodebookConfig(width=3), CodebookConfig(width=2))), scales=SCALES,
                   mix=MixConfig(), compare="step")])
def test_configs_survive_plain_data(quantizer: VectorConfig | ResidualConfig) -> None:
    assert config.from_dict(VectorConfig | ResidualConfig, config.to_dict(quantizer)) == quantizer
    assert quantizer.build().codebook.width == quantizer.width
