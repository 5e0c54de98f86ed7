"""SEED's published tokenizer: `seed_quantizer.safetensors` (what the .pt holds) and the tower's own file."""
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule, to_theirs
from diptych.adapters.tokenizers import TOLERANCE, compare, named, place
from diptych.parts.qformer import QFormerConfig
from diptych.parts.quantize import CodebookConfig, LossWeights, VectorConfig
from diptych.parts.semantic_1d import WEIGHTS, SemanticTokenizer, SemanticTokenizerConfig
from diptych.parts.towers import TowerConfig

CAUSAL_COUNT = 32  # the released Q-Former is causal for exactly so many queries, and for no other number
TOWER = "visual_encoder."  # how the tokenizer calls the tower, whose own file has no prefix
UNUSED = ("Qformer.bert.embeddings.position_ids", "Reverse_Qformer.bert.embeddings.position_ids")
BLOCKS = {"patch_embedding.": "patch_embed.proj.", "class_token": "cls_token", "positions": "pos_embed",
          "layer_norm1.": "norm1.", "layer_norm2.": "norm2.", "self_attn.out_proj.": "attn.proj.",
          "layers.": "blocks."}
RENAMES = {  # patterns in ours -> theirs, tried in order on the whole name
    r"^vision_norm\.": "ln_vision.", r"^(en|de)code_task\.": r"\1code_task_layer.",
    r"^quantizer\.codebook\.": "quantize.embedding.", r"^narrow\.": "image_down.", r"^project\.": "distill_image_proj.",
    r"^qformer\.queries$": "query_tokens", r"^reverse\.queries$": "reverse_tokens",
    r"^qformer\.": "Qformer.bert.", r"^reverse\.": "Reverse_Qformer.bert.",
    r"bert\.norm\.": "bert.embeddings.LayerNorm.", r"bert\.layers\.": "bert.encoder.layer.",
    r"\.cross\.": ".crossattention.", r"attention\.(query|key|value)\.": r"attention.self.\1.",
    r"attention\.out\.": "attention.output.dense.", r"attention\.norm\.": "attention.output.LayerNorm.",
    r"(layer\.\d+)\.up\.": r"\1.intermediate_query.dense.", r"(layer\.\d+)\.down\.": r"\1.output_query.dense.",
    r"(layer\.\d+)\.norm\.": r"\1.output_query.LayerNorm."}


def causal(count: int) -> bool:
    """Whether the released Q-Former is causal for so many queries."""
    return count == CAUSAL_COUNT


def tokenizer_config(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SemanticTokenizerConfig:
    """From `config.json` and the tensors, which tell the head: training and released weights differ in it."""
    own, tower, bert = values["quantizer"], values["vit"], values["bert"]
    if bert["hidden_act"] != "gelu":
        raise ValueError(f"expected hidden_act of the Q-Former to be 'gelu', got {bert['hidden_act']!r}")
    if not own["blocks_for_image"]:
        raise ValueError("expected a tokenizer with blocks_for_image, got one without")
    vision = TowerConfig(width=tower["embed_dim"], mlp_width=int(tower["embed_dim"] * tower["mlp_ratio"]),
                         layers=tower["depth"], heads=tower["num_heads"], patch=tower["patch_size"],
                         side=tower["img_size"] // tower["patch_size"], norm_eps=tower["norm_eps"], gelu="exact",
                         class_token=True)

    def qformer(queries: int, feature_width: int) -> QFormerConfig:
        return QFormerConfig(width=bert["hidden_size"], mlp_width=bert["intermediate_size"],
                             layers=bert["num_hidden_layers"], heads=bert["num_attention_heads"],
                             norm_eps=bert["layer_norm_eps"], queries=queries, cross_every=own["cross_attention_freq"],
                             feature_width=feature_width, causal=causal(queries))

    beta = values["vq_beta"]
    weights = (LossWeights(codebook=beta, commitment=1.0) if values["legacy"] else
               LossWeights(codebook=1.0, commitment=beta))
    narrow = tuple(len(v) for k, v in sorted(tensors.items()) if k.startswith("image_down."))
    return SemanticTokenizerConfig(
        vision=vision, qformer=qformer(own["num_query_token"], vision.width),
        quantizer=VectorConfig(codebook=CodebookConfig(values=own["n_embed"], width=own["codebook_embed_dim"],
                                                       norm="none"), weights=weights),
        semantic_layers=own["decode_depth"] if own["recon_s"] else 0, image_layers=own["decode_depth"],
        heads=values["decoder_block_heads"], narrow=narrow,
        reverse=None if narrow else qformer(1, bert["hidden_size"]), embedding_width=own["image_features_dim"])


def tokenizer_rules(config: SemanticTokenizerConfig) -> list[Rule]:
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in SemanticTokenizer(config).state_dict().items()}

    def rename(ours: str) -> str | Rule:
        if found := re.match(r"(vision|semantic|image)\.", ours):
            return block_rule(ours, found[1], shapes[ours])
        name = ours
        for pattern, theirs in RENAMES.items():
            name = re.sub(pattern, theirs, name)
        return Rule((name,), ours, shape=(1, *shapes[ours])) if name.endswith("_tokens") else name

    return named(shapes, rename)


