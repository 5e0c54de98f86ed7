"""Bundled models: whole systems that a recipe trains, stored in half precision or 8 bits with a card.

    diptych zoo build mini      trains recipes/mini.yaml (resuming an interrupted run) and bundles the result
"""
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from diptych import config, zoo
from diptych.ledger import Cost, Entry
from diptych.ledger.report import format_metric
from diptych.parts.stored import eighth, half
from diptych.systems.base import System
from diptych.systems.io import load_system, save_system, system_tensors
from diptych.training.recipe import Recipe, load_recipe
from diptych.zoo.build import write

log = logging.getLogger(__name__)

GRID = ("grid-codec", "janus-grid", "show-o-grid")  # what studies of alignment start from
MODELS: dict[str, str] = {n: f"{n}.yaml" for n in ("lm", "vlm", "mini", "t2i", *GRID)}  # name -> recipe
EIGHTH = ("lm", "vlm", "t2i", *GRID)  # stored in 8 bits: the zoo is small


def build(name: str, recipe: Path, out: Path | str | None = None, run: Path | str | None = None, *,
          device: str = "cpu") -> Path:
    """Train the recipe in `run` (default runs/NAME) and bundle the model. Returns the model's folder."""
    from diptych.training.trainer import Trainer

    run = Path(run or Path("runs") / name)
    trainer = Trainer(load_recipe(recipe), run, device=device)
    trainer.run()
    if trainer.stop:
        raise RuntimeError(f"expected the run in {run} to finish, got an interruption; fix: build again to continue")
    return bundle(run, name, out)


def bundle(run: Path | str, name: str, out: Path | str | None = None) -> Path:
    """Store a finished run as a bundled model: bfloat16 weights; ingredients that were never trained stay where they
    are and are named instead."""
    run, folder = Path(run), Path(out or zoo.WEIGHTS) / name
    system = load_system(run / "model")
    recipe = config.load(Recipe, run / "recipe.yaml")
    untouched = {k: v for k, v in recipe.init.items()
                 if v.startswith("zoo/") and all(k in s.freeze for s in recipe.stages)}
    temporary = folder.with_name(f".{name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    tensors = system_tensors(system)
    save_system(system, temporary, eighth(tensors) if name in EIGHTH else half(tensors), ingredients=untouched)
    shutil.copyfile(run / "recipe.yaml", temporary / "recipe.yaml")
    text = card(name, system, recipe, run)
    write(temporary / "card.md", lambda path: path.write_text(text))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    log.info("%s: %d bytes", name, (folder / "model.safetensors").stat().st_size)
    return folder


def card(name: str, system: System, recipe: Recipe, run: Path) -> str:
    last: dict[str, Any] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    steps = ", ".join(f"{s.steps} steps of {s.batch} documents ({s.name})" for s in recipe.stages)
    terms = ", ".join(f"{k} {v:.3f}" for k, v in last["losses"].items())
    tasks = ", ".join(f"{k} {v:g}" for k, v in (recipe.stages[-1].tasks or recipe.data[0].tasks).items())
    return CARD.format(name=name, about=recipe.about.strip(), system=type(system).__name__, steps=steps, terms=terms,
                       tasks=tasks, parameters=f"{system.num_parameters():,}", seconds=last["seconds"],
                       documents=last["documents"], tokens=last["tokens"], world=recipe.data[0].world,
                       precision="8 bits" if name in EIGHTH else "bfloat16")


def note_quality(folder: Path, entry: Entry) -> None:
    """Put the headline figures of a ledger entry into the card of a bundled model."""
    file = folder / "card.md"
    heads = [f"{key} {format_metric(metric)}" for key, metric in entry.metrics.items() if key.count("/") == 1]
    count = max(m.n or 0 for m in entry.metrics.values())
    line = f"{QUALITY} {', '.join(heads)} (ledger entry `{entry.name}`, n = {count})."
    lines = [line if old.startswith(QUALITY) else old for old in file.read_text().splitlines()]
    write(file, lambda path: path.write_text("\n".join(lines) + "\n"))


def training_cost(folder: Path) -> Cost:
    """What the training of a bundled model took, as its card says."""
    file = folder / "card.md"
    found = re.search(r"([\d,]+) documents, ([\d,]+) tokens, ([\d,]+) s;", file.read_text())
    if found is None:
        raise ValueError(f"expected documents, tokens and seconds of the training in {file}, got none; "
                         "fix: bundle the model again")
    documents, tokens, seconds = (int(number.replace(",", "")) for number in found.groups())
    return Cost(documents=documents, tokens=tokens, seconds=seconds)


QUALITY = "- **Measured quality**:"
CARD = """# {name}

{about}

- **System**: {system}, {parameters} parameters, stored in {precision}.
- **Data**: the world `{world}`, training split; task weights at the end: {tasks}.
- **Training**: {steps}; {documents:,} documents, {tokens:,} tokens, {seconds:,.0f} s; last losses: {terms}.
- **Measured quality**: not yet; `diptych eval {name} --ledger {name}` writes it here.

Made by `diptych zoo build {name}`; the resolved recipe of this very run is `recipe.yaml` beside this card.
"""
