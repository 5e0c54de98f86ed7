"""A study on a page: claims with their verdicts, a plot of every metric, costs, and the recipe of every arm."""
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diptych.alignment.game import Contest
from diptych.alignment.recipe import Align
from diptych.ledger.interval import Metric
from diptych.replication.runner import Outcome
from diptych.replication.study import Finding, Study

INK, SOFT, LINE = "#22211e", "#8b867c", "#e5e1d8"
COLORS = ("#8b867c", "#35618e", "#b2502e", "#4f7a3a", "#7a4f8c", "#a07c14")
MARKS = {"reproduced": "reproduced", "not reproduced": "**not reproduced**", "inconclusive": "inconclusive"}


def write(outcome: Outcome, folder: str | Path) -> Path:
    """Write `NAME.md` and `NAME.png` (and `NAME-curves.png` where curves were measured); returns the page."""
    folder, name = Path(folder), outcome.study.name
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{name}.png", lambda path: dots(outcome, path))
    curves = sorted({k for c in outcome.cells for k in c.curves})
    if curves:
        _replace(folder / f"{name}-curves.png", lambda path: lines(outcome, curves, path))
    page = folder / f"{name}.md"
    _replace(page, lambda path: path.write_text(markdown(outcome, bool(curves)), encoding="utf-8"))
    return page


