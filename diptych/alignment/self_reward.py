"""Self-rewarding of SRUM (arXiv 2510.12784): a model judges its own drawings region by region and as a whole, once, and
is trained on them with these judgements as weights (`reward_map`). No other pictures, no labels, no second model.

    boxes    of objects: the true ones, what the world's perception finds, connected patches, or the model's own
    judge    two questions per drawing, about the regions and about the layout; replies are read after the thoughts
    weights  a map of the scores, on the grid of the drawing's tokens

A judgement that cannot be read has no `overall` and is left out of training. `oracle` judges drawings of the world
exactly: what a self-judge reaches is bounded by how well it agrees with that.
"""
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diptych.alignment.reward_map import LAMBDA, BoxPixels, Mode, Region, clip_box, factors, reward_map, token_map
from diptych.alignment.rewards.asking import Asker, asker, question
from diptych.alignment.rewards.base import Failure
from diptych.document import Boxes, Document, Image, Text
from diptych.systems.base import System
from diptych.systems.coded import Coded
from diptych.systems.interleaved import Interleaved
from diptych.systems.packed import Packed
from diptych.world.perceive import Percept, perceive
from diptych.world.render import box_of
from diptych.world.sample import find_world
from diptych.world.scene import Scene
from diptych.world.segment import components, find_ground, smooth, to_lab
from diptych.world.spec import Spec
from diptych.world.verify import verify_percept

MOST = 5  # regions of a drawing that are judged
RETRIES = 5
SCALE = "a number from -1 to 1 (1: perfect; 0.5 and more: good; around 0: harmless background; -0.5 and less: bad or " \
        "distorted; -1: contradicts the prompt)"
LOCAL = "The picture was drawn for the prompt: \"{prompt}\". Judge each of these regions, given as x0, y0, x1, y1 in " \
        "pixels:\n{regions}\nFor each write four lines and then an empty one:\nRegion ID: the number\nIdentified " \
        "Object: what it shows\nScore: " + SCALE + "\nReason: why"
