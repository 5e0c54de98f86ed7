"""Discrete codes in the packed sequence: grammar, writer, guided and given-uniform draws, the raster loop, score."""
import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diptych.document import Document, Image, Text
from diptych.objectives import next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling, choose, guide, log_probs, restrict
from diptych.parts.grammar import CELL, Grammar
from diptych.parts.interleave import GENERATE, IGNORE, Frame, Layout, Marks, Page, Writer
from diptych.parts.tokens import Modality, Mode
from diptych.systems.base import Event, Sampling
from diptych.systems.coded import Coded
from diptych.systems.decoding import Decoding
from diptych.systems.janus import Janus
from diptych.systems.works import Develop, Read, Reader, Step, Together
from diptych.world.tasks import document

MARKS = Marks(1, 2, 3, 4)
EMU = Grammar(start=(90,), digits=tuple(range(60, 70)), times=(70,), opened=(91,), row_end=(80,), end=(81, 92))
GUIDED = Guidance(branches=(Branch(context="no_text", scale=3.0),))


@cache
def tiny() -> Janus:
    torch.manual_seed(0)
    return Janus(dataclasses.replace(Janus.tiny(), drop_text=0.0, drop_feature=0.0)).eval()


# -- grammar ----------------------------------------------------------------------------------------------------------

def test_the_block_of_emu3() -> None:
    """boi "2*11" img, rows closed by eol, eof eoi: (W + 1) H + digits + 5 tokens."""
    plan = EMU.plan((2, 11))
    assert plan == [90, 62, 70, 61, 61, 91, *[CELL] * 11, 80, *[CELL] * 11, 80, 81, 92]
    assert len(plan) == 12 * 2 + 3 + 5


def test_scales_are_delimited() -> None:
    grammar = Grammar(start=(9,), level_end=(7,), end=(8,))
    assert grammar.plan((1, 1), (2, 2)) == [9, CELL, 7, CELL, CELL, CELL, CELL, 8]


def test_parsing_is_the_inverse_of_writing() -> None:
    codes, first = list(range(22)), 100
    it = iter(codes)
    ids = [first + next(it) if i == CELL else i for i in EMU.plan((2, 11))]
    assert EMU.parse(ids, range(100, 200)) == ([(2, 11)], codes)
    bare = Grammar(start=(9,))
    assert bare.parse([9, 101, 100], range(100, 200), (1, 2)) == ([(1, 2)], [1, 0])


@pytest.mark.parametrize(("change", "message"), [
    (lambda ids: ids[:-1], "expected 32 tokens"),
    (lambda ids: [*ids[:8], 5, *ids[9:]], "expected a code at place 8 .*got 5"),
    (lambda ids: [*ids[:17], 101, *ids[18:]], "expected 80 at place 17 .*got 101"),
    (lambda ids: [90, 70, 62, *ids[3:]], "expected the size in digits"),
])
def test_damaged_blocks_are_errors(change: Any, message: str) -> None:
    ids = [100 if i == CELL else i for i in EMU.plan((2, 11))]
    with pytest.raises(ValueError, match=message):
        EMU.parse(change(ids), range(100, 200))


def test_grammars_that_make_no_sense_are_errors() -> None:
    with pytest.raises(ValueError, match="ten digits"):
        Grammar(digits=(1, 2))
    with pytest.raises(ValueError, match="pass it"):
        Grammar(start=(9,)).parse([9, 100], range(100, 200))
    with pytest.raises(ValueError, match="give the grammar a start"):
        w = Writer(MARKS, layout=Layout(code=Grammar()))
        w.code(0, w.plan((1, 2)), drawn=True)


def test_steps_end_where_a_code_is_drawn() -> None:
    plan = EMU.plan((2, 2))
    parts = [plan[s] for s in Grammar.steps(plan)]
    assert parts == [[90, 62, 70, 62, 91], [CELL], [CELL, 80], [CELL], [CELL, 80, 81, 92]]
    assert [token for part in parts for token in part] == plan


