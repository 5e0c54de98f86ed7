import numpy as np
import pytest
import torch

from diptych.document import Boxes, Document, Image, Text
from diptych.systems import table
from diptych.systems.base import Sampling
from diptych.systems.vlm import Vlm
from diptych.world.tasks import document

GENERATOR = torch.Generator()


@pytest.fixture()
def model() -> Vlm:
    torch.manual_seed(0)
    return Vlm(Vlm.tiny())


def test_the_table_finds_tools_apart_from_papers() -> None:
    assert table.find("vlm") is Vlm and table.find_class("Vlm") is Vlm and "vlm" not in table.TABLE


def test_learns_a_batch_and_says_it(model: Vlm) -> None:
    documents = [document(t, i) for i in range(2) for t in ("question", "refer", "read")]
    batch = model.collate(documents)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss = model.loss(batch, GENERATOR).total()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    for made, wanted in zip(model.generate(documents), documents, strict=True):
        truth, said = wanted.pieces[-1], made.pieces[-1]
        if isinstance(truth, Boxes):
            assert said.boxes is not None and truth.boxes is not None
            np.testing.assert_allclose(said.boxes, truth.boxes, atol=1 / 64)
        else:
            assert said == truth


def test_the_picture_and_the_question_matter(model: Vlm) -> None:
    one, two = document("question", 0), document("question", 1)
    swapped = Document((two.pieces[0], *one.pieces[1:]))
    asked = Document((one.pieces[0], Text(text="what is this ?"), one.pieces[2]))
    base = model.score([one]).values[0]
    assert not torch.equal(base, model.score([swapped]).values[0])
    assert not torch.equal(base, model.score([asked]).values[0])


def test_score_does_not_depend_on_company(model: Vlm) -> None:
    documents = [document("caption", i) for i in range(4)]
    batch = model.collate(documents)
    together = model.loss(batch, GENERATOR).sums["text"]
    alone = -sum(v.sum() for v in model.score(documents).values)
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-5)


def test_pictures_of_several_sizes(model: Vlm) -> None:
    wide = Image(pixels=np.zeros((3, 40, 90), np.float32))
    document_ = Document((wide, document("question", 0).pieces[0], Text(text="hello"), Text(text="yes", target=True)))
    assert len(model.score([document_]).values[0]) == 2


def test_language_model_reads_text_only() -> None:
    torch.manual_seed(0)
    lm = Vlm(Vlm.language())
    assert not any(n.startswith("vision") for n, _ in lm.named_parameters())
    assert lm.score([document("read", 0)]).values[0].isfinite().all()
    with pytest.raises(ValueError, match="vision tower"):
        lm.collate([document("question", 0)])


def test_a_picture_to_draw_is_refused(model: Vlm) -> None:
    with pytest.raises(ValueError, match="to draw"):
        model.loss(model.collate([document("draw", 0)]), GENERATOR)
    with pytest.raises(ValueError, match="to draw"):
        model.generate([document("draw", 0)], Sampling(evaluations=1))
