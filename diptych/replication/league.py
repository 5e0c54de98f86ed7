"""The league: every system trained by its own recipe on equally many documents, measured on the same items, drawing the
same prompts with the same seeds.

    FOLDER/run/                 the training, resumable; its checkpoints go once the model is exported
    FOLDER/trained.json         what the training took, with the resolved recipe
    FOLDER/items.jsonl          the verdict on every single item
    FOLDER/world-NAME.json      the ledger entry, and world-NAME.png its drawings

Stages keep their shares of the documents; rates and everything else are the recipe's own, but for the batch: recipes
are for longer trainings, and a short one learns more from many small steps than from few large ones. What is equal is
the number of documents, the batch and the items asked, nothing else: FLOPs and seconds differ, and so do the weights
that systems start from. The entry says all of it.
"""
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as Pil

from diptych import config
from diptych.benchmarks.evaluate import evaluate, taking_part
from diptych.benchmarks.prompts import prompts
from diptych.benchmarks.results import Results, write_json
from diptych.benchmarks.world import drawn, find_suites, score_draw
from diptych.document import Image, Text
from diptych.ledger import Cost, Entry, Model, Pictures, read_entry, write_entry
from diptych.systems.base import System
from diptych.systems.io import load_system, weights_file
from diptych.training.plan import plan
from diptych.training.recipe import Recipe, Samples, check_resume
from diptych.training.stages import fixed_names, trained_names
from diptych.training.trainer import Trainer
from diptych.world import tasks

log = logging.getLogger("diptych.replication")

BUDGET = 16_000  # documents: some minutes of one core for a system of ten million parameters
BATCH = 32
ITEMS = 100  # per suite and split
SUITES = ("draw", "edit", "caption", "question", "refer")
SPLITS = ("test", "pairs")
WORLD = "mini"
CHECKPOINTS = 8  # of a training
PICTURE_BYTES = 40_000


# -- recipes ----------------------------------------------------------------------------------------------------------

