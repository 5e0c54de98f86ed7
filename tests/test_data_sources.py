"""Files become documents; files that cannot are named."""
import base64
import json
import pickle

import numpy as np
import pytest

from diptych.data.images import read_image, write_image
from diptych.data.mix import Mixture
from diptych.data.sources import BrokenDocument, FolderSource, ListSource, LlavaSource, MessagesSource, WorldSource
from diptych.document import Document, Image, Text


def _picture(path, shade=0, size=(6, 8)):
    write_image(Image.from_uint8(np.full((*size, 3), shade, np.uint8)), path)
    return read_image(path)


def _lines(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
    return path


def _all(source):
    return [source.document(i) for i in range(len(source))]


def said(piece):
    return piece.replace(role="assistant", target=True)


# -- folders ----------------------------------------------------------------------------------------------------------

def test_folder_with_metadata(tmp_path):
    cat, dog = _picture(tmp_path / "a" / "cat.png", 10), _picture(tmp_path / "dog.png", 20)
    _lines(tmp_path / "metadata.jsonl", [{"file_name": "a/cat.png", "text": " a cat ", "id": 7},
                                         {"file_name": "dog.png", "text": ["a dog", "un chien"]}])
    documents = _all(FolderSource(tmp_path, "both"))
    assert [d.task for d in documents] == ["caption", "draw"] * 3
    assert documents[0] == Document([cat, Text(text="describe the picture"), said(Text(text="a cat"))], "caption",
                                    {"file": "a/cat.png", "id": 7})
    assert documents[1] == Document([Text(text="a cat"), said(cat)], "draw", {"file": "a/cat.png", "id": 7})
    assert [d.pieces[0].text for d in documents[3::2]] == ["a dog", "un chien"] and documents[3].targets == (said(dog),)
    short = FolderSource(tmp_path, "caption", request="")
    assert len(short) == 3 and short.document(0).pieces == (cat, said(Text(text="a cat")))
    assert len(FolderSource(tmp_path, "draw")) == 3 and not short.problems


def test_folder_names_every_row_it_cannot_use(tmp_path):
    for name in ("ok.png", "empty.png", "stray.png", "notext.png"):
        _picture(tmp_path / name)
    _lines(tmp_path / "metadata.jsonl", [
        {"file_name": "ok.png", "text": "fine"}, {"file_name": "gone.png", "text": "x"}, "{broken", "", [1],
        {"text": "no name"}, {"file_name": "empty.png", "text": " "}, {"file_name": "notext.png", "title": "t"}])
    source = FolderSource(tmp_path, "draw")
    assert [d.pieces[0].text for d in _all(source)] == ["fine"]
    found = {name.rsplit("/", 1)[1]: reason for name, reason in source.problems}
    assert list(found) == ["gone.png", "metadata.jsonl:3", "metadata.jsonl:5", "metadata.jsonl:6", "metadata.jsonl:7",
                           "metadata.jsonl:8", "stray.png"]
    assert "line 2 but missing" in found["gone.png"] and "not listed" in found["stray.png"]
    assert "file_name, got columns text" in found["metadata.jsonl:6"]
    assert "got columns title" in found["metadata.jsonl:8"]


def test_folder_with_other_tables_and_columns(tmp_path):
    _picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text('file_name,caption,title\na.png,"red, round",ball\n', "utf-8")
    assert FolderSource(tmp_path, "draw").document(0).pieces[0].text == "red, round"
    assert FolderSource(tmp_path, "draw", text="title").document(0).pieces[0].text == "ball"
    source = FolderSource(tmp_path, text="nope")
    assert len(source) == 0 and "a text in nope" in source.problems.summary()


def test_folder_with_texts_beside_pictures(tmp_path):
    for name in ("b.PNG", "sub/a.jpg", "alone.png", "blank.png", ".hidden.png"):
        _picture(tmp_path / name)
    (tmp_path / "b.txt").write_text("ein Bär\n", "utf-8")
    (tmp_path / "sub" / "a.txt").write_text("a hill", "utf-8")
    (tmp_path / "blank.txt").write_text("\n", "utf-8")
    source = FolderSource(tmp_path, "draw")
    assert [(d.pieces[0].text, d.meta["file"]) for d in _all(source)] == [("ein Bär", "b.PNG"), ("a hill", "sub/a.jpg")]
    assert {n.rsplit("/", 1)[1]: r for n, r in source.problems} == {
        "alone.png": "no caption: alone.txt is missing", "blank.txt": "the caption is empty"}


def test_damaged_pictures_are_skipped_and_named(tmp_path):
    for i in range(4):
        _picture(tmp_path / f"{i}.png", i)
        (tmp_path / f"{i}.txt").write_text(f"n{i}")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    source = FolderSource(tmp_path, "draw")
    with pytest.raises(BrokenDocument, match=r"2\.png.*damaged") as caught:
        source.document(2)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    texts = [d.pieces[0].text for d in Mixture([(source, 1)]).take(20)]
    assert set(texts) == {"n0", "n1", "n3"} and list(source.problems.items) == [str(tmp_path / "2.png")]


def test_pictures_are_read_late_and_fitted(tmp_path):
    _picture(tmp_path / "a.png", size=(30, 50))
    (tmp_path / "a.txt").write_text("a")
    assert FolderSource(tmp_path, "draw", size=(16, 12), mode="pad").document(0).pieces[1].size == (16, 12)
    source = FolderSource(tmp_path, "draw")
    _picture(tmp_path / "a.png", size=(3, 3))
    assert source.document(0).pieces[1].size == (3, 3)


def test_wrong_paths_and_indices(tmp_path):
    for make in (FolderSource, MessagesSource, LlavaSource):
        with pytest.raises(FileNotFoundError, match="nothing"):
            make(tmp_path / "nothing")
    with pytest.raises(ValueError, match="caption, draw or both"):
        FolderSource(tmp_path, "sing")
    with pytest.raises(IndexError, match="below 1"):
        ListSource([Document([])]).document(1)


# -- conversations ----------------------------------------------------------------------------------------------------

def test_messages(tmp_path):
    red, blue = _picture(tmp_path / "img" / "red.png", 99), _picture(tmp_path / "blue.png", 11)
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "blue.png").read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": "img/red.png"}},
             {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "which is red?"}]
    path = _lines(tmp_path / "chat.jsonl", [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "the first"}], "id": 4},
        "", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello ä"}],
        {"messages": [{"role": "user", "content": "<image>\nand <image>?"}, {"role": "assistant", "content": "yes"}],
         "images": ["img/red.png", "blue.png"], "task": "compare"}])
    first, second, third = _all(MessagesSource(path))
    assert first == Document([red, blue, Text(text="which is red?"), said(Text(text="the first"))], "chat", {"id": 4})
    assert second.targets == (said(Text(text="hello ä")),)
    assert third == Document([red, Text(text="and"), blue, Text(text="?"), said(Text(text="yes"))], "compare")


