"""A plain language model: embedding, dense trunk, head. Qwen2 and Qwen3 are values of its config.

Shape letters: b rows, t tokens of a row, v vocabulary.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.parts.blocks import BlockConfig, normal_weights
from diptych.parts.cache import Context
from diptych.parts.experts import Coupling
from diptych.parts.masks import packed_causal
from diptych.parts.positions import Rope
from diptych.parts.tokens import Modality, Mode, Strip, Tokens, assemble
from diptych.parts.trunks import Trunk

IGNORE = -100  # label of a token without loss


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    block: BlockConfig
    depth: int
    vocabulary_size: int
    rope_theta: float = 1e4
    tie_embeddings: bool = False


class LanguageModel(nn.Module):
    """ids (b, t) -> logits (b, t, v)."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocabulary_size, c.block.width)
        self.trunk = Trunk(c.block, Coupling.dense(c.depth), Rope(c.block.head_dim, c.rope_theta))
        self.head = nn.Linear(c.block.width, c.vocabulary_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        normal_weights(self.modules())

    def forward(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        return self.head(self.states(self.embed(ids.flatten()), [length] * rows)).unflatten(0, ids.shape)

    def states(self, embedded: Tensor, lengths: Sequence[int]) -> Tensor:
        """Last states (n, d) of rows of so many embeddings each, which may stand for anything; the rows lie one behind
        the other in (n, d)."""
        tokens = _tokens(lengths, [0] * len(lengths)).to(embedded.device)
        return self.trunk([embedded], tokens, packed_causal)[0]

    def loss(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood of every next token, scalar float32. `labels` (b, t) are the ids themselves
        unless given, `IGNORE` where nothing is learnt; they are shifted here."""
        labels = ids if labels is None else labels
        logits = self(ids)[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)

    @torch.no_grad()
    def read(self, contexts: Sequence[Context], texts: Sequence[Sequence[int]]) -> Tensor:
        """Append `texts[b]` (at least one id each) to `contexts[b]`; logits (b, v) after the last id of each."""
        if not all(texts) or len(texts) != len(contexts):
            raise ValueError(f"expected a text of at least one id per context ({len(contexts)}), "
                             f"got lengths {[len(t) for t in texts]}")
        device = self.embed.weight.device
        lengths = [len(t) for t in texts]
        tokens = _tokens(lengths, [c.length for c in contexts]).to(device)
        run = self.trunk.start(contexts, tokens, self.embed.weight.dtype)
        ids = torch.tensor([i for text in texts for i in text], device=device)
        hidden = self.trunk([self.embed(ids)], tokens, packed_causal, run)[0]
        run.commit(lengths)
        return self.head(hidden[torch.tensor(np.cumsum(lengths) - 1, device=device)])

    @torch.no_grad()
    def decode(self, prompts: Sequence[Sequence[int]], *, max_tokens: int, end: int | None = None,
               choose: Callable[[Tensor], int] | None = None) -> list[list[int]]:
        """Continue prompts of any lengths together; what follows each, without `end`. `choose` picks an id from float32
        logits (v,), greedy by default."""
        contexts = [Context() for _ in prompts]
        out: list[list[int]] = [[] for _ in prompts]
        active, texts = list(range(len(prompts))), [list(p) for p in prompts]
        for _ in range(max_tokens):
            if not active:
                break
            logits = self.read([contexts[b] for b in active], texts).float()
            picked = [int(row.argmax()) if choose is None else choose(row) for row in logits]
            ongoing = [(b, token) for b, token in zip(active, picked, strict=True) if token != end]
            for b, token in ongoing:
                out[b].append(token)
            active, texts = [b for b, _ in ongoing], [[token] for _, token in ongoing]
        return out


def _tokens(lengths: Sequence[int], starts: Sequence[int]) -> Tokens:
    """One causal text per row, placed behind the `starts[b]` tokens that are there already."""
    rows = []
    for length, start in zip(lengths, starts, strict=True):
        strip = Strip()
        strip.add(length, segment=0, modality=Modality.TEXT, mode=Mode.CAUSAL, route=0,
                  position=start + np.arange(length))
        rows.append([strip])
    return assemble(rows, start=starts)
