"""TokenFlow (arXiv 2412.03069): one index for meaning and looks against a codebook of pixels, and one of meaning."""
from diptych.benchmarks.reconstruction import measure as losses_of
from diptych.benchmarks.reconstruction import world_pictures
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import System
from diptych.systems.dual_codec import DualCodec
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.world.scene import WORLDS
from diptych.zoo.clip import probe

WORLD = "mini"
STEPS, BATCH = 400, 16
ASKED = ("color", "shape", "count")
DISTANCES = "config.codec.quantizer.codebook.weights"

ABOUT = """
A tokenizer describes every cell by one index into two tables, a semantic vector and a pixel vector; the index
minimises the sum of both distances. Pixels are decoded from the pixel vectors, the features of a frozen contrastive
tower from the semantic ones.

All arms have the same networks, tables and steps, start from the same weights and see the same pictures. They differ in
what finds the index. Pixels only: the distance of the pixel half, and no teacher. Meaning only: the distance of the
semantic half; the pixel vectors of an index are learnt all the same. In between both distances count, once equally and
once the one of pixels ten times.

What the codes say is read out linearly (ridge regression) from the sums of their vectors, both halves: colour and shape
in the patches that show an object, the number of objects from the mean over all patches. Chance is about 12%, 17% and
25%.
"""

RECIPE = Recipe(
    system="dual-codec",
    size="small",
    config={"tint": 0.0},
    init={"codec.semantic_encoder": "zoo/clip#vision", "teacher.tower": "zoo/clip#vision"},
    data=(Source(world=WORLD, tasks={"draw": 1}),),
    stages=(Stage(steps=STEPS, batch=BATCH, lr=5e-3, warmup=20, schedule="cosine", floor=0.02,
                  freeze=("teacher", "codec.semantic_encoder")),),
    optimizer=Optimizer(kind="muon", weight_decay=1e-3, betas=(0.9, 0.98)),
    ema=0.98,
    precision="bf16",
    log_every=20,
    save_every=STEPS,
    threads=2,
    workers=1,
)


def measure(system: System, context: Context) -> Measured:
    assert isinstance(system, DualCodec)
    read = probe(lambda images: system.features(images).flatten(2).transpose(1, 2), 0, context.items(512),
                      context.items(256))
    pictures = world_pictures(WORLDS[WORLD], context.items(256))
    lost = losses_of(system.codec, pictures, features=lambda images: images.mean((2, 3)))
    return {"PSNR": lost["psnr"].value, "attributes": sum(read[name] for name in ASKED) / len(ASKED),
            **{name: read[name] for name in ASKED}, "codes in use": lost["code use"].value,
            "perplexity": lost["perplexity"].value}


STUDY = Study(
    name="tokenflow",
    title="TokenFlow: one index for what a picture means and what it looks like",
    about=ABOUT,
    recipe=RECIPE,
    arms=(Arm(name="shared", about="both distances count equally (w = 1)"),
          Arm(name="pixels weigh 10", about="the pixel distance counts ten times (w = 10)",
              changes={DISTANCES: [1.0, 10.0]}),
          Arm(name="pixels only", about="the pixel distance alone, no teacher", control=True,
              changes={DISTANCES: [0.0, 1.0], "config.semantic_weight": 0.0}),
          Arm(name="meaning only", about="the semantic distance alone (w = 0)", changes={DISTANCES: [1.0, 0.0]})),
    claims=(
        Claim(text="a shared index says more about colour, shape and count than one of pixels", metric="attributes",
              treatment="shared", control="pixels only"),
        Claim(text="and it shows pictures at most 1 dB worse", metric="PSNR", treatment="shared",
              control="pixels only", margin=-1.0),
        Claim(text="it shows pictures more than 1 dB better than an index of meaning", metric="PSNR",
              treatment="shared", control="meaning only", margin=1.0),
        Claim(text="and loses at most five points of what that says", metric="attributes", treatment="shared",
              control="meaning only", margin=-0.05),
    ),
    measure=measure,
    quick={"stages.0.batch": 4, "threads": 1},
    units={"PSNR": "dB"} | {name: "share" for name in ("attributes", *ASKED, "codes in use")},
)
