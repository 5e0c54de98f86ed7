"""BLIP3-o (arXiv 2505.09568): what to draw - features or latents, by flow or by regression - and whether the language
model should be frozen while drawing is learnt.

The language model is the zoo's vision-language model. The decoder of features is trained once, from true features, for
all arms. A linear probe on the pooled features of the zoo's contrastive encoder judges every arm: on features as they
are drawn, and on those of the picture where latents are drawn.
"""
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.benchmarks.world import score_draw
from diptych.document import Document, Image, Text
from diptych.parts.feature_codec import FeatureCodec
from diptych.parts.resources import SHIPPED
from diptych.parts.vision import VisionTransformer
from diptych.replication.measures import change_of_answers, held_out_losses, probe, suites
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import Sampling, System
from diptych.systems.serial import Serial
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.world import tasks
from diptych.world.language import caption
from diptych.world.render import render
from diptych.world.sample import find_world, sample_scene, stream
from diptych.world.scene import COLORS, PLACES, SHAPES, place
from diptych.world.spec import Item

WORLD, STEPS, DECODER_STEPS = "one", 350, 400
PROMPTS, OPEN, SEEDS = 128, 24, 4  # prompts that state everything; prompts that leave places open, drawn so many times
ATTRIBUTES = ("count", "color", "shape", "place", "background")
FROZEN = ("trunk", "embed", "connector", "vision", "codec")
READER = {"trunk": "zoo/vlm#trunk", "embed": "zoo/vlm#embed", "connector": "zoo/vlm#connector",
          "vision": "zoo/clip#vision"}
OPTIMIZER = Optimizer(kind="muon", weight_decay=0.0, betas=(0.9, 0.95))


def recipe(steps: int, init: dict[str, str], config: dict[str, Any], **stage: Any) -> Recipe:
    return Recipe(
        system="blip3-o", size="small", config=config, init={**READER, "codec.tower": "zoo/clip#vision", **init},
        data=(Source(world=WORLD, tasks={"draw": 1}),),
        stages=(Stage(steps=steps, batch=32, lr=2e-3, warmup=20, schedule="cosine", floor=0.02, **stage),),
        optimizer=OPTIMIZER, ema=0.98, precision="bf16", log_every=20, save_every=steps, threads=2, workers=1)


# the rest of the network stands idle beside the decoder, and is as small as it can be
DECODER = recipe(DECODER_STEPS, {}, {"queries": 1, "noised_copies": 1, "generator.layers": 1},
                 only=("codec.decoder",))
SEQUENTIAL = recipe(STEPS, {"codec.decoder": "@decoder#codec.decoder"},
                    {"noised_copies": 2, "generator.layers": 4, "pixel_weight": 0.0}, freeze=FROZEN)


# -- measuring --------------------------------------------------------------------------------------------------------

def measure(system: System, context: Context) -> Measured:
    model = cast(Serial, system)
    sampling = replace(model.default_sampling(), evaluations=12)
    guess = probe(lambda images: pooled(model, images), context, train=1500, world=WORLD)
    stated, wanted = single_prompts(context.items(PROMPTS))
    guesses = guess(drawn_features(model, stated, sampling, seeds=range(len(stated))))
    found: dict[str, Any] = {f"drawn: {name}": share(guesses[name], wanted[name]) for name in wanted}
    found["attributes"] = sum(found.values()) / len(found)
    found |= on_open_prompts(model, context, guess, sampling)
    found |= held_out_losses(model, context, ["draw"], world=WORLD)
    found |= held_out_losses(model, context, ["question"], world="mini")
    found |= suites(model, context, ["draw"], n=128, world=WORLD, sampling=sampling)
    found["attributes in pixels"] = sum(found[f"draw: {name}"] for name in ATTRIBUTES) / len(ATTRIBUTES)
    found["attributes in pixels of true codes"] = decoded_truth(model, context)
    found |= suites(model, context, ["question"], n=300, world="mini")
    found["largest change of an answer's log-prob"] = change_of_answers(model, context, SHIPPED / "vlm")
    return found


