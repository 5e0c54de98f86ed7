"""What every row of the table of systems must do, on documents of the mini world. A new row needs an entry in EXPECTED
and nothing else."""
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filling import filled
from torch import Tensor

from diptych.document import Boxes, Document, Image, Piece, Text, Video
from diptych.objectives import flow, next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.systems.base import Losses, Sampling, StepLogProbs, System
from diptych.systems.io import load_system, save_system, system_tensors
from diptych.systems.packed import Packed
from diptych.systems.table import TABLE, find, find_class
from diptych.world.tasks import TASKS, document


@dataclass(frozen=True, kw_only=True)
class Expected:
    parameters: dict[str, int]  # by size
    first: dict[str, float]  # mean losses of a fresh tiny system on the golden batch
    word_by_word: bool = True  # texts are decoded so; otherwise all of their tokens together
    weighted: bool = False  # the loss weighs what is scored, or asks for more: tests of the system compare them
    steps: int = 150  # to learn one batch by heart


EXPECTED = {
    "bagel": Expected(parameters={"tiny": 337_908, "small": 10_912_596, "paper": 14_658_838_147},
                      first={"text": 6.94394, "image": 1.12013}),
    "janus": Expected(parameters={"tiny": 317_379, "small": 9_122_104, "paper": 7_407_773_323},
                      first={"text": 6.95231, "image": 4.24825}),
    "fudoki": Expected(parameters={"tiny": 350_147, "small": 9_384_248, "paper": 2_496_198_283},
                       first={"text": 7.05000, "image": 4.26587}, word_by_word=False, steps=350),
    "harmon": Expected(parameters={"tiny": 702_540, "small": 9_296_300, "paper": 2_559_950_067},
                       first={"text": 6.98242, "image": 0.99665, "variance": 1.77124}),
    "blip3-o": Expected(parameters={"tiny": 423_208, "small": 10_572_244, "paper": 14_007_614_624},
                        first={"text": 6.95129, "image": 1.38786, "pixels": 0.80720}),
    "mammothmoda2": Expected(parameters={"tiny": 733_207, "small": 13_064_812, "paper": 14_921_293_918},
                             first={"text": 6.92274, "image": 4.17173, "flow": 1.14211}),
    "metaquery": Expected(parameters={"tiny": 493_620, "small": 9_669_524, "paper": 7_292_853_059},
                          first={"text": 6.95129, "image": 1.08675}),
    "seed": Expected(parameters={"tiny": 396_100, "small": 13_870_068, "paper": 8_496_802_871},
                     first={"text": 6.99494, "image": 7.08889}),
    "emu3": Expected(parameters={"tiny": 274_947, "small": 7_695_032, "paper": 8_762_751_807},
                     first={"text": 6.98064, "image": 7.08734, "block": 6.95250}),
    "hbridge": Expected(parameters={"tiny": 514_324, "small": 16_207_508, "paper": 12_276_909_859},
                        first={"text": 6.95011, "image": 1.09177, "semantic": 1.11449}, steps=250),  # gates open slowly
    "latte-flow": Expected(parameters={"tiny": 553_464, "small": 10_749_088, "paper": 3_846_009_475},
                           first={"text": 6.93460, "image": 1.08217}, steps=250),  # a step teaches half of the layers
    "vargpt": Expected(parameters={"tiny": 473_425, "small": 8_909_298, "paper": 10_631_501_027},
                       first={"text": 6.92754, "image": 0.77767}),
    "show-o": Expected(parameters={"tiny": 302_540, "small": 8_508_355, "paper": 1_543_563_774},
                       first={"text": 7.03425, "image": 6.98933}),
    "tokenflow": Expected(parameters={"tiny": 545_544, "small": 10_286_728, "paper": 20_446_080_043},
                          first={"text": 6.97443, "image": 7.06110}),
    "unipic2": Expected(parameters={"tiny": 549_156, "small": 11_539_956, "paper": 11_522_667_363},
                        first={"text": 6.95129, "image": 1.13114}),
    "mmada": Expected(parameters={"tiny": 283_073, "small": 8_221_368, "paper": 8_178_077_052},
                      first={"text": 6.83943, "image": 6.84903}, word_by_word=False, weighted=True, steps=350),
    "unifork": Expected(parameters={"tiny": 252_424, "small": 12_034_112, "paper": 1_426_895_235},
                        first={"text": 6.94708, "image": 4.29777}),
}
# codes are drawn sharply: small changes of fresh logits shall show
SHORT = Sampling(evaluations=2, text=TextSampling(max_tokens=2), codes=TokenSampling(temperature=0.08),
                 guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),)))
