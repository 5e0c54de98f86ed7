"""MammothModa2 (arXiv 2511.18262): what the renderer is told, and whether codes need networks of their own."""
from typing import cast

from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.replication.measures import held_out_losses, suites
from diptych.replication.study import Arm, Claim, Context, Measured, Study
from diptych.systems.base import Sampling, System
from diptych.systems.mammothmoda2 import MammothModa2
from diptych.training.recipe import Optimizer, Recipe, Source, Stage

WORLD, STEPS = "one", 260
SAMPLING = Sampling(evaluations=12, guidance=Guidance(branches=(Branch(context="no_text", scale=2.0),)),
                    codes=TokenSampling(temperature=0.7))

ABOUT = """
A language model of 6 layers plans a picture in 64 codes; a diffusion transformer renders the plan as 16 latent tokens
and is told states of the words, of the plan, or of both, from one layer or as the mean of four. All arms learn to
plan and to render at once, and to caption, from the same documents; tokenizers and tower are the zoo's. The flow loss
is that of held-out drawings under their true plans: what the renderer makes of what it is told, whatever the planner
can do. Drawings are planned by the model itself; after so few documents plans are poor, and what drawings show (2
|both| / (|asked| + |shown|) of the colours shown and asked for, 0.11 for pictures of other prompts) is reported
without a claim. Twins of the feed-forward networks in the upper half of the layers are compared with none at equal
FLOPs per token.
"""

RECIPE = Recipe(
    system="mammothmoda2", size="small",
    config={"block": {"width": 128, "heads": 4, "kv_heads": 4, "head_dim": 32, "hidden": 320}, "depth": 6,
            "queries": {"width": 128, "mlp_width": 256, "heads": 4, "feature_width": 128},
            "generator": {"width": 128, "layers": 3, "heads": 4, "kv_heads": 2, "hidden": 256, "time_width": 128}},
    init={"codec": "zoo/codec", "plan_codec": "zoo/vq", "vision": "zoo/clip#vision"},
    data=(Source(world=WORLD, tasks={"draw": 2, "caption": 1}),),
    stages=(Stage(steps=STEPS, batch=36, lr=2.5e-3, warmup=20, schedule="cosine", floor=0.02,
                  freeze=("codec", "plan_codec", "vision")),),
    optimizer=Optimizer(kind="muon", weight_decay=0.01, betas=(0.9, 0.98)), ema=0.98, precision="bf16", log_every=20,
    save_every=STEPS, threads=2, workers=1)


def measure(system: System, context: Context) -> Measured:
    model = cast(MammothModa2, system)
    losses = held_out_losses(model, context, ["draw", "caption"], n=512, world=WORLD)
    drawn = suites(model, context, ["draw"], n=96, world=WORLD, sampling=SAMPLING)
    return {"flow loss": losses["draw/flow"], "code loss": losses["draw/image"], "text loss": losses["caption/text"],
            **{name: drawn[name] for name in ("draw: colors shown", "draw: FID", "draw: likeness")},
            "planner, M parameters": sum(p.numel() for p in model.trunk.parameters()) / 1e6}


def _lower(text: str, metric: str, treatment: str, control: str) -> Claim:
    return Claim(text=text, metric=metric, treatment=treatment, control=control, better="lower", ratio=True, margin=1.0)


STUDY = Study(
    name="mammothmoda2", title="MammothModa2: what a renderer is told of a plan", about=ABOUT, recipe=RECIPE,
    arms=(Arm(name="four layers", about="words and plan, the mean of four layers; twins in the upper half"),
          Arm(name="last layer", about="the states behind the last layer", control=True,
              changes={"config.condition_layers": [-1]}),
          Arm(name="plan alone", about="no words", control=True, changes={"config.condition": "image"}),
          Arm(name="words alone", about="no plan", control=True, changes={"config.condition": "text"}),
          Arm(name="no twins", about="codes go through the networks of words", control=True,
              changes={"config.expert_layers": [0, 0]})),
    claims=(
        _lower("Several layers beat the last one: lower flow loss", "flow loss", "four layers", "last layer"),
        _lower("Words and plan beat the plan alone: lower flow loss", "flow loss", "four layers", "plan alone"),
        Claim(text="Words and plan beat words alone: flow loss lower by more than 3%", metric="flow loss",
              treatment="four layers", control="words alone", better="lower", ratio=True, margin=1.03),
        _lower("Twins help planning: lower code loss than without", "code loss", "four layers", "no twins"),
        _lower("Twins keep words from codes: lower text loss than without", "text loss", "four layers", "no twins")),
    measure=measure, quick={"stages.0.batch": 8, "threads": 1, "workers": 0}, units={"draw: colors shown": "share"})
