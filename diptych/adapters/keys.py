"""Key rules as data: published checkpoint names <-> ours, both ways, with a report of what does not fit."""
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """`theirs` (several are concatenated along the first dimension, `sizes` splits them again) become `ours`.

    `part` (i, n): ours is the i-th of n equal parts of theirs (a fused projection). `op` "negate" flips the sign: a
    velocity of the other direction in time; "patches" makes a convolution over patches a matrix on patches flattened as
    (row, column, channel). `rotary` (n, heads): theirs are n projections of that many heads, whose queries and keys
    (the first two) turn neighbouring channels together where ours turn channels half a head apart. `row`: ours is this
    row of theirs, whose others are never used. `shape` is that of theirs where ours holds the same numbers in another.
    """

    theirs: tuple[str, ...]
    ours: str
    sizes: tuple[int, ...] = ()
    part: tuple[int, int] = (0, 1)
    op: Literal["copy", "negate", "patches"] = "copy"
    shape: tuple[int, ...] = ()
    rotary: tuple[int, int] | None = None
    row: int | None = None

    def convert(self, values: Sequence[Tensor], shape: torch.Size | None) -> Tensor:
        """Published tensors, in the order of `theirs`, as ours, which has this `shape` (None: unknown)."""
        value = values[0] if len(values) == 1 else torch.cat(list(values))
        value = -value if self.op == "negate" else value
        value = value.chunk(self.part[1])[self.part[0]] if self.part[1] > 1 else value
        value = value.permute(0, 2, 3, 1) if self.op == "patches" else value
        value = value[self.row] if self.row is not None else value
        value = _turned(value, *self.rotary, back=False) if self.rotary else value
        if self.shape and shape is not None and value.numel() == shape.numel():
            value = value.reshape(shape)
        return value

    def revert(self, value: Tensor) -> tuple[Tensor, ...]:
        """Ours as the published tensors, or as this rule's part of the one."""
        value = -value if self.op == "negate" else value
        value = _turned(value, *self.rotary, back=True) if self.rotary else value
        if self.op == "patches":
            d, channels, height, width = self.shape
            value = value.reshape(d, height, width, channels).permute(0, 3, 1, 2)
        value = value.reshape(self.shape) if self.shape else value
        if self.row is not None:
            value = torch.cat((value.new_zeros(self.row, *value.shape), value[None]))
        return value.split(list(self.sizes)) if self.sizes else (value,)


def _turned(value: Tensor, parts: int, heads: int, *, back: bool) -> Tensor:
    """Channels (parts * heads * width, ...) of queries and keys from neighbouring pairs to halves, or back."""
    split = value.unflatten(0, (parts, heads, -1))
    pairs = split.unflatten(2, (2, -1) if back else (-1, 2)).transpose(2, 3).flatten(2, 3)
    return torch.cat((pairs[:2], split[2:])).reshape(value.shape)


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

    def without(self, kinds: Iterable[str]) -> "Report":
        """What is left when these kinds are allowed."""
        return Report(**{k: [] if k in set(kinds) else v for k, v in vars(self).items()})


def expand(template: Rule, **ranges: Sequence[object]) -> list[Rule]:
    """One rule per combination of the values of `{name}` placeholders."""
    rules = [template]
    for name, values in ranges.items():
        hole = f"{{{name}}}"
        rules = [replace(r, theirs=tuple(t.replace(hole, str(v)) for t in r.theirs), ours=r.ours.replace(hole, str(v)))
                 for r in rules for v in values]
    return rules


def converted(theirs: Mapping[str, Tensor], rules: Iterable[Rule], shapes: Mapping[str, torch.Size], report: Report,
              ignore: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Our tensors one by one as the rules make them, so that no more than one is held at a time; what does not fit goes
    into the report, which is complete at the end. `shapes` are those of our state dict, `ignore` prefixes of theirs
    that hold nothing learnt."""
    used, placed, ruled = set[str](), set[str](), set[str]()
    for rule in rules:
        ruled.add(rule.ours)
        absent = [t for t in rule.theirs if t not in theirs]
        if absent:
            report.missing += absent
            continue
        used.update(rule.theirs)
        try:
            value = rule.convert([theirs[t] for t in rule.theirs], shapes.get(rule.ours))
        except (RuntimeError, IndexError) as error:  # a tensor that cannot be cut as the rule says
            report.reshaped.append(f"{rule.ours}: {str(error).splitlines()[0]}")
            continue
        if rule.ours not in shapes or shapes[rule.ours] != value.shape:
            wanted = tuple(shapes.get(rule.ours, ()))
            report.reshaped.append(f"{rule.ours}: expected {wanted}, got {tuple(value.shape)}")
            continue
        placed.add(rule.ours)
        yield rule.ours, value
        del value  # before the next is read
    report.unexpected = sorted(k for k in theirs if k not in used and not k.startswith(tuple(ignore)))
    report.missing += [f"(ours) {k}" for k in shapes if k not in placed and k not in ruled]


def to_ours(theirs: Mapping[str, Tensor], rules: Iterable[Rule], shapes: Mapping[str, torch.Size],
            ignore: Sequence[str] = ()) -> tuple[dict[str, Tensor], Report]:
    """A published state dict as ours, all at once, with the report."""
    report = Report()
    return dict(converted(theirs, rules, shapes, report, ignore)), report


def to_theirs(ours: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """The way back, bit-equal: a rule whose `theirs` were written before is a copy and is left out."""
    out: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    for rule in rules:
        for name, part in zip(rule.theirs, rule.revert(ours[rule.ours]), strict=True):
            if rule.part[1] > 1:
                fused.setdefault(name, {})[rule.part[0]] = part
            else:
                out.setdefault(name, part.contiguous())
    return out | {name: torch.cat([v for _, v in sorted(parts.items())]) for name, parts in fused.items()}
