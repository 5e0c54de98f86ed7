import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.parts import attention, blocks
from diptych.parts.blocks import BlockConfig, RMSNorm, SwiGLU, additive, attend
from diptych.parts.experts import Coupling
from diptych.parts.masks import interleaved, packed_causal, valid
from diptych.parts.positions import Rope, TimeEmbedding, rotate, sincos_2d
from diptych.parts.tokens import Modality, Mode, Strip, Tokens, assemble
from diptych.parts.trunks import Trunk

BLOCK = BlockConfig(width=24, heads=4, kv_heads=2, head_dim=8, hidden=32, qk_norm=True)


def strip(*spans: tuple[int, int], noise: bool = False) -> Strip:
    """Spans of (tokens, route)."""
    out = Strip()
    for count, route in spans:
        segment = out.segment()
        mode = Mode.CAUSAL if route == 0 else Mode.NOISE if noise else Mode.FULL
        out.add(count, segment=segment, modality=Modality.LATENT if route else Modality.TEXT, mode=mode, route=route,
                position=[out.length + i for i in range(count)])
    return out


def trunk(coupling: Coupling, **changes: object) -> Trunk:
    torch.manual_seed(0)
    model = Trunk(BLOCK, coupling, Rope(8, **changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def states(tokens: Tokens, routes: int = 2, seed: int = 0) -> list[Tensor]:
    """By route, and equal for a token whatever its route: drawn on the grid first."""
    grid = torch.randn(*tokens.shape, 24, generator=torch.Generator().manual_seed(seed)).flatten(0, 1)
    return [grid[index] for index in tokens.routes(routes)]


def grid(tokens: Tokens, parts: list[Tensor]) -> Tensor:
    out = torch.zeros(tokens.shape[0] * tokens.shape[1], 24)
    for index, part in zip(tokens.routes(len(parts)), parts, strict=True):
        out[index] = part
    return out.unflatten(0, tokens.shape)


KINDS = ("attention", "attention_norm", "mlp", "mlp_norm")
TOKENS = assemble([[strip((3, 0), (4, 1), (2, 0))], [strip((5, 0), (3, 1))]])


# -- rows -------------------------------------------------------------------------------------------------------------

def test_packed_documents_equal_separate_ones() -> None:
    one, two = strip((3, 0), (4, 1)), strip((4, 0), (2, 1), (1, 0))
    packed, model = assemble([[one, two]]), trunk(Coupling.mixture(2))
    x = states(packed)
    together = grid(packed, model(x, packed, interleaved))[0]
    cells = torch.zeros(packed.shape[1], 24)
    for index, part in zip(packed.routes(2), x, strict=True):
        cells[index] = part
    for part, here in ((one, slice(0, 7)), (two, slice(7, 14))):
        alone = assemble([[part]], length=16)  # padding must not matter either
        own = torch.zeros(16, 24)
        own[: part.length] = cells[here]
        result = model([own[i] for i in alone.routes(2)], alone, interleaved)
        torch.testing.assert_close(grid(alone, result)[0, : part.length], together[here], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("coupling", [Coupling.mixture(2), Coupling.dense(2, 2)])
def test_rows_of_two_lengths_are_multiplied_apart(coupling: Coupling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows do not pay for the longest one, and nothing else changes."""
    tokens = assemble([[strip((3, 0), (2, 1))], [strip((20, 0), (4, 1))], [strip((4, 0))], [strip((1, 0), (5, 1))]])
    model, x = trunk(coupling), states(tokens)
    sizes: list[tuple[int, int]] = []
    product = attention.attend

    def watched(q: Tensor, *rest: Tensor) -> Tensor:
        sizes.append((q.shape[0], q.shape[2]))
        return product(q, *rest)

    monkeypatch.setattr(attention, "attend", watched)
    found: list[list[Tensor]] = []
    for worth in (0.8, 0.0):
        monkeypatch.setattr(attention, "WORTH", worth)
        model.zero_grad()
        out = model(x, tokens, interleaved)
        sum(part.square().sum() for part in out).backward()  # type: ignore[union-attr]
        found.append([*out, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert sizes == [(3, 6), (1, 24)] * 2 + [(4, 24)] * 2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_nothing_is_computed_for_padding() -> None:
    padded = assemble([[strip((3, 0), (4, 1), (2, 0))], [strip((5, 0), (3, 1))]], length=30)
    model = trunk(Coupling.mixture(2))
    x = states(TOKENS)
    for a, b in zip(model(x, TOKENS, interleaved), model(x, padded, interleaved), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_route_may_be_absent() -> None:
    tokens = assemble([[strip((4, 0))]])
    out = trunk(Coupling.mixture(2))(states(tokens), tokens, interleaved)
    assert out[0].shape == (4, 24) and out[1].shape == (0, 24)


def test_the_mask_decides_what_is_seen() -> None:
    tokens = assemble([[strip((3, 0), (3, 1), (3, 0), noise=True)]])
    model, x = trunk(Coupling.mixture(2)), states(tokens)
    changed = [x[0], x[1] + 1]  # noised latents
    torch.testing.assert_close(model(x, tokens, interleaved)[0], model(changed, tokens, interleaved)[0])
    assert not torch.allclose(model(x, tokens, valid)[0], model(changed, tokens, valid)[0], atol=1e-3)


# -- blocks -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_the_loop_over_heads(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, generator=g)
    k, v = (torch.randn(2, kv_heads, 7, 8, generator=g) for _ in range(2))
    mask = torch.rand(2, 5, 7, generator=g) < 0.6
    mask[..., 0] = True
    expected = torch.zeros(2, 5, 4, 8)
    for b in range(2):
        for h in range(4):
            kv = h // (4 // kv_heads)
            for i in range(5):
                seen = mask[b, i]
                weights = torch.softmax(k[b, kv][seen] @ q[b, h, i] / 8**0.5, 0)
                expected[b, i, h] = weights @ v[b, kv][seen]
    fast = attend(q, k, v, additive(mask, torch.float32))
    torch.testing.assert_close(fast, expected.flatten(2), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(blocks, "SHORT", 0)  # the fused kernel
    monkeypatch.setattr(blocks, "FEW", 0)
    torch.testing.assert_close(attend(q, k, v, additive(mask, torch.float32)), fast, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attend(q, k, v, None), attend(q, k, v, additive(torch.ones_like(mask), torch.float32)))


def test_norm_statistics_are_float32() -> None:
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)) * 300
    norm = RMSNorm(24)
    norm.weight.data.uniform_(0.5, 1.5)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), exact, atol=1e-5, rtol=1e-5)
    half = norm(x.half())  # the square of 300 overflows float16
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), exact, atol=2e-2, rtol=2e-3)


def test_swiglu_is_its_formula() -> None:
    mlp, x = SwiGLU(6, 10), torch.randn(3, 6)
    gate, up = mlp.gate_up.weight.split(10)
    expected = (x @ gate.T * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T
    torch.testing.assert_close(mlp(x), expected, atol=1e-6, rtol=1e-5)


def test_bfloat16_autocast_stays_close() -> None:
    model, x = trunk(Coupling.mixture(2)), states(TOKENS)
    exact = model(x, TOKENS, interleaved)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, TOKENS, interleaved)
    for a, b in zip(exact, rough, strict=True):
        assert (a - b.float()).norm() / a.norm() < 0.05


def test_heads_must_be_shared_evenly() -> None:
    with pytest.raises(ValueError, match="multiple of kv_heads, got 4 and 3"):
        BlockConfig(width=24, heads=4, kv_heads=3, head_dim=8, hidden=32)


# -- positions --------------------------------------------------------------------------------------------------------

def test_rotation_is_a_complex_product() -> None:
    tokens = assemble([[strip((6, 0))]])
    cos, sin = Rope(8, theta=100.0)(tokens)
    x = torch.randn(1, 6, 3, 8)
    turned = rotate(x, cos, sin)
    for position in range(6):
        for pair in range(4):
            angle = torch.tensor(position * 100.0 ** (-2 * pair / 8))
            turn = torch.polar(torch.tensor(1.0), angle)
            z = torch.complex(x[0, position, :, pair], x[0, position, :, pair + 4]) * turn
            torch.testing.assert_close(turned[0, position, :, pair], z.real)
            torch.testing.assert_close(turned[0, position, :, pair + 4], z.imag)


@pytest.mark.parametrize("sections", [None, (2, 1, 1)])
def test_only_differences_of_positions_matter(sections: tuple[int, ...] | None) -> None:
    tokens = assemble([[strip((4, 0), (3, 1))]])
    model, x = trunk(Coupling.mixture(2), sections=sections), states(tokens)
    here = model(x, tokens, interleaved)
    tokens.position.add_(17)
    for a, b in zip(here, model(x, tokens, interleaved), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    tokens.position[0, 5:] += 2
    assert not torch.allclose(model(x, tokens, interleaved)[1], here[1], atol=1e-3)


def test_sections_turn_their_own_pairs() -> None:
    tokens = assemble([[strip((2, 0))]])
    tokens.position[0, 1] = torch.tensor([3.0, 5.0, 7.0])
    cos, sin = Rope(8, theta=16.0, sections=(1, 2, 1))(tokens)
    inverse = [16.0 ** (-2 * i / 8) for i in range(4)]
    angle = torch.tensor([3 * inverse[0], 5 * inverse[1], 5 * inverse[2], 7 * inverse[3]])
    torch.testing.assert_close(cos[0, 1], angle.cos())
    torch.testing.assert_close(sin[0, 1], angle.sin())
    with pytest.raises(ValueError, match=r"sum to head_dim / 2 = 4, got \(1, 2\)"):
        Rope(8, sections=(1, 2))


def test_causal_rows_see_the_past_only() -> None:
    tokens = assemble([[strip((6, 0))]])
    model, x = trunk(Coupling.dense(2)), states(tokens, routes=1)
    later = [torch.cat((x[0][:4], x[0][4:] + 1))]
    one, two = (model(s, tokens, packed_causal)[0] for s in (x, later))
    torch.testing.assert_close(one[:4], two[:4])
    assert not torch.allclose(one[4:], two[4:], atol=1e-3)


def test_time_embedding_is_its_formula() -> None:
    embed = TimeEmbedding(6, frequencies=8, max_period=100.0)
    t = torch.tensor([0.0, 0.3, 1.0])
    angle = torch.tensor([[float(s) * 100.0 ** (-i / 4) for i in range(4)] for s in t])
    waves = torch.cat((angle.cos(), angle.sin()), 1)
    torch.testing.assert_close(embed(t), embed.mlp(waves))


def test_sine_table_is_a_double_loop() -> None:
    table = sincos_2d(8, 3)
    for row in range(3):
        for column in range(3):
            expected = [f(torch.tensor(axis * 10_000.0 ** (-i / 2))) for axis in (column, row)
                        for f in (torch.sin, torch.cos) for i in range(2)]
            torch.testing.assert_close(table[row * 3 + column], torch.stack(expected).float())


@pytest.mark.parametrize(("queries", "keys", "kv_heads"),
                         [(1, 700, 2), (3, 40, 2), (8, 700, 6), (9, 700, 2), (5, 600, 1)])
def test_attention_is_the_same_however_it_is_computed(queries: int, keys: int, kv_heads: int) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, queries, 16, generator=g)
    k, v = (torch.randn(2, kv_heads, keys, 16, generator=g) for _ in range(2))
    mask = torch.rand(2, queries, keys, generator=g) < 0.7
    mask[..., 0] = True
    for bias in (None, additive(mask, torch.float32), additive(mask[:, :1], torch.float32)):
        wanted = F.scaled_dot_product_attention(q, k.repeat_interleave(6 // kv_heads, 1),
                                                v.repeat_interleave(6 // kv_heads, 1),
                                                attn_mask=None if bias is None else bias[:, None])
        torch.testing.assert_close(attend(q, k, v, bias), wanted.transpose(1, 2).flatten(2), atol=1e-5, rtol=0)