def test_constrained_sampling_keeps_to_the_grammar() -> None:
    """A flat vocabulary: every draw of random logits is a valid block, without the constraint none is."""
    generator, codes, plan = torch.Generator().manual_seed(0), range(100, 140), EMU.plan((3, 2))
    sampling = TokenSampling(temperature=1.0)
    drawn, free = [], []
    for token in plan:
        logits = torch.randn(140, generator=generator)
        drawn.append(next_token.draw(restrict(logits, Grammar.allowed(token, codes)), sampling, generator))
        free.append(next_token.draw(logits, sampling, generator))
    assert EMU.parse(drawn, codes)[0] == [(3, 2)]
    with pytest.raises(ValueError, match="expected"):
        EMU.parse(free, codes, (3, 2))
    with pytest.raises(ValueError, match="within a vocabulary of 140"):
        restrict(torch.zeros(140), range(100, 141))


# -- writer -----------------------------------------------------------------------------------------------------------

def test_codes_are_tokens_of_their_own_modality() -> None:
    w = Writer(MARKS, layout=Layout(code=Grammar(start=(3,), row_end=(9,)), spread=True))
    w.text([10])
    w.code(5, w.plan((2, 2)), drawn=True)
    w.feature(0, 2)
    page = Page.of([[w]])
    t = page.tokens
    assert page.ids[0].tolist() == [1, 10, 2, 3, 0, 0, 9, 0, 0, 9, 3, 0, 0, 4]
    code, text, feature = (int(m) for m in (Modality.CODE, Modality.TEXT, Modality.FEATURE))
    assert t.modality[0].tolist() == [text] * 4 + [code] * 2 + [text] + [code] * 2 + [text] * 2 + [feature] * 2 + [text]
    assert t.position[0, :, 0].tolist() == list(range(14))  # spread: one position each
    assert t.route[0].nonzero().flatten().tolist() == [4, 5, 7, 8] and GENERATE == 1
    assert t.target[0].nonzero().flatten().tolist() == [4, 5, 7, 8]
    assert t.segment[0].tolist() == [1] * 3 + [2] * 7 + [3] * 4
    assert page.questions.tolist() == [3, 4, 6, 7]  # the token before each code, marks of rows included
    assert (page.labels == IGNORE).all() and w.codes == [(5, True)]


def test_masked_codes_ask_at_their_own_place() -> None:
    w = Writer(MARKS)
    w.code(0, w.plan((1, 3)), drawn=True, ahead=False, mode=Mode.NOISE)
    assert Page.of([[w]]).questions.tolist() == [1, 2, 3] and w.position == 0  # private: no position of its own
    w.code(0, w.plan((1, 3)), drawn=False, mode=Mode.FULL)
    assert w.questions == [1, 2, 3] and w.position == 1


def test_questions_follow_the_documents_in_a_page() -> None:
    writers = []
    for words in (2, 1, 3):
        w = Writer(MARKS, layout=Layout(code=Grammar(start=(3,))))
        w.text([7] * words)
        w.code(0, w.plan((1, 2)), drawn=True)
        writers.append(w)
    page = Page.of([[writers[0], writers[1]], [writers[2]]], length=16)
    assert page.questions.tolist() == [4, 5, 7 + 3, 7 + 4, 16 + 5, 16 + 6]


def test_parts_make_the_whole() -> None:
    def start() -> Writer:
        return Writer(MARKS, 4, 2, Layout(code=EMU, spread=True))

    whole = start()
    plan = whole.plan((2, 3))
    whole.code(0, plan, drawn=True)
    parts, position, segment = [], 4.0, 2
    for part in Grammar.steps(plan):
        w = Writer(MARKS, position, segment, Layout(code=EMU, spread=True))
        w.code(0, plan, drawn=True, part=part)
        parts.append(w)
        position, segment = w.position, w.segment
    one, many = Page.of([[whole]]), Page.of([parts])
    for name in ("segment", "modality", "position", "route", "target"):
        assert torch.equal(getattr(one.tokens, name), getattr(many.tokens, name)), name
    assert torch.equal(one.ids, many.ids) and torch.equal(one.questions, many.questions)
    assert (position, segment) == (whole.position, whole.segment)
    assert [len(w.questions) for w in parts] == [1] * 6 + [0]


def test_what_leads_to_a_text_predicts_its_first_word_only() -> None:
    w = Writer(MARKS)
    w.text([10, 11], target=True, frame=Frame(lead=(20, 21, 22), open=False))
    assert w.ids == [20, 21, 22, 10, 11, 2]
    assert w.labels == [IGNORE, IGNORE, 10, 11, 2, IGNORE]


