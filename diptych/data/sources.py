"""Sources of documents with random access: `source.document(i)` is deterministic and reads its files only then.

`size` is the number of documents, or None for an endless source. A document that cannot be read raises
`BrokenDocument`; whoever asked (the mixture, the doctor) skips it and notes it in `problems`, never silently.
"""
import csv
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.images import SUFFIXES, Fit, decode_image
from diptych.data.order import Schedule
from diptych.document import Document, Image, Piece, Text

TEXT_FIELDS = ("text", "caption", "captions", "prompt", "description")  # the first that a row has is its text
_HUMAN = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BrokenDocument(ValueError):
    """A document that cannot be made, with the file (and line) to look at."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.reason)


class Problems:
    """What was skipped and why, by file name; each file once."""

    def __init__(self) -> None:
        self.items: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        self.items.setdefault(name, reason)

    def update(self, items: Mapping[str, str]) -> None:
        for name, reason in items.items():
            self.add(name, reason)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.items.items())

    def summary(self, limit: int = 3) -> str:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(self)[:limit])
        more = f"; and {len(self) - limit} more" if len(self) > limit else ""
        return f"{len(self)} problems" + (f" ({shown}{more})" if len(self) else "")


class Source(ABC):
    """Documents by index."""

    name: str
    size: int | None

    def __init__(self, name: str, size: int | None) -> None:
        self.name, self.size = name, size
        self.problems = Problems()

    @abstractmethod
    def document(self, index: int) -> Document:
        """The document at `index` (below `size`); BrokenDocument if its files are bad."""

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError(f"expected a finite source, got {self.name}, which is endless")
        return self.size

    def _checked(self, index: int) -> int:
        if index < 0 or (self.size is not None and index >= self.size):
            raise IndexError(f"expected an index below {self.size} in {self.name}, got {index}")
        return index


class ListSource(Source):
    """Documents in memory."""

    def __init__(self, documents: Iterable[Document], name: str = "list") -> None:
        self._documents = list(documents)
        super().__init__(name, len(self._documents))

    def document(self, index: int) -> Document:
        return self._documents[self._checked(index)]


class WorldSource(Source):
    """Documents of the world, endless or the first `size`: task names with weights, one split of one world."""

    def __init__(self, world: Any, tasks: Mapping[str, float], split: str = "train", size: int | None = None) -> None:
        if not tasks or not all(w > 0 for w in tasks.values()):
            raise ValueError(f"expected task names with positive weights, got {dict(tasks)}")
        self._world, self._split = world, split
        self._tasks = list(tasks)
        self._schedule = Schedule(tuple(tasks.values()))
        label = world if isinstance(world, str) else world.name
        super().__init__(f"world/{label}/{split}/{'+'.join(f'{t}:{w:g}' for t, w in tasks.items())}", size)

    def document(self, index: int) -> Document:
        from diptych.world import tasks

        task = self._tasks[self._schedule.choice(self._checked(index))]
        return tasks.document(task, index, split=self._split, world=self._world)


class _FileSource(Source):
    """Shared by sources that read picture files. `size` None keeps the size of the file.

    `watch` is called with the name and bytes of every picture file before it is decoded.
    """

    watch: Callable[[str, bytes], None] | None = None

    def __init__(self, path: str | os.PathLike[str], size: tuple[int, int] | None, mode: Fit) -> None:
        self.path = Path(path)
        self._fit: dict[str, Any] = {"size": size, "mode": mode}
        super().__init__(str(path), 0)

    def _image(self, path: str | Path) -> Image:
        try:
            data = Path(path).read_bytes()
            if self.watch is not None:
                self.watch(str(path), data)
            return decode_image(data, name=str(path), **self._fit)
        except (OSError, ValueError) as error:
            raise BrokenDocument(str(path), str(error)) from error


class FolderSource(_FileSource):
    """Pictures with captions: `[Image, Text request, Text*]` and `[Text, Image*]`.

    Captions come from `metadata.jsonl` or `metadata.csv` (a `file_name` and a text column, as in Hugging Face image
    folders; a list of texts makes several documents), or from a `.txt` beside each picture. `task` is `caption`
    (picture -> text), `draw` (text -> picture) or `both` (twice as many documents). Other columns go into `meta`.
    An empty `request` leaves that piece out.
    """

    def __init__(self, path: str | os.PathLike[str], task: str = "both", *, text: str | None = None,
                 request: str = "describe the picture", size: tuple[int, int] | None = None,
                 mode: Fit = "crop") -> None:
        super().__init__(path, size, mode)
        if task not in ("caption", "draw", "both"):
            raise ValueError(f"expected task to be caption, draw or both, got {task!r}")
        if not self.path.is_dir():
            raise FileNotFoundError(f"expected a folder of pictures, got {str(self.path)!r}, which is none")
        self.tasks = ("caption", "draw") if task == "both" else (task,)
        self._text, self._request = text, request
        self.rows: list[tuple[str, str, dict[str, Any]]] = []  # file name, text, other columns
        table = next((p for n in ("metadata.jsonl", "metadata.csv") if (p := self.path / n).is_file()), None)
        self.table = table.name if table else None
        if table:
            self._index_table(table)
        else:
            self._index_texts()
        self.name = f"{self.path}:{task}"
        self.size = len(self.rows) * len(self.tasks)

    def document(self, index: int) -> Document:
        row, which = divmod(self._checked(index), len(self.tasks))
        file, text, rest = self.rows[row]
        task = self.tasks[which]
        picture, words = self._image(self.path / file), Text(text=text)
        asked: list[Piece] = [words]
        if task == "caption":
            asked = [picture, Text(text=self._request)] if self._request else [picture]
        answer = (words if task == "caption" else picture).replace(role="assistant", target=True)
        return Document((*asked, answer), task, {"file": file, **rest})

    def _index_table(self, table: Path) -> None:
        files = set(pictures_below(self.path))
        listed = set()
        for line, row in _rows(table, self.problems):
            where = f"{table}:{line}"
            name = row.pop("file_name", None)
            if not isinstance(name, str):
                self.problems.add(where, f"expected a file_name, got columns {', '.join(row) or 'none'}")
                continue
            column = self._text or next((f for f in TEXT_FIELDS if f in row), None)
            texts = row.pop(column, None) if column else None
            listed.add(os.path.normpath(name))
            texts = [texts] if isinstance(texts, str) else texts
            texts = [t.strip() for t in texts if isinstance(t, str) and t.strip()] if isinstance(texts, list) else []
            if not texts:
                wanted = column or " or ".join(TEXT_FIELDS)
                self.problems.add(where, f"expected a text in {wanted}, got columns {', '.join(row) or 'none'}")
            elif os.path.normpath(name) not in files and not (self.path / name).is_file():
                self.problems.add(str(self.path / name), f"listed in {table.name} line {line} but missing")
            else:
                self.rows.extend((name, text, row) for text in texts)
        for file in sorted(files - listed):
            self.problems.add(str(self.path / file), f"not listed in {table.name}")

    def _index_texts(self) -> None:
        for file in pictures_below(self.path):
            beside = (self.path / file).with_suffix(".txt")
            try:
                text = beside.read_text("utf-8").strip()
            except FileNotFoundError:
                self.problems.add(str(self.path / file), f"no caption: {beside.name} is missing")
            except (OSError, UnicodeDecodeError) as error:
                self.problems.add(str(beside), f"expected UTF-8 text, got {error}")
            else:
                if text:
                    self.rows.append((file, text, {}))
                else:
                    self.problems.add(str(beside), "the caption is empty")


class _ConversationSource(_FileSource):
    """Conversations in a file with one record per line, indexed by byte offset, or in one JSON array."""

    def __init__(self, path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None,
                 size: tuple[int, int] | None = None, mode: Fit = "crop") -> None:
        super().__init__(path, size, mode)
        if not self.path.is_file():
            raise FileNotFoundError(f"expected a file of conversations, got {str(self.path)!r}, which is none")
        self._root = Path(root) if root is not None else self.path.parent
        self._array: list[Any] | None = None
        if _starts_with_array(self.path):
            try:
                records: list[Any] = json.loads(self.path.read_text("utf-8"))
            except ValueError as error:
                raise ValueError(f"expected a JSON array in {self.path}, got {error}") from error
            self._array, self.size = records, len(records)
        else:
            self._lines = _index_lines(self.path)
            self.size = len(self._lines)

    def record(self, index: int) -> tuple[str, Any]:
        """(where it stands, the parsed record)."""
        self._checked(index)
        if self._array is not None:
            return f"{self.path}[{index}]", self._array[index]
        number, start, length = (int(v) for v in self._lines[index])
        where = f"{self.path}:{number}"
        with open(self.path, "rb") as file:  # opened each time: nothing to share between worker processes
            file.seek(start)
            line = file.read(length)
        try:
            return where, json.loads(line)
        except ValueError as error:
            raise BrokenDocument(where, f"expected a JSON object, got {error}") from error

    def document(self, index: int) -> Document:
        where, record = self.record(index)
        try:
            document = self._convert(record)
        except BrokenDocument:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BrokenDocument(where, f"{type(error).__name__}: {error}") from error
        if not document.targets:
            raise BrokenDocument(where, "expected an assistant message to learn, got none")
        return document

    @abstractmethod
    def _convert(self, record: Any) -> Document: ...

    def _picture(self, reference: str) -> Image:
        if reference.startswith(("http://", "https://")):
            raise ValueError(f"expected a picture file, got the address {reference[:80]}; fix: download it first")
        return self._image(self._root / reference.removeprefix("file://"))


class MessagesSource(_ConversationSource):
    """JSON lines of OpenAI chat messages (`{"messages": [...]}` or the list itself); assistant pieces are targets.

    Pictures are data URLs or paths (relative to the file or `root`), as `image_url` or `image` parts, or as `<image>`
    in the text with an `images` list beside `messages`. A `task` beside `messages` names the task.
    """

    def _convert(self, record: Any) -> Document:
        if isinstance(record, list):
            record = {"messages": record}
        if "pieces" in record:  # a whole document in its own form
            return Document.from_dict(record)
        pictures = list(record.get("images") or [])
        messages = [self._placeholders(m, pictures) for m in record["messages"]]
        if pictures:
            raise ValueError(f"expected an <image> for every picture, got {len(pictures)} more pictures")
        document = Document.from_messages(messages, train=True, task=record.get("task", "chat"), read=self._picture)
        return Document(document.pieces, document.task, {k: v for k, v in record.items()
                                                         if k not in ("messages", "images", "task")})

    def _placeholders(self, message: Mapping[str, Any], pictures: list[str]) -> Mapping[str, Any]:
        content = message.get("content")
        if not pictures or not isinstance(content, str):
            return message
        return {**message, "content": [{"type": kind, kind: value} for kind, value in _split(content, pictures)]}


class LlavaSource(_ConversationSource):
    """LLaVA: `{"image": path or list, "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]}`."""

    def _convert(self, record: Any) -> Document:
        pictures = record.get("image") or record.get("images") or []
        pictures = [pictures] if isinstance(pictures, str) else list(pictures)
        pieces: list[Piece] = []
        for turn in record["conversations"]:
            speaker = turn["from"]
            if speaker not in _HUMAN:
                raise ValueError(f"expected from to be one of {', '.join(_HUMAN)}, got {speaker!r}")
            role = _HUMAN[speaker]
            for kind, value in _split(turn["value"], pictures):
                piece = Text(text=value) if kind == "text" else self._picture(value)
                pieces.append(piece.replace(role=role, target=role == "assistant"))
        if pictures:
            raise ValueError(f"expected an <image> for every picture, got {len(pictures)} more pictures")
        return Document(tuple(pieces), "chat", {k: v for k, v in record.items()
                                                if k not in ("conversations", "image", "images")})


# -- files ------------------------------------------------------------------------------------------------------------

def pictures_below(folder: Path) -> list[str]:
    """Relative paths of all picture files below a folder, sorted, hidden ones left out."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [os.path.relpath(os.path.join(root, f), folder) for f in files
                  if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
    return sorted(found)


