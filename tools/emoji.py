"""Turn the Noto Color Emoji font into a folder of captioned pictures: real drawings with names, made by nobody here.

    python tools/emoji.py OUT --font /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

writes OUT/train and OUT/test (pictures with `metadata.jsonl`: file_name, text, name, codepoint, background, phrasing,
and where the glyph lies: scale, dx, dy as shares of the side) and OUT/tokenizer.json, a byte-level BPE of the training
captions. Both splits hold every emoji. `test` holds other renderings (shift, scale, background) under phrasings that
never occur in `train`. A caption that names no background means a white one, so every caption determines its picture
up to a small shift and scale. The same font and Unicode tables give the same files, byte for byte.
"""
import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from diptych.data.order import hash64
from diptych.zoo import tokenizer

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the one bitmap size in the font; its glyphs are 136 x 128 pixels
GLYPH = 136
RANGES = ((0xA9, 0xAF), (0x2010, 0x3300), (0x1F000, 0x1FB00))
PARTS = (range(0x1F3FB, 0x1F400), range(0x1F1E6, 0x1F200), range(0x1F9B0, 0x1F9B4), (0x20E3,))  # of sequences
FILLED_OR_OUTLINED = (range(0x1F000), range(0x1F324, 0x1F328), range(0x1F446, 0x1F44A))  # what black, white mean here
COLOURED = range(0x25A0, 0x2C00)  # but for these squares and circles they are colours
BACKGROUNDS = {"white": (255, 255, 255), "black": (20, 20, 20), "gray": (150, 150, 150), "pink": (255, 200, 215),
               "peach": (255, 200, 150), "yellow": (255, 240, 150), "green": (160, 220, 150), "teal": (110, 190, 190),
               "blue": (150, 195, 245), "navy": (30, 45, 95), "purple": (195, 165, 235), "brown": (140, 100, 70)}
# Phrasings by split; {n} is the name, {b} a background. The first half names no background: white.
PHRASINGS = {
    "train": ("{n}", "a picture of {n}", "the {n} emoji", "a small icon of {n}", "draw {n}", "show me {n}",
              "an image that has {n} in it", "please paint {n}",
              "{n} on a {b} background", "draw {n} on {b}", "{b} background with {n}", "{n} in front of {b}",
              "a {b} wall behind {n}", "an icon of {n} on {b}", "{n}, {b} all around", "a {b} picture that has {n}"),
    "test": ("an icon that shows {n}", "{n} in front of a {b} wall"),
}
VOCABULARY = 2048  # tokens: nearly every word of a name is one


