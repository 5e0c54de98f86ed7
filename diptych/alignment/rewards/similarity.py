"""Contrastive similarity: the cosine of what an image-text encoder makes of a picture and of a text, or of two
pictures. By default the encoder is the zoo's `clip`, which reads 64 px."""
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.alignment.rewards.base import Facts, Failure, Rating, Reward
from diptych.document import Document, Image, Text

BATCH = 128


class Encoder(Protocol):
    """Unit vectors (b, width) of pictures (b, 3, side, side) in [-1, 1] and of texts."""

    def encode_image(self, images: Tensor) -> Tensor: ...

    def encode_text(self, texts: Sequence[str]) -> Tensor: ...


@cache
def _zoo() -> Encoder:
    from diptych import zoo

    return zoo.load("clip")


class _Similarity(Reward):
    FACTS: ClassVar[Facts]

    def __init__(self, encoder: Encoder | None = None, *, name: str = "zoo/clip", side: int = 64) -> None:
        """`name` tells encoders apart; `side`: of the square pictures that it reads."""
        if encoder is not None and name == "zoo/clip":
            raise ValueError("expected the name of an encoder that is not the zoo's, got none; fix: pass name=")
        self.encoder, self.name, self.side = encoder, name, side

    def options(self) -> dict[str, Any]:
        return {"encoder": self.name, "side": self.side}

    @property
    def measures(self) -> frozenset[str]:
        return frozenset({f"{self.facts.name} {self.name}"})

    @torch.no_grad()
    def images(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Unit vectors (n, width) of pictures (3, h, w) of any sizes."""
        encoder = self.encoder or _zoo()
        found = []
        for start in range(0, len(pictures), BATCH):
            scaled = [_scaled(torch.from_numpy(p), self.side) for p in pictures[start:start + BATCH]]
            found.append(encoder.encode_image(torch.stack(scaled).to(_device(encoder))).float().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> list[Tensor | str]:
        """A unit vector for each text, or why it has none: texts that are longer than the encoder reads are refused by
        it, one by one."""
        encoder = self.encoder or _zoo()
        try:
            return list(encoder.encode_text(texts).float().cpu())
        except ValueError as error:
            if len(texts) == 1:
                return [str(error)]
        return [found for text in texts for found in self.texts([text])]

    def compared(self, pairs: Sequence[tuple[Any, Any] | str], second: Callable[[Sequence[Any]], Sequence[Tensor | str]]
                 ) -> list[Rating | Failure]:
        """Cosines of (picture, whatever `second` encodes); a string says why there is no pair."""
        out: list[Rating | Failure] = [Failure(p if isinstance(p, str) else "") for p in pairs]
        known = [(i, *p) for i, p in enumerate(pairs) if not isinstance(p, str)]
        if not known:
            return out
        a, b = self.images([p for _, p, _ in known]), second([q for *_, q in known])
        for (i, *_), one, other in zip(known, a, b, strict=True):
            out[i] = Failure(other) if isinstance(other, str) else Rating(float((one * other).sum()))
        return out


def _scaled(picture: Tensor, side: int) -> Tensor:
    if picture.shape[1:] == (side, side):
        return picture
    return F.interpolate(picture[None], (side, side), mode="bilinear", antialias=True)[0]


def _device(encoder: Any) -> torch.device | str:
    parameters = getattr(encoder, "parameters", None)
    return next(parameters()).device if parameters is not None else "cpu"


class TextSimilarity(_Similarity):
    """Of a drawing and the last text before it, or of a given picture and what was said about it."""

    FACTS = Facts(name="clip-text", about="cosine of a picture and a text in a contrastive encoder", low=-1.0, high=1.0,
                  ties=False, needs=("model",), calls=2)

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        return self.compared([_picture_and_text(m) for m in made], self.texts)


def _picture_and_text(made: Document) -> tuple[np.ndarray, str] | str:
    drawn = [p for p in made.of(Image) if p.target]
    images, texts = made.of(Image), made.of(Text)
    if not images or not texts:
        return "no pair of picture and text"
    if drawn:
        before = [p for p in made.pieces[:made.pieces.index(drawn[-1])] if isinstance(p, Text)]
        return (drawn[-1].pixels, before[-1].text or "") if before else "no text before the drawing"
    return images[-1].pixels, texts[-1].text or ""


class ImageSimilarity(_Similarity):
    """Of the last drawing and its reference: the true picture if the asked document holds it, else the first one given
    (UAE, arXiv 2509.09666: the picture that a caption was made of)."""

    FACTS = Facts(name="clip-image", about="cosine of a drawing and its reference in a contrastive encoder", low=-1.0,
                  high=1.0, ties=False, needs=("reference", "model"), calls=2)

    def rate(self, asked: Sequence[Document], made: Sequence[Document]) -> list[Rating | Failure]:
        pairs = [_with_reference(a, m) for a, m in zip(asked, made, strict=True)]
        return self.compared(pairs, lambda pictures: list(self.images(pictures)))


def _with_reference(asked: Document, made: Document) -> tuple[np.ndarray, np.ndarray] | str:
    drawn = [p.pixels for p in made.of(Image) if p.target]
    there = [p for p in asked.of(Image) if not p.empty]
    if not drawn or not there:
        return "no drawing with a reference"
    true = [p for p in there if p.target]
    return drawn[-1], (true[-1] if true else there[0]).pixels
