import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from diptych.parts.blocks import BlockConfig, additive, attend
from diptych.parts.experts import Coupling
from diptych.parts.masks import (
    Predicate,
    bidirectional,
    causal,
    hide_noise,
    interleaved,
    key_is,
    packed_causal,
    picture,
    query_is,
    same,
    valid,
)
from diptych.parts.positions import Rope
from diptych.parts.tokens import Modality, Mode, Strip, Tokens, assemble
from diptych.parts.trunks import Trunk
from diptych.systems.bagel import Bagel
from diptych.systems.interleaved import Batch
from diptych.world.tasks import document

Cell = dict[str, int]  # the vectors of one token

RULES: dict[str, tuple[Predicate, Callable[[Cell, Cell], bool]]] = {
    "causal": (causal, lambda q, k: k["index"] <= q["index"]),
    "valid": (valid, lambda q, k: q["document"] >= 0 and k["document"] >= 0),
    "same": (same("route"), lambda q, k: q["route"] == k["route"]),
    "key_is": (key_is("modality", 0, 2), lambda q, k: k["modality"] in (0, 2)),
    "query_is": (query_is("role", 1), lambda q, k: q["role"] == 1),
    "bidirectional": (bidirectional, lambda q, k: k["mode"] in (1, 2)),
    "hide_noise": (hide_noise, lambda q, k: k["mode"] != 2 or q["segment"] == k["segment"]),
    "and": (causal & same("role"), lambda q, k: k["index"] <= q["index"] and q["role"] == k["role"]),
    "or": (causal | same("role"), lambda q, k: k["index"] <= q["index"] or q["role"] == k["role"]),
    "not": (~causal, lambda q, k: k["index"] > q["index"]),
    "packed_causal": (packed_causal, lambda q, k: min(q["document"], k["document"]) >= 0
                      and q["document"] == k["document"] and k["index"] <= q["index"]),
    # BAGEL: [k <= q or (same split and mode in {full, noise})] and not (k in a noise split and q in another)
    "interleaved": (interleaved, lambda q, k: q["document"] == k["document"] >= 0
                    and (k["index"] <= q["index"] or (q["segment"] == k["segment"] and k["mode"] in (1, 2)))
                    and not (k["mode"] == 2 and q["segment"] != k["segment"])),
}


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> Tokens:
    """Random vectors: no layout that a predicate could rely on."""
    g = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (rows, length), generator=g)

    segment = ints(0, 4)
    return Tokens(index=ints(0, length), document=ints(-1, 2), segment=segment, modality=ints(0, 3), role=ints(0, 2),
                  mode=segment % 3, route=ints(0, 2), target=ints(0, 2).bool(),
                  time=torch.rand(rows, length, generator=g), position=torch.rand(rows, length, 3, generator=g))


def cell(t: Tokens, b: int, i: int) -> Cell:
    return {n: int(getattr(t, n)[b, i]) for n in ("index", "document", "segment", "modality", "mode", "route", "role")}


@pytest.mark.parametrize("name", RULES)
def test_dense_is_the_double_loop(name: str) -> None:
    predicate, rule = RULES[name]
    query, key = tokens(length=7, seed=1), tokens(length=9, seed=2)
    dense = predicate.dense(query, key)
    assert dense.shape == (2, 7, 9) and dense.dtype == torch.bool
    for b in range(2):
        for q in range(7):
            expected = [rule(cell(query, b, q), cell(key, b, k)) for k in range(9)]
            expected[0] |= not any(expected)  # a softmax over nothing would be NaN
            assert dense[b, q].tolist() == expected


@pytest.mark.parametrize("name", RULES)
def test_flex_is_the_same_function(name: str) -> None:
    predicate, rule = RULES[name]
    query, key = tokens(length=7, seed=1), tokens(length=9, seed=2)
    allow = predicate.flex(query, key)
    zero = torch.tensor(0)
    for b in range(2):
        for q in range(7):
            for k in range(9):
                allowed = allow(torch.tensor(b), zero, torch.tensor(q), torch.tensor(k))
                assert allowed.dtype == torch.bool and bool(allowed) == rule(cell(query, b, q), cell(key, b, k))


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_flex_attention_equals_the_dense_reference() -> None:
    """Through its tracer, which has its own idea of Python: an IntEnum in a predicate once gave another mask."""
    t = story().page.tokens
    rows, length = t.shape
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, heads, length, 16, generator=g) for heads in (4, 2, 2))
    block_mask = create_block_mask(interleaved.flex(t), rows, None, length, length, device="cpu")
    flex = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    assert isinstance(flex, torch.Tensor)
    dense = attend(q, k, v, additive(interleaved.dense(t), q.dtype))
    real = t.valid()
    torch.testing.assert_close(flex.transpose(1, 2).flatten(2)[real], dense[real], atol=1e-5, rtol=1e-5)


