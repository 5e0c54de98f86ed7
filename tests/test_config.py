import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych import config
from diptych.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1e-3
    steps: int = 10
    kind: Literal["cosine", "constant"] = "constant"


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = Inner()
    stages: tuple[Inner, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    maybe: int | None = None
    size: str | dict[str, Any] = "tiny"
    mix: dict[str, float] = field(default_factory=dict)
    flag: bool = False
    items: list[int] = field(default_factory=list)
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("expected a good name, got 'bad'")


def read(**data: Any) -> Outer:
    return config.from_dict(Outer, {"name": "x", **data}, where="file.yaml")


def test_everything_converts_and_round_trips(tmp_path: Path) -> None:
    outer = read(inner={"lr": "1e-4", "steps": "20"}, stages=[{"lr": 1}, {"kind": "cosine"}], pair=[3, "4"], maybe=5,
                 size={"width": 3}, mix={"a": 1, "b": "2.5"}, flag=True, items=[1, 2], folder="runs/a")
    assert outer.inner == Inner(lr=1e-4, steps=20) and outer.pair == (3, 4.0)
    assert outer.stages == (Inner(lr=1.0), Inner(kind="cosine")) and outer.mix == {"a": 1.0, "b": 2.5}
    assert outer.folder == Path("runs/a") and outer.size == {"width": 3}
    config.save(outer, tmp_path / "outer.yaml")
    assert config.load(Outer, tmp_path / "outer.yaml") == outer
    assert [p.name for p in tmp_path.iterdir()] == ["outer.yaml"]


@pytest.mark.parametrize("data, place, hint", [
    ({"inner": {"step": 3}}, "file.yaml: inner", "'steps'"),
    ({"stages": [{}, {"kindd": "cosine"}]}, "file.yaml: stages.1", "'kind'"),
    ({"inner": {"kind": "cosin"}}, "file.yaml: inner.kind", "'cosine'"),
    ({"flagg": True}, "file.yaml", "'flag'"),
])
def test_unknown_names_the_place_and_the_nearest(data: dict, place: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(**data)
    assert str(error.value).startswith(place + ":") and f"did you mean {hint}" in str(error.value)


@pytest.mark.parametrize("data", [
    {"inner": {"steps": 1.5}}, {"inner": {"steps": True}}, {"inner": {"lr": "fast"}}, {"inner": {"lr": float("nan")}},
    {"flag": 1}, {"flag": "yes"}, {"pair": [1]}, {"mix": [1]}, {"stages": {"lr": 1}}, {"name": 3}, {"inner": 4},
    {"maybe": "many"}, {"name": "bad"}, {"inner": {"lr": None}},
])
def test_wrong_types_are_errors_with_the_file(data: dict) -> None:
    with pytest.raises(ConfigError, match=r"file\.yaml.*expected"):
        read(**data)


def test_missing_required_key() -> None:
    with pytest.raises(ConfigError, match="expected name"):
        config.from_dict(Outer, {"flag": True})


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: x\nstages:\n- {lr: 1}\n- {lr: 2}\n")
    outer = config.load(Outer, path, ["stages.1.lr=1e-3", "inner.steps=7", "maybe=null", "mix={a: 1}", "name=a=b"])
    assert outer.stages == (Inner(lr=1.0), Inner(lr=1e-3)) and outer.inner.steps == 7
    assert outer.mix == {"a": 1.0} and outer.name == "a=b"
    for bad, message in [("stages.2.lr=1", "index below 2"), ("stages.x.lr=1", "index below 2"), ("steps", "like"),
                         ("name.x=1", "keys below name"), ("inner.stepz=1", "'steps'"), ("mix=[", "YAML")]:
        with pytest.raises(ConfigError, match=message):
            config.load(Outer, path, [bad])


def test_file_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with pytest.raises(ConfigError, match="got nothing"):
        config.load(Outer, path)
    for text, message in [("name: x\nname: y\n", "twice"), ("- a\n", "keys and values"), ("a: [", "expected YAML")]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            config.load(Outer, path)


def test_merge_takes_nested_and_dotted_and_keeps_the_rest() -> None:
    outer = read(stages=[{"lr": 1}, {"lr": 2}], mix={"a": 1})
    changed = config.merge(outer, {"inner": {"steps": 3}, "stages.0.lr": "5", "mix.b": 2})
    assert changed.inner.steps == 3 and changed.stages == (Inner(lr=5.0), Inner(lr=2.0))
    assert changed.mix == {"a": 1.0, "b": 2.0} and outer.mix == {"a": 1.0}
    with pytest.raises(ConfigError, match="'lr'"):
        config.merge(outer, {"inner.lrr": 2})


@given(st.builds(Inner, lr=st.floats(allow_nan=False, allow_infinity=False), steps=st.integers(),
                 kind=st.sampled_from(["cosine", "constant"])))
def test_round_trip_is_exact(inner: Inner) -> None:
    assert config.from_dict(Inner, config.to_dict(inner)) == inner


def test_does_not_import_torch() -> None:
    code = "import sys, diptych.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
