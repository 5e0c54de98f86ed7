"""The published BAGEL folder: `ema.safetensors`, `ae.safetensors`, `llm_config.json`, `vit_config.json`, and optional
`config.json` (what differs from the release) and `tokenizer.json`.

The release counts noise (t from 1 to 0) and predicts noise - data: the output layer is negated, times are mirrored.
"""
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule, expand
from diptych.adapters.published import Checkpoint, Layout, Written, build, others
from diptych.adapters.tensors import Tensors, read_json
from diptych.objectives.guidance import Branch, Guidance, Renorm
from diptych.parts.blocks import BlockConfig
from diptych.parts.interleave import Marks
from diptych.parts.positions import sincos_2d
from diptych.parts.stored import TensorFile
from diptych.parts.vae import AutoEncoderConfig
from diptych.parts.vision import VisionConfig, unpatchify
from diptych.systems.bagel import Bagel, BagelConfig
from diptych.systems.base import Sampling
from diptych.systems.interleaved import Encode, Read, Reader

COUPLINGS = {"Qwen2MoTDecoderLayer": "mixture", "Qwen2DecoderLayer": "dense"}
ACT = "gelu_pytorch_tanh"
IGNORE = ("latent_pos_embed.", "vit_pos_embed.")  # fixed sine tables, made anew
QWEN_MARKS = Marks(151644, 151645, 151652, 151653)  # im_start, im_end, vision_start, vision_end


def config_of(folder: Path, marks: Marks = QWEN_MARKS) -> BagelConfig:
    llm, vit = (read_json(folder / f"{n}_config.json") for n in ("llm", "vit"))
    own = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    act = own.get("connector_act", ACT)
    if act != ACT:
        raise ValueError(f"expected connector_act {ACT} in {folder}/config.json, got {act}")
    layer = llm.get("layer_module", "Qwen2MoTDecoderLayer")
    if layer not in COUPLINGS:
        raise ValueError(f"expected layer_module in {folder}/llm_config.json to be one of {', '.join(COUPLINGS)}, "
                         f"got {layer}")
    heads = llm["num_attention_heads"]
    vit["num_hidden_layers"] = _tower_layers(folder / "ema.safetensors")  # the release states one more than it has
    vision = VisionConfig.from_published(vit, interpolate=own.get("interpolate_pos", False))
    side = own.get("vit_max_num_patch_per_side", vision.max_side)
    if side != vision.max_side:
        raise ValueError(f"expected vit_max_num_patch_per_side {side} to match the tower's table of {vision.max_side}")
    codec = own.get("vae_config", {})
    return BagelConfig(
        block=BlockConfig(width=llm["hidden_size"], heads=heads, kv_heads=llm["num_key_value_heads"],
                          head_dim=llm["hidden_size"] // heads, hidden=llm["intermediate_size"], qkv_bias=True,
                          qk_norm=llm.get("qk_norm", True), norm_eps=llm["rms_norm_eps"]),
        depth=llm["num_hidden_layers"], coupling=COUPLINGS[layer], rope_theta=llm["rope_theta"],
        vocabulary_size=llm["vocab_size"], tie_embeddings=llm.get("tie_word_embeddings", False), marks=marks,
        vision=vision, codec=AutoEncoderConfig.from_published(codec) if "ch" in codec else AutoEncoderConfig.paper(),
        latent_patch=own.get("latent_patch_size", 2), latent_table_side=own.get("max_latent_size", 64),
        time_shift=own.get("timestep_shift", 1.0), sampling=Bagel.paper().sampling)


