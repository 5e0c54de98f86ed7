"""Alignment of representations, states by layer, what attention between experts costs."""
import dataclasses
from itertools import product

import pytest
import torch

from diptych.analysis.alignment import mutual_neighbours, slope
from diptych.analysis.layers import watched
from diptych.analysis.sharing import sharing
from diptych.parts.masks import interleaved, packed_causal
from diptych.parts.tokens import Modality
from diptych.systems.batch import Batch
from diptych.systems.hbridge import HBridge
from diptych.systems.unifork import UniFork
from diptych.world.tasks import document

RNG = torch.Generator().manual_seed(0)


# -- alignment --------------------------------------------------------------------------------------------------------

def test_neighbours_do_not_depend_on_basis_or_offset() -> None:
    a = torch.randn(60, 8, generator=RNG)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=RNG)).Q
    assert mutual_neighbours(a, 3 * (a @ turn) + 5) == 1.0
    assert mutual_neighbours(a, torch.cat((a, a), 1)) == 1.0


def test_neighbours_by_hand() -> None:
    angles = torch.tensor([0.0, 0.1, 2.0, 2.2, 4.0, 4.3])
    a = torch.stack((angles.cos(), angles.sin()), 1)
    a = a - a.mean(0)
    assert mutual_neighbours(a, a[[1, 0, 3, 2, 5, 4]], k=1) == 1.0, "pairs are exchanged"
    assert mutual_neighbours(a, a[[1, 0, 4, 3, 2, 5]], k=1) == pytest.approx(2 / 6)


def test_unrelated_features_are_at_chance_and_related_ones_above() -> None:
    a, b = torch.randn(400, 6, generator=RNG), torch.randn(400, 9, generator=RNG)
    assert mutual_neighbours(a, b) == pytest.approx(10 / 399, abs=0.01)
    assert 0.1 < mutual_neighbours(a, torch.cat((a, b[:, :2]), 1)) < 0.9
    with pytest.raises(ValueError, match="more than k = 10"):
        mutual_neighbours(a[:10], b[:10])
    with pytest.raises(ValueError, match="a row for each"):
        mutual_neighbours(a, b[:-1])


def test_slopes_of_the_late_half() -> None:
    assert slope([0.0, 0.25, 0.5, 0.75, 1.0]) == pytest.approx(1.0)
    assert slope([0.0, 1.0, 2.0, 1.0, 0.0], start=0.5) == pytest.approx(-4.0)
    with pytest.raises(ValueError, match="at least two values"):
        slope([1.0, 2.0], start=0.5)


# -- states by layer --------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_states_are_those_of_the_pass() -> None:
    torch.manual_seed(0)
    model = UniFork(UniFork.tiny()).eval()
    written = [model.write(document(task, 1)) for task in ("caption", "draw", "draw")]
    batch = Batch.of(written, [[0], [1, 2]])
    codes = model.encode(batch.pictures)
    given = torch.cat([codes[i] for i, _ in batch.codes])
    with watched(model.trunk) as passes:
        hidden = model.forward_page(batch.page, [], given)
    [passage] = passes
    assert len(passage.states) == model.config.depth + 1
    for state, out, norm in zip(passage.states[-1], hidden, model.trunk.norm, strict=True):
        torch.testing.assert_close(norm(state), out)
    tokens = batch.page.tokens
    coded = tokens.modality == Modality.CODE
    first = passage.pooled(coded)[0]
    inputs = model.code_tokens(given)
    torch.testing.assert_close(first, torch.stack((inputs[:16].mean(0), inputs[16:].mean(0))))
    whole = torch.zeros(tokens.index.numel(), inputs.shape[1])
    for places, states in zip(tokens.routes(2), passage.states[1], strict=True):
        whole[places] = states
    expected = torch.stack([whole.view(*tokens.shape, -1)[b][coded[b]].mean(0) for b in range(2)])
    torch.testing.assert_close(passage.pooled(coded)[1], expected)
    with pytest.raises(ValueError, match="2 rows without"):
        passage.pooled(torch.zeros_like(coded))
    model.forward_page(batch.page, [], given)
    assert len(passes) == 1, "nothing is watched afterwards"


# -- attention between experts ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("apart", "layers"), [((0, 0), 4), ((1, 1), 2), ((0, 3), 1), ((4, 0), 0)])
def test_sharing_counts_pair_by_pair(apart: tuple[int, int], layers: int) -> None:
    c = HBridge.tiny()
    with torch.device("meta"):
        model = HBridge(dataclasses.replace(c, apart=apart))
    tokens = HBridge(c).collate([document("edit", 1), document("draw", 2)]).page.tokens
    found = sharing(model.trunk, tokens, model.mask)
    allowed = model.mask.dense(tokens)
    route = tokens.route.tolist()
    pairs = sum(bool(allowed[b, q, k]) and route[b][q] != route[b][k] and -1 not in (route[b][q], route[b][k])
                for b, q, k in product(*map(range, allowed.shape)))
    painted = int((tokens.route == 1).sum())
    maps = 48 * 64 + 2 * 48 * 32 + 64 * 48  # queries, keys, values there; back
    assert found.layers == layers and found.attention == layers * 4 * 64 * pairs
    assert found.maps == layers * 2 * painted * maps and pairs > 0


def test_one_expert_shares_nothing_and_samples_of_two_branches_neither() -> None:
    with torch.device("meta"):
        model = UniFork(UniFork.tiny())
    tokens = UniFork(UniFork.tiny()).collate([document("caption", 1), document("draw", 2)]).page.tokens
    assert sharing(model.trunk, tokens, packed_causal).attention == 0
    assert sharing(model.trunk, tokens, interleaved).maps == 0