each_system = pytest.mark.parametrize("name", TABLE)
each_speaker = pytest.mark.parametrize("name", [name for name in TABLE if EXPECTED[name].word_by_word])
each_unweighted = pytest.mark.parametrize("name", [name for name in TABLE if not EXPECTED[name].weighted])


def fresh(name: str, seed: int = 0) -> System:
    """Tiny and untrained; no condition is ever dropped."""
    cls = find(name)
    config = cls.tiny()
    drops = {f.name: 0.0 for f in dataclasses.fields(config) if f.name.startswith("drop_")}
    torch.manual_seed(seed)
    return cls(dataclasses.replace(config, **drops)).eval()


@cache
def lively(name: str) -> System:
    """With output layers that start at zero filled in: they hide everything behind them."""
    return filled(fresh(name))


def loss_of(system: System, documents: list[Document], seed: int = 0) -> Losses:
    return system.loss(system.collate(documents), torch.Generator().manual_seed(seed))


def one_of_each(first: int = 0) -> list[Document]:
    return [document(task, first + i) for i, task in enumerate(TASKS)]


def altered(piece: Piece) -> Piece:
    """The same kind of piece with other content."""
    if isinstance(piece, Image) and piece.pixels is not None:
        return piece.replace(pixels=-piece.pixels[:, ::-1].copy())
    if isinstance(piece, Boxes) and piece.boxes is not None:
        return piece.replace(boxes=np.clip(piece.boxes[:, [1, 0, 3, 2]] * 0.8, 0, 1))
    assert isinstance(piece, Text)
    return piece.replace(text="a small purple ring on a white background")


def replaced(d: Document, index: int) -> Document:
    pieces = list(d.pieces)
    pieces[index] = altered(pieces[index])
    return dataclasses.replace(d, pieces=tuple(pieces))


def produced(documents: list[Document]) -> list[Any]:
    content = {"text": "text", "boxes": "boxes", "image": "pixels"}
    return [getattr(p, content[p.kind]) for d in documents for p in d.targets]


def of_kind(score: StepLogProbs, kind: str) -> Tensor:
    """The log-probs of one kind of decision in a single document."""
    return torch.stack([v for v, k in zip(score.values[0], score.kinds[0], strict=True) if k == kind] or
                       [torch.tensor(0.0)])[: score.kinds[0].count(kind)]


def equal(one: list[Any], two: list[Any], tolerance: float = 2e-4) -> bool:
    return all(np.allclose(a, b, atol=tolerance) if isinstance(a, np.ndarray) else a == b
               for a, b in zip(one, two, strict=True))


# -- table, sizes ------------------------------------------------------------------------------------------------------

def test_every_row_has_its_expectations() -> None:
    assert set(EXPECTED) == set(TABLE)


@each_system
def test_rows_lead_to_classes(name: str) -> None:
    assert issubclass(find(name), System) and find_class(find(name).__name__) is find(name)
    with pytest.raises(ValueError, match=f"did you mean '{name}'"):
        find(name[:-1] + "x")
    with pytest.raises(ValueError, match="got 'Nothing'"):
        find_class("Nothing")


@each_system
@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
def test_parameters_are_counted(name: str, size: str) -> None:
    cls = find(name)
    with torch.device("meta"):
        system = cls(getattr(cls, size)())
    assert system.num_parameters() == EXPECTED[name].parameters[size]


