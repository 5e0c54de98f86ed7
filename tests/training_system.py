"""A small real system for the tests of training: a two-layer text model with a second, noisy loss term."""
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.data.mix import Mixture
from diptych.data.sources import Source
from diptych.document import Document, Text
from diptych.systems.base import Losses, System
from diptych.training.recipe import Recipe, Stage

WORDS = ("red", "green", "blue", "circle", "square", "above", "below", "left", "right", "two", "three", "small")


@dataclass
class Batch:
    ids: Tensor
    target: Tensor
    counts: dict[str, float] | None = None

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()

    def to(self, device: torch.device | str) -> Self:
        return dataclasses.replace(self, ids=self.ids.to(device), target=self.target.to(device))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]  # cheap causal mixing
        return x + self.down(F.gelu(self.up(self.norm(x + mean))))


class TinyText(System):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        width: int = 16
        layers: int = 2
        declare_counts: bool = True
        sparse: bool = False  # some batches have no second term

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(256, c.width)
        self.blocks = nn.ModuleList(Block(c.width) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, 256, bias=False)
        self.head.weight = self.embed.weight
        self.probe = nn.Linear(c.width, c.width)
        self.register_buffer("scale", torch.ones(()))

    @classmethod
    def tiny(cls) -> Config:
        return cls.Config()

    def collate(self, documents: Sequence[Document]) -> Batch:
        rows = [(p.text or "").encode() for d in documents for p in d.targets]
        length = max(len(r) for r in rows)
        ids = torch.tensor([list(r.ljust(length, b"\0")) for r in rows])
        target = torch.tensor([[i < len(r) for i in range(length)] for r in rows])
        counts = {"text": float(target[:, 1:].sum())} | ({"noise": float(len(rows))} if self.noisy(ids) else {})
        return Batch(ids, target, counts if self.config.declare_counts else None)

    def noisy(self, ids: Tensor) -> bool:
        return not self.config.sparse or int(ids.sum()) % 3 == 0

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        h = self.embed(batch.ids)
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        logits = self.head(h[:, :-1]).float()
        text = F.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
        mask = batch.target[:, 1:].flatten().float()
        sums, counts = {"text": (text * mask).sum()}, {"text": mask.sum()}
        if not self.noisy(batch.ids):
            return Losses(sums, counts, {"text": 1.0})
        noise = torch.randn(len(batch.ids), h.shape[-1], generator=generator, device=h.device)
        miss = (self.probe(h.mean(1)).float() - noise).square().mean(-1)
        sums["noise"], counts["noise"] = miss.sum(), torch.tensor(float(len(miss)), device=h.device)
        return Losses(sums, counts, {"text": 1.0, "noise": 0.5})


class Words(Source):
    """Endless documents of random words."""

    def __init__(self) -> None:
        super().__init__("words", None)

    def document(self, index: int) -> Document:
        picks = [WORDS[(index >> 5 * i) % 31 * 7 % len(WORDS)] for i in range(2 + index % 3)]
        return Document((Text(text=" ".join(picks), target=True, role="assistant"),), "words", {"index": index})


def words(recipe: Recipe, stage: Stage) -> Mixture:
    return Mixture([(Words(), 1.0)], seed=recipe.seed * 100 + [s.name for s in recipe.stages].index(stage.name))


def recipe(**changes) -> Recipe:
    stage = Stage(steps=20, batch=8, lr=1e-2, warmup=3, schedule="cosine")
    settings = {"system": "tiny-text", "stages": (stage,), "log_every": 1, "save_every": 5, "workers": 0, "ema": 0.9}
    return Recipe(**{**settings, **changes})


def build(seed: int = 0, **changes) -> TinyText:
    torch.manual_seed(seed)
    return TinyText(TinyText.Config(**changes))
