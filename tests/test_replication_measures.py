from pathlib import Path

import pytest
import torch

from diptych import zoo
from diptych.document import Document, Image
from diptych.replication import measures
from diptych.replication.study import Arm, Context
from diptych.systems.bagel import Bagel
from diptych.systems.io import load_system, save_system
from diptych.training.recipe import Recipe, Stage
from diptych.world import tasks

CONTEXT = Context(arm=Arm(name="a", about=""), recipe=Recipe(system="bagel", stages=(Stage(steps=1, batch=1, lr=0.0),)),
                  seed=0, folder=Path())


@pytest.fixture(scope="module")
def bagel() -> Bagel:
    torch.manual_seed(0)
    return Bagel(Bagel.tiny()).eval()


def test_suites_give_one_number_per_figure(bagel: Bagel) -> None:
    found = measures.suites(bagel, CONTEXT, ["question", "draw"], n=2, splits=("test", "pairs"))
    assert {"question", "draw", "draw/pairs", "draw: color", "draw/pairs: mean GFLOP"} <= set(found)
    assert 0 <= found["draw: color"] <= 1


def test_held_out_losses_are_repeatable_and_by_term(bagel: Bagel) -> None:
    first = measures.held_out_losses(bagel, CONTEXT, ["caption", "draw"], n=5, batch=3)
    assert set(first) >= {"caption/text", "draw/image"}
    assert first == measures.held_out_losses(bagel, CONTEXT, ["caption", "draw"], n=5, batch=3)
    assert first != measures.held_out_losses(bagel, CONTEXT, ["caption", "draw"], n=5, batch=3, split="train")


def test_every_document_has_a_row_of_its_own(bagel: Bagel) -> None:
    documents = [tasks.document(name, 1, world="few") for name in ("caption", "draw", "question")]
    batch = measures.a_row_each(bagel, documents)
    assert batch.page.tokens.shape[0] == 3
    for row, document in enumerate(documents):
        alone = bagel.lay_out([bagel.write(document)]).page
        count = alone.tokens.shape[1]
        assert torch.equal(batch.page.ids[row, :count], alone.ids[0])
        assert int(batch.page.tokens.valid()[row].sum()) == count


def test_a_readout_finds_what_features_hold_and_nothing_else() -> None:
    tower = zoo.load("clip")
    known = measures.readout(tower.features, CONTEXT, train=150, test=60)
    assert known["readout: color"] > 0.7 and known["readout: shape"] > 0.5
    nothing = measures.readout(lambda images: torch.zeros(len(images), 4), CONTEXT, train=150, test=60)
    assert nothing["readout: color"] < 0.4 and nothing["readout"] < 0.4


def test_a_probe_reads_features_that_no_picture_gave() -> None:
    """The mean of the features of red pictures still says red."""
    tower, known = zoo.load("clip"), measures.singles(60, split="test")
    guess = measures.probe(tower.features, CONTEXT, train=150)
    with torch.no_grad():
        features = tower.features(known.images)
    guesses = guess(features)
    assert set(guesses) == {"color", "shape", "place"} and all(v.shape == (60,) for v in guesses.values())
    assert (guesses["color"] == known.labels["color"]).float().mean() > 0.7
    red = features[known.labels["color"] == known.labels["color"][0]].mean(0, keepdim=True)
    assert guess(red)["color"].tolist() == [int(known.labels["color"][0])]


def test_a_change_of_answers_is_found(bagel: Bagel, tmp_path: Path) -> None:
    save_system(bagel, tmp_path)
    assert measures.change_of_answers(bagel, CONTEXT, tmp_path, n=2) == 0
    changed = load_system(tmp_path)
    with torch.no_grad():
        changed.head.weight.add_(0.1 * torch.randn(changed.head.weight.shape))  # type: ignore[union-attr, arg-type]
    assert measures.change_of_answers(changed, CONTEXT, tmp_path, n=2) > 1e-3


def test_a_quick_run_measures_few_items() -> None:
    from dataclasses import replace

    assert CONTEXT.items(200) == 200 and replace(CONTEXT, quick=True).items(200) == 8


def test_drawings_are_measured_before_shapes_are_recognised() -> None:
    true = [tasks.document("draw", i, split="test", world="few") for i in range(40)]
    same = measures.drawings([(d, d) for d in true])
    assert same["draw: FID"] < 1e-6 and same["draw: likeness"] > 0.999 and same["draw: colors shown"] > 0.95
    blurred = []
    for document in true:
        [image] = document.of(Image)
        soft = torch.nn.functional.avg_pool2d(torch.from_numpy(image.pixels)[None], 9, 1, 4, count_include_pad=False)
        blurred.append((document, Document((document.pieces[0], image.replace(pixels=soft[0].numpy())), "draw")))
    found = measures.drawings(blurred)
    assert found["draw: colors shown"] > 0.4 and found["draw: FID"] > 0.01, "colours are there, shapes are not"
    others = measures.drawings(list(zip(true, true[1:] + true[:1], strict=True)))
    assert others["draw: colors shown"] < 0.35 and others["draw: likeness"] < found["draw: likeness"]
    assert others["draw: FID"] < found["draw: FID"], "the right pictures in the wrong places"