@dataclass(frozen=True)
class Emoji:
    text: str  # one character
    name: str

    @property
    def codepoint(self) -> str:
        return f"{ord(self.text):x}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of a picture in pixels (default: %(default)s)")
    parser.add_argument("--train", type=int, default=6, help="training pictures per emoji (default: %(default)s)")
    parser.add_argument("--test", type=int, default=2, help="held-out pictures per emoji (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first so many emoji")
    options = parser.parse_args(arguments)
    try:
        font = open_font(options.font)
        make_folder(options.out, font, size=options.size, counts={"train": options.train, "test": options.test},
                    limit=options.limit)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    if not path.is_file():
        raise FileNotFoundError(f"expected the Noto Color Emoji font at {path}, got no file; fix: apt-get update && "
                                "apt-get install -y fonts-noto-color-emoji, or pass --font")
    try:
        # One character at a time needs no shaping, and the shaping library fails on characters the font lacks.
        return ImageFont.truetype(str(path), STRIKE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ValueError(f"expected a bitmap colour font with glyphs of size {STRIKE} in {path}, got {error}; "
                         "fix: use the Debian package fonts-noto-color-emoji") from error


def list_emoji(font: ImageFont.FreeTypeFont, limit: int | None = None) -> Iterator[tuple[Emoji, Image.Image]]:
    """Every emoji of the font with a Unicode name, with its glyph; one of several that look the same."""
    seen: set[bytes] = set()
    names: set[str] = set()
    for emoji in _candidates():
        glyph = draw_glyph(font, emoji.text)
        if glyph is None or emoji.name in names:
            continue
        digest = hashlib.sha256(glyph.tobytes()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        names.add(emoji.name)
        yield emoji, glyph
        if limit is not None and len(seen) >= limit:
            return


def draw_glyph(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """The glyph as RGBA in the middle of a square, or None if the font has none."""
    box = font.getbbox(text)
    if box[2] - box[0] not in range(1, GLYPH + 1):
        return None
    canvas = Image.new("RGBA", (GLYPH, GLYPH))
    ImageDraw.Draw(canvas).text((0, (GLYPH - box[3] + box[1]) // 2 - box[1]), text, font=font, embedded_color=True)
    return canvas if canvas.getbbox() else None


def render(glyph: Image.Image, size: int, background: tuple[int, int, int], scale: float, dx: float, dy: float
           ) -> Image.Image:
    """`scale` is the glyph's share of the side; shifts are shares of the side too."""
    side = GLYPH / scale
    pad = GLYPH
    canvas = Image.new("RGBA", (GLYPH + 2 * pad, GLYPH + 2 * pad))
    canvas.paste(glyph, (pad, pad))
    middle = canvas.width / 2
    left, top = middle - side * (0.5 + dx), middle - side * (0.5 + dy)
    small = canvas.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    picture = Image.new("RGBA", (size, size), (*background, 255))
    picture.alpha_composite(small)
    return picture.convert("RGB")


def make_folder(out: Path, font: ImageFont.FreeTypeFont, *, size: int = 64, counts: dict[str, int],
                limit: int | None = None) -> None:
    """Write the whole folder under another name, then give it its own."""
    if out.exists():
        raise FileExistsError(f"expected a new folder, got {out}, which exists; fix: remove it or choose another name")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split in counts:
        (partial / split).mkdir(parents=True)
    total, texts = 0, []
    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(open(partial / s / "metadata.jsonl", "w", encoding="utf-8")) for s in counts}
        for emoji, glyph in tqdm(list_emoji(font, limit), desc="emoji", unit="", total=limit):
            total += 1
            for split, count in counts.items():
                for i in range(count):
                    row, picture = _rendering(emoji, glyph, split, i, count, size)
                    texts += [row["text"]] if split == "train" else []
                    picture.save(partial / split / row["file_name"])
                    files[split].write(json.dumps(row, ensure_ascii=False) + "\n")
    tokenizer.train(texts, VOCABULARY).save(partial / "tokenizer.json")
    info = {"emoji": total, "pictures": {s: total * n for s, n in counts.items()}, "size": size,
            "unicode": unicodedata.unidata_version, "font": list(font.getname()), "phrasings": PHRASINGS}
    (partial / "info.json").write_text(json.dumps(info, indent=1) + "\n", "utf-8")
    os.replace(partial, out)
    tqdm.write(f"{total} emoji, {sum(info['pictures'].values())} pictures of {size} px in {out}")


def _rendering(emoji: Emoji, glyph: Image.Image, split: str, i: int, count: int, size: int
               ) -> tuple[dict[str, Any], Image.Image]:
    """Picture i of `count`; the first half of them on white."""
    key = (ord(emoji.text), tuple(PHRASINGS).index(split), i)

    def uniform(what: int, low: float, high: float) -> float:
        return low + (high - low) * hash64(*key, what) / 2**64

    phrasings = PHRASINGS[split]
    plain, half = 2 * i < count, len(phrasings) // 2
    number = (hash64(*key[:2]) + i) % half + (0 if plain else half)
    background = "white"
    if not plain:
        background = list(BACKGROUNDS)[1 + int(uniform(0, 0, len(BACKGROUNDS) - 1))]
    scale = uniform(1, 0.76, 0.94)
    room = (1 - scale) / 2
    dx, dy = uniform(2, -room, room), uniform(3, -room, room)
    picture = render(glyph, size, BACKGROUNDS[background], scale, dx, dy)
    row = {"file_name": f"{emoji.codepoint}_{i}.png", "text": phrasings[number].format(n=emoji.name, b=background),
           "name": emoji.name, "codepoint": emoji.codepoint, "background": background, "phrasing": f"{split}{number}",
           "scale": round(scale, 5), "dx": round(dx, 5), "dy": round(dy, 5)}
    return row, picture


def _candidates() -> Iterator[Emoji]:
    for low, high in RANGES:
        for code in range(low, high):
            name = unicodedata.name(chr(code), "")
            if name and not any(code in part for part in PARTS):
                yield Emoji(chr(code), _plain(code, name))


def _plain(code: int, name: str) -> str:
    """A name as a caption would say it."""
    words = name.lower().split()
    # In the names of old symbols these words mean filled or outlined: HEAVY BLACK HEART is red.
    coloured = code in COLOURED and words[-1] in ("square", "circle")
    if not coloured and any(code in part for part in FILLED_OR_OUTLINED):
        words = [w for w in words if w not in ("black", "white", "heavy")] or words
    return {"heart": "red heart"}.get(" ".join(words), " ".join(words))


if __name__ == "__main__":
    sys.exit(main())