def test_texts_that_are_asked_in_their_own_places() -> None:
    w = Writer(MARKS)
    w.text([10, 11], target=True, ahead=False)
    assert w.ids == [1, 10, 11, 2] and w.labels == [IGNORE, 10, 11, 2]


def test_filling_stands_here_or_before_everything() -> None:
    w = Writer(MARKS, layout=Layout(spread=True))
    w.text([10])
    w.fill(2, 7, position=-2)
    w.text([11], open=False, close=False)
    w.fill(1, 7)
    t = Page.of([[w]]).tokens
    assert w.ids == [1, 10, 2, 7, 7, 11, 7] and w.labels == [IGNORE] * 7
    assert t.position[0, :, 0].tolist() == [0, 1, 2, -2, -1, 3, 4]
    assert (t.modality[0] == Modality.FILL).tolist() == [i in (3, 4, 6) for i in range(7)]


# -- draws ------------------------------------------------------------------------------------------------------------

def test_a_given_uniform_number_picks_the_bin_it_falls_in() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.0, 0.5]]).log().expand(6, 4)
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.4999, 0.5001, 1 - 1e-12], dtype=torch.float64)
    assert choose(scores, uniforms).tolist() == [0, 0, 1, 1, 3, 3]
    assert choose(scores, None).tolist() == [3] * 6


def test_guidance_on_logits_by_hand() -> None:
    full, null = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.5, 2.5, 0.0]])
    out = guide({"full": full, "no_text": null}, GUIDED, 0.5)
    torch.testing.assert_close(out, null + 3 * (full - null))
    # normalising each branch first, as Emu3 does, is the same distribution
    other = guide({"full": full.log_softmax(-1), "no_text": null.log_softmax(-1)}, GUIDED, 0.5)
    torch.testing.assert_close(out.softmax(-1), other.softmax(-1))
    late = dataclasses.replace(GUIDED, interval=(0.6, 1.0))
    assert torch.equal(guide({"full": full, "no_text": null}, late, 0.5), full)


# -- the raster loop --------------------------------------------------------------------------------------------------

def told(model: Coded, text: str) -> dict[str, Reader]:
    contexts = {"full": Reader(), "no_text": Reader(), "no_image": Reader()}
    assert model.vocabulary is not None
    for name in ("full", "no_image"):
        w = model.writer(contexts[name])
        w.text(model.vocabulary.encode(text))
        model.run([Read(contexts[name], w)])
    return contexts


