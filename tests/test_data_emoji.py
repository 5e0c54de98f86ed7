"""The emoji folder: deterministic, captioned, with held-out renderings and phrasings."""
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from diptych.data.sources import FolderSource

TOOL = Path(__file__).parent.parent / "tools" / "emoji.py"
spec = importlib.util.spec_from_file_location("emoji_tool", TOOL)
emoji = importlib.util.module_from_spec(spec)
sys.modules["emoji_tool"] = emoji
spec.loader.exec_module(emoji)

needs_font = pytest.mark.skipif(not emoji.FONT.is_file(),
                                reason=f"no {emoji.FONT}; apt-get install -y fonts-noto-color-emoji")


def _rows(folder, split):
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text("utf-8").splitlines()]


def test_a_missing_font_says_how_to_get_it(tmp_path, capsys):
    assert emoji.main([str(tmp_path / "out"), "--font", str(tmp_path / "no.ttf")]) == 1
    assert "apt-get install -y fonts-noto-color-emoji" in capsys.readouterr().err
    (tmp_path / "bad.ttf").write_bytes(b"not a font")
    assert emoji.main([str(tmp_path / "out"), "--font", str(tmp_path / "bad.ttf")]) == 1
    assert "expected a bitmap colour font" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_phrasings_and_names():
    train, test = (set(emoji.PHRASINGS[s]) for s in ("train", "test"))
    assert not train & test
    for phrasings in emoji.PHRASINGS.values():  # the first half has no background
        assert ["{b}" in p for p in phrasings] == [i >= len(phrasings) // 2 for i in range(len(phrasings))]
    names = {code: emoji._plain(code, name) for code, name in [
        (0x2764, "HEAVY BLACK HEART"), (0x260E, "BLACK TELEPHONE"), (0x26AB, "MEDIUM BLACK CIRCLE"),
        (0x1F5A4, "BLACK HEART"), (0x1F447, "WHITE DOWN POINTING BACKHAND INDEX"), (0x1F436, "DOG FACE")]}
    assert list(names.values()) == ["red heart", "telephone", "medium black circle", "black heart",
                                    "down pointing backhand index", "dog face"]
    assert not {"\u20e3", "\U0001f3fb", "\U0001f1e6", "\U0001f9b0"} & {e.text for e in emoji._candidates()}


@needs_font
def test_folder(tmp_path):
    assert emoji.main([str(tmp_path / "a"), "--limit", "5"]) == 0
    train, test = _rows(tmp_path / "a", "train"), _rows(tmp_path / "a", "test")
    assert len(train) == 30 and len(test) == 10
    names = {r["name"] for r in train}
    assert len(names) == 5 and names == {r["name"] for r in test}
    assert all(r["name"] in r["text"] and (r["background"] == "white" or r["background"] in r["text"])
               for r in train + test)
    assert not {r["text"] for r in train} & {r["text"] for r in test}
    pictures = {(tmp_path / "a" / s / r["file_name"]).read_bytes() for s, rs in (("train", train), ("test", test))
                for r in rs}
    assert len(pictures) == 40
    source = FolderSource(tmp_path / "a" / "train", "draw")
    document = source.document(3)
    assert not source.problems and document.pieces[1].size == (64, 64)
    assert tuple(document.pieces[1].to_uint8()[0, 0]) == emoji.BACKGROUNDS[train[3]["background"]]
    assert emoji.main([str(tmp_path / "b"), "--limit", "2"]) == 0
    for path in sorted((tmp_path / "b" / "train").glob("*.png")):
        assert path.read_bytes() == (tmp_path / "a" / "train" / path.name).read_bytes()
    assert emoji.main([str(tmp_path / "a")]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@needs_font
def test_glyphs_stay_inside_and_move_as_told():
    font = emoji.open_font(emoji.FONT)
    glyph = emoji.draw_glyph(font, "\U0001f436")
    assert emoji.draw_glyph(font, "\u4e00") is None and emoji.draw_glyph(font, "\u200d") is None

    def middle(**where):
        picture = np.asarray(emoji.render(glyph, 64, (255, 255, 255), **where)).min(axis=2) < 200
        rows, columns = np.nonzero(picture)
        return columns.mean(), rows.mean(), picture.sum()
    x, y, area = middle(scale=0.8, dx=0.0, dy=0.0)
    right, down, same = middle(scale=0.8, dx=0.1, dy=0.05)
    assert right - x == pytest.approx(6.4, abs=0.5) and down - y == pytest.approx(3.2, abs=0.5)
    assert same == pytest.approx(area, rel=0.05)
    assert middle(scale=0.6, dx=0.0, dy=0.0)[2] == pytest.approx(area * (0.6 / 0.8) ** 2, rel=0.1)