def block_rule(ours: str, part: str, shape: tuple[int, ...]) -> str | Rule:
    """Of a tensor of the tower or of a branch; branches are called `blocks.N` and `blocks_image.N`."""
    name = ours.removeprefix(f"{part}.")
    for mine, theirs in BLOCKS.items():
        name = name.replace(mine, theirs)
    if part == "image":
        name = re.sub(r"^(blocks|pos_embed)", r"\1_image", name)
    name = TOWER + name if part == "vision" else name
    if found := re.fullmatch(r"(.*)self_attn\.([qkv])_proj\.(weight|bias)", name):
        if part == "vision" and found[3] == "bias":
            return f"{found[1]}attn.{found[2]}_bias"
        return Rule((f"{found[1]}attn.qkv.{found[3]}",), ours, part=("qkv".index(found[2]), 3))
    if "pos_embed" in name or name.endswith("cls_token"):
        return Rule((name,), ours, shape=(1, 1, *shape)[-3:])
    return name


def load_tokenizer(folder: str | Path) -> SemanticTokenizer:
    """The tokenizer of a folder with `config.json`, `seed_quantizer.safetensors` and `eva_vit.safetensors`."""
    folder = Path(folder)
    values, theirs = json.loads((folder / "config.json").read_text()), load_file(folder / "seed_quantizer.safetensors")
    theirs |= {TOWER + k: v for k, v in load_file(folder / "eva_vit.safetensors").items()}
    config = tokenizer_config(values, theirs)
    model = SemanticTokenizer(config)
    # a bias on keys moves no softmax: they store none
    absent = "k" if values["vit"]["qkv_bias"] else "qkv"
    theirs |= {f"{TOWER}blocks.{i}.attn.{name}_bias": torch.zeros(values["vit"]["embed_dim"])
               for i in range(values["vit"]["depth"]) for name in absent}
    place(model, theirs, tokenizer_rules(config), folder, UNUSED)
    return model.eval()


# -- golden cases -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def _encode_cases(model: SemanticTokenizer, golden: Mapping[str, Tensor]) -> list[Case]:
    """`encode`, and `encode_N_queries` with the first N queries only."""
    features = model.features(golden["encode.input.image"])
    states = model.qformer(features)
    z = model.code_map(states)
    quantized = model.quantizer(z)
    expanded = model.expand(quantized.vectors[:, :, 0].transpose(1, 2))
    cases = compare("encode", {"vit_features": features, "qformer": states, "pre_quant": z[:, :, 0].transpose(1, 2),
                               "indices": quantized.codes[:, 0], "decoded_queries": expanded}, golden)
    for key in sorted(golden):
        if found := re.fullmatch(r"(encode_(\d+)_queries)\.output\.qformer", key):
            count = int(found[2])
            cases += compare(found[1], {"qformer": model.qformer(features, count, causal(count))}, golden)
    return cases


def _train_cases(model: SemanticTokenizer, golden: Mapping[str, Tensor]) -> list[Case]:
    """The weighted terms, their sum, and its gradients, each relative to its largest entry."""
    model.zero_grad()
    terms = model.losses(model(model.states(golden["encode.input.image"])), golden["train.input.target_image_embeds"])
    weighted = {k: WEIGHTS[k] * v for k, v in terms.items()}
    loss = torch.stack(list(weighted.values())).sum()
    loss.backward()
    names = {"quantize": "loss_embed", "image": "loss_distil_image", "recon": "loss_recon_s"}
    cases = compare("train", {"loss": loss, **{names[k]: v for k, v in weighted.items()}}, golden)
    own = to_theirs({k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()},
                    tokenizer_rules(model.config))
    for key in sorted(k for k in golden if k.startswith("train.output.grad.")):
        wanted = golden[key]
        scale = wanted.abs().max().clamp(min=1e-6)  # below it all is rounding
        cases.append(Case.compare(key, own[key.removeprefix("train.output.grad.")] / scale, wanted / scale, TOLERANCE))
    return cases


def parity(folder: Path) -> list[Case]:
    """Every case of a SEED folder: codes and what leads to them, embeddings of codes, losses and gradients."""
    golden, model = load_file(folder / "golden.safetensors"), load_tokenizer(folder)
    with torch.no_grad():
        decoded = {"image_embeds": model.decode(golden["decode.input.codes"])}
    return [*_encode_cases(model, golden), *compare("decode", decoded, golden), *_train_cases(model, golden)]
