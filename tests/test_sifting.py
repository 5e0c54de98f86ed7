"""Rejection sampling and mining: what is right goes one way, what is wrong another; pairs survive their file."""
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filling import filled

from diptych.alignment.aligner import Aligner
from diptych.alignment.recipe import Align, Ask, Grpo
from diptych.alignment.rewards.judges import PairJudge, PointJudge, Thought, find_template
from diptych.alignment.rewards.mining import RULES, contest
from diptych.alignment.sifting import Preferred, consistent, read_pairs, sift, write_documents, write_pairs
from diptych.cli.common import recipes
from diptych.data.sources import MessagesSource, WorldSource
from diptych.document import Document, Image, Text
from diptych.systems.base import Sampling, System
from diptych.systems.io import save_system
from diptych.systems.table import find
from diptych.training.recipe import Source, load_recipe
from diptych.world.tasks import document

THINKING = ("draw-think", "answer-think", "story-think")


class Replying(System):
    """Says what a function of the question says."""

    def __init__(self, reply: Callable[[Document], str]) -> None:
        super().__init__()
        self.reply, self.seen = reply, list[Document]()

    def default_sampling(self) -> Sampling:
        return Sampling()

    def generate(self, documents: Sequence[Document], sampling: Sampling | None = None, **kwargs: Any
                 ) -> list[Document]:
        self.seen += documents
        return [Document((*d.pieces[:-1], d.pieces[-1].replace(text=self.reply(d))), d.task, d.meta)
                for d in documents]


def thought(first: int, second: int, better: int) -> str:
    return (f"<think> text {first} {second} ; total score : image 1 : {first} ; image 2 : {second} </think> "
            f"<answer> image {better} is better </answer>")


def test_right_wrong_and_right_for_another_reason(tmp_path: Path) -> None:
    documents = [document("draw-think", i, world="one") for i in range(12)]

    def reply(d: Document) -> str:
        better = d.meta["better"]
        kind = d.meta["index"] % 3
        if kind == 0:  # right, and said why
            return thought(*((3, 1) if better == 1 else (1, 3)), better)
        return thought(2, 2, better) if kind == 1 else thought(3, 1, 3 - better)

    model = Replying(reply)
    kept = sift(model, documents, Thought(), keep=consistent, batch=5)
    assert all(p.empty for d in model.seen for p in d.targets), "nothing of the teacher's thoughts is seen"
    assert [d.meta["index"] for d in kept.right] == [0, 3, 6, 9] and kept.unkept == 4 and kept.failed == 0
    assert [d.meta["index"] for d in kept.wrong] == [2, 5, 8, 11]
    assert all(d.pieces[-1].empty for d in kept.wrong) and "total score" in kept.right[0].pieces[-1].text
    assert len(sift(model, documents, Thought()).right) == 8
    kept.write(tmp_path)
    read = MessagesSource(tmp_path / "right.jsonl")
    assert [read.document(i) for i in range(len(read))] == kept.right
    wrong = MessagesSource(tmp_path / "wrong.jsonl")
    assert wrong.document(1) == kept.wrong[1] and wrong.document(1).meta["answer"] == kept.wrong[1].meta["answer"]


def test_thoughts_are_worth_form_and_truth() -> None:
    doc = next(d for i in range(9) if (d := document("draw-think", i)).meta["better"] == 1)
    replies = [thought(3, 1, 1), thought(1, 3, 1), thought(3, 1, 2), "image 1 is better", "image 2 is better"]
    made = [Document((*doc.pieces[:-1], doc.pieces[-1].replace(text=r)), doc.task, doc.meta) for r in replies]
    scores = Thought()([doc] * len(made), made)
    assert [s.value for s in scores] == [2, 2, 1, 1, 0]
    assert [s.parts["supported"] for s in scores] == [1, 0, 0, 0, 0]


