"""Published Janus and Janus-Pro checkpoints: the layout of the authors and that of Hugging Face, both ways.

    original      `vision_model.vision_tower.*`, `aligner.*`, `gen_*`, `language_model.*`; sizes implied by class names
    huggingface   `JanusForConditionalGeneration`: `model.*`, `lm_head`; queries, keys and values apart

A folder holds `config.json` (its `model_type` tells the layout), the weights, and optionally `tokenizer.json`.
"""
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch

from diptych.adapters import qwen
from diptych.adapters.keys import Rule, expand
from diptych.adapters.published import Checkpoint, Layout, Written, build, has_type, others
from diptych.adapters.tensors import Tensors, need_weights, read_json
from diptych.adapters.tokenizers import llamagen_config, llamagen_rules
from diptych.parts.blocks import BlockConfig
from diptych.parts.interleave import Marks
from diptych.parts.language import LanguageConfig
from diptych.parts.quantize import CodebookConfig
from diptych.parts.turns import Turns
from diptych.parts.vision import VisionConfig
from diptych.parts.vocabulary import Vocabulary
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.janus import DEEPSEEK_MARKS, Janus, JanusConfig

Naming = Literal["original", "huggingface"]
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
# what the public code looks up by the tower's name
TOWERS = {"siglip_large_patch16_384": {"width": 1024, "layers": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4}}
# what would change the network, with the one value that is built here
FIXED = {("aligner_config", "depth"): 2, ("aligner_config", "projector_type"): "mlp_gelu",
         ("gen_aligner_config", "depth"): 2, ("gen_aligner_config", "projector_type"): "mlp_gelu",
         ("vision_config", "select_feature"): "same", ("vision_config", "select_layer"): -1}
FIXED_LANGUAGE = {"hidden_act": "silu", "attention_bias": False, "rope_scaling": None}
FIXED_HUGGINGFACE = {"hidden_act": "gelu", "use_qk_norm": False, "attention_bias": True, "depth": 2}
# names of the tokenizer's sizes: LlamaGen's and those of `vq_config`
VQ_SIZES = {"ch": "base_channels", "ch_mult": "channel_multiplier", "num_res_blocks": "num_res_blocks",
            "z_channels": "latent_channels", "codebook_size": "num_embeddings", "codebook_embed_dim": "embed_dim"}
# no parameters of ours: the pooling that features do not pass, and a counter
IGNORE = {"original": ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used"),
          "huggingface": ()}
# the authors' names -> those of Hugging Face, one after the other
RENAMED = {
    r"^vision_model\.vision_tower\.pos_embed$": "model.vision_model.embeddings.position_embedding.weight",
    r"^vision_model\.vision_tower\.patch_embed\.proj\.": "model.vision_model.embeddings.patch_embedding.",
    r"^vision_model\.vision_tower\.blocks\.": "model.vision_model.encoder.layers.",
    r"^vision_model\.vision_tower\.norm\.": "model.vision_model.post_layernorm.",
    r"^(model\.vision_model\..*)\.norm(\d)\.": r"\1.layer_norm\2.",
    r"^(model\.vision_model\..*)\.attn\.proj\.": r"\1.self_attn.projection_layer.",
    r"^aligner\.layers\.": "model.aligner.", r"^gen_aligner\.layers\.": "model.generation_aligner.",
    r"^(model\.(?:generation_)?aligner)\.0\.": r"\1.fc1.",
    r"^(model\.(?:generation_)?aligner)\.2\.": r"\1.hidden_layers.0.",
    r"^gen_embed\.": "model.generation_embeddings.",
    r"^gen_head\.output_mlp_projector\.": "model.generation_head.proj_out.",
    r"^gen_head\.": "model.generation_head.",
    r"^gen_vision_model\.": "model.vqmodel.",
    r"^(model\.vqmodel\.encoder)\.conv_blocks\.": r"\1.down.", r"^(model\.vqmodel\.decoder)\.conv_blocks\.": r"\1.up.",
    r"^(model\.vqmodel\.(?:en|de)coder\.\w+\.\d+)\.res\.": r"\1.block.",
    r"^(model\.vqmodel\..*\.mid)\.0\.": r"\1.block_1.", r"^(model\.vqmodel\..*\.mid)\.1\.": r"\1.attn_1.",
    r"^(model\.vqmodel\..*\.mid)\.2\.": r"\1.block_2.",
    r"^language_model\.model\.": "model.language_model.", r"^language_model\.lm_head\.": "lm_head.",
}


