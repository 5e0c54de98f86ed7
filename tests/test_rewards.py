"""Rewards of the world, what every record says, combinations, caches, the table."""
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.alignment.rewards import table
from diptych.alignment.rewards.base import Facts, Failure, Rating, Reward, Score, check_independent, content_hash, gains
from diptych.alignment.rewards.cache import Cached
from diptych.alignment.rewards.combine import Combined, Term
from diptych.alignment.rewards.world import Caption, SceneScore
from diptych.benchmarks.world import find_suite
from diptych.document import Boxes, Document, Image, Text
from diptych.world import tasks
from diptych.world.language import LEVELS, caption, describe, draw_prompt
from diptych.world.mentions import mentioned
from diptych.world.render import render
from diptych.world.sample import Stream, find_world, sample_scene
from diptych.world.scene import Object, Scene

WORLD = find_world("mini")


def asked(task: str, index: int = 0) -> Document:
    return tasks.document(task, index)


def filled(document: Document, **content: Any) -> Document:
    """With this content in every target."""
    return Document(tuple(p.replace(**content) if p.target else p for p in document), document.task, document.meta)


def blank() -> np.ndarray:
    return np.full((3, 64, 64), 245 / 127.5 - 1, np.float32)


def drawn(document: Document, scene: Scene) -> Document:
    return filled(document, pixels=render(scene, 64))


class Fixed(Reward):
    """Gives the number that was said."""

    def __init__(self, name: str = "fixed", low: float = 0.0, high: float = 10.0, sign: int = 1, **facts: Any) -> None:
        self._facts = Facts(name=name, about="", low=low, high=high, sign=sign, **facts)
        self.calls = 0

    @property
    def facts(self) -> Facts:
        return self._facts

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        self.calls += len(made)
        said = [m.of(Text)[-1].text for m in made]
        return [Failure("silence") if s == "?" else Rating(float(s)) for s in said]


def said(*texts: str | None) -> tuple[list[Document], list[Document]]:
    true = [Document((Text(text="how many"), Text(text="1", role="assistant", target=True)))] * len(texts)
    return true, [filled(true[0], text=t) for t in texts]


@pytest.mark.parametrize("name, task", [("exact", t) for t in ("draw", "question", "caption", "edit", "refer", "layout",
                                                               "story")]
                         + [("scene", "draw"), ("colors", "draw"), ("reconstruction", "draw"),
                            ("reconstruction", "edit"), ("answer", "question"), ("answer", "talk"), ("box", "refer"),
                            ("box", "plan"), ("caption", "caption")])
def test_the_truth_gets_the_best_value_and_nothing_the_worst(name: str, task: str) -> None:
    reward = table.make(name)
    documents = [asked(task, i) for i in range(3)]
    # the truth is found whether the document still holds it or its targets are empty
    for given in (documents, [d.prompt() for d in documents]):
        for score in reward(given, documents):
            least = 0.9 if name in ("colors", "reconstruction") else 1.0
            assert least <= score.value <= 1 and not score.failure and score.seconds > 0, (name, task, score)
    missing = reward(documents, [d.prompt() for d in documents])
    assert [s.value for s in missing] == [reward.facts.worst] * 3 and missing[0].parts == {"missing": 1.0}
    wrong = [_spoiled(d) for d in documents]
    assert all(s.value < 0.35 for s in reward(documents, wrong)), (name, task)


def _spoiled(document: Document) -> Document:
    empty: dict[type, dict[str, Any]] = {Image: {"pixels": blank()}, Text: {"text": "nothing"},
                                         Boxes: {"boxes": np.array([[0, 0, 0.02, 0.02]]), "labels": ()}}
    return Document(tuple(p.replace(**empty[type(p)]) if p.target else p for p in document), document.task,
                    document.meta)


def scene(*objects: tuple[str, str, int, int], ground: str = "white") -> Scene:
    return Scene(objects=tuple(Object(id=i, shape=s, color=c, size="large", radius=480, x=x, y=y)
                               for i, (c, s, x, y) in enumerate(objects)), background=ground)


def drawing(text_items: list[dict[str, Any]], **spec: Any) -> Document:
    meta = {"world": "mini", "spec": {"items": text_items, "relations": [], "background": None, "closed": True, **spec}}
    return Document((Text(text="draw"), Image(role="assistant", target=True, size=(64, 64))), "draw", meta)