def drive(model: Coded, program: Any) -> tuple[Any, list[Any], list[Any]]:
    works, answers = [], []
    answer = None
    while True:
        try:
            work = program.send(answer)
        except StopIteration as stop:
            return stop.value, works, answers
        answer = model.run([work])[0]
        works.append(work)
        answers.append(answer)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_cached_steps_equal_one_pass_over_the_block(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of every step, in both branches of guidance, against a forward pass without cache."""
    if not compiled:
        monkeypatch.setattr(Decoding, "of", lambda system: None)
    model, grid = tiny(), (2, 3)
    uniforms = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampling = Sampling(guidance=GUIDED, codes=TokenSampling(temperature=0.7, top_k=20))
    contexts = told(model, "a red ball")
    codes, works, answers = drive(model, model.raster(uniforms, grid, contexts, sampling, 0, lambda e: None, True))
    assert all(isinstance(w, Step if compiled and k else Together) for k, w in enumerate(works[:-1]))
    assert isinstance(works[-1], Read)
    assert len(works) == 7 and answers[-1] is None  # the last code is read because more follows
    assert contexts["no_text"].context.length == 0  # the branch was a copy

    stepwise = {name: torch.stack([a[n][0] for a in answers[:-1]]) for n, name in enumerate(("full", "no_text"))}
    for name, words in (("full", "a red ball"), ("no_text", None)):
        w = model.writer(Reader())
        if words is not None:
            assert model.vocabulary is not None
            w.text(model.vocabulary.encode(words))
        w.code(0, w.plan(grid), drawn=True)
        page = Page.of([[w]])
        hidden = model.forward_page(page, [], codes)
        flat = torch.cat(hidden)[torch.cat(page.tokens.routes(2)).argsort()]
        torch.testing.assert_close(model.code_logits(flat[page.questions]), stepwise[name], atol=1e-5, rtol=0)
    scores = log_probs(stepwise["no_text"] + 3 * (stepwise["full"] - stepwise["no_text"]), sampling.codes)
    assert torch.equal(choose(scores, uniforms), codes)


@torch.no_grad()
def test_log_probs_of_a_drawn_picture_are_those_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model, d = tiny(), document("story", 3)
    dictated: Iterator[Tensor] = iter(torch.cat(model.encode(model.write(d)[1])))
    heard: list[Tensor] = []

    def dictate(scores: Tensor, uniform: Tensor | None) -> Tensor:
        if len(scores.shape) == 1:  # a word
            return choose_(scores, uniform)
        code = next(dictated)
        heard.append(scores[0, code])
        return code[None]

    choose_ = next_token.choose
    monkeypatch.setattr(next_token, "choose", dictate)
    # the pictures read back are those of the document: their codes are, and decoding is replaced by them
    pictures = iter(torch.from_numpy(p.pixels) for p in d if isinstance(p, Image))
    monkeypatch.setattr(model, "decode", lambda x, grid: torch.stack([next(pictures) for _ in x]))
    words = iter([i for p in d.targets if isinstance(p, Text) for i in (*model.spell(p), model.marks.end)])
    monkeypatch.setattr(next_token, "draw", lambda *args: next(words))
    model.generate([d], Sampling())
    score = model.score([d])
    codes = torch.stack([v for v, k in zip(score.values[0], score.kinds[0], strict=True) if k == "code"])
    assert len(heard) == 4 * 64
    torch.testing.assert_close(torch.stack(heard), codes, atol=1e-4, rtol=0)
    kinds = "".join(k[0] for k in score.kinds[0])
    assert kinds.startswith("c" * 64 + "t") and kinds.endswith("t" + "c" * 64)  # in the order of the document


def test_partial_pictures_grow() -> None:
    model, d, seen = tiny(), document("draw", 1), list[Event]()
    whole = model.generate([d], Sampling(partial=4), emit=lambda n, e: seen.append(e))[0]
    assert [e.kind for e in seen] == ["partial"] * 4 + ["picture"]
    assert np.array_equal(seen[-1].value.numpy(), whole.pieces[1].pixels)  # type: ignore[attr-defined]
    assert all(e.value.shape == (3, 64, 64) for e in seen)


def test_guidance_and_sampling_act() -> None:
    model, d = tiny(), document("draw", 1)

    def drawn(**changes: Any) -> np.ndarray:
        return model.generate([d], Sampling(**changes), seeds=4)[0].pieces[1].pixels  # type: ignore[attr-defined]

    plain, greedy = drawn(), drawn(codes=TokenSampling(temperature=0.0))
    assert not np.allclose(plain, greedy)
    assert np.allclose(greedy, drawn(codes=TokenSampling(top_k=1)))
    assert not np.allclose(plain, drawn(guidance=Guidance(branches=(Branch(context="no_text", scale=60.0),))))
    assert np.allclose(plain, drawn(guidance=Guidance(branches=(Branch(context="no_text", scale=1.0),))))


def test_pictures_of_other_sizes_are_drawn() -> None:
    prompt = document("draw", 0).pieces[0]
    out = tiny().generate([Document((prompt, Image(target=True, size=(16, 40))))])[0]
    assert out.pieces[1].pixels.shape == (3, 16, 40)  # type: ignore[attr-defined]


@torch.no_grad()
def test_works_answer_in_their_groups() -> None:
    """Together and alone, kept and not."""
    model = tiny()
    contexts = told(model, "a blue ring")
    plan = model.writer(Reader()).plan((1, 2))

    def step(reader: Reader, keep: bool = True) -> Read:
        w = model.writer(reader)
        w.code(0, plan, drawn=True, part=Grammar.steps(plan)[0])
        return Read(reader, w, keep=keep)

    length = contexts["full"].context.length
    peek = model.run([step(contexts["full"], keep=False)])[0]
    assert contexts["full"].context.length == length and contexts["full"].position == length
    pair, picture = model.run([Together([step(contexts["full"]), step(contexts["no_text"])]),
                               Develop(torch.zeros(64, dtype=torch.long), (8, 8))])
    assert contexts["full"].context.length == length + 1 and picture.shape == (3, 64, 64)
    torch.testing.assert_close(pair[0], peek, atol=1e-6, rtol=0)
    assert pair[0].shape == (1, 64) and not torch.allclose(pair[1], peek)
