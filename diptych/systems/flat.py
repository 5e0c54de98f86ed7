"""What systems share whose picture codes are words of the language model: code k is id `first_code` + k of one table
and one head, pictures are read through the same codes, and one that was drawn has been read by that.

    L = w_text CE(text) / n_text + w_image CE(codes) / n_codes              one softmax over all words

Beside what `systems.coded` asks for, a system provides `first_code` and `values`, and blocks of codes that begin with a
mark.
"""
from collections.abc import Generator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from diptych.objectives import next_token
from diptych.parts.interleave import Writer
from diptych.systems.base import Work
from diptych.systems.coded import Coded
from diptych.systems.works import Encode, Grid, Read, Reader


class Flat(Coded):
    first_code: int
    values: int

    def drop_rates(self) -> tuple[float, float, float]:
        return self.config.drop_text, 0.0, 0.0

    def write_seen(self, w: Writer, seen: Tensor, coded: Tensor, pictures: list[Tensor], views: list[Tensor]) -> None:
        if not pictures or pictures[-1] is not coded:
            pictures.append(seen)
            w.code(len(pictures) - 1, w.plan(self.grid(seen)), drawn=False)

    def code_tokens(self, codes: Tensor) -> Tensor:
        return self.embed(self.first_code + codes)

    def drawing_head(self) -> Tensor:
        """Of the codes alone: what the grammar allows in a picture."""
        return self.head.weight[self.first_code : self.first_code + self.values]

    def code_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.drawing_head())

    def code_error(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Among all words, as texts are learnt."""
        return next_token.cross_entropy(self.head(hidden), self.first_code + codes)

    def _look_at(self, reader: Reader, pixels: Tensor, x: Tensor | None, grid: Grid | None,
                 copy: bool) -> Generator[Work, Any, None]:
        """Read a given picture through its codes; one that was drawn stands in the context already."""
        if x is None:
            picture = self.views(pixels)[0]
            codes = yield Encode(picture)
            w = self.writer(reader)
            w.code(0, w.plan(self.grid(picture)), drawn=False)
            yield Read(reader, w, codes=[codes])