GLOBAL = "The picture was drawn for the prompt: \"{prompt}\". Judge only its layout and composition, not single " \
         "objects; if the prompt says nothing about places, stay near 0. Write three lines:\nComposition Analysis: " \
         "what you see\nScore: " + SCALE + "\nReason: why"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The judgement of one drawing. `overall` None: it could not be had. `picture`: a name for its file."""

    prompt: str
    regions: tuple[Region, ...] = ()
    overall: float | None = None
    picture: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Judged":
        regions = tuple(Region(**{**r, "box": tuple(r["box"])}) for r in data["regions"])
        return cls(**{**data, "regions": regions})

    @property
    def usable(self) -> bool:
        """A whole that scores exactly 0 is how an unread one used to be written: neither says anything."""
        return self.overall is not None and self.overall != 0


# -- replies ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Reply:
    """What was found of a judgement; the published reader leaves out what it does not find."""

    name: str | None = None
    score: float | None = None
    reason: str | None = None


_SCORE = re.compile(r"Score:\s*(-?\d+\.?\d*)", re.IGNORECASE)
_STRICT_SCORE = re.compile(r"^\W*Score\W*?:\W*?([-+]?(?:\d+\.?\d*|\.\d+))\s*(?:/\s*1(?:\.0)?)?\W*$",
                           re.IGNORECASE | re.MULTILINE)


def _after_thoughts(text: str) -> str:
    return text.rpartition("</think>")[2]


def published_regions(text: str) -> dict[int, Reply]:
    """Behind the thoughts, blocks between empty lines that begin a "Region ID: NUMBER"; of one number the last."""
    out: dict[int, Reply] = {}
    for block in re.split(r"\n\s*\n", _after_thoughts(text)):
        number = re.search(r"Region ID:\s*(\d+)", block, re.IGNORECASE)
        if number is None:
            continue
        name, score = re.search(r"Identified Object:[ \t]*(.*)", block, re.IGNORECASE), _SCORE.search(block)
        reason = re.search(r"Reason:\s*(.*)", block, re.IGNORECASE | re.DOTALL)
        out[int(number[1])] = Reply(name=name and name[1].strip(), score=score and float(score[1]),
                                    reason=reason and reason[1].strip())
    return out


def published_overall(text: str) -> Reply | None:
    """The first number behind "Score:"; without a "Reason:" the reason is all that follows it. `name` is the analysis,
    to the end of the reply. None without a number."""
    text = _after_thoughts(text)
    score = _SCORE.search(text)
    if score is None:
        return None
    analysis = re.search(r"Composition Analysis:\s*(.*)", text, re.IGNORECASE | re.DOTALL)
    reason = re.search(r"Reason:\s*(.*)", text, re.IGNORECASE | re.DOTALL)
    return Reply(name=analysis and analysis[1].strip(), score=float(score[1]),
                 reason=(reason[1] if reason else text[score.end():]).strip())


def strict_score(text: str) -> float | None:
    """The one score line of a text, or None unless there is exactly one, in [-1, 1]."""
    found = [float(s) for s in _STRICT_SCORE.findall(text)]
    return found[0] if len(found) == 1 and -1 <= found[0] <= 1 else None


def strict_regions(text: str, count: int) -> dict[int, Reply]:
    """As `published_regions`, in bold or not, of the numbers 1 .. count only, those with a score."""
    blocks = re.split(r"(?=^\W*Region ID\b)", _after_thoughts(text), flags=re.IGNORECASE | re.MULTILINE)
    out: dict[int, Reply] = {}
    for block in blocks:
        number, score = re.match(r"\W*Region ID\W*(\d+)", block, re.IGNORECASE), strict_score(block)
        if number is not None and score is not None and 1 <= int(number[1]) <= count:
            name = re.search(r"Identified Object\W*:[\W]*(.*)", block, re.IGNORECASE)
            out[int(number[1])] = Reply(name=name[1].strip() if name else "", score=score)
    return out


# -- boxes ------------------------------------------------------------------------------------------------------------

def by_area(boxes: Iterable[BoxPixels], most: int | None = None) -> list[BoxPixels]:
    """Largest first, of equals the earlier."""
    return sorted(boxes, key=lambda b: -(b[2] - b[0]) * (b[3] - b[1]))[:most]


def _pixels(boxes: Iterable[Sequence[float]], size: tuple[int, int]) -> list[BoxPixels]:
    """xyxy in [0, 1] -> whole pixels, outwards."""
    height, width = size
    found = (clip_box((math.floor(x0 * width), math.floor(y0 * height), math.ceil(x1 * width), math.ceil(y1 * height)),
                      size) for x0, y0, x1, y1 in boxes)
    return [b for b in found if b is not None]


def _drawing(made: Document) -> Image:
    drawn = [p for p in made.of(Image) if p.target and not p.empty]
    if len(drawn) != 1:
        raise ValueError(f"expected a document with one drawing, got {len(drawn)}")
    return drawn[0]


def true_boxes(made: Document, most: int = MOST) -> list[BoxPixels]:
    """Of the objects that should be there."""
    scene = Scene.from_dict(made.meta["scene"])
    return by_area(_pixels((box_of(o, scene.canvas) for o in scene.objects), _size(made)), most)


def _size(made: Document) -> tuple[int, int]:
    size = _drawing(made).size
    assert size is not None
    return size


def seen_boxes(made: Document, most: int = MOST) -> list[BoxPixels]:
    """Of what the world's perception finds, blobs that are no object among them."""
    percept = perceive(_drawing(made).pixels, made.meta.get("world", "mini"))  # type: ignore[arg-type]
    return by_area(_pixels([b for b, _ in _blobs(percept)], _size(made)), most)