def huggingface_name(original: str) -> str:
    for pattern, name in RENAMED.items():
        original = re.sub(pattern, name, original)
    return original


def rules(c: JanusConfig, layout: Naming = "original") -> list[Rule]:
    """How every tensor of a published state dict is called here."""
    language = LanguageConfig(block=c.block, depth=c.depth, vocabulary_size=c.vocabulary_size)
    out = [replace(r, theirs=tuple(f"language_model.{t}" for t in r.theirs)) for r in qwen.rules(language)]
    both, v = ("weight", "bias"), c.vision
    tower, ours = "vision_model.vision_tower", "vision.vision_model"
    out.append(Rule((f"{tower}.patch_embed.proj.weight",), f"{ours}.embeddings.patch_embedding.weight", op="patches",
                    shape=(v.width, v.image_channels, v.patch, v.patch)))
    out.append(Rule((f"{tower}.patch_embed.proj.bias",), f"{ours}.embeddings.patch_embedding.bias"))
    out.append(Rule((f"{tower}.pos_embed",), f"{ours}.embeddings.position_embedding.weight",
                    shape=(1, v.max_side**2, v.width) if layout == "original" else ()))
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1",
             "mlp.fc2": "mlp.fc2"}
    blocks = [Rule((f"{tower}.blocks.{{i}}.{t}.{{w}}",), f"{ours}.encoder.layers.{{i}}.{o}.{{w}}")
              for t, o in names.items()]
    for n, p in enumerate("qkv"):
        home = f"{ours}.encoder.layers.{{i}}.self_attn.{p}_proj.{{w}}"
        blocks.append(Rule((f"{tower}.blocks.{{i}}.attn.qkv.{{w}}",), home, part=(n, 3)) if layout == "original" else
                      Rule((f"{tower}.blocks.{{i}}.self_attn.{p}_proj.{{w}}",), home))
    out += [r for rule in blocks for r in expand(rule, i=range(v.num_layers), w=both)]
    ends = {f"{tower}.norm": f"{ours}.post_layernorm", "gen_head.output_mlp_projector": "code_head.0",
            "gen_head.vision_head": "code_head.2"}
    ends |= {f"{t}.layers.{n}": f"{o}.{n}" for t, o in (("aligner", "aligner"), ("gen_aligner", "code_aligner"))
             for n in (0, 2)}
    out += [Rule((f"{t}.{w}",), f"{o}.{w}") for t, o in ends.items() for w in both]
    out.append(Rule(("gen_embed.weight",), "code_embed.weight"))
    out += [replace(r, ours=f"codec.{r.ours}") for r in llamagen_rules(c.codec, "gen_vision_model.")]
    if layout == "huggingface":
        out = [replace(r, theirs=tuple(map(huggingface_name, r.theirs))) for r in out]
    return out


# -- configs ----------------------------------------------------------------------------------------------------------