def test_documents_in_their_own_form(tmp_path):
    document = Document([Text(text="draw"), said(Image.from_uint8(np.zeros((2, 2, 3), np.uint8)))], "draw", {"a": 1})
    assert _all(MessagesSource(_lines(tmp_path / "d.jsonl", [document.to_dict()]))) == [document]


@pytest.mark.parametrize(("row", "reason"), [
    ("{not json", "expected a JSON object"), ({"text": "a"}, "KeyError: 'messages'"), ("5", "TypeError"),
    ({"messages": [{"role": "user", "content": "only asks"}]}, "assistant message to learn"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "no.png"}}]}]}, "no.png"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://a/b"}]}]}, "download it"),
    ({"messages": [{"role": "user", "content": "<image>"}], "images": ["a.png", "a.png"]}, "1 more pictures"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "role")])
def test_broken_messages_are_named_by_line(tmp_path, row, reason):
    _picture(tmp_path / "a.png")
    source = MessagesSource(_lines(tmp_path / "chat.jsonl", ["", row]))
    with pytest.raises(BrokenDocument, match=reason) as caught:
        source.document(0)
    assert caught.value.name in (f"{tmp_path}/chat.jsonl:2", f"{tmp_path}/no.png")


def test_llava(tmp_path):
    cat = _picture(tmp_path / "images" / "cat.png", 50)
    rows = [{"id": "7", "image": "cat.png", "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."},
                {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
            {"image": ["cat.png", "cat.png"], "conversations": [
                {"from": "human", "value": "Same? <image> <image>"}, {"from": "gpt", "value": "Yes"}]},
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "?"}]},
            {"conversations": [{"from": "robot", "value": "hi"}]}]
    path = tmp_path / "llava.json"
    for text in (json.dumps(rows, indent=1), json.dumps(rows), "\n".join(map(json.dumps, rows))):
        path.write_text(text, "utf-8")
        source = LlavaSource(path, root=tmp_path / "images")
        assert len(source) == 4
        assert source.document(0) == Document([cat, Text(text="What is it?"), said(Text(text="A cat.")),
                                               Text(text="Sure?"), said(Text(text="Yes."))], "chat", {"id": "7"})
        assert source.document(1).pieces[:3] == (Text(text="Same?"), cat, cat)
        for index, reason in ((2, "picture for every <image>"), (3, "got 'robot'")):
            with pytest.raises(BrokenDocument, match=reason):
                source.document(index)
    path.write_text('[{"id": ')
    with pytest.raises(ValueError, match=r"JSON array in .*llava\.json"):
        LlavaSource(path)


# -- the world --------------------------------------------------------------------------------------------------------

def test_world_source_mixes_tasks_by_weight():
    source = WorldSource("mini", {"caption": 3, "draw": 1}, "test")
    assert source.size is None
    with pytest.raises(TypeError, match="endless"):
        len(source)
    documents = [source.document(i) for i in range(40)]
    assert sum(d.task == "caption" for d in documents) == pytest.approx(30, abs=2)
    assert all(d.meta["split"] == "test" and d.meta["index"] == i for i, d in enumerate(documents))
    mixture = Mixture([(source, 1)], 3)
    assert mixture.documents_at(1000, 1) == [source.document(mixture.documents_at(1000, 1)[0].meta["index"])]
    with pytest.raises(ValueError, match="positive weights"):
        WorldSource("mini", {})