# -- training ----------------------------------------------------------------------------------------------------------

@each_system
def test_first_loss_is_the_stored_one(name: str) -> None:
    """Moves when initialisation, documents, packing, random draws or the loss itself change."""
    losses = loss_of(fresh(name), one_of_each())
    means = {k: v.item() for k, v in losses.mean().items()}
    assert means == pytest.approx(EXPECTED[name].first, rel=1e-3)
    weighted = sum(losses.weights[k] * v for k, v in means.items())
    assert losses.total().item() == pytest.approx(weighted, rel=1e-5)
    assert {k: v.item() for k, v in loss_of(fresh(name), one_of_each()).sums.items()} == \
        {k: v.item() for k, v in losses.sums.items()}


@each_system
def test_gradients_reach_what_trains_and_nothing_frozen(name: str) -> None:
    system = lively(name)
    system.zero_grad()
    loss_of(system, one_of_each()).total().backward()
    frozen = [n for n, p in system.named_parameters() if not p.requires_grad]
    still = [n for n, p in system.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert [n for n in still if not n.endswith("k_proj.bias")] == []  # a bias of all keys cancels in the softmax
    assert all(system.get_parameter(n).grad is None for n in frozen)
    assert all(torch.isfinite(p.grad).all() for p in system.parameters() if p.grad is not None)
    system.zero_grad()


@each_system
def test_losses_are_sums_over_tokens(name: str) -> None:
    """Packed together or apart, documents count the same: noise and times held equal."""
    system = lively(name)
    documents = one_of_each() + [document("question", 20), document("draw", 21)]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "randn", lambda shape, **kw: torch.linspace(-1, 1, shape[-1]).expand(shape))
        patch.setattr(torch, "rand", lambda shape, **kw: torch.linspace(0.1, 0.9, shape[-1]).expand(shape))
        patch.setattr(flow, "sample_time", lambda count, generator, **kw: torch.full((count,), 0.4))
        batch = system.collate(documents)
        assert int((batch.page.tokens.document >= 1).sum()) > 0  # some row holds several
        together = system.loss(batch, torch.Generator())
        apart = [system.loss(system.collate([d]), torch.Generator()) for d in documents]
    for term, total in together.sums.items():
        torch.testing.assert_close(total, sum(a.sums.get(term, torch.tensor(0.0)) for a in apart), atol=1e-3, rtol=1e-5)
        assert together.counts[term] == sum(float(a.counts.get(term, 0)) for a in apart)


@each_system
@pytest.mark.parametrize("task", TASKS)
def test_every_piece_matters_to_the_loss(name: str, task: str) -> None:
    system, d = lively(name), document(task, 3)
    with torch.no_grad():
        usual = loss_of(system, [d]).sums
        for i in range(len(d)):
            sums = loss_of(system, [replaced(d, i)]).sums
            assert any(abs(sums[k] - usual[k]) > 1e-4 for k in usual), f"piece {i} of {task}"


@cache
def overfitted(name: str) -> tuple[System, list[Document], dict[str, float]]:
    """After so many steps on a caption, an answer and a drawing (noised ones several times: more levels)."""
    system = fresh(name)
    times = 1 if EXPECTED[name].word_by_word else 4
    documents = [document("caption", 0), document("question", 1), document("draw", 2)]
    lessons = [d for d, n in zip(documents, (times, times, 4), strict=True) for _ in range(n)]
    batch, generator = system.collate(lessons), torch.Generator().manual_seed(0)
    parameters = [p for p in system.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0)
    steps = EXPECTED[name].steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 10) * (1 - 0.9 * i / steps))
    means: dict[str, float] = {}
    for _ in range(steps):
        losses = system.loss(batch, generator)
        optimizer.zero_grad()
        losses.total().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        means = {k: v.item() for k, v in losses.mean().items()}
    return system, documents, means


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if e.steps > 300 else n
                                  for n, e in EXPECTED.items()])
