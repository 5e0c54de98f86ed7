"""Every kind of picture file works or names itself in the error."""
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as Pil

from diptych.data.images import decode_image, fit, read_image, write_image
from diptych.document import Image

RED = (200, 30, 40)


def _bytes(picture: Pil.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _pixel(image: Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    return tuple(int(v) for v in image.to_uint8()[y, x])


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_pixels_are_float32_in_range_and_exact():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = np.stack([ramp, ramp[::-1], ramp.T], axis=2)
    image = decode_image(_bytes(Pil.fromarray(rgb)))
    assert image.pixels.dtype == np.float32 and image.pixels.shape == (3, 16, 16)
    assert image.pixels.min() == -1 and image.pixels.max() == 1
    assert np.array_equal(image.to_uint8(), rgb)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_is_white(mode):
    picture = Pil.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255))
    image = decode_image(_bytes(picture.convert(mode), "TIFF" if mode == "PA" else "PNG"))
    assert _pixel(image) == (255, 255, 255) and _pixel(image, 1) == (0, 0, 0)


def test_half_transparent_blends_and_palette_transparency_counts():
    image = decode_image(_bytes(Pil.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert abs(_pixel(image)[0] - 127) <= 1
    palette = Pil.new("P", (2, 2), 0)
    palette.putpalette([*RED, 0, 0, 255] + [0] * 762)
    palette.putpixel((1, 1), 1)
    image = decode_image(_bytes(palette, transparency=0))
    assert _pixel(image) == (255, 255, 255) and _pixel(image, 1, 1) == (0, 0, 255)
    assert _pixel(decode_image(_bytes(palette))) == RED


def test_exif_rotation_is_applied():
    picture = Pil.new("RGB", (40, 20), RED)
    exif = Pil.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to see it upright
    picture.paste((0, 0, 255), (0, 0, 20, 20))  # left half blue: on top once upright
    image = decode_image(_bytes(picture, "JPEG", exif=exif, quality=95))
    assert image.size == (40, 20)
    top, bottom = _pixel(image, 10, 5), _pixel(image, 10, 35)
    assert top[2] > 200 and bottom[0] > 150


@pytest.mark.parametrize(("mode", "kind"), [("1", "TIFF"), ("L", "TIFF"), ("P", "TIFF"), ("RGB", "TIFF"),
                                            ("CMYK", "TIFF"), ("YCbCr", "JPEG")])
def test_modes(mode, kind):
    picture = Pil.new("RGB", (8, 8), (250, 250, 250)).convert(mode)
    image = decode_image(_bytes(picture, kind))
    assert image.size == (8, 8) and all(abs(value - 250) <= 6 for value in _pixel(image))


def test_sixteen_bit_and_float_grey_are_scaled_not_clipped():
    wide = Pil.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    for kind in ("PNG", "TIFF"):
        assert [_pixel(decode_image(_bytes(wide, kind)), x)[0] for x in range(3)] == [0, 128, 255]
    unit = Pil.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert [_pixel(decode_image(_bytes(unit, "TIFF")), x)[0] for x in range(3)] == [0, 128, 255]
    with pytest.raises(ValueError, match=r"depth\.tif.*values from -3 to 1"):
        decode_image(_bytes(Pil.fromarray(np.array([[-3.0, 1.0]], np.float32)), "TIFF"), name="depth.tif")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind):
    frames = [Pil.new("RGB", (6, 6), c) for c in (RED, (0, 0, 255))]
    data = _bytes(frames[0], kind, save_all=True, append_images=frames[1:])
    assert all(abs(a - b) < 12 for a, b in zip(_pixel(decode_image(data)), RED, strict=True))


def test_bombs_are_refused_by_their_header():
    with pytest.raises(ValueError, match=r"bomb\.png.*got 20000 x 4000"):
        decode_image(_png_header(20_000, 4_000), name="bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png"):  # past Pillow's own limit too
        decode_image(_png_header(100_000, 100_000), name="bomb.png")
    small = _bytes(Pil.new("RGB", (100, 100)))
    with pytest.raises(ValueError, match="at most 9999 pixels"):
        decode_image(small, max_pixels=9_999)
    assert decode_image(small, max_pixels=10_000).size == (100, 100)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_named_at_any_length(kind):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    data = _bytes(Pil.fromarray(noise), kind)
    for length in {0, 1, 5, 20, len(data) // 4, len(data) // 2}:
        with pytest.raises(ValueError, match=r"photo\.xyz"):
            decode_image(data[:length], name="photo.xyz")


def test_damage_never_escapes_as_another_exception():
    rng = np.random.default_rng(1)
    base = Pil.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        data = _bytes(base, kind)
        for _ in range(60):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 4):
                broken[at] = rng.integers(256)
            try:
                assert decode_image(bytes(broken), name="f.bin").pixels is not None
            except ValueError as error:
                assert "f.bin" in str(error)


@pytest.mark.parametrize(("data", "hint"), [
    (b"version https://git-lfs.github.com/spec/v1\noid x", "git lfs pull"),
    (b"<?xml version='1.0'?><svg></svg>", "SVG"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
    (b"\0\0\0\x18ftypheic....", "HEIC"), (b"hello", "5 bytes"), (b"<!DOCTYPE html>", "web page")])
def test_other_files_say_what_they_are(data, hint):
    with pytest.raises(ValueError, match=hint):
        decode_image(data, name="a")


def test_files_and_folders(tmp_path):
    image = Image.from_uint8(np.random.default_rng(2).integers(0, 255, (5, 7, 3), np.uint8))
    write_image(image, tmp_path / "new" / "a.png")
    assert read_image(tmp_path / "new" / "a.png") == image
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="folder"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="ending in"):
        write_image(image, tmp_path / "a.xyz")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    image = Image.from_uint8(np.zeros((4, 4, 3), np.uint8))
    write_image(image, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(self, file, *_, **__):
        file.write(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(Pil.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_image(image, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_fit_modes():
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, :10], array[:, 30:] = (255, 0, 0), (0, 0, 255)  # red, black, blue from left to right
    image = Image.from_uint8(array, role="assistant", target=True)
    pad, crop, stretch = (fit(image, 10, 10, m) for m in ("pad", "crop", "stretch"))
    assert pad.size == crop.size == stretch.size == (10, 10)
    assert (pad.role, pad.target) == ("assistant", True)
    assert _pixel(pad, 0, 0) == (255, 255, 255) and _pixel(pad, 0, 5) == (255, 0, 0)
    assert _pixel(crop, 5, 5) == (0, 0, 0) and _pixel(stretch, 0, 0) == (255, 0, 0)
    assert _pixel(stretch, 9, 9) == (0, 0, 255)
    assert fit(pad, 10, 10) is pad
    with pytest.raises(ValueError, match="pad, crop, stretch"):
        fit(image, 5, 5, "zoom")  # type: ignore[arg-type]


def test_fit_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = fit(Image.from_uint8(stripes), 8, 8).to_uint8()
    assert small.min() > 100 and small.max() < 155


def test_extreme_aspect_ratios():
    assert fit(Image.from_uint8(np.zeros((1, 500, 3), np.uint8)), 8, 8).size == (8, 8)
    assert fit(Image.from_uint8(np.zeros((500, 1, 3), np.uint8)), 8, 8, "crop").size == (8, 8)


def test_decoding_to_a_size_equals_decoding_and_fitting():
    noise = Pil.fromarray(np.random.default_rng(3).integers(0, 255, (50, 90, 3), np.uint8))
    whole = decode_image(_bytes(noise))
    for mode in ("pad", "crop", "stretch"):
        assert decode_image(_bytes(noise), size=(16, 24), mode=mode) == fit(whole, 16, 24, mode)
    blocks = np.random.default_rng(4).integers(0, 255, (100, 120, 3), np.uint8)
    photo = Pil.fromarray(blocks).resize((1200, 1000), Pil.Resampling.NEAREST)  # large JPEGs take the scaled decoder
    small = decode_image(_bytes(photo, "JPEG"), size=(90, 90)).to_uint8().astype(int)
    exact = fit(decode_image(_bytes(photo, "JPEG")), 90, 90, "crop").to_uint8()
    assert np.abs(small - exact).mean() < 2
