"""The order of a mixture is a pure function of (seed, position)."""
import itertools
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.data.mix import Mixture
from diptych.data.order import Schedule, hash64, permute
from diptych.data.sources import BrokenDocument, ListSource, Source
from diptych.document import Document, Text


def _source(name, count):
    return ListSource([Document([Text(text=f"{name}{i}")]) for i in range(count)], name)


class Endless(Source):
    def __init__(self, name="endless"):
        super().__init__(name, None)

    def document(self, index):
        return Document([Text(text=f"{self.name}{index}")])


def _texts(documents):
    return [d.pieces[0].text for d in documents]


def _mixture(seed=0):
    return Mixture([(_source("a", 10), 3), (_source("b", 4), 1), (Endless(), 2)], seed)


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 2**70))
def test_schedule_counts_what_came_before(weights, seed):
    schedule = Schedule(tuple(weights), seed)
    seen = Counter()
    for position in range(300):
        which, nth = schedule.at(position)
        assert nth == seen[which] and which == schedule.choice(position)
        seen[which] += 1


def test_schedule_keeps_the_weights_in_every_stretch():
    weights = (0.6, 0.25, 0.1, 0.05)
    schedule = Schedule(weights, 1)
    for start in (0, 12_345, 10**12):
        seen = Counter(schedule.choice(start + i) for i in range(200))
        assert all(abs(seen[i] - 200 * w) <= 4 for i, w in enumerate(weights))
        seen = Counter(schedule.choice(4 * (start + i)) for i in range(200))  # as one of four ranks sees it
        assert all(abs(seen[i] - 200 * w) <= 6 for i, w in enumerate(weights))


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_look_random():
    orders = Counter(tuple(permute(i, 4, hash64(s)) for i in range(4)) for s in range(4800))
    assert len(orders) == 24 and max(orders.values()) < 300 and min(orders.values()) > 120
    ranks = [permute(i, 1000, 7) for i in range(1000)]
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(ranks)) < 12


def test_order_never_changes_between_versions():
    assert hash64(1, 2, 3) == 0xD0734750FDE362B3
    assert [permute(i, 10, 42) for i in range(10)] == [9, 7, 3, 6, 0, 1, 8, 4, 2, 5]
    assert _texts(_mixture(3).documents_at(100, 4)) == ["a6", "endless159627692973490209", "b3", "a7"]


def test_every_epoch_shows_every_document_once_in_another_order():
    mixture = Mixture([(_source("a", 10), 1)], 4)
    epochs = [_texts(mixture.documents_at(10 * e, 10)) for e in range(3)]
    assert all(sorted(e) == [f"a{i}" for i in range(10)] for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3


def test_epochs_hold_inside_a_mixture():
    texts = [t for t in _texts(_mixture().documents_at(0, 600)) if t.startswith("b")]
    assert len(texts) == pytest.approx(100, abs=3)
    assert all(sorted(texts[i:i + 4]) == ["b0", "b1", "b2", "b3"] for i in range(0, 96, 4))


def test_random_access_equals_walking():
    walked, mixture = _texts(_mixture().take(60)), _mixture()
    assert _texts(mixture.documents_at(37, 23)) == walked[37:]
    parts = [mixture.take(n) for n in (7, 0, 13, 40)]
    assert _texts(itertools.chain(*parts)) == walked


def test_seeds_differ_and_endless_sources_never_repeat():
    a, b = (_texts(_mixture(s).documents_at(0, 300)) for s in (0, 1))
    assert a != b
    endless = [t for t in a + b if t.startswith("endless")]
    assert len(set(endless)) == len(endless)


@given(st.integers(1, 5), st.integers(0, 20), st.integers(0, 8))
def test_ranks_interleave_to_the_global_order(world_size, start, count):
    mixture = _mixture(9)
    ranks = [_texts(mixture.documents_at(start, count, rank=r, world_size=world_size)) for r in range(world_size)]
    whole = _texts(mixture.documents_at(start * world_size, count * world_size))
    assert [ranks[k % world_size][k // world_size] for k in range(len(whole))] == whole


def test_state_resumes_exactly_and_refuses_other_data():
    mixture = _mixture()
    mixture.take(17)
    state = json.loads(json.dumps(mixture.state_dict()))
    rest = _texts(mixture.take(30))
    again = _mixture()
    again.load_state_dict(state)
    assert _texts(again.take(30)) == rest
    with pytest.raises(ValueError, match="data state with seed 1, got 0; fix"):
        _mixture(1).load_state_dict(state)
    with pytest.raises(ValueError, match="sources"):
        Mixture([(_source("a", 11), 3)]).load_state_dict(state)


class Half(ListSource):
    def document(self, index):
        if index % 2 or self.name == "ruin":
            raise BrokenDocument(f"{self.name}/{index}.png", "truncated")
        return super().document(index)


def test_broken_documents_are_replaced_by_others_of_the_source_and_named():
    documents = [Document([Text(text=f"x{i}")]) for i in range(6)]
    mixture = Mixture([(Half(documents, "half"), 1)])
    texts = _texts(mixture.take(24))
    assert set(texts) == {"x0", "x2", "x4"}
    assert dict(mixture.problems) == {f"half/{i}.png": "truncated" for i in (1, 3, 5)}
    assert "3 problems (half/" in mixture.problems.summary()
    with pytest.raises(ValueError, match=r"6 broken ones in a row; 6 problems \(ruin/.*and 3 more.*doctor"):
        Mixture([(Half(documents, "ruin"), 1)]).take(1)


@pytest.mark.parametrize(("sources", "error"), [
    ([], "at least one"), ([(_source("a", 2), 0)], "positive weight, got 0 for a"),
    ([(_source("e", 0), 1)], "in e, got none")])
def test_arguments_are_checked(sources, error):
    with pytest.raises(ValueError, match=error):
        Mixture(sources)
