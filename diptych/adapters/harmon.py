"""The published Harmon: a flat state dict (`llm.*`, `mar.*`, `proj_in.*`, `proj_out.*`) and MAR's codec kl16.

A folder holds `config.json` (numbers of `llm`, `mar`, `vae`), `weights.safetensors` and `kl16.safetensors`. The class
embeddings of MAR are no part of the system: Harmon never uses them.
"""
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diptych.adapters import qwen
from diptych.adapters.keys import Rule, expand, to_ours
from diptych.parts.blocks import BlockConfig
from diptych.parts.interleave import Marks
from diptych.parts.language import LanguageConfig
from diptych.parts.mar import HeadConfig, MarConfig
from diptych.parts.vae import AutoEncoderConfig
from diptych.systems.harmon import Harmon, HarmonConfig

QWEN_MARKS = Marks(151644, 151645, 151652, 151653)  # im_start, im_end, vision_start, vision_end
# what would change the network or its loss, with the one value that is built here
FIXED = {"mar": {"patch_size": 1}, "llm": {"hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None},
         "diffusion": {"noise_schedule": "cosine", "learn_sigma": True}}
CLASSES = "mar.class_emb.weight"


def config_of(values: Mapping[str, Any], marks: Marks = QWEN_MARKS) -> HarmonConfig:
    """From the contents of `config.json`."""
    llm, mar, vae = values["llm"], values["mar"], values["vae"]
    for group, fixed in FIXED.items():
        for key, only in fixed.items():
            if values.get(group, {}).get(key, only) != only:
                raise ValueError(f"expected {group}.{key} to be {only!r}, got {values[group][key]!r}")
    heads = llm["num_attention_heads"]
    sides = [vae["resolution"] // 2**i for i in range(len(vae["ch_mult"]))]
    codec = AutoEncoderConfig(
        channels=vae["ch"], channel_mult=tuple(vae["ch_mult"]), num_res_blocks=vae["num_res_blocks"],
        latent_channels=vae["embed_dim"], quant_conv=True, shift=0.0, scale=values["vae_scale"],
        encoder_attention=tuple(i for i, side in enumerate(sides) if side in vae["attn_resolutions"]))
    return replace(
        Harmon.paper(), depth=llm["num_hidden_layers"], vocabulary_size=llm["vocab_size"], marks=marks, codec=codec,
        rope_theta=float(llm["rope_theta"]), tie_embeddings=llm.get("tie_word_embeddings", False),
        block=BlockConfig(width=llm["hidden_size"], heads=heads, kv_heads=llm["num_key_value_heads"],
                          head_dim=llm.get("head_dim") or llm["hidden_size"] // heads,
                          hidden=llm["intermediate_size"], norm_eps=llm["rms_norm_eps"]),
        mar=MarConfig(width=mar["encoder_embed_dim"], layers=mar["encoder_depth"], heads=mar["encoder_num_heads"],
                      decoder_width=mar["decoder_embed_dim"], decoder_layers=mar["decoder_depth"],
                      decoder_heads=mar["decoder_num_heads"], mlp_ratio=mar["mlp_ratio"],
                      token_width=mar["vae_embed_dim"], side=mar["img_size"] // mar["vae_stride"],
                      buffers=mar["buffer_size"], norm_eps=mar.get("norm_eps", 1e-6)),
        head=HeadConfig(width=mar["diffloss_w"], layers=mar["diffloss_d"]),
        gradient_scale=values.get("grad_scale", 0.1), least_hidden=mar["mask_ratio_min"],
        copies=mar["diffusion_batch_mul"], diffusion_steps=values.get("diffusion", {}).get("steps", 1000),
        sampling_steps=tuple(int(n) for n in str(mar["num_sampling_steps"]).split(",")))


def rules(c: HarmonConfig) -> list[Rule]:
    """How every tensor of the two files is called here (`vae.` marks those of the codec's file)."""
    language = LanguageConfig(block=c.block, depth=c.depth, vocabulary_size=c.vocabulary_size,
                              tie_embeddings=c.tie_embeddings)
    out = [replace(r, theirs=tuple(f"llm.{t}" for t in r.theirs)) for r in qwen.rules(language)]
    both = ("weight", "bias")
    same = ("z_proj", "z_proj_ln", "encoder_norm", "decoder_embed", "decoder_norm")
    out += expand(Rule(("mar.{n}.{w}",), "mar.{n}.{w}"), n=same, w=both)
    out += [Rule((f"mar.{n}",), f"mar.{n}") for n in ("fake_latent", "mask_token")]
    tables = {"encoder_pos_embed_learned": "encoder_positions", "decoder_pos_embed_learned": "decoder_positions",
              "diffusion_pos_embed_learned": "head_positions"}
    out += [Rule((f"mar.{theirs}",), f"mar.{ours}") for theirs, ours in tables.items()]
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1",
             "mlp.fc2": "mlp.fc2"}
    for side, depth in (("encoder", c.mar.layers), ("decoder", c.mar.decoder[1])):
        block = f"mar.{side}_blocks.{{i}}"
        per_block = [Rule((f"{block}.{theirs}.{{w}}",), f"{block}.{ours}.{{w}}") for theirs, ours in names.items()]
        per_block += [Rule((f"{block}.attn.qkv.{{w}}",), f"{block}.self_attn.{p}_proj.{{w}}", part=(k, 3))
                      for k, p in enumerate("qkv")]
        out += [r for rule in per_block for r in expand(rule, i=range(depth), w=both)]
    net = "mar.diffloss.net"
    head = {"time_embed.mlp.0": "time.mlp.0", "time_embed.mlp.2": "time.mlp.2", "cond_embed": "condition",
            "input_proj": "input", "final_layer.linear": "output", "final_layer.adaLN_modulation.1": "modulation.1"}
    blocks = {"in_ln": "norm", "mlp.0": "mlp.0", "mlp.2": "mlp.2", "adaLN_modulation.1": "modulation.1"}
    head |= {f"res_blocks.{i}.{t}": f"blocks.{i}.{o}" for i in range(c.head.layers) for t, o in blocks.items()}
    out += [Rule((f"{net}.{theirs}.{w}",), f"denoiser.{ours}.{w}") for theirs, ours in head.items() for w in both]
    out += expand(Rule(("proj_{d}.{n}.{w}",), "proj_{d}.{n}.{w}"), d=("in", "out"), n=(0, 2), w=both)
    with torch.device("meta"):
        codec = Harmon(c).codec.state_dict()
    return out + [Rule((f"vae.{n}",), f"codec.{n}") for n in codec]


def load(folder: str | Path, marks: Marks = QWEN_MARKS) -> Harmon:
    """A published folder as a system; any tensor that finds no home is an error."""
    folder = Path(folder)
    c = config_of(json.loads((folder / "config.json").read_text()), marks)
    theirs = load_file(folder / "weights.safetensors")
    theirs |= {f"vae.{k}": v for k, v in load_file(folder / "kl16.safetensors").items()}
    model = Harmon.from_folder(c, folder)
    shapes = {k: v.shape for k, v in model.state_dict().items() if not (c.tie_embeddings and k == "head.weight")}
    ignore = (CLASSES, "llm.lm_head.") if c.tie_embeddings else (CLASSES,)  # a tied head is stored too
    state, report = to_ours(theirs, rules(c), shapes, ignore)
    if report:
        raise ValueError(f"expected the published Harmon layout in {folder}, got {report}")
    model.load_state_dict(state, strict=not c.tie_embeddings)
    return model.eval()