def test_one_batch_is_learnt_by_heart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system, documents, means = overfitted(name)
    assert means["text"] < 0.05 and means["image"] < 0.3, means
    spoken: list[float] = []
    draw = next_token.draw

    def listening(logits: Tensor, *how: Any) -> int:
        spoken.append(float(logits.float().log_softmax(-1)[token := draw(logits, *how)]))
        return token

    monkeypatch.setattr(next_token, "draw", listening)
    filled = system.generate(documents, Sampling(evaluations=20, codes=TokenSampling(temperature=0.0)))
    assert produced(filled)[:2] == produced(documents)[:2]
    target = torch.from_numpy(documents[2].pieces[1].pixels)  # type: ignore[attr-defined]
    assert isinstance(system, Packed)
    best = system.decode(torch.stack(system.encode([target])), system.grid(target))[0]  # what the codec can show
    drawn = torch.from_numpy(produced(filled)[2])
    assert (drawn - best).square().mean() < 0.35 * best.var()
    if not EXPECTED[name].word_by_word:
        return
    # the log-probs of what was just decoded are those of training
    scores = system.score(filled[:2]).values
    assert len(spoken) == sum(len(s) for s in scores)
    assert sorted(spoken) == pytest.approx(sorted(torch.cat(scores).tolist()), abs=1e-4)


# -- generating --------------------------------------------------------------------------------------------------------

@each_system
@pytest.mark.parametrize("task", TASKS)
def test_every_input_matters_to_the_output(name: str, task: str) -> None:
    """Pictures are drawn from the same noise; texts are compared by the log-probs of the true answer."""
    system, d = lively(name), document(task, 3)
    given = [i for i, p in enumerate(d) if not p.target]
    draws, says = (any(isinstance(p, kind) for p in d.targets) for kind in (Image, (Text, Boxes)))
    usual = system.generate([d], SHORT)[0]
    assert len(usual) == len(d) and not any(p.empty for p in usual) and usual.meta == d.meta
    for i in given:
        other = replaced(d, i)
        if draws:
            drawn = zip(usual, system.generate([other], SHORT)[0], strict=True)
            assert all(not np.allclose(a.pixels, b.pixels, atol=1e-5) for a, b in drawn
                       if isinstance(a, Image) and isinstance(b, Image) and a.target)
        if says and task != "story":  # whose later texts would be scored on given pictures
            assert not torch.allclose(system.score([d]).values[0], system.score([other]).values[0], atol=1e-6)


