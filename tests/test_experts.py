"""Couplings: dense, mixture, feed-forward experts, forked (Y), bridged between experts of different width (H)."""
import dataclasses
from itertools import pairwise

import pytest
import torch
from test_trunk import BLOCK, KINDS, TOKENS, states, strip, trunk
from torch import Tensor

from diptych.parts.blocks import BlockConfig, attend_after
from diptych.parts.cache import Context
from diptych.parts.experts import SKIP, Coupling, LayerCoupling, streams
from diptych.parts.masks import interleaved, same
from diptych.parts.positions import Rope, rotate
from diptych.parts.tokens import PADDING, Tokens, assemble
from diptych.parts.trunks import Trunk, pick


def copy_sets(model: Trunk) -> None:
    """Make every second parameter set equal to the first."""
    for name, p in model.named_parameters():
        for kind in (*KINDS, "norm"):
            first = name.replace(f"{kind}.1.", f"{kind}.0.") if f".{kind}.1." in f".{name}" else name
            p.data.copy_(model.get_parameter(first))


# -- couplings --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mixture", "feed_forward"])
def test_equal_experts_are_a_dense_trunk(name: str) -> None:
    experts, dense = trunk(Coupling.named(name, 2)), trunk(Coupling.named("dense", 2))
    copy_sets(experts)
    dense.load_state_dict({k: v for k, v in experts.state_dict().items() if k in dense.state_dict()})
    one, two = experts(states(TOKENS), TOKENS, interleaved), dense(states(TOKENS), TOKENS, interleaved)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, expected", [("mixture", 2), ("feed_forward", 1)])
def test_each_route_has_its_own_parameters(name: str, expected: int) -> None:
    model = trunk(Coupling.named(name, 2))
    assert [len(layer.attention) for layer in model.layers] == [expected] * 2  # type: ignore[arg-type, union-attr]
    assert len(model.norm) == expected
    # without joint attention between routes, one route's output reaches one set of parameters only
    model(states(TOKENS), TOKENS, interleaved & same("route"))[1].square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    names = {n for n, _ in model.named_parameters()}
    own = {n for n in names if n.startswith("norm.1.") or any(f".{kind}.1." in n for kind in KINDS)}
    shared = {n for n in names if n.startswith("norm.") or ".attention" in n} if name == "feed_forward" else set()
    assert moved == own | shared


def test_layers_apart_hide_the_other_route() -> None:
    own = (0, 1)
    apart = Coupling((LayerCoupling(attention=own, mlp=own, joint=False),) * 2)
    model, joint = trunk(apart), trunk(Coupling.mixture(2))
    x = states(TOKENS)
    changed = [x[0], x[1] + 1]
    torch.testing.assert_close(model(x, TOKENS, interleaved)[0], model(changed, TOKENS, interleaved)[0])
    assert not torch.allclose(joint(x, TOKENS, interleaved)[0], joint(changed, TOKENS, interleaved)[0], atol=1e-3)
    torch.testing.assert_close(model(x, TOKENS, interleaved)[1], joint(x, TOKENS, interleaved & same("route"))[1])


def test_routes_served_alike_share_one_product() -> None:
    assert streams(Coupling.dense(3, routes=3)) == [[0, 1, 2]]
    assert streams(Coupling.mixture(2)) == [[0], [1]]
    y = Coupling((LayerCoupling(attention=(0, 0), mlp=(0, 0)), LayerCoupling(attention=(0, 1), mlp=(0, 1))))
    assert streams(y) == [[0], [1]] and y.final == (0, 1) and y.routes == 2


def test_a_coupling_names_one_set_per_route() -> None:
    with pytest.raises(ValueError, match=r"route counts \[1, 2\]"):
        Coupling((LayerCoupling(attention=(0,), mlp=(0, 1)),))
    with pytest.raises(ValueError, match="dense, mixture, feed_forward, got 'moe'"):
        Coupling.named("moe", 2)