def _tower_layers(weights: Path) -> int:
    found = [re.match(r"vit_model\.vision_model\.encoder\.layers\.(\d+)\.", name) for name in TensorFile(weights)]
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def rules(c: BagelConfig) -> list[Rule]:
    """How every tensor of the two files is called here (`ae.` marks those of the autoencoder's file)."""
    b, mixture = c.block, c.coupling == "mixture"
    qkv = tuple(n * b.head_dim for n in (b.heads, b.kv_heads, b.kv_heads))
    lm, ours = "language_model.model.", "trunk.layers.{i}."
    out = [Rule((lm + "embed_tokens.weight",), "embed.weight")]
    if not c.tie_embeddings:
        out.append(Rule(("language_model.lm_head.weight",), "head.weight"))
    for k, e in enumerate(("", "_moe_gen") if mixture else ("",)):
        layer = lm + "layers.{i}."
        out.append(Rule((f"{lm}norm{e}.weight",), f"trunk.norm.{k}.weight"))
        per_layer = [
            Rule((f"{layer}input_layernorm{e}.weight",), f"{ours}attention_norm.{k}.weight"),
            Rule((f"{layer}post_attention_layernorm{e}.weight",), f"{ours}mlp_norm.{k}.weight"),
            Rule((f"{layer}self_attn.o_proj{e}.weight",), f"{ours}attention.{k}.out.weight"),
            Rule((f"{layer}mlp{e}.gate_proj.weight", f"{layer}mlp{e}.up_proj.weight"), f"{ours}mlp.{k}.gate_up.weight",
                 (b.hidden,) * 2),
            Rule((f"{layer}mlp{e}.down_proj.weight",), f"{ours}mlp.{k}.down.weight"),
            *(Rule(tuple(f"{layer}self_attn.{p}_proj{e}.{w}" for p in "qkv"), f"{ours}attention.{k}.qkv.{w}", qkv)
              for w in ("weight", "bias")),
            *(Rule((f"{layer}self_attn.{p}_norm{e}.weight",), f"{ours}attention.{k}.{p}_norm.weight")
              for p in "qk" if b.qk_norm),
        ]
        out += [r for rule in per_layer for r in expand(rule, i=range(c.depth))]
    for w in ("weight", "bias"):
        out += [Rule((f"connector.{n}.{w}",), f"connector.{n}.{w}") for n in ("fc1", "fc2")]
        out += [Rule((f"time_embedder.mlp.{n}.{w}",), f"time.mlp.{n}.{w}") for n in ("0", "2")]
        out += [Rule((f"vae2llm.{w}",), f"latent_in.{w}"), Rule((f"llm2vae.{w}",), f"latent_out.{w}", op="negate")]
    with torch.device("meta"):
        model = Bagel(c)
    out += [Rule((f"vit_model.{n}",), f"vision.{n}") for n in model.vision.state_dict()]
    return out + [Rule((f"ae.{n}",), f"codec.{n}") for n in model.codec.state_dict()]


def load(folder: str | Path, marks: Marks = QWEN_MARKS) -> Bagel:
    """A published folder as a system; any tensor that finds no home is an error."""
    folder = Path(folder)
    return cast(Bagel, build(read(folder, {}, marks), folder, dtype=torch.float32)[0])


def read(folder: Path, parts: Mapping[str, Path], marks: Marks = QWEN_MARKS) -> Checkpoint:
    c = config_of(folder, marks)
    tensors = Tensors({"": [folder / "ema.safetensors"], "ae.": [folder / "ae.safetensors"]})
    ignore = (*IGNORE, "language_model.lm_head.") if c.tie_embeddings else IGNORE  # a tied head may be stored too
    return Checkpoint(cls=Bagel, config=c, tensors=tensors, rules=rules(c), ignore=ignore,
                      configs=others(folder))


