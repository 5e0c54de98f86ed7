"""A made-up ledger for the tests of its page: figures that nobody has measured, drawings by the world itself."""
from pathlib import Path

import numpy as np
from PIL import Image as Pil

from diptych.benchmarks.prompts import prompts
from diptych.document import Image, Text
from diptych.ledger import Cost, Entry, Machine, Metric, Model, Pictures, mean, proportion, write_entry

SUITES = ("draw", "edit", "caption", "question", "refer")
N = 200


def made_up(folder: Path, systems: dict[str, int], *, claims: bool = True, reference: bool = True) -> None:
    """Write `world-NAME` of every system, right in so many of 200 drawings, a claim and the reference."""
    for number, (name, right) in enumerate(systems.items()):
        write_entry(world(folder, name, right, number), folder)
    if reference:
        entry = world(folder, "mini", 145, 9)
        write_entry(entry, folder)
    if claims:
        write_entry(claim("unifork"), folder)


def world(folder: Path, name: str, right: int, number: int = 0) -> Entry:
    system = "bagel" if name == "mini" else name
    own = name if name == "mini" else f"world-{name}"
    metrics: dict[str, Metric] = {}
    for place, suite in enumerate(SUITES):
        for split, less in (("test", 0), ("pairs", 9)):
            metrics[f"{suite}/{split}"] = proportion(max(0, min(N, right + 10 * place - less)), N)
            metrics[f"{suite}/{split}/mean GFLOP"] = mean([(2.0 + number) * (0.1 if place > 1 else 1.0)] * 2)
    documents = 1_360_000 if name == "mini" else 48_000
    stage = {"name": "all", "steps": documents // 64, "batch": 64, "tasks": {}}
    tasks = {"draw": 8.0, "edit": 4.0} | ({} if name == "metaquery" else {"talk": 1.0, "caption": 1.0})
    return Entry(name=own, kind="quality", system=system, level="E1", seeds=(0,), date="2026-01-01", code="0",
                 machine=Machine(cpu="a made-up processor", cores=2, torch="2.13", python="3.11"),
                 recipe={"model": {"system": system, "stages": [stage], "data": [{"world": "mini", "tasks": tasks}]},
                         "evaluation": {"n": N}},
                 metrics=metrics, pictures=strip(folder, own, right / N),
                 model=Model(parameters=10_900_000 - 300_000 * number, trained=9_000_000, drawing=8_000_000 + number,
                             answering=5_000_000, ingredients={"codec": "zoo/codec", "vision": "zoo/clip#vision"},
                             training=Cost(flops=2e15 / (1 + number), documents=documents, tokens=10**7,
                                           seconds=300.0 + 60 * number)))


def strip(folder: Path, name: str, good: float) -> Pictures:
    """Drawings of the shared prompts, blurred the more the fewer are right."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = prompts()
    rng = np.random.default_rng(len(name))
    right = tuple(bool(rng.random() < good) for _ in asked)
    tiles = []
    for document, ok in zip(asked, right, strict=True):
        tile = Pil.fromarray(document.of(Image)[-1].to_uint8())
        if not ok:
            tile = tile.resize((6, 6)).resize((64, 64)).rotate(float(rng.integers(10, 80)))
        tiles.append(np.asarray(tile))
    Pil.fromarray(np.hstack(tiles)).quantize(64).save(folder / f"{name}.png", optimize=True)
    return Pictures(file=f"{name}.png", prompts=tuple(str(d.of(Text)[0].text) for d in asked),
                    seeds=tuple(range(len(asked))), right=right)


def claim(system: str) -> Entry:
    effects = {"a branch per task beats one trunk for both": Metric(value=0.062, low=0.021, high=0.103, n=3),
               "what the branches hold drifts apart with depth": Metric(value=-0.11, low=-0.2, high=-0.02, n=3),
               "the branch that draws draws <better>": Metric(value=0.01, low=-0.05, high=0.07, n=3)}
    verdicts = ("reproduced", "not reproduced", "inconclusive")
    return Entry(name=f"claim-{system}", kind="claim", system=system, level="E2", recipe={"arms": {}}, seeds=(0, 1, 2),
                 date="2026-01-02", code="0", machine=Machine(cpu="x", cores=2, torch="2.13", python="3.11"),
                 note="One trunk for both tasks against a fork of the same size, trained on equally many documents.",
                 cost=Cost(documents=90_000, seconds=900.0), verdicts=dict(zip(effects, verdicts, strict=True)),
                 metrics={f"effect: {text}": metric for text, metric in effects.items()} | {"dense: draw": effects[
                     "the branch that draws draws <better>"]})