# -- Y: shared layers, then branches ----------------------------------------------------------------------------------

def moved(model: Trunk, output: Tensor) -> set[str]:
    model.zero_grad()
    output.square().sum().backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_a_fork_shares_below_and_parts_above() -> None:
    model = trunk(Coupling.fork(4, 3))
    assert [len(layer.attention) for layer in model.layers] == [1, 1, 1, 2]  # type: ignore[arg-type, union-attr]
    apart = [assemble([[strip((5, 0))]]), assemble([[strip((5, 1))]])]
    below = {n for n, _ in model.named_parameters() if n.startswith(("layers.0", "layers.1", "layers.2"))}
    for route in (0, 1):
        x = states(apart[route])
        own = {n for n, _ in model.named_parameters() if f"norm.{route}.weight" == n or
               (n.startswith("layers.3") and any(f".{kind}.{route}." in n for kind in KINDS))}
        assert moved(model, model(x, apart[route], interleaved)[route]) == below | own
        plain = trunk(Coupling.dense(4))
        plain.load_state_dict({n: model.state_dict()[m if (m := _other(n, route)) in model.state_dict() else n]
                               for n in plain.state_dict()})
        alone = dataclasses.replace(apart[route], route=torch.zeros_like(apart[route].route))
        torch.testing.assert_close(plain([x[route]], alone, interleaved)[0], model(x, apart[route], interleaved)[route])


def _other(name: str, number: int) -> str:
    """The name of the same tensor in another parameter set."""
    for kind in (*KINDS, "modulation"):
        name = name.replace(f".{kind}.0.", f".{kind}.{number}.")
    return name.replace("norm.0.weight", f"norm.{number}.weight") if name.startswith("norm") else name


def test_a_fork_may_be_anywhere() -> None:
    assert Coupling.fork(2, 2) == Coupling.dense(2, 2) and Coupling.fork(2, 0) == Coupling.mixture(2)
    assert streams(Coupling.fork(3, 1)) == [[0], [1]] and Coupling.fork(3, 1).final == (0, 1)
    with pytest.raises(ValueError, match="0 to 2 shared layers, got 3"):
        Coupling.fork(2, 3)


# -- H: experts of different width that meet in the middle ------------------------------------------------------------

NARROW = BlockConfig(width=20, heads=3, kv_heads=1, head_dim=10, hidden=16, qkv_bias=False, qk_norm=True)


