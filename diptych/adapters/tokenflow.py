"""TokenFlow's published tokenizer: `tokenizer.safetensors` (what the .pt holds under "model"), CLIP-B variant."""
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule
from diptych.adapters.tokenizers import (
    compare,
    conv_block_name,
    gradients,
    llamagen_config,
    named,
    place,
    residual,
    tensor_names,
)
from diptych.parts.quantize import CodebookConfig, Grid, JointConfig, LossWeights, ResidualConfig
from diptych.parts.semantic import DualTokenizer, DualTokenizerConfig
from diptych.parts.towers import TowerConfig
from diptych.parts.vqgan import PyramidConfig

TABLE_OFFSET = 0.1
NORM_EPS = 1e-5  # CLIP's LayerNorm
RENAMES = {  # patterns in ours -> theirs, tried in order on the whole name
    r"^semantic_(en|de)coder\.": r"\1coder_vqkd.",
    r"^(en|de)code_task\.": r"\1code_task_layer.",
    r"^quantizer\.codebooks\.0\.parts\.0\.": "quantize.embedding_vqkd.",
    r"^quantizer\.codebooks\.0\.parts\.1\.": "quantize.embedding_vqgan."}
CLIP = {"patch_embedding.": "conv1.", "class_token": "class_embedding", "positions": "positional_embedding",
        "first_norm.": "ln_pre.", "last_norm.": "ln_post.", "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.",
        "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.", "self_attn.out_proj.": "attn.out_proj.",
        "layers.": "transformer.resblocks."}
VQKD = {"patch_embedding.": "patch_embed.proj.", "class_token": "cls_token", "positions": "pos_embed",
        "last_norm.": "fc_norm.", "layer_norm1.": "norm1.", "layer_norm2.": "norm2.",
        "self_attn.out_proj.": "attn.proj.", "layers.": "blocks."}


def square(sides: list[int]) -> tuple[Grid, ...]:
    return tuple((side, side) for side in sides)


def tokenizer_config(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DualTokenizerConfig:
    """From the `tokenizer` section of the config and the tensors."""
    wanted = {"teacher": "clipb_224", "output_resize": None, "vqgan_input_side": None}
    for key, only in wanted.items():
        if values.get(key, only) != only:
            raise ValueError(f"expected {key} {only} (the CLIP-B variant), got {values[key]}")
    clip, head = values["semantic_encoder"], values["decoder_vqkd"]
    pixels = llamagen_config(values)
    encoder, decoder = pixels.encoder, pixels.decoder
    assert isinstance(encoder, PyramidConfig)
    # the enhanced release has a wider and deeper decoder: what is stored decides
    blocks = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"decoder\.conv_blocks\.0\.res\.(\d+)\.", name)))
    decoder = replace(decoder, channels=len(tensors["decoder.norm_out.weight"]) // decoder.channel_mult[0],
                      blocks=(blocks,) * len(decoder.blocks))
    parts = tuple(CodebookConfig(values=values["codebook_size"], width=values[key])
                  for key in ("semantic_code_dim", "codebook_embed_dim"))
    weights = LossWeights(commitment=values["commit_loss_beta"], entropy=values["entropy_loss_ratio"])
    quantizer = ResidualConfig(codebook=JointConfig(parts=parts), scales=square(values["scale_rq_layers"]),
                               compare="step", weights=weights)
    student = TowerConfig(width=clip["width"], mlp_width=4 * clip["width"], layers=clip["layers"], heads=clip["heads"],
                          patch=clip["patch_size"], side=clip["input_resolution"] // clip["patch_size"],
                          norm_eps=NORM_EPS, gelu="quick", class_token=True, patch_bias=False, first_norm=True,
                          last_norm=True, table_offset=TABLE_OFFSET)
    back = TowerConfig(width=head["embed_dim"], mlp_width=int(head["embed_dim"] * head["mlp_ratio"]),
                       layers=head["depth"], heads=head["num_heads"], patch=head["patch_size"],
                       side=head["img_size"] // head["patch_size"], norm_eps=head["norm_eps"], gelu="exact",
                       class_token=True, last_norm=True, table_offset=TABLE_OFFSET)
    return DualTokenizerConfig(semantic_encoder=student, semantic_decoder=back, encoder=encoder,
                               decoder=decoder, quantizer=quantizer, latent_channels=pixels.latent_channels,
                               feature_width=values["decoder_out_dim"])


