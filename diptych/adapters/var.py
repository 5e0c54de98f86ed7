"""VAR's published files: `vae.safetensors` (the multi-scale tokenizer). Its attention has one matrix for q, k and v."""
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule
from diptych.adapters.tokenizers import compare, named, place, pyramid, residual, tensor_names
from diptych.parts.quantize import CodebookConfig, LossWeights, MixConfig, ResidualConfig, scale_inputs
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig


def tokenizer_config(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VQTokenizerConfig:
    """From the `vae` section of the config and the tensors."""
    ratio, scales = abs(values["quant_resi"]), tuple((side, side) for side in values["v_patch_nums"])
    count = values["share_quant_resi"] or len(scales)  # 0: one convolution per scale
    quantizer = ResidualConfig(
        codebook=CodebookConfig(values=values["vocab_size"], width=values["z_channels"],
                                norm="lookup" if values["using_znorm"] else "none"),
        scales=scales, mix=MixConfig(count=count, ratio=ratio) if ratio > 1e-6 else None,
        weights=LossWeights(commitment=values["beta"]))
    return VQTokenizerConfig(encoder=pyramid(tensors, "encoder.", values["ch"]),
                             decoder=pyramid(tensors, "decoder.", values["ch"]), latent_channels=values["z_channels"],
                             in_kernel=values["quant_conv_ks"], out_kernel=values["quant_conv_ks"],
                             quantizer=quantizer)


def tokenizer_rules(config: VQTokenizerConfig, share: int) -> list[Rule]:
    """`share`: the published `share_quant_resi`, on which the names of the mixing convolutions depend."""
    convs = {0: r"quantize.quant_resi.\1.", 1: "quantize.quant_resi.qresi."}.get(
        share, r"quantize.quant_resi.qresi_ls.\1.")

    def rename(ours: str) -> str | Rule:
        if found := re.fullmatch(r"(.*attn.*)\.([qkv])\.(weight|bias)", ours):
            return Rule((f"{found[1]}.qkv.{found[3]}",), ours, part=("qkv".index(found[2]), 3))
        name = ours.replace("quantizer.codebooks.0.", "quantize.embedding.")
        return re.sub(r"^quantizer\.mix\.convs\.(\d+)\.", convs, name)
    return named(tensor_names(lambda: VQTokenizer(config)), rename)


def load_tokenizer(folder: str | Path) -> VQTokenizer:
    """The tokenizer of a folder with `config.json` (section `vae`) and `vae.safetensors`."""
    folder = Path(folder)
    values, theirs = json.loads((folder / "config.json").read_text())["vae"], load_file(folder / "vae.safetensors")
    config = tokenizer_config(values, theirs)
    model = VQTokenizer(config)
    place(model, theirs, tokenizer_rules(config, values["share_quant_resi"]), folder, ("quantize.ema_vocab_hit_SV",))
    return model.eval()


# -- golden cases -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def tokenizer_cases(folder: Path, golden: Mapping[str, Tensor]) -> list[Case]:
    model = load_tokenizer(folder)
    quantizer = residual(model)
    scales = quantizer.config.scales
    features = model.features(golden["vae.input.pixels"])
    out = quantizer(features)
    maps = quantizer.partial_maps(out.codes)
    codes = model.layout(*golden["vae.input.pixels"].shape[2:]).split(out.codes)
    own = {"f": features, "var_input": scale_inputs(maps, scales, "area"),
           "vq_loss": sum(out.losses.values(), torch.zeros(())),
           "images_per_scale": torch.stack([model.decode_vectors(x).clamp(-1, 1) for x in out.partials])}
    own |= {f"idx_scale{k}": part.flatten(1) for k, part in enumerate(codes)}
    own |= {f"fhat_scale{k}": x for k, x in enumerate(maps)}
    return compare("vae", own, golden)


def parity(folder: Path) -> list[Case]:
    """The cases of a VAR folder that are built here: the tokenizer's."""
    return tokenizer_cases(folder, load_file(folder / "golden.safetensors"))