def published_configs(c: BagelConfig) -> dict[str, dict[str, Any]]:
    """The contents of `llm_config.json`, `vit_config.json` and `config.json` for a config of ours."""
    b, v, a = c.block, c.vision, c.codec
    layers = {name: layer for layer, name in COUPLINGS.items()}
    fits = {"coupling": c.coupling in layers, "feature_merge": c.feature_merge == 1, "codec.patch": a.patch == 1,
            "codec.norm_groups": a.norm_groups == 32, "codec.shift": isinstance(a.shift, float | int),
            "codec.scale": isinstance(a.scale, float | int), "block.head_dim": b.heads * b.head_dim == b.width,
            "block.qkv_bias": b.qkv_bias}
    wrong = [name for name, fine in fits.items() if not fine]
    if wrong:
        raise ValueError(f"expected a config that the published layout can state, got another {', '.join(wrong)}; "
                         "fix: save it with save_system")
    llm = {"model_type": "qwen2", "layer_module": layers[c.coupling], "vocab_size": c.vocabulary_size,
           "hidden_size": b.width, "intermediate_size": b.hidden, "num_hidden_layers": c.depth,
           "num_attention_heads": b.heads, "num_key_value_heads": b.kv_heads, "rms_norm_eps": b.norm_eps,
           "rope_theta": c.rope_theta, "tie_word_embeddings": c.tie_embeddings, "hidden_act": "silu",
           "qk_norm": b.qk_norm}
    vit = {"hidden_size": v.width, "intermediate_size": v.mlp_width, "num_hidden_layers": v.num_layers,
           "num_attention_heads": v.num_heads, "num_channels": v.image_channels, "image_size": v.max_side * v.patch,
           "patch_size": v.patch, "layer_norm_eps": v.norm_eps, "hidden_act": ACT, "rope": False}
    vae = {"ch": a.channels, "ch_mult": a.channel_mult, "num_res_blocks": a.num_res_blocks, "scale_factor": a.scale,
           "shift_factor": a.shift, "z_channels": a.latent_channels, "in_channels": a.image_channels,
           "out_ch": a.image_channels, "downsample": a.downsample}
    own = {"vae_config": vae, "latent_patch_size": c.latent_patch, "max_latent_size": c.latent_table_side,
           "vit_max_num_patch_per_side": v.max_side, "connector_act": ACT, "interpolate_pos": v.interpolate,
           "timestep_shift": c.time_shift}
    return {"llm_config": llm, "vit_config": vit, "config": own}


def write(model: Bagel) -> Written:
    c = model.config
    tables = {"latent_pos_embed.pos_embed": c.latent_table_side, "vit_pos_embed.pos_embed": c.vision.max_side}
    return Written(configs={f"{name}.json": values for name, values in published_configs(c).items()}, rules=rules(c),
                   files={"ema.safetensors": "", "ae.safetensors": "ae."},
                   tensors={name: sincos_2d(c.block.width, side) for name, side in tables.items()})


def _finds(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("ema.safetensors", "ae.safetensors", "llm_config.json"))


LAYOUTS = {"original": Layout(about="ema.safetensors, ae.safetensors, llm_config.json and vit_config.json",
                              finds=_finds, read=read, write=write)}


def guidance(text: float, image: float, renorm: str, interval: tuple[float, float], floor: float) -> Guidance:
    """The release's options: `renorm` global or channel acts once at the end, text_channel after the text branch.
    `interval` is theirs, (low, high] in noise; the release guides by the image only where it guides by text."""
    chains: dict[str, tuple[Renorm, Renorm]] = {"global": ("none", "global"), "channel": ("none", "channel"),
                                                "text_channel": ("channel", "none")}  # behind text, behind all
    if renorm not in chains:
        raise ValueError(f"expected renorm to be one of {', '.join(chains)}, got {renorm!r}")
    if text <= 1:
        return Guidance()
    between, end = chains[renorm]
    first = end if image <= 1 and renorm != "text_channel" else between
    branches = [Branch(context="no_text", scale=text, renorm=first)]
    if image > 1:
        branches.append(Branch(context="no_image", scale=image, renorm=end))
    return Guidance(branches=tuple(branches), interval=(1 - interval[1], 1 - interval[0]), floor=floor)


# -- golden cases -----------------------------------------------------------------------------------------------------

TOLERANCE = 2e-4


