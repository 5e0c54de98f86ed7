"""What a picture tokenizer loses: pictures through it and back, and what became of them.

    PSNR, SSIM           per picture, 8-bit; SSIM of Wang et al. 2004 (Gaussian window of 11, sigma 1.5)
    rFID                 Frechet distance of the zoo's `clip` vectors; not comparable with one of Inception features
    perceived the same   share of pictures in which `world.perceive` finds the same scene before and after
    use, perplexity      of the codes, over the whole sample; only of discrete tokenizers
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.data.sources import FolderSource
from diptych.document import Image
from diptych.ledger.interval import Metric, mean, proportion
from diptych.parts.quantize import health
from diptych.parts.semantic import DualTokenizer
from diptych.parts.semantic_1d import SemanticTokenizer
from diptych.parts.vae import AutoEncoder
from diptych.parts.vq import PictureTokenizer
from diptych.systems.detokenizer import Detokenizer, SemanticCodes
from diptych.world.perceive import perceive
from diptych.world.render import render_uint8
from diptych.world.sample import Stream, sample_scene
from diptych.world.scene import UNITS, WorldConfig

WINDOW, SIGMA = 11, 1.5  # of SSIM
Tokenizer = AutoEncoder | PictureTokenizer | DualTokenizer | SemanticCodes


@dataclass(frozen=True)
class Pass:
    """uint8 pictures (n, 3, h, w) after the tokenizer, and the codes, None where latents are continuous."""

    pictures: Tensor
    codes: Tensor | None


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def tokenizer_of(module: nn.Module) -> Tokenizer:
    """The tokenizer itself, or the one that a system draws with."""
    for found in (module, getattr(module, "codec", None), getattr(module, "tokenizer", None)):
        if isinstance(found, AutoEncoder | PictureTokenizer | DualTokenizer):
            return found
        pixels = getattr(module, "detokenizer", None)
        if isinstance(found, SemanticTokenizer) and isinstance(pixels, Detokenizer):
            return SemanticCodes(found, pixels)
    raise ValueError(f"expected a picture tokenizer or a system that draws with one, got {type(module).__name__}")


@torch.no_grad()
def there_and_back(tokenizer: Tokenizer, images: Tensor, batch: int = 128) -> Pass:
    """uint8 pictures through codes, or through the mean of the latents."""
    device = next(tokenizer.parameters()).device
    pictures, codes = list[Tensor](), list[Tensor]()
    for part in images.split(batch):
        pixels = to_float(part.to(device))
        if isinstance(tokenizer, AutoEncoder):
            made = tokenizer.decode(tokenizer.latent(pixels))
        else:
            found = tokenizer.encode(pixels)
            codes.append(found.cpu())
            size = pixels.shape[-2:] if isinstance(tokenizer, SemanticCodes) else ()
            made = tokenizer.decode(found, *size)
        pictures.append(to_uint8(made.float()).cpu())
    return Pass(torch.cat(pictures), torch.cat(codes) if codes else None)


def world_pictures(world: WorldConfig, count: int, *, split: str = "test", seed: int = 0) -> Tensor:
    """uint8 (count, 3, side, side)."""
    scenes = (sample_scene(world, Stream("reconstruction", split, seed, i), split=split) for i in range(count))
    return torch.from_numpy(np.stack([render_uint8(scene, world.pixels).transpose(2, 0, 1) for scene in scenes]))


def folder_pictures(folder: str | Path, count: int) -> Tensor:
    """The first `count` captioned pictures of a folder, each once; all of one size."""
    source = FolderSource(folder, "draw")
    names = list(dict.fromkeys(file for file, _, _ in source.rows))[:count]
    if not names:
        raise ValueError(f"expected captioned pictures in {folder}, got none; fix: see `diptych doctor data {folder}`")
    first = {file: i for i, (file, _, _) in reversed(list(enumerate(source.rows)))}
    pictures = [torch.from_numpy(source.document(first[n]).of(Image)[0].to_uint8()).permute(2, 0, 1) for n in names]
    if len(sizes := {tuple(p.shape[1:]) for p in pictures}) > 1:
        raise ValueError(f"expected pictures of one size in {folder}, got {len(sizes)} sizes, among them "
                         f"{', '.join(f'{h} x {w}' for h, w in sorted(sizes)[:2])}; fix: scale them to one")
    return torch.stack(pictures)


def measure(tokenizer: Tokenizer, images: Tensor, *, scenes: bool = False, batch: int = 128,
            features: Callable[[Tensor], Tensor] | None = None) -> dict[str, Metric]:
    """Figures of uint8 pictures (n, 3, h, w). `scenes`: the pictures are of the world, and are perceived.

    `features`: pictures in [-1, 1] -> vectors (b, d) for the rFID; by default those of the zoo's `clip`.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"expected uint8 pictures (n, 3, h, w), got {images.dtype} {tuple(images.shape)}")
    made = there_and_back(tokenizer, images, batch)
    out = {"psnr": mean(psnr(images, made.pictures).tolist(), unit="dB"),
           "ssim": mean(ssim(images, made.pictures).tolist())}
    features = features or clip_features
    seen = [torch.cat([features(to_float(p)).double().cpu() for p in x.split(batch)]) for x in (images, made.pictures)]
    out["rfid"] = Metric(value=frechet_distance(*seen), n=len(images))
    if scenes:
        verdicts = [v for v in same_scenes(images, made.pictures) if v is not None]
        out["perceived the same"] = proportion(sum(verdicts), len(verdicts))
    if made.codes is not None and not isinstance(tokenizer, AutoEncoder):
        whole = tokenizer.layout() if isinstance(tokenizer, SemanticCodes) else tokenizer.layout(*images.shape[-2:])
        values = whole.values
        found = health(made.codes, values)
        out["code use"] = Metric(value=found.use, n=values, unit="share")
        out["perplexity"] = Metric(value=found.perplexity, n=made.codes.numel())
    return out


