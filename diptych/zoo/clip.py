"""The contrastive image-text encoder: a vision tower whose patch features a language model can read.

The image tower is the published SigLIP layout at 64 px (64 patches of 8 x 8); a pooling head and a small text tower
give unit vectors that meet in a softmax contrastive loss (Radford et al. 2021). Half of the long captions are reworded,
and every batch holds captions with one word changed or two colours exchanged as hard negatives. Linear heads on the
patches, dropped after training, also name what each patch shows: the world knows it exactly.
"""
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.benchmarks.reconstruction import to_float
from diptych.parts.positions import sincos_2d
from diptych.parts.vision import Layer, VisionConfig, VisionTransformer, patchify
from diptych.world.language import caption, describe
from diptych.world.render import id_map, render_uint8
from diptych.world.sample import Stream, sample_scene
from diptych.world.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, UNITS, WORLDS, Scene
from diptych.zoo.build import Ingredient, Recipe
from diptych.zoo.codec import PIXELS
from diptych.zoo.tokenizer import default


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    vision: VisionConfig = field(default_factory=lambda: VisionConfig(
        width=128, mlp_width=512, num_layers=4, num_heads=4, patch=8, max_side=8, interpolate=True))
    vocabulary: int
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    text_length: int = 96
    width: int = 128  # of the common space


