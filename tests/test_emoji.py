"""The emoji pipeline on six drawn signs in place of the font: folder, judge, recipes, report."""
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Pil
from PIL import ImageDraw
from torch import nn

from diptych.data.mix import Mixture
from diptych.data.sources import FolderSource
from diptych.document import Document, Image, Text
from diptych.systems.autoencoder import Autoencoder
from diptych.systems.bagel import Bagel
from diptych.systems.base import Sampling, StepLogProbs
from diptych.training.recipe import load_recipe
from diptych.training.trainer import Trainer

ROOT = Path(__file__).parent.parent


def tool(name: str):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


emoji, judge = tool("emoji"), tool("emoji_judge")
report = tool("emoji_report")

NAMES = ("red ball", "blue box", "green bar", "yellow corner", "black ring", "pink arrow")


def glyph(number: int) -> Pil.Image:
    canvas = Pil.new("RGBA", (emoji.GLYPH, emoji.GLYPH))
    pen = ImageDraw.Draw(canvas)
    corner, arrow = [(4, 4), (132, 4), (4, 132)], [(4, 68), (80, 4), (80, 132)]
    shapes = [lambda: pen.ellipse((10, 10, 126, 126), fill=(220, 30, 30)),
              lambda: pen.rectangle((16, 16, 120, 120), fill=(30, 60, 200)),
              lambda: pen.rectangle((50, 4, 86, 132), fill=(20, 150, 40)),
              lambda: pen.polygon(corner, fill=(240, 210, 20)),
              lambda: pen.ellipse((12, 12, 124, 124), outline=(0, 0, 0), width=22),
              lambda: pen.polygon(arrow, fill=(250, 120, 180))]
    shapes[number]()
    return canvas


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "emoji"
    with pytest.MonkeyPatch.context() as patch:
        found = [(emoji.Emoji(chr(0x1F600 + i), name), glyph(i)) for i, name in enumerate(NAMES)]
        patch.setattr(emoji, "list_emoji", lambda font, limit: iter(found))
        font = SimpleNamespace(getname=lambda: ("none", "none"))
        emoji.make_folder(out, font, counts={"train": 6, "test": 2})
    return out


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "emoji.md"
    path.write_text((ROOT / "docs" / "emoji.md").read_text("utf-8"), "utf-8")
    return path


# -- the folder -------------------------------------------------------------------------------------------------------

