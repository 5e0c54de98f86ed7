"""The published Harmon: a flat state dict (`llm.*`, `mar.*`, `proj_in.*`, `proj_out.*`) and MAR's codec kl16.

A folder holds `harmon*.pth` and `kl16.ckpt` as released, whose sizes are read off the tensors; or
`weights.safetensors`, `kl16.safetensors` and a `config.json` with the numbers of `llm`, `mar` and `vae`. The class
embeddings of MAR are no part of the system: Harmon never uses them.
"""
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from diptych.adapters import qwen
from diptych.adapters.keys import Rule, expand
from diptych.adapters.published import Checkpoint, Layout, Written, build, others
from diptych.adapters.tensors import Tensors, read_json, weights_in
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
RELEASED = "harmon*.pth"  # several models have one repository
CLASSES = "mar.class_emb.weight"
HEAD_DIMS = {896: 64, 1536: 128}  # of Qwen2.5-0.5B and 1.5B, by width
MAR_HEADS = {768: 12, 1024: 16, 1280: 16}  # MAR-B, L and H


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
    return cast(Harmon, build(read(folder, {}, marks), folder, dtype=torch.float32)[0])


def read(folder: Path, parts: Mapping[str, Path], marks: Marks = QWEN_MARKS) -> Checkpoint:
    if len(several := sorted(p.name for p in folder.glob(RELEASED))) > 1:
        raise ValueError(f"expected the weights of one Harmon in {folder}, got {', '.join(several)}; "
                         "fix: keep one of them there, beside kl16.ckpt")
    tensors = Tensors({"": _weights(folder), "vae.": _codec(folder)})
    stated = folder / "config.json"
    c = config_of(read_json(stated) if stated.is_file() else released(tensors), marks)
    ignore = (CLASSES, "llm.lm_head.") if c.tie_embeddings else (CLASSES,)  # a tied head is stored too
    return Checkpoint(cls=Harmon, config=c, tensors=tensors, rules=rules(c), ignore=(*ignore, "vae.loss."),
                      configs=others(folder))


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob(RELEASED))[:1] or weights_in(folder, ("weights",))


def _codec(folder: Path) -> list[Path]:
    return [p for p in (folder / f"kl16.{ending}" for ending in ("safetensors", "ckpt")) if p.is_file()][:1]


def released(tensors: Tensors) -> dict[str, Any]:
    """What `config.json` would say of a release, which has none: sizes as its tensors have them, and what those cannot
    tell as in Qwen2.5 and MAR, by width."""
    shapes = {name: value.shape for name, value in tensors.meta().items()}

    def count(prefix: str) -> int:
        found = [re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in shapes]
        return 1 + max((int(m[1]) for m in found if m), default=-1)

    rows, width = shapes["llm.model.embed_tokens.weight"]
    mar, cells = shapes["mar.z_proj.bias"][0], shapes["mar.diffusion_pos_embed_learned"][1]
    if width not in HEAD_DIMS or mar not in MAR_HEADS:
        raise ValueError(f"expected widths of {', '.join(map(str, HEAD_DIMS))} and {', '.join(map(str, MAR_HEADS))}, "
                         f"got {width} and {mar}; fix: state the sizes in a config.json")
    head, layer = HEAD_DIMS[width], "llm.model.layers.0."
    llm = {"vocab_size": rows, "hidden_size": width, "num_hidden_layers": count("llm.model.layers"),
           "num_attention_heads": width // head, "head_dim": head,
           "num_key_value_heads": shapes[f"{layer}self_attn.k_proj.weight"][0] // head,
           "intermediate_size": shapes[f"{layer}mlp.gate_proj.weight"][0], "rms_norm_eps": 1e-6, "rope_theta": 1e6,
           "tie_word_embeddings": "llm.lm_head.weight" not in shapes}
    stride, net, heads = 16, "mar.diffloss.net", MAR_HEADS[mar]
    sizes = {"img_size": math.isqrt(cells) * stride, "vae_stride": stride, "patch_size": 1, "mlp_ratio": 4,
             "encoder_embed_dim": mar, "encoder_depth": count("mar.encoder_blocks"), "encoder_num_heads": heads,
             "decoder_embed_dim": mar, "decoder_depth": count("mar.decoder_blocks"), "decoder_num_heads": heads,
             "vae_embed_dim": shapes["mar.z_proj.weight"][1], "mask_ratio_min": 0.7, "diffusion_batch_mul": 4,
             "buffer_size": shapes["mar.encoder_pos_embed_learned"][1] - cells, "num_sampling_steps": "100",
             "diffloss_w": shapes[f"{net}.cond_embed.bias"][0], "diffloss_d": count(f"{net}.res_blocks")}
    vae = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "resolution": 256,
           "embed_dim": sizes["vae_embed_dim"]}
    return {"llm": llm, "mar": sizes, "vae": vae, "vae_scale": 0.2325}


def write(model: Harmon) -> Written:
    c, b, m, v = model.config, model.config.block, model.config.mar, model.config.codec
    fits = {"block": b.llama_like and b.qkv_bias and not b.qk_norm, "latent_patch": c.latent_patch == 1,
            "codec": v.quant_conv and v.patch == 1 and v.norm_groups == 32 and v.shift == 0.0}
    if wrong := [name for name, fine in fits.items() if not fine]:
        raise ValueError(f"expected a config that the published layout can state, got another {', '.join(wrong)}; "
                         "fix: save it with save_system")
    llm = {"vocab_size": c.vocabulary_size, "hidden_size": b.width, "num_hidden_layers": c.depth,
           "num_attention_heads": b.heads, "num_key_value_heads": b.kv_heads, "head_dim": b.head_dim,
           "intermediate_size": b.hidden, "rms_norm_eps": b.norm_eps, "rope_theta": c.rope_theta,
           "tie_word_embeddings": c.tie_embeddings}
    width, layers, heads = m.decoder
    mar = {"img_size": m.side * v.downsample, "vae_stride": v.downsample, "patch_size": 1, "mlp_ratio": m.mlp_ratio,
           "encoder_embed_dim": m.width, "encoder_depth": m.layers, "encoder_num_heads": m.heads,
           "decoder_embed_dim": width, "decoder_depth": layers, "decoder_num_heads": heads,
           "vae_embed_dim": m.token_width, "mask_ratio_min": c.least_hidden, "diffusion_batch_mul": c.copies,
           "buffer_size": m.buffers, "num_sampling_steps": ",".join(map(str, c.sampling_steps)),
           "diffloss_w": c.head.width, "diffloss_d": c.head.layers, "norm_eps": m.norm_eps}
    side = m.side * v.downsample
    vae = {"ch": v.channels, "ch_mult": list(v.channel_mult), "num_res_blocks": v.num_res_blocks,
           "attn_resolutions": [side // 2**i for i in v.encoder_attention], "resolution": side,
           "embed_dim": v.latent_channels}
    config = {"llm": llm, "mar": mar, "vae": vae, "vae_scale": v.scale, "grad_scale": c.gradient_scale,
              "diffusion": {"steps": c.diffusion_steps}}
    return Written(configs={"config.json": config}, rules=rules(c),
                   files={"weights.safetensors": "", "kl16.safetensors": "vae."})


def _finds(folder: Path) -> bool:
    return bool(_weights(folder)) and bool(_codec(folder))


LAYOUTS = {"original": Layout(about="harmon*.pth (or weights.safetensors with config.json) and kl16.ckpt",
                              finds=_finds, read=read, write=write)}