def wide(coupling: Coupling, other: BlockConfig = NARROW) -> Trunk:
    torch.manual_seed(0)
    model = Trunk((BLOCK, other), coupling, (Rope(8), Rope(other.head_dim)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def drawn(tokens: Tokens, model: Trunk) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(len(i), w, generator=g) for i, w in zip(tokens.routes(2), model.widths, strict=True)]


def test_experts_apart_are_two_trunks() -> None:
    model = wide(Coupling.bridge(2, 1, 1))
    out = model(drawn(TOKENS, model), TOKENS, interleaved)
    for route, block in enumerate((BLOCK, NARROW)):
        alone = Trunk(block, Coupling.dense(2), Rope(block.head_dim))
        alone.load_state_dict({n: model.state_dict()[_other(n, route)] for n in alone.state_dict()})
        own = TOKENS.route == route
        tokens = dataclasses.replace(TOKENS, route=own.long() - 1, document=TOKENS.document.where(own, PADDING))
        torch.testing.assert_close(alone([drawn(TOKENS, model)[route]], tokens, interleaved)[0], out[route],
                                   atol=1e-5, rtol=1e-5)


def test_a_bridge_is_its_formula() -> None:
    """Map, norm, rotation; one softmax over both; the way back."""
    tokens = assemble([[strip((3, 0), (4, 1))]])
    model = wide(Coupling.bridge(1, 0, 0))
    x, layer = drawn(tokens, model), model.layers[0]
    cos, sin = Rope(8)(tokens)
    sides = []
    for e, (block, here) in enumerate(((BLOCK, slice(0, 3)), (NARROW, slice(3, 7)))):
        attention = layer.attention[e]  # type: ignore[index]
        flat = attention.qkv(layer.attention_norm[e](x[e]))  # type: ignore[index]
        q, k, v = flat.split([n * block.head_dim for n in (block.heads, block.kv_heads, block.kv_heads)], -1)
        if e:
            q, k, v = (part @ m.weight.T for part, m in zip((q, k, v), attention.there, strict=True))
        q, k, v = (part.unflatten(-1, (-1, 8)) for part in (q, k, v))
        turned = (rotate(part[None], cos[:, here], sin[:, here])[0]
                  for part in (attention.q_norm(q), attention.k_norm(k)))
        sides.append((*turned, v))
    q, k, v = (torch.cat(parts) for parts in zip(*sides, strict=True))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) / 8**0.5
    weights = scores.masked_fill(~interleaved.dense(tokens)[0], float("-inf")).softmax(-1)
    mixed = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1)).flatten(1)
    brought = (mixed[:3], mixed[3:] @ layer.attention[1].back.weight.T)  # type: ignore[index, union-attr]
    for e, out in enumerate(model(x, tokens, interleaved)):
        h = x[e] + layer.attention[e].out(brought[e])  # type: ignore[index]
        h = h + layer.mlp[e](layer.mlp_norm[e](h))  # type: ignore[index]
        torch.testing.assert_close(out, model.norm[e](h), atol=1e-5, rtol=1e-5)


def test_a_bridge_between_equals_is_a_mixture() -> None:
    model = wide(Coupling.bridge(2, 0, 0), BLOCK)
    plain = trunk(Coupling.mixture(2))
    plain.load_state_dict(model.state_dict())  # no maps: one head space
    x = drawn(TOKENS, model)
    for a, b in zip(model(x, TOKENS, interleaved), plain(x, TOKENS, interleaved), strict=True):
        torch.testing.assert_close(a, b)


def test_maps_start_as_the_identity() -> None:
    """A narrower head space fits into the wider one: fresh maps change nothing."""
    small = dataclasses.replace(BLOCK, heads=2, kv_heads=1)
    fresh = Trunk((BLOCK, small), Coupling.bridge(1, 0, 0), Rope(8)).layers[0].attention[1]  # type: ignore[index]
    qkv = fresh.qkv(torch.randn(5, 24, generator=torch.Generator().manual_seed(0))).unflatten(-1, (4, 8))
    mapped = torch.cat([m(part.flatten(1)) for m, part in
                        zip(fresh.there, qkv.split((2, 1, 1), 1), strict=True)], 1).unflatten(-1, (8, 8))
    torch.testing.assert_close(mapped[:, [0, 1, 4, 6]], qkv)
    assert not mapped[:, [2, 3, 5, 7]].any()
    torch.testing.assert_close(fresh.back(mapped[:, :4].flatten(1)), qkv[:, :2].flatten(1))


@pytest.mark.parametrize("name", ["fork", "bridge", "front", "time"])
def test_packed_training_is_cached_inference(name: str) -> None:
    """A document among others, against the same read span by span."""
    tuned = dataclasses.replace(NARROW, modulated=True)
    model = {"fork": lambda: trunk(Coupling.fork(3, 1)), "bridge": lambda: wide(Coupling.bridge(3, 1, 1), tuned),
             "front": lambda: wide(Coupling.bridge(2, 1, 0, before=1), tuned), "time": lambda: over_time(2)}[name]()
    tokens = assemble([[strip((3, 0), (4, 1), (2, 0), (3, 1)), strip((4, 1), (2, 0))]])
    tokens = dataclasses.replace(tokens, time=torch.linspace(0, 1, tokens.shape[1])[None])
    x, context, done = drawn(tokens, model), Context(), [0, 0]
    whole = model(x, tokens, interleaved)
    for a, b in pairwise((0, 3, 7, 9, 12)):
        part = tokens.map(lambda f, a=a, b=b: f[:, a:b])
        ends = [d + len(i) for d, i in zip(done, part.routes(2), strict=True)]
        run = model.start([context], part, torch.float32)
        out = model([s[d:e] for s, d, e in zip(x, done, ends, strict=True)], part, interleaved, run)
        run.commit([b - a])
        for one, all_, d, e in zip(out, whole, done, ends, strict=True):
            torch.testing.assert_close(one, all_[d:e], atol=1e-5, rtol=1e-5)
        done = ends


