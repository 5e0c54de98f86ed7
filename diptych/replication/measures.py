"""What several studies measure: suites of the world, held-out losses, and what a linear read-out finds in features."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diptych.alignment.rewards import verdicts
from diptych.alignment.rewards.asking import AskSystem
from diptych.benchmarks.evaluate import evaluate
from diptych.benchmarks.reconstruction import clip_features, frechet_distance
from diptych.benchmarks.results import Key
from diptych.benchmarks.suite import Outcome
from diptych.benchmarks.world import colors_shown, drawn
from diptych.document import Document
from diptych.replication.study import Context
from diptych.systems.base import Sampling, System
from diptych.systems.batch import Batch
from diptych.systems.io import load_system
from diptych.systems.packed import Packed
from diptych.world import judging, tasks
from diptych.world.render import render
from diptych.world.sample import find_world, sample_scene, stream
from diptych.world.scene import COLORS, PLACES, SHAPES, place
from diptych.world.spec import Spec

REPLY = 128  # tokens of a judge's reply at most; true thoughts have about 80


def suites(system: System, context: Context, names: Sequence[str], *, n: int = 200, world: str = "few",
           splits: Sequence[str] = ("test",), sampling: Sampling | None = None) -> dict[str, float]:
    """Shares of right answers: `draw`, its checks as `draw: color`, its numbers as `draw: mean GFLOP`; of splits other
    than the test one as `draw/pairs`, and what `drawings` measures. Items and seeds are the same for all arms and seeds
    of a study."""
    pictures: list[tuple[Document, Document]] = []

    def keep(key: Key, true: Document, made: Document, _: Outcome) -> None:
        if (key.suite, key.split) == ("draw", "test"):
            pictures.append((true, made))

    results = evaluate(system, names, n=context.items(n), splits=splits, world=world, sampling=sampling, progress=False,
                       watch=keep)
    found = drawings(pictures) if pictures else {}
    for figure in results.figures():
        suite = figure.suite + ("" if figure.split == "test" else f"/{figure.split}")
        if figure.kind in ("right", "check", "number") and figure.name != "mean colors shown":  # is in `drawings`
            found[suite if figure.kind == "right" else f"{suite}: {figure.name}"] = figure.metric.value
    return found


def drawings(pictures: Sequence[tuple[Document, Document]]) -> dict[str, float]:
    """How far drawings are on their way, long before the verifier recognises a shape in them. Of (true, drawn):

    - `draw: FID`: Frechet distance of both sets in the vectors of the zoo's clip, as in 1706.08500.
    - `draw: likeness`: mean cosine of a drawing with the true picture, in the same vectors.
    - `draw: colors shown`: the agreement of the colours shown and asked for (`benchmarks.world.colors_shown`).
    """
    true, made = (torch.from_numpy(np.stack([drawn(d) for d in side])) for side in zip(*pictures, strict=True))
    vectors, others = clip_features(true), clip_features(made)
    colors = [colors_shown(image, Spec.from_dict(document.meta["spec"]))
              for (document, _), image in zip(pictures, made.numpy(), strict=True)]
    known = [value for value in colors if value is not None]
    return {"draw: FID": frechet_distance(vectors, others),
            "draw: likeness": float(torch.nn.functional.cosine_similarity(vectors, others).mean()),
            "draw: colors shown": sum(known) / len(known)}


def held_out_losses(system: System, context: Context, names: Sequence[str], *, n: int = 256, world: str = "few",
                    split: str = "test", batch: int = 32) -> dict[str, float]:
    """Mean of every loss term over documents of these tasks that no training saw, `draw/flow`; noise, times and masks
    are the same for all systems that draw as many."""
    found: dict[str, float] = {}
    for name in names:
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for start in range(0, context.items(n), batch):
            indices = range(start, min(start + batch, context.items(n)))
            documents = [tasks.document(name, i, split=split, world=world) for i in indices]
            generator = torch.Generator(system.device).manual_seed(start)
            with torch.no_grad():
                losses = system.loss(system.collate(documents).to(system.device), generator)
            for term, total in losses.sums.items():
                sums[term] = sums.get(term, 0.0) + float(total)
                counts[term] = counts.get(term, 0.0) + float(losses.counts[term])
        found |= {f"{name}/{term}": total / counts[term] for term, total in sums.items() if counts[term]}
    return found


def a_row_each(system: Packed, documents: Sequence[Document]) -> Batch:
    """Documents with their targets, a row for each in this order: what a row holds is then what a document says."""
    written = [system.write(document) for document in documents]
    return Batch.of(written, [[i] for i in range(len(written))])


class Singles(NamedTuple):
    """Pictures (n, 3, h, w) in [-1, 1] of one object each, with the numbers of its colour, shape and place (n,)."""

    images: Tensor
    labels: Mapping[str, Tensor]


def singles(count: int, *, split: str = "train", world: str = "few", seed: int = 0) -> Singles:
    """The same for the same arguments."""
    config, colors = find_world(world), list(COLORS)
    images, labels = [], []
    for i in range(count):
        scene = sample_scene(config, stream(config, f"singles {seed}", split, i), count=1, split=split)
        [item] = scene.objects
        images.append(render(scene, config.pixels))
        labels.append((colors.index(item.color), SHAPES.index(item.shape), PLACES.index(place(item) or "center")))
    columns = torch.tensor(labels).unbind(1)
    names = ("color", "shape", "place")
    return Singles(torch.from_numpy(np.stack(images)).float(), dict(zip(names, columns, strict=True)))


def readout(features: Callable[[Tensor], Tensor], context: Context, *, train: int = 2000, test: int = 500,
            world: str = "few", ridge: float = 1e-2, batch: int = 64) -> dict[str, float]:
    """What a linear read-out of frozen features knows: the share of held-out pictures of one object whose colour, shape
    and place a ridge regression of `features(images) -> (n, ...)`, flattened, names right, and their mean."""
    guess = probe(features, context, train=train, world=world, ridge=ridge, batch=batch)
    known = singles(context.items(test), split="test", world=world)
    with torch.no_grad():
        guesses = guess(_flat([features(part) for part in known.images.split(batch)]))
    found = {f"readout: {name}": float((guesses[name] == wanted).double().mean())
             for name, wanted in known.labels.items()}
    return {"readout": sum(found.values()) / len(found), **found}


def probe(features: Callable[[Tensor], Tensor], context: Context, *, train: int = 2000, world: str = "few",
          ridge: float = 1e-2, batch: int = 64) -> Callable[[Tensor], dict[str, Tensor]]:
    """The read-out itself: from features (n, ...), also such as no picture has given, to the numbers of colour, shape
    and place (n,) that they speak of."""
    known = singles(context.items(train), split="train", world=world)
    with torch.no_grad():
        x = _flat([features(part) for part in known.images.split(batch)])
    mean, scale = x.mean(0), x.std(0) + 1e-6

    def normed(part: Tensor) -> Tensor:
        return torch.cat([(part - mean) / scale, torch.ones(len(part), 1).double()], 1)

    x = normed(x)
    # the same ridge solved among samples: there are fewer of them than features
    kernel = x @ x.T + ridge * len(x) * torch.eye(len(x)).double()
    targets = {name: torch.nn.functional.one_hot(wanted).double() for name, wanted in known.labels.items()}
    weights = {name: torch.linalg.solve(kernel, target) for name, target in targets.items()}

    def guess(part: Tensor) -> dict[str, Tensor]:
        between = normed(_flat([part])) @ x.T
        return {name: (between @ w).argmax(1) for name, w in weights.items()}

    return guess


def judgements(system: System, context: Context, names: Sequence[str], *, n: int = 100, world: str = "one",
               split: str = "test", batch: int = 64) -> dict[str, float]:
    """How a judge does at tasks of `world.judging`: `draw-pair` is the share of true verdicts, or of true final scores
    of a `draw-point`. Two candidates are shown in both orders: `draw-pair: says the first` of verdicts that can be
    read, `draw-pair: orders agree` of items. Of thoughts: `draw-think: form`, `draw-think: totals agree` with the
    verdict, of replies whose totals can be read, and `draw-think: words` of a reply."""
    found: dict[str, float] = {}
    for name in names:
        documents = [tasks.document(name, i, split=split, world=world) for i in range(context.items(n))]
        pairs = not name.endswith("-point")
        turned = [judging.swapped(d) for d in documents] if pairs else []
        own = system.default_sampling()
        sampling = replace(own, text=replace(own.text, max_tokens=REPLY))
        replies = AskSystem(system, sampling=sampling, batch=batch)([d.prompt() for d in (*documents, *turned)])
        said = [str(reply) for reply in replies]
        same = verdicts.accurate if pairs else _same_score
        right = [same(r, d.meta["answer"]) for r, d in zip(said, (*documents, *turned), strict=True)]
        found[name] = sum(right) / len(right)
        if pairs:
            read = [verdicts.pair(verdicts.answer(r)) for r in said]
            known = [v for v in read if v]
            found[f"{name}: says the first"] = known.count(1) / len(known) if known else 0.0
            agree = [a is not None and b is not None and a + b == 3
                     for a, b in zip(read[:len(documents)], read[len(documents):], strict=True)]
            found[f"{name}: orders agree"] = sum(agree) / len(agree)
        if name.endswith("-think"):
            supported = [s for r in said if (s := verdicts.supported(r)) is not None]
            found[f"{name}: form"] = sum(map(verdicts.well_formed, said)) / len(said)
            found[f"{name}: totals agree"] = sum(supported) / len(supported) if supported else 0.0
            found[f"{name}: words"] = sum(len(r.split()) for r in said) / len(said)
    return found


@torch.no_grad()
def change_of_answers(system: System, context: Context, folder: str | Path, *, n: int = 64) -> float:
    """The largest difference of an answer's log-prob from the system in a folder, on questions of the mini world."""
    documents = [tasks.document("question", i, split="test") for i in range(context.items(n))]
    before = load_system(folder, device=system.device).eval().score(documents).values
    return max(float((a - b).abs().max()) for a, b in zip(before, system.score(documents).values, strict=True))


def _same_score(reply: str, true: str) -> bool:
    """Whether the final score is right, whatever stands before it."""
    score, wanted = (verdicts.point(text, judging.LOW, judging.HIGH) for text in (reply, true))
    return score is not None and score == wanted


def _flat(parts: Sequence[Any]) -> Tensor:
    return torch.cat([part.detach().float().cpu().flatten(1) for part in parts]).double()
