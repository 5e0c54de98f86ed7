"""SEED-LLaMA (arXiv 2310.01218): are causal 1-D semantic codes easier for a language model than codes whose queries see
each other, and than codes of patches?"""
from functools import partial
from typing import cast

import torch
from torch import Tensor

from diptych.document import Document, Image
from diptych.objectives.next_token import TokenSampling
from diptych.replication import measures
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import Sampling, System
from diptych.systems.seed import Seed
from diptych.systems.unifork import UniFork
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.world import tasks
from diptych.world.spec import Spec
from diptych.world.verify import verify

WORLD = "few"
STEPS, BATCH = 220, 48
QUERIES = 16
PREFIXES = (1, 2, 4, 8, 16)  # codes that are kept
ATTRIBUTES = ("color", "shape", "count", "place")
SAMPLING = Sampling(codes=TokenSampling(top_p=0.5))  # the paper's, for all arms

ABOUT = f"""
One language model reads captions out of codes and draws by saying codes; codes are frozen. Three kinds: causal queries
({QUERIES} codes out of 512), the same tokenizer with queries that all see each other, and 2-D patches (UniFork without
its fork: 16 cells of 4 residual codes out of 1024, trained on pixels alone), with as many parameters to train (1.15M
and 1.16M), and tokens, documents and steps. The patches' tokenizer is the zoo's, and has been trained far longer than
the short one of each semantic arm, which all seeds share: seeds vary the language model alone, and figures of the codes
themselves are the same for all.

Unexplained: the loss per held-out code over the entropy of single codes, which tells how much order there is for a
language model, whatever the codebook. Attributes are the mean of colour, shape, count and place, in captions and, by
the verifier, in drawings. Those of the true pictures, encoded and decoded, are the ceiling of drawings: where it is
zero, as with the small generator that semantic codes have here, claims about drawings say nothing about the codes.

Read-out: what a ridge regression of the vectors of the first 1, 2, ... codes knows of a single object's colour, shape
and place. Not measured: other orders of the codes, and the start from a pretrained Q-Former.
"""

OPTIMIZER = Optimizer(kind="muon", weight_decay=0.01, betas=(0.9, 0.98))
BOTH = (Source(world=WORLD, tasks={"caption": 1, "draw": 1}),)
BLOCK = {"width": 128, "heads": 4, "kv_heads": 4, "head_dim": 32, "hidden": 320, "qk_norm": False}

RECIPE = Recipe(
    system="seed",
    size="small",
    config={"block": BLOCK, "depth": 4},
    init={"codec": "@causal#codec", "detokenizer": "@causal#detokenizer"},
    data=BOTH,
    stages=(Stage(steps=STEPS, batch=BATCH, lr=3e-3, warmup=20, schedule="cosine", floor=0.02,
                  freeze=("codec", "detokenizer")),),
    optimizer=OPTIMIZER, ema=0.98, precision="bf16", log_every=20, save_every=STEPS, threads=2, workers=1)

FREE = {"init": {"codec": "@bidirectional#codec", "detokenizer": "@bidirectional#detokenizer"}}
PATCHES = {
    "system": "unifork",
    "config": {"block": {**BLOCK, "hidden": 256}, "depth": 4, "shared": 4, "drop_text": 0.0,
               "head": {"hidden_width": 128, "width": 128, "inner": 128, "heads": 4, "layers": 1}},
    "init": {"codec": "zoo/rq"},
    "stages.0.freeze": ["codec"],
}


def tokenizer(causal: bool) -> Recipe:
    """SEED's stages, short: queries by contrast; then codes, and beside them the generator of pictures."""
    drawer = {"width": 128, "layers": 4, "heads": 4, "cross_heads": 4, "hidden": 384}
    return Recipe(
        system="semantic-codec", size="small",
        config={"codec": {"qformer": {"causal": causal}}, "detokenizer": {"network": drawer}},
        init={"codec.vision": "zoo/clip#vision", "detokenizer.latents": "zoo/codec"}, data=BOTH,
        stages=(Stage(name="queries", steps=80, batch=96, lr=2e-3, warmup=20,
                      only=("codec.qformer", "codec.vision_norm", "text", "project", "log_scale")),
                Stage(name="codes", steps=300, batch=64, lr=3e-3, warmup=20, schedule="cosine", floor=0.02,
                      freeze=("codec.vision", "codec.vision_norm", "detokenizer.latents"),
                      rates={"codec.qformer": 0.3})),
        optimizer=OPTIMIZER, ema=0.99, precision="bf16", log_every=20, save_every=380, threads=2, workers=1)


# -- codes ------------------------------------------------------------------------------------------------------------

def entropy(model: Seed | UniFork, context: Context, batch: int = 64) -> float:
    """Of the codes of training pictures, one by one, in nats."""
    found, total = list[Tensor](), context.items(1024)
    for start in range(0, total, batch):
        documents = [tasks.document("draw", i, world=WORLD) for i in range(start, min(start + batch, total))]
        found += model.encode([model.views(_picture(d))[1].to(model.device) for d in documents])
    p = torch.cat(found).flatten().bincount().double()
    p = p[p > 0] / p.sum()
    return -float((p * p.log()).sum())