def test_scene_score_grades_numbers_then_attributes() -> None:
    """Two red circles and a blue star are asked for."""
    def item(count: int, color: str, shape: str) -> dict[str, Any]:
        return {"count": count, "color": color, "shape": shape, "size": None, "texture": None, "place": None}

    question = drawing([item(2, "red", "circle"), item(1, "blue", "star")])
    a, b, c, d = (("red", "circle", 800, 800), ("red", "circle", 3200, 800), ("blue", "star", 800, 3200),
                  ("green", "circle", 3200, 3200))
    made = [drawn(question, scene(*o)) for o in ((a, b, c), (a, c), (a, b, c, d), (a, d, c))]
    first, one, three, green = SceneScore()([question] * 4, made)
    assert first.value == 1
    # 1 - |1 - 2| / 2 circles, their colour not credited; the star right; nothing else
    assert one.parts["count"] == pytest.approx(0.75) and one.parts["color"] == pytest.approx(0.5)
    assert one.value == pytest.approx((0.5 + 1 + 0 + 1 + 1) / 5)
    assert three.parts["count"] == pytest.approx((0.5 + 1) / 2) and three.parts["extra"] == pytest.approx(3 / 4)
    assert green.parts["count"] == 1 and green.parts["color"] == pytest.approx((0.5 + 1) / 2)
    [free] = SceneScore(gated=False)([question], made[1:2])
    assert free.parts["color"] > one.parts["color"] and free.value > one.value
    assert SceneScore().identity != SceneScore(gated=False).identity


def test_boxes_too_many_cost_as_much_as_too_few() -> None:
    reward, document = table.make("box"), asked("refer")
    [box] = [p.boxes for p in document.of(Boxes)]
    [one, two] = reward([document] * 2, [document, filled(document, boxes=np.concatenate([box, box + 0.3]))])
    assert one.value == 1 and two.value == pytest.approx(0.5, abs=1e-6)


def test_caption_recall_grows_with_what_is_said_and_falls_with_lies() -> None:
    document = asked("caption", 3)
    true = Scene.from_dict(document.meta["scene"])
    texts = ["", describe(true, "short", Stream("s"))[0], describe(true, "long", Stream("l"))[0],
             describe(true, "structured", Stream("x"))[0], caption(true).replace(true.objects[0].color, "gray")]
    values = [s.value for s in Caption()([document] * 5, [filled(document, text=t) for t in texts])]
    assert values[0] == 0 < values[1] < values[2] == values[3] == 1 and values[4] < 1
    padded = filled(document, text=caption(true) + " . ten large red stars at the top left")
    [recall], [f1] = Caption()([document], [padded]), Caption("f1")([document], [padded])
    assert recall.value == 1 and f1.value < 0.9 and recall.parts["mentioned"] == len(true.objects) + 10


def test_mentions_are_the_claims_of_every_wording() -> None:
    for i in range(40):
        s, template = sample_scene(WORLD, Stream("mentions", i)), ("train", "held_out")[i % 2]
        told = [describe(s, level, Stream(level, i), template) for level in LEVELS]
        for text, spec in [*told, draw_prompt(s, Stream("draw", i), template)]:
            found = mentioned(f"please draw {text}")
            # no word says "solid"
            wanted = [json.dumps({**vars(item), "texture": None}) for item in spec.items]
            assert sorted(json.dumps(dict(vars(item))) for item in found.items) == sorted(wanted), text
            assert found.background == spec.background, text
    assert mentioned("draw the objects in these boxes").items == ()


def test_a_shifted_object_and_another_background_are_less_alike() -> None:
    reward, true = table.make("reconstruction"), scene(("red", "circle", 800, 800), ("blue", "star", 3200, 3200))
    document = drawing([])
    document = Document(document.pieces, "draw", {**document.meta, "scene": true.to_dict()})
    far = true.replace(objects=tuple(o.replace(x=4096 - o.x) for o in true.objects))
    ground = true.replace(background="black")
    less = true.replace(objects=true.objects[:1])
    best, *others = (s.value for s in reward([document] * 4, [drawn(document, s) for s in (true, far, ground, less)]))
    assert best > 0.95 and all(v < best - 0.05 for v in others)
    picture = Document((Image(pixels=render(true, 64)), Image(role="assistant", target=True)), "draw",
                       {"world": "mini"})
    [seen] = reward([picture], [filled(picture, pixels=render(true, 64))])
    assert seen.value == 1  # without a scene, what the picture shows


def test_missing_facts_are_named() -> None:
    document = asked("draw")
    with pytest.raises(ValueError, match="spec, world in the meta"):
        table.make("scene")([Document(document.pieces)], [Document(document.pieces)])
    with pytest.raises(ValueError, match="one answer for each document"):
        table.make("scene")([document], [])
    assert table.make("box")([asked("draw")], [asked("draw")])[0].failure == "no boxes were asked for"


# -- records and independence -----------------------------------------------------------------------------------------

def test_records_hold_a_value_or_why_there_is_none() -> None:
    true, made = said("3", "?", None)
    scores = Fixed()(true, made)
    assert [s.failure for s in scores] == ["", "silence", ""] and math.isnan(scores[1].value)
    assert scores[0].value == 3 and scores[2].parts == {"missing": 1.0}
    for score in scores[:1] + scores[2:]:
        assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score
    assert Score.from_dict(json.loads(json.dumps(scores[1].to_dict()))).failure == "silence"
    lower = Fixed(sign=-1)
    assert gains(lower, lower(true, made))[0] == -3 and lower(true, made)[2].value == 10  # the worst is the highest
    with pytest.raises(ValueError, match="between 0.0 and 10.0, got 11"):
        Fixed()(*said("11"))
    with pytest.raises(ValueError, match="why there is none"):
        Score(value=math.nan)