@each_speaker
@pytest.mark.parametrize("task", ["caption", "question", "refer", "plan"])
def test_stepwise_decoding_scores_like_training(name: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached steps against one forward pass, with the true answer put into the mouth of the decoder."""
    system, d = lively(name), document(task, 5)
    assert isinstance(system, Packed)
    answer = next(p for p in d.targets if not isinstance(p, Image))
    wanted: Iterator[int] = iter([*system.spell(answer), system.marks.end])
    heard: list[Tensor] = []

    def dictate(logits: Tensor, sampling: TextSampling, generator: torch.Generator) -> int:
        token = next(wanted)
        heard.append(next_token.log_probs(logits, sampling)[token])
        return token

    monkeypatch.setattr(next_token, "draw", dictate)
    filled = system.generate([d], Sampling(evaluations=1))[0]
    said = next(p for p in filled.targets if not isinstance(p, Image))
    if isinstance(answer, Boxes) and isinstance(said, Boxes) and said.boxes is not None:
        np.testing.assert_allclose(said.boxes, answer.boxes, atol=1 / 32)
        assert said.labels == answer.labels
    else:
        assert said == answer
    score = system.score([d])
    torch.testing.assert_close(torch.stack(heard), of_kind(score, "text"), atol=1e-4, rtol=0)


@each_unweighted
def test_score_is_the_loss(name: str) -> None:
    """Of texts, and of pictures that are drawn by discrete decisions of the same objective."""
    system = lively(name)
    with torch.no_grad():
        for d in one_of_each():
            losses, score = loss_of(system, [d]), system.score([d])
            assert len(score.values[0]) == len(score.kinds[0])
            for kind, term in (("text", "text"), ("code", "image")):
                values = of_kind(score, kind)
                if len(values):
                    torch.testing.assert_close(-values.sum(), losses.sums[term], atol=1e-3, rtol=1e-5)
                assert len(values) == losses.counts.get(term, 0) or (kind == "code" and not len(values))


@each_system
def test_company_does_not_matter(name: str) -> None:
    """Batched equals single for the same seeds, whatever the tasks beside; other seeds draw other pictures."""
    system, documents = lively(name), one_of_each()
    seeds = list(range(len(documents)))
    together = system.generate(documents, SHORT, seeds=seeds)
    alone = [system.generate([d], SHORT, seeds=s)[0] for d, s in zip(documents, seeds, strict=True)]
    assert equal(produced(together), produced(alone))
    assert not equal(produced(together), produced(system.generate(documents, SHORT, seeds=99)))


# -- saving ------------------------------------------------------------------------------------------------------------

@each_system
@torch.no_grad()
def test_weights_in_bfloat16_do_everything(name: str) -> None:
    system, documents = copy.deepcopy(lively(name)).bfloat16(), one_of_each()
    for d in system.generate(documents, SHORT):
        assert all(p.pixels is not None and np.isfinite(p.pixels).all() for p in d.of(Image))
    told = [d for d in documents if not any(isinstance(p, Image) for p in d.targets)]
    scores, exact = (torch.cat(s.score(told).values).float() for s in (system, lively(name)))
    torch.testing.assert_close(scores, exact, atol=0.5, rtol=0.1)


@each_system
def test_saved_systems_come_back_bit_equal(name: str, tmp_path: Path) -> None:
    system = lively(name)
    save_system(system, tmp_path)
    again = load_system(tmp_path)
    assert type(again) is type(system) and again.config == system.config
    tensors = system_tensors(again)
    assert all(torch.equal(v, tensors[k]) for k, v in system_tensors(system).items())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in system.parameters()]
    with torch.no_grad():
        one, two = (loss_of(s, one_of_each()).sums for s in (system, again))
    assert {k: v.item() for k, v in one.items()} == {k: v.item() for k, v in two.items()}
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


# -- what users get wrong ----------------------------------------------------------------------------------------------

@each_system
def test_bad_documents_are_errors(name: str) -> None:
    system, question = lively(name), document("question", 0)
    picture, ask, answer = question.pieces
    video = Video(frames=np.zeros((2, 3, 8, 8), np.float32))
    for pieces, message in [
        ((video, ask, answer), "expected text, boxes or images .*got video; fix"),
        ((picture.emptied(), ask, answer), "expected pixels .*fix"),
        ((picture, ask.emptied(), answer), "expected text with content, got an empty piece; fix"),
    ]:
        for verb in (system.collate, system.score, partial(system.generate, sampling=SHORT)):
            with pytest.raises(ValueError, match=message):
                verb([Document(pieces)])
    with pytest.raises(ValueError, match="got video; fix"):
        system.generate([Document((ask, video.replace(target=True, frames=None)))], SHORT)
    with pytest.raises(ValueError, match="empty piece"):
        system.collate([question.prompt()])


@each_system
def test_bad_options_are_errors(name: str) -> None:
    system, d = lively(name), document("draw", 0)
    with pytest.raises(ValueError, match=r"one seed, or one per document \(1\), got 2"):
        system.generate([d], SHORT, seeds=[1, 2])
    with pytest.raises(ValueError, match="picture size in multiples of .*got 65 x 64; fix"):
        system.generate([Document((d.pieces[0], Image(size=(65, 64), target=True)))], SHORT)
    wrong = Sampling(evaluations=1, guidance=Guidance(branches=(Branch(context="no_sound", scale=2.0),)))
    with pytest.raises(ValueError, match="branches out of no_text, no_image, got 'no_sound'"):
        system.generate([d], wrong)