def ceiling(model: Seed | UniFork, context: Context) -> float:
    """Attributes of held-out pictures, encoded and decoded."""
    documents = [tasks.document("draw", i, split="test", world=WORLD) for i in range(context.items(160))]
    pictures = [model.views(_picture(d))[1].to(model.device) for d in documents]
    codes, grid = torch.stack(model.encode(pictures)), model.grid(pictures[0])
    parts = [x for part in codes.split(32) for x in model.decode(part, grid).cpu().numpy()]
    found = [verify(x, Spec.from_dict(d.meta["spec"]), WORLD).scores for d, x in zip(documents, parts, strict=True)]
    shares = [[s[name] == 1 for s in found if name in s] for name in ATTRIBUTES]  # as the suite counts
    return sum(sum(s) / max(len(s), 1) for s in shares) / len(ATTRIBUTES)


def _picture(document: Document) -> Tensor:
    return torch.from_numpy(document.of(Image)[0].pixels)


def prefixes(model: Seed, context: Context) -> list[float]:
    """What the first 1, 2, ... codes know of one object."""
    def vectors(images: Tensor, count: int) -> Tensor:
        return model.codec.code_vectors(torch.stack(model.encode(list(images.to(model.device))))[:, :count])

    return [measures.readout(partial(vectors, count=n), context, train=1000, test=400, world=WORLD)["readout"]
            for n in PREFIXES]


# -- measuring --------------------------------------------------------------------------------------------------------

def measure(system: System, context: Context) -> Measured:
    model = cast(Seed | UniFork, system)
    losses = measures.held_out_losses(model, context, ["caption", "draw"], n=512, world=WORLD)
    shown = measures.suites(model, context, ["caption", "draw"], n=160, world=WORLD, sampling=SAMPLING)
    single, best = entropy(model, context), ceiling(model, context)
    found: dict[str, float | list[float]] = {
        "text loss": losses["caption/text"], "code loss": losses["draw/image"], "entropy of single codes": single,
        "unexplained": losses["draw/image"] / single, "codes: attributes": best}
    for name, task in (("captions", "caption"), ("drawings", "draw")):
        found |= {f"{name}: {part}": shown[f"{task}: {part}"] for part in ATTRIBUTES}
        found[f"{name}: attributes"] = sum(shown[f"{task}: {part}"] for part in ATTRIBUTES) / len(ATTRIBUTES)
    if isinstance(model, Seed):
        curve = prefixes(model, context)
        found |= {"read-out by codes kept": curve, "read-out of all codes": curve[-1],
                  "read-out of a quarter": curve[PREFIXES.index(QUERIES // 4)],
                  "read-out gained behind a quarter": curve[-1] - curve[PREFIXES.index(QUERIES // 4)]}
    return found


STUDY = Study(
    name="seed",
    title="SEED: causal semantic codes, codes without an order, codes of patches",
    about=ABOUT,
    recipe=RECIPE,
    shared={"causal": tokenizer(True), "bidirectional": tokenizer(False)},
    arms=(Arm(name="causal", about="query i sees those up to i"),
          Arm(name="bidirectional", about="all queries see each other", changes=FREE, control=True),
          Arm(name="patches", about="residual codes of patches, taught by pixels", changes=PATCHES, control=True)),
    claims=(
        Claim(text="causal codes know as much as the others: the read-out loses at most 5 points",
              metric="read-out of all codes", treatment="causal", control="bidirectional", margin=-0.05),
        Claim(text="causal codes: those behind the first quarter add at least 5 points to the read-out",
              metric="read-out gained behind a quarter", treatment="causal", margin=0.05),
        Claim(text="causal codes are easier to say: less of their entropy stays unexplained", metric="unexplained",
              treatment="causal", control="bidirectional", better="lower"),
        Claim(text="captions are learnt better from causal codes than without an order", metric="text loss",
              treatment="causal", control="bidirectional", better="lower"),
        Claim(text="drawings by causal codes have more of what is asked for than without an order",
              metric="drawings: attributes", treatment="causal", control="bidirectional"),
        Claim(text="captions are learnt better from causal semantic codes than from patches", metric="text loss",
              treatment="causal", control="patches", better="lower"),
        Claim(text="captions by causal semantic codes have at least 5 points more of the attributes",
              metric="captions: attributes", treatment="causal", control="patches", margin=0.05),
        Claim(text="drawings by causal semantic codes have more of what is asked for than by patches",
              metric="drawings: attributes", treatment="causal", control="patches"),
    ),
    measure=measure,
    quick={"stages.0.batch": 4},
    units={name: "share" for name in ("codes: attributes", *(f"{kind}: {part}" for kind in ("captions", "drawings")
                                                             for part in ("attributes", *ATTRIBUTES)))},
)
