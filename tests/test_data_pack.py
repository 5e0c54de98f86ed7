"""Packing keeps every document whole and wastes little."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.data.pack import fill, pack, pack_rows


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_every_document_once_and_no_row_over_budget(lengths, budget):
    rows = pack(lengths, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= budget for row in rows)
    assert rows == pack(lengths, budget) == sorted(rows) and all(row == sorted(row) for row in rows)
    fewest = -(-sum(lengths) // budget)
    assert len(rows) <= max(2 * fewest, 1)
    # No two rows could have been one: best fit would have merged their smaller documents.
    sums = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > budget


def test_known_packing():
    lengths = [6, 5, 4, 3, 2]
    assert pack(lengths, 10) == [[0, 2], [1, 3, 4]]
    assert fill(lengths, pack(lengths, 10), 10) == 1.0
    assert pack([], 10) == [] and fill([], [], 10) == 0.0


def test_limits_are_named():
    with pytest.raises(ValueError, match=r"between 1 and 10 tokens in document 1 \(cat\.png\), got 11; fix"):
        pack([3, 11], 10, names=["dog.png", "cat.png"])
    with pytest.raises(ValueError, match="empty documents"):
        pack([0], 10)
    assert len(pack([6, 6], 10, rows=2)) == 2


def test_long_documents_have_rows_of_their_own():
    assert pack_rows([3, 25, 7, 14, 4, 11], 10) == [[0, 2], [4], [1], [3, 5]]
    assert pack_rows([3, 4], 10) == [[0, 1]] and pack_rows([12], 10) == [[0]] and pack_rows([], 10) == []
    with pytest.raises(ValueError, match="fit 1 rows of 10 tokens, got 2 rows"):
        pack([6, 6], 10, rows=1)
