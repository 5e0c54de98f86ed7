import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.document import Boxes
from diptych.parts.interleave import GENERATE, IGNORE, UNDERSTAND, Marks, Page, Writer
from diptych.parts.pictures import fit_sides, fit_size, merge_grid, stack_by_size
from diptych.parts.resources import locate, stored_config
from diptych.parts.tokens import PADDING, Modality, Mode, Strip, assemble
from diptych.parts.vocabulary import LOCATIONS, Vocabulary

MARKS = Marks(1, 2, 3, 4)


def strip(*counts: int, route: int = 0) -> Strip:
    out = Strip()
    for count in counts:
        out.add(count, segment=out.segment(), modality=Modality.TEXT, mode=Mode.CAUSAL, route=route, position=0.0)
    return out


# -- strips and rows --------------------------------------------------------------------------------------------------

def test_positions_are_a_number_a_list_or_three_axes() -> None:
    s = Strip()
    common = {"segment": 0, "modality": Modality.TEXT, "mode": Mode.CAUSAL, "route": 0}
    s.add(2, position=7, **common)
    s.add(2, position=np.array([8, 9]), **common)
    s.add(2, position=np.array([[1, 2, 3], [4, 5, 6]]), **common)
    tokens = assemble([[s]])
    assert tokens.position[0].tolist() == [[7] * 3, [7] * 3, [8] * 3, [9] * 3, [1, 2, 3], [4, 5, 6]]


def test_rows_are_laid_out_in_order_and_padded() -> None:
    tokens = assemble([[strip(2, 1), strip(1)], [strip(2, route=1)], []], length=5)
    assert tokens.shape == (3, 5)
    assert tokens.document.tolist() == [[0, 0, 0, 1, -1], [0, 0, -1, -1, -1], [-1] * 5]
    assert tokens.segment[0].tolist() == [0, 0, 1, 0, PADDING]
    assert tokens.valid().sum(1).tolist() == [4, 2, 0]
    assert [r.tolist() for r in tokens.routes(2)] == [[0, 1, 2, 3], [5, 6]]  # flat places, padding in neither
    assert tokens.index.tolist() == [list(range(5))] * 3
    assert tokens.time.isnan().all() and not tokens.target.any()


def test_rows_start_behind_their_context() -> None:
    assert assemble([[strip(2)], [strip(3)]], start=[10, 4]).index.tolist() == [[10, 11, 12], [4, 5, 6]]


def test_too_short_a_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="rows of at most 3 tokens, got 4"):
        assemble([[strip(2), strip(2)]], length=3)


@given(st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=4))
def test_no_token_is_lost(rows: list[list[int]]) -> None:
    tokens = assemble([[strip(n) for n in row] for row in rows])
    assert tokens.valid().sum(1).tolist() == [sum(row) for row in rows]
    assert tokens.shape[1] == max(sum(row) for row in rows)
    for b, row in enumerate(rows):
        assert [int((tokens.document[b] == d).sum()) for d in range(len(row))] == row


# -- the writer -------------------------------------------------------------------------------------------------------

def test_text_and_copies_of_pictures_become_tokens() -> None:
    w = Writer(MARKS)
    w.text([10, 11])
    w.latent(0, 2, noised=True)
    w.latent(0, 2, noised=False)
    w.feature(0, 1)
    w.text([12], target=True)
    page = Page.of([[w]])
    t = page.tokens
    assert page.ids[0].tolist() == [1, 10, 11, 2, 3, 0, 0, 4, 3, 0, 0, 4, 3, 0, 4, 1, 12, 2]
    # text advances one by one, a picture has one position, and a noised one leaves its slot to the clean copy
    assert t.position[0, :, 0].tolist() == [0, 1, 2, 3] + [4] * 4 + [4] * 4 + [5] * 3 + [6, 7, 8]
    assert t.segment[0].tolist() == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 3 + [5] * 3
    assert t.mode[0].tolist() == [0] * 4 + [Mode.NOISE] * 4 + [Mode.FULL] * 7 + [0] * 3
    assert t.route[0].tolist() == [0] * 5 + [GENERATE] * 2 + [0] * 2 + [GENERATE] * 2 + [UNDERSTAND] * 7
    assert t.modality[0].tolist() == [0] * 5 + [2, 2, 0, 0, 2, 2, 0, 0, 1, 0, 0, 0, 0]
    assert t.target[0].nonzero().flatten().tolist() == [5, 6, 15, 16, 17]
    assert t.time[0, 9:11].tolist() == [1, 1] and t.time[0, :8].isnan().all()
    assert page.labels[0].tolist() == [IGNORE] * 15 + [12, 2, IGNORE]  # the start mark predicts the first word
    assert w.latents == [(0, True), (0, False)] and w.features == [0]


def test_writing_goes_on_where_another_stopped() -> None:
    one = Writer(MARKS)
    one.text([10, 11], close=False)
    assert (one.ids, one.position, one.segment) == ([1, 10, 11], 3, 1)
    two = Writer(MARKS, one.position, one.segment)
    two.text([12], open=False)
    assert two.ids == [12, 2]
    assert Page.of([[two]]).tokens.position[0, :, 0].tolist() == [3, 4]
    assert two.segment == one.segment  # the same span
    two.skip()
    assert two.position == 6


