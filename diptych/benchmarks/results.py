"""What an evaluation found: figures with intervals, a table to read, an entry for the ledger."""
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from diptych.benchmarks.suite import Outcome, Suite
from diptych.ledger import Cost, Entry, Metric, mean, proportion
from diptych.ledger.report import format_metric


class Key(NamedTuple):
    """One answer."""

    suite: str
    split: str
    index: int
    sample: int = 0


class Figure(NamedTuple):
    """One number of the table. `kind`: the headline `right`, a failure `status`, a `check`, a `number`, a `group`."""

    suite: str
    split: str
    kind: Literal["right", "status", "check", "number", "group"]
    name: str
    metric: Metric

    @property
    def key(self) -> str:
        """Its name in the ledger: `draw/test`, `draw/test/count`."""
        return f"{self.suite}/{self.split}" + ("" if self.kind == "right" else f"/{self.name}")


@dataclass
class Results:
    """`outcomes` of all items asked for so far; the rest says what they are results of."""

    suites: Mapping[str, Suite]
    splits: tuple[str, ...]
    n: int
    settings: dict[str, Any]
    outcomes: dict[Key, Outcome] = field(default_factory=dict)
    cost: Cost = field(default_factory=lambda: Cost(flops=0.0, documents=0, seconds=0.0))

    def add_cost(self, cost: Cost) -> None:
        old = self.cost
        self.cost = Cost(flops=(old.flops or 0) + (cost.flops or 0), seconds=(old.seconds or 0) + (cost.seconds or 0),
                         documents=(old.documents or 0) + (cost.documents or 0))

    # -- figures ------------------------------------------------------------------------------------------------------

    def figures(self) -> list[Figure]:
        """Suite by suite and split by split: right, failures, checks, numbers, groups."""
        out: list[Figure] = []
        for suite in self.suites.values():
            for split in self.splits:
                found = {k: o for k, o in self.outcomes.items() if (k.suite, k.split) == (suite.name, split)}
                out += [Figure(suite.name, split, *rest) for rest in _figures(suite, found)]
        return out

    def metrics(self) -> dict[str, Metric]:
        return {figure.key: figure.metric for figure in self.figures()}

    def right(self, suite: str, split: str = "test") -> Metric:
        """The headline."""
        return self.metrics()[f"{suite}/{split}"]

    def table(self, *, detail: bool = True) -> str:
        """For a terminal. Without `detail` one line per suite and split."""
        rows: list[tuple[str, str, str, str, str]] = [("suite", "split", "figure", "value [95% interval]", "n")]
        for f in self.figures():
            if f.kind == "right":
                rows.append((f.suite, f.split, self.suites[f.suite].right, format_metric(f.metric), str(f.metric.n)))
            elif detail or self._reported(f) or (f.kind == "status" and f.metric.value > 0):
                rows.append(("", "", f"  {f.name}", format_metric(f.metric), str(f.metric.n)))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        rows.insert(1, tuple("-" * w for w in widths))  # type: ignore[arg-type]
        return "\n".join("  ".join(c.rjust(w) if i == 4 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
                         for row in rows)

    def _reported(self, figure: Figure) -> bool:
        return figure.kind == "group" and figure.name in self.suites[figure.suite].reported

    # -- keeping ------------------------------------------------------------------------------------------------------

    def entry(self, name: str, *, system: str, recipe: Mapping[str, Any], level: Literal["E1", "E2", "E3", "E4"] = "E1",
              note: str = "") -> Entry:
        """For the ledger. `recipe` is the resolved recipe of the model; how it was asked is stored beside it. Of the
        groups only the reported ones are kept."""
        figures = {f.key: f.metric for f in self.figures() if f.kind != "group" or self._reported(f)}
        asked = {k: v for k, v in self.settings.items() if k not in ("sampling", "seed")}
        asked |= {"suites": {s.name: s.judge for s in self.suites.values()}, "splits": list(self.splits), "n": self.n}
        return Entry(name=name, kind="quality", system=system, level=level, seeds=(self.settings["seed"],),
                     recipe={"model": dict(recipe), "evaluation": asked}, sampling=self.settings["sampling"],
                     cost=self.cost, metrics=figures, note=note)

    def to_dict(self) -> dict[str, Any]:
        from diptych.config import to_dict

        return {"settings": self.settings, "n": self.n, "splits": list(self.splits), "cost": to_dict(self.cost),
                "metrics": {k: to_dict(m) for k, m in self.metrics().items()},
                "items": [{"key": list(k), **o.to_dict()} for k, o in self.outcomes.items()]}

    def write(self, path: str | Path) -> None:
        """All figures and all verdicts as JSON."""
        write_json(path, self.to_dict())


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """The file appears complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


Named = tuple[Literal["right", "status", "check", "number", "group"], str, Metric]


def _figures(suite: Suite, found: Mapping[Key, Outcome]) -> Iterable[Named]:
    if not found:
        return
    counted = found if suite.missing == "wrong" else {k: o for k, o in found.items() if o.status == "answered"}
    if counted:
        yield "right", "right", _share({k: o.right for k, o in counted.items()}, suite.samples)
    for status in _ordered([*suite.statuses, *(o.status for o in found.values() if o.status != "answered")]):
        yield "status", status, _share({k: o.status == status for k, o in found.items()}, suite.samples)
    for name in _ordered(c for o in counted.values() for c in o.checks):
        yield "check", name, _share({k: o.checks[name] for k, o in counted.items() if name in o.checks}, suite.samples)
    for name in _ordered(c for o in counted.values() for c in o.numbers):
        yield "number", f"mean {name}", mean([o.numbers[name] for o in counted.values() if name in o.numbers])
    for name in sorted({g for o in counted.values() for g in o.groups}):
        yield "group", name, _share({k: o.right for k, o in counted.items() if name in o.groups}, suite.samples)


def _share(values: Mapping[Key, bool], samples: int) -> Metric:
    """Several answers to one item are no independent observations: the item counts, with their mean."""
    if samples == 1:
        return proportion(sum(values.values()), len(values))
    items: dict[int, list[bool]] = {}
    for key, value in values.items():
        items.setdefault(key.index, []).append(value)
    metric = mean([sum(v) / len(v) for v in items.values()])
    ends = {} if metric.low is None or metric.high is None else {
        "low": max(metric.low, 0.0), "high": min(metric.high, 1.0)}
    return Metric(value=metric.value, n=metric.n, unit="share", **ends)


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