@torch.no_grad()
def clip_features(images: Tensor) -> Tensor:
    """Vectors of the zoo's contrastive encoder, which reads 64 px."""
    return _vectors(images)


def similarities(images: Tensor, others: Tensor) -> Tensor:
    """Cosines (n,) of pictures (n, 3, h, w) in [-1, 1] in these vectors, with gradients to both."""
    return F.cosine_similarity(_vectors(images), _vectors(others))


def _vectors(images: Tensor) -> Tensor:
    side = 64
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return _clip().encode_image(images.cpu())


@cache
def _clip() -> Any:
    from diptych import zoo

    return zoo.load("clip")


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 pictures in dB, (n,); equal ones count 78 dB."""
    error = (others.float() - images.float()).square().mean((1, 2, 3)).clamp_min(1e-3)
    return 10 * torch.log10(255**2 / error)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of uint8 pictures, (n,): mean over channels and all places where the window fits."""
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"expected pictures of at least {WINDOW} px a side, got {tuple(images.shape[-2:])}")
    places = torch.arange(WINDOW) - WINDOW // 2
    line = torch.exp(-places.double().square() / (2 * SIGMA**2))
    line = line / line.sum()
    channels = images.shape[1]
    kernel = torch.outer(line, line).expand(channels, 1, WINDOW, WINDOW)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=channels)

    a, b = images.double(), others.double()
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return score.mean((1, 2, 3))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the Gaussians of two samples of vectors (n, d), (m, d), in float64."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"expected at least 2 vectors of each, got {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    s, t = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(s)
    root = vectors @ (values.clamp_min(0).sqrt()[:, None] * vectors.T)
    product = torch.linalg.eigvalsh(root @ t @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + s.trace() + t.trace() - 2 * product
    return max(float(distance), 0.0)


def same_scenes(images: Tensor, others: Tensor) -> Iterator[bool | None]:
    """Picture by picture whether perception finds the same background and, for every object, the same colour, shape
    and size, and the centre within 2 px; None where it is not certain of the original."""
    near = 2 * UNITS // images.shape[-1]
    for image, other in zip(images, others, strict=True):
        a, b = (perceive(np.asarray(to_float(x))) for x in (image, other))
        if not a.certain:
            yield None
            continue
        left = list(b.objects)
        for o in a.objects:
            match = next((p for p in left if p.attributes() == o.attributes()
                          and max(abs(p.x - o.x), abs(p.y - o.y)) <= near), None)
            if match is not None:
                left.remove(match)
        yield b.certain and b.background == a.background and len(a.objects) == len(b.objects) and not left
