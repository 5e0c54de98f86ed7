"""Compiled decoding says what the general way says: step by step, in every form of block, alone or in company."""
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diptych.benchmarks.evaluate import counted
from diptych.document import Document, Image, Text
from diptych.objectives.next_token import TextSampling
from diptych.parts import native
from diptych.parts.blocks import BlockConfig
from diptych.parts.cache import Context
from diptych.parts.decode import Chain, Decoder, quantized
from diptych.parts.experts import Coupling
from diptych.parts.masks import packed_causal
from diptych.parts.positions import Rope
from diptych.parts.tokens import Modality, Mode, Strip, Tokens, assemble
from diptych.parts.trunks import Trunk
from diptych.systems.base import Sampling, System
from diptych.systems.decoding import Decoding
from diptych.systems.table import find
from diptych.world import tasks

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")

FORMS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2, keys shared": {"qkv_bias": True, "kv_heads": 1},
    "Qwen3": {"qk_norm": True, "qk_eps": 1e-5},
    "Phi": {"norm": "layer", "mlp": "gelu", "parallel": True, "bias": True, "qkv_bias": True, "qk_norm": True},
    "GPT": {"norm": "layer", "mlp": "gelu", "bias": True},
    "odd sizes": {"head_dim": 20, "hidden": 77},
}
WIDTH = 48


def trunk(form: dict[str, Any], dtype: torch.dtype = torch.float32) -> Trunk:
    torch.manual_seed(0)
    block = BlockConfig(**{"width": WIDTH, "heads": 2, "kv_heads": 2, "head_dim": 32, "hidden": 96, "qkv_bias": False,
                           **form})
    made = Trunk(block, Coupling.dense(3, 2), Rope(block.head_dim))
    for p in made.parameters():  # also norms and biases
        nn.init.normal_(p, 0.3 if p.ndim == 1 else 0.0, 0.2)
    return made.to(dtype).eval()


def tokens(counts: Sequence[int], starts: Sequence[int]) -> Tokens:
    rows = []
    for count, start in zip(counts, starts, strict=True):
        strip = Strip()
        strip.add(count, segment=0, modality=Modality.TEXT, mode=Mode.CAUSAL, route=0,
                  position=start + np.arange(count))
        rows.append([strip])
    return assemble(rows, start=starts)


@torch.no_grad()
def usual(trunk: Trunk, states: list[Tensor], contexts: list[Context]) -> Tensor:
    """The last states of rows that read `states` (n, width) each."""
    counts = [len(s) for s in states]
    page = tokens(counts, [c.length for c in contexts])
    dtype = states[0].dtype
    run = trunk.start(contexts, page, dtype)
    out = trunk([torch.cat(states), torch.zeros(0, WIDTH, dtype=dtype)], page, packed_causal, run)[0]
    run.commit(counts)
    return torch.stack([part[-1] for part in out.split(counts)])


@torch.no_grad()
def stepped(decoder: Decoder, states: Tensor, contexts: list[Context]) -> Tensor:
    for c in contexts:
        c.reserve(1)
    cos, sin = decoder.rope(tokens([1] * len(contexts), [c.length for c in contexts]))
    out = decoder.step(states, (cos[:, 0], sin[:, 0]), contexts)
    for c in contexts:
        c.length += 1
    return out