def share(guesses: Tensor, wanted: Tensor) -> float:
    return float((guesses == wanted).double().mean())


def pooled(model: Serial, images: Tensor) -> Tensor:
    """Pictures (n, 3, 64, 64) -> what a codec of features gives before its scale, (n, d, 4, 4)."""
    features = cast(VisionTransformer, model.vision).encode(images).transpose(1, 2)
    return F.avg_pool2d(features.unflatten(2, (8, 8)), 2)


def single_prompts(count: int) -> tuple[list[Document], dict[str, Tensor]]:
    """Captions of held-out pictures of one object as prompts, and the numbers of what they state."""
    world, colors, documents, labels = find_world(WORLD), list(COLORS), list[Document](), []
    for i in range(count):
        scene = sample_scene(world, stream(world, "one stated", "test", i), count=1, split="test")
        [item] = scene.objects
        documents.append(asked(caption(scene)))
        labels.append((colors.index(item.color), SHAPES.index(item.shape), PLACES.index(place(item) or "center")))
    return documents, dict(zip(("color", "shape", "place"), torch.tensor(labels).unbind(1), strict=True))


def asked(text: str) -> Document:
    return Document((Text(text=text), Image(role="assistant", target=True)), "draw")


def drawn_features(model: Serial, documents: Sequence[Document], sampling: Sampling, seeds: Sequence[int]) -> Tensor:
    """Features (n, d, 4, 4) as drawn, or of the pictures where latents are drawn."""
    caught: list[Tensor] = []
    codec = model.codec
    hooks = [codec.decoder.register_forward_pre_hook(lambda _, given: caught.append(given[0]))] \
        if isinstance(codec, FeatureCodec) else []
    made = model.generate(documents, sampling, seeds=list(seeds))
    for hook in hooks:
        hook.remove()
    if hooks:  # all pictures have one size: they are decoded together, in order
        return torch.cat(caught)
    pictures = torch.stack([torch.from_numpy(cast(Any, d.pieces[1]).pixels) for d in made])
    with torch.no_grad():
        return pooled(model, pictures.to(model.device))


