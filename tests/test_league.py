"""The league: equal budgets in the recipe's proportions, everything resumable, entries and drawings into the ledger."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image as Pil

from diptych import config
from diptych.benchmarks import prompts
from diptych.benchmarks.world import score_draw
from diptych.cli import common
from diptych.cli import league as verb
from diptych.document import Boxes, Image
from diptych.ledger import Cost, Entry, Pictures, proportion, read_entry, write_entry
from diptych.ledger import entry as ledger
from diptych.replication import league
from diptych.systems.bagel import Bagel
from diptych.systems.base import System
from diptych.training.recipe import Recipe, Source, Stage, load_recipe

TINY = """
system: bagel
data:
- {world: mini, tasks: {caption: 1, draw: 1}}
stages:
- {name: one, steps: 30, batch: 4, lr: 1e-3, warmup: 10}
- {name: two, steps: 10, batch: 4, lr: 1e-3, freeze: [codec]}
config: {sampling.evaluations: 2, sampling.text.max_tokens: 4}
workers: 0
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Recipe:
    (tmp_path / "bagel.yaml").write_text(TINY)
    return league.scaled(load_recipe(tmp_path / "bagel.yaml"), 16, 4)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger of its own; of the recipes only a small one of BAGEL."""
    (tmp_path / "bagel.yaml").write_text(TINY)
    monkeypatch.setattr(common, "recipes", lambda: {"bagel": tmp_path / "bagel.yaml"})
    monkeypatch.setattr(ledger, "ENTRIES", tmp_path / "entries")
    monkeypatch.setattr(league, "SUITES", ("draw", "question"))
    monkeypatch.setattr(prompts, "SPREAD", {1: 1, 2: 1})
    return tmp_path


# -- recipes ----------------------------------------------------------------------------------------------------------

def documents(recipe: Recipe) -> int:
    return sum(s.steps * s.batch for s in recipe.stages)


def test_stages_keep_their_shares() -> None:
    recipe = Recipe(system="bagel", threads=2, stages=(
        Stage(name="a", steps=100, batch=64, lr=1, warmup=50), Stage(name="b", steps=300, batch=64, lr=1, decay=0.5)))
    made = league.scaled(recipe, 6400, 64)
    assert [(s.steps, s.warmup) for s in made.stages] == [(25, 12), (75, 0)] and documents(made) == 6400
    assert made.stages[1].decay == 0.5 and made.threads == 0 and made.samples.every == 0
    longer = league.scaled(recipe, 64 * 4000, 64)
    assert [(s.steps, s.warmup) for s in longer.stages] == [(1000, 500), (3000, 0)]


def test_batches_become_one_and_the_number_is_met_up_to_half_of_it() -> None:
    stages = tuple(Stage(name=f"s{b}", steps=s, batch=b, lr=1) for b, s in ((160, 7), (96, 31), (128, 3)))
    shares = [1120, 2976, 384]
    for wanted in (2000, 3001, 48000):
        made = league.scaled(Recipe(system="bagel", stages=stages), wanted, 20)
        assert abs(documents(made) - wanted) <= 10 and {s.batch for s in made.stages} == {20}
        assert all(abs(s.steps * 20 / wanted - share / sum(shares)) <= 20 / wanted
                   for s, share in zip(made.stages, shares, strict=True))
    short = league.scaled(Recipe(system="bagel", stages=stages), 60, 20)
    assert all(s.steps >= 1 for s in short.stages), "no stage is lost"
    with pytest.raises(ValueError, match="at least 60 documents"):
        league.scaled(Recipe(system="bagel", stages=stages), 59, 20)


@pytest.mark.parametrize("name", verb.own_recipes())
def test_every_recipe_of_the_table_meets_the_budget(name: str) -> None:
    recipe = verb.recipe_of(name)
    assert recipe.system == name, "a recipe of a system's name trains that system"
    assert documents(league.scaled(recipe, league.BUDGET)) == league.BUDGET


def test_missing_ingredients_name_the_command_that_makes_them(tiny: Recipe, tmp_path: Path) -> None:
    league.check_ingredients({"bagel": replace(tiny, init={"codec": "zoo/codec", "vision": "zoo/clip#vision"})})
    lacking = {"a": replace(tiny, init={"codec": "zoo/nothing"}),
               "b": replace(tiny, init={"codec": "runs/semantic-cod/model#codec", "vision": "zoo/nothing#vision"}),
               "c": replace(tiny, init={"codec": str(tmp_path / "x")})}
    with pytest.raises(ValueError, match="missing for a, b, c; fix: diptych zoo build nothing && "
                                         "diptych train semantic-cod && put weights at .*x"):
        league.check_ingredients(lacking)


# -- one system -------------------------------------------------------------------------------------------------------

def test_prompts_are_the_first_of_the_test_split() -> None:
    found = prompts.prompts()
    assert [len(d.meta["scene"]["objects"]) for d in found] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert [d.meta["index"] for d in found[:2]] == [0, 1] and {d.meta["split"] for d in found} == {"test"}
    assert all(score_draw(d, d).right for d in found)


def test_a_system_is_trained_measured_and_drawn_once(home: Path, tiny: Recipe) -> None:
    folder = home / "run"
    made = league.run("bagel", tiny, folder, n=2, progress=False)
    assert (made.name, made.system, made.kind, made.level) == ("world-bagel", "bagel", "quality", "E1")
    assert made.recipe["model"]["stages"][0]["steps"] == 3 and made.recipe["evaluation"]["n"] == 2
    assert {"draw/test", "draw/pairs", "question/test", "draw/test/mean GFLOP"} <= set(made.metrics)
    facts = made.model
    assert facts is not None and facts.training.documents == 16 and facts.training.flops and facts.training.seconds
    assert 0 < facts.answering < facts.drawing <= facts.parameters, "an answer needs no drawing expert"
    assert 0 < facts.trained < facts.parameters and facts.unable == {}, "the codec never learns"
    pictures = made.pictures
    assert pictures is not None and pictures.seeds == (0, 1) and len(pictures.prompts) == 2
    with Pil.open(folder / pictures.file) as strip:
        assert strip.width == 2 * strip.height and strip.mode == "P"
    assert read_entry(folder / "world-bagel.json") == made
    assert not list((folder / "run").glob("step-*"))

    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert league.run("bagel", tiny, folder, n=2) == made
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == times, "nothing is done again"

    more = league.run("bagel", tiny, folder, n=3, progress=False)
    assert more.metrics["draw/test"].n == 3 and more.model == made.model
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert len([x for x in lines if "key" in x]) == 2 * 2 * 3, "items that were there are not asked again"
    with pytest.raises(ValueError, match="give the run another name"):
        league.run("bagel", league.scaled(tiny, 32, 4), folder, n=3)


def test_an_interruption_keeps_the_work(home: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, before = [], league.Trainer.step

    def step(self, packet):
        steps.append(self.place.step)
        if len(steps) == 2:
            self.ask_to_stop()
        return before(self, packet)

    monkeypatch.setattr(league.Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        league.run("bagel", tiny, home / "run", n=1, progress=False)
    assert not (home / "run/trained.json").exists()
    league.run("bagel", tiny, home / "run", n=1, progress=False)
    assert steps == [0, 1, 2, 3]


def test_what_a_system_refuses_is_said_and_not_measured(home: Path, tiny: Recipe,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    ask = System.generate

    def generate(self, documents, *args, **kwargs):
        if any(piece.target for d in documents for piece in d.of(Image)):
            raise ValueError("expected words to say, got a picture to draw")
        return ask(self, documents, *args, **kwargs)

    monkeypatch.setattr(System, "generate", generate)
    made = league.run("bagel", tiny, home / "run", n=1, progress=False)
    assert made.model is not None and made.model.unable == {"draw": "expected words to say, got a picture to draw"}
    assert made.pictures is None and "draw/test" not in made.metrics and made.model.drawing is None
    assert "cannot" in verb.summary([made])
    monkeypatch.setattr(league, "SUITES", ("draw",))
    shutil.rmtree(home / "run")
    with pytest.raises(ValueError, match="to do one of draw, got: expected words"):
        league.run("bagel", tiny, home / "run", n=1, progress=False)


def test_strips_are_small(tmp_path: Path) -> None:
    noise = Pil.effect_noise((8 * 64, 64), 90).convert("RGB")
    league.save_strip(noise, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size <= league.PICTURE_BYTES
    with Pil.open(tmp_path / "a.png") as strip:
        assert strip.size == (512, 64)
    assert len(list(tmp_path.iterdir())) == 1


# -- the verb ---------------------------------------------------------------------------------------------------------

def test_the_verb_writes_the_ledger(home: Path, diptych_run) -> None:
    argv = ["league", "bagel", "--documents", 16, "--batch", 4, "--n", 1, "--run", home / "runs", "--device", "cpu"]
    code, out, err = diptych_run(*argv)
    assert code == 0 and "world-bagel" in out and not (home / "entries").exists(), err
    assert diptych_run(*argv, "--ledger")[0] == 0
    entry = read_entry(home / "entries/world-bagel.json")
    assert (home / "entries/world-bagel.png").is_file() and entry.recipe["model"]["stages"][1]["steps"] == 1
    assert diptych_run(*argv, "--ledger")[0] == 0, "its own entry is in nobody's way"
    write_entry(replace(entry, note="another"), home / "entries", replace=True)
    code, _, err = diptych_run(*argv, "--ledger")
    assert code == 2 and "world-bagel in the ledger; fix: --replace" in err
    assert diptych_run(*argv, "--ledger", "--replace")[0] == 0
    assert read_entry(home / "entries/world-bagel.json") == entry


def test_several_run_in_processes_of_their_own(home: Path, diptych_run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(verb, "child", lambda options: asked.append(options) or len(asked) % 2)
    code, out, err = diptych_run("league", "--documents", 64, "--batch", 4, "--threads", 1)
    assert code == 2 and "errors (above) from bagel" in err and "mini (2 of 2)" in out
    options = ["--documents=64", "--batch=4", "--run=runs/league", "--threads=1"]
    assert asked == [[name, *options] for name in ("bagel", "mini")]


def test_a_child_is_a_process_with_its_exit_code() -> None:
    assert verb.child(["--help"]) == 0
    assert verb.child(["no-such-system"]) == 2


def test_help_states_the_defaults(diptych_run) -> None:
    out = " ".join(diptych_run("league", "--help")[1].split())
    assert f"system (default: {league.BUDGET})" in out and f"split (default: {league.ITEMS})" in out


def test_wrong_names_and_numbers_are_told(home: Path, diptych_run) -> None:
    for argv, line in ((["bagle"], "did you mean 'bagel'"), (["bagel", "bagel"], "different names"),
                       (["bagel", "--documents", 4, "--batch", 4], "at least 8 documents")):
        code, _, err = diptych_run("league", *argv)
        assert code == 2 and line in err


def test_the_reference_keeps_its_scores_and_gains_drawings(home: Path, diptych_run, tiny: Recipe,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.systems.io import save_system

    model = home / "model"
    save_system(Bagel(Bagel.tiny()), model)
    config.save(tiny, model / "recipe.yaml")
    (model / "card.md").write_text("- **Training**: 4 steps; 1,360,000 documents, 82,069,049 tokens, 13,425 s; losses")
    monkeypatch.setattr("diptych.adapters.published.bundled_models", lambda: {"mini": model})
    code, _, err = diptych_run("league", "mini", "--run", home / "runs", "--device", "cpu")
    assert code == 2 and "mini.json" in err
    scores = Entry(name="mini", kind="quality", system="bagel", level="E1", recipe={"a": 1},
                   metrics={"draw/test": proportion(3, 4)})
    write_entry(scores, home / "entries")
    assert diptych_run("league", "mini", "--run", home / "runs", "--device", "cpu", "--ledger")[0] == 0
    made = read_entry(home / "entries/mini.json")
    assert replace(made, model=None, pictures=None) == scores and made.pictures is not None
    assert (home / "entries" / made.pictures.file).is_file()
    training = made.model.training
    assert training == Cost(documents=1_360_000, tokens=82_069_049, seconds=13425, flops=training.flops)


# -- the entry --------------------------------------------------------------------------------------------------------

def test_pictures_are_checked() -> None:
    with pytest.raises(ValueError, match="a seed and a verdict for each of 2"):
        Pictures(file="a.png", prompts=("a", "b"), seeds=(0,), right=(True, False))
    with pytest.raises(ValueError, match="beside the entry"):
        Pictures(file="../a.png", prompts=(), seeds=(), right=())


def test_refusals_reach_every_kind_of_document(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(self, documents, *args, **kwargs):
        if any(piece.target for d in documents for piece in d.of(Boxes)):
            raise TypeError("no boxes")
        return list(documents)

    monkeypatch.setattr(System, "generate", generate)
    assert league.refusals(Bagel(Bagel.tiny())) == {"refer": "no boxes"}


def test_recipes_of_the_league_are_found(tmp_path: Path) -> None:
    assert isinstance(verb.recipe_of("bagel").data[0], Source)
    with pytest.raises(ValueError, match="a recipe of its name"):
        verb.recipe_of("vlm")