def test_judges_of_the_world_are_asked_as_they_were_trained() -> None:
    for task in ("draw-pair", "draw-point", "story-pair", "answer-pair", "answer-point"):
        kind, _, mode = task.partition("-")
        true = document(task, 2, world="few")
        template = find_template(f"world-{task}")
        pictures, words = true.of(Image), true.of(Text)[0].text
        count = 1 if mode == "point" else 2
        if kind == "answer":
            prompt = str(words).partition(" answer")[0]
            asked = Document((pictures[0], Text(text=prompt), Text(role="assistant", target=True)), "question")
            made = [Document((*asked.pieces[:2], asked.pieces[2].replace(text=t))) for t in true.meta["said"]]
        else:
            prompt = str(words).partition(" : ")[2].removesuffix(" ?")
            asked = Document((Text(text=prompt), *(Image(role="assistant", target=True) for _ in pictures[::count])))
            shown = [pictures[i:i + len(pictures) // count] for i in range(0, len(pictures), len(pictures) // count)]
            made = [Document((Text(text=prompt), *(Image(pixels=p.pixels, role="assistant", target=True) for p in s)))
                    for s in shown]
        assert template.ask(asked, *made).pieces == true.prompt().pieces, task
        assert template.read(true.pieces[-1].text) == (true.meta.get("better") or int(true.meta["answer"][-1]))


def shades(values: Sequence[float]) -> tuple[Document, list[Document]]:
    asked = Document((Text(text="a red circle"), Image(role="assistant", target=True)), "draw")
    pictures = [asked.pieces[1].replace(pixels=np.full((3, 8, 8), v, np.float32)) for v in values]
    return asked, [Document((asked.pieces[0], p), "draw") for p in pictures]


def test_rules_of_mining_and_pairs_on_disk(tmp_path: Path) -> None:
    def reply(d: Document) -> str:
        seen = [float(p.pixels[0, 0, 0]) for p in d.of(Image)]
        return f"image {1 if seen[0] > seen[1] else 2} is better" if len(seen) == 2 else \
            f"final score : {1 + round(3 * max(seen[0], 0))}"

    model = Replying(reply)
    pairs, points = PairJudge(model, "world-draw-pair"), PointJudge(model, "world-draw-point")
    asked, made = shades([0.4, 0.3, 0.1, 1.0, 0.5, 0.0])
    [judged] = contest([(asked, made)], pairs, points)
    by = {rule: judged.pair(rule) for rule in RULES}
    assert (by["sift"].chosen, by["sift"].rejected, by["sift"].scores) == (3, 2, (4.0, 1.0))
    assert (by["rank"].chosen, by["rank"].rejected) == (0, 1) and math.isnan(by["rank"].scores[0])
    assert (by["random"].chosen, by["random"].rejected, by["random"].decided) == (0, 1, 0)
    biased = PairJudge(Replying(lambda d: "image 1 is better"), "world-draw-pair", undecided="dropped")
    assert contest([(asked, made)], biased, points)[0].pair("rank") is None
    assert all("decided" in s.failure for s in biased([asked] * 2, made[:2]))
    with pytest.raises(ValueError, match="expected rule"):
        judged.pair("best")  # type: ignore[arg-type]
    levels = [d.pieces[1].to_uint8() for d in made]
    exact = [Document((d.pieces[0], Image.from_uint8(v, role="assistant", target=True)), "draw")
             for d, v in zip(made, levels, strict=True)]
    found = [Preferred(exact[3], exact[2], (4.0, 1.0)), Preferred(exact[0], exact[1], (math.nan, math.nan))]
    write_pairs(found, tmp_path / "pairs.jsonl")
    read = read_pairs(tmp_path / "pairs.jsonl")
    assert [(p.chosen, p.rejected) for p in read] == [(p.chosen, p.rejected) for p in found]
    assert read[0].scores == (4.0, 1.0) and math.isnan(read[1].scores[0])


def test_a_judge_is_named_by_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    system = filled(find("vlm")(find("vlm").tiny()))
    save_system(system, tmp_path / "run" / "model")
    by_run, by_folder = (PointJudge(str(p), "world-draw-point") for p in (tmp_path / "run", tmp_path / "run" / "model"))
    assert by_run.ask.name == by_folder.ask.name == PointJudge(system, "world-draw-point").ask.name
    with pytest.raises(FileNotFoundError, match="expected weights"):
        PointJudge(str(tmp_path / "none"))


def test_alignment_asks_the_documents_of_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    system = filled(find("vlm")(find("vlm").tiny())).eval()
    rows = [document("draw-think", i, world="one").prompt() for i in (5, 8)]
    write_documents(rows, tmp_path / "wrong.jsonl")
    align = Align(tasks={"draw-think": Ask(reward="thought")}, documents=str(tmp_path / "wrong.jsonl"), group=3,
                  prompts=2, iterations=1, lr=1e-3, grpo=Grpo(beta=0.04, clamp=10.0, unbiased=True),
                  sampling={"text": {"temperature": 1.0, "max_tokens": 4}})
    aligner = Aligner(align, system, tmp_path / "run")
    asked, _, _ = aligner.ask()
    assert sorted({d.meta["index"] for d in asked}) == [5, 8] and len(asked) == 6
    line = aligner.iterate()
    assert line["failed"] == 0 and "kl" in line
    other = Aligner(Align(**{**vars(align), "tasks": {"story-think": Ask(reward="thought")}}), system, tmp_path / "b")
    with pytest.raises(ValueError, match="got one of 'draw-think'"):
        other.iterate()


def test_a_world_can_be_a_finite_source() -> None:
    few, endless = WorldSource("one", {"draw-pair": 1}, size=3), WorldSource("one", {"draw-pair": 1})
    assert len(few) == 3 and few.document(2) == endless.document(2)
    with pytest.raises(IndexError):
        few.document(3)
    with pytest.raises(ValueError, match="for a world only"):
        Source(messages="a.jsonl", documents=3)


def test_recipes_of_judges_name_tasks_that_exist() -> None:
    for name in ("judge", "judge-think"):
        for source in load_recipe(recipes()[name]).data:
            assert all(document(task, 0, world=str(source.world)).targets for task in source.tasks)
    assert load_recipe(recipes()["judge-right"]).data[0].messages == "runs/judge-sifted/right.jsonl"
