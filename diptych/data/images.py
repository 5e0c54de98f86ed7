"""Picture files in and out: whatever a user has either works or gives an error that names the file.

Transparency is composited on white, EXIF rotation is applied, animations give their first frame, 16-bit grey is
scaled (not clipped) to 8 bits. The size in the header is checked before anything is decoded, and only raster formats
that Pillow decodes by itself are opened (no PostScript, which would run another program).
"""
import functools
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image as Pil
from PIL import ImageOps

from diptych.document import Image, Mask

MAX_PIXELS = 64_000_000  # a 64 MP photo; decoded RGB is then at most 192 MB
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "TIFF", "ICO", "PPM", "TGA", "AVIF", "JPEG2000", "QOI",
           "PCX")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ico", ".ppm", ".pgm", ".tga", ".avif",
            ".jp2", ".qoi", ".jfif")
WHITE = (255, 255, 255)

Fit = Literal["pad", "crop", "stretch"]
FITS = ("pad", "crop", "stretch")


def decode_image(data: bytes, *, name: str = "image", max_pixels: int = MAX_PIXELS,
                 size: tuple[int, int] | None = None, mode: Fit = "crop", formats: tuple[str, ...] = FORMATS) -> Image:
    """Decode the bytes of a picture file; ValueError naming `name` if that is not possible.

    With `size` (height, width) the picture is fitted to it (see `fit`) before it becomes float32, which saves most of
    the time and memory for photos. `max_pixels` can be raised up to Pillow's own limit of 179 million. `formats`: which
    of Pillow's names are opened at all.
    """
    picture = _open(data, name, max_pixels, size, formats)
    return Image.from_uint8(np.asarray(picture if size is None else _fit(picture, size, mode)))


