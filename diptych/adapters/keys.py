"""Key rules as data: published checkpoint names <-> ours, both ways, with a report of what does not fit."""
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """`theirs` (several are concatenated along the first dimension, `sizes` splits them again) become `ours`.

    `part` (i, n): ours is the i-th of n equal parts of theirs (a fused projection). `op` "negate" flips the sign: a
    velocity of the other direction in time; "patches" makes a convolution over patches a matrix on patches flattened as
    (row, column, channel). `shape` is that of theirs where ours holds the same numbers in another one.
    """

    theirs: tuple[str, ...]
    ours: str
    sizes: tuple[int, ...] = ()
    part: tuple[int, int] = (0, 1)
    op: Literal["copy", "negate", "patches"] = "copy"
    shape: tuple[int, ...] = ()


@dataclass
class Report:
    """What a conversion could not place. Empty means that every tensor found its home."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        parts = [f"{len(v)} {k} ({', '.join(v[:3])}{', ...' if len(v) > 3 else ''})"
                 for k, v in vars(self).items() if v]
        return "; ".join(parts) or "all tensors placed"


def expand(template: Rule, **ranges: Sequence[object]) -> list[Rule]:
    """One rule per combination of the values of `{name}` placeholders."""
    rules = [template]
    for name, values in ranges.items():
        hole = f"{{{name}}}"
        rules = [replace(r, theirs=tuple(t.replace(hole, str(v)) for t in r.theirs), ours=r.ours.replace(hole, str(v)))
                 for r in rules for v in values]
    return rules


def to_ours(theirs: Mapping[str, Tensor], rules: Iterable[Rule], shapes: Mapping[str, torch.Size],
            ignore: Sequence[str] = ()) -> tuple[dict[str, Tensor], Report]:
    """Convert a published state dict. `shapes` are those of our state dict, `ignore` prefixes of theirs that hold
    nothing learnt."""
    report, out, used = Report(), {}, set()
    for rule in rules:
        absent = [t for t in rule.theirs if t not in theirs]
        if absent:
            report.missing += absent
            continue
        used.update(rule.theirs)
        value = theirs[rule.theirs[0]] if len(rule.theirs) == 1 else torch.cat([theirs[t] for t in rule.theirs])
        value = -value if rule.op == "negate" else value
        value = value.chunk(rule.part[1])[rule.part[0]] if rule.part[1] > 1 else value
        value = value.permute(0, 2, 3, 1) if rule.op == "patches" else value
        if rule.shape and rule.ours in shapes and value.numel() == shapes[rule.ours].numel():
            value = value.reshape(shapes[rule.ours])
        if rule.ours not in shapes or shapes[rule.ours] != value.shape:
            wanted = tuple(shapes.get(rule.ours, ()))
            report.reshaped.append(f"{rule.ours}: expected {wanted}, got {tuple(value.shape)}")
            continue
        out[rule.ours] = value
    report.unexpected = sorted(k for k in theirs if k not in used and not k.startswith(tuple(ignore)))
    report.missing += [f"(ours) {k}" for k in shapes if k not in out and not any(r.ours == k for r in rules)]
    return out, report


def to_theirs(ours: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """The way back, bit-equal: a rule whose `theirs` were written before is a copy and is left out."""
    out: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    for rule in rules:
        value = -ours[rule.ours] if rule.op == "negate" else ours[rule.ours]
        if rule.op == "patches":
            d, channels, height, width = rule.shape
            value = value.reshape(d, height, width, channels).permute(0, 3, 1, 2)
        value = value.reshape(rule.shape) if rule.shape else value
        parts = value.split(list(rule.sizes)) if rule.sizes else (value,)
        for name, part in zip(rule.theirs, parts, strict=True):
            if rule.part[1] > 1:
                fused.setdefault(name, {})[rule.part[0]] = part
            else:
                out.setdefault(name, part.contiguous())
    return out | {name: torch.cat([v for _, v in sorted(parts.items())]) for name, parts in fused.items()}