def _replace(path: Path, writer: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        writer(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def markdown(outcome: Outcome, curves: bool = False) -> str:
    study = outcome.study
    rough = "\nA quick run: it shows that the machinery works, and proves nothing.\n" if outcome.quick else ""
    seeds = ", ".join(map(str, outcome.seeds))
    out = [f"# {study.title}\n\n{study.about.strip()}\n{rough}",
           "| claim | effect (95% interval) | asked for | verdict |\n|---|---|---|---|"]
    out[-1] += "".join(f"\n| {f.claim.text} | {shown(f.effect)} | {asked(f)} | {MARKS[f.verdict]} |"
                       for f in outcome.findings())
    out.append(f"Effects are differences between arms trained with the same seed, signed in favour of the claim; "
               f"seeds {seeds}.\n\n![what the claims are about, arm by arm]({study.name}.png)")
    if curves:
        out.append(f"![curves]({study.name}-curves.png)")
    arms = [a.name for a in study.arms]
    out.append("## Figures\n\n| metric | " + " | ".join(arms) + " |\n|---|" + "---|" * len(arms))
    for metric in outcome.metrics():
        row = [shown(outcome.metric(a, metric)) if _has(outcome, a, metric) else "-" for a in arms]
        out[-1] += f"\n| {metric} | " + " | ".join(row) + " |"
    out.append("## Arms\n\n| arm | what it is | FLOP | documents | tokens | seconds |\n|---|---|---|---|---|---|")
    for arm in study.arms:
        c = outcome.cost(arm.name)
        flops = f"{c.flops:.2e}" if c.flops else "-"
        out[-1] += (f"\n| {arm.name}{' (control)' if arm.control else ''} | {arm.about} | {flops} "
                    f"| {c.documents or 0:,} | {c.tokens or 0:,} | {c.seconds or 0:.0f} |")
    out.append(f"Per seed. All arms share {_common(study)}, and differ only in:\n")
    out[-1] += "\n".join(f"- `{a.name}`: " + (", ".join(f"`{k}={v}`" for k, v in a.changes.items()) or "nothing")
                         for a in study.arms)
    out.append(f"Made by `diptych replicate {study.name}{' --quick' if outcome.quick else ''}`.")
    return "\n\n".join(out) + "\n"


def _common(study: Study) -> str:
    """What all arms share; where they differ in it they say so below."""
    recipe = study.recipe
    if isinstance(recipe, Contest):
        return (f"{recipe.iterations} iterations of {recipe.batch} questions and {recipe.digging.batch} hard ones, "
                "a step for each")
    if isinstance(recipe, Align):
        return (f"the model `{recipe.model}`, {recipe.iterations} iterations of {recipe.prompts} prompts with "
                f"{recipe.group} answers each (the documents above)")
    steps = ", ".join(f"{s.steps} steps of {s.batch}" for s in recipe.stages)
    apart = any("system" in a.changes for a in study.arms)
    return steps if apart else f"system `{recipe.system}` ({recipe.size}), {steps}"


def _has(outcome: Outcome, arm: str, metric: str) -> bool:
    return all(metric in c.metrics for c in outcome.cells if c.arm == arm)


def asked(finding: Finding) -> str:
    claim = finding.claim
    percent = finding.effect.unit == "share"
    return f"above {100 * claim.margin:g}%" if percent else f"above {claim.margin:g}{' times' if claim.ratio else ''}"


def shown(m: Metric) -> str:
    if m.unit == "share":
        value, bounds = f"{100 * m.value:.1f}%", [f"{100 * x:.1f}" for x in (m.low, m.high) if x is not None]
    else:
        value, bounds = f"{m.value:.4g}", [f"{x:.4g}" for x in (m.low, m.high) if x is not None]
        value += f" {m.unit}" if m.unit else ""
    return f"{value} [{', '.join(bounds)}]" if bounds and m.low != m.high else value


# -- plots ------------------------------------------------------------------------------------------------------------

def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.edgecolor": SOFT, "axes.labelcolor": INK, "xtick.color": INK,
                            "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def dots(outcome: Outcome, path: Path) -> None:
    """One panel per metric that a claim is about: every seed a dot, the mean a bar with its interval."""
    plt = _pyplot()
    named = [m for c in outcome.study.claims for m in (c.metric, c.against) if m]
    metrics, arms = list(dict.fromkeys(named)), [a.name for a in outcome.study.arms]
    alike = [name.rpartition(": ")[2] for name in arms]  # of several families: of one colour
    order = list(dict.fromkeys(alike))
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    shown: list[str] = []
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, (0.55 + 0.32 * len(arms)) * rows + 0.3),
                                squeeze=False, layout="constrained")
    for place, axis in enumerate(axes.flat):
        if place >= len(metrics):
            axis.axis("off")
            continue
        metric = metrics[place]
        before, shown = shown if place % columns else [], [arm for arm in arms if _has(outcome, arm, metric)]
        for y, arm in enumerate(shown):
            color = COLORS[order.index(alike[arms.index(arm)]) % len(COLORS)]
            found = outcome.metric(arm, metric)
            if found.low is not None and found.high is not None:
                axis.plot([found.low, found.high], [y, y], color=color, lw=5, alpha=0.25, solid_capstyle="round")
            values = outcome.values(arm, metric)
            axis.plot(values, [y] * len(values), "o", color=color, ms=3.5, alpha=0.8)
            axis.plot([found.value], [y], "|", color=color, ms=13, mew=2)
        axis.set_yticks(range(len(shown)), [""] * len(shown) if shown == before else shown)
        axis.set_ylim(len(shown) - 0.5, -0.5)
        axis.locator_params(axis="x", nbins=5)
        unit = outcome.study.units.get(metric, "")
        axis.set_title(f"{metric} ({unit})" if unit else metric, fontsize=9, color=INK)
        axis.grid(axis="x", color=LINE)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def lines(outcome: Outcome, curves: list[str], path: Path) -> None:
    """One panel per arm: every curve as the mean over seeds, with the seeds themselves behind it."""
    plt = _pyplot()
    arms = [a.name for a in outcome.study.arms]
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.6 * rows), squeeze=False, sharex=True,
                                sharey=True, layout="constrained")
    for axis in axes.flat[len(arms):]:
        axis.axis("off")
    for axis, arm in zip(axes.flat, arms, strict=False):
        for number, name in enumerate(curves):
            seeds = [c.curves[name] for c in outcome.cells if c.arm == arm and name in c.curves]
            if not seeds:
                continue
            color = COLORS[(number + 1) % len(COLORS)]
            for values in seeds:
                axis.plot(values, color=color, lw=0.7, alpha=0.35)
            middle = [sum(v) / len(v) for v in zip(*seeds, strict=True)]
            axis.plot(middle, color=color, lw=2, label=name)
        axis.set_title(arm, fontsize=9, color=INK)
        axis.grid(color=LINE)
        axis.set_axisbelow(True)
        axis.locator_params(axis="x", integer=True)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)