@torch.no_grad()
def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder: features, codec, understanding logits, and each drawing with its options, which
    are read from the case descriptions in `golden.json`."""
    about = json.loads((folder / "golden.json").read_text())
    s = about["special_tokens"]
    model = load(folder, Marks(s["bos_token_id"], s["eos_token_id"], s["start_of_image"], s["end_of_image"]))
    golden = load_file(folder / "golden.safetensors")
    features = model.connector(model.vision.encode(golden["image_vit"][None])[0])
    latent = model.codec.latent(golden["image_vae"][None])
    cases = [Case.compare("vit_features", features, golden["vit_features"], TOLERANCE),
             Case.compare("vae_encode_mean", latent, golden["vae_encode_mean"], TOLERANCE)]
    cases += _understanding(model, golden)
    for name, text in about["cases"].items():
        if f"{name}_noise" in golden:
            cases += _drawing(model, golden, name, text, about)
    return cases


def _prompt(model: Bagel, golden: Mapping[str, Tensor], reader: Reader) -> None:
    w = model.writer(reader)
    w.text(golden["prompt_ids"].tolist())
    model.run([Read(reader, w)])


def _understanding(model: Bagel, golden: Mapping[str, Tensor]) -> list[Case]:
    reader = Reader()
    w = model.writer(reader)
    w.feature(0, model.feature_count(golden["image_vit"]))
    model.run([Read(reader, w, [golden["image_vit"]])])
    _prompt(model, golden, reader)
    logits = []
    for n, token in enumerate(golden["und_ids"].tolist()):
        w = model.writer(reader)
        w.text([] if n == 0 else [token], open=n == 0, close=False)
        logits += model.run([Read(reader, w, predict=True)])
    own = torch.stack(logits)
    greedy = own[:-1].argmax(-1).equal(golden["und_ids"][1:])
    return [Case.compare("und_logits", own, golden["und_logits"], TOLERANCE),
            Case("und_ids", 0.0 if greedy else 1.0, 0.0 if greedy else 1.0, 0.0)]


def _drawing(model: Bagel, golden: Mapping[str, Tensor], name: str, text: str, about: Mapping[str, Any]) -> list[Case]:
    def number(word: str) -> float:
        found = re.search(rf"{word} cfg ([\d.]+\d)", text)
        return float(found[1]) if found else 1.0

    renorm = re.search(r"renorm (\w+)", text)
    chain = guidance(number("text"), number("image"), renorm[1] if renorm else "global", tuple(about["cfg_interval"]),
                     about.get("cfg_renorm_min", 0.0))
    sampling = Sampling(evaluations=about["num_timesteps"] - 1, shift=about["timestep_shift"], guidance=chain)
    full, no_image = Reader(), Reader()
    if text.startswith("image"):
        picture = golden["image_vae"]
        if "vae" in text.split("then")[0]:
            x = model.run([Encode(picture)])[0]
            w = model.writer(full)
            w.latent(0, len(x), noised=False)
            model.run([Read(full, w, latents=[(x, model.grid(picture))])])
        if "vit" in text.split("then")[0]:
            w = model.writer(full)
            w.feature(0, model.feature_count(golden["image_vit"]))
            model.run([Read(full, w, [golden["image_vit"]])])
    no_text = full.fork()
    _prompt(model, golden, full)
    _prompt(model, golden, no_image)
    height, width = golden[f"{name}_pixels"].shape[-2:]
    grid = (height // model.stride, width // model.stride)
    steps = model.denoise(golden[f"{name}_noise"], grid, {"full": full, "no_text": no_text, "no_image": no_image},
                          sampling, torch.Generator(), 0, lambda event: None)
    work, answer = next(steps), None
    try:
        while True:
            answer = model.run([work])[0]
            work = steps.send(answer)
    except StopIteration as stop:
        x = stop.value
    pixels = model.codec.decode(unpatchify(x[None], model.latent_patch, grid))
    return [Case.compare(f"{name}_latent_tokens", x, golden[f"{name}_latent_tokens"], TOLERANCE),
            Case.compare(f"{name}_pixels", pixels, golden[f"{name}_pixels"], TOLERANCE)]