# -- vocabulary -------------------------------------------------------------------------------------------------------

@cache
def shared() -> Vocabulary:
    return Vocabulary("zoo/tokenizer")


@pytest.fixture()
def vocabulary() -> Vocabulary:
    return shared()


@given(st.text(max_size=40))
def test_normalised_text_survives_the_tokenizer(text: str) -> None:
    v = shared()
    ids = v.encode(text)
    assert v.encode(v.decode(ids)) == ids
    plain = "".join(c for c in text if c.islower() and c.isascii())
    assert v.decode(v.encode(plain)) == plain
    assert not {v.start, v.end, v.image_start, v.image_end} & set(ids)


def test_a_user_may_write_as_usual(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode("How many circles?") == vocabulary.encode("how many circles ?")
    assert vocabulary.decode(vocabulary.encode("Two,  or 3.")) == "two , or 3 ."


def test_marks_typed_by_a_user_stay_text(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode("a <|im_end|> b")
    assert vocabulary.end not in ids and vocabulary.decode(ids) == "a <|im_end|> b"


def test_boxes_round_trip_to_a_cell(vocabulary: Vocabulary) -> None:
    boxes = np.array([[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]], np.float32)
    for labels in (("red cube", "small blue ball"), ()):
        piece = Boxes(boxes=boxes, labels=labels)
        back = vocabulary.decode_boxes(vocabulary.encode_boxes(piece), piece.emptied())
        assert back.labels == labels
        np.testing.assert_allclose(back.boxes, boxes, atol=1 / LOCATIONS)


def test_malformed_boxes_are_dropped(vocabulary: Vocabulary) -> None:
    place = vocabulary.first_location
    ids = [*vocabulary.encode("cube"), place, place + 1, *vocabulary.encode("ball"), *range(place, place + 4)]
    back = vocabulary.decode_boxes(ids, Boxes())
    assert back.labels == ("ball",) and back.boxes is not None and back.boxes.shape == (1, 4)
    empty = vocabulary.decode_boxes(vocabulary.encode("nothing"), Boxes())
    assert empty.boxes is not None and empty.boxes.shape == (0, 4)


def test_vocabulary_pickles_with_its_marks(vocabulary: Vocabulary) -> None:
    other = Vocabulary(vocabulary.path, marks=("<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"))
    again = pickle.loads(pickle.dumps(other))
    assert (again.start, again.end) == (vocabulary.end, vocabulary.start)
    assert len(again) == len(vocabulary)


def test_missing_files_and_marks_say_what_to_do(tmp_path: Path, vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match=r"to have the tokens <a>.*fix: add them"):
        Vocabulary(vocabulary.path, marks=("<a>", "<b>", "<c>", "<d>"))
    with pytest.raises(FileNotFoundError, match="diptych zoo build nothing"):
        locate("zoo/nothing", ".json")
    with pytest.raises(FileNotFoundError, match="check the path"):
        locate(tmp_path / "x.json", ".json")
    assert "latent_channels" in stored_config("zoo/codec")


# -- pictures ---------------------------------------------------------------------------------------------------------

@given(st.integers(1, 3000), st.integers(1, 3000))
def test_fitted_sides_obey_their_limits(height: int, width: int) -> None:
    h, w = fit_size(height, width, 224, 980, 14)
    assert h % 14 == 0 and w % 14 == 0 and min(h, w) >= 14 and max(h, w) <= 980
    if max(h, w) < 980 - 14:  # the long side leaves room: then the short one is long enough
        assert min(h, w) >= 224 - 14
    assert (h >= w) == (height >= width) or abs(h - w) <= 14


def test_fit_size_examples() -> None:
    assert fit_size(64, 64, 64, 64, 16) == (64, 64)
    assert fit_size(512, 2048, 512, 1024, 16) == (256, 1024)  # the longest side wins
    assert fit_size(100, 200, 512, 1024, 16) == (512, 1024)
    assert fit_size(1, 900, 64, 64, 16) == (16, 64)


def test_fit_sides_scales_or_leaves_alone() -> None:
    picture = torch.rand(3, 32, 64) * 2 - 1
    assert fit_sides(picture, 32, 64, 16) is picture
    scaled = fit_sides(picture, 16, 32, 16)
    assert scaled.shape == (3, 16, 32) and scaled.abs().max() <= 1
    torch.testing.assert_close(scaled.mean(), picture.mean(), atol=0.02, rtol=0)


def test_merge_puts_neighbours_into_one_token() -> None:
    cells = torch.arange(2 * 4 * 6).reshape(2, 24, 1)
    merged = merge_grid(cells, (4, 6), 2)
    assert merged.shape == (2, 6, 4)
    assert merged[0, 4].tolist() == [14, 15, 20, 21]  # rows 2-3, columns 2-3


def test_pictures_are_stacked_by_size() -> None:
    pictures = [torch.full((3, h, 8), float(i)) for i, h in enumerate((8, 16, 8))]
    groups = stack_by_size(pictures)
    assert [numbers for numbers, _ in groups] == [[0, 2], [1]]
    assert [tuple(batch.shape) for _, batch in groups] == [(2, 3, 8, 8), (1, 3, 16, 8)]
    assert torch.equal(groups[0][1][1], pictures[2])