def started(trunk: Trunk, lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Context]:
    contexts = [Context() for _ in lengths]
    generator = torch.Generator().manual_seed(1)
    usual(trunk, [torch.randn(n, WIDTH, generator=generator).to(dtype) for n in lengths], contexts)
    return contexts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_steps_are_those_of_the_trunk(form: dict[str, Any], dtype: torch.dtype) -> None:
    model = trunk(form, dtype)
    decoder = Decoder.of(model, 0)
    assert decoder
    contexts = started(model, [5, 70, 9], dtype)
    others = [c.fork() for c in contexts]
    bound = {torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype]
    for k in range(4):
        states = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(k)).to(dtype)
        expected = usual(model, list(states[:, None]), contexts).float()
        assert (stepped(decoder, states, others) - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_row_does_not_depend_on_its_company(form: dict[str, Any], int8: bool) -> None:
    model = trunk(form)
    decoder = Decoder.of(model, 0, int8)
    head = Chain.of(nn.Sequential(nn.Linear(WIDTH, 31), nn.GELU(), nn.Linear(31, 11)), int8)
    assert decoder and head
    lengths = [3, 40, 7, 7, 12, 1, 5, 33, 2]
    states = torch.randn(len(lengths), WIDTH, generator=torch.Generator().manual_seed(2))
    together = stepped(decoder, states, started(model, lengths))
    for n, context in enumerate(started(model, lengths)):
        alone = stepped(decoder, states[n:n + 1], [context])
        torch.testing.assert_close(alone[0], together[n], rtol=0, atol=0)
        torch.testing.assert_close(head(alone)[0], head(together)[n], rtol=0, atol=0)


def test_int8_keeps_eight_bits_of_weights_and_more_of_inputs() -> None:
    w = torch.randn(37, 130, generator=torch.Generator().manual_seed(3)) * torch.rand(37, 1).exp()
    x = torch.randn(5, 130, generator=torch.Generator().manual_seed(4))
    q, scale = quantized(w)
    assert q.dtype == torch.int8 and q.abs().max() == 127
    assert ((q * scale[:, None] - w).abs() <= scale[:, None] / 2 * 1.001).all()
    made, exact = Chain.of(w, int8=True), Chain.of(w)
    assert made and exact
    torch.testing.assert_close(exact(x), x @ w.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made(x), x @ (q * scale[:, None]).T, rtol=1e-3, atol=2e-3)


def test_what_it_cannot_do_is_left_to_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Decoder.of(trunk({}).double(), 0) is None
    assert Decoder.of(trunk({"norm_behind": True}), 0) is None
    assert Chain.of(nn.Sequential(nn.Linear(4, 4), nn.Tanh())) is None
    wrapped = trunk({})
    wrapped.layers[0].attention[0].qkv = nn.Sequential(wrapped.layers[0].attention[0].qkv)  # type: ignore
    assert Decoder.of(wrapped, 0) is None
    monkeypatch.setattr(native, "library", lambda: None)
    assert Decoder.of(trunk({}), 0) is None and Chain.of(nn.Linear(4, 4)) is None


def test_no_room_is_an_error() -> None:
    model = trunk({})
    decoder, contexts = Decoder.of(model, 0), started(model, [64])
    assert decoder and contexts[0].capacity == 64
    cos, sin = decoder.rope(tokens([1], [64]))
    with pytest.raises(ValueError, match="room for one more token"):
        decoder.step(torch.zeros(1, WIDTH), (cos[:, 0], sin[:, 0]), contexts)


def test_an_unfit_compiler_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                       caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bad = tmp_path / "cc"
    bad.write_text("#!/bin/sh\necho 'no such instruction' >&2; exit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("CXX", str(bad))
    assert native.library.__wrapped__() is None and "no such instruction" in caplog.text
    assert not list((tmp_path / "diptych").iterdir()), "nothing half built is left"
    monkeypatch.setenv("DIPTYCH_NATIVE", "0")
    assert native.library.__wrapped__() is None


# -- systems ----------------------------------------------------------------------------------------------------------

@cache
def system(name: str) -> System:
    torch.manual_seed(0)
    cls: Any = find(name)
    made = cls(cls.tiny()).eval()
    for p in made.parameters():
        if p.ndim > 1:
            p.data *= 3  # answers that depend on what was read
    return made


DECODED = ["janus", "emu3", "seed", "bagel"]  # codes in raster order, with fixed tokens between rows, and words alone


def documents() -> list[Document]:
    shown = Image(pixels=np.random.default_rng(0).uniform(-1, 1, (3, 64, 64)).astype(np.float32))
    ask = Document((shown, Text(text="what is this"), Text(target=True)))
    draw = tasks.document("draw", 3).prompt()
    tell = Document((*draw.pieces, Text(text="and now"), Text(target=True), Text(text="again"), Image(target=True)))
    return [ask, draw, tell]


@pytest.mark.parametrize("name", DECODED)
def test_documents_are_filled_as_the_usual_way_fills_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = system(name)
    sampling = Sampling(**{**vars(model.default_sampling()), "evaluations": 2,
                           "text": TextSampling(max_tokens=70)})  # more than is made room for at once
    steps = count_steps(monkeypatch)
    fast = model.generate(documents(), sampling, seeds=[1, 2, 3])
    assert steps
    monkeypatch.setattr(Decoding, "of", lambda system: None)
    slow = model.generate(documents(), sampling, seeds=[1, 2, 3])
    for a, b in zip(fast, slow, strict=True):
        for one, two in zip(a, b, strict=True):
            if isinstance(one, Image) and isinstance(two, Image) and one.pixels is not None:
                assert two.pixels is not None
                np.testing.assert_allclose(one.pixels, two.pixels, atol=1e-3)
            elif isinstance(one, Text):
                assert one == two


@pytest.mark.parametrize("name", DECODED)
def test_company_changes_nothing(name: str) -> None:
    model = system(name)
    sampling = Sampling(**{**vars(model.default_sampling()), "evaluations": 2, "text": TextSampling(max_tokens=9)})
    together = model.generate(documents(), sampling, seeds=[1, 2, 3])
    for n, document in enumerate(documents()):
        alone = model.generate([document], sampling, seeds=[n + 1])[0]
        assert [p for p in alone if isinstance(p, Text)] == [p for p in together[n] if isinstance(p, Text)]


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    run: Callable[..., list[Tensor]] = Decoding.run

    def counting(self: Decoding, works: Sequence[Any]) -> list[Tensor]:
        seen.append(len(works))
        return run(self, works)

    monkeypatch.setattr(Decoding, "run", counting)
    return seen


def test_new_weights_are_seen() -> None:
    cls: Any = find("janus")
    torch.manual_seed(0)
    model = cls(cls.tiny()).eval()
    ask = documents()[0]
    sampling = Sampling(text=TextSampling(max_tokens=6))
    first = model.generate([ask], sampling)
    before = Decoding.of(model)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * 0.2)
    assert Decoding.of(model) is not before  # type: ignore[arg-type]
    assert model.generate([ask], sampling) != first
    before = Decoding.of(model)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # which leaves no trace in the tensors
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert Decoding.of(model) is not before  # type: ignore[arg-type]


def test_operations_are_counted_and_watchers_see_every_layer() -> None:
    model = system("janus")
    ask, sampling = documents()[:1], Sampling(text=TextSampling(max_tokens=8))
    model.generate(ask, sampling)  # tables are made once, whatever is asked
    with counted(model) as fast:
        model.generate(ask, sampling)
    handle = model.embed.register_forward_hook(lambda *_: None)  # type: ignore[attr-defined]
    try:
        assert Decoding.of(model) is None  # type: ignore[arg-type]
        with counted(model) as slow:
            model.generate(ask, sampling)
    finally:
        handle.remove()
    assert fast[0] == pytest.approx(slow[0], rel=1e-6) and fast[0] > 0
