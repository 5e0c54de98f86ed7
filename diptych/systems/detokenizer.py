"""Pixels from one embedding of a picture, by rectified flow: in the role of unCLIP's decoder (arXiv 2204.06125).

    condition   the embedding cut into tokens, + a position for each       zeros in its place: no embedding
    x_t = (1 - t) noise + t latents,   L = mean |network(x_t, t, condition) - (latents - noise)|^2
    drawn       v = v_0 + scale (v_e - v_0), from one noise for all pictures

An embedding says what there is, not every pixel; the rest follows from the noise. As the released SEED does, all
pictures start from the same, so that the same codes always look alike.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.objectives import flow
from diptych.parts.dit import Dit, DitConfig
from diptych.parts.quantize import CodeLayout
from diptych.parts.semantic_1d import SemanticTokenizer
from diptych.parts.vae import AutoEncoder, AutoEncoderConfig
from diptych.parts.vision import Grid, patchify


@dataclass(frozen=True, kw_only=True)
class DetokenizerConfig:
    network: DitConfig
    latents: AutoEncoderConfig
    patch: int = 2  # latent cells per token and side
    tokens: int = 16  # that the embedding is cut into
    steps: int = 20  # SEED's sampling steps
    scale: float = 1.0  # guidance
    seed: int = 0  # of the noise
    drop: float = 0.1  # how often training leaves the embedding out

    def __post_init__(self) -> None:
        width = self.latents.latent_channels * self.patch**2
        if self.network.token_width != width:
            raise ValueError(f"expected network.token_width to be {width}, as latent_channels and patch imply, "
                             f"got {self.network.token_width}")

    @property
    def embedding_width(self) -> int:
        return self.tokens * self.network.condition_width

    @property
    def stride(self) -> int:
        """Pixels per latent token, along one side."""
        return self.latents.downsample * self.patch


class Detokenizer(nn.Module):
    """Embeddings (b, e) -> pictures (b, 3, h, w)."""

    def __init__(self, config: DetokenizerConfig) -> None:
        super().__init__()
        c = self.config = config
        self.latents = AutoEncoder(c.latents).requires_grad_(False)
        self.network = Dit(c.network)
        # an untrained one shall tell embeddings apart too, and their tokens must know their places from the start
        nn.init.normal_(self.network.output.weight, std=0.02)
        self.positions = nn.Parameter(torch.randn(c.tokens, c.network.condition_width))

    def velocity(self, x: Tensor, t: Tensor, embedding: Tensor, grid: Grid) -> Tensor:
        """Of latent tokens x (b, n, d) at times t (b,) under embeddings (b, e)."""
        c = self.config
        if embedding.shape != (len(x), c.embedding_width):
            raise ValueError(f"expected embeddings of shape ({len(x)}, {c.embedding_width}), "
                             f"got {tuple(embedding.shape)}")
        condition = embedding.unflatten(1, (c.tokens, -1)) + self.positions
        return self.network(x, t, condition, grid)

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of latent tokens of a picture of so many pixels."""
        stride = self.config.stride
        if height % stride or width % stride:
            raise ValueError(f"expected pictures with sides that are multiples of {stride}, got {height} x {width}; "
                             "fix: set the size of the pictures")
        return height // stride, width // stride

    def errors(self, pictures: Tensor, embedding: Tensor, generator: torch.Generator) -> Tensor:
        """Squared errors (b, n) of the velocities, means over the channels, at one random time per picture."""
        c, device = self.config, generator.device
        grid = self.grid(pictures.shape[2], pictures.shape[3])
        with torch.no_grad():
            x = patchify(self.latents.latent(pictures).float(), c.patch)
        t = flow.sample_time(len(x), generator).to(x.device)
        noise = torch.randn(x.shape, generator=generator, device=device).to(x.device)
        kept = torch.rand(len(x), 1, generator=generator, device=device).to(x.device) >= c.drop
        noised = flow.interpolate(x, noise, t[:, None, None])
        return flow.squared_error(self.velocity(noised, t, embedding * kept, grid), x, noise)

    @torch.no_grad()
    def draw(self, embedding: Tensor, height: int, width: int) -> Tensor:
        """Pictures (b, 3, height, width), float32, clamped, of embeddings (b, e)."""
        c, grid = self.config, self.grid(height, width)
        generator = torch.Generator().manual_seed(c.seed)
        noise = torch.randn(grid[0] * grid[1], c.network.token_width, generator=generator).to(embedding.device)

        def velocity(x: Tensor, t: float) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            full = self.velocity(x, times, embedding, grid).float()
            if c.scale == 1:
                return full
            empty = self.velocity(x, times, torch.zeros_like(embedding), grid).float()
            return empty + c.scale * (full - empty)

        x = flow.sample(velocity, noise.expand(len(embedding), -1, -1), flow.schedule(c.steps))
        return self.latents.from_tokens(x, c.patch, grid)


class SemanticCodes(nn.Module):
    """Tokenizer and detokenizer as one: pictures (b, 3, h, w) in [-1, 1] <-> codes (b, q)."""

    def __init__(self, codec: SemanticTokenizer, detokenizer: Detokenizer) -> None:
        super().__init__()
        self.codec, self.detokenizer = codec, detokenizer

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        return self.codec.encode(self.codec.prepare(pictures))

    @torch.no_grad()
    def decode(self, codes: Tensor, height: int, width: int) -> Tensor:
        """Pictures of so many pixels that mean what the codes say, clamped."""
        return self.detokenizer.draw(self.codec.decode(codes).float(), height, width)

    def layout(self) -> CodeLayout:
        return self.codec.layout()