def decode_mask(data: bytes, *, name: str = "mask", max_pixels: int = MAX_PIXELS,
                formats: tuple[str, ...] = FORMATS) -> Mask:
    """True where the picture is more transparent than not. One that cannot be transparent is refused."""
    alpha = _open(data, name, max_pixels, None, formats, _alpha)
    return Mask(mask=np.asarray(alpha) < 128)


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS, size: tuple[int, int] | None = None,
               mode: Fit = "crop") -> Image:
    """`decode_image` of a file. A missing file stays a FileNotFoundError; everything else is a ValueError."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"expected an image file, got the folder {path}")
    return decode_image(path.read_bytes(), name=str(path), max_pixels=max_pixels, size=size, mode=mode)


def write_image(image: Image, path: str | os.PathLike[str]) -> None:
    """Write an image in the format of the suffix; the file appears complete or not at all."""
    path = Path(path)
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF",
            ".tif": "TIFF", ".tiff": "TIFF"}.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"expected a picture path ending in .png, .jpg, .webp, .bmp, .gif or .tif, got {str(path)!r}")
    picture = Pil.fromarray(np.ascontiguousarray(image.to_uint8()))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def fit(image: Image, height: int, width: int, mode: Fit = "pad") -> Image:
    """Resize with antialiasing to exactly (height, width), in 8 bits.

    `pad` keeps the whole picture and adds white, `crop` fills the frame and cuts the rest off the longer side,
    `stretch` ignores the aspect ratio. A picture that already has the size comes back untouched.
    """
    if image.pixels is None:
        raise ValueError("expected an image with pixels, got one still to be drawn; fix: generate it first")
    if image.size == (height, width):
        return image
    picture = Pil.fromarray(np.ascontiguousarray(image.to_uint8()))
    fitted = Image.from_uint8(np.asarray(_fit(picture, (height, width), mode)))
    return image.replace(pixels=fitted.pixels)


def fit_to_model(image: Image, config: Any) -> Image:
    """A picture for a model with this config. One of a single picture size gets it on a white canvas of that size."""
    sides = getattr(config, "feature_sides", None)
    if sides is not None and sides.shortest == sides.longest:
        return fit(image, *config.picture, mode="pad")
    return image


# -- decoding ---------------------------------------------------------------------------------------------------------

@functools.cache
def _known(formats: tuple[str, ...]) -> tuple[str, ...]:
    Pil.init()
    return tuple(f for f in formats if f in Pil.OPEN)


def _open(data: bytes, name: str, max_pixels: int, size: tuple[int, int] | None, formats: tuple[str, ...],
          convert: Callable[[Pil.Image], Pil.Image] | None = None) -> Pil.Image:
    """Checked, decoded, turned upright and converted (to RGB)."""
    if not data:
        raise ValueError(f"expected an image in {name}, got an empty file")
    try:
        picture = Pil.open(io.BytesIO(data), formats=_known(formats))
    except (Pil.DecompressionBombError, Pil.DecompressionBombWarning) as error:
        raise ValueError(f"expected at most {max_pixels} pixels in {name}, got more than twice Pillow's limit "
                         f"({error}); fix: scale the picture down") from error
    except Exception as error:  # damaged headers raise nearly every kind of exception
        raise ValueError(f"expected an image in {name}, got {_guess(data)}") from error
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(f"expected at most {max_pixels} pixels in {name}, got {width} x {height} = {width * height}; "
                         "fix: scale the picture down")
    if width < 1 or height < 1:
        raise ValueError(f"expected an image in {name}, got one of {width} x {height} pixels")
    try:
        if size is not None and picture.format in ("JPEG", "MPO"):
            # The decoder can skip detail nobody will see; twice the wanted side keeps the resize antialiased.
            side = 2 * max(size)
            picture.draft("RGB", (side, side))
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        return (convert or _to_rgb)(picture)
    except MemoryError:
        raise
    except _Unclear as error:
        raise ValueError(f"expected an image with {error.wanted} in {name}, got {error}") from None
    except Exception as error:
        kind = picture.format or "image"
        raise ValueError(f"expected a complete {kind} in {name}, got a damaged one: {error}") from error


class _Unclear(Exception):
    wanted = "known brightness range"


class _Opaque(_Unclear):
    wanted = "transparent places"


def _alpha(picture: Pil.Image) -> Pil.Image:
    if not picture.has_transparency_data:
        raise _Opaque(f"an opaque one ({picture.mode}); fix: save it with an alpha channel")
    return picture.convert("RGBA").getchannel("A")


def _to_rgb(picture: Pil.Image) -> Pil.Image:
    if picture.mode.startswith(("I", "F")):
        return _from_wide(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Pil.new("RGBA", picture.size, (*WHITE, 255))
        return Pil.alpha_composite(white, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_wide(picture: Pil.Image) -> Pil.Image:
    """16-bit and float grey: Pillow would clip them at 255."""
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise _Unclear("values that are not finite")
    low, high = float(values.min()), float(values.max())
    top = 65535 if picture.mode.startswith("I") else (1 if high <= 1 else 255)
    if low < 0 or high > top:
        raise _Unclear(f"{picture.mode} values from {low:g} to {high:g}; fix: save it as 8 or 16 bit")
    return Pil.fromarray(np.rint(values * (255 / top)).astype(np.uint8)).convert("RGB")


def _guess(data: bytes) -> str:
    head = data[:256].lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fix: git lfs pull"
    if head[:5].lower() in (b"<?xml", b"<svg ") or b"<svg" in head:
        return "vector graphics; fix: render the SVG to PNG"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "an HEIC photo; fix: convert it to JPEG or PNG"
    if head[:4] == b"%PDF" or head[:4] == b"%!PS":
        return "a PDF or PostScript document; fix: export the page as PNG"
    if head[:9].lower() in (b"<!doctype", b"<html>"):
        return "a web page (a failed download?)"
    return f"{len(data)} bytes that are no PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, ..."


# -- fitting ----------------------------------------------------------------------------------------------------------

def _fit(picture: Pil.Image, size: tuple[int, int], mode: Fit) -> Pil.Image:
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"expected a height and width of at least 1, got {height} x {width}")
    if mode not in FITS:
        raise ValueError(f"expected mode to be one of {', '.join(FITS)}, got {mode!r}")
    if picture.size == (width, height):
        return picture
    w, h = picture.size
    if mode == "stretch":
        return picture.resize((width, height), Pil.Resampling.BICUBIC)
    if mode == "crop":
        scale = min(w / width, h / height)  # source pixels per target pixel
        cut_w, cut_h = width * scale, height * scale
        left, top = (w - cut_w) / 2, (h - cut_h) / 2
        box = (max(left, 0.0), max(top, 0.0), min(left + cut_w, float(w)), min(top + cut_h, float(h)))
        return picture.resize((width, height), Pil.Resampling.BICUBIC, box=box)
    scale = max(w / width, h / height)
    inner = (min(max(round(w / scale), 1), width), min(max(round(h / scale), 1), height))
    canvas = Pil.new("RGB", (width, height), WHITE)
    canvas.paste(picture.resize(inner, Pil.Resampling.BICUBIC), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
