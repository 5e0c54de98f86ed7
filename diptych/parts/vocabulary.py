"""Text to ids and back, and the special tokens that models of this library need. Wraps a `tokenizers` file."""
from functools import partial
from pathlib import Path

import numpy as np

from diptych.document import Boxes
from diptych.parts.resources import locate

LOCATIONS = 64  # <loc_0> .. <loc_63>: boxes in text are quantised to 1/64 of the side


class Vocabulary:
    """`source`: a `tokenizer.json`, or `zoo/NAME` for one that is shipped. Ids of the four marks are attributes."""

    def __init__(self, source: str | Path, *, marks: tuple[str, str, str, str] = (
            "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")) -> None:
        from tokenizers import Tokenizer

        path = self.path = locate(source, ".json")
        self.tokenizer = Tokenizer.from_file(str(path))
        self.tokenizer.encode_special_tokens = True  # marks typed by a user stay text
        self.names = marks
        ids = [i for m in marks if (i := self.tokenizer.token_to_id(m)) is not None]
        if len(ids) < len(marks):
            raise ValueError(f"expected {path} to have the tokens {', '.join(marks)}, got ids {ids}; "
                             "fix: add them as special tokens")
        self.start, self.end, self.image_start, self.image_end = ids
        first = self.tokenizer.token_to_id("<loc_0>")
        self.first_location = -1 if first is None else first

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def __reduce__(self) -> tuple:
        return partial(Vocabulary, marks=self.names), (self.path,)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_frame(self, text: str) -> list[int]:
        """Text of a template, in which the names of special tokens stand for them."""
        self.tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self.tokenizer.encode_special_tokens = True

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    # -- boxes as text: "label <loc x0> <loc y0> <loc x1> <loc y1>" one after the other ---------------------------

    def encode_boxes(self, piece: Boxes) -> list[int]:
        if self.first_location < 0:
            raise ValueError(f"expected location tokens in {self.path} to write boxes, got none; "
                             "fix: add <loc_0> .. <loc_63>")
        out: list[int] = []
        for i, box in enumerate(piece.boxes if piece.boxes is not None else ()):
            cells = np.clip(np.rint(np.asarray(box) * LOCATIONS), 0, LOCATIONS - 1).astype(int)
            out += self.encode(piece.labels[i]) if piece.labels else []
            out += [self.first_location + int(c) for c in cells]
        return out

    def decode_boxes(self, ids: list[int], piece: Boxes) -> Boxes:
        """Fill `piece` from ids. A label names the first box behind it; locations in other than fours are dropped."""
        boxes: list[list[float]] = []
        labels: list[str] = []
        label: list[int] = []
        cells: list[float] = []
        for token in [*ids, -1]:
            if 0 <= token - self.first_location < LOCATIONS and self.first_location >= 0:
                cells.append((token - self.first_location) / LOCATIONS)
                continue
            if len(cells) % 4 == 0:
                for i in range(0, len(cells), 4):
                    boxes.append(cells[i : i + 4])
                    labels.append("" if i else self.decode(label))
            if cells:
                label, cells = [], []
            label.append(token)
        named = tuple(labels) if any(labels) else ()
        return piece.replace(boxes=np.array(boxes, np.float32).reshape(-1, 4), labels=named)