def _blobs(percept: Percept) -> list[tuple[Sequence[float], int | None]]:
    """Boxes in [0, 1] with the object's number, None of unknown blobs, as squares of their area."""
    out: list[tuple[Sequence[float], int | None]] = [(box_of(o, percept.canvas), n)
                                                     for n, o in enumerate(percept.objects)]
    for u in percept.unknown:
        half = math.sqrt(u.area) / 2
        out.append(((max(u.x - half, 0), max(u.y - half, 0), min(u.x + half, 1), min(u.y + half, 1)), None))
    return out


def patch_boxes(made: Document, most: int = MOST, *, distance: float = 18.0, area: float = 12.0) -> list[BoxPixels]:
    """Of connected patches that differ from the background by `distance` in Lab, `area` pixels at 64 px or more: needs
    no object to be recognisable."""
    pixels = np.asarray(_drawing(made).pixels)
    levels = (np.clip(pixels, -1, 1) + 1) * np.float32(127.5)
    levels, ground = find_ground(levels, find_world(made.meta.get("world", "mini")).backgrounds)
    own = to_lab(ground.color.reshape(3, 1).astype(np.float32)).reshape(3, 1, 1)
    far = np.sqrt(((to_lab(smooth(levels)) - own) ** 2).sum(0)) > distance
    labels, count = components(far, area * (levels.shape[2] / 64) ** 2)
    found: list[BoxPixels] = []
    for n in range(1, count + 1):
        y, x = np.nonzero(labels == n)
        found.append((int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1))
    return by_area(found, most)


def own_boxes(model: System, made: Sequence[Document], asks: Sequence[str], most: int = MOST) -> list[list[BoxPixels]]:
    """Those that the model gives when it is asked for them in these words, one for each drawing."""
    asked = [Document((Image(pixels=_drawing(m).pixels), Text(text=ask), Boxes(role="assistant", target=True)))
             for m, ask in zip(made, asks, strict=True)]
    found = [m.of(Boxes)[-1].boxes for m in model.generate(asked)]
    return [by_area(_pixels(() if f is None else f.tolist(), _size(m)), most) for f, m in zip(found, made, strict=True)]


# -- judging ----------------------------------------------------------------------------------------------------------

def judge(model: System | Asker, made: Sequence[Document], boxes: Sequence[Sequence[BoxPixels]], *,
          retries: int = RETRIES, prompts: tuple[str, str] = (LOCAL, GLOBAL)) -> list[Judged]:
    """Judgements of drawings with the boxes of each. What cannot be read is asked again while the reply changes: a
    greedy model says the same again, and is asked once."""
    ask = asker(model, fixed=False)
    words = [next((p.text or "" for p in m.of(Text) if not p.target), "") for m in made]
    lists = ["\n".join(f"{n}: {', '.join(map(str, b))}" for n, b in enumerate(own, 1)) for own in boxes]
    local = {i: question(prompts[0].format(prompt=words[i], regions=lists[i]), [_drawing(m)])
             for i, m in enumerate(made) if boxes[i]}
    layout = {i: question(prompts[1].format(prompt=words[i]), [_drawing(m)]) for i, m in enumerate(made)}
    parts = _asked(ask, local, lambda i, text: strict_regions(text, len(boxes[i])) or None, retries)
    whole = _asked(ask, layout, lambda i, text: strict_score(_after_thoughts(text)), retries)
    out = []
    for i in range(len(made)):
        scores: dict[int, Reply] = parts.get(i, {})
        regions = tuple(Region(box=b, score=s.score, name=s.name or "") for n, b in enumerate(boxes[i], 1)
                        if (s := scores.get(n)) is not None and s.score is not None)
        out.append(Judged(prompt=words[i], regions=regions, overall=whole.get(i)))
    return out


