"""What systems share that draw codec latents by flow inside the packed sequence: a picture to draw is a noised copy
that nothing else sees, and its clean copy stands before its features wherever something is drawn later.

Beside what `systems.packed` asks for, a system provides `latent_tokens` (inputs), `latent_out` (velocities) and a
`codec`.
"""
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diptych.parts.interleave import Page, Writer
from diptych.parts.vae import AutoEncoder
from diptych.systems import flows
from diptych.systems.base import Emit, Sampling, Work
from diptych.systems.packed import Batch, Packed
from diptych.systems.works import Develop, Encode, Grid, Look, Read, Reader

__all__ = ["Batch", "Develop", "Encode", "Grid", "Interleaved", "Look", "Read", "Reader"]


class Interleaved(Packed):
    copies = True
    noised_copies = 1  # of each drawn picture in training, every one at a time and with a noise of its own
    latent_out: nn.Linear
    codec: AutoEncoder
    latent_patch: int
    token_width: int  # of a latent token

    def latent_tokens(self, x: Tensor, t: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Latent tokens x (n, d) at times t (n,) of pictures with these grids -> (n, width). Provided by the system."""
        raise TypeError("abstract")

    # -- pictures as latents ------------------------------------------------------------------------------------------

    def encode(self, pictures: list[Tensor]) -> list[Tensor]:
        """Pictures for the codec -> latent tokens (n_i, d) each."""
        return self.codec.tokens(pictures, self.latent_patch)

    def decode(self, x: Tensor, grid: Grid) -> Tensor:
        """Latent tokens (b, n, d) of one grid -> pixels (b, 3, h, w), clamped."""
        return self.codec.from_tokens(x, self.latent_patch, grid)

    def write_drawn(self, w: Writer, number: int, grid: Grid) -> None:
        for _ in range(self.noised_copies):
            w.latent(number, grid[0] * grid[1], noised=True)

    def write_copy(self, w: Writer, number: int, grid: Grid) -> None:
        w.latent(number, grid[0] * grid[1], noised=False)

    def given(self, works: Sequence[Read]) -> Tensor | None:
        latents = [part for w in works for part in w.latents]
        if not latents:
            return None
        x = torch.cat([p for p, _ in latents])
        return self.latent_tokens(x, torch.ones(len(x), device=x.device), [g for _, g in latents])

    # -- drawing ------------------------------------------------------------------------------------------------------

    def _look_at(self, reader: Reader, pixels: Tensor, x: Tensor | None, grid: Grid | None,
                 copy: bool) -> Generator[Work, Any, None]:
        """Read a clean picture: its latents if something is drawn later, then its features."""
        seen, coded = self.views(pixels)
        w = self.writer(reader)
        latents: list[tuple[Tensor, Grid]] = []
        if copy:
            known = (x, grid) if x is not None and grid is not None else ((yield Encode(coded)), self.grid(coded))
            latents.append(known)
            w.latent(0, len(known[0]), noised=False)
        w.feature(0, self.feature_count(seen))
        yield Read(reader, w, [seen], latents)

    def paint(self, grid: Grid, contexts: dict[str, Reader], sampling: Sampling, generator: torch.Generator, index: int,
              emit: Emit, more: bool) -> Generator[Work, Any, Tensor]:
        x = torch.randn(grid[0] * grid[1], self.token_width, generator=generator).to(self.device)
        return (yield from self.denoise(x, grid, contexts, sampling, generator, index, emit))

    def denoise(self, x: Tensor, grid: Grid, contexts: dict[str, Reader], sampling: Sampling,
                generator: torch.Generator, index: int, emit: Emit) -> Generator[Work, Any, Tensor]:
        def ask(names: list[str], x: Tensor, t: float) -> Work:
            return Look([contexts[n] for n in names], x, t, grid)

        return (yield from flows.denoise(x, grid, ask, sampling, generator, index, emit))

    def runners(self, commits: list[Callable[[], None]]) -> dict[str, Callable[[Sequence[Any]], Sequence[Any]]]:
        return super().runners(commits) | {"look": self._run_looks}

    def _run_looks(self, works: Sequence[Any]) -> list[list[Tensor]]:
        readers = [r for w in works for r in w.readers]
        writers = []
        for w in works:
            for reader in w.readers:
                writer = self.writer(reader)
                writer.latent(0, len(w.x), noised=True)
                writers.append(writer)
        page = Page.of([[w] for w in writers], start=[r.context.length for r in readers]).to(self.device)
        x = torch.cat([w.x for w in works for _ in w.readers])
        t = torch.cat([torch.full((len(w.x),), w.t, device=x.device) for w in works for _ in w.readers])
        tokens = self.latent_tokens(x, t, [w.grid for w in works for _ in w.readers])
        run = self.trunk.start([r.context for r in readers], page.tokens, self.embed.weight.dtype)  # never committed
        drawn = self.trunk(self.states(page, None, tokens), page.tokens, self.mask, run)[1]
        parts = iter(self.latent_out(drawn).float().split([len(w.x) for w in works for _ in w.readers]))
        return [[next(parts) for _ in w.readers] for w in works]