def _rows(table: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a .jsonl or .csv table; lines that are no rows become problems."""
    with open(table, encoding="utf-8-sig", errors="replace", newline="") as file:
        if table.suffix == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, {k: v for k, v in row.items() if k is not None}
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    problems.add(f"{table}:{number}", f"expected a JSON object, got {error}")
                    continue
                if isinstance(row, dict):
                    yield number, row
                else:
                    problems.add(f"{table}:{number}", f"expected a JSON object, got a {type(row).__name__}")


def _starts_with_array(path: Path) -> bool:
    """One JSON array over many lines, as opposed to a line per record (which may itself be an array)."""
    with open(path, "rb") as file:
        head = file.read(65536).lstrip()
    if not head.startswith(b"["):
        return False
    first = head.split(b"\n", 1)[0]
    try:
        value = json.loads(first)
    except ValueError:
        return True
    return not (isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0])


def _index_lines(path: Path) -> np.ndarray:
    """(records, 3): line number from 1, byte offset and length of every line that is not blank."""
    rows, position = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append((number, position, len(line)))
            position += len(line)
    return np.array(rows, np.int64).reshape(-1, 3)


def _split(text: str, pictures: list[str]) -> Iterator[tuple[str, str]]:
    """("text", words) and ("image_url", path) in order; every <image> takes one off the front of `pictures`."""
    for i, part in enumerate(re.split(r"\s*<image>\s*", text)):
        if i > 0:
            if not pictures:
                raise ValueError("expected a picture for every <image>, got fewer")
            yield "image_url", pictures.pop(0)
        if part:
            yield "text", part