def _asked(ask: Asker, documents: dict[int, Document], read: Callable[[int, str], Any], retries: int) -> dict[int, Any]:
    found: dict[int, Any] = {}
    before: dict[int, Any] = {}
    for _ in range(retries + 1):
        todo = [i for i in documents if i not in found]
        replies = dict(zip(todo, ask([documents[i] for i in todo]), strict=True)) if todo else {}
        known = {i: read(i, r) for i, r in replies.items() if not isinstance(r, Failure)}
        found |= {i: value for i, value in known.items() if value is not None}
        if replies == before:
            break
        before = replies
    return found


def oracle(made: Document, boxes: Sequence[BoxPixels] | None = None) -> Judged:
    """What the world's verifier says of a drawing. An object scores 2 m - 1, with m the share of what its item states
    that is right, -1 if nothing asked for it; so does an unknown blob. A box gets the score of the object it overlaps
    most, -1 if there is none. The whole: 2 m - 1 of the numbers, places and relations."""
    percept = perceive(_drawing(made).pixels, made.meta["world"])  # type: ignore[arg-type]
    spec, size = Spec.from_dict(made.meta["spec"]), _size(made)
    scores = _object_scores(percept, spec)
    blobs = [(clip_box([v * size[k % 2 == 0] for k, v in enumerate(b)], size), -1.0 if n is None else scores[n])
             for b, n in _blobs(percept)]
    regions = []
    for box in by_area([b for b, _ in blobs if b is not None]) if boxes is None else boxes:
        best = max(((_overlap(box, b), s) for b, s in blobs if b is not None), default=(0.0, -1.0))
        regions.append(Region(box=box, score=best[1] if best[0] > 0 else -1.0))
    verdict = verify_percept(percept, spec).scores
    whole = [verdict[n] for n in ("count", "place", "relation") if n in verdict]
    words = next((p.text or "" for p in made.of(Text) if not p.target), "")
    return Judged(prompt=words, regions=tuple(regions), overall=2 * sum(whole) / len(whole) - 1)


def _object_scores(percept: Percept, spec: Spec) -> list[float]:
    """The best that each object does for any item, as if it were alone."""
    out = []
    for o in percept.objects:
        alone = replace(percept, objects=(o,), confidence=(1.0,), unknown=())
        shares = []
        for item in spec.items:
            verdict = verify_percept(alone, Spec(items=(replace(item, count=1),), closed=False))
            own = [v for n, v in verdict.scores.items() if n in ("color", "shape", "size", "texture", "place")]
            shares.append(sum(own) / len(own) if own else 1.0)
        out.append(2 * max(shares, default=0.0) - 1)
    return out


def _overlap(a: BoxPixels, b: BoxPixels) -> float:
    common = [max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1)]
    return float(common[0] * common[1])


# -- training ---------------------------------------------------------------------------------------------------------

def emphasis(system: Packed, made: Document, judged: Judged, *, mode: Mode = "released", strength: float = LAMBDA
             ) -> Tensor:
    """Factors (n,) on the errors of the tokens of a drawing, for `system.collate([made], [factors])`. The map goes the
    way of the picture: cut and scaled as the codec has it, then on the grid of tokens."""
    if type(system).loss not in (Interleaved.loss, Coded.loss):
        raise ValueError(f"expected a system whose loss weighs the tokens of a picture, got {type(system).__name__}; "
                         "fix: one that draws latents or codes inside the sequence")
    if not judged.usable or judged.overall is None:
        raise ValueError("expected a judgement with a score of the whole other than 0, got one without; "
                         "fix: leave the drawing out")
    pixels = reward_map(judged.regions, judged.overall, _size(made), mode)
    coded = system.views(pixels.expand(3, -1, -1).contiguous())[1]
    return factors(token_map(coded[0], system.grid(coded)), strength)


# -- records ----------------------------------------------------------------------------------------------------------

def write_records(path: str | Path, records: Iterable[Judged]) -> None:
    """One JSON line per judged drawing."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(r.to_dict(), ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    temporary.replace(path)


def read_records(path: str | Path) -> list[Judged]:
    lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines would also cut inside a text
    return [Judged.from_dict(json.loads(line)) for line in lines if line.strip()]
