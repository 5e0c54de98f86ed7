"""The back end of Ray: the same weights to the last bit, deaths with names, an end without leftovers."""
from pathlib import Path
from typing import Any

import pytest
from aligning import Echo, aligner, differing

pytest.importorskip("ray")

from diptych.alignment.workers.crew import Blueprint, Place, WorkerDied
from diptych.alignment.workers.on_ray import RayCrew, locate
from diptych.alignment.workers.setup import Workers

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


def test_actors_learn_the_same(tmp_path: Path) -> None:
    expected = aligner(tmp_path / "serial", Workers(parts=2), iterations=2).run()
    workers = Workers(backend="ray", parts=2, placement={"rollout": "0-1", "reward,learner": "0-1:0"})
    a = aligner(tmp_path / "ray", workers, iterations=2)
    found = a.run()
    assert not differing(dict(expected.named_parameters()), dict(found.named_parameters()))
    assert (tmp_path / "ray" / "model" / "model.safetensors").is_file()
    assert not a.crew.ray.is_initialized()  # type: ignore[attr-defined]


def test_errors_and_deaths_have_names() -> None:
    crew = RayCrew({role: [Blueprint(Echo, place=Place((0,)))] for role in ("one", "two")})
    try:
        assert crew.send("two", "say", crew.send("one", "say", [1])).get() == [1]
        with pytest.raises(ArithmeticError, match="of the rollout"):
            crew.send("two", "say", crew.send("one", "fail")).get()
        gone = crew.send("one", "die")
        with pytest.raises(WorkerDied, match=r"worker one 0 \(node .*core 0\)"):
            crew.send("two", "say", gone).get()
    finally:
        crew.close()


def test_places_are_numbered_over_nodes() -> None:
    def node(name: str, cpus: int, alive: bool = True) -> dict[str, Any]:
        return {"NodeID": name, "NodeManagerAddress": name, "Alive": alive, "Resources": {"CPU": float(cpus)}}

    nodes = [node("b", 4), node("a", 2), node("c", 8, alive=False)]
    found, place = locate(nodes, Place((3, 4), threads=1))
    assert found["NodeID"] == "b" and place.accelerators == (1, 2)
    for wrong in ((1, 2), (6,)):
        with pytest.raises(ValueError, match="on one node"):
            locate(nodes, Place(wrong))
