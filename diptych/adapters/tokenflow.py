"""TokenFlow's published tokenizer, `tokenizer.safetensors` (what the .pt holds under "model"), CLIP-B variant, and its
drawing model, `t2i.safetensors`: a LLaMA in the names of Hugging Face. Golden cases are in `tokenflow_cases`.

The models that answer are released apart, as LLaVA; a folder without one loads as a system whose own stays untrained.
"""
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters import qwen
from diptych.adapters.keys import Rule, expand, to_ours
from diptych.adapters.tokenizers import conv_block_name, llamagen_config, named, place, tensor_names
from diptych.parts.blocks import BlockConfig
from diptych.parts.interleave import Marks
from diptych.parts.language import LanguageConfig
from diptych.parts.quantize import CodebookConfig, Grid, JointConfig, LossWeights, ResidualConfig
from diptych.parts.semantic import DualTokenizer, DualTokenizerConfig
from diptych.parts.towers import TowerConfig
from diptych.parts.vqgan import PyramidConfig
from diptych.systems.tokenflow import TokenFlow, TokenFlowConfig

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
# what would change the drawing model, with the one value that is built here
FIXED = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "pretraining_tp": 1,
         "rope_scaling": None, "mm_projector_type": "mlp2x_gelu"}
DRAWS = re.compile(r"draw_|level\.|table$|trunk\.(layers\.\d+\.)?\w+\.1\.")  # names of what belongs to it


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


# -- the drawing model ------------------------------------------------------------------------------------------------


def config_of(values: Mapping[str, Any], codec: DualTokenizerConfig) -> TokenFlowConfig:
    """From the `t2i` section of the config. The model that answers is as wide as the other and has one layer."""
    for key, only in FIXED.items():
        if values.get(key, only) != only:
            raise ValueError(f"expected {key} to be {only!r}, got {values[key]!r}")
    words, heads, q = values["image_token_start"], values["num_attention_heads"], codec.quantizer
    assert isinstance(q, ResidualConfig) and isinstance(q.codebook, JointConfig)
    if values["vocab_size"] != words + q.codebook.parts[0].values:
        raise ValueError(f"expected the codes of the tokenizer behind {words} words, got vocab_size "
                         f"{values['vocab_size']}")
    plain = BlockConfig(width=values["hidden_size"], heads=heads,
                        kv_heads=values.get("num_key_value_heads") or heads,
                        head_dim=values["hidden_size"] // heads, hidden=values["intermediate_size"], qkv_bias=False,
                        norm_eps=values["rms_norm_eps"])
    side = q.scales[-1][0] * codec.downsample
    return TokenFlowConfig(
        block=plain, depth=1, draw_block=replace(plain, qk_norm=True, qk_eps=values["qknorm_eps"], norm_behind=True),
        draw_depth=values["num_hidden_layers"], rope_theta=float(values["rope_theta"]), vocabulary_size=words,
        marks=Marks(values["bos"], -1, values["img_token"], -1), codec=codec, picture=(side, side))


def rules(c: TokenFlowConfig) -> list[Rule]:
    """Those of a LLaMA for the second parameter set of the trunk, norms of queries and keys, and what is drawn with."""
    def drawing(ours: str) -> str:
        if ours.startswith(("embed.", "head.")):
            return "draw_" + ours
        return re.sub(r"^(trunk\.(?:layers\.\d+\.)?\w+)\.0\.", r"\1.1.", ours)

    llama = LanguageConfig(block=replace(c.draw_block, qk_norm=False), depth=c.draw_depth,
                           vocabulary_size=c.vocabulary_size, tie_embeddings=False)
    out = [replace(r, ours=drawing(r.ours)) for r in qwen.rules(llama)]
    for theirs, ours in (("query", "q"), ("key", "k")):
        out += expand(Rule((f"model.layers.{{i}}.self_attn.qknorm.{theirs}_norm.weight",),
                           f"trunk.layers.{{i}}.attention.1.{ours}_norm.weight"), i=range(c.draw_depth))
    out += expand(Rule(("model.mm_projector.{n}.{w}",), "draw_projector.{n}.{w}"), n=(0, 2), w=("weight", "bias"))
    cells = sum(rows * columns for rows, columns in c.scales)
    return [*out, Rule(("model.lvl_embed.weight",), "level.weight"),
            Rule(("model.pos_1LC",), "table", shape=(1, cells, c.draw_block.width))]


def load(folder: str | Path) -> TokenFlow:
    """A folder with `config.json`, `tokenizer.safetensors` and `t2i.safetensors`."""
    folder = Path(folder)
    codec, values = load_tokenizer(folder), json.loads((folder / "config.json").read_text())["t2i"]
    model = TokenFlow(config_of(values, codec.config))
    shapes = {k: v.shape for k, v in model.state_dict().items() if DRAWS.match(k)}
    state, report = to_ours(load_file(folder / "t2i.safetensors"), rules(model.config), shapes)
    if report:
        raise ValueError(f"expected the published layout in {folder}, got {report}")
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    model.codec.load_state_dict(codec.state_dict())
    return model.eval()
