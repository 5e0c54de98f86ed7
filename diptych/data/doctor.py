"""What is in a data set, what is wrong with it, and what a model will see of it."""
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pil
from PIL import ImageDraw

from diptych.data.images import fit, write_image
from diptych.data.sources import BrokenDocument, FolderSource, LlavaSource, MessagesSource, Source, pictures_below
from diptych.document import Document, Image, Text

BARS = 8
SHOWN = 20  # problems, duplicates and sizes in the printed form


@dataclass
class Report:
    """Findings about one data set. `str(report)` is the printable form."""

    path: str
    format: str
    documents: int = 0  # usable ones
    problems: dict[str, str] = field(default_factory=dict)  # file or line -> reason
    pieces: Counter[str] = field(default_factory=Counter)  # "user text", "assistant image (target)", ...
    unit: str = "characters"
    lengths: list[int] = field(default_factory=list)  # of the text of each document
    unused: Counter[str] = field(default_factory=Counter)  # field -> records that have it
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width) -> pictures
    modes: Counter[str] = field(default_factory=Counter)  # "PNG RGBA" -> files
    same_files: list[list[str]] = field(default_factory=list)  # picture files with equal bytes
    repeated: int = 0  # documents equal to an earlier one
    samples: list[Document] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)  # the samples as text
    sheet: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.format}",
                 f"{self.documents} usable documents, {len(self.problems)} problems", ""]
        lines += _block("pieces", [f"{n:>8}  {name}" for name, n in sorted(self.pieces.items())])
        if self.lengths:
            lines += _block(f"text per document in {self.unit}", _histogram(self.lengths))
        lines += _block("picture files", [f"{n:>8}  {mode}" for mode, n in self.modes.most_common()])
        sizes = [f"{n:>8}  {w} x {h}" for (h, w), n in self.sizes.most_common(SHOWN)]
        lines += _block("picture sizes (width x height)", sizes, len(self.sizes))
        lines += _block("fields no model sees", [f"{n:>8}  {name}" for name, n in self.unused.most_common()])
        same = [" = ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                for names in self.same_files[:SHOWN]]
        lines += _block("equal picture files", same, len(self.same_files))
        if self.repeated:
            lines += [f"{self.repeated} documents repeat an earlier one word for word", ""]
        problems = [f"{name}: {reason}" for name, reason in list(self.problems.items())[:SHOWN]]
        lines += _block("problems (skipped)", problems, len(self.problems))
        lines += _block("first documents (* is learned)", "\n".join(self.shown).splitlines())
        if self.sheet:
            lines += [f"pictures of the first documents: {self.sheet}"]
        return "\n".join(lines).rstrip() + "\n"


def open_data(path: str | os.PathLike[str]) -> tuple[Source, str]:
    """The source for a path, and the name of its format."""
    path = Path(path)
    if path.is_dir():
        splits = [p.name for p in sorted(path.iterdir()) if any((p / t).is_file() for t in _TABLES)]
        if splits and not any((path / t).is_file() for t in _TABLES):
            raise ValueError(f"expected one folder of pictures, got {path} with the parts {', '.join(splits)}; "
                             f"fix: name one of them, as {path / splits[0]}")
        if not pictures_below(path):
            raise ValueError(f"expected pictures in {path}, got none")
        source = FolderSource(path, "draw")
        return source, "pictures with " + (source.table or "texts beside them")
    if not path.is_file():
        raise FileNotFoundError(f"expected a folder or a file of documents, got {str(path)!r}, which does not exist")
    if path.name in _TABLES:
        return open_data(path.parent)
    record = _first_record(path)
    if isinstance(record, dict) and "conversations" in record:
        return LlavaSource(path), "LLaVA conversations"
    if isinstance(record, list) or (isinstance(record, dict) and "messages" in record):
        return MessagesSource(path), "chat messages"
    if isinstance(record, dict) and "pieces" in record:
        return MessagesSource(path), "documents"
    seen = f"the fields {', '.join(record)}" if isinstance(record, dict) else "no JSON records"
    raise ValueError(f"expected messages, conversations or pieces in the records of {path}, got {seen}; fix: use "
                     "a folder with metadata.jsonl, JSON lines with `messages`, or LLaVA JSON")


def inspect_data(path: str | os.PathLike[str], tokenizer: Any = None, *, samples: int = 4,
                 sheet: str | os.PathLike[str] | None = None, limit: int | None = None,
                 progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> Report:
    """Read every document (or the first `limit`) and report on the whole.

    tokenizer: has `encode` (and, to show what survives it, `decode`). sheet: where to write a PNG with the pictures of
    the first `samples` documents. progress: wraps the iteration, say tqdm.
    """
    source, kind = open_data(path)
    report = Report(str(path), kind, unit="tokens" if tokenizer is not None else "characters")
    files = _Files(report)
    source.watch = files.see  # type: ignore[attr-defined]
    seen: set[bytes] = set()
    for index in progress(range(len(source) if limit is None else min(limit, len(source)))):
        try:
            document = source.document(index)
        except BrokenDocument as error:
            source.problems.add(error.name, error.reason)
            continue
        _count(report, document, tokenizer)
        digest = _digest(document)
        report.repeated += digest in seen
        seen.add(digest)
        if len(report.samples) < samples:
            report.samples.append(document)
    report.problems = dict(source.problems)
    report.same_files = sorted(names for names in files.names.values() if len(names) > 1)
    report.shown = [show(d, tokenizer) for d in report.samples]
    if sheet is not None and report.samples:
        write_image(contact_sheet(report.samples), sheet)
        report.sheet = str(sheet)
    return report


def show(document: Document, tokenizer: Any = None) -> str:
    """One document in words; texts as the tokenizer gives them back."""
    lines = [f"[{document.task}]"]
    for piece in document:
        mark = "*" if piece.target else ""
        if isinstance(piece, Text):
            text = piece.text or ""
            count = ""
            if tokenizer is not None:
                ids = _encode(tokenizer, text)
                count = f" ({len(ids)} tokens)"
                text = tokenizer.decode(list(ids)) if hasattr(tokenizer, "decode") else text
            content = json.dumps(text, ensure_ascii=False) + count
        elif isinstance(piece, Image):
            content = f"<image {piece.size[1]} x {piece.size[0]}>" if piece.size else "<image>"
        else:
            content = f"<{piece.kind}>"
        lines.append(f"  {piece.role}{mark}: {content}")
    return "\n".join(lines)


def contact_sheet(documents: Sequence[Document], side: int = 128) -> Image:
    """One row per document: its pictures, with its texts below."""
    pictures = [[p for p in d.of(Image) if p.pixels is not None] for d in documents]
    columns, height = max(1, *map(len, pictures)), side + 40
    width = max(columns * side, 3 * side)
    sheet = Pil.new("RGB", (width, height * len(documents)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for row, (document, found) in enumerate(zip(documents, pictures, strict=True)):
        for column, picture in enumerate(found):
            small = Pil.fromarray(np.ascontiguousarray(fit(picture, side, side).to_uint8()))
            sheet.paste(small, (column * side, row * height))
        texts = [("* " if p.target else "") + (p.text or "") for p in document.of(Text)]
        for line, text in enumerate(texts[:3]):
            pen.text((2, row * height + side + 12 * line), text.replace("\n", " ")[:width // 6], fill=(0, 0, 0))
    return Image.from_uint8(np.asarray(sheet))


# -- counting ---------------------------------------------------------------------------------------------------------

_TABLES = ("metadata.jsonl", "metadata.csv")


class _Files:
    """Looks at every picture file once, before it is decoded."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.names: dict[bytes, list[str]] = {}
        self._known: set[str] = set()

    def see(self, name: str, data: bytes) -> None:
        if name in self._known:
            return
        self._known.add(name)
        self.names.setdefault(hashlib.sha256(data).digest(), []).append(name)
        try:
            with Pil.open(io.BytesIO(data)) as picture:
                self.report.modes[f"{picture.format} {picture.mode}"] += 1
        except Exception:  # whatever is wrong with it, decoding will name it
            self.report.modes["not a picture"] += 1


def _count(report: Report, document: Document, tokenizer: Any) -> None:
    report.documents += 1
    length = 0
    for piece in document:
        report.pieces[f"{piece.role} {piece.kind}{' (target)' if piece.target else ''}"] += 1
        if isinstance(piece, Text) and piece.text is not None:
            length += len(piece.text if tokenizer is None else _encode(tokenizer, piece.text))
        if isinstance(piece, Image) and piece.size is not None:
            report.sizes[piece.size] += 1
    report.lengths.append(length)
    report.unused.update(k for k in document.meta if k != "file")


def _encode(tokenizer: Any, text: str) -> Sequence[int]:
    ids = tokenizer.encode(text)
    return getattr(ids, "ids", ids)


def _digest(document: Document) -> bytes:
    digest = hashlib.sha256(document.task.encode())
    for piece in document:
        digest.update(f"\0{piece.kind}\0{piece.role}\0".encode())
        if isinstance(piece, Text):
            digest.update((piece.text or "").encode("utf-8", "surrogatepass"))
        elif isinstance(piece, Image) and piece.pixels is not None:
            digest.update(np.ascontiguousarray(piece.pixels).tobytes())
        else:
            digest.update(repr(piece).encode())
    return digest.digest()


def _first_record(path: Path) -> Any:
    """The first record that parses; later ones are judged one by one."""
    with open(path, "rb") as file:
        array = file.read(4096).lstrip().startswith(b"[")
        file.seek(0)
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            # One line may hold a whole array of records; a list of messages is a record itself.
            whole = isinstance(record, list) and record and isinstance(record[0], dict) and "role" not in record[0]
            return record[0] if whole else record
    if not array:
        return None
    try:
        return json.loads(path.read_text("utf-8"))[0]
    except (ValueError, IndexError) as error:
        raise ValueError(f"expected a JSON array with records in {path}, got {error}") from error


# -- printing ---------------------------------------------------------------------------------------------------------

def _block(title: str, lines: list[str], total: int | None = None) -> list[str]:
    if not lines:
        return []
    more = [f"  ... and {total - len(lines)} more"] if total is not None and total > len(lines) else []
    return [f"{title}:", *(f"  {line}" for line in lines), *more, ""]


def _histogram(lengths: Sequence[int]) -> list[str]:
    values = np.asarray(lengths)
    low, median, high, top = (int(np.quantile(values, q, method="nearest")) for q in (0, 0.5, 0.95, 1))
    lines = [f"least {low}, median {median}, 95% up to {high}, most {top}"]
    width = max(-(-(top - low + 1) // BARS), 1)
    counts = np.bincount((values - low) // width, minlength=1)
    for i, count in enumerate(counts):
        bar = "#" * round(40 * count / counts.max())
        lines.append(f"{low + i * width:>6} to {low + (i + 1) * width - 1:<6} {count:>8} {bar}")
    return lines