# -- layers shared out over time --------------------------------------------------------------------------------------

TWIN = dataclasses.replace(BLOCK, modulated=True, residual=True)


def over_time(groups: int, depth: int = 4, twin: BlockConfig = TWIN, twins: int | None = None) -> Trunk:
    torch.manual_seed(0)
    model = Trunk((BLOCK, twin), Coupling.timestep(depth, groups, twins), Rope(8))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def at_times(tokens: Tokens, *times: float) -> Tokens:
    """These in turn for the tokens that have one."""
    inside = tokens.route == 1
    wave = torch.tensor(times).repeat(tokens.route.numel())[: tokens.route.numel()].view(tokens.shape)
    return dataclasses.replace(tokens, time=wave.where(inside, torch.nan))


def test_a_time_runs_through_its_layers_only() -> None:
    model = over_time(2)
    assert model.coupling.layers_of(0) == 4 and model.coupling.layers_of(1) == 2 and model.widths == [24, 24]
    for t, layers in ((0.0, "01"), (0.49, "01"), (0.5, "23"), (1.0, "23")):
        tokens = at_times(TOKENS, t)
        reached = moved(model, model(drawn(tokens, model), tokens, interleaved)[1])
        own = {n for n in reached if any(f".{kind}.1." in n for kind in (*KINDS, "modulation", "residual"))}
        assert {n.split(".")[1] for n in own} == set(layers), t
    with pytest.raises(ValueError, match="groups of equal size, got 4 of 4 layers in 3 groups"):
        Coupling.timestep(4, 3)


def test_only_the_first_layers_may_have_twins() -> None:
    """Then these serve all times, or share them."""
    for groups, at in ((1, {0.1: "01", 0.9: "01"}), (2, {0.1: "0", 0.9: "1"})):
        model = over_time(groups, twins=2)
        assert model.coupling.layers_of(0) == 4 and model.coupling.layers_of(1) == 2 // groups
        for t, layers in at.items():
            tokens = at_times(TOKENS, t)
            reached = moved(model, model(drawn(tokens, model), tokens, interleaved)[1])
            assert {n.split(".")[1] for n in reached if ".mlp.1." in n} == set(layers), (groups, t)
    for twins in (0, 5):
        with pytest.raises(ValueError, match=f"got {twins} of 4 layers in 1 groups"):
            Coupling.timestep(4, 1, twins)


def test_tokens_of_all_times_run_together() -> None:
    model = over_time(2)
    tokens = assemble([[strip((3, 0), (4, 1), (2, 0))], [strip((2, 0), (4, 1))]])
    mixed = at_times(tokens, 0.1)
    mixed.time[1].masked_fill_(tokens.route[1] == 1, 0.8)  # each picture at a time of its own
    x = drawn(tokens, model)
    both = model(x, mixed, interleaved)
    for t, row in ((0.1, 0), (0.8, 1)):
        alone = model(x, at_times(tokens, t), interleaved)
        for r in (0, 1):
            own = torch.nonzero(tokens.route.flatten() == r).squeeze(1) // tokens.shape[1] == row
            torch.testing.assert_close(both[r][own], alone[r][own], atol=1e-5, rtol=1e-5)


