"""Infinity's published files: `vae.safetensors` (multi-scale tokenizer with bits by sign, BSQ)."""
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
from diptych.parts.quantize import LossWeights, ResidualConfig, SignConfig, flip_bits, resize, scale_inputs
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig

CONSTANT = ("quantize.lfq.mask", "quantizer.lfq.mask")  # powers of two


def tokenizer_config(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VQTokenizerConfig:
    """From the whole config (sections `vae` and `schedule`) and the tensors."""
    vae = values["vae"]
    if any(frames != 1 for frames, _, _ in values["schedule"]):
        raise ValueError(f"expected scales of one frame, got {values['schedule']}; fix: video schedules are not built")
    quantizer = ResidualConfig(codebook=SignConfig(width=vae["codebook_dim"], unit=True, packed=False),
                               scales=tuple((h, w) for _, h, w in values["schedule"]), up="bilinear", compare="step",
                               weights=LossWeights(codebook=0.0, commitment=0.25))
    return VQTokenizerConfig(encoder=pyramid(tensors, "encoder.", vae["base_ch"]),
                             decoder=pyramid(tensors, "decoder.", vae["base_ch"]),
                             in_kernel=0, out_kernel=0, quantizer=quantizer)


def tokenizer_rules(config: VQTokenizerConfig) -> list[Rule]:
    """Every convolution and norm sits one module deeper there: `conv1.conv.weight`, `norm1.norm.weight`."""
    def rename(ours: str) -> str:
        return re.sub(r"(\w+)\.(weight|bias)$",
                      lambda m: f"{m[1]}.{'norm' if m[1].startswith('norm') else 'conv'}.{m[2]}", ours)
    return named(tensor_names(lambda: VQTokenizer(config)), rename)


def load_tokenizer(folder: str | Path) -> VQTokenizer:
    """The tokenizer of a folder with `config.json` and `vae.safetensors`."""
    folder = Path(folder)
    theirs = load_file(folder / "vae.safetensors")
    config = tokenizer_config(json.loads((folder / "config.json").read_text()), theirs)
    model = VQTokenizer(config)
    place(model, theirs, tokenizer_rules(config), folder, CONSTANT)
    return model.eval()


# -- golden cases -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def tokenizer_cases(folder: Path, golden: Mapping[str, Tensor]) -> list[Case]:
    model = load_tokenizer(folder)
    quantizer = residual(model)
    scales = quantizer.config.scales
    features = model.features(golden["vae.input.pixels"])
    out = quantizer(features)
    bits = model.layout(*golden["vae.input.pixels"].shape[2:]).split(out.codes)
    own = {"h": features, "z": out.vectors, "reconstruction": model.decode(out.codes).clamp(-1, 1)}
    own |= {f"bits_scale{k}": part[:, None] for k, part in enumerate(bits)}
    own |= {f"area_input_scale{k}": resize(x, grid, "area").unsqueeze(2)
            for k, (x, grid) in enumerate(zip(out.partials, scales[1:], strict=False), 1)}
    cases = compare("vae", own, golden)
    options = json.loads((folder / "config.json").read_text())["self_correction"]
    if options["apply_spatial_patchify"]:
        raise ValueError("expected apply_spatial_patchify 0, got 1; fix: that layout of bits is not built")
    strengths = (golden["correct.input.strength_percent"] * 0.01).tolist()
    uniforms = [golden[f"correct.input.uniform_scale{k}"] for k in range(len(strengths))]
    # without requantization the flips only reach what the published code returns besides, not the map
    out = quantizer(features, change=flip_bits(uniforms, strengths) if options["noise_apply_requant"] else None)
    inputs = scale_inputs(out.partials, scales, "bilinear")
    return cases + compare("correct", {"labels": out.codes, "x_wo_prefix": inputs}, golden)


def parity(folder: Path) -> list[Case]:
    """The cases of an Infinity folder that are built here: the tokenizer's and the self-correction."""
    return tokenizer_cases(folder, load_file(folder / "golden.safetensors"))