def test_scores_are_raised_where_pairs_are_allowed() -> None:
    """Softmax by hand; what is hidden stays hidden, and a query without a raised key is as it was."""
    t = tokens(length=6, seed=3)
    mask = (valid & same("role")).favour(key_is("modality", 0) & query_is("route", 1), 1.5)
    raised = mask.bias(t)
    assert raised is not None and (valid & same("role")).bias(t) is None
    wanted = 1.5 * ((t.modality == 0)[:, None] & (t.route == 1)[:, :, None])
    assert torch.equal(raised, wanted.float()) and 0 < int((raised > 0).sum()) < raised.numel()
    assert torch.equal(mask.dense(t), (valid & same("role")).dense(t))
    joined = (mask & causal).bias(t)
    assert joined is not None and torch.equal(joined, raised)
    with pytest.raises(ValueError, match=r"without raised scores for \|, got favour.*fix"):
        _ = mask | causal
    with pytest.raises(ValueError, match="for flex_attention"):
        mask.flex(t)


def test_a_trunk_reads_raised_scores() -> None:
    """Raised by the logarithm of n, a key counts as n of its kind."""
    block = BlockConfig(width=8, heads=2, kv_heads=2, head_dim=4, hidden=8, qkv_bias=False)
    torch.manual_seed(0)
    trunk = Trunk(block, Coupling.dense(1), Rope(4))

    def read(counts: list[int], mask: Predicate) -> torch.Tensor:
        strip = Strip()
        for n, count in enumerate(counts):  # one position for all: only contents differ
            strip.add(count, segment=n, modality=Modality.TEXT, mode=Mode.FULL, route=0, position=0, role=n)
        x = torch.randn((3, 8), generator=torch.Generator().manual_seed(1)).repeat_interleave(torch.tensor(counts), 0)
        return trunk([x], assemble([[strip]]), mask)[0]

    single = read([1, 1, 1], valid.favour(key_is("role", 1), math.log(3)))
    torch.testing.assert_close(single[0], read([1, 3, 1], valid)[0], atol=1e-5, rtol=0)
    assert not torch.allclose(single[0], read([1, 1, 1], valid)[0], atol=1e-3)


def test_names_say_what_a_predicate_is() -> None:
    assert repr(causal & ~same("document")) == "(causal & ~same(document))"
    assert repr(key_is("mode", 1, 2) | valid) == "(key_is(mode, 1, 2) | valid)"


# -- BAGEL's mask on a story: text, picture, then three times text and picture -----------------------------------------

def story() -> Batch:
    return Bagel(Bagel.tiny()).collate([document("story", 0), document("draw", 0)])


def test_bagel_mask_on_a_story() -> None:
    batch = story()
    t = batch.page.tokens
    mask = interleaved.dense(t)
    b = int((t.mode == Mode.NOISE).sum(1).argmax())  # the row of the story
    segments = [(int(s), torch.nonzero((t.segment[b] == s) & (t.document[b] == 0)).flatten())
                for s in t.segment[b][t.document[b] == 0].unique()]
    modes = {s: Mode(int(t.mode[b, at[0]])) for s, at in segments}
    kinds = [m for _, m in sorted(modes.items())]
    # premise, then per picture: noised, and (except for the last) clean latents and features, and a text
    assert kinds == [Mode.CAUSAL, *[Mode.NOISE, Mode.FULL, Mode.FULL, Mode.CAUSAL] * 3, Mode.NOISE]
    for s, rows in segments:
        for other, columns in segments:
            block = mask[b][rows][:, columns]
            if s == other:
                assert block.all() if modes[s] != Mode.CAUSAL else torch.equal(block, block.tril().bool())
            elif other > s or modes[other] == Mode.NOISE:
                assert not block.any()  # nothing sees the future, nor another's noise
            else:
                assert block.all()


def test_picture_of_a_mask() -> None:
    t = Bagel(Bagel.tiny()).collate([document("edit", 0)]).page.tokens
    count = int(t.valid()[0].sum())
    image = picture(interleaved, t, row=0, cell=6)
    assert image.size == (count * 6 + 1, count * 6 + 1) and image.mode == "RGB"
    mask = interleaved.dense(t)[0]
    blue, green, orange = (52, 101, 164), (78, 154, 6), (206, 92, 0)
    shades = {0: blue, 1: green, 2: orange}
    for q in range(count):
        for k in range(count):
            colour = shades[int(t.modality[0, k])]
            if t.mode[0, k] == Mode.NOISE:
                colour = tuple((c + 255) // 2 for c in colour)
            expected = colour if mask[q, k] else (246, 246, 244)
            assert image.getpixel((k * 6 + 2, q * 6 + 2)) == expected