def test_one_group_is_a_mixture() -> None:
    plain = dataclasses.replace(TWIN, residual=False)
    one, two = over_time(1, 2, plain), Trunk((BLOCK, plain), Coupling.mixture(2), Rope(8))
    two.load_state_dict(one.state_dict())
    tokens = at_times(TOKENS, 0.2, 0.7)
    x = drawn(tokens, one)
    for a, b in zip(one(x, tokens, interleaved), two(x, tokens, interleaved), strict=True):
        torch.testing.assert_close(a, b)


def test_attention_maps_add_up() -> None:
    """In the second of two layers, by the gate of each head."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5, 8, generator=g) for heads in (4, 2, 2))
    gate, before = torch.randn(1, 5, 4, generator=g), torch.rand(1, 4, 5, 5, generator=g)
    out, used = attend_after(q, k, v, None, gate, before)
    for h in range(4):
        own = torch.softmax(q[0, h] @ k[0, h // 2].T / 8**0.5, -1) + gate[0, :, h, None] * before[0, h]
        torch.testing.assert_close(used[0, h], own)
        torch.testing.assert_close(out[0, :, 8 * h : 8 * h + 8], own @ v[0, h // 2])
    model, tokens = over_time(1, 2), at_times(TOKENS, 0.3)
    assert [isinstance(layer.residual[1], torch.nn.Identity) for layer in model.layers] == [True, False]  # type: ignore
    x = drawn(tokens, model)
    with_maps = model(x, tokens, interleaved)
    with torch.no_grad():
        for p in model.layers[1].residual.parameters():  # type: ignore[union-attr]
            p.zero_()
    without = model(x, tokens, interleaved)
    assert torch.equal(with_maps[0], without[0]) and not torch.allclose(with_maps[1], without[1], atol=1e-3)


def test_times_reach_modulated_tokens_only() -> None:
    model = wide(Coupling.bridge(2, 0, 2), dataclasses.replace(NARROW, modulated=True))
    x = drawn(TOKENS, model)
    early, late = (dataclasses.replace(TOKENS, time=torch.full(TOKENS.shape, t)) for t in (0.2, 0.9))
    one, two = model(x, early, interleaved), model(x, late, interleaved)
    torch.testing.assert_close(one[0], two[0])  # apart from the other expert
    assert not torch.allclose(one[1], two[1], atol=1e-3)
    with pytest.raises(ValueError, match="a time for every token of a modulated block"):
        model(x, TOKENS, interleaved)
    fresh = Trunk(dataclasses.replace(NARROW, modulated=True), Coupling.dense(1, 2), Rope(10))
    passed = fresh([torch.ones(10, 20), torch.ones(7, 20)], early, interleaved)[0]
    torch.testing.assert_close(passed, torch.ones(10, 20))  # gates start at zero, and the norm keeps ones


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="first . last of at most 3"):
        Coupling.bridge(3, 2, 2)
    with pytest.raises(ValueError, match="there for some route"):
        LayerCoupling(attention=(SKIP, 0), mlp=(0, 0))
    with pytest.raises(ValueError, match=r"every route to have a layer, got none for \[0\]"):
        Coupling((LayerCoupling(attention=(SKIP, 0), mlp=(SKIP, 0)),))
    with pytest.raises(ValueError, match="keep its width"):
        Trunk((BLOCK, NARROW), Coupling((*Coupling.dense(1, 2).layers, *Coupling.mixture(1).layers)), Rope(8))
    model = wide(Coupling.bridge(1, 0, 0))
    with pytest.raises(ValueError, match=r"tokens of one route .* got routes \[0, 1\]"):
        pick(drawn(TOKENS, model), TOKENS, torch.tensor([2, 3]))
    assert torch.equal(pick(drawn(TOKENS, model), TOKENS, torch.tensor([4, 3])), drawn(TOKENS, model)[1][[1, 0]])
