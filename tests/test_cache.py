import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.parts.blocks import BlockConfig
from diptych.parts.cache import Context
from diptych.parts.experts import Coupling
from diptych.parts.masks import interleaved
from diptych.parts.positions import Rope
from diptych.parts.tokens import Modality, Mode, Strip, assemble
from diptych.parts.trunks import Trunk

WIDTH = 16
torch.manual_seed(0)
MODEL = Trunk(BlockConfig(width=WIDTH, heads=2, kv_heads=1, head_dim=8, hidden=24), Coupling.mixture(2), Rope(8)).eval()
SEQUENCE = torch.randn(200, WIDTH)  # what token i of any test looks like


class Reader:
    """Feeds a context span by span, and knows what a run without a cache would have been given."""

    def __init__(self) -> None:
        self.context, self.spans = Context(), []

    def fork(self) -> "Reader":
        new = Reader()
        new.context, new.spans = self.context.fork(), list(self.spans)
        return new

    @property
    def length(self) -> int:
        return sum(count for count, _ in self.spans)

    def strip(self, spans: list[tuple[int, Mode]]) -> Strip:
        out, place = Strip(), self.length
        for n, (count, mode) in enumerate(spans, len(self.spans)):
            route = int(mode != Mode.CAUSAL)
            out.add(count, segment=n, modality=Modality(2 * route), mode=mode, route=route,
                    position=[place + i for i in range(count)])
            place += count
        return out

    def whole(self) -> Tensor:
        """(length, width): the same sequence in one run without a cache."""
        whole = Reader()
        return forward([whole.strip(self.spans)], [0], None)[0]


@torch.no_grad()
def forward(strips: list[Strip], starts: list[int], contexts: list[Context] | None, keep: bool = True) -> list[Tensor]:
    """Outputs (tokens, width) per row."""
    tokens = assemble([[s] for s in strips], start=starts)
    cells = torch.zeros(*tokens.shape, WIDTH)
    for b, s in enumerate(strips):
        cells[b, : s.length] = SEQUENCE[starts[b] : starts[b] + s.length]
    run = None if contexts is None else MODEL.start(contexts, tokens, torch.float32)
    parts = MODEL([cells.flatten(0, 1)[i] for i in tokens.routes(2)], tokens, interleaved, run)
    if run is not None and keep:
        run.commit([s.length for s in strips])
    out = torch.zeros(tokens.shape[0] * tokens.shape[1], WIDTH)
    for index, part in zip(tokens.routes(2), parts, strict=True):
        out[index] = part
    return [row[: s.length] for row, s in zip(out.unflatten(0, tokens.shape), strips, strict=True)]


def read(readers: list[Reader], spans: list[list[tuple[int, Mode]]], keep: bool = True) -> list[Tensor]:
    strips = [r.strip(s) for r, s in zip(readers, spans, strict=True)]
    out = forward(strips, [r.length for r in readers], [r.context for r in readers], keep)
    if keep:
        for r, s in zip(readers, spans, strict=True):
            r.spans += s
    return out


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


SPAN = st.tuples(st.integers(1, 5), st.sampled_from([Mode.CAUSAL, Mode.FULL]))


@settings(max_examples=25)
@given(st.lists(st.lists(st.lists(SPAN, min_size=1, max_size=2), min_size=3, max_size=3), min_size=1, max_size=4))
def test_reading_in_turns_equals_reading_at_once(turns: list[list[list[tuple[int, Mode]]]]) -> None:
    """Rows of different lengths, padded in every turn."""
    readers = [Reader() for _ in range(3)]
    seen: list[list[Tensor]] = [[], [], []]
    for turn in turns:
        for b, out in enumerate(read(readers, turn)):
            seen[b].append(out)
    for reader, parts in zip(readers, seen, strict=True):
        assert reader.context.length == reader.length
        close(torch.cat(parts), reader.whole())


def test_a_text_decoded_token_by_token() -> None:
    reader = Reader()
    out = [read([reader], [[(1, Mode.CAUSAL)]])[0] for _ in range(70)]  # past the first capacity of 64
    reader.spans = [(70, Mode.CAUSAL)]
    close(torch.cat(out), reader.whole())
    assert reader.context.store is not None and reader.context.store.capacity == 128


def test_companions_share_one_store_without_copies() -> None:
    readers = [Reader(), Reader()]
    read(readers, [[(3, Mode.CAUSAL)], [(5, Mode.CAUSAL)]])
    store = readers[0].context.store
    assert store is not None and store is readers[1].context.store
    keys = store.keys[0].data_ptr()
    read(readers, [[(1, Mode.CAUSAL)]] * 2)
    assert readers[0].context.store is store and store.keys[0].data_ptr() == keys


def test_contexts_change_company() -> None:
    a, b, c = Reader(), Reader(), Reader()
    read([a, b], [[(4, Mode.CAUSAL)], [(2, Mode.FULL)]])
    read([c, b], [[(3, Mode.CAUSAL)], [(2, Mode.CAUSAL)]])  # b leaves a
    read([b], [[(1, Mode.CAUSAL)]])
    last = read([a, c, b], [[(2, Mode.FULL)], [(3, Mode.CAUSAL)], [(2, Mode.CAUSAL)]])
    for reader, out in zip((a, c, b), last, strict=True):
        close(out, reader.whole()[-len(out) :])


def test_forks_are_equal_and_separate() -> None:
    one = Reader()
    read([one], [[(4, Mode.CAUSAL)]])
    two = one.fork()
    assert two.context.length == 4
    read([one], [[(5, Mode.FULL)]])
    assert two.context.length == 4 and one.context.length == 9
    both = read([one, two], [[(2, Mode.CAUSAL)], [(3, Mode.CAUSAL)]])
    close(both[0], one.whole()[-2:])
    close(both[1], two.whole()[-3:])
    assert Context().fork().store is None


def test_a_run_that_is_not_kept_leaves_no_trace() -> None:
    reader, other = Reader(), Reader()
    read([reader, other], [[(4, Mode.CAUSAL)], [(2, Mode.CAUSAL)]])
    look = [[(6, Mode.NOISE)], [(3, Mode.NOISE)]]
    first = read([reader, other], look, keep=False)
    assert reader.context.length == 4
    again = read([reader, other], look, keep=False)
    close(first[0], again[0])
    # the leftovers lie behind the length: a shorter text that follows must not see them
    out = read([reader, other], [[(1, Mode.CAUSAL)], [(1, Mode.CAUSAL)]])
    close(out[0], reader.whole()[-1:])
    close(out[1], other.whole()[-1:])


def test_one_context_cannot_stand_in_two_rows() -> None:
    reader = Reader()
    read([reader], [[(2, Mode.CAUSAL)]])
    strips = [reader.strip([(1, Mode.CAUSAL)])] * 2
    with pytest.raises(ValueError, match="different contexts in one run, got one twice; fix: fork it"):
        forward(strips, [2, 2], [reader.context] * 2)
    forward(strips, [2, 2], [reader.context, reader.context.fork()])
