"""lmms-eval's own runner on a task of the world, where that package is installed."""
import json
from pathlib import Path

import pytest

from diptych.data.images import write_image
from diptych.document import Image, Text
from diptych.world import tasks

pytest.importorskip("lmms_eval", reason="pip install --no-deps lmms-eval, and 'diptych[lmms]'")

TASK = """
task: diptych_world
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: "answer"
{rest}
process_results: !function utils.process_results
metric_list:
  - {{metric: right, aggregation: !function utils.mean, higher_is_better: true}}
"""
ASK = 'generation_kwargs: {max_new_tokens: 24, do_sample: false, until: ["\\n"]}'
UTILS = """
import ast
import json

from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["picture"]).convert("RGB")] if doc["picture"] else []

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def process_results(doc, results):
    said = results[0]
    if said.startswith("{"):
        with Image.open(json.loads(said)["images"][0]) as picture:
            return {"right": float(picture.size == (64, 64))}
    if said.startswith("("):  # the runner writes (log-prob, whether it is the likeliest) as text
        value, likeliest = ast.literal_eval(said)
        return {"right": float(value > -2.0 and likeliest)}
    return {"right": float(said == doc["answer"])}

def mean(values):
    return sum(values) / len(values)
"""
ITEMS = 6


def run(folder: Path, kind: str, rest: str, arguments: str) -> float:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    items = []
    for i in range(ITEMS):
        document = tasks.document("question", i, split="test")
        picture, question, answer = folder / f"{i}.png", document.of(Text)[0].text, document.of(Text)[1].text
        write_image(document.of(Image)[0], picture)
        asked = f"<image> {question}" if "generate" not in arguments else "a red circle in the center"
        items.append({"picture": "" if "generate" in arguments else str(picture), "question": asked, "answer": answer})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "utils.py").write_text(UTILS)
    (folder / "world.yaml").write_text(TASK.format(data=folder / "data.jsonl", kind=kind, rest=rest))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model="diptych", model_args=f"pretrained=mini,device=cpu{arguments}", batch_size=4,
                            tasks=["diptych_world"], task_manager=manager)
    return found["results"]["diptych_world"]["right,none"]


def test_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert run(tmp_path, "generate_until", ASK, "") >= (ITEMS - 1) / ITEMS, "mini answers 19 of 20"


def test_log_probs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert run(tmp_path, "loglikelihood", "", "") >= (ITEMS - 1) / ITEMS


def test_drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert run(tmp_path, "generate_until", ASK, f",mode=generate,output_dir={tmp_path / 'drawn'}") == 1
    assert len(list((tmp_path / "drawn").glob("*.png"))) == ITEMS


def test_what_it_cannot_do_is_an_error() -> None:
    from diptych.benchmarks.lmms import Diptych

    with pytest.raises(ValueError, match="expected mode understanding or generate"):
        Diptych(mode="paint")
    with pytest.raises(TypeError, match="colour"):
        Diptych(colour="red")  # type: ignore[call-arg]