def _language(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of `language_config`, whose defaults are those of LLaMA-7B."""
    for key, only in FIXED_LANGUAGE.items():
        if values.get(key, only) != only:
            raise ValueError(f"expected {key} of the language model to be {only!r}, got {values[key]!r}")
    heads, width = values.get("num_attention_heads", 32), values.get("hidden_size", 4096)
    block = BlockConfig(width=width, heads=heads, kv_heads=values.get("num_key_value_heads") or heads,
                        head_dim=values.get("head_dim") or width // heads,
                        hidden=values.get("intermediate_size", 11008), qkv_bias=False,
                        norm_eps=values.get("rms_norm_eps", 1e-6))
    return {"block": block, "depth": values.get("num_hidden_layers", 32), "vocabulary_size": values["vocab_size"],
            "rope_theta": float(values.get("rope_theta") or (values.get("rope_parameters") or {}).get("rope_theta")
                                or 1e4)}


def _tower(values: Mapping[str, Any], width: str, layers: str, heads: str) -> VisionConfig:
    return VisionConfig(width=values[width], mlp_width=int(values[width] * values["mlp_ratio"]),
                        num_layers=values[layers], num_heads=values[heads], patch=values["patch_size"],
                        max_side=values["image_size"] // values["patch_size"], gelu="exact",
                        norm_eps=values.get("layer_norm_eps", 1e-6))


def config_of(values: Mapping[str, Any], *, marks: Marks | None = None, pad: int | None = None) -> JanusConfig:
    """From the contents of `config.json`, of either layout. `_extra_sizes`, if there, replaces what class names imply;
    the ids of `marks` and `pad` come from there or are given."""
    if values.get("model_type") not in ("multi_modality", "janus"):
        raise ValueError(f"expected model_type multi_modality or janus, got {values.get('model_type')!r}")
    extra = values.get("_extra_sizes", {})
    if values["model_type"] == "janus":
        vision, vq = values["vision_config"], values["vq_config"]
        for key, only in FIXED_HUGGINGFACE.items():
            if vision.get(key, only) != only:
                raise ValueError(f"expected vision_config.{key} to be {only!r}, got {vision[key]!r}")
        tower = _tower({"mlp_ratio": 4.0, **vision}, "hidden_size", "num_hidden_layers", "num_attention_heads")
        codec = llamagen_config({k: vq[n] for k, n in VQ_SIZES.items() if n in vq})
        language, side = _language(values["text_config"]), extra.get("gen_image_size", vision["image_size"])
    else:
        for (group, key), only in FIXED.items():
            if values[group]["params"].get(key, only) != only:
                raise ValueError(f"expected {group}.{key} to be {only!r}, got {values[group]['params'][key]!r}")
        about, drawn = values["vision_config"]["params"], values["gen_vision_config"]["params"]
        known = extra.get("vision_tower") or TOWERS.get(about["model_name"])
        if known is None:
            raise ValueError(f"expected a vision tower out of {', '.join(TOWERS)}, got {about['model_name']!r}; "
                             "fix: state its sizes in _extra_sizes.vision_tower")
        tower = _tower({**known, "image_size": about["image_size"]}, "width", "layers", "heads")
        codec = llamagen_config({"codebook_size": drawn["image_token_size"], "codebook_embed_dim": drawn["n_embed"],
                                 **extra.get("vq", {})})
        language, side = _language(values["language_config"]), extra.get("gen_image_size", about["image_size"])
    if ids := extra.get("special_ids"):
        marks = marks or Marks(ids["bos"], ids["eos"], ids["image_start"], ids["image_end"])
        pad = ids["pad"] if pad is None else pad
    if marks is None or pad is None:
        raise ValueError("expected the ids of marks and pad of a Janus checkpoint, got none; "
                         "fix: keep its tokenizer.json beside it, or pass marks and pad")
    return JanusConfig(vision=tower, codec=codec, picture=(side, side), code_width=codec.quantizer.width, marks=marks,
                       pad=pad, variant="released", turns=Turns(), sampling=Janus.paper().sampling, **language)


# -- folders ----------------------------------------------------------------------------------------------------------

def special_ids(folder: Path, marks: Marks | None, pad: int | None) -> tuple[Marks | None, int | None]:
    """Ids of the marks and of the pad as far as they are not given: those of the folder's tokenizer, if it has one."""
    if (folder / "tokenizer.json").is_file():
        v = Vocabulary(folder / "tokenizer.json", marks=DEEPSEEK_MARKS)
        marks = marks or Marks(v.start, v.end, v.image_start, v.image_end)
        pad = v.tokenizer.token_to_id(PAD) if pad is None else pad
    return marks, pad


def load(folder: str | Path, *, marks: Marks | None = None, pad: int | None = None) -> Janus:
    """A published folder of either layout as a system; any tensor that finds no home is an error."""
    folder = Path(folder)
    return cast(Janus, build(read(folder, {}, marks=marks, pad=pad), folder, dtype=torch.float32)[0])


def read(folder: Path, parts: Mapping[str, Path], *, marks: Marks | None = None, pad: int | None = None) -> Checkpoint:
    values = read_json(folder / "config.json")
    marks, pad = special_ids(folder, marks, pad)
    c = config_of(values, marks=marks, pad=pad)
    layout: Naming = "huggingface" if values["model_type"] == "janus" else "original"
    return Checkpoint(cls=Janus, config=c, tensors=Tensors({"": need_weights(folder)}), rules=rules(c, layout),
                      ignore=IGNORE[layout], configs=others(folder))


def published_config(c: JanusConfig, layout: Naming) -> dict[str, Any]:
    """The contents of `config.json` for a config of ours; sizes that class names imply go to `_extra_sizes`."""
    b, v, q = c.block, c.vision, _vq_sizes(c)
    plain = c.feature_merge == 1 and v.gelu == "exact" and b.llama_like
    plain = plain and not (b.qkv_bias or b.qk_norm or v.interpolate)
    if not plain or not q or c.picture[0] != c.picture[1]:
        raise ValueError("expected a config that the published layout can state (feature_merge 1, exact GELU, LLaMA "
                         "blocks, VQ-16, square pictures), got another; fix: save it with save_system")
    language = {"model_type": "llama", "vocab_size": c.vocabulary_size, "hidden_size": b.width,
                "intermediate_size": b.hidden, "num_hidden_layers": c.depth, "num_attention_heads": b.heads,
                "num_key_value_heads": b.kv_heads, "head_dim": b.head_dim, "rms_norm_eps": b.norm_eps,
                "rope_theta": c.rope_theta, "hidden_act": "silu", "attention_bias": False}
    side = v.max_side * v.patch
    if layout == "huggingface":
        vision = {"hidden_size": v.width, "num_hidden_layers": v.num_layers, "num_attention_heads": v.num_heads,
                  "num_channels": v.image_channels, "patch_size": v.patch, "image_size": side, "hidden_act": "gelu",
                  "layer_norm_eps": v.norm_eps, "mlp_ratio": v.mlp_width / v.width, "projection_dim": b.width,
                  "depth": 2, "num_image_tokens": v.max_side**2}
        vq = {theirs: q[ours] for ours, theirs in VQ_SIZES.items()} | {
            "num_patches": side // v.patch, "projection_dim": b.width, "image_token_embed_dim": b.width}
        return {"model_type": "janus", "architectures": ["JanusForConditionalGeneration"], "text_config": language,
                "vision_config": vision, "vq_config": vq, "tie_word_embeddings": False}
    mlp = {"depth": 2, "n_embed": b.width, "projector_type": "mlp_gelu"}
    return {"model_type": "multi_modality", "architectures": ["MultiModalityCausalLM"], "language_config": language,
            "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": side, "model_name": "", "select_layer":
                                                                   -1, "select_feature": "same"}},
            "aligner_config": {"cls": "MlpProjector", "params": {**mlp, "input_dim": v.width}},
            "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": q["codebook_size"],
                                                               "n_embed": q["codebook_embed_dim"]}},
            "gen_aligner_config": {"cls": "MlpProjector", "params": {**mlp, "input_dim": c.code_width}},
            "gen_head_config": {"cls": "vision_head", "params": {"image_token_embed": b.width, "n_embed": b.width,
                                                                 "image_token_size": q["codebook_size"]}},
            "_extra_sizes": {"vision_tower": {"width": v.width, "layers": v.num_layers, "heads": v.num_heads,
                                              "patch_size": v.patch, "mlp_ratio": v.mlp_width / v.width,
                                              "layer_norm_eps": v.norm_eps},
                             "vq": q, "gen_image_size": c.picture[0]}}


