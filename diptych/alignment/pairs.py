"""Documents in pairs, a question and a drawing that belong together, so that both are learnt in one step
(PairUni, arXiv 2510.25682).

    complete   every scene of the pool gets what it lacks: a drawing is asked a question, a question's scene is to draw
    aligned    the medoid of each cluster of pictures: one picture carries both tasks
    retrieved  of the others, a drawing with the most similar picture of a question, each picture at most once

Place 2 k of the source is the question of pair k, place 2 k + 1 its drawing; `meta` has the weight of their advantages,
1 or the root of the similarity. The features are those of the zoo's contrastive encoder.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diptych.alignment.advantages import pair_weights
from diptych.alignment.episodes import answer
from diptych.data.order import hash64, permute
from diptych.data.sources import Source
from diptych.document import Document, Image, Text
from diptych.world import tasks
from diptych.world.language import DRAW_REQUESTS, draw_prompt, request
from diptych.world.sample import Stream, find_world
from diptych.world.scene import Scene

Kind = Literal["all", "aligned", "retrieved", "random"]
Weight = Literal["sqrt", "linear", "none"]


class Pair(NamedTuple):
    """Numbers of the rows of a pool that give the question and the drawing, and how alike their pictures are."""

    question: int
    drawing: int
    similarity: float


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """`pool`: documents of each task that pairs are made of; `clusters`: how many aligned pairs are sought; `threshold`
    and `near`: the least cosine of a retrieved pair, and how many candidates a drawing has. `random` is the control:
    the documents of `all`, with partners by chance and weight 1."""

    kind: Kind = "all"
    pool: int = 512
    clusters: int = 128
    threshold: float = 0.6
    near: int = 5
    weight: Weight = "sqrt"

    def __post_init__(self) -> None:
        if not 1 <= self.clusters <= 2 * self.pool or self.near < 1 or not -1 <= self.threshold <= 1:
            raise ValueError(f"expected clusters within the pool, near >= 1 and a cosine as threshold, got {self}")


class PairSource(Source):
    """Endless: every epoch has all pairs once, in an order of its own."""

    def __init__(self, config: Pairs, world: str = "mini", *, seed: int = 0, features: Tensor | None = None) -> None:
        """`features` (2 pool, d): unit vectors of the pictures, questions first; by default the zoo's."""
        super().__init__(f"pairs/{world}/{config.kind}", None)
        self.config, self.seed = config, seed
        given = [tasks.document(task, n, world=world) for task in ("question", "draw") for n in range(config.pool)]
        self.questions = [d if d.task == "question" else answer(d, n) for n, d in enumerate(given)]
        self.drawings = [d if d.task == "draw" else to_draw(d) for d in given]
        found = encode(given) if features is None else features
        self.pairs = self._pairs(found)

    def _pairs(self, features: Tensor) -> list[Pair]:
        c = self.config
        medoids = find_medoids(features, c.clusters, self.seed)
        aligned = [Pair(n, n, 1.0) for n in medoids]
        left = [n for n in range(len(features)) if n not in set(medoids)]
        asks, draws = [n for n in left if n < c.pool], [n for n in left if n >= c.pool]
        retrieved = [Pair(asks[j], draws[i], s)
                     for i, j, s in match(features[draws] @ features[asks].T, c.threshold, c.near)]
        chosen = {"aligned": aligned, "retrieved": retrieved}.get(c.kind, aligned + retrieved)
        if not chosen:
            raise ValueError(f"expected pairs of kind {c.kind}, got none in a pool of {c.pool}; "
                             "fix: a larger pool, or a lower threshold")
        if c.kind != "random":
            return chosen
        key, size = hash64(self.seed, 3, 0), len(chosen)
        others = [chosen[permute(n, size, key)].drawing for n in range(size)]
        return [Pair(p.question, d, float(features[p.question] @ features[d]))
                for p, d in zip(chosen, others, strict=True)]

    def weight(self, pair: Pair) -> float:
        if self.config.weight == "none" or self.config.kind == "random" or pair.question == pair.drawing:
            return 1.0
        likeness = torch.tensor([pair.similarity])
        return float(pair_weights(likeness, torch.tensor([False])) if self.config.weight == "sqrt" else likeness)

    def document(self, index: int) -> Document:
        epoch, place = divmod(self._checked(index) // 2, len(self.pairs))
        number = permute(place, len(self.pairs), hash64(self.seed, 5, epoch))
        pair = self.pairs[number]
        made = self.drawings[pair.drawing] if index % 2 else self.questions[pair.question]
        return Document(made.pieces, made.task, {**made.meta, "weight": self.weight(pair), "pair": number})


def to_draw(question: Document) -> Document:
    """The scene of a question as something to draw, in the words of the world."""
    scene, world = Scene.from_dict(question.meta["scene"]), find_world(question.meta["world"])
    rng = Stream("pairs", world.name, question.meta["split"], question.meta["index"])
    text, spec = draw_prompt(scene, rng)
    shown = question.of(Image)[0]
    pieces = (Text(text=request(DRAW_REQUESTS, text, rng)), shown.replace(role="assistant", target=True))
    facts = {k: question.meta[k] for k in ("split", "index", "world", "scene")}
    return Document(pieces, "draw", {"task": "draw", **facts, "spec": tasks.claims(spec)})


@torch.no_grad()
def encode(documents: Sequence[Document], batch: int = 64) -> Tensor:
    """Unit vectors (n, d) of the first picture of each."""
    from diptych import zoo

    encoder = zoo.load("clip").eval()
    pixels = torch.stack([torch.from_numpy(d.of(Image)[0].pixels) for d in documents])  # type: ignore[arg-type]
    return torch.cat([encoder.encode_image(part) for part in pixels.split(batch)])


def find_medoids(features: Tensor, count: int, seed: int, rounds: int = 20) -> list[int]:
    """Rows (n, d) -> the one nearest to the centre of each cluster, by cosine (Lloyd's algorithm on the sphere, started
    at rows by chance). Clusters that lose all their rows have none."""
    generator = torch.Generator().manual_seed(seed)
    centres = features[torch.randperm(len(features), generator=generator)[:count]]
    own = (features @ centres.T).argmax(1)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, own, features)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, torch.nn.functional.normalize(sums, dim=1), centres)
        before, own = own, (features @ centres.T).argmax(1)
        if torch.equal(before, own):
            break
    likeness = features @ centres.T
    return sorted(int(rows[likeness[rows, k].argmax()]) for k in range(len(centres))
                  if len(rows := torch.nonzero(own == k).flatten()))


def match(similarity: Tensor, threshold: float, near: int) -> list[tuple[int, int, float]]:
    """Similarities (rows, columns) -> one-to-one (row, column, similarity), most alike first: of each row the `near`
    best columns at `threshold` or above are candidates, and a pair is taken if neither side is yet."""
    if not similarity.numel():
        return []
    best = similarity.topk(min(near, similarity.shape[1]), 1)
    rated = ((v, r, c) for r, row in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True))
             for v, c in zip(*row, strict=True))
    found = sorted((x for x in rated if x[0] >= threshold), key=lambda x: (-x[0], x[1], x[2]))
    rows, taken, out = set[int](), set[int](), []
    for v, r, c in found:
        if r not in rows and c not in taken:
            rows.add(r)
            taken.add(c)
            out.append((r, c, v))
    return out