class Pool(nn.Module):
    """Attention pooling with one learned query and a residual MLP, as on top of the SigLIP tower."""

    def __init__(self, width: int, num_heads: int, out_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.key_value = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.project = nn.Linear(width, out_width)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x (b, n, d), valid (b, n) -> unit vectors (b, out)."""
        k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in self.key_value(x).chunk(2, -1))
        q = self.query.to(k.dtype).view(1, self.num_heads, 1, -1).expand(len(x), -1, -1, -1)
        mask = None if valid is None else valid[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1)
        y = y + self.fc2(F.gelu(self.fc1(self.norm(y)), approximate="tanh"))
        return F.normalize(self.project(y).float(), dim=-1)


class TextTower(nn.Module):
    def __init__(self, c: ClipConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(c.vocabulary, c.text_width)
        self.position = nn.Embedding(c.text_length, c.text_width)
        shape = VisionConfig(width=c.text_width, mlp_width=3 * c.text_width, num_layers=c.text_layers,
                             num_heads=c.text_heads)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(c.text_layers))
        self.norm = nn.LayerNorm(c.text_width)
        self.pool = Pool(c.text_width, c.text_heads, c.width)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        mask = valid[:, None]
        for layer in self.layers:
            x = layer(x, mask)
        return self.pool(self.norm(x), valid)


class ClipModel(nn.Module):
    """`features` for language models, `encode_image` and `encode_text` for retrieval and rewards."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.pool = Pool(config.vision.width, config.vision.num_heads, config.width)
        self.text = TextTower(config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        # Neighbours start out alike: from a random table, shapes that span several patches are learned far later.
        table = self.vision.vision_model.embeddings.position_embedding.weight
        with torch.no_grad():
            table.copy_(sincos_2d(table.shape[1], config.vision.max_side))

    def features(self, images: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) in [-1, 1] -> patch features (b, h/8 * w/8, 128), row by row."""
        return self.vision.encode(images)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit vectors (b, width), float32."""
        return self.pool(self.features(images))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (b, width), float32; texts are read with the tokenizer of the zoo."""
        ids, valid = pad(default().encode_batch(texts), self.config.text_length)
        return self.text(ids.to(self.log_scale.device), valid.to(self.log_scale.device))

    def similarity(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine of every picture with every text, (pictures, texts)."""
        return self.encode_image(images) @ self.encode_text(texts).T


def pad(rows: Sequence[Sequence[int]], limit: int) -> tuple[Tensor, Tensor]:
    """Ids (b, t) and which are real."""
    longest = max((len(r) for r in rows), default=1)
    if longest > limit:
        raise ValueError(f"expected texts of at most {limit} tokens, got {longest}; fix: shorten the text")
    ids = torch.zeros(len(rows), max(longest, 1), dtype=torch.long)
    valid = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row, dtype=torch.long)
        valid[i, :max(len(row), 1)] = True  # an empty text attends to one padding token
    return ids, valid


# -- what a patch shows -----------------------------------------------------------------------------------------------

HEADS = {"color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "size": len(SIZES) + 1, "center": 2,
         "background": len(BACKGROUNDS)}


def patch_labels(scene: Scene, patch: int = 8) -> np.ndarray:
    """uint8 (patches, 5): colour, shape and size of the object that covers most of the patch (0 if none covers an
    eighth), whether an object's centre lies in it, and the background."""
    side = PIXELS // patch
    ids = id_map(scene, PIXELS).reshape(side, patch, side, patch).transpose(0, 2, 1, 3).reshape(side * side, -1)
    out = np.zeros((side * side, len(HEADS)), np.uint8)
    best = np.full(side * side, patch * patch // 8)
    for o in scene.objects:
        area = (ids == o.id).sum(1)
        more = area > best
        best = np.where(more, area, best)
        out[more, :3] = [list(t).index(v) + 1 for t, v in ((COLORS, o.color), (SHAPES, o.shape), (SIZES, o.size))]
        out[o.y * side // UNITS * side + o.x * side // UNITS, 3] = 1
    out[:, 4] = list(BACKGROUNDS).index(scene.background)
    return out


def covered(images: Tensor, background: Tensor, patch: int = 8) -> Tensor:
    """Which pixels of each patch are not background: uint8 pictures, (b,) background numbers -> (b, patches, p * p)."""
    colors = torch.tensor(list(BACKGROUNDS.values()), device=images.device)[background.long()]
    far = (images.int() - colors[:, :, None, None]).abs().amax(1, keepdim=True) > 20
    return patchify(far.float(), patch)


class Training(nn.Module):
    """The model with the heads that only training needs."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.clip = ClipModel(config)
        self.heads = nn.Linear(config.vision.width, sum(HEADS.values()))
        self.mask = nn.Linear(config.vision.width, config.vision.patch**2)


def wrong(row: Sequence[int], generator: torch.Generator) -> list[int]:
    """The ids of a caption that no longer fits: two colours exchanged, or one word replaced by another of its kind."""
    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    row, (kinds, colors) = list(row), _exchangeable()
    colored = [i for i, t in enumerate(row) if t in colors]
    others = [(i, j) for i in colored for j in colored if i < j and row[i] != row[j]]
    if others and below(3) == 0:
        i, j = others[below(len(others))]
        row[i], row[j] = row[j], row[i]
        return row
    places = [i for i, t in enumerate(row) if t in kinds]
    i = places[below(len(places))]
    row[i] = kinds[row[i]][below(len(kinds[row[i]]))]
    return row


@lru_cache(1)
def _exchangeable() -> tuple[dict[int, list[int]], set[int]]:
    """Token ids of words that can stand for each other in a caption, and the ids of colours."""
    word = {w: i for w in (*COLORS, *SHAPES, *SIZES, *BACKGROUNDS, "left", "right", "top", "bottom")
            for i in default().encode(w)}
    groups = (COLORS, SHAPES[:8], ("medium", "large"), ("left", "right"), ("top", "bottom"), BACKGROUNDS)
    return {word[w]: [word[x] for x in g if x != w] for g in groups for w in g}, {word[c] for c in COLORS}


class Clip(Ingredient):
    name = "clip"
    defaults = Recipe(steps=700, batch=96, learning_rate=1.2e-2, warmup=50, weight_decay=1e-2,
                      checkpoint_every=50)
    pool_size = 30_000
    hard = 32  # captions of a batch that also come with a wrong version

    def prepare(self) -> None:
        self.images, self.texts, self.labels = pairs(min(self.pool_size, self.recipe.steps * self.recipe.batch),
                                                     seed=self.seed, rest=0.1)
        self.ids = default().encode_batch(self.texts)

    def model(self) -> Training:
        return Training(ClipConfig(vocabulary=len(default())))

    def matrices(self, model: nn.Module) -> list[str]:
        skipped = ("embedding", "token.", "position.", "heads.", "mask.", "query")
        return [name for name, p in model.named_parameters() if p.ndim == 2 and not any(s in name for s in skipped)]

    def loss(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        assert isinstance(model, Training)
        generator = self.generator("batch", step)
        chosen = torch.randint(len(self.images), (self.recipe.batch,), generator=generator)
        rows = [self.ids[i] for i in chosen.tolist()]
        rows += [wrong(row, generator) for row in rows[: self.hard]]
        ids, valid = pad(rows, model.clip.config.text_length)
        device = model.clip.log_scale.device
        images = self.images[chosen].to(device)
        features = model.clip.features(to_float(images))
        pictures, texts = model.clip.pool(features), model.clip.text(ids.to(device), valid.to(device))
        logits = (pictures @ texts.T).float() * model.clip.log_scale.exp().clamp(max=100)
        target = torch.arange(len(chosen), device=device)
        contrast = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(chosen)].T, target))
        parts = model.heads(features).float().split(list(HEADS.values()), -1)
        labels = self.labels[chosen].long().to(device).unbind(-1)
        shown = labels[0] > 0
        naming = torch.stack([F.cross_entropy(part.flatten(0, 1), label.flatten())
                              for part, label in zip(parts, labels, strict=True)]).sum()
        # most patches show nothing: what an object is must count where there is one, shape most, the hardest to read
        shape = F.cross_entropy(parts[1][shown], labels[1][shown])
        size = F.cross_entropy(parts[2][shown], labels[2][shown])
        # which pixels belong to it, whatever the colours: without this, shapes take ten times as long
        mask = F.binary_cross_entropy_with_logits(model.mask(features).float()[shown],
                                                  covered(images, labels[4][:, 0])[shown])
        right = (logits.argmax(1) == target).float().mean()
        return {"loss": contrast + naming + shape + 0.5 * size + 4 * mask, "contrast": contrast, "naming": naming,
                "shape": shape, "mask": mask, "right": right}

    def finish(self, model: nn.Module) -> ClipModel:
        assert isinstance(model, Training)
        return model.clip

    def config(self, model: nn.Module) -> dict[str, Any]:
        assert isinstance(model, ClipModel)
        return dataclasses.asdict(model.config)

    @staticmethod
    def restore(config: dict[str, Any]) -> ClipModel:
        return ClipModel(ClipConfig(**{**config, "vision": VisionConfig(**config["vision"])}))

    def measure(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, ClipModel)
        out = {}
        for split in ("test", "pairs"):
            images, texts, _ = pairs(1024, seed=self.seed, split=split)
            out[f"retrieval_{split}"] = retrieval(model, images, texts)
            if split == "test":
                out["wording"] = wording(model, images, texts, self.generator("wording"))
        return out | {f"probe_{name}": share for name, share in probe(model.features, self.seed).items()}

    def card(self, cost: Mapping[str, Any], figures: Mapping[str, float]) -> str:
        return CARD.format(**cost, **figures, pool=self.pool_size, hard=self.hard)


def pairs(count: int, *, seed: int = 0, rest: float = 0.0, split: str = "train") -> tuple[Tensor, list[str], Tensor]:
    """Pictures uint8 (n, 3, 64, 64), a long caption of each, patch labels; a share `rest` from the world core8."""
    images = np.empty((count, 3, PIXELS, PIXELS), np.uint8)
    labels = np.empty((count, 64, len(HEADS)), np.uint8)
    texts = []
    for i in range(count):
        world = WORLDS["core8" if (i + 0.5) * rest % 1 >= 1 - rest else "mini"]
        rng = Stream("clip", split, seed, i)
        scene = sample_scene(world, rng, count=1 + rng.below(4), split=split)
        images[i], labels[i] = render_uint8(scene, PIXELS).transpose(2, 0, 1), patch_labels(scene)
        texts.append(caption(scene) if rng.chance(0.5) else describe(scene, "long", rng)[0])
    return torch.from_numpy(images), texts, torch.from_numpy(labels)


@torch.no_grad()
def retrieval(model: ClipModel, images: Tensor, texts: Sequence[str], group: int = 64) -> float:
    """Share of pictures whose own caption is the nearest of `group`, mean of both directions."""
    hits = []
    for start in range(0, len(images) - group + 1, group):
        part = slice(start, start + group)
        cosine = model.similarity(to_float(images[part]), texts[part])
        own = torch.arange(group)
        hits += [(cosine.argmax(1) == own).float().mean(), (cosine.argmax(0) == own).float().mean()]
    return float(torch.stack(hits).mean())


@torch.no_grad()
def wording(model: ClipModel, images: Tensor, texts: Sequence[str], generator: torch.Generator) -> float:
    """Share of pictures nearer to their caption than to a version of it with one change."""
    rows = default().encode_batch(texts)
    both = [model.text(*pad(r, model.config.text_length)) for r in (rows, [wrong(r, generator) for r in rows])]
    pictures = torch.cat([model.encode_image(to_float(part)) for part in images.split(128)])
    own, other = ((pictures * t).sum(1) for t in both)
    return float((own > other).float().mean())


def probe(features: Callable[[Tensor], Tensor], seed: int, train: int = 512, test: int = 256) -> dict[str, float]:
    """What a linear read-out of frozen patch features, pictures (b, 3, 64, 64) in [-1, 1] -> (b, 64, d), knows after a
    ridge regression on one set of pictures, of another: `color`, `shape` and `size` of patches that show an object,
    and from the mean over all patches the `count` of objects in a picture."""
    def data(split: str, count: int) -> tuple[Tensor, Tensor]:
        images, _, labels = pairs(count, seed=seed + 1, split=split)
        with torch.no_grad():
            x = torch.cat([features(to_float(part)).float().cpu() for part in images.split(128)])
        return torch.cat([x, torch.ones(*x.shape[:2], 1)], 2).double(), labels.long()

    def share(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, kinds: int) -> float:
        gram = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1])
        weight = torch.linalg.solve(gram, x.T @ F.one_hot(y, kinds).double())
        return float(((test_x @ weight).argmax(1) == test_y).double().mean())

    (x, y), (test_x, test_y) = data("train", train), data("test", test)
    shown, test_shown = y[..., 0] > 0, test_y[..., 0] > 0
    out = {name: share(x[shown], y[shown][:, i], test_x[test_shown], test_y[test_shown][:, i], HEADS[name])
           for i, name in enumerate(("color", "shape", "size"))}
    counts, test_counts = y[..., 3].sum(1), test_y[..., 3].sum(1)  # of centres, which lie in one patch each
    return out | {"count": share(x.mean(1), counts, test_x.mean(1), test_counts, 1 + y.shape[1])}


CARD = """# clip

A contrastive image-text encoder of the world with patch features: a SigLIP-style tower (64 px, 64 patches of 8 x 8,
width 128, 4 layers), a text tower (width 128, 3 layers) over the tokenizer of the zoo, attention pooling on both;
{parameters:,} parameters, {bytes:,} bytes in bfloat16.

- **Use**: `clip = zoo.load("clip")`; `clip.features(images)` gives (b, 64, 128) patch features from pictures
  (b, 3, 64, 64) in [-1, 1]; `clip.encode_image(images)`, `clip.encode_text(texts)` and `clip.similarity(images, texts)`
  give unit vectors and cosines. Keys below `vision.` are those of a published SigLIP tower.
- **Data**: {pool:,} pictures of seed {seed}, a tenth from the world core8, the others from mini, 1 to 4 objects,
  training split; a long caption of each, half canonical, half reworded with the objects in random order.
- **Loss**: softmax contrastive in both directions over batches of {batch}, {hard} of them with a wrong caption beside
  (one word replaced, or two colours exchanged). **Auxiliary**: linear heads on the patch features name the colour,
  shape and size each patch shows (more weight where it shows an object), its pixels that are not background, whether a
  centre lies in it, and the background. They are dropped after training. Without the pixels shapes stay unread.
- **Cost**: {steps} steps, {seconds:.0f} s beside other work on two CPU cores in bfloat16, torch {torch}. Muon, AdamW.

| measured on held-out pictures, weights as stored | |
|---|---|
| retrieval@1 in 64, both directions, test split (1,024 pairs) | {retrieval_test:.1%} |
| retrieval@1 in 64, held-out colour-shape pairs (1,024 pairs) | {retrieval_pairs:.1%} |
| own caption beats one with a single word changed (1,024 pairs) | {wording:.1%} |
| linear read-out of patch features: colour / shape / size | {probe_color:.1%} / {probe_shape:.1%} / {probe_size:.1%} |

The read-out is a ridge regression on 512 training pictures, tested on 256 held-out ones, over patches of which an
object covers more than an eighth; chance is about 12 / 17 / 50% in the mini world.

Made and measured by `diptych zoo build clip`.
"""
