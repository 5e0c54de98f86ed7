"""Reading results together: fair comparison of two, and a table of many."""
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diptych.ledger.entry import Cost, Entry
from diptych.ledger.interval import Metric

_ABSENT = "(absent)"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of two entries. `value` is b - a; `low`, `high` its 95% interval where both metrics have one."""

    metric: str
    a: Metric
    b: Metric
    value: float
    low: float | None
    high: float | None

    @property
    def clear(self) -> bool:
        """True when the interval of the difference excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def compare(a: Entry, b: Entry, *, varying: Iterable[str] = ()) -> list[Difference]:
    """Differences b - a of the metrics that both have, if everything but `varying` is equal.

    `varying` names what the comparison is about as dotted keys of recipe and sampling (`recipe.trunk.coupling`); a
    key covers all below it. Any other difference, also of the kind of measurement or the machine's accelerator when a
    speed is compared, is refused by name, because the numbers would then say nothing about the one change.
    """
    varying = tuple(varying)
    different = [key for key in differing_keys(_setting(a), _setting(b))
                 if not any(key == v or key.startswith(v + ".") for v in varying)]
    if different:
        raise ValueError(f"expected equal recipes, got {a.name} and {b.name} different in {', '.join(different)}; "
                         "fix: measure with one recipe, or name what is compared in `varying`")
    shared = [name for name in a.metrics if name in b.metrics]
    if not shared:
        raise ValueError(f"expected a common metric, got {', '.join(a.metrics)} and {', '.join(b.metrics)}")
    return [_difference(name, a.metrics[name], b.metrics[name]) for name in shared]


def differing_keys(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ in two plain trees; a list of another length differs as a whole."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys: Sequence[Any] = [*a, *(k for k in b if k not in a)]
        pairs = [(k, a.get(k, _ABSENT), b.get(k, _ABSENT)) for k in keys]
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return [] if a == b else [prefix]
    return [d for k, x, y in pairs for d in differing_keys(x, y, f"{prefix}.{k}" if prefix else str(k))]


def render_table(entries: Iterable[Entry]) -> str:
    """Markdown: one row per metric, the entry named on its first row."""
    head = ("entry", "system", "level", "metric", "value [95% interval]", "n", "cost", "date")
    lines = [_row(head), _row(["---"] * len(head))]
    for entry in entries:
        front = (entry.name, entry.system, entry.level)
        back = (format_cost(entry.cost), entry.date)
        for name, metric in entry.metrics.items():
            lines.append(_row((*front, name, format_metric(metric), "" if metric.n is None else str(metric.n), *back)))
            front, back = ("", "", ""), ("", "")
    return "\n".join(lines) + "\n"


def format_metric(metric: Metric) -> str:
    """`95.2% [93.1, 96.8]` for shares, `31.4 [31.1, 31.7] dB` for the rest."""
    share = metric.unit == "share"

    def text(value: float) -> str:
        return f"{value * 100:.1f}" if share else f"{value:.4g}"

    interval = "" if metric.low is None or metric.high is None else f" [{text(metric.low)}, {text(metric.high)}]"
    unit = f" {metric.unit}" if metric.unit and not share else ""
    return f"{text(metric.value)}{'%' if share else ''}{interval}{unit}"


def format_cost(cost: Cost) -> str:
    parts = [f"{value:.3g} {unit}" for value, unit in ((cost.flops, "FLOP"), (cost.tokens, "tokens"),
                                                       (cost.documents, "documents")) if value is not None]
    if cost.seconds is not None:
        parts.append(f"{cost.seconds / 60:.1f} min" if cost.seconds >= 60 else f"{cost.seconds:.3g} s")
    return ", ".join(parts)


def _setting(entry: Entry) -> dict[str, Any]:
    setting: dict[str, Any] = {"kind": entry.kind, "recipe": entry.recipe, "sampling": entry.sampling}
    if entry.kind == "speed":
        setting["machine"] = {"cpu": entry.machine.cpu, "cores": entry.machine.cores,
                              "accelerator": entry.machine.accelerator}
    return setting


def _difference(name: str, a: Metric, b: Metric) -> Difference:
    if a.unit != b.unit:
        raise ValueError(f"expected one unit for {name}, got {a.unit!r} and {b.unit!r}")
    value, low, high = b.value - a.value, None, None
    if a.low is not None and a.high is not None and b.low is not None and b.high is not None:
        # Newcombe's square-and-add: right for Wilson intervals (1998, method 10) and for any two independent ones
        low = value - math.hypot(b.value - b.low, a.high - a.value)
        high = value + math.hypot(b.high - b.value, a.value - a.low)
    return Difference(metric=name, a=a, b=b, value=value, low=low, high=high)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