def test_folder_serves_both_tasks_with_a_tokenizer_of_its_own(folder: Path) -> None:
    train = [json.loads(line) for line in (folder / "train" / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert len({r["phrasing"] for r in train}) > 12, "emoji take turns with the phrasings"
    assert [r["background"] == "white" for r in train[:6]] == [True] * 3 + [False] * 3
    captions = FolderSource(folder / "test", "caption", text="name")
    assert captions.document(3).targets[0].text == NAMES[1] and captions.document(3).meta["background"] != "white"
    from diptych.zoo.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    assert all(len(tokenizer.encode(name)) == 2 for name in NAMES), "a word is a token"
    assert tokenizer.decode(tokenizer.encode("a naïve ☃ on teal")) == "a naïve ☃ on teal"


def test_a_caption_loses_its_words_in_some_epochs_only(folder: Path) -> None:
    system = Bagel(Bagel.tiny())
    mixture = Mixture([(FolderSource(folder / "train", "draw"), 1.0)])
    lost: dict[str, list[bool]] = {}
    for position in range(36 * 40):
        document = mixture.document(position)
        lost.setdefault(document.meta["file"], []).append(system._drops(document)[0])
    shares = [sum(v) / len(v) for v in lost.values()]
    assert len(shares) == 36 and max(shares) < 0.4 and np.mean(shares) == pytest.approx(0.1, abs=0.03)


# -- the judge --------------------------------------------------------------------------------------------------------

def test_a_moved_rendering_equals_one_made_there(folder: Path) -> None:
    split = judge.read(folder / "test", white=False)
    for scale, dx, dy in ((0.8, 0.1, -0.05), (0.92, 0.0, 0.03)):
        moved = judge.move(split.pixels, split.rows, scale, dx, dy)
        for i, row in enumerate(split.rows):
            there = emoji.render(glyph(i), 64, emoji.BACKGROUNDS[row["background"]], scale, dx, dy)
            wanted = torch.from_numpy(Image.from_uint8(np.asarray(there)).pixels)
            off, before = ((x - wanted).abs().mean() for x in (moved[i], split.pixels[i]))
            assert float(off) < 0.03 and float(off) < 0.5 * float(before)


def test_the_judge_finds_an_emoji_wherever_it_is(folder: Path) -> None:
    test, train = (judge.read(folder / s, white=True) for s in ("test", "train"))
    own = torch.arange(6)
    distance = judge.distances(train.pixels, test.pixels, test.rows)
    assert judge.ranks(distance, own).tolist() == [0] * 6
    assert min(judge.ranks(distance, own.roll(1)).tolist()) > 0
    assert float(distance.diag().max()) < 0.25 * float(distance[~torch.eye(6, dtype=torch.bool)].min())
    assert judge.ranks(torch.ones(6, 6), own).tolist() == [5] * 6, "a tie is no find"
    only = torch.eye(6, dtype=torch.bool).roll(1, 0)
    assert judge.ranks(distance, own.roll(1), only).tolist() == [0] * 6, "others are not asked"


def test_a_folder_without_places_is_refused(tmp_path: Path) -> None:
    Pil.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": "x", "name": "x", "background": "white"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"expected dx, dy, scale in .* fix: make the folder with tools/emoji.py"):
        judge.read(tmp_path, white=True)


# -- the report -------------------------------------------------------------------------------------------------------

class Oracle(nn.Module):
    """Knows every picture and name; its codec changes nothing."""

    class Same(nn.Module):
        def latent(self, x):
            return x

        decode = latent

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.codec, self.device, self.folder = self.Same(), torch.device("cpu"), folder

    def default_sampling(self) -> Sampling:
        return Sampling()

    def generate(self, documents, sampling, seeds):
        return [Document((*d.pieces[:-1], self.answer(d)), d.task, d.meta) for d in documents]

    def name(self, document: Document) -> str:
        return NAMES[int(document.meta["codepoint"], 16) - 0x1F600]

    def answer(self, document: Document):
        assert document.pieces[-1].empty
        if document.task == "caption":
            return Text(text=self.name(document), target=True)
        split = "train" if document.meta["phrasing"].startswith("train") else "test"
        pixels = Image.from_uint8(np.asarray(Pil.open(self.folder / split / document.meta["file"]))).pixels
        return Image(pixels=pixels, target=True)

    def score(self, documents):
        right = [d.targets[0].text == self.name(d) for d in documents]
        return StepLogProbs([torch.tensor([0.0 if r else -1.0]) for r in right])


def test_an_oracle_is_right_and_its_controls_are_not(folder: Path, tmp_path: Path) -> None:
    made = report.Report(Oracle(folder), folder, items=6, candidates=4)
    made.run(tmp_path)
    value = {k: v.value for k, v in made.figures.items()}
    right = ("held_out_top1", "trained_top1", "codec_top1", "codec_elsewhere_top1", "colour_top1", "background",
             "chosen", "caption_white", "caption_colour", "caption_trained", "drawn_then_named")
    assert {k: value[k] for k in right} == dict.fromkeys(right, 1.0)
    assert value["chance_top1"] == value["chosen_blind"] == 0.0
    assert value["psnr_white"] == pytest.approx(60.0), "the largest that is stated"
    assert made.facts["backgrounds"] <= 7 and made.figures["chosen"].n == 6
    text = report.table(made.figures, made.facts | {"codec_seconds": None, "model_seconds": 90.0})
    assert "an unknown time for the codec and 1.5 min for the model" in text and "| 100.0% (61.0% to 100.0%)" in text


def test_the_recipes_and_the_report_work_together(folder: Path, tmp_path: Path, page: Path, capsys) -> None:
    common = ["size=tiny", "workers=0", "threads=0", "log_every=1", "save_every=2", "samples.every=0", "compile=[]"]
    recipe = load_recipe(ROOT / "recipes" / "emoji-codec.yaml", [
        *common, f"data.0.folder={folder / 'train'}", "stages.0.steps=2", "stages.0.batch=4", "stages.0.warmup=1"])
    codec = Trainer(recipe, tmp_path / "codec", device="cpu").run()
    assert isinstance(codec, Autoencoder) and codec.config.codec.latent_channels == 12
    recipe = load_recipe(ROOT / "recipes" / "emoji.yaml", [
        *common, *(f"data.{i}.folder={folder / 'train'}" for i in (0, 1)), "stages.0.steps=2", "stages.0.batch=6",
        "stages.0.warmup=1", f"init.codec={tmp_path / 'codec' / 'model'}#codec", "config.sampling.evaluations=2",
        f"config.tokenizer={folder / 'tokenizer.json'}", "config.vocabulary_size=1024"])
    model = Trainer(recipe, tmp_path / "run", device="cpu").run()
    assert isinstance(model, Bagel) and model.config.codec == codec.config.codec
    assert (tmp_path / "run" / "model" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()

    before = page.read_text("utf-8")
    arguments = [str(tmp_path / "run"), "--data", str(folder), "--out", str(tmp_path / "pictures"), "--page", str(page),
                 "--codec-run", str(tmp_path / "codec"), "--items", "4", "--candidates", "3"]
    assert report.main(arguments) == 0
    stored = json.loads((tmp_path / "pictures" / "emoji.json").read_text())
    assert stored["facts"]["emoji"] == 6 and stored["facts"]["model_seconds"] > 0
    assert stored["figures"]["held_out_top1"]["n"] == 4 and stored["figures"]["psnr_white"]["value"] < 30
    assert np.asarray(Pil.open(tmp_path / "pictures" / "emoji-drawings.png")).shape[1] > 900
    assert np.asarray(Pil.open(tmp_path / "pictures" / "emoji-codec.png")).shape[0] == 192
    after = page.read_text("utf-8")
    cut = before.index(report.MARKS[0]), before.index(report.MARKS[1])
    assert after.startswith(before[:cut[0]]) and after.endswith(before[cut[1]:]) and "| chance |" in after
    assert "](pictures/emoji-drawings.png)" in after
    assert report.main([*arguments[:1], "--data", str(tmp_path / "none"), *arguments[3:]]) == 1
    assert "error: expected a folder of pictures" in capsys.readouterr().err


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("words\n")
    with pytest.raises(ValueError, match="fix: add the two lines"):
        report.fill(tmp_path / "page.md", "table")
    assert (tmp_path / "page.md").read_text() == "words\n"