def on_open_prompts(model: Serial, context: Context, guess: Callable[[Tensor], dict[str, Tensor]],
                    sampling: Sampling) -> dict[str, float]:
    """Prompts such as "a red circle", each drawn with several seeds: the share of drawings with the right colour and
    shape, and how far apart drawings of one prompt are, as a share of that of true pictures."""
    world, colors = find_world(WORLD), list(COLORS)
    pairs = [(c, s) for c in world.colors for s in world.shapes if (c, s) not in world.held_out_pairs]
    pairs = pairs[:: len(pairs) // OPEN][: max(2, context.items(OPEN))]
    documents = [asked(f"a {color} {shape}") for color, shape in pairs for _ in range(SEEDS)]
    made = drawn_features(model, documents, sampling, seeds=range(len(documents)))
    guesses = guess(made)
    wanted = {"color": torch.tensor([colors.index(c) for c, _ in pairs]).repeat_interleave(SEEDS),
              "shape": torch.tensor([SHAPES.index(s) for _, s in pairs]).repeat_interleave(SEEDS)}
    found = {f"open prompts: {name}": share(guesses[name], labels) for name, labels in wanted.items()}
    found["open prompts"] = sum(found.values()) / len(found)
    scenes = [sample_scene(world, stream(world, "open", "test", n * SEEDS + k), count=1, split="test",
                           wants=(Item(color=c, shape=s),)) for n, (c, s) in enumerate(pairs) for k in range(SEEDS)]
    with torch.no_grad():
        true = pooled(model, torch.stack([torch.from_numpy(render(s, world.pixels)) for s in scenes]).float())
    found["diversity"] = spread(made) / spread(true)
    return found


def spread(features: Tensor) -> float:
    """Mean distance between the drawings of one prompt."""
    groups = features.float().flatten(1).unflatten(0, (-1, SEEDS))
    return float(torch.cdist(groups, groups).sum() / (len(groups) * SEEDS * (SEEDS - 1)))


@torch.no_grad()
def decoded_truth(model: Serial, context: Context) -> float:
    """Right attributes of what the codec shows of true codes: the most that drawings can reach in pixels."""
    documents = [tasks.document("draw", i, split="test", world=WORLD) for i in range(context.items(64))]
    pictures = [torch.from_numpy(cast(Any, d.pieces[1]).pixels) for d in documents]
    shown = model.decode(torch.stack(model.encode(pictures)), model.grid(pictures[0])).cpu().numpy()
    checks = [score_draw(d, replace(d, pieces=(d.pieces[0], replace(cast(Any, d.pieces[1]), pixels=p)))).checks
              for d, p in zip(documents, shown, strict=True)]
    each = [[c[name] for c in checks if name in c] for name in ATTRIBUTES]
    return sum(sum(v) / len(v) for v in each if v) / sum(1 for v in each if v)


# -- the study --------------------------------------------------------------------------------------------------------

CHANGE = "largest change of an answer's log-prob"
STUDY = Study(
    name="blip3-o", title="BLIP3-o: features by flow, behind a frozen reader",
    about="Is a flow over semantic features learnt faster than one over latents of an autoencoder, is flow better than "
          "regression, and is a frozen language model better than one that learns along? Zoo reader and encoder; "
          f"{STEPS} steps of 32 prompts. 16 vectors are drawn in every arm.",
    recipe=SEQUENTIAL, shared={"decoder": DECODER},
    arms=(Arm(name="features", about="flow over pooled features, the reader frozen", control=True),
          Arm(name="latents", about="flow over latents of the zoo's autoencoder",
              changes={"init": {**READER, "codec": "zoo/codec"}, "config.latent_patch": 2,
                       "config.generator.token_width": 24}),
          Arm(name="regression", about="features said at once by squared error",
              changes={"config.objective": "regression", "config.sampling.guidance.branches": []}),
          Arm(name="joint", about="the reader learns along, on as many drawings and half as many documents to answer",
              changes={"stages.0.freeze": ["vision", "codec"], "stages.0.batch": 48, "data": [
                  {"world": WORLD, "name": "draw", "tasks": {"draw": 1}, "weight": 2},
                  {"world": "mini", "name": "answer", "tasks": {"question": 1, "talk": 1}, "weight": 1}]})),
    claims=(
        Claim(text="Features are learnt faster than latents: more right attributes after equal steps, by the probe",
              metric="attributes", treatment="features", control="latents"),
        Claim(text="... and in pixels, through the decoder", metric="attributes in pixels", treatment="features",
              control="latents"),
        Claim(text="Flow keeps drawings of one prompt apart by more than a fifth of what true pictures are, beyond "
                   "regression", metric="diversity", treatment="features", control="regression", margin=0.2),
        Claim(text="Flow says open prompts better than regression: more right colours and shapes",
              metric="open prompts", treatment="features", control="regression"),
        Claim(text="Sequential training changes no answer (log-probs within 0.0001)", metric=CHANGE,
              treatment="features", better="lower", margin=-1e-4),
        Claim(text="Sequential training answers more questions right than joint training", metric="question",
              treatment="features", control="joint"),
        Claim(text="... at less than 5 points of right attributes", metric="attributes", treatment="features",
              control="joint", margin=-0.05)),
    measure=measure, quick={"stages.0.batch": 8, "threads": 1, "workers": 0},
    units={name: "share" for name in (
        "draw", "question", "attributes", "attributes in pixels", "attributes in pixels of true codes", "open prompts",
        *(f"drawn: {n}" for n in ("color", "shape", "place")), *(f"draw: {n}" for n in ATTRIBUTES))})
