"""A plot as inline SVG: cost on a logarithmic axis against a share with its interval."""
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diptych.report.page import text

WIDTH, HEIGHT = 900, 400
LEFT, RIGHT, TOP, BOTTOM = 48, 120, 16, 44
DOT, LETTER = 7, 7.4  # half a dot and its margin, the width of a letter


def plot(points: Sequence[Mapping[str, Any]]) -> str:
    """Of `key`, `title`, `cost` > 0, `right` (a share with interval), `reference`; a label leads to `#system-KEY`."""
    low, high = (math.log10(end(p["cost"] for p in points)) for end in (min, max))
    low, high = low - 0.15, high + 0.15
    top = min(1.0, max((p["right"].high or p["right"].value) for p in points) * 1.08 + 0.02)

    def place(cost: float, share: float) -> tuple[float, float]:
        x = LEFT + (math.log10(cost) - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - share / top * (HEIGHT - TOP - BOTTOM)

    out = [*_grid(low, high, top, place)]
    labels = _labels([place(p["cost"], p["right"].value) for p in points], [p["title"] for p in points])
    for number, point in enumerate(points):
        right = point["right"]
        x, y = place(point["cost"], right.value)
        kind = ' class="reference"' if point["reference"] else ""
        out.append(f"<g{kind}>")
        if right.low is not None and right.high is not None:
            (_, above), (_, below) = place(point["cost"], right.high), place(point["cost"], right.low)
            out.append(f'<line class="range" x1="{x:.1f}" x2="{x:.1f}" y1="{above:.1f}" y2="{below:.1f}"/>')
        said = f"{point['title']}: {point['cost']:.3g} GFLOP, {right.value:.0%} right"
        left, base, anchor = labels[number]
        out.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{text(said)}</title></circle>'
                   f'<a href="#system-{text(point["key"])}"><text x="{left:.1f}" y="{base:.1f}" '
                   f'text-anchor="{anchor}">{text(point["title"])}</text></a></g>')
    return (f'<div class="scroll"><svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" '
            f'aria-label="GFLOP per picture against the share of right drawings">{"".join(out)}</svg></div>')


def _grid(low: float, high: float, top: float, place: Any) -> Iterator[str]:
    for share in (i / 10 for i in range(0, 11, 2 if top > 0.5 else 1)):
        if share <= top:
            y = place(10**low, share)[1]
            yield (f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                   f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    ticks = [m * 10.0**e for e in range(math.floor(low), math.ceil(high)) for m in (1, 2, 5)]
    for cost in ticks:
        if low <= math.log10(cost) <= high:
            x = place(cost, 0)[0]
            yield f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{cost:g}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">GFLOP per picture</text>'


def _labels(places: Sequence[tuple[float, float]], titles: Sequence[str]) -> list[tuple[float, float, str]]:
    """(x, y, anchor) of every label: beside its dot, where it covers the fewest dots and labels before it."""
    dots = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in places]
    taken, found = list(dots), []
    for (x, y), title in zip(places, titles, strict=True):
        width = LETTER * len(title)
        options = [(x + 9, y + up, "start") for up in (4, -6, 14)] + [(x - 9, y + up, "end") for up in (4, -6, 14)]

        def box(option: tuple[float, float, str], width: float = width) -> tuple[float, float, float, float]:
            left = option[0] - (width if option[2] == "end" else 0)
            return left, option[1] - 11, left + width, option[1] + 3

        best = min(options, key=lambda option: sum(_overlap(box(option), other) for other in taken))
        taken.append(box(best))
        found.append(best)
    return found


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
