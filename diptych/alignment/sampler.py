"""Which prompts an epoch asks, and who asks them: each of them several times, so that its samples form a group."""
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class RepeatSampler:
    """Each epoch draws processes * batch / repeats prompts out of `count`, repeats each, shuffles and deals them out
    (Flow-GRPO). A function of (seed, epoch, rank): processes agree without speaking, a resumed run goes on alike."""

    count: int  # prompts of the data set
    batch: int  # samples of one process
    repeats: int  # samples of one prompt: the size of a group
    processes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.count, self.batch, self.repeats, self.processes) < 1 or self.total % self.repeats:
            raise ValueError(f"expected processes * batch ({self.processes} * {self.batch}) to be a multiple of "
                             f"repeats ({self.repeats}); fix: change one of them")
        if self.prompts > self.count:
            raise ValueError(f"expected at least {self.prompts} prompts, got {self.count}; fix: more repeats or a "
                             "smaller batch")

    @property
    def total(self) -> int:
        return self.processes * self.batch

    @property
    def prompts(self) -> int:
        """How many different ones an epoch has."""
        return self.total // self.repeats

    def indices(self, epoch: int, rank: int = 0) -> list[int]:
        """The prompts (batch,) of one process, in the order in which they are asked."""
        if not 0 <= rank < self.processes:
            raise ValueError(f"expected a rank of {self.processes} processes, got {rank}")
        generator = torch.Generator().manual_seed(self.seed + epoch)
        chosen = torch.randperm(self.count, generator=generator)[: self.prompts].repeat_interleave(self.repeats)
        dealt = chosen[torch.randperm(self.total, generator=generator)]
        return dealt[rank * self.batch:(rank + 1) * self.batch].tolist()
