from collections import Counter

import pytest

from diptych.world.language import caption
from diptych.world.programs import answer, parse, run
from diptych.world.sample import SPLITS, find_world, stream
from diptych.world.scene import Scene
from diptych.world.talks import KINDS, sample_talk
from diptych.world.tasks import document

MINI = find_world("mini")
TALKS = [sample_talk(MINI, stream(MINI, "talk", "train", i)) for i in range(250)]


@pytest.mark.parametrize("split", SPLITS)
def test_every_turn_is_true_of_its_scene(split: str) -> None:
    for index in range(40):
        doc = document("talk", index, split=split)
        scene = Scene.from_dict(doc.meta["scene"])
        targets = doc.targets
        assert len(targets) == len(doc.meta["turns"]) >= 1
        for piece, turn in zip(targets, doc.meta["turns"], strict=True):
            program = parse(turn["program"])
            if "answer" in turn:
                assert piece.text == turn["answer"] == answer(program, scene)
            else:
                assert run(program, scene).id == turn["target"] and piece.boxes.shape == (1, 4)


def test_turns_differ_and_are_many() -> None:
    for _, turns in TALKS:
        assert len({t.text for t in turns}) == len(turns)
    assert sum(len(t) for _, t in TALKS) > 4.5 * len(TALKS)
    found = {t.kind for _, turns in TALKS for t in turns}
    assert set(KINDS) - {"refer"} <= found and "attributes" in found and "relation" in found


def test_yes_and_no_are_balanced_and_numbers_are_not_all_one() -> None:
    answers = Counter(t.answer for _, turns in TALKS for t in turns if t.answer in ("yes", "no"))
    assert 0.4 < answers["yes"] / answers.total() < 0.6
    numbers = Counter(t.answer for _, turns in TALKS for t in turns if t.kind == "count")
    assert numbers["one"] / numbers.total() < 0.6 and len(numbers) >= 4


def test_training_talks_never_name_a_held_out_pair() -> None:
    held = [f"{c} {s}" for c, s in MINI.held_out_pairs]
    texts = [t.text for _, turns in TALKS for t in turns]
    assert not [t for t in texts if any(h in t for h in held)]


def test_held_out_wording_is_new() -> None:
    def opening(template: str) -> set[str]:
        talks = [sample_talk(MINI, stream(MINI, "talk", "test", i), template=template)[1] for i in range(60)]
        return {" ".join(t.text.split()[:3]) for turns in talks for t in turns}

    known = ("how many", "what color is", "where is the", "find the")
    assert not {o for o in opening("held_out") if o.startswith(known)}


def test_a_quiz_is_a_description_with_questions_only() -> None:
    doc = document("quiz", 4)
    assert {p.kind for p in doc} == {"text"} and doc.pieces[0].text == caption(Scene.from_dict(doc.meta["scene"]))
    assert all("answer" in t for t in doc.meta["turns"]) and len(doc.pieces) == 1 + 2 * len(doc.meta["turns"])
