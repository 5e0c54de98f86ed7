"""Show-o's published files: `magvitv2.safetensors` (MAGVIT-v2 tokenizer with codes by sign)."""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule
from diptych.adapters.tokenizers import compare, named, place, pyramid, tensor_names
from diptych.parts.quantize import LossWeights, SignConfig, VectorConfig
from diptych.parts.vq import VQTokenizer, VQTokenizerConfig

CONSTANT = ("quantize.embedding", "quantize.power_vals")  # the corners of the cube and the powers of two


def tokenizer_config(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VQTokenizerConfig:
    """From the `magvitv2` section of the config and the tensors."""
    commitment, beta = values["commit_loss_multiplier"], values["beta"]
    # theirs weighs what moves the features by 1 and what would move the corners, which are fixed, by beta
    weights = LossWeights(codebook=commitment * beta, commitment=commitment, entropy=values["entropy_multiplier"])
    encoder, decoder = (pyramid(tensors, f"{side}.", values[side]["ch"]) for side in ("encoder", "decoder"))
    return VQTokenizerConfig(encoder=encoder, decoder=decoder, latent_channels=values["encoder"]["z_channels"],
                             quantizer=VectorConfig(codebook=SignConfig(width=values["codebook_dim"]), weights=weights))


def tokenizer_rules(config: VQTokenizerConfig) -> list[Rule]:
    homes = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    return named(tensor_names(lambda: VQTokenizer(config)),
                 lambda ours: ".".join([homes.get(ours.split(".")[0], ours.split(".")[0]), *ours.split(".")[1:]]))


def load_tokenizer(folder: str | Path) -> VQTokenizer:
    """The tokenizer of a folder with `config.json` (section `magvitv2`) and `magvitv2.safetensors`."""
    folder = Path(folder)
    theirs = load_file(folder / "magvitv2.safetensors")
    config = tokenizer_config(json.loads((folder / "config.json").read_text())["magvitv2"], theirs)
    model = VQTokenizer(config)
    place(model, theirs, tokenizer_rules(config), folder, CONSTANT)
    return model.eval()


# -- golden cases -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def tokenizer_cases(folder: Path, golden: Mapping[str, Tensor]) -> list[Case]:
    model = load_tokenizer(folder)
    features = model.features(golden["vq.input.pixels"])
    out = model.quantizer(features)
    entropy = out.losses.pop("entropy", torch.zeros(()))  # theirs is returned beside the sum of the others
    cases = compare("vq", {"pre_quant": features, "quant": out.vectors, "codes": out.codes.flatten(1),
                           "reconstruction": model.decode(out.codes), "entropy_loss": entropy,
                           "quantizer_loss": sum(out.losses.values(), torch.zeros(()))}, golden)
    codes = model.encode(golden["vq_rect.input.pixels"])
    return cases + compare("vq_rect", {"codes": codes.flatten(1), "reconstruction": model.decode(codes)}, golden)


def parity(folder: Path) -> list[Case]:
    """The cases of a Show-o folder that are built here: the tokenizer's."""
    return tokenizer_cases(folder, load_file(folder / "golden.safetensors"))