def _vq_sizes(c: JanusConfig) -> dict[str, Any]:
    """The tokenizer in published names; empty where those cannot state it."""
    q, enc, book = c.codec, c.codec.encoder, getattr(c.codec.quantizer, "codebook", None)
    if not isinstance(enc, PyramidConfig) or not isinstance(book, CodebookConfig):
        return {}
    sizes = {"ch": enc.channels, "ch_mult": list(enc.channel_mult), "num_res_blocks": enc.blocks[0],
             "z_channels": q.latent_channels, "codebook_size": book.values, "codebook_embed_dim": book.width,
             "group_norm_groups": enc.norm_groups}
    return sizes if llamagen_config(sizes) == q else {}


def write(model: Janus, layout: Naming) -> Written:
    values, m = published_config(model.config, layout), model.marks
    # ids of marks and pad go with the tokenizer, which may be elsewhere
    ids = {"bos": m.start, "eos": m.end, "image_start": m.image_start, "image_end": m.image_end,
           "pad": model.config.pad}
    values.setdefault("_extra_sizes", {}).update(special_ids=ids, gen_image_size=model.config.picture[0])
    return Written(configs={"config.json": values}, rules=rules(model.config, layout), files={"model.safetensors": ""})


def _layout(name: Naming, kind: str) -> Layout:
    return Layout(about=f"config.json of model_type {kind}, and its weights", finds=partial(has_type, kind), read=read,
                  write=partial(write, layout=name))


LAYOUTS = {"original": _layout("original", "multi_modality"), "huggingface": _layout("huggingface", "janus")}
