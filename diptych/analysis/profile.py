"""How much pictures and words agree, layer by layer, in any system with a packed sequence.

Per depth, the mean state of a document's picture tokens and that of its words; `curve` says for how many of its nearest
neighbours by the one a document's neighbours by the other are the same (`alignment.mutual_neighbours`; UniFork, arXiv
2506.17202).
"""
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.analysis.alignment import mutual_neighbours
from diptych.analysis.layers import Passage, watched
from diptych.document import Document
from diptych.parts.tokens import Modality, Tokens
from diptych.parts.trunks import Trunk
from diptych.systems.batch import Batch
from diptych.systems.packed import Packed

Sides = tuple[list[Tensor], list[Tensor]]  # of pictures and of words: by depth, (documents, width)

# what may stand for a picture in a trunk, what is drawn before what is only seen
READ = (Modality.FEATURE, Modality.CODE, Modality.LATENT)
DRAWN = (Modality.CODE, Modality.LATENT, Modality.QUERY, Modality.FEATURE)


@torch.no_grad()
def sides(system: Packed, documents: Sequence[Document], seed: int = 0) -> Sides:
    """The mean states of these documents of one task, from one forward pass of its loss. Noise and times are drawn by
    `seed`."""
    trunk = getattr(system, "trunk", None)
    if not isinstance(trunk, Trunk):
        raise ValueError(f"expected a system with a trunk to look into, got {type(system).__name__}, which has none")
    written = [system.write(system.samples(document)[-1]) for document in documents]
    batch = Batch.of(written, [[i] for i in range(len(written))])
    drawn = any(piece.target and piece.kind == "image" for piece in documents[0])
    with watched(trunk) as passes:
        system.loss(batch.to(system.device), torch.Generator(system.device).manual_seed(seed))
    for passage in passes:
        found = _chosen(passage.tokens, DRAWN if drawn else READ, len(documents))
        if found is not None:
            return _pooled(passage, *found)
    raise ValueError(f"expected words and pictures in one trunk, got {type(system).__name__}, whose trunk does not see "
                     f"both when it {'draws' if drawn else 'reads'}")


def _chosen(tokens: Tokens, kinds: Sequence[Modality], rows: int) -> tuple[Tensor, Tensor] | None:
    """(rows, T) bool: tokens of the picture and of the words; None if a row has none of them."""
    if tokens.shape[0] != rows:
        return None
    words = (tokens.modality == Modality.TEXT) & tokens.valid()
    said = words & tokens.target  # where there is an answer: what was asked for says nothing of the picture
    words = said if bool(said.any(1).all()) else words
    for kind in kinds:
        picture = (tokens.modality == kind) & tokens.valid()
        if bool(picture.any(1).all()) and bool(words.any(1).all()):
            return picture, words
    return None


def _pooled(passage: Passage, picture: Tensor, words: Tensor) -> Sides:
    return [x.cpu() for x in passage.pooled(picture)], [x.cpu() for x in passage.pooled(words)]


def curve(parts: Sequence[Sides], k: int = 10) -> list[float]:
    """By depth, before the first layer and behind each, the share of neighbours in common over all documents."""
    pictures, words = ([torch.cat(depth) for depth in zip(*side, strict=True)] for side in zip(*parts, strict=True))
    k = min(k, math.ceil(len(pictures[0]) / 2))
    return [mutual_neighbours(p, w, k) for p, w in zip(pictures, words, strict=True)]
