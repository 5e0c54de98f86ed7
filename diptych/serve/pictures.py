"""Pictures in and out: bytes and addresses become images within a request's limits, images become base64.

A request never names a file: what is not a data URL is fetched from the network, if the operator allows that, or
refused.
"""
import asyncio
import base64
import io
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image as Pil

from diptych.data.images import decode_image, decode_mask, fit, fit_to_model
from diptych.document import Image
from diptych.serve.errors import ApiError
from diptych.serve.fetch import Fetcher
from diptych.serve.settings import Settings
from diptych.serve.svg import looks_like_svg, rasterise

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "AVIF")  # what browsers show; the rest of Pillow stays closed
Encoding = Literal["png", "jpeg", "webp"]
T = TypeVar("T")
DECODERS = 2  # pictures that are decoded at once: each may take hundreds of megabytes


class Reader:
    """Reads the pictures of all requests. `budget` opens the account of one request."""

    def __init__(self, settings: Settings, fetcher: Fetcher | None = None) -> None:
        self.settings = settings
        self.fetcher = fetcher or Fetcher(seconds=settings.fetch_seconds, largest=settings.max_body)
        self.turns = asyncio.Semaphore(DECODERS)
        self.fetching = asyncio.Semaphore(2 * DECODERS)

    def budget(self, config: Any) -> "Budget":
        """For a request to a model of this config."""
        return Budget(self, config)


class Budget:
    """The pictures of one request: how many and how large they may be together."""

    def __init__(self, reader: Reader, config: Any) -> None:
        self.reader, self.config = reader, config
        self.pixels, self.count = reader.settings.max_pixels, reader.settings.max_images

    async def from_url(self, url: str, param: str) -> Image:
        """The picture of a data URL or of an address, as the model takes it."""
        if url[:5].lower() == "data:":
            return (await self.from_bytes(_of_data_url(url, param), param))[0]
        if not self.reader.settings.allow_urls:
            raise ApiError(400, f"expected a picture as a data URL, got {url[:20]!r}...; fix: send its bytes as "
                           "data:image/png;base64,..., or start the server with --allow-urls", param=param,
                           code="invalid_image_url")
        self._one_more(param)
        async with self.reader.fetching:
            data = await asyncio.to_thread(self.reader.fetcher.fetch, url)
        return (await self._in_turn(self._decode, data, param))[0]

    async def from_bytes(self, data: bytes, param: str) -> tuple[Image, tuple[int, int]]:
        """The picture as the model takes it, and the (height, width) it came with."""
        self._one_more(param)
        return await self._in_turn(self._decode, data, param)

    async def mask(self, data: bytes, size: tuple[int, int], param: str) -> Image:
        """Where to draw, as a picture: black there, white elsewhere. `size`: that of the picture it belongs to."""
        self._one_more(param)
        return await self._in_turn(self._mask, data, size, param)

    def _one_more(self, param: str) -> None:
        self.count -= 1
        if self.count < 0:
            raise ApiError(400, f"expected at most {self.reader.settings.max_images} pictures, got more", param=param)

    async def _in_turn(self, function: Callable[..., T], *args: Any) -> T:
        async with self.reader.turns:
            try:
                return await asyncio.to_thread(function, *args)
            except ValueError as error:
                raise ApiError(400, str(error), param=args[-1], code="invalid_image") from None

    def _decode(self, data: bytes, param: str) -> tuple[Image, tuple[int, int]]:
        source = rasterise(data) if looks_like_svg(data) else data
        image = decode_image(source, name=param, max_pixels=self.pixels, formats=FORMATS)
        assert image.size is not None
        self.pixels -= image.size[0] * image.size[1]  # what one picture takes, the next has not
        return fit_to_model(image, self.config), image.size

    def _mask(self, data: bytes, size: tuple[int, int], param: str) -> Image:
        found = decode_mask(data, name=param, max_pixels=self.pixels, formats=FORMATS).mask
        assert found is not None
        if found.shape != size:
            raise ValueError(f"expected a mask as large as the first picture, {size[1]} x {size[0]}, got "
                             f"{found.shape[1]} x {found.shape[0]}")
        self.pixels -= found.size
        shown = np.repeat(np.where(found, -1, 1)[None], 3, axis=0)
        return fit_to_model(Image(pixels=shown), self.config)


def _of_data_url(url: str, param: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise ApiError(400, f"expected data:image/...;base64,..., got {head[:40]!r}", param=param, code="invalid_image")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError:
        raise ApiError(400, "expected base64 in the data URL, got damaged text", param=param,
                       code="invalid_image") from None


def composite(drawn: Image, original: Image, mask: Image) -> Image:
    """Drawn where the mask is dark, the original elsewhere, all of the size drawn and fitted alike."""
    assert drawn.size is not None and drawn.pixels is not None
    before, where = (fit(image, *drawn.size, mode="pad").pixels for image in (original, mask))
    assert before is not None and where is not None
    return drawn.replace(pixels=np.where(where < 0, drawn.pixels, before))


def encoded(image: Image, how: Encoding, quality: int | None) -> str:
    """Base64 of a picture file."""
    buffer = io.BytesIO()
    options = {} if how == "png" or quality is None else {"quality": quality}
    Pil.fromarray(np.ascontiguousarray(image.to_uint8())).save(buffer, how.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode()
