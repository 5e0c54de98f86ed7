"""Chains of documents, documents in pairs, and what is learnt of them."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_aligner import Bright, plainly, tiny

from diptych.alignment.aligner import Aligner, opposites
from diptych.alignment.episodes import FOLLOW, answer, follow_up, redraw, to_go
from diptych.alignment.pairs import Pairs, PairSource, find_medoids, match
from diptych.alignment.policy import act
from diptych.alignment.preference import Preference
from diptych.alignment.recipe import Align, Ask, Grpo, Link
from diptych.alignment.regions import Regions, by_questions
from diptych.alignment.rewards.base import Facts, Rating, Reward
from diptych.alignment.rewards.questions import questions
from diptych.alignment.rewards.table import make
from diptych.document import Boxes, Document, Image, Text
from diptych.systems.base import Sampling, System
from diptych.world.tasks import document

SAMPLING: dict[str, dict[str, Any]] = {
    "janus": {"size": [32, 32], "text": {"temperature": 1.0, "max_tokens": 4}, "codes": {"temperature": 1.0},
              "guidance": {"branches": []}},
    "bagel": {"evaluations": 4, "text": {"temperature": 1.0, "max_tokens": 4}, "guidance": {"branches": []}}}


class Long(Reward):
    FACTS = Facts(name="long", about="characters said", low=0, high=1000)

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Any]:
        return [Rating(float(len(d.of(Text)[-1].text or ""))) for d in made]


def recipe(name: str = "janus", **changes: Any) -> Align:
    return Align(**{"tasks": {"draw": Ask(reward="scene")}, "group": 4, "prompts": 2, "iterations": 4,
                    "sampling": SAMPLING[name], "lr": 2e-3, "freeze": ("codec",)} | changes)


def aligner(folder: Path, name: str = "janus", rewards: Any = None, **changes: Any) -> Aligner:
    return Aligner(recipe(name, **changes), plainly(tiny(name)), folder, rewards=rewards)


# -- chains -----------------------------------------------------------------------------------------------------------

def test_a_question_about_a_drawing_wants_the_most_that_the_prompt_says() -> None:
    """Where it is before what colour it has; how many only where there may be several."""
    kinds: dict[str, set[str]] = {"grid": set(), "mini": set()}
    for world, found in kinds.items():
        for i in range(40):
            drawn = document("draw", i, world=world)
            family, known = answer(drawn, i).meta["family"], {q.kind for q in questions(drawn)}
            found.add(family)
            assert (family == "place") == ("place" in known)
    assert kinds["grid"] == {"place", "color"} and kinds["mini"] >= {"place", "color", "count"}


def test_what_follows_a_drawing_and_a_caption() -> None:
    drawn = document("draw", 3)
    wide = [q for q in questions(drawn) if q.answer not in ("yes", "no")]
    asked, wanted = answer(drawn, 1), wide[1 % len(wide)]
    assert (asked.of(Text)[0].text, asked.of(Text)[1].text, asked.task) == (wanted.text, wanted.answer, "question")
    assert not asked.of(Image)[0].target and np.array_equal(asked.of(Image)[0].pixels, drawn.of(Image)[0].pixels)
    assert make("answer")([asked], [asked])[0].value == 1.0
    told = document("caption", 5)
    again = redraw(told, 0)
    assert [type(p).__name__ for p in again] == ["Text", "Image"] and again.of(Image)[0].empty
    assert again.of(Text)[0].text == told.of(Text)[-1].text, "nothing but the words"
    perfect = Document((again.of(Text)[0], told.of(Image)[0].replace(target=True)), "draw", again.meta)
    assert make("reconstruction")([again], [perfect])[0].value > 0.9
    placed = Document((*told.pieces[:2], told.pieces[2].replace(text="a star at the top left , a heart at the top")),
                      "caption", told.meta)
    assert FOLLOW["redraw-unplaced"](placed, 0).of(Text)[0].text == "a star , a heart"
    for rule in ("answer", "describe"):
        with pytest.raises(ValueError, match="expected"):
            FOLLOW[rule](document("question", 0), 0)
    same = follow_up("answer", [drawn, drawn, drawn], torch.tensor([0, 0, 1]), 7)
    assert same[0].of(Text)[0].text == same[1].of(Text)[0].text, "a group is asked the same"


def test_a_link_is_credited_with_what_comes_after_it() -> None:
    values = torch.tensor([[1.0, 0.0, 2.0], [0.5, 3.0, float("nan")]])
    torch.testing.assert_close(to_go(values), torch.tensor([[1.5, 3.0, torch.nan], [0.5, 3.0, torch.nan]]),
                               equal_nan=True)


def test_a_drawing_learns_from_the_answer_about_it(tmp_path: Path) -> None:
    task = Ask(watch=("scene",), then=(Link(follow="answer", reward="answer"),))
    a = aligner(tmp_path, rewards={"draw > answer": Long()}, tasks={"draw": task})
    asked, groups, seeds = a.ask()
    turns = a.play(asked, groups, seeds)
    assert [len(t) for t in turns] == [8, 8]
    for n in range(8):
        assert np.array_equal(turns[1][n].asked.of(Image)[0].pixels, turns[0][n].made.of(Image)[0].pixels)
        assert turns[0][n].kinds[0] == "code" and turns[1][n].kinds[0] == "text"
    values, told = a.judge(asked, turns)
    assert set(told) == {"reward draw > answer", "scene draw"} and not values[0].any()
    lessons = a.lessons(turns, to_go(values), groups)
    first = {x.trajectory.seed: x.worth for x in lessons if not x.link}
    assert first and sorted(first.values()) == sorted(x.worth for x in lessons if x.link)
    line = a.iterate()
    assert line["answers"] == 16 and {"code", "text"} == set(line["gaps"]) and line["steps"] == 1


def test_links_that_are_not_learnt_from(tmp_path: Path) -> None:
    task = Ask(then=(Link(follow="redraw", reward="reconstruction", learn=False),))
    a = aligner(tmp_path, rewards={"caption > redraw": Bright()}, tasks={"caption": task})
    asked, groups, seeds = a.ask()
    turns = a.play(asked, groups, seeds)
    assert {x.link for x in a.lessons(turns, to_go(a.judge(asked, turns)[0]), groups)} == {0}
    assert set(a.iterate()["gaps"]) == {"text"}


def test_the_metric_is_not_the_reward(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the reward"):
        aligner(tmp_path, tasks={"draw": Ask(reward="scene", watch=("scene",))})
    with pytest.raises(ValueError, match="follow by"):
        recipe(tasks={"draw": Ask(then=(Link(follow="paint", reward="scene"),))})
    with pytest.raises(ValueError, match="learn from"):
        recipe(tasks={"draw": Ask(reward="scene", learn=False)})
    with pytest.raises(ValueError, match="own answers"):
        recipe(offline=True)


# -- other ways to learn ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["janus", "bagel"])
def test_preferred_answers_become_likelier(name: str, tmp_path: Path) -> None:
    a = aligner(tmp_path, name, {"draw": Bright()}, method="dpo", offline=True, group=6, lr=1e-3,
                dpo=Preference(beta=0.1 if name == "janus" else 50.0))
    lines = [a.iterate() for _ in range(2)]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=2e-3), "the reference is the model as it was"
    assert lines[0]["used"] == 4 and all(np.isfinite(v["loss"]) for v in lines)
    asked, groups, seeds = a.ask()
    turns = a.play(asked, groups, seeds)
    found = a.lessons(turns, to_go(a.judge(asked, turns)[0]), groups)
    assert sorted(x.worth for x in found) == [-1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    told = [a.learner.prefer(opposites(found), a.recipe.dpo, 5) for _ in range(4)]
    assert told[-1]["loss"] < told[0]["loss"] and told[-1]["accuracy"] == 1.0


def test_all_own_samples_as_examples(tmp_path: Path) -> None:
    a = aligner(tmp_path, "bagel", {"draw": Bright()}, method="own", group=1, prompts=4)
    assert a.iterate()["used"] == 4
    best = aligner(tmp_path / "best", "bagel", {"draw": Bright()}, method="best")
    assert best.iterate()["used"] == 2


# -- weighed regions --------------------------------------------------------------------------------------------------

class Knowing(System):
    """Answers questions about the world by the facts that it was told."""

    def __init__(self, facts: dict[str, str]) -> None:
        super().__init__()
        self.facts, self.asked = facts, list[str]()

    def generate(self, documents: Sequence[Document], sampling: Sampling | None = None, **kwargs: Any
                 ) -> list[Document]:
        out = []
        for d in documents:
            self.asked.append(text := d.of(Text)[0].text or "")
            last = d.pieces[-1]
            filled = last.replace(boxes=np.array([[0.5, 0.5, 1, 1]], np.float32)) if isinstance(last, Boxes) else (
                last.replace(text=self.facts.get(text, "no")))
            out.append(Document((*d.pieces[:-1], filled), d.task, d.meta))
        return out


def test_a_model_judges_regions_by_its_own_answers() -> None:
    made = document("draw", 3)
    model = Knowing({q.text: q.answer for q in questions(made)})
    [good] = by_questions(model, [made])
    assert good.overall == 1.0 and good.regions and {r.score for r in good.regions} == {1.0}
    assert good.regions[0].box == (32, 32, 64, 64) and any(t.startswith("where is the") for t in model.asked)
    [bad] = by_questions(Knowing({}), [made])
    assert {r.score for r in bad.regions} == {-1.0} and bad.overall is not None and bad.overall < 1


def test_regions_weigh_the_tokens_of_own_drawings(tmp_path: Path) -> None:
    made, model = [document("draw", 3)], tiny("bagel")
    facts = Knowing({q.text: q.answer for q in questions(made[0])})
    found = {parts: Regions(parts=parts).weigh(facts, model, made)[0][1] for parts in ("both", "regions", "whole")}
    assert torch.equal(found["both"], found["regions"]), "a good whole changes nothing"
    assert found["both"].max() == 1.5 and found["both"].min() < 1.1 and len(found["whole"].unique()) == 1
    soft = Regions(mode="released").weigh(Knowing({}), model, made)[0][1]
    assert soft.max() < found["both"].max()
    a = aligner(tmp_path, "bagel", {"draw": Bright()}, method="own", group=1, prompts=4, offline=True,
                regions=Regions(judge="oracle"))
    assert 0 < a.iterate()["used"] <= 4
    with pytest.raises(ValueError, match="examples"):
        recipe(regions=Regions())


# -- pairs ------------------------------------------------------------------------------------------------------------

def test_greedy_matching_uses_every_picture_once() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.95, 0.7, 0.2], [0.5, 0.65, 0.3]])
    assert [(r, c) for r, c, _ in match(similarity, 0.6, 3)] == [(1, 0), (0, 1)]
    assert [(r, c) for r, c, _ in match(similarity, 0.6, 1)] == [(1, 0), (2, 1)]
    assert match(similarity, 0.99, 3) == []


def test_medoids_lie_in_their_clusters() -> None:
    centres = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    noise = 0.05 * torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    rows = torch.nn.functional.normalize(centres.repeat(10, 1) + noise, dim=1)
    found = max((find_medoids(rows, 3, seed) for seed in range(4)), key=lambda f: len({n % 3 for n in f}))
    assert {n % 3 for n in found} == {0, 1, 2}
    for n in found:
        own = rows[n % 3::3]
        centre = own.mean(0)
        assert float(rows[n] @ centre) == pytest.approx(float((own @ centre).max()))


def test_pairs_of_a_question_and_a_drawing(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.nn.functional.normalize(torch.randn(24, 4, generator=generator), dim=1)
    config = Pairs(pool=12, clusters=6, threshold=0.3)
    source = PairSource(config, features=features)
    kinds = {p.question == p.drawing for p in source.pairs}
    assert kinds == {True, False} and len({p.drawing for p in source.pairs}) == len(source.pairs)
    for k in range(2 * len(source.pairs)):
        question, drawing = source.document(2 * k), source.document(2 * k + 1)
        assert (question.task, drawing.task) == ("question", "draw")
        assert question.meta["weight"] == drawing.meta["weight"] and question.meta["pair"] == drawing.meta["pair"]
        pair = source.pairs[question.meta["pair"]]
        if pair.question == pair.drawing:
            assert question.meta["scene"] == drawing.meta["scene"] and question.meta["weight"] == 1.0
            assert make("exact")([drawing], [drawing])[0].value == 1.0, "the words describe the picture"
        else:
            assert question.meta["weight"] == pytest.approx(pair.similarity ** 0.5)
        assert make("answer")([question], [question])[0].value == 1.0
    chance = PairSource(Pairs(pool=12, clusters=6, threshold=0.3, kind="random"), features=features)
    assert sorted(p.question for p in chance.pairs) == sorted(p.question for p in source.pairs)
    assert chance.document(0).meta["weight"] == 1.0 and chance.pairs != source.pairs
    with pytest.raises(ValueError, match="whole pairs"):
        recipe(tasks={"draw": Ask(reward="scene"), "question": Ask(reward="answer")}, pairs=config, prompts=3)
    tasks = {"draw": Ask(reward="scene"), "question": Ask(reward="answer")}
    a = Aligner(recipe(tasks=tasks, pairs=config, prompts=4, group=2), plainly(tiny("janus")), tmp_path, source=source,
                rewards={"draw": Bright(), "question": Long()})
    asked, _, _ = a.ask()
    assert [d.meta["pair"] for d in asked[:4]] == [asked[0].meta["pair"]] * 4
    assert set(a.iterate()["gaps"]) <= {"code", "text"}


def test_weights_of_pairs_scale_advantages(tmp_path: Path) -> None:
    a = aligner(tmp_path, rewards={"draw": Bright()}, grpo=Grpo(largest=100))
    groups, worth = torch.tensor([0, 0, 0, 0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    half, whole = (a._compared(worth, groups, torch.full((4,), w)) for w in (0.5, 1.0))
    torch.testing.assert_close(half, 0.5 * whole)


def test_decisions_of_one_group_are_alone_in_what_they_see(tmp_path: Path) -> None:
    """A chain plays the same for an episode whatever its company."""
    task = Ask(then=(Link(follow="answer", reward="answer"),))
    a = aligner(tmp_path, tasks={"draw": task}, prompts=1)
    asked, groups, seeds = a.ask()
    turns = a.play(asked, groups, seeds)
    alone = act(a.system, [turns[1][2].asked], a.sampling, [turns[1][2].seed])
    assert alone[0].made.of(Text)[-1].text == turns[1][2].made.of(Text)[-1].text
