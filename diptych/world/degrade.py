"""Named degradations of pictures (3, height, width) in [-1, 1], for measuring parsers and graders.

Blur is Gaussian with sigma in pixels, noise in 8-bit levels. `codec` imitates the reconstruction of a small
autoencoder: half resolution, ringing at edges, a shifted palette, slow waves of brightness.
"""
import io
from collections.abc import Callable

import numpy as np

from diptych.document import Image

Degradation = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    reach = int(4 * sigma + 1)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    h, w = pixels.shape[1:]
    wide = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    rows = np.add.reduce([k * wide[:, i:i + h] for i, k in enumerate(kernel)])
    return np.add.reduce([k * rows[:, :, i:i + w] for i, k in enumerate(kernel)]).astype(np.float32)


def noise(pixels: np.ndarray, levels: float, rng: np.random.Generator) -> np.ndarray:
    return np.clip(pixels + rng.normal(0, levels / 127.5, pixels.shape), -1, 1).astype(np.float32)


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Through Pillow, with halved chroma as is its default."""
    from PIL import Image as Pil

    buffer = io.BytesIO()
    Pil.fromarray(Image(pixels=pixels).to_uint8()).save(buffer, "JPEG", quality=quality)
    array = np.asarray(Pil.open(buffer).convert("RGB"))
    return array.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1


def codec(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    h, w = pixels.shape[1:]
    half = pixels.reshape(3, h // 2, 2, w // 2, 2).mean((2, 4))
    soft = blur(half.repeat(2, 1).repeat(2, 2), 0.7)
    sharp = soft + 0.5 * (soft - blur(soft, 1.2))
    shift = rng.normal(0, 6 / 127.5, (3, 1, 1))
    waves = blur(rng.normal(0, 3 / 127.5, (3, h // 4, w // 4)).repeat(4, 1).repeat(4, 2), 2)
    return np.clip(sharp + shift + waves, -1, 1).astype(np.float32)


DEGRADATIONS: dict[str, Degradation] = {
    "clean": lambda p, rng: p,
    "blur .7, noise 8": lambda p, rng: noise(blur(p, 0.7), 8, rng),
    "blur 1": lambda p, rng: blur(p, 1.0),
    "noise 10": lambda p, rng: noise(p, 10, rng),
    "jpeg 75": lambda p, rng: jpeg(p, 75),
    "jpeg 60": lambda p, rng: jpeg(p, 60),
    "codec": codec,
    "blur 1, noise 10": lambda p, rng: noise(blur(p, 1.0), 10, rng),
    "blur 1.5": lambda p, rng: blur(p, 1.5),
}