def test_the_reward_is_never_the_metric() -> None:
    draw = find_suite("draw")
    check_independent(table.make("scene"), draw)
    check_independent(table.make("scene"), "clip-text zoo/clip")
    for reward in (table.make("exact"), Combined([Term(reward=table.make("exact")), Term(reward=table.make("scene"))]),
                   Cached(table.make("exact"))):
        with pytest.raises(ValueError, match="a metric that is not the reward, got suite/draw"):
            check_independent(reward, draw)
    with pytest.raises(ValueError, match="got scene as both"):
        check_independent(table.make("scene"), SceneScore(gated=False))
    with pytest.raises(ValueError, match="suite/question"):
        check_independent(table.make("answer"), find_suite("question"))


# -- combinations -----------------------------------------------------------------------------------------------------

def test_combinations_turn_scale_and_weigh() -> None:
    up, down = Fixed("up", 0, 10), Fixed("down", 0, 20, sign=-1)
    true, made = said("4", "?", "10")
    summed = Combined([Term(reward=up, weight=2.0), Term(reward=down, weight=0.5, scale="none")])
    a, b, c = summed(true, made)
    assert a.value == pytest.approx(2 * 0.4 - 0.5 * 4) and c.value == pytest.approx(2 - 5)
    assert a.parts == {"up": 4, "down": 4} and b.failure == "up: silence; down: silence"
    assert (summed.facts.low, summed.facts.high) == (-10, 2) and summed.facts.fixed
    product, least = Combined([Term(reward=up), Term(reward=down)], "product"), Combined(
        [Term(reward=up), Term(reward=down)], "min")
    assert product(true, made)[0].value == pytest.approx(0.4 * 0.8) and least(true, made)[0].value == pytest.approx(0.4)
    both = Combined([Term(reward=up, scale="batch")])(*said("2", "4", "6"))
    assert [round(s.value, 3) for s in both] == [-1.225, 0, 1.225]
    assert not Combined([Term(reward=up, scale="batch")]).facts.fixed
    with pytest.raises(ValueError, match="different names"):
        Combined([Term(reward=up), Term(reward=up)])
    with pytest.raises(ValueError, match='scale "range" and weight 1 for the product'):
        Combined([Term(reward=up, scale="none")], "product")
    with pytest.raises(ValueError, match="finite range"):
        Term(reward=Fixed("open", 0, math.inf))


# -- caches -----------------------------------------------------------------------------------------------------------

def test_a_cache_asks_once_and_survives(tmp_path: Path) -> None:
    path, inner = tmp_path / "scores.jsonl", Fixed()
    cache = Cached(inner, path)
    first = cache(*said("3", "3", "?"))
    assert inner.calls == 2 and [s.cached for s in first] == [False, True, False] and first[0].seconds > 0
    again = Cached(inner, path)
    scores = again(*said("3", "5", "?"))
    assert inner.calls == 4 and scores[0].cached and scores[0].seconds == 0 and not scores[1].cached  # failures retried
    assert (again.asked, again.found) == (3, 1)
    # a run that was killed inside a line loses that line only
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    after = Cached(inner, path)
    assert len(after.known) == 1 and path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    assert [s.cached for s in after(*said("3", "5"))] == [True, False]
    assert path.read_bytes().count(b"\n") == 3 and not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="expected records of scene"):
        Cached(table.make("scene"), path)
    with pytest.raises(ValueError, match="whose values stay"):
        Cached(Fixed(fixed=False))


def test_hashes_see_every_bit() -> None:
    document = asked("draw")
    nudged = document.of(Image)[0].pixels.copy()
    nudged[0, 0, 0] += 1e-7 if nudged[0, 0, 0] == 0 else np.spacing(nudged[0, 0, 0])
    others = [filled(document, pixels=nudged), document.prompt(), Document(document.pieces, "edit", document.meta),
              Document(document.pieces, document.task, {**document.meta, "index": 9}), asked("draw", 1)]
    assert len({content_hash(d) for d in (document, *others)}) == 6
    assert content_hash(document) == content_hash(asked("draw"))
    assert content_hash(document, others[0]) != content_hash(others[0], document)


# -- the table --------------------------------------------------------------------------------------------------------

def test_every_row_states_its_facts_and_the_docs_agree() -> None:
    for name in table.TABLE:
        assert table.find(name).FACTS.name == name
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    assert table.markdown() in page, "docs/rewards.md: put in what diptych.alignment.rewards.table.markdown() gives"
    with pytest.raises(ValueError, match="did you mean 'scene'"):
        table.find("scenes")
