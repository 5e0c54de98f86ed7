"""SRUM: maps, the weighted loss, judgements of drawings, and the same weights in the losses of systems."""
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diptych.adapters import parity, srum
from diptych.alignment import reward_map, self_reward
from diptych.alignment.reward_map import Region, bounded, clip_box, factors, token_map, weighted_loss
from diptych.alignment.self_reward import Judged, judge, oracle, own_boxes, patch_boxes, seen_boxes, true_boxes
from diptych.document import Boxes, Document, Image, Text
from diptych.systems.bagel import Bagel
from diptych.systems.base import Losses, Sampling, System
from diptych.systems.harmon import Harmon
from diptych.systems.janus import Janus
from diptych.systems.packed import Packed
from diptych.world import tasks
from diptych.world.render import render
from diptych.world.scene import Scene

GOLDEN = Path(__file__).parent / "goldens" / "srum"


class Saying(System):
    """Gives its replies in order, the last for ever."""

    def __init__(self, *replies: Any) -> None:
        super().__init__()
        self.replies, self.asked = list(replies), list[Document]()

    def generate(self, documents: Sequence[Document], sampling: Sampling | None = None, **kwargs: Any
                 ) -> list[Document]:
        out = []
        for d in documents:
            self.asked.append(d)
            said = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
            name = "boxes" if isinstance(d.pieces[-1], Boxes) else "text"
            out.append(Document((*d.pieces[:-1], d.pieces[-1].replace(**{name: said}))))
        return out


def drawing(index: int = 0, **changes: Any) -> Document:
    """A true drawing of the world with 2 objects or more, or one of a changed scene."""
    found = [d for i in range(40) if len((d := tasks.document("draw", i)).meta["scene"]["objects"]) > 1][index]
    if not changes:
        return found
    scene = Scene.from_dict(found.meta["scene"])
    first = scene.objects[0].replace(**changes)
    pixels = render(scene.replace(objects=(first, *scene.objects[1:])), 64)
    return Document((found.pieces[0], found.pieces[1].replace(pixels=pixels)), "draw", found.meta)


# -- maps and the loss ------------------------------------------------------------------------------------------------

def test_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = parity.run("srum", GOLDEN)
    assert len(cases) == 39 and all(c.passed for c in cases)
    monkeypatch.setattr(reward_map, "LAMBDA", 0.0)
    monkeypatch.setattr("diptych.adapters.srum_cases.token_map", lambda m, grid: token_map(m, grid) + 1e-4)
    failed = {c.name for c in parity.run("srum", GOLDEN) if not c.passed}
    assert "loss.token_rewards" in failed and "loss.released.mse" in failed and "map.overlap" not in failed


def test_maps_of_both_modes() -> None:
    regions = [Region(box=(0, 0, 4, 4), score=0.9), Region(box=(4, 4, 8, 8), score=-0.8),
               Region(box=(5, 5, 7, 7), score=0.4)]
    released = reward_map.reward_map(regions, 0.6, (8, 8))
    assert released[0, 0] == pytest.approx(0.76) and released[0, 7] == released[7, 7] == pytest.approx(0.4)
    assert released[6, 6] == pytest.approx(0.56)
    signed = reward_map.reward_map(regions, 0.6, (8, 8), "paper_signed")
    assert signed[0, 7] == 0 and signed[7, 7] == pytest.approx(-0.64) and signed[6, 6] == pytest.approx(0.32)
    assert reward_map.reward_map(regions, -1.0, (8, 8), "paper_signed").abs().max() == 0  # no sign flips twice
    assert token_map(released, (2, 2))[0] == pytest.approx(0.76) and token_map(released, (8, 8))[0] == released[0, 0]
    assert clip_box(["1", "2.9", 99, -1], (8, 8)) is None and clip_box(["1", "2.9", 99, 4], (8, 8)) == (1, 2, 8, 4)
    assert clip_box([1, 2, 3], (8, 8)) is None and clip_box([float("nan")] * 4, (8, 8)) is None