def scaled(recipe: Recipe, documents: int, batch: int = BATCH) -> Recipe:
    """The recipe for another number of documents and another batch. Stages keep their shares of the documents and
    warm-ups their parts of a stage; the number is met up to half a batch, and exactly where the batch divides it."""
    whole = sum(s.steps * s.batch for s in recipe.stages)
    least = batch * len(recipe.stages)
    if documents < least:
        raise ValueError(f"expected at least {least} documents, one step for each of {len(recipe.stages)} stages of "
                         f"{recipe.system}, got {documents}")
    stages, wanted, done = [], 0.0, 0
    for stage in recipe.stages:
        wanted += documents * stage.steps * stage.batch / whole
        steps = max(1, round((wanted - done) / batch))
        done += steps * batch
        warmup = min(steps, round(stage.warmup * steps / stage.steps))
        stages.append(replace(stage, steps=steps, batch=batch, warmup=warmup))
    steps = sum(s.steps for s in stages)
    # threads are for whoever starts the run to say; no pictures while training, which would count as its seconds
    return replace(recipe, stages=tuple(stages), samples=Samples(), threads=0, keep=1,
                   save_every=max(1, -(-steps // CHECKPOINTS)))


def check_ingredients(recipes: Mapping[str, Recipe]) -> None:
    """An error if weights that a recipe starts from are not there, with the commands that make them."""
    lacking: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        for source in recipe.init.values():
            try:
                weights_file(source.partition("#")[0])
            except FileNotFoundError:
                lacking.setdefault(maker(source), []).append(name)
    if lacking:
        who = ", ".join(dict.fromkeys(name for names in lacking.values() for name in names))
        raise ValueError(f"expected the weights that the recipes start from, got some missing for {who}; "
                         f"fix: {' && '.join(lacking)}")


def maker(source: str) -> str:
    """The command that makes an ingredient: `zoo/vq` or `runs/semantic-codec/model#codec`."""
    place, *parts = Path(source.partition("#")[0]).parts
    if parts and place in ("zoo", "runs"):
        return f"diptych {'zoo build' if place == 'zoo' else 'train'} {Path(parts[0]).stem}"
    return f"put weights at {source.partition('#')[0]}"


# -- drawing ----------------------------------------------------------------------------------------------------------

class Drawn(NamedTuple):
    strip: Pil.Image
    pictures: Pictures


def draw(system: System, file: str) -> Drawn:
    true = prompts(WORLD)
    seeds = tuple(range(len(true)))
    made = system.generate([t.prompt() for t in true], seeds=seeds)
    tiles = [Image(pixels=drawn(m)).to_uint8() for m in made]
    right = tuple(score_draw(t, m).right for t, m in zip(true, made, strict=True))
    words = tuple(str(t.of(Text)[0].text) for t in true)
    return Drawn(Pil.fromarray(np.hstack(tiles)), Pictures(file=file, prompts=words, seeds=seeds, right=right))


def save_strip(strip: Pil.Image, path: Path) -> None:
    """As a PNG with a palette, of as many colours as the bytes allow."""
    temporary = path.with_name(f".{path.name}")
    for colors in (256, 128, 64, 32, 16):
        strip.quantize(colors, dither=Pil.Dither.NONE).save(temporary, "PNG", optimize=True)
        if temporary.stat().st_size <= PICTURE_BYTES:
            break
    temporary.replace(path)


# -- one system -------------------------------------------------------------------------------------------------------

def run(name: str, recipe: Recipe, folder: str | Path, *, n: int = ITEMS, device: str = "cpu",
        progress: bool = True) -> Entry:
    """Train (the recipe as it is: see `scaled`), measure, draw, and write the entry into the folder; what is there is
    not done again. An interruption keeps what is done and raises KeyboardInterrupt."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = _train(recipe, folder, device)
    path = folder / f"world-{name}.json"
    if path.is_file():
        entry = read_entry(path)
        asked = entry.recipe["evaluation"]
        if asked["n"] == n and entry.model is not None and entry.model.training == model.training:
            log.info("%s: done before", name)
            return entry
    system = load_system(folder / "run" / "model", cls=_class_of(recipe), device=device).eval()
    unable = refusals(system)
    able = [s for s in SUITES if s not in unable]
    if not able:
        raise ValueError(f"expected {name} to do one of {', '.join(SUITES)}, got: {unable[SUITES[0]]}")
    results = evaluate(system, able, n=n, splits=SPLITS, world=WORLD, progress=progress,
                       resume_file=folder / "items.jsonl")
    return _record(name, recipe, folder, system, results, replace(model, unable=unable, **_parts(system, able)))


def _record(name: str, recipe: Recipe, folder: Path, system: System, results: Results, model: Model) -> Entry:
    pictures = None
    if "draw" in results.suites:
        strip, pictures = draw(system, f"world-{name}.png")
        save_strip(strip, folder / pictures.file)
    entry = results.entry(f"world-{name}", system=name, recipe=_plain(recipe), level="E1")
    entry = replace(entry, model=model, pictures=pictures)
    write_entry(entry, folder, replace=True)
    return entry


def _train(recipe: Recipe, folder: Path, device: str) -> Model:
    path = folder / "trained.json"
    if path.is_file():
        stored: dict[str, Any] = json.loads(path.read_text())
        check_resume(stored["recipe"], recipe, str(path))
        return config.from_dict(Model, stored["model"], str(path))
    trainer = Trainer(recipe, folder / "run", device=device)
    trainer.run()
    if trainer.stop:
        raise KeyboardInterrupt
    place = trainer.place
    cost = Cost(flops=plan(recipe, device).flops, tokens=place.tokens, documents=place.documents,
                seconds=round(place.seconds, 3))
    model = model_of(trainer.system, recipe, cost, trainer.fixed)
    write_json(path, {"model": config.to_dict(model), "recipe": _plain(recipe)})
    for checkpoint in (folder / "run").glob("step-*"):
        shutil.rmtree(checkpoint)
    return model


def model_of(system: System, recipe: Recipe, cost: Cost, fixed: frozenset[str]) -> Model:
    """The facts that are known without asking it anything. `fixed` were never to be trained."""
    trained = set().union(*(trained_names(system, s, fixed) for s in recipe.stages))
    sizes = {n: p.numel() for n, p in system.named_parameters()}
    return Model(parameters=sum(sizes.values()), trained=sum(sizes[n] for n in trained), ingredients=dict(recipe.init),
                 training=cost)


def refusals(system: System) -> dict[str, str]:
    """The suites that a system says it cannot do when it is asked once, with what it says."""
    found = {}
    for suite in find_suites(SUITES):
        document = suite.read(0, "test", "train", WORLD)
        try:
            system.generate([suite.prompt(document)])
        except (ValueError, TypeError) as error:
            found[suite.name] = str(error)
            log.warning("%s is not measured: %s", suite.name, error)
    return found


def _parts(system: System, able: list[str]) -> dict[str, int]:
    """Parameters that take part in a picture and in an answer."""
    ask = partial(tasks.document, index=0, split="test", world=WORLD)
    return {field: taking_part(system, ask(task)) for field, task in (("drawing", "draw"), ("answering", "question"))
            if task in able}


def _class_of(recipe: Recipe) -> type[System]:
    from diptych.systems import table

    return table.find(recipe.system)


def _plain(recipe: Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict(recipe)))


# -- the ledger -------------------------------------------------------------------------------------------------------

def publish(entry: Entry, source: str | Path, entries: str | Path, *, replace: bool = False) -> Path:
    """Copy an entry and its drawings from `source` to the folder of entries, unless they are there already."""
    source, entries = Path(source), Path(entries)
    there = entries / f"{entry.name}.json"
    if there.exists() and not replace:
        if read_entry(there) == entry:
            return there
        raise ValueError(f"expected a new entry, got another {entry.name} in {entries}; fix: replace it")
    entries.mkdir(parents=True, exist_ok=True)
    if entry.pictures is not None:
        # before the entry, which must never name a picture that is not there
        temporary = entries / f".{entry.pictures.file}"
        shutil.copyfile(source / entry.pictures.file, temporary)
        temporary.replace(entries / entry.pictures.file)
    return write_entry(entry, entries, replace=replace)


def reference(entry: Entry, model: str | Path, recipe: Recipe, cost: Cost, folder: str | Path, *,
              device: str = "cpu") -> Entry:
    """The entry of a model that was trained elsewhere and measured before, with its facts, and drawings of the same
    prompts written into `folder`. `cost` is what its training took."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    system = load_system(model, device=device).eval()
    strip, pictures = draw(system, f"{entry.name}.png")
    save_strip(strip, folder / pictures.file)
    cost = replace(cost, flops=plan(recipe, device).flops)
    facts = replace(model_of(system, recipe, cost, fixed_names(system)), **_parts(system, ["draw", "question"]))
    made = replace(entry, model=facts, pictures=pictures)
    write_entry(made, folder, replace=True)
    return made