def tokenizer_rules(config: DualTokenizerConfig) -> list[Rule]:
    levels = len(config.encoder.blocks)

    def rename(ours: str) -> str | Rule:
        if ours.startswith(("encoder.", "decoder.")):
            return conv_block_name(ours, levels)
        name = ours
        for pattern, theirs in RENAMES.items():
            name = re.sub(pattern, theirs, name)
        clip = ours.startswith("semantic_encoder.")
        for mine, theirs in (CLIP if clip else VQKD).items() if "vqkd." in name else ():
            name = name.replace(mine, theirs)
        if found := re.fullmatch(r"(.*)self_attn\.([qkv])_proj\.(weight|bias)", name):
            part = ("qkv".index(found[2]), 3)
            if clip:
                return Rule((f"{found[1]}attn.in_proj_{found[3]}",), ours, part=part)
            if found[3] == "weight":
                return Rule((f"{found[1]}attn.qkv.weight",), ours, part=part)
            return f"{found[1]}attn.{found[2]}_bias"
        return name
    return named(tensor_names(lambda: DualTokenizer(config)), rename)


def load_tokenizer(folder: str | Path) -> DualTokenizer:
    """The tokenizer of a folder with `config.json` (section `tokenizer`) and `tokenizer.safetensors`."""
    folder = Path(folder)
    theirs = load_file(folder / "tokenizer.safetensors")
    config = tokenizer_config(json.loads((folder / "config.json").read_text())["tokenizer"], theirs)
    model = DualTokenizer(config)
    # a bias on keys moves no softmax: they store none
    zero = {k.replace("q_bias", "k_bias"): torch.zeros_like(v) for k, v in theirs.items() if k.endswith("attn.q_bias")}
    flat = {k: v.squeeze() if k == "decoder_vqkd.cls_token" else v[0] for k, v in theirs.items()
            if k in ("decoder_vqkd.cls_token", "decoder_vqkd.pos_embed")}
    place(model, {**theirs, **zero, **flat}, tokenizer_rules(config), folder,
          ("encoder_vqkd.proj", "quantize.codebook_used"))
    return model.eval()


# -- golden cases -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _eval_cases(model: DualTokenizer, golden: Mapping[str, Tensor]) -> list[Case]:
    pixels = golden["tokenizer.input.pixels"]
    semantic, pixel = model.maps(pixels)
    out = model.quantize(pixels)
    kept = sum(rows * columns for rows, columns in residual(model).config.scales[:-2])
    preview = model.quantizer.lookup(out.codes[:, :kept])
    own = {"semantic_encoder": model.semantic_encoder(pixels).flatten(2).transpose(1, 2),
           "semantic_map": semantic.flatten(2).transpose(1, 2), "pixel_map": pixel, "indices": out.codes,
           "quant": out.vectors, "semantic_recon": model.semantics(out.vectors),
           "pixel_recon": model.decode(out.codes), "prefix_pixel_recon": model.decode_vectors(preview),
           "prefix_semantic_recon": model.semantics(preview)}
    return compare("tokenizer", own, golden)


def _train_cases(model: DualTokenizer, golden: Mapping[str, Tensor], sides: list[int]) -> list[Case]:
    """`train.full`, and `train.drop` where the scale that the number of indices lacks is left out."""
    pixels, cases = golden["train.input.pixels"], []
    for name in ("train.full", "train.drop"):
        lacking = sum(side**2 for side in sides) - golden[f"{name}.output.indices"].shape[1]
        kept = [side for side in sides if side**2 != lacking]
        model.zero_grad()
        views = model(pixels, square(kept))
        losses = {"vq_loss": views.quantized.losses["codebook"], "commit_loss": views.quantized.losses["commitment"]}
        own = {**losses, "indices": views.quantized.codes, "quant": views.quantized.vectors}
        if f"{name}.output.total" in golden:
            own["total"] = (sum(views.quantized.losses.values()) + F.mse_loss(views.pixels, pixels)
                            + views.features.square().mean())
            own["total"].backward()
            cases += gradients(f"{name}.output.grad.", model, golden, tokenizer_rules(model.config))
        cases += compare(name, own, golden)
    return cases


@torch.no_grad()
def _generator_inputs(model: DualTokenizer, golden: Mapping[str, Tensor]) -> list[Case]:
    """What the language model reads of codes, before its projector; `curr1` feeds the second input scale its own."""
    codes = golden["t2i.input.codes"]
    own = {"input_features": residual(model).running_inputs(codes), "decoded_pixels": model.decode(codes),
           "input_features_curr1": residual(model).running_inputs(codes, again=2)}
    return compare("t2i", own, golden)


def parity(folder: Path) -> list[Case]:
    """The cases of a TokenFlow folder that are built here: the tokenizer's, and what the generator reads of codes."""
    golden, model = load_file(folder / "golden.safetensors"), load_tokenizer(folder)
    sides = json.loads((folder / "config.json").read_text())["tokenizer"]["train_scale_rq_layers"]
    return [*_eval_cases(model, golden), *_train_cases(model, golden, sides), *_generator_inputs(model, golden)]
