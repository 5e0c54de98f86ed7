"""Measure the emoji model and its codec on held-out renderings and phrasings; write pictures, figures and a table.

    python tools/emoji_report.py runs/emoji

reads the finished run (or a `model` folder) and the folder `emoji/` that tools/emoji.py made, writes
docs/pictures/emoji-drawings.png, emoji-codec.png and emoji.json, and puts the table between the marks of docs/emoji.md.

A drawing is judged by which emoji it is nearest to (tools/emoji_judge.py). The same judge ranks the codec's own
reconstructions (the ceiling) and the drawings under another emoji's name (the control).
"""
import argparse
import json
import os
import random
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_judge import WHITE, Split, border, distances, ranks, read
from PIL import Image as Pil
from PIL import ImageDraw
from torch import Tensor
from tqdm import tqdm

from diptych.config import to_dict
from diptych.data.order import hash64
from diptych.document import Document, Image, Text
from diptych.ledger import Cost, Entry, write_entry
from diptych.ledger.interval import Metric, mean, proportion
from diptych.systems.base import System
from diptych.systems.io import load_system
from diptych.training.recipe import load_recipe

MARKS = ("<!-- figures: begin -->", "<!-- figures: end -->")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run or the folder of a saved model")
    parser.add_argument("--data", type=Path, default=Path("emoji"), help="the emoji folder (default: %(default)s)")
    parser.add_argument("--codec-run", type=Path, default=Path("runs/emoji-codec"), help="for its cost (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="for the pictures (%(default)s)")
    parser.add_argument("--page", type=Path, default=Path("docs/emoji.md"), help="whose table to set (%(default)s)")
    parser.add_argument("--items", type=int, default=500, help="drawings and captions of a kind (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=50, help="names per picture to choose from by log-prob")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ledger", metavar="NAME", help="also write (or replace) an entry of the ledger")
    parser.add_argument("--threads", type=int, default=0, help="compute threads (default: all cores)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        folder = options.model / "model" if (options.model / "model").is_dir() else options.model
        system = load_system(folder, device="cuda" if torch.cuda.is_available() else "cpu").eval()
        report = Report(system, options.data, items=options.items, candidates=options.candidates, seed=options.seed)
        report.run(options.out)
        report.facts |= {"model_seconds": cost(options.model), "codec_seconds": cost(options.codec_run)}
        text = table(report.figures, report.facts) + links(options.out, options.page)
        write(options.out / "emoji.json", lambda path: path.write_text(json.dumps(
            {"facts": report.facts, "figures": {k: vars(v) for k, v in report.figures.items()}}, indent=1) + "\n"))
        fill(options.page, text)
        if options.ledger:
            recipe = options.model / "recipe.yaml"
            write_entry(entry(options.ledger, report.figures, report.facts, recipe, options.seed), replace=True)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


def entry(name: str, figures: Mapping[str, Metric], facts: Mapping[str, Any], recipe: Path, seed: int) -> Entry:
    """The figures for the ledger, with the resolved recipe of the run."""
    asked = {key: facts[key] for key in ("emoji", "items", "candidates")}
    return Entry(name=name, kind="quality", system="bagel", level="E1", seeds=(seed,), metrics=dict(figures),
                 recipe={"model": to_dict(load_recipe(recipe)), "evaluation": asked},
                 cost=Cost(seconds=facts["report_seconds"], documents=facts["items"]))


# -- the report -------------------------------------------------------------------------------------------------------

class Report:
    """Figures by name in `figures`, what they are of in `facts`."""

    def __init__(self, system: System, data: Path, *, items: int = 500, candidates: int = 50, seed: int = 0,
                 batch: int = 50) -> None:
        self.system, self.seed, self.batch = system, seed, batch
        self.plain, self.backed = read(data / "test", white=True), read(data / "test", white=False)
        self.trained = read(data / "train", white=True)
        if not self.plain.names == self.trained.names == self.backed.names:
            raise ValueError(f"expected the same emoji in all splits of {data}, got others; fix: make the folder again")
        count = len(self.plain.rows)
        self.chosen = torch.tensor(sorted(random.Random(seed).sample(range(count), min(items, count))))
        self.candidates = min(candidates, count)
        self.figures: dict[str, Metric] = {}
        self.facts: dict[str, Any] = {"emoji": count, "items": len(self.chosen), "candidates": self.candidates}

    def run(self, out: Path) -> None:
        start = time.perf_counter()
        self.codec(out)
        self.drawing(out)
        self.captioning()
        self.facts["report_seconds"] = round(time.perf_counter() - start, 1)

    def count(self, name: str, hits: Tensor | Sequence[bool]) -> None:
        self.figures[name] = proportion(int(sum(bool(h) for h in hits)), len(hits))

    def tops(self, name: str, rank: Tensor) -> None:
        for k in (1, 5):
            self.count(f"{name}_top{k}", rank < k)

    def shifted(self, own: Tensor) -> Tensor:
        """Another emoji for each: the names with which drawings are judged by chance."""
        return own.roll(1)

    # -- the codec ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def redraw(self, pixels: Tensor) -> Tensor:
        codec, device = self.system.get_submodule("codec"), self.system.device
        parts = [codec.decode(codec.latent(p.to(device))) for p in pixels.split(self.batch)]  # type: ignore[operator]
        return torch.cat(parts).float().clamp(-1, 1).cpu()

    @torch.no_grad()
    def codec(self, out: Path) -> None:
        """PSNR on held-out renderings, and whether latents are as the flow expects them."""
        for name, split in (("white", self.plain), ("colour", self.backed)):
            redrawn = self.redraw(split.pixels)
            error = ((redrawn - split.pixels) / 2).square().mean((1, 2, 3)).clamp_min(1e-6)
            self.figures[f"psnr_{name}"] = mean((-10 * error.log10()).tolist(), "dB")
        codec: Any = self.system.get_submodule("codec")
        parts = self.trained.pixels.split(self.batch)
        latents = torch.cat([codec.latent(p.to(self.system.device)).float().cpu() for p in parts])
        flat = latents.transpose(0, 1).flatten(1)
        self.facts |= {"latent_mean": round(float(flat.mean(1).abs().max()), 3),
                       "latent_deviation": [round(v, 3) for v in (float(flat.std(1).min()), float(flat.std(1).max()))]}
        picked = self.chosen[torch.linspace(0, len(self.chosen) - 1, min(12, len(self.chosen))).long()]
        pairs = torch.stack([self.backed.pixels[picked], self.redraw(self.backed.pixels[picked])], 1)
        strip = torch.cat([torch.cat(list(pair), 1) for pair in pairs], 2)
        picture = Pil.fromarray(Image(pixels=strip.numpy()).to_uint8())
        picture = picture.resize((picture.width * 3 // 2, picture.height * 3 // 2), Pil.Resampling.BICUBIC)
        write(out / "emoji-codec.png", lambda path: picture.save(path, "PNG"))

    # -- drawing ------------------------------------------------------------------------------------------------------

    def fill(self, documents: Iterable[Document], what: str, seed: int) -> list[Document]:
        documents = list(documents)
        sampling = self.system.default_sampling()
        sampling = replace(sampling, text=replace(sampling.text, max_tokens=24))
        made: list[Document] = []
        for start in tqdm(range(0, len(documents), self.batch), desc=what, leave=False):
            part = documents[start:start + self.batch]
            seeds = [hash64(seed, start + i) >> 1 for i in range(len(part))]
            made += self.system.generate([d.prompt() for d in part], sampling, seeds=seeds)
        return made

    def draw(self, split: Split, own: Tensor, what: str, seed: int) -> Tensor:
        made = self.fill((split.documents[i] for i in own.tolist()), what, seed)
        return torch.stack([torch.from_numpy(np.asarray(d.of(Image)[-1].pixels)) for d in made])

    def drawing(self, out: Path) -> None:
        """Which emoji is a drawing nearest to, of all names; on colours: of those on the same colour."""
        own, plain = self.chosen, self.plain
        drawn = self.draw(plain, own, "held-out phrasing", self.seed)
        asked = self.draw(self.trained, own, "trained phrasing", self.seed + 1)
        ceiling = self.redraw(plain.pixels[own])
        elsewhere = self.redraw(self.trained.pixels[own])
        parts = distances(torch.cat([drawn, asked, ceiling, elsewhere]), plain.pixels, plain.rows).split(len(own))
        rank = [ranks(d, own) for d in parts]
        for name, r in zip(("held_out", "trained", "codec", "codec_elsewhere"), rank, strict=True):
            self.tops(name, r)
        self.tops("chance", ranks(parts[0], self.shifted(own)))

        backed, grounds = self.backed, [r["background"] for r in self.backed.rows]
        on_colour = self.draw(backed, own, "backgrounds", self.seed + 2)
        allowed = torch.tensor([[grounds[i] == g for g in grounds] for i in own.tolist()])
        near = distances(on_colour, backed.pixels, backed.rows)
        self.tops("colour", ranks(near, own, allowed))
        self.facts["colour_names"] = round(float(allowed.sum(1).float().mean()), 1)
        self.facts["colour_chance"] = round(float((1 / allowed.sum(1)).mean()), 4)
        palette = sorted(set(grounds) | {WHITE})
        true = {g: border(backed.pixels[[i for i, x in enumerate(grounds) if x == g]]).mean(0) for g in set(grounds)}
        shades = torch.stack([true.get(g, torch.ones(3)) for g in palette])
        seen = torch.cdist(border(on_colour), shades).argmin(1)
        self.count("background", [palette[s] == grounds[i] for s, i in zip(seen.tolist(), own.tolist(), strict=True)])
        self.facts["backgrounds"] = len(palette)

        shown = (_shown(plain.captions[i], d) for i, d in zip(own.tolist(), drawn, strict=True))
        back = self.fill(shown, "own drawings", 0)
        self.count("drawn_then_named", [_text(d) == plain.names[i] for i, d in zip(own.tolist(), back, strict=True)])
        rows = [(plain, drawn, parts[0], None), (backed, on_colour, near, allowed)]
        write(out / "emoji-drawings.png", lambda path: self.grid(rows).save(path, "PNG"))

    def grid(self, kinds: Sequence[tuple[Split, Tensor, Tensor, Tensor | None]], each: int = 12) -> Pil.Image:
        """Evenly spread items, not chosen by how they came out: words, held-out rendering, drawing, nearest emoji."""
        cell, words, gap = 96, 210, 6
        picked = torch.linspace(0, len(self.chosen) - 1, min(each, len(self.chosen))).long().tolist()
        sheet = Pil.new("RGB", (len(kinds) * (words + 3 * cell + 5 * gap), len(picked) * (cell + gap) + 24), "white")
        pen = ImageDraw.Draw(sheet)
        for column, (split, drawn, distance, allowed) in enumerate(kinds):
            left = column * (words + 3 * cell + 5 * gap)
            for i, title in enumerate(("asked for", "held-out", "drawn", "nearest")):
                pen.text((left + gap + (words + (i - 1) * (cell + gap) + gap if i else 0), 6), title, fill="black")
            for row, k in enumerate(picked):
                own, top = int(self.chosen[k]), 24 + row * (cell + gap)
                found = distance[k] if allowed is None else distance[k].masked_fill(~allowed[k], float("inf"))
                nearest = int(found.argmin())
                text = split.documents[own].of(Text)[0].text or ""
                pen.multiline_text((left + gap, top + 8), _wrapped(text), fill="black")
                frames = ("silver", "silver", "green" if nearest == own else "red")
                for i, pixels in enumerate((split.pixels[own], drawn[k], split.pixels[nearest])):
                    tile = Pil.fromarray(Image(pixels=pixels.numpy()).to_uint8())
                    x = left + words + 2 * gap + i * (cell + gap)
                    sheet.paste(tile.resize((cell, cell), Pil.Resampling.BICUBIC), (x, top))
                    pen.rectangle((x, top, x + cell - 1, top + cell - 1), outline=frames[i])
        return sheet

    # -- captioning ---------------------------------------------------------------------------------------------------

    def captioning(self) -> None:
        """Names written for held-out pictures, and names chosen by log-prob from random candidates."""
        own = self.chosen.tolist()
        for name, split in (("caption_white", self.plain), ("caption_colour", self.backed),
                            ("caption_trained", self.trained)):
            made = self.fill((split.captions[i] for i in own), name.replace("_", " "), 0)
            self.count(name, [_text(d) == split.names[i] for i, d in zip(own, made, strict=True)])
        chooser = random.Random(self.seed)
        some = own[:: max(len(own) // 60, 1)][:60]
        others = some[1:] + some[:1]  # whose picture is shown instead: what the names alone are worth
        right, blind = [], []
        for i, other in tqdm(list(zip(some, others, strict=True)), desc="choose", leave=False):
            names = [i, *chooser.sample([k for k in range(len(self.plain.names)) if k != i], self.candidates - 1)]
            for shown, hits in ((i, right), (other, blind)):
                asked = [_named(self.plain.captions[shown], self.plain.names[k]) for k in names]
                with torch.no_grad():
                    scores = torch.stack([v.float().sum().cpu() for v in self.system.score(asked).values])
                hits.append(bool(scores[0] > scores[1:].max()))
        self.count("chosen", right)
        self.count("chosen_blind", blind)


def _named(document: Document, name: str) -> Document:
    pieces = [p.replace(text=name) if isinstance(p, Text) and p.target else p for p in document]
    return Document(tuple(pieces), document.task, document.meta)


def _shown(document: Document, pixels: Tensor) -> Document:
    pieces = [p.replace(pixels=pixels.numpy()) if isinstance(p, Image) else p for p in document]
    return Document(tuple(pieces), document.task, document.meta)


def _text(document: Document) -> str:
    return (document.of(Text)[-1].text or "").strip()


def _wrapped(text: str, width: int = 32) -> str:
    return "\n".join(textwrap.wrap(text.encode("latin-1", "replace").decode("latin-1"), width))


# -- what is written --------------------------------------------------------------------------------------------------

def cost(run: Path) -> float | None:
    """Seconds of a run as its metrics tell."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])["seconds"] if lines else None


def table(figures: dict[str, Metric], facts: dict[str, Any]) -> str:
    """The figures as Markdown."""
    def share(name: str) -> str:
        m = figures[name]
        return f"{m.value:.1%} ({m.low:.1%} to {m.high:.1%})" if m.low is not None else f"{m.value:.1%}"

    def both(name: str) -> str:
        return f"{share(name + '_top1')} | {share(name + '_top5')}"

    n, low, high = facts["emoji"], *facts["latent_deviation"]
    psnr = " / ".join(f"{figures[k].value:.2f} dB" for k in ("psnr_white", "psnr_colour"))
    codec, model = ("an unknown time" if facts[k] is None else f"{facts[k] / 60:.1f} min"
                    for k in ("codec_seconds", "model_seconds"))
    return f"""Training took {codec} for the codec and {model} for the model. {facts['items']} items of each kind, 95%
intervals.

| nearest emoji of all {n:,} | top 1 | top 5 |
|---|---|---|
| drawn from held-out phrasings | {both('held_out')} |
| drawn from phrasings of the training | {both('trained')} |
| the codec's reconstruction of the held-out picture (ceiling) | {both('codec')} |
| the codec's reconstruction of a training picture (another place and size) | {both('codec_elsewhere')} |
| the same drawings judged for another emoji's name (control) | {both('chance')} |
| chance | {1 / n:.2%} | {min(1, 5 / n):.2%} |
| drawn on a colour, held-out phrasing, of the {facts['colour_names']:.0f} on that colour | {both('colour')} |
| chance of that | {facts['colour_chance']:.1%} | {min(1, 5 * facts['colour_chance']):.1%} |

| further | |
|---|---|
| background as asked for, of {facts['backgrounds']} | {share('background')} |
| name written for a held-out picture on white, exact | {share('caption_white')} |
| name written for a held-out picture on a colour, exact | {share('caption_colour')} |
| name written for a training picture, exact | {share('caption_trained')} |
| name chosen by log-prob from {facts['candidates']} | {share('chosen')} |
| the same with another picture shown (control; chance {1 / facts['candidates']:.1%}) | {share('chosen_blind')} |
| own drawing named by the model itself, exact | {share('drawn_then_named')} |
| codec, PSNR on held-out pictures on white / on colours | {psnr} |
| codec, latents: largest mean, range of deviations over channels | {facts['latent_mean']}, {low} to {high} |
"""


def links(out: Path, page: Path) -> str:
    """The pictures as the page shows them."""
    folder = Path(os.path.relpath(out.resolve(), page.parent.resolve())).as_posix()
    return f"""
![words, held-out rendering, drawing, nearest emoji]({folder}/emoji-drawings.png)

![held-out renderings above what the codec makes of them]({folder}/emoji-codec.png)
"""


def fill(page: Path, text: str) -> None:
    """Put a text between the marks of a page."""
    old = page.read_text("utf-8")
    before, begin, rest = old.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"expected {MARKS[0]} and {MARKS[1]} in {page}, got a page without; fix: add the two lines")
    write(page, lambda path: path.write_text(f"{before}{begin}\n{text}{end}{after}", "utf-8"))


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Write under another name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    writer(temporary)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