@pytest.mark.parametrize("apart", [False, True])
def test_bounded_weights_keep_the_loss_from_falling_for_ever(apart: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    data, noise, other = (torch.randn(6, 4, generator=generator) for _ in range(3))
    weights, reference = torch.tensor([0.2, 0.0, -0.3, -1.0, -1.0, -1.0]), other if apart else None

    def at(scale: float, own: torch.Tensor) -> float:
        return float(weighted_loss(scale * torch.ones(6, 4), data, noise, own, 0.5, reference).total)

    safe = bounded(weights, 0.5, apart=apart)
    assert at(1e4, weights) < 0 > at(1e3, weights) > at(1e4, weights)
    assert at(1e4, safe) > at(1e3, safe) > at(1, safe) - 1
    assert torch.equal(safe[:3], weights[:3]) and factors(weights, 0.5).min() == 0
    plain = weighted_loss(data, data, noise, safe, 0.5)
    assert plain.total == pytest.approx(float(((safe + 0.5) * noise.square().mean(-1)).mean()))


# -- the same weights in systems --------------------------------------------------------------------------------------

def loss(system: Packed, documents: list[Document], emphasis: list[torch.Tensor | None] | None) -> Losses:
    batch = system.collate(documents, emphasis)
    with torch.no_grad():
        return system.loss(batch.to("cpu"), torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cls", [Bagel, Janus])
def test_tokens_of_drawings_weigh_what_their_map_says(cls: Any) -> None:
    torch.manual_seed(0)
    system: Any = cls(replace(cls.tiny(), drop_text=0.0))
    documents = [tasks.document("draw", 1), tasks.document("caption", 0), tasks.document("draw", 0)]
    plain = loss(system, documents, None)
    judged = oracle(documents[0])
    made = self_reward.emphasis(system, documents[0], judged)
    count = len(made)
    assert 0.5 <= made.min() < made.max() <= 1.5
    ones = loss(system, documents, [torch.ones(count), None, None])
    assert torch.equal(ones.sums["image"], plain.sums["image"]) and torch.equal(ones.sums["text"], plain.sums["text"])
    twice = loss(system, documents, [torch.full((count,), 2.0), None, torch.full((count,), 2.0)])
    torch.testing.assert_close(twice.sums["image"], 2 * plain.sums["image"])
    assert torch.equal(twice.counts["image"], plain.counts["image"])
    # the factors of a document meet its own tokens, wherever packing puts them
    kept = [loss(system, documents, [torch.zeros(count) if i == n else None for i in range(3)]).sums["image"]
            for n in (0, 2)]
    torch.testing.assert_close(kept[0] + kept[1], plain.sums["image"])
    if cls is Janus:
        alone = loss(system, documents[2:], None).sums["image"]
        torch.testing.assert_close(kept[0], alone, rtol=1e-5, atol=1e-4)
    first = torch.zeros(count)
    first[0] = 1.0
    assert 0 < float(loss(system, documents, [first, None, torch.zeros(count)]).sums["image"]) < float(kept[1])
    with pytest.raises(ValueError, match=f"expected a factor for every token of a drawn picture, got 3 for {count}"):
        loss(system, documents, [torch.ones(3), None, None])
    with pytest.raises(ValueError, match="one drawing where its tokens are weighted, got 0"):
        loss(system, documents, [None, torch.ones(count), None])


def test_emphasis_follows_the_picture_and_refuses_what_it_cannot_weigh() -> None:
    torch.manual_seed(0)
    system = Bagel(Bagel.tiny())
    document = drawing()
    region = Region(box=(32, 0, 64, 32), score=1.0)
    signed = self_reward.emphasis(system, document, Judged(prompt="", regions=(region,), overall=1.0),
                                  mode="paper_signed", strength=0.5)
    rows, columns = system.grid(system.views(torch.zeros(3, 64, 64))[1])
    made = signed.view(rows, columns)
    assert made[0, -1] == pytest.approx(1.5) and made[0, 0] == made[-1, -1] == pytest.approx(0.5)
    bad = self_reward.emphasis(system, document, Judged(prompt="", regions=(replace(region, score=-1.0),), overall=1.0),
                               mode="paper_signed", strength=0.5)
    assert bad.view(rows, columns)[0, -1] == 0
    wide = Document((document.pieces[0], document.pieces[1].replace(pixels=np.zeros((3, 128, 128), np.float32))))
    scaled = self_reward.emphasis(system, wide, Judged(prompt="", regions=(Region(box=(64, 0, 128, 64), score=1.0),),
                                                       overall=1.0), mode="paper_signed")
    torch.testing.assert_close(scaled, signed, atol=0.06, rtol=0)  # the map is scaled as the picture is
    with pytest.raises(ValueError, match="score of the whole other than 0"):
        self_reward.emphasis(system, document, Judged(prompt="", overall=0.0))
    with pytest.raises(ValueError, match="weighs the tokens of a picture, got Harmon"):
        self_reward.emphasis(Harmon(Harmon.tiny()), document, Judged(prompt="", overall=1.0))


# -- boxes and judgements ---------------------------------------------------------------------------------------------

def test_boxes_of_every_source_agree() -> None:
    for index in range(3):
        document = drawing(index)
        true, seen, patches = true_boxes(document), seen_boxes(document), patch_boxes(document)
        assert len(true) == len(seen) == len(patches)
        for a, *others in zip(true, seen, patches, strict=True):
            assert all(abs(x - y) <= 2 for b in others for x, y in zip(a, b, strict=True))
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in true]
        assert areas == sorted(areas, reverse=True) and true_boxes(document, 1) == true[:1]
    said = Saying(np.array([[0, 0, 0.25, 0.25], [0.5, 0.5, 1, 1], [0.9, 0.2, 0.1, 0.3]], np.float32))
    assert own_boxes(said, [document], ["where is it ?"]) == [[(32, 32, 64, 64), (0, 0, 16, 16)]]
    assert said.asked[0].of(Text)[0].text == "where is it ?"


def test_the_oracle_sees_what_is_wrong() -> None:
    assert {r.score for r in oracle(drawing()).regions} == {1.0} and oracle(drawing()).overall == 1.0
    document = drawing()
    first = Scene.from_dict(document.meta["scene"]).objects[0]
    wrong = drawing(color=next(c for c in ("red", "green") if c != first.color))
    judged = oracle(wrong)
    assert min(r.score for r in judged.regions) < 0.7 < max(r.score for r in judged.regions)
    elsewhere = oracle(document, [*seen_boxes(document), (0, 0, 1, 1)])
    assert elsewhere.regions[-1].score == -1


REGION = "<think>Score: 0\n\nRegion ID: 1\nScore: 1</think>\n**Region ID:** 1\n**Identified Object:** hat\n" \
         "**Score:** {}\nReason: a score of 3: fine"


def test_judgements_are_read_strictly_and_asked_again() -> None:
    document, boxes = drawing(), [[(0, 0, 8, 8), (8, 8, 16, 16)]]
    both = REGION.format(".5") + "\n\nRegion ID: 2\nScore: -1/1"
    [judged] = judge(Saying(both, "Composition Analysis: x\nScore: 0.25"), [document], boxes)
    assert [r.score for r in judged.regions] == [0.5, -1] and judged.overall == 0.25 and judged.usable
    assert judged.regions[0].name == "hat" and judged.regions[0].box == (0, 0, 8, 8)
    model = Saying("no", REGION.format("1"), "well", "Score: 7", "Score: 1")
    [again] = judge(model, [document], [[(0, 0, 8, 8)]])
    assert again.regions[0].score == 1 and again.overall == 1 and len(model.asked) == 5
    assert "1: 0, 0, 8, 8" in model.asked[0].of(Text)[0].text
    assert document.of(Text)[0].text in model.asked[-1].of(Text)[0].text
    greedy = Saying("no")
    [none] = judge(greedy, [document], [[(0, 0, 8, 8)]])
    assert none.overall is None and none.regions == () and not none.usable and len(greedy.asked) == 4
    assert self_reward.strict_score("Score: 0.5\nScore: 0.6") is None
    assert self_reward.strict_regions("Region ID: 3\nScore: 1", 2) == {}
    # what only the strict reader reads, and what only the published one does
    assert self_reward.published_regions(REGION.format("1")) == {}
    assert self_reward.published_overall("so: Score: 0.5 of 7, Score: 1").score == 0.5  # type: ignore[union-attr]


def test_records_survive_and_published_ones_are_read(tmp_path: Path) -> None:
    records = [Judged(prompt="a hat", picture="a.png", overall=0.5, regions=(Region(box=(1, 2, 3, 4), score=-0.25),)),
               Judged(prompt="nothing")]
    self_reward.write_records(tmp_path / "r.jsonl", records)
    assert self_reward.read_records(tmp_path / "r.jsonl") == records and not list(tmp_path.glob(".*"))
    judged = {"image_file": "a.png", "prompt": "thoughts", "vlm_rewards": [
        {"identified_object": "hat", "bbox": [1, 2, 30, 4], "score": 0.5}, {"bbox": [0, 0, 9, 9], "score": 1}],
        "global_layout_reward": {"global_layout_score": -0.5}}
    row = srum.formatted(judged, {"a.png": "a hat"})
    assert row is not None and [r["object"] for r in row["vlm_rewards"]] == ["global_layout_reward", "hat"]
    ours = srum.judged(row, (8, 8))
    assert ours == Judged(prompt="a hat", picture="a.png", overall=-0.5,
                          regions=(Region(box=(1, 2, 8, 4), score=0.5, name="hat"),))
    assert isinstance(drawing().of(Image)[0], Image)
