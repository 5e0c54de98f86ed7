"""The doctor finds what is planted."""
import json
import shutil

import numpy as np
import pytest

from diptych.data.doctor import inspect_data, open_data
from diptych.data.images import read_image, write_image
from diptych.document import Document, Image, Text


def _picture(path, shade, size=(6, 8)):
    write_image(Image.from_uint8(np.full((*size, 3), shade, np.uint8)), path)


class Words:
    """A tokenizer that knows few words."""

    known = ("a", "cat", "dog", "?")

    def encode(self, text):
        return [self.known.index(w) if w in self.known else 3 for w in text.split()]

    def decode(self, ids):
        return " ".join(self.known[i] for i in ids)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pets"
    for i in range(3):
        _picture(path / f"{i}.png", 40 * i)
    _picture(path / "wide.jpg", 200, (10, 20))
    shutil.copy(path / "0.png", path / "copy.png")
    (path / "cut.png").write_bytes((path / "1.png").read_bytes()[:50])
    (path / "page.png").write_text("<!DOCTYPE html>")
    texts = {"0": "a cat", "1": "a dog", "2": "a zebra", "wide": "a long dog ä", "copy": "a cat", "cut": "x",
             "page": "y"}
    rows = [{"file_name": f"{k}.jpg" if k == "wide" else f"{k}.png", "text": v, "licence": "free"}
            for k, v in texts.items()] + [{"file_name": "gone.png", "text": "z", "year": 3}]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


def test_folder_report(folder, tmp_path):
    report = inspect_data(folder, samples=2, sheet=tmp_path / "sheet.png")
    assert report.format == "pictures with metadata.jsonl" and report.documents == 5
    reasons = {name.rsplit("/", 1)[1]: reason for name, reason in report.problems.items()}
    assert sorted(reasons) == ["cut.png", "gone.png", "page.png"] and "web page" in reasons["page.png"]
    assert "damaged" in reasons["cut.png"] and "missing" in reasons["gone.png"]
    assert report.lengths == [5, 5, 7, 12, 5] and report.unit == "characters"
    assert report.unused == {"licence": 5} and report.sizes == {(6, 8): 4, (10, 20): 1}
    assert report.modes == {"PNG RGB": 5, "JPEG RGB": 1, "not a picture": 1}
    assert [[n.rsplit("/", 1)[1] for n in names] for names in report.same_files] == [["0.png", "copy.png"]]
    assert report.repeated == 1 and report.pieces == {"user text": 5, "assistant image (target)": 5}
    assert report.shown[0] == '[draw]\n  user: "a cat"\n  assistant*: <image 8 x 6>'
    sheet = read_image(tmp_path / "sheet.png").to_uint8()
    assert sheet.shape[0] == 2 * 168 and tuple(sheet[64, 64]) == (0, 0, 0)
    text = str(report)
    for part in ("5 usable documents, 3 problems", "20 x 10", "licence", "gone.png: listed", "sheet.png", "most 12",
                 "0.png = ", "1 documents repeat"):
        assert part in text, part


def test_tokens_show_what_survives(folder):
    report = inspect_data(folder, Words(), limit=3)
    assert report.unit == "tokens" and report.lengths == [2, 2, 2]
    assert 'user: "a ?" (2 tokens)' in report.shown[2] and "text per document in tokens" in str(report)


def test_conversations_and_documents(tmp_path):
    _picture(tmp_path / "a.png", 9)
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "source": "web"}
    llava = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"},
                                                 {"from": "gpt", "value": "grey"}]}
    document = Document([Text(text="a"), Text(text="b", role="assistant", target=True)]).to_dict()
    for name, content, kind in (("chat.jsonl", json.dumps(chat), "chat messages"),
                                ("list.jsonl", json.dumps(chat["messages"]), "chat messages"),
                                ("llava.json", json.dumps([llava]), "LLaVA conversations"),
                                ("pretty.json", json.dumps([llava], indent=2), "LLaVA conversations"),
                                ("documents.jsonl", json.dumps(document), "documents")):
        (tmp_path / name).write_text(content)
        report = inspect_data(tmp_path / name)
        assert (report.format, report.documents, report.problems) == (kind, 1, {})
    (tmp_path / "chat.jsonl").write_text("oops\n" + json.dumps(chat))
    report = inspect_data(tmp_path / "chat.jsonl")
    assert list(report.problems) == [f"{tmp_path}/chat.jsonl:1"] and report.unused == {"source": 1}
    assert 'assistant*: "yo"' in report.shown[0]


def test_texts_beside_pictures(tmp_path):
    _picture(tmp_path / "a.png", 1)
    (tmp_path / "a.txt").write_text("dark")
    assert open_data(tmp_path)[1] == "pictures with texts beside them"


def test_what_is_no_data_set_is_explained(folder, tmp_path):
    assert open_data(folder / "metadata.jsonl")[0].size == 7
    with pytest.raises(ValueError, match=r"parts pets; fix: name one of them"):
        open_data(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "half.json").write_text('[{"id":\n')
    for name, error in (("empty", "pictures in"), ("odd.jsonl", "got the fields prompt, answer"),
                        ("text.txt", "no JSON records"), ("half.json", r"half\.json")):
        with pytest.raises(ValueError, match=error):
            open_data(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_data(tmp_path / "nothing")
